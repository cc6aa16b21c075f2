"""A file on a disk that becomes full."""

import errno

from fleece.block.file import FileNode


class FullDisk(FileNode):
    """Every write from the ``left``-th on fails."""

    left = 1 << 30

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().pwrite(buf, offset, fua)
