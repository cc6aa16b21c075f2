# SPDX-License-Identifier: Apache-2.0
"""The servers of the plain matrix: each serves one image on a unix socket."""

import socket
import sys
from pathlib import Path

import fleece
from bench.tools import Process, find, need, run, wait_until

OURS = "fleece"
QEMU_NBD = "qemu-nbd"
NBDKIT = "nbdkit"
STORAGE_DAEMON = "storage-daemon"


def accepts(path: Path) -> bool:
    """Whether somebody listens on the unix socket ``path``."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


class Server:
    """The server ``name`` on ``image``. It runs from `start` to `stop`.

    With ``certificates``, a directory of `bench.certificates`, it requires TLS. ``fmt`` is the
    image's format, which has to be raw with nbdkit and with certificates.
    """

    def __init__(
        self,
        name: str,
        image: Path,
        directory: Path,
        certificates: Path | None = None,
        *,
        fmt: str = "raw",
        read_only: bool = False,
    ) -> None:
        self.name = name
        self.image = image
        self._certificates = certificates
        self._format = ["-f", fmt, *(["-r"] if read_only else [])]
        self._socket = directory / f"{name}.sock"
        self._log = directory / f"{name}.log"
        self._process: Process | None = None

    @property
    def uri(self) -> str:
        """Of its only export."""
        scheme = "nbds+unix" if self._certificates else "nbd+unix"
        return f"{scheme}:///?socket={self._socket}"

    @property
    def process(self) -> Process:
        """The running server."""
        assert self._process is not None
        return self._process

    def _command(self) -> list[str]:
        where, image, tls = str(self._socket), str(self.image), self._certificates
        if self.name == OURS:
            if tls is not None:
                return [sys.executable, str(Path(__file__).with_name("ours.py")), where, image,
                        str(tls)]  # fmt: skip
            words = [sys.executable, "-m", "fleece", "export", *self._format]
            return [*words, "--socket", where, image]
        if self.name == QEMU_NBD:
            words = [need("qemu-nbd"), *self._format, "-t", "-e", "16", "-k", where]
            return words + _qemu_tls(tls) + [image]
        words = [need("nbdkit"), "-f", "-U", where]
        if tls is not None:
            words += ["--tls=require", f"--tls-certificates={tls}"]
        return [*words, "file", image]

    def start(self) -> None:
        """Return when it accepts connections."""
        self._process = Process(self.name, self._command(), self._log)
        wait_until(self._ready, f"{self.name} did not listen")

    def _ready(self) -> bool:
        self.process.check()
        return accepts(self._socket)

    def stop(self) -> None:
        """End it, and remove its socket, which nbdkit leaves behind. Idempotent."""
        if self._process is not None:
            self._process.stop()
            self._process = None
            self._socket.unlink(missing_ok=True)


def _qemu_tls(certificates: Path | None) -> list[str]:
    if certificates is None:
        return []
    credentials = f"tls-creds-x509,id=tls0,endpoint=server,dir={certificates},verify-peer=off"
    return ["--object", credentials, "--tls-creds", "tls0"]


def versions() -> dict[str, str]:
    """What each program says of itself, by name; without those that are not installed."""
    found = {"fleece": fleece.__version__, "python": sys.version.split()[0]}
    for name in ("qemu-nbd", "qemu-storage-daemon", "nbdkit", "fio"):
        if find(name):
            words = run([need(name), "--version"]).splitlines()[0].replace("fio-", "fio ").split()
            found[name] = next(word for word in words if word[0].isdigit())
    return found
