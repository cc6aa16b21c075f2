"""`fleece image` and `qemu-img`, run alike."""

import io
import random
import subprocess
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

from fleece.cli.main import main
from tests.support.tools import require

MiB = 1 << 20


def fleece(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In this process, as if it were a program of its own."""
    words, out, err = ["image", *map(str, arguments)], io.StringIO(), io.StringIO()
    with chdir(cwd), redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def qemu(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    words = [require("qemu-img"), *map(str, arguments)]
    for _ in range(20):
        done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, timeout=60)
        if "accurate CPU usage" not in done.stderr:  # formats.md §1.7: it fails sometimes
            break
    return done


def ok(done: subprocess.CompletedProcess[str]) -> str:
    """Its output; it must have succeeded, without a word on standard error."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"
    assert not done.stderr or "WARNING: Image format" in done.stderr, done.stderr
    return done.stdout


def disk(path: Path, size: int = 3 * MiB, seed: int = 1) -> Path:
    """A raw file with data, text, holes, and zeroes that are no holes."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(12):
            length = rng.randrange(1, 200_000)
            file.seek(rng.randrange(max(1, size - length)))
            kind = rng.randrange(3)
            file.write(
                rng.randbytes(length) if kind == 0 else (b"text", b"\0")[kind - 1] * (length // 4)
            )
        file.truncate(size)
    return path


def same(first: Path, second: Path, fmt: str = "raw", other: str = "raw") -> None:
    """QEMU finds them equal."""
    ok(qemu("compare", "-f", fmt, "-F", other, first, second, cwd=first.parent))


def clean(path: Path) -> None:
    """``qemu-img check`` finds nothing, not even a leak."""
    ok(qemu("check", "-f", "qcow2", path, cwd=path.parent))
