"""Every order of options, against a small model of what the answers must be.

The model is written from the protocol, by the option's name, and knows nothing of `negotiate`.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from nbdwire.errors import NBDError
from nbdwire.handshake import UPGRADE
from nbdwire.negotiate import ExportInfo, Negotiated, TLSMode, server_handshake
from tests.support import haggling as h
from tests.support.haggling import BASE, info, meta, option

DISK = ExportInfo("disk", 1 << 20, 0x0FFF & ~0x0200, contexts=(BASE, "qemu:dirty-bitmap:a"))
OTHER = ExportInfo("secret", 512, 1, contexts=(BASE,), tls_required=True)

OPTIONS = {
    "STARTTLS": option(h.STARTTLS),
    "EXTENDED_HEADERS": option(h.EXTENDED),
    "STRUCTURED_REPLY": option(h.STRUCTURED),
    "SET_META": meta(h.SET_META, "disk", BASE),
    "LIST_META": meta(h.LIST_META, "disk"),
    "LIST": option(h.LIST),
    "INFO": info(h.INFO, "disk"),
    "GO": info(h.GO, "disk"),
    "EXPORT_NAME": option(h.EXPORT_NAME, b"disk"),
    "ABORT": option(h.ABORT),
    "unknown": option(77, b"data"),
}
MORE = {
    "SET_META nothing": meta(h.SET_META, "disk"),
    "SET_META unknown": meta(h.SET_META, "nope", BASE),
    "GO unknown": info(h.GO, "nope"),
    "GO invalid": option(h.GO, b"x"),
    "GO secret": info(h.GO, "secret"),
    "LIST_META secret": meta(h.LIST_META, "secret"),
    "STRUCTURED_REPLY invalid": option(h.STRUCTURED, b"x"),
    "EXPORT_NAME secret": option(h.EXPORT_NAME, b"secret"),
}
EVERYTHING = OPTIONS | MORE


class Shelf:
    def listing(self) -> list[tuple[str, str]]:
        return [("disk", "")]

    def lookup(self, name: str) -> ExportInfo | None:
        return {"disk": DISK, "secret": OTHER}.get(name)


@dataclass
class Model:
    """The state of one side of one connection, and the answer to each option."""

    mode: TLSMode
    secure: bool = False
    structured: bool = False
    extended: bool = False
    contexts: int = 0
    end: str = ""

    def answer(self, name: str) -> list[int]:
        """The types of the replies; sets ``end`` if it is the last option."""
        option, _, variant = name.partition(" ")
        if option == "EXPORT_NAME":
            self.end = "closed" if self._by_name_is_refused(variant) else f"enters {variant}"
            return []
        if option == "ABORT":
            self.end = "aborted"
            return [h.ACK]
        if self.mode == "required" and not self.secure and option != "STARTTLS":
            return [h.TLS_REQD]
        return getattr(self, f"_{option.lower()}")(variant)  # type: ignore[no-any-return]

    def _by_name_is_refused(self, variant: str) -> bool:
        if self.extended or (self.mode == "required" and not self.secure):
            return True
        return variant == "secret" and not self.secure

    def _starttls(self, _: str) -> list[int]:
        if self.mode == "off":
            return [h.POLICY]
        if self.secure:
            return [h.INVALID]
        self.secure, self.structured, self.extended, self.contexts = True, False, False, 0
        return [h.ACK]

    def _extended_headers(self, _: str) -> list[int]:
        self.extended = True
        return [h.ACK]

    def _structured_reply(self, variant: str) -> list[int]:
        if variant:
            return [h.INVALID]
        if self.extended:
            return [h.EXT_REQD]
        self.structured = True
        return [h.ACK]

    def _set_meta(self, variant: str) -> list[int]:
        self.contexts = 0
        if not self.structured and not self.extended:
            return [h.INVALID]
        if variant == "unknown":
            return [h.UNKNOWN]
        self.contexts = 0 if variant == "nothing" else 1
        return [h.META] * self.contexts + [h.ACK]

    def _list_meta(self, variant: str) -> list[int]:
        if variant == "secret":
            return [h.META, h.ACK] if self.secure else [h.UNKNOWN]
        return [h.META, h.META, h.ACK]

    def _list(self, _: str) -> list[int]:
        return [h.SERVER, h.ACK]

    def _info(self, _: str) -> list[int]:
        return [h.REP_INFO, h.ACK]

    def _go(self, variant: str) -> list[int]:
        if variant == "invalid":
            return [h.INVALID]
        if variant and self.mode == "allowed" and not self.secure:
            return [h.TLS_REQD]
        if variant == "unknown" or (variant == "secret" and not self.secure):
            return [h.UNKNOWN]
        self.end = f"enters {variant}"
        return [h.REP_INFO, h.ACK]

    def _unknown(self, _: str) -> list[int]:
        return [h.UNSUP]

    def flags(self) -> int:
        """The transmission flags for "disk"."""
        flags = DISK.flags if self.structured or self.extended else DISK.flags & ~(1 << 7)
        return flags | (1 << 12 if self.extended and self.contexts else 0)


class Server:
    """Our handshake, one option at a time."""

    def __init__(self, mode: TLSMode) -> None:
        self.handshake = server_handshake(Shelf(), tls=mode)
        self.upgrades = 0
        self.result: Negotiated | None = None
        self.end = ""
        self.said = b""
        self._input = b""
        self._wanted: object = next(self.handshake)
        self.tell((3).to_bytes(4))
        self.said = b""

    def tell(self, data: bytes) -> None:
        """Go on until it wants more than there is."""
        self._input += data
        try:
            while not isinstance(self._wanted, int) or self._wanted <= len(self._input):
                self._wanted = self.handshake.send(self._give())
        except StopIteration as stop:
            self.result = stop.value
            self.end = "aborted" if stop.value is None else "enters"
        except NBDError:
            self.end = "closed"

    def _give(self) -> bytes:
        if isinstance(self._wanted, int):
            data, self._input = self._input[: self._wanted], self._input[self._wanted :]
            return data
        if self._wanted is UPGRADE:
            self.upgrades += 1
        else:
            assert isinstance(self._wanted, bytes)
            self.said += self._wanted
        return b""

    def replies(self) -> list[tuple[int, int]]:
        """(option, type) of what was said since the last call."""
        found = []
        while self.said:
            assert self.said[:8] == bytes.fromhex("0003e889045565a9")
            number, kind, length = (int.from_bytes(self.said[i : i + 4]) for i in (8, 12, 16))
            found.append((number, kind))
            self.said = self.said[20 + length :]
        return found


def check(mode: TLSMode, names: Sequence[str]) -> None:
    """Play the options to the server and to the model."""
    model, server = Model(mode), Server(mode)
    for name in names:
        message, was_secure = EVERYTHING[name], model.secure
        expected = model.answer(name)
        server.tell(message)
        if model.end.startswith("enters"):
            check_entry(model, server, name)
            return
        told = [(int.from_bytes(message[8:12]), kind) for kind in expected]
        assert server.replies() == told, (mode, names, name)
        assert server.end == model.end, (mode, names, name)
        assert server.upgrades == model.secure >= was_secure
        if model.end:
            return


def check_entry(model: Model, server: Server, name: str) -> None:
    assert server.end == "enters", (model, name)
    found = server.result
    assert found is not None
    assert found.tls == model.secure
    assert found.extended == model.extended
    assert found.extended or found.structured == model.structured
    if "secret" in name:
        assert (found.export, found.contexts) == (OTHER, ())
        return
    assert found.export is DISK
    assert found.contexts == ((1, BASE),) * model.contexts
    assert found.flags == model.flags()
    shape = (DISK.size, found.flags)
    if name == "EXPORT_NAME":
        assert server.said == shape[0].to_bytes(8) + shape[1].to_bytes(2)
    else:
        assert server.said[22:32] == shape[0].to_bytes(8) + shape[1].to_bytes(2)
        assert server.replies() == [(h.GO, h.REP_INFO), (h.GO, h.ACK)]


@pytest.mark.parametrize("first", OPTIONS)
def test_all_orders_of_four_options_without_tls(first: str) -> None:
    """nbd.md §2, §3: every option in every state of the haggling."""
    for rest in itertools.product(OPTIONS, repeat=3):
        check("off", (first, *rest))


@pytest.mark.parametrize("first", EVERYTHING)
@pytest.mark.parametrize("mode", ["off", "allowed", "required"])
def test_all_orders_of_three_options_and_their_failures(mode: TLSMode, first: str) -> None:
    """nbd.md §9: NOTLS, SELECTIVETLS and FORCEDTLS; the state is wiped by STARTTLS."""
    for rest in itertools.product(EVERYTHING, repeat=2):
        check(mode, (first, *rest))


@pytest.mark.parametrize("length", [4, 6, 12, 30])
@pytest.mark.parametrize("mode", ["off", "allowed", "required"])
def test_a_sample_of_longer_orders(mode: TLSMode, length: int) -> None:
    """nbd.md §2: haggling goes on for as long as there is no end."""
    choose = random.Random(length)
    lasting = [name for name in EVERYTHING if name not in ("GO", "ABORT", "EXPORT_NAME")]
    for _ in range(500):
        names = choose.choices(lasting, k=length - 1) + choose.choices(list(EVERYTHING), k=1)
        check(mode, names)


def test_control_the_model_would_see_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that keeps structured replies over STARTTLS does not agree with us."""

    def keeps(model: Model, _: str) -> list[int]:
        model.secure = True
        return [h.ACK]

    monkeypatch.setattr(Model, "_starttls", keeps)
    with pytest.raises(AssertionError):
        check("allowed", ("STRUCTURED_REPLY", "STARTTLS", "GO"))
