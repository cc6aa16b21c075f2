"""Certificates made for a test by the openssl program: authorities, and what they sign.

Directories have the names that QEMU, nbdkit and libnbd want: ca-cert.pem, server-cert.pem ...
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.tools import require

SERVER_NAMES = "DNS:localhost,IP:127.0.0.1,IP:::1"
CLIENT = "/C=GB/O=Acme, Ltd/CN=backup1"
CLIENT_SUBJECT = r"C=GB,O=Acme\, Ltd,CN=backup1"
CLIENT_NAMES = "DNS:backup1.example,URI:spiffe://example/backup1"


def _openssl(*words: str | Path) -> None:
    command = [require("openssl"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"


@dataclass(frozen=True)
class Authority:
    """Signs certificates. ``directory`` has its ca-cert.pem."""

    directory: Path

    @classmethod
    def create(cls, directory: Path, name: str = "test authority") -> "Authority":
        directory.mkdir(parents=True)
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", directory / "ca-key.pem", "-out", directory / "ca-cert.pem",
            "-days", "2", "-subj", f"/CN={name}",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip
        return cls(directory)

    def sign(
        self, directory: Path, side: str, subject: str, names: str, *, expired: bool = False
    ) -> Path:
        """SIDE-cert.pem, SIDE-key.pem and this authority's ca-cert.pem in ``directory``."""
        directory.mkdir(parents=True, exist_ok=True)
        request, extensions = directory / "request.pem", directory / "extensions"
        _openssl(
            "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", directory / f"{side}-key.pem", "-out", request, "-subj", subject,
        )  # fmt: skip
        usage = "serverAuth" if side == "server" else "clientAuth"
        extensions.write_text(
            f"basicConstraints=critical,CA:false\nextendedKeyUsage={usage}\n"
            f"keyUsage=digitalSignature\nsubjectAltName={names}\n"
        )
        # A certificate that ended yesterday: openssl x509 takes no dates before version 3.4.
        days = "-1" if expired else "2"
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.directory / "ca-cert.pem",
            "-CAkey", self.directory / "ca-key.pem", "-days", days, "-extfile", extensions,
            "-set_serial", str(abs(hash((str(directory), side)))),
            "-out", directory / f"{side}-cert.pem",
        )  # fmt: skip
        shutil.copy(self.directory / "ca-cert.pem", directory / "ca-cert.pem")
        request.unlink()
        extensions.unlink()
        return directory

    def revoke(self, directory: Path, side: str) -> None:
        """Put a ca-crl.pem that names SIDE-cert.pem into ``directory``."""
        index, settings = directory / "index.txt", directory / "ca.cnf"
        index.touch()
        settings.write_text(
            f"[ca]\ndefault_ca=here\n[here]\ndatabase={index}\ndefault_md=sha256\n"
            "default_crl_days=2\n"
        )
        signed_by = [
            "-config", settings,
            "-cert", self.directory / "ca-cert.pem", "-keyfile", self.directory / "ca-key.pem",
        ]  # fmt: skip
        _openssl("ca", *signed_by, "-revoke", directory / f"{side}-cert.pem")
        _openssl("ca", *signed_by, "-gencrl", "-out", directory / "ca-crl.pem")


@dataclass(frozen=True)
class Pki:
    """``both``: server, client and authority that fit. The others have one thing wrong each."""

    authority: Authority
    both: Path
    no_client: Path
    wrong_authority: Path
    wrong_name: Path
    expired: Path


def create(directory: Path) -> Pki:
    good = Authority.create(directory / "ca")
    both = good.sign(directory / "both", "server", "/CN=nbd server", SERVER_NAMES)
    good.sign(both, "client", CLIENT, CLIENT_NAMES)
    no_client = good.sign(directory / "no-client", "server", "/CN=other", SERVER_NAMES)
    other = Authority.create(directory / "other-ca", "another authority")
    wrong = other.sign(directory / "wrong", "server", "/CN=impostor", SERVER_NAMES)
    other.sign(wrong, "client", CLIENT, CLIENT_NAMES)
    name = good.sign(directory / "name", "server", "/CN=localhost", "DNS:elsewhere.example")
    expired = good.sign(directory / "old", "server", "/CN=old", SERVER_NAMES, expired=True)
    good.sign(expired, "client", CLIENT, CLIENT_NAMES, expired=True)
    return Pki(good, both, no_client, wrong, name, expired)
