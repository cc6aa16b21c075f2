# SPDX-License-Identifier: Apache-2.0
"""Add and remove passphrases of an encrypted image (the key slots of its LUKS header).

The data is not touched: all slots hold the same key. A slot counts only when the header says so, so
its material is written first; one that goes is free in the header before its material is wiped.
"""

import os
from typing import Final

from fleece.block.node import Node
from fleece.errors import ImageError
from fleece.formats.qcow2 import luks

_WIPES: Final = 2  # times that old material is overwritten; a copying medium may keep it anyway


def add(
    file: Node,
    where: tuple[int, int],
    old: bytes,
    new: bytes,
    name: str,
    *,
    slot: int | None = None,
    iteration_ms: int = luks.DEFAULT_ITERATION_MS,
) -> int:
    """Let passphrase ``new`` open the image, which ``old`` opens now; the slot that it is in.

    ``slot``: which one; it must be free. `ImageError`.
    """
    header = luks.read_header(file, *where, name)
    master = luks.master_key(file, where[0], header, old)
    if master is None:
        raise ImageError(f"{name}: wrong passphrase: it opens none of the key slots")
    index = _free_slot(header, slot, name)
    count = luks.iterations_for(header, iteration_ms)
    header, material = luks.filled_slot(header, index, master, new, count)
    file.pwrite(memoryview(material), where[0] + header.slots[index].material * 512)
    file.flush()
    _write_header(file, where[0], header)
    return index


def _free_slot(header: luks.LuksHeader, wanted: int | None, name: str) -> int:
    free = [index for index, slot in enumerate(header.slots) if not slot.active]
    if wanted is None:
        if not free:
            raise ImageError(f"{name}: all key slots are in use; remove one first")
        return free[0]
    _check_number(wanted, name)
    if wanted not in free:
        raise ImageError(f"{name}: key slot {wanted} is in use; remove it first")
    return wanted


def _check_number(slot: int, name: str) -> None:
    if not 0 <= slot < luks.SLOTS:
        raise ImageError(f"{name}: there is no key slot {slot}; they are 0 to {luks.SLOTS - 1}")


def remove(
    file: Node,
    where: tuple[int, int],
    name: str,
    *,
    slot: int | None = None,
    passphrase: bytes | None = None,
    force: bool = False,
) -> list[int]:
    """Free slot ``slot``, or all that ``passphrase`` opens; which.

    The last one that is in use goes only with ``force``: nobody can read the image then.
    """
    header = luks.read_header(file, *where, name)
    going = _going(file, where[0], header, slot, passphrase, name)
    left = [i for i, s in enumerate(header.slots) if s.active and i not in going]
    if not left and not force:
        raise ImageError(
            f"{name}: no key slot would be left, and nobody could read the image; "
            "add another passphrase first, or give --force"
        )
    for index in going:
        header = luks.emptied_slot(header, index)
        _write_header(file, where[0], header)
        _wipe(file, where[0], header, index)
    return going


def _going(
    file: Node,
    offset: int,
    header: luks.LuksHeader,
    slot: int | None,
    passphrase: bytes | None,
    name: str,
) -> list[int]:
    if slot is not None:
        _check_number(slot, name)
        if not header.slots[slot].active:
            raise ImageError(f"{name}: key slot {slot} is not in use")
    if passphrase is None:
        return [] if slot is None else [slot]
    found = luks.matching_slots(file, offset, header, passphrase)
    if slot is not None:
        found = [index for index in found if index == slot]
    if not found:
        raise ImageError(f"{name}: no key slot opens with the old passphrase")
    return found


def _write_header(file: Node, offset: int, header: luks.LuksHeader) -> None:
    """592 bytes, of which only those of one slot differ."""
    file.pwrite(memoryview(luks.pack(header)), offset)
    file.flush()


def _wipe(file: Node, offset: int, header: luks.LuksHeader, index: int) -> None:
    length = luks.STRIPES * header.key_bytes
    for _ in range(_WIPES):
        noise = memoryview(os.urandom(length))
        file.pwrite(noise, offset + header.slots[index].material * 512)
        file.flush()
