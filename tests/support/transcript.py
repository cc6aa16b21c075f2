"""Handshakes as byte transcripts, run on the generators of nbdwire without any socket."""

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


class EndOfInput(Exception):
    """The transcript has no more bytes, and the handshake wants some."""

    def __init__(self, output: bytes) -> None:
        super().__init__(f"the handshake wants more input; it has sent {output.hex()}")
        self.output = output


def run(handshake: Generator[int | bytes, bytes, T], incoming: bytes) -> tuple[T, bytes, bytes]:
    """Feed ``incoming``; returns the result, what was sent, and what was not consumed."""
    output, position = bytearray(), 0
    answer: bytes | None = None
    try:
        while True:
            wanted = next(handshake) if answer is None else handshake.send(answer)
            if isinstance(wanted, int):
                assert wanted > 0, "asking for nothing is a waste of a round"
                if len(incoming) < position + wanted:
                    handshake.close()
                    raise EndOfInput(bytes(output))
                answer = incoming[position : position + wanted]
                position += wanted
            else:
                output += wanted
                answer = b""
    except StopIteration as stop:
        return stop.value, bytes(output), incoming[position:]


def parse_transcript(text: str) -> tuple[bytes, bytes]:
    """``C:`` and ``S:`` lines, hexadecimal with ``'text'`` parts, as (client's, server's) bytes."""
    sides = {"C": bytearray(), "S": bytearray()}
    for line in text.strip().splitlines():
        side, _, rest = line.strip().partition(":")
        sides[side] += parse_bytes(rest.partition("#")[0])
    return bytes(sides["C"]), bytes(sides["S"])


def parse_bytes(text: str) -> bytes:
    """``0001 'abc' 00*4`` -> b"\\0\\1abc\\0\\0\\0\\0"."""
    out = bytearray()
    for token in text.split():
        if token.startswith("'"):
            out += token.strip("'").encode()
        elif "*" in token:
            byte, _, count = token.partition("*")
            out += bytes.fromhex(byte) * int(count)
        else:
            out += bytes.fromhex(token)
    return bytes(out)
