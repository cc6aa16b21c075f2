# SPDX-License-Identifier: Apache-2.0
import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleece.control.framing import MAX_NESTING, BadFrame, Framer


def frames(*pieces: bytes, limit: int = 1 << 20) -> list[bytes | str]:
    framer = Framer(limit)
    found = [frame for piece in pieces for frame in framer.feed(piece)]
    return [str(frame) if isinstance(frame, BadFrame) else frame for frame in found]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"{}", [b"{}"]),
        (b"{}\r\n{}\n", [b"{}", b"{}"]),
        (b"{}{}[]", [b"{}", b"{}", b"[]"]),
        (b' {"a":\n {"b": [1,\n2]}}\n', [b'{"a":\n {"b": [1,\n2]}}']),
        (b'{"a": "}"}', [b'{"a": "}"}']),
        (b'{"a": "\\"}"}', [b'{"a": "\\"}"}']),
        (b"{'a': '}\\''}", [b"{'a': '}\\''}"]),
        (b"""{"a'": 1}{'a"': 1}""", [b"""{"a'": 1}""", b"""{'a"': 1}"""]),
        (b"garbage {\n{}", [b"garbage {\n", b"{}"]),
        (b"}\n{}", [b"}\n", b"{}"]),
        (b"{", []),
        (b"garbage", []),
        (b" \r\n\t", []),
        (b'{"a": "half\n{}', ["JSON parse error, stray byte 0x0a", b"{}"]),
        (b'{"a": \xff{}', ["JSON parse error, stray byte 0xff", b"{}"]),
    ],
)
def test_a_message_ends_where_its_brackets_balance(
    data: bytes, expected: list[bytes | str]
) -> None:
    assert frames(data) == expected
    assert frames(*(data[i : i + 1] for i in range(len(data)))) == expected


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
OBJECTS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(OBJECTS, st.lists(st.integers(0, 400), max_size=10), st.booleans())
def test_any_objects_in_any_pieces_come_out_as_they_went_in(
    objects: list[dict[str, object]], cuts: list[int], ascii_only: bool
) -> None:
    data = "\r\n".join(json.dumps(o, ensure_ascii=ascii_only) for o in objects).encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]
    found = frames(*pieces)
    assert [json.loads(frame) for frame in found] == objects


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(st.binary(max_size=60), max_size=8))
def test_garbage_never_raises_and_a_line_end_and_an_object_always_recover(
    pieces: list[bytes],
) -> None:
    # 0xff resets whatever brackets are open, the line end then ends a line of garbage.
    assert frames(*pieces, b"\xff\n{}")[-1] == b"{}"


def test_a_message_over_the_limit_is_fatal_whole_or_in_pieces() -> None:
    message = b'{"a": "' + b"x" * 100 + b'"}'
    assert frames(message, limit=len(message)) == [message]
    for pieces in ([message], [message[:60], message[60:]]):
        framer = Framer(len(message) - 1)
        found = [frame for piece in pieces for frame in framer.feed(piece)]
        assert isinstance(found[-1], BadFrame)
        assert found[-1].fatal


def test_a_line_without_end_is_fatal_too() -> None:
    (problem,) = Framer(10).feed(b"x" * 11)
    assert isinstance(problem, BadFrame)
    assert problem.fatal


def test_nesting_is_bounded() -> None:
    deepest = b"[" * MAX_NESTING + b"]" * MAX_NESTING
    assert frames(deepest) == [deepest]
    assert frames(b"[" * (MAX_NESTING + 1)) == ["JSON nesting depth limit exceeded"]
