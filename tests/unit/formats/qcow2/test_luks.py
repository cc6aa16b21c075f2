"""LUKS headers and ciphers: formats.md §1.7. What QEMU says of them: interop/test_image_create."""

import hashlib
import os
from dataclasses import replace
from itertools import product

import pytest

from fleece.block.memory import MemoryNode
from fleece.errors import ImageCorrupt, ImageError, UnsupportedFeature
from fleece.formats.qcow2 import ciphers, keyslots, luks
from fleece.formats.qcow2.ciphers import Key
from fleece.formats.qcow2.crypt import EncryptedNode
from nbdwire.constants import CMD_FLAG_FAST_ZERO
from tests.support.threads import wait_until

PASSPHRASE = b"correct horse"
QUICK = luks.LuksOptions(iteration_ms=1)
KEYS = [
    Key("xts", "plain64", secret=os.urandom(64)),
    Key("xts", "essiv", "sha256", secret=os.urandom(48)),
    Key("cbc", "plain64", secret=os.urandom(16)),
    Key("cbc", "essiv", "sha256", secret=os.urandom(32)),
    Key("ctr", "plain", secret=os.urandom(32)),
    Key("ecb", "plain64", secret=os.urandom(24)),
]


@pytest.fixture(scope="module")
def made() -> tuple[bytes, luks.LuksHeader, Key]:
    return luks.new(PASSPHRASE, QUICK)


def in_memory(region: bytes, more: int = 1 << 16) -> MemoryNode:
    node = MemoryNode(len(region) + more)
    node.pwrite(memoryview(region), 0)
    return node


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.mode}-{key.iv_generator}")
def test_many_sectors_at_once_are_what_one_by_one_gives(key: Key) -> None:
    plain = os.urandom(64 * 512)
    at_once = bytearray(plain)
    key.encrypt(memoryview(at_once), 7)
    single = bytearray(plain)
    for sector in range(64):
        key.encrypt(memoryview(single)[sector * 512 : (sector + 1) * 512], 7 + sector)
    assert at_once == single
    assert at_once != plain
    key.decrypt(memoryview(at_once), 7)
    assert at_once == plain


def test_aes_xts_gives_the_vector_of_ieee_1619() -> None:
    """IEEE 1619-2007, annex B, vector 4: data unit 0, 512 bytes 00 01 02 ..."""
    first = bytes.fromhex("27182818284590452353602874713526")
    second = bytes.fromhex("31415926535897932384626433832795")
    data = bytearray(bytes(range(256)) * 2 + bytes(512 * 20))
    Key("xts", "plain64", secret=first + second).encrypt(memoryview(data), 0)
    assert data[:16].hex() == "27a7479befa1d476489f308cd4cfa6e2"
    assert data[16:32].hex() == "a96e4bbe3208ff25287dd3819616e89c"


def test_split_keys_come_back_and_every_stripe_is_needed() -> None:
    for size, name in product((16, 32, 64), ("sha1", "sha256")):
        key = os.urandom(size)
        stripes = bytearray(luks.split(key, name))
        assert len(stripes) == size * luks.STRIPES
        assert luks.merge(bytes(stripes), size, name) == key
        stripes[size * 17] ^= 1
        assert luks.merge(bytes(stripes), size, name) != key


def test_the_passphrase_opens_what_it_made(made: tuple[bytes, luks.LuksHeader, Key]) -> None:
    region, header, key = made
    file = in_memory(region)
    found = luks.read_header(file, 0, len(region), "x")
    assert found == header
    assert luks.unlock(file, 0, found, PASSPHRASE, "x") == key


def test_another_passphrase_is_refused_in_one_line(
    made: tuple[bytes, luks.LuksHeader, Key],
) -> None:
    region, header, _ = made
    with pytest.raises(ImageError, match=r"^x: wrong passphrase: [^\n]*$"):
        luks.unlock(in_memory(region), 0, header, b"wrong", "x")


def test_no_key_shows_in_a_repr(made: tuple[bytes, luks.LuksHeader, Key]) -> None:
    _, header, key = made
    assert repr(key.secret)[2:-1] not in repr(key)
    assert "salt" not in repr(header)


@pytest.mark.parametrize(
    ("at", "data", "message"),
    [
        (0, b"nope", "no LUKS header"),
        (8, b"serpent\0", "cipher 'serpent'"),
        (40, b"xts\0", "no IV generator"),
        (40, b"cbc-lmk\0", "IV generator 'lmk'"),
        (40, b"xts-essiv:nosuch\0", "essiv hash"),
        (72, b"crc32\0", "hash 'crc32'"),
        (72, b"\xff\xff\0", "not text"),
        (104, b"\xff\xff\xff\xff", "ends behind its place"),
        (108, b"\0\0\0\x07", "key of 7 bytes"),
        (108, b"\xff\xff\xff\xff", "a key of"),
        (164, b"\0\0\0\0", "iterations cannot be"),
        (164, b"\xff\xff\xff\xff", "iterations cannot be"),
        (208, b"\1\2\3\4", "neither in use nor free"),
        (212, b"\xff\xff\xff\xff", "iterations cannot be"),
        (248, b"\0\0\0\0", "outside of its place"),
        (248, b"\xff\xff\xff\xff", "outside of its place"),
        (252, b"\xff\xff\xff\xff", "stripes"),
        (296, b"\0\0\0\x08", "overlaps"),
    ],
)
def test_a_field_that_cannot_be_is_refused(
    made: tuple[bytes, luks.LuksHeader, Key], at: int, data: bytes, message: str
) -> None:
    """formats.md §12: every field is bounded before it is believed."""
    region = bytearray(made[0])
    region[at : at + len(data)] = data
    with pytest.raises((ImageCorrupt, UnsupportedFeature), match=message):
        luks.parse(bytes(region[:592]), len(region), "x")


def test_a_header_that_is_cut_off_is_refused(made: tuple[bytes, luks.LuksHeader, Key]) -> None:
    with pytest.raises(ImageCorrupt):
        luks.parse(made[0][:591], 4096, "x")
    with pytest.raises(ImageCorrupt, match="outside"):
        luks.read_header(MemoryNode(1000), 512, 592, "x")


def test_all_eight_slots_can_be_used_and_emptied(
    made: tuple[bytes, luks.LuksHeader, Key],
) -> None:
    region, _, key = made
    file, where = in_memory(region), (0, len(region))
    for number in range(1, 8):
        new = b"p%d" % number
        assert keyslots.add(file, where, PASSPHRASE, new, "x", iteration_ms=1) == number
    with pytest.raises(ImageError, match="all key slots"):
        keyslots.add(file, where, PASSPHRASE, b"more", "x", iteration_ms=1)
    header = luks.read_header(file, *where, "x")
    assert luks.unlock(file, 0, header, b"p7", "x") == key
    assert keyslots.remove(file, where, "x", passphrase=PASSPHRASE) == [0]
    assert keyslots.remove(file, where, "x", slot=3) == [3]
    header = luks.read_header(file, *where, "x")
    assert [slot.active for slot in header.slots].count(True) == 6
    with pytest.raises(ImageError, match="wrong passphrase"):
        luks.unlock(file, 0, header, PASSPHRASE, "x")


def test_the_last_slot_stays_unless_forced(made: tuple[bytes, luks.LuksHeader, Key]) -> None:
    region, _, _ = made
    file, where = in_memory(region), (0, len(region))
    with pytest.raises(ImageError, match="no key slot would be left"):
        keyslots.remove(file, where, "x", slot=0)
    old = bytearray(luks.STRIPES * 64)
    file.pread_into(memoryview(old), 8 * 512)
    assert keyslots.remove(file, where, "x", slot=0, force=True) == [0]
    wiped = bytearray(len(old))
    file.pread_into(memoryview(wiped), 8 * 512)
    assert sum(a == b for a, b in zip(old, wiped, strict=True)) < len(old) // 50


def test_a_slot_in_use_is_not_overwritten(made: tuple[bytes, luks.LuksHeader, Key]) -> None:
    region, _, _ = made
    with pytest.raises(ImageError, match="slot 0 is in use"):
        keyslots.add(in_memory(region), (0, len(region)), PASSPHRASE, b"n", "x", slot=0)


def test_ciphers_that_qemu_could_not_open_are_not_made() -> None:
    with pytest.raises(UnsupportedFeature, match="whole sectors"):
        luks.new(b"x", replace(QUICK, cipher_alg="aes-192", mode="cbc"))
    with pytest.raises(UnsupportedFeature, match="serpent"):
        luks.new(b"x", replace(QUICK, cipher_alg="serpent-256"))


def test_iterations_follow_the_time_that_was_asked_for() -> None:
    speed = luks.measure_speed("sha256", 32)
    assert speed > 1000
    many = luks.new(b"x", replace(QUICK, iteration_ms=300))[1].slots[0].iterations
    few = luks.new(b"x", replace(QUICK, iteration_ms=30))[1].slots[0].iterations
    assert many > 2 * few >= 2000


class TestEncryptedNode:
    SIZE = 64 * 512

    def node(self, key: Key = KEYS[0]) -> tuple[EncryptedNode, MemoryNode]:
        child = MemoryNode(self.SIZE)
        node = EncryptedNode(child, key)
        node.zero(0, self.SIZE)
        return node, child

    @pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.mode}-{key.iv_generator}")
    def test_requests_of_any_place_and_length_agree_with_a_bytearray(self, key: Key) -> None:
        node, _ = self.node(key)
        model = bytearray(self.SIZE)
        places = [(0, 1), (511, 2), (512, 512), (100, 3000), (1024, 20000), (32767, 1), (3, 500)]
        for offset, length in places:
            data = os.urandom(length)
            node.pwrite(memoryview(data), offset)
            model[offset : offset + length] = data
        for offset, length in [*places, (0, self.SIZE), (513, 31000)]:
            buf = bytearray(length)
            node.pread_into(memoryview(buf), offset)
            assert buf == model[offset : offset + length]

    def test_what_the_child_holds_is_not_the_data(self) -> None:
        node, child = self.node()
        node.pwrite(memoryview(b"secret text" * 100), 0)
        raw = bytearray(self.SIZE)
        child.pread_into(memoryview(raw), 0)
        assert b"secret" not in raw
        assert bytes(512) not in raw  # not even the zeroes

    def test_the_sector_number_is_that_of_the_file(self) -> None:
        """formats.md §1.7: the IV is the host offset; with the legacy method the guest's."""
        child = MemoryNode(self.SIZE)
        key = Key("xts", "plain64", secret=bytes(range(64)))
        EncryptedNode(child, key).pwrite_at(memoryview(bytes(512)), 5 * 512, 9 * 512)
        expected = bytearray(512)
        key.encrypt(memoryview(expected), 5)
        got = bytearray(512)
        child.pread_into(memoryview(got), 5 * 512)
        assert got == expected
        old = ciphers.legacy_key(b"pass")
        EncryptedNode(child, old).pwrite_at(memoryview(b"x" * 100), 5 * 512 + 7, 9 * 512 + 7)
        child.pread_into(memoryview(got), 5 * 512)
        old.decrypt(memoryview(got), 9)
        assert got[7:107] == b"x" * 100

    def test_nothing_of_it_is_known_to_be_zero_or_lies_in_a_file(self) -> None:
        node, _ = self.node()
        assert [extent.status for extent in node.extents(0, self.SIZE)] == [0]
        assert node.map(0, self.SIZE) == [(-2, 0, self.SIZE)] or node.map(0, 512)[0][0] < 0
        with pytest.raises(OSError, match="not supported"):
            node.zero(0, 512, CMD_FLAG_FAST_ZERO)

    @pytest.mark.parametrize("locked", [True, False])
    def test_a_write_beside_a_part_of_a_sector_is_not_undone(self, locked: bool) -> None:
        """Without the lock (the control) the second write is lost."""
        from concurrent.futures import ThreadPoolExecutor
        from threading import Event

        reached, go_on = Event(), Event()

        class Slow(MemoryNode):
            armed = False

            def pread_into(self, buf: memoryview, offset: int) -> None:
                super().pread_into(buf, offset)
                if self.armed:
                    self.armed = False
                    reached.set()
                    assert go_on.wait(10)

        child = Slow(4096)
        node = EncryptedNode(child, KEYS[0])
        node.zero(0, 4096)
        other = node if locked else EncryptedNode(child, KEYS[0])
        child.armed = True
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(node.pwrite, memoryview(b"a" * 100), 0)
            assert reached.wait(10)
            second = pool.submit(other.pwrite, memoryview(b"b" * 100), 200)
            wait_until(lambda: second.done() or len(node._sectors) == 2)
            go_on.set()
            first.result(10)
            second.result(10)
        buf = bytearray(512)
        node.pread_into(memoryview(buf), 0)
        assert buf[:100] == b"a" * 100
        assert (buf[200:300] == b"b" * 100) is locked


def test_a_plain_luks_file_opens_as_a_node(made: tuple[bytes, luks.LuksHeader, Key]) -> None:
    region, header, key = made
    file = in_memory(region, 8192)
    node = luks.open_luks(file, PASSPHRASE)
    assert node.size == 8192
    node.pwrite(memoryview(b"hello"), 4000)
    raw = bytearray(512)
    file.pread_into(memoryview(raw), header.length + 3584)
    key.decrypt(memoryview(raw), 7)
    assert raw[416:421] == b"hello"
    node.close()


def test_the_legacy_key_is_the_passphrase_itself() -> None:
    assert ciphers.legacy_key(b"abc").secret == b"abc" + bytes(13)
    assert ciphers.legacy_key(b"a" * 20).secret == b"a" * 16


def test_essiv_hashes_the_key() -> None:
    key = bytes(32)
    sector = bytearray(512)
    Key("cbc", "essiv", "sha256", secret=key).encrypt(memoryview(sector), 3)
    plain = Key("ecb", "plain64", secret=hashlib.sha256(key).digest())
    iv = bytearray((3).to_bytes(16, "little"))
    plain.encrypt(memoryview(iv), 0)
    Key("ecb", "plain64", secret=key).encrypt(memoryview(iv), 0)
    assert sector[:16] == iv
