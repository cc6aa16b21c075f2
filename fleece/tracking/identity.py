# SPDX-License-Identifier: Apache-2.0
"""Whether the image is still the one that was tracked, and nobody wrote to it in the meantime.

A regular file: size, inode and the two times that every write changes. Its device number counts
only within one boot: Btrfs, NFS and overlays number their file systems anew at each mount.

A block device keeps no times. Its number and the kernel's count of sectors written and discarded
(Documentation/block/stat.rst) tell the same, but only until the host restarts.
"""

import os
import stat
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_SECTORS_WRITTEN: Final = 6
_SECTORS_DISCARDED: Final = 13
_UNKNOWN: Final = -1
_MEANWHILE: Final = "while fleece was not running"


def running_boot_id() -> str:
    """The id of this boot of the host; "" where the kernel has none, which matches nothing."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


@dataclass(frozen=True)
class Identity:
    """What stat(2) says of an image. Of a block device: its number, and ``mtime_ns`` is the count.

    ``inode`` is 0 for a block device only.
    """

    size: int
    inode: int
    device: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, image: Path) -> "Identity":
        """The identity of the file or block device at ``image``, links followed. Raises OSError."""
        found = image.stat()
        if stat.S_ISBLK(found.st_mode):
            return cls(0, 0, found.st_rdev, sectors_changed(found.st_rdev), 0)
        return cls(found.st_size, found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns)

    @property
    def is_block_device(self) -> bool:
        """Whether it has no times of its own."""
        return self.inode == 0

    def replaced(self, now: "Identity", image: Path) -> str | None:
        """Why ``now`` is another file than this, within one boot; None if it is the same."""
        if (self.inode, self.device) != (now.inode, now.device):
            return f"image {image} was replaced by another one {_MEANWHILE}"
        return None

    def changed(self, now: "Identity", image: Path, *, same_boot: bool) -> str | None:
        """Why ``now`` may have other contents than this; None if it has the same."""
        if self.inode != now.inode or (same_boot and self.device != now.device):
            return f"image {image} was replaced by another one {_MEANWHILE}"
        if self.is_block_device:
            return self._device_changed(now, image, same_boot)
        if self.size != now.size:
            return f"image {image} was changed {_MEANWHILE} (its size differs)"
        if self.mtime_ns != now.mtime_ns:
            return f"image {image} was changed {_MEANWHILE} (its modification time differs)"
        if self.ctime_ns != now.ctime_ns:
            return f"image {image} may have been changed {_MEANWHILE} (its change time differs)"
        return None

    def _device_changed(self, now: "Identity", image: Path, same_boot: bool) -> str | None:
        if not same_boot:
            return (
                f"the host was restarted, and nothing tells whether block device {image} was "
                f"written {_MEANWHILE}"
            )
        if _UNKNOWN in (self.mtime_ns, now.mtime_ns):
            return f"nothing tells whether block device {image} was written {_MEANWHILE}"
        if self.mtime_ns != now.mtime_ns:
            return f"block device {image} was written {_MEANWHILE} (the kernel's count differs)"
        return None

    def words(self) -> tuple[int, ...]:
        """Five numbers of 64 bits without sign."""
        return tuple(value & 0xFFFF_FFFF_FFFF_FFFF for value in astuple(self))

    @classmethod
    def from_words(cls, words: tuple[int, ...]) -> "Identity":
        """The inverse of `words`."""
        return cls(*(value - (1 << 64) if value >> 63 else value for value in words))


def sectors_changed(device: int, sysfs: Path = Path("/sys/dev/block")) -> int:
    """Sectors written to and discarded on the block device since it appeared; -1 if unknown."""
    try:
        path = sysfs / f"{os.major(device)}:{os.minor(device)}" / "stat"
        fields = path.read_text(encoding="ascii").split()
        return int(fields[_SECTORS_WRITTEN]) + int(fields[_SECTORS_DISCARDED])
    except (OSError, ValueError, IndexError):
        return _UNKNOWN
