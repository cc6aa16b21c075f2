"""Images for the tests, what QEMU says about them, and a file that records what is written."""

import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fleece.block.file import FileNode
from fleece.block.node import Filter, Node
from fleece.formats.qcow2.create import CreateOptions, create
from fleece.formats.qcow2.image import Qcow2Node
from tests.support.threads import wait_until
from tests.support.tools import require

CLEAN, CORRUPT, LEAKS = 0, 2, 3


def qemu_img(*arguments: str | Path, ok: tuple[int, ...] = (0,)) -> str:
    """Run it; its standard output. The exit status must be one of ``ok``."""
    done = subprocess.run(
        [require("qemu-img"), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode in ok, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(path: Path, *commands: str, fmt: str = "qcow2") -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(
        [require("qemu-io"), "-f", fmt, *arguments, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout


def assert_clean(path: Path) -> None:
    """``qemu-img check`` finds nothing, not even a leak."""
    qemu_img("check", "-U", "-f", "qcow2", path)


def assert_same(path: Path, model: bytes | bytearray, fmt: str = "qcow2") -> None:
    """QEMU reads ``model`` from the image."""
    expected = path.with_suffix(".expected")
    expected.write_bytes(model)
    qemu_img("compare", "-U", "-f", fmt, "-F", "raw", path, expected)
    expected.unlink()


def qemu_map(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(qemu_img("map", "-U", "-f", "qcow2", "--output=json", path)))


def make(path: Path, size: int, **options: Any) -> Path:
    create(path, size, CreateOptions(**options))
    return path


@contextmanager
def opened(path: Path, backing: Node | None = None, *, read_only: bool = False) -> Iterator[Any]:
    file = FileNode(path, read_only=read_only, locking=False)
    try:
        node = Qcow2Node(file, backing=backing, read_only=read_only)
    except BaseException:
        file.close()
        raise
    try:
        yield node
    finally:
        node.close()


def pread(node: Any, length: int, offset: int) -> bytes:
    buf = bytearray(b"\xee" * length)
    if length:
        node.pread_into(memoryview(buf), offset)
    return bytes(buf)


class RecordingFile(Filter):
    """Passes everything on and keeps it: ``("write", offset, data)`` and ``("sync", 0, b"")``."""

    def __init__(self, child: FileNode) -> None:
        super().__init__(child.name, child)
        self.log: list[tuple[str, int, bytes]] = []

    def pwrite(self, buf: memoryview, offset: int, fua: bool = False) -> None:
        assert not fua
        self.log.append(("write", offset, bytes(buf)))
        self.next.pwrite(buf, offset)

    def flush(self) -> None:
        self.next.flush()
        self.log.append(("sync", 0, b""))

    def close(self) -> None:
        self.next.close()


class CountedLock:
    """A lock that knows how many hold it or wait for it; ``real=False``, for a control: no lock."""

    def __init__(self, *, real: bool) -> None:
        self.users = 0
        self._real = real
        self._count = threading.Lock()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._count:
            self.users += 1
        if self._real:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._real:
            self._lock.release()
        with self._count:
            self.users -= 1


class Rendezvous:
    """``meet()`` in the middle of what a lock should protect: both are in it, or one waits."""

    def __init__(self, lock: CountedLock, *, real: bool) -> None:
        self._lock = lock
        self._real = real
        self._arrived = 0
        self.armed = False

    def meet(self) -> None:
        if self.armed:
            self._arrived += 1
            wait_until(lambda: self._arrived >= 2 or (self._real and self._lock.users >= 2))


def in_two_threads(first: Callable[[], Any], second: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result(30)
