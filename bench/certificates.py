# SPDX-License-Identifier: Apache-2.0
"""Throw-away certificates: one directory that our server, nbdkit, qemu-nbd and libnbd can use."""

import shutil
from pathlib import Path

from bench.tools import need, run

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def create(directory: Path) -> Path:
    """ca-cert.pem, server-cert.pem and server-key.pem for localhost; returns ``directory``.

    Below it is what libnbd looks for in a home directory, for fio cannot be given a place.
    """
    openssl = need("openssl")
    directory.mkdir(parents=True)
    authority, key = directory / "ca-cert.pem", directory / "ca-key.pem"
    command = [openssl, "req", "-x509", *_KEY, "-keyout", str(key), "-out", str(authority)]
    run([*command, "-days", "2", "-subj", "/CN=bench", "-addext", "keyUsage=keyCertSign"])
    request, extensions = directory / "request.pem", directory / "extensions"
    command = [openssl, "req", "-new", *_KEY, "-keyout", str(directory / "server-key.pem")]
    run([*command, "-out", str(request), "-subj", "/CN=localhost"])
    extensions.write_text("subjectAltName=DNS:localhost\nkeyUsage=digitalSignature\n")
    command = [openssl, "x509", "-req", "-in", str(request), "-CA", str(authority)]
    command += ["-CAkey", str(key), "-days", "2", "-set_serial", "2"]
    run([*command, "-extfile", str(extensions), "-out", str(directory / "server-cert.pem")])
    trusted = directory / "home" / ".pki" / "libnbd"
    trusted.mkdir(parents=True)
    shutil.copy(authority, trusted)
    return directory
