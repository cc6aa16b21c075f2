# SPDX-License-Identifier: Apache-2.0
"""A small Linux guest whose kernel is an NBD client: an optional test environment.

It is a program of its own, named by FLEECE_KERNEL_NBD, which boots a kernel under QEMU, attaches
the exports of ``--uri`` as /dev/nbd0 and so on, and runs shell commands there:

    PROGRAM --uri URI -C CONNECTIONS --tls-dir DIR --timeout SECONDS -- COMMAND...

Its exit status is that of the first command that fails; above 123: the guest did not work at all.
It needs a kernel package, busybox and qemu-system, which are more than a test may ask of a machine:
so without it the tests are skipped, in CI too.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nbdwire.uri import NBDURI

VARIABLE = "FLEECE_KERNEL_NBD"
SECONDS = 120
_DID_NOT_WORK = 124


def program() -> list[str]:
    """How it is started; the test is skipped where there is none."""
    words = shlex.split(os.environ.get(VARIABLE, ""))
    if not words:
        pytest.skip(f"{VARIABLE} names no program that boots a guest with the kernel's NBD client")
    return [sys.executable, *words] if words[0].endswith(".py") else words


def in_guest(
    where: NBDURI, commands: list[str], *, connections: int = 1, certificates: Path | None = None
) -> str:
    """Run ``commands`` in a guest that has ``where`` as /dev/nbd0; all of them must succeed.

    ``certificates`` has ca-cert.pem, client-cert.pem and client-key.pem. Returns what was printed.
    """
    command = [*program(), "--uri", str(where), "-C", str(connections), "--timeout", str(SECONDS)]
    if certificates is not None:
        command += ["--tls-dir", str(certificates)]
    done = subprocess.run(
        [*command, "--", *commands], capture_output=True, text=True, timeout=2 * SECONDS
    )
    said = f"{done.stdout}\n{done.stderr}"
    assert done.returncode < _DID_NOT_WORK, f"the guest did not work: {said}"
    assert done.returncode == 0, f"a command failed in the guest: {said}"
    return done.stdout
