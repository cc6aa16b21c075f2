# SPDX-License-Identifier: Apache-2.0
"""The NBD client of the Linux kernel, in a small guest, with a real file system on our export."""

import hashlib
import logging
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleece.block.file import FileNode
from nbdwire.tls import ServerTLS
from nbdwire.uri import NBDURI
from tests.support import certificates
from tests.support.guest import in_guest, program
from tests.support.nodes import make_file
from tests.support.serving import noise, serving
from tests.support.snapshots import Rig, read
from tests.support.tools import require

SIZE = 128 << 20
pytestmark = pytest.mark.timeout(300)

# What is written in the guest is compared with sums that are computed here.
MAKE = [
    "mkfs.ext4 -q -E nodiscard /dev/nbd0",
    "mount /dev/nbd0 /mnt",
]
WRITE = [
    "for i in $(seq 1 200); do echo file $i > /mnt/small-$i; done",
    "mkdir /mnt/gone; dd if=/dev/urandom of=/mnt/gone/a bs=1M count=24 2>/dev/null; sync",
    "dd if=/dev/zero bs=1M count=5 2>/dev/null | tr '\\0' 'Z' > /mnt/large",
    "dd if=/dev/urandom of=/mnt/random bs=64k count=50 2>/dev/null; sync",
    "cd /mnt; sha256sum random large small-*",
]
LEAVE = [
    "rm -r /mnt/gone; sync; fstrim /mnt",
    "umount /mnt",
    "nbd-client -d /dev/nbd0 2>&1",
]


@contextmanager
def served(directory: Path, **options: Any) -> Iterator[tuple[Path, NBDURI, FileNode]]:
    """An empty image behind TCP."""
    image = make_file(directory, SIZE)
    with closing(FileNode(image)) as node, serving(directory, node, tcp=True, **options) as found:
        _, where = found
        yield image, where.with_export("disk"), node


def sums(printed: str) -> dict[str, str]:
    """Name -> SHA-256, of what ``sha256sum`` printed."""
    lines = [line.split() for line in printed.splitlines()]
    return {words[1]: words[0] for words in lines if len(words) == 2 and len(words[0]) == 64}


def check(image: Path, expected: dict[str, str]) -> None:
    """The file system is sound, and the files in it are what the guest has written."""
    done = subprocess.run([require("e2fsck"), "-fn", image], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(expected) == 202
    for name in ("random", "large", "small-1", "small-77", "small-200"):
        command = [require("debugfs"), "-R", f"cat {name}", str(image)]
        content = subprocess.run(command, capture_output=True).stdout
        assert hashlib.sha256(content).hexdigest() == expected[name], name
    assert expected["large"] == hashlib.sha256(b"Z" * (5 << 20)).hexdigest()
    assert expected["small-7"] == hashlib.sha256(b"file 7\n").hexdigest()


def test_the_kernel_makes_a_file_system_over_four_connections(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes, flushes, trims and FUA of a real block layer; e2fsck agrees afterwards."""
    program()
    caplog.set_level(logging.INFO, "nbdwire")
    with served(tmp_path) as (image, where, node):
        printed = in_guest(where, [*MAKE, *WRITE, *LEAVE], connections=4)
        node.flush()
        check(image, sums(printed))
        assert image.stat().st_blocks * 512 < 40 << 20, "fstrim gave back what was deleted"
    opened = [message for message in caplog.messages if message.startswith("open")]
    assert len(opened) >= 4


def test_the_same_over_tls(tmp_path: Path) -> None:
    """nbd.md §9: nbd-client's TLS, with a client certificate that is verified."""
    program()
    pki = certificates.create(tmp_path / "pki")
    tls = ServerTLS("required", certificates=pki.both, verify_peer=True)
    with served(tmp_path, tls=tls) as (image, where, node):
        printed = in_guest(where, [*MAKE, *WRITE, *LEAVE], certificates=pki.both)
        node.flush()
        check(image, sums(printed))


def test_a_snapshot_mounts_read_only_while_the_live_disk_goes_on(tmp_path: Path) -> None:
    """The kernel reads an instant; what is written to the live disk meanwhile is not in it."""
    program()
    image = make_file(tmp_path, SIZE)
    subprocess.run([require("mke2fs"), "-q", "-t", "ext4", image], check=True)
    (tmp_path / "a").write_bytes(noise(1 << 20))
    command = [require("debugfs"), "-w", "-R", f"write {tmp_path / 'a'} a", str(image)]
    subprocess.run(command, check=True, capture_output=True)
    old = image.read_bytes()
    with closing(FileNode(image)) as file:
        rig = Rig(tmp_path, file)
        view = rig.snapshot()
        with serving(tmp_path, view, tcp=True) as (_, where):
            for offset in range(0, SIZE - 4096, SIZE // 97):
                rig.write(noise(4096, offset), offset)
            commands = [
                "[ $(cat /sys/block/nbd0/ro) = 1 ]",
                "mount -o ro,noload /dev/nbd0 /mnt",
                "sha256sum /mnt/a",
                "umount /mnt; nbd-client -d /dev/nbd0 2>&1",
            ]
            printed = in_guest(where.with_export("disk"), commands)
        assert sums(printed) == {"/mnt/a": hashlib.sha256(noise(1 << 20)).hexdigest()}
        assert read(view, 0, SIZE) == old
        rig.close()
