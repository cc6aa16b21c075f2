# SPDX-License-Identifier: Apache-2.0
"""LUKS version 1: its header, its key slots, and the key that a passphrase opens.

Source: "LUKS On-Disk Format Specification", version 1.2.3, and how QEMU lays it out: key material
from sector 8 on, each slot aligned to 8 sectors, 4000 stripes. In qcow2 the header lies where the
extension 0x0537be77 says, and only the key comes from it: clusters are placed by the L2 tables.

Passphrases and keys are bytes that no message, ``repr`` or log line shows.
"""

import hashlib
import hmac
import os
import struct
import time
import uuid as uuids
from dataclasses import dataclass, field, replace
from typing import Any, Final

from fleece.block.node import Node
from fleece.errors import ImageCorrupt, ImageError, UnsupportedFeature
from fleece.formats.qcow2 import constants as c
from fleece.formats.qcow2.ciphers import HASHES, Key, check_spec, legacy_key
from fleece.formats.qcow2.crypt import EncryptedNode
from fleece.formats.qcow2.header import Header, extension
from fleece.units import align_up

MAGIC: Final = b"LUKS\xba\xbe"
HEADER_BYTES: Final = 592
SLOTS: Final = 8
STRIPES: Final = 4000
ENABLED: Final = 0x00AC71F3
DISABLED: Final = 0x0000DEAD
SALT_BYTES: Final = 32
DIGEST_BYTES: Final = 20
DEFAULT_ITERATION_MS: Final = 2000

_SECTOR: Final = 512
_HEAD: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")
_MIN_ITERATIONS: Final = 1000
# At some millions in a second, half a minute for each slot: more is there only to stop us.
_MAX_ITERATIONS: Final = 1 << 26
_MATERIAL_ALIGNMENT: Final = 8


@dataclass(frozen=True)
class Slot:
    """One of the eight. ``material`` is the first sector of its key material in the header."""

    active: bool
    iterations: int
    salt: bytes = field(repr=False)
    material: int
    stripes: int = STRIPES


@dataclass(frozen=True)
class LuksHeader:
    """The fields of the header. ``payload`` is in sectors, ``key_bytes`` covers both XTS keys."""

    cipher: str
    mode: str
    iv_generator: str
    iv_hash: str | None
    hash: str
    key_bytes: int
    payload: int
    digest: bytes = field(repr=False)
    digest_salt: bytes = field(repr=False)
    digest_iterations: int
    uuid: str
    slots: tuple[Slot, ...]

    @property
    def length(self) -> int:
        """Bytes of the header with all key material."""
        return self.payload * _SECTOR

    @property
    def mode_text(self) -> str:
        """``xts-plain64``, ``cbc-essiv:sha256``: how the header has it."""
        text = f"{self.mode}-{self.iv_generator}"
        return f"{text}:{self.iv_hash}" if self.iv_hash else text

    def with_slot(self, index: int, slot: Slot) -> "LuksHeader":
        """Another slot ``index``."""
        return replace(self, slots=(*self.slots[:index], slot, *self.slots[index + 1 :]))


@dataclass(frozen=True)
class LuksOptions:
    """What a new header is to say; ``iteration_ms`` is what unlocking shall take here."""

    cipher_alg: str = "aes-256"
    mode: str = "xts"
    iv_generator: str = "plain64"
    iv_hash: str | None = None
    hash: str = "sha256"
    iteration_ms: int = DEFAULT_ITERATION_MS


def parse(data: bytes, region: int, name: str) -> LuksHeader:
    """The header in ``data`` (592 bytes or more), which may use ``region`` bytes.

    `NotAnImage`-like input, and every field that cannot be, is `ImageCorrupt`; a cipher that is not
    offered is `UnsupportedFeature`. ``name`` is for the message.
    """
    if len(data) < HEADER_BYTES or data[:6] != MAGIC:
        raise ImageCorrupt(f"{name}: there is no LUKS header where it should be")
    (_, version, cipher, mode, digest_hash, payload, key_bytes, *rest) = _HEAD.unpack_from(data)
    if version != 1:
        raise UnsupportedFeature(f"{name}: LUKS version {version} is not supported, only 1")
    mode_name, iv_generator, iv_hash = _split_mode(_text(mode, name), name)
    header = LuksHeader(
        cipher=_text(cipher, name),
        mode=mode_name,
        iv_generator=iv_generator,
        iv_hash=iv_hash,
        hash=_text(digest_hash, name),
        key_bytes=key_bytes,
        payload=payload,
        digest=rest[0],
        digest_salt=rest[1],
        digest_iterations=rest[2],
        uuid=_text(rest[3], name),
        slots=tuple(_slot(data, index, name) for index in range(SLOTS)),
    )
    _check(header, region, name)
    return header


def _slot(data: bytes, index: int, name: str) -> Slot:
    at = _HEAD.size + index * _SLOT.size
    active, iterations, salt, material, stripes = _SLOT.unpack_from(data, at)
    if active not in (ENABLED, DISABLED):
        raise ImageCorrupt(f"{name}: key slot {index} is neither in use nor free")
    return Slot(active == ENABLED, iterations, salt, material, stripes)


def _text(raw: bytes, name: str) -> str:
    text = raw.split(b"\0", 1)[0]
    if not text.isascii() or not text.decode().isprintable():
        raise ImageCorrupt(f"{name}: the LUKS header has a name that is not text")
    return text.decode().lower()


def _split_mode(text: str, name: str) -> tuple[str, str, str | None]:
    mode, dash, iv = text.partition("-")
    generator, _, iv_hash = iv.partition(":")
    if not dash:
        raise UnsupportedFeature(f"{name}: the cipher mode {text!r} has no IV generator")
    return mode, generator, iv_hash or None


def _check(header: LuksHeader, region: int, name: str) -> None:
    if header.cipher != "aes":
        raise UnsupportedFeature(f"{name}: the cipher {header.cipher!r} is not supported, AES is")
    try:
        check_spec(header.mode, header.iv_generator, header.iv_hash, header.key_bytes)
        if header.hash not in HASHES:
            raise ValueError(f"the hash {header.hash!r} is not supported")
        hashlib.new(header.hash)
    except ValueError as error:
        raise UnsupportedFeature(f"{name}: {error}") from None
    if not 0 < header.digest_iterations <= _MAX_ITERATIONS:
        raise ImageCorrupt(f"{name}: {header.digest_iterations} iterations cannot be")
    if header.length > region:
        raise ImageCorrupt(f"{name}: the LUKS header says that it ends behind its place")
    _check_slots(header, name)


def _check_slots(header: LuksHeader, name: str) -> None:
    sectors = _material_sectors(header.key_bytes)
    spans: list[tuple[int, int]] = []
    for index, slot in enumerate(header.slots):
        if slot.stripes != STRIPES:
            raise ImageCorrupt(
                f"{name}: key slot {index} has {slot.stripes} stripes, not {STRIPES}"
            )
        if slot.active and not 0 < slot.iterations <= _MAX_ITERATIONS:
            raise ImageCorrupt(f"{name}: key slot {index}: {slot.iterations} iterations cannot be")
        end = slot.material + sectors
        if slot.material * _SECTOR < HEADER_BYTES or end > header.payload:
            raise ImageCorrupt(
                f"{name}: the material of key slot {index} lies outside of its place"
            )
        if any(slot.material < stop and start < end for start, stop in spans):
            raise ImageCorrupt(f"{name}: the material of key slot {index} overlaps another one")
        spans.append((slot.material, end))


def _material_sectors(key_bytes: int) -> int:
    return -(-key_bytes * STRIPES // _SECTOR)


def pack(header: LuksHeader) -> bytes:
    """The 592 bytes of the header."""
    head = _HEAD.pack(
        MAGIC,
        1,
        header.cipher.encode(),
        header.mode_text.encode(),
        header.hash.encode(),
        header.payload,
        header.key_bytes,
        header.digest,
        header.digest_salt,
        header.digest_iterations,
        header.uuid.encode(),
    )
    return head + b"".join(
        _SLOT.pack(
            ENABLED if slot.active else DISABLED,
            slot.iterations,
            slot.salt,
            slot.material,
            slot.stripes,
        )
        for slot in header.slots
    )


def describe(header: LuksHeader) -> dict[str, Any]:
    """What ``qemu-img info --output=json`` says of it, without ``format``; sizes in bytes."""
    bits = header.key_bytes * 8 // (2 if header.mode == "xts" else 1)
    told: dict[str, Any] = {
        "ivgen-alg": header.iv_generator,
        "hash-alg": header.hash,
        "cipher-alg": f"aes-{bits}",
        "uuid": header.uuid,
        "cipher-mode": header.mode,
        "slots": [_describe_slot(slot) for slot in header.slots],
        "payload-offset": header.payload * _SECTOR,
        "master-key-iters": header.digest_iterations,
    }
    if header.iv_hash:
        told["ivgen-hash-alg"] = header.iv_hash
    return told


def _describe_slot(slot: Slot) -> dict[str, Any]:
    told: dict[str, Any] = {"active": slot.active}
    if slot.active:
        told |= {"iters": slot.iterations, "stripes": slot.stripes}
    return told | {"key-offset": slot.material * _SECTOR}


def read_header(file: Node, offset: int, length: int, name: str) -> LuksHeader:
    """The header that occupies ``length`` bytes from ``offset`` of ``file``."""
    if length < HEADER_BYTES or offset + length > file.size:
        raise ImageCorrupt(f"{name}: the LUKS header lies outside of the file")
    return parse(_pread(file, HEADER_BYTES, offset), length, name)


def unlock(file: Node, offset: int, header: LuksHeader, passphrase: bytes, name: str) -> Key:
    """The key of the payload. `ImageError` if no slot opens with ``passphrase``.

    Takes the slots' key derivation, by default two seconds of the machine that made them.
    """
    master = master_key(file, offset, header, passphrase)
    if master is None:
        raise ImageError(f"{name}: wrong passphrase: it opens none of the key slots")
    return key_for(header, master)


def open_key(file: Node, header: Header, passphrase: bytes, name: str) -> Key:
    """The key of an encrypted qcow2 image, whose header is ``header``: LUKS, or the legacy method.

    `ImageError` for the wrong passphrase of LUKS; the legacy method cannot tell.
    """
    if header.crypt_method == c.CRYPT_AES:
        return legacy_key(passphrase)
    offset, length = place(header, name)
    return unlock(file, offset, read_header(file, offset, length, name), passphrase, name)


def place(header: Header, name: str) -> tuple[int, int]:
    """``(offset, length)`` of the LUKS header of a qcow2 image."""
    data = extension(header, c.EXT_CRYPTO)
    if header.crypt_method != c.CRYPT_LUKS or data is None or len(data) != 16:
        raise ImageError(f"{name}: it is not encrypted with LUKS, so it has no key slots")
    offset, length = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")
    if offset % header.cluster_size or not offset or offset + length > c.MAX_SIZE:
        raise ImageCorrupt(f"{name}: the place of its LUKS header cannot be")
    return offset, length


def key_for(header: LuksHeader, master: bytes) -> Key:
    """The key that ``master`` is, with the modes of ``header``."""
    return Key(header.mode, header.iv_generator, header.iv_hash, secret=master)


def master_key(
    file: Node, offset: int, header: LuksHeader, passphrase: bytes, only: int | None = None
) -> bytes | None:
    """The master key, by any slot or by slot ``only``; None if the passphrase is not the one."""
    for index, slot in enumerate(header.slots):
        if not slot.active or only not in (None, index):
            continue
        material = bytearray(_pread(file, STRIPES * header.key_bytes, offset + slot.material * 512))
        key = key_for(header, _derive(header, passphrase, slot.salt, slot.iterations))
        key.decrypt(memoryview(material), 0)
        master = merge(bytes(material), header.key_bytes, header.hash)
        if hmac.compare_digest(_digest(header, master), header.digest):
            return master
    return None


def matching_slots(file: Node, offset: int, header: LuksHeader, passphrase: bytes) -> list[int]:
    """The active slots that ``passphrase`` opens."""
    return [
        index
        for index, slot in enumerate(header.slots)
        if slot.active and master_key(file, offset, header, passphrase, index) is not None
    ]


def _derive(header: LuksHeader, passphrase: bytes, salt: bytes, iterations: int) -> bytes:
    return hashlib.pbkdf2_hmac(header.hash, passphrase, salt, iterations, header.key_bytes)


def _digest(header: LuksHeader, master: bytes) -> bytes:
    return hashlib.pbkdf2_hmac(
        header.hash, master, header.digest_salt, header.digest_iterations, DIGEST_BYTES
    )


def split(key: bytes, hash_name: str) -> bytes:
    """Anti-forensic split of ``key`` into 4000 stripes: each of them is needed to get it back."""
    size = len(key)
    stripes = os.urandom(size * (STRIPES - 1))
    mixed = _mix(stripes, size, hash_name)
    return stripes + (mixed ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def merge(stripes: bytes, size: int, hash_name: str) -> bytes:
    """The inverse of `split`: a key of ``size`` bytes."""
    last = int.from_bytes(stripes[-size:], "big")
    return (_mix(stripes[:-size], size, hash_name) ^ last).to_bytes(size, "big")


def _mix(stripes: bytes, size: int, hash_name: str) -> int:
    state = 0
    for at in range(0, len(stripes), size):
        state ^= int.from_bytes(stripes[at : at + size], "big")
        state = int.from_bytes(_diffuse(state.to_bytes(size, "big"), hash_name), "big")
    return state


def _diffuse(block: bytes, hash_name: str) -> bytes:
    step = hashlib.new(hash_name).digest_size
    out = b""
    for index, at in enumerate(range(0, len(block), step)):
        part = block[at : at + step]
        out += hashlib.new(hash_name, struct.pack(">I", index) + part).digest()[: len(part)]
    return out


def new(passphrase: bytes, options: LuksOptions | None = None) -> tuple[bytes, LuksHeader, Key]:
    """``(bytes of the header region, header, key)`` of a new LUKS header with one slot in use.

    `UnsupportedFeature` for a cipher that is not offered.
    """
    options = options or LuksOptions()
    header = _plan(options)
    master = os.urandom(header.key_bytes)
    per_second = measure_speed(header.hash, header.key_bytes)
    count = _iterations(per_second, options.iteration_ms)
    header = replace(header, digest_iterations=max(_MIN_ITERATIONS, count // 8))
    header = replace(header, digest=_digest(header, master))
    header, material = filled_slot(header, 0, master, passphrase, count)
    region = bytearray(header.length)
    at = header.slots[0].material * _SECTOR
    region[at : at + len(material)] = material
    region[:HEADER_BYTES] = pack(header)
    return bytes(region), header, key_for(header, master)


def new_length(options: LuksOptions | None = None) -> int:
    """Bytes that a header with ``options`` takes."""
    return _plan(options or LuksOptions()).length


def _plan(options: LuksOptions) -> LuksHeader:
    key_bytes = _key_bytes(options)
    iv_hash = options.iv_hash
    if options.iv_generator == "essiv" and iv_hash is None:
        iv_hash = "sha256"
    try:
        check_spec(options.mode, options.iv_generator, iv_hash, key_bytes)
        if options.hash not in HASHES:
            raise ValueError(f"the hash {options.hash!r} is not supported")
        hashlib.new(options.hash)
        if key_bytes * STRIPES % _SECTOR:
            # QEMU ends with a failed assertion on such an image.
            raise ValueError(f"the key slots of {options.cipher_alg} would not be whole sectors")
    except ValueError as error:
        raise UnsupportedFeature(str(error)) from None
    step = align_up(_material_sectors(key_bytes), _MATERIAL_ALIGNMENT)
    slots = tuple(
        Slot(False, 0, bytes(SALT_BYTES), _MATERIAL_ALIGNMENT + index * step)
        for index in range(SLOTS)
    )
    return LuksHeader(
        cipher="aes",
        mode=options.mode,
        iv_generator=options.iv_generator,
        iv_hash=iv_hash,
        hash=options.hash,
        key_bytes=key_bytes,
        payload=_MATERIAL_ALIGNMENT + SLOTS * step,
        digest=b"",
        digest_salt=os.urandom(SALT_BYTES),
        digest_iterations=_MIN_ITERATIONS,
        uuid=str(uuids.uuid4()),
        slots=slots,
    )


def _key_bytes(options: LuksOptions) -> int:
    name, _, bits = options.cipher_alg.partition("-")
    if name != "aes" or bits not in ("128", "192", "256"):
        raise UnsupportedFeature(
            f"the cipher {options.cipher_alg!r} is not supported; use aes-128, aes-192 or aes-256"
        )
    return int(bits) // 8 * (2 if options.mode == "xts" else 1)


def filled_slot(
    header: LuksHeader, index: int, master: bytes, passphrase: bytes, iterations: int
) -> tuple[LuksHeader, bytes]:
    """``(header with slot index in use, its key material)``: write the material first."""
    old = header.slots[index]
    slot = Slot(True, iterations, os.urandom(SALT_BYTES), old.material)
    material = bytearray(split(master, header.hash))
    key = key_for(header, _derive(header, passphrase, slot.salt, slot.iterations))
    key.encrypt(memoryview(material), 0)
    return header.with_slot(index, slot), bytes(material)


def emptied_slot(header: LuksHeader, index: int) -> LuksHeader:
    """Slot ``index`` free again; its material has to be overwritten on disk."""
    slot = Slot(False, 0, bytes(SALT_BYTES), header.slots[index].material)
    return header.with_slot(index, slot)


def iterations_for(header: LuksHeader, iteration_ms: int) -> int:
    """How many iterations of a new slot take ``iteration_ms`` on this machine."""
    return _iterations(measure_speed(header.hash, header.key_bytes), iteration_ms)


def _iterations(per_second: float, milliseconds: int) -> int:
    return max(_MIN_ITERATIONS, min(_MAX_ITERATIONS, int(per_second * milliseconds / 1000)))


def measure_speed(hash_name: str, key_bytes: int) -> float:
    """PBKDF2 iterations in a second of processor time, from some 50 ms of them."""
    count = 1 << 12
    while True:
        start = time.thread_time()
        hashlib.pbkdf2_hmac(hash_name, b"passphrase", bytes(SALT_BYTES), count, key_bytes)
        taken = time.thread_time() - start
        if taken >= 0.05 or count >= _MAX_ITERATIONS:
            return count / max(taken, 1e-6)
        count *= 2


def open_luks(file: Node, passphrase: bytes, *, name: str | None = None) -> "LuksNode":
    """A plain LUKS file or partition as a node; it takes over ``file``."""
    name = file.name if name is None else name
    header = read_header(file, 0, file.size, name)
    return LuksNode(file, unlock(file, 0, header, passphrase, name), base=header.length, name=name)


class LuksNode(EncryptedNode):
    """The payload of a LUKS file: sectors count from its start. Closes the file."""

    def close(self) -> None:
        """Close the file too."""
        self.next.close()


def _pread(file: Node, length: int, offset: int) -> bytes:
    data = bytearray(length)
    file.pread_into(memoryview(data), offset)
    return bytes(data)
