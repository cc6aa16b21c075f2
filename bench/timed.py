# SPDX-License-Identifier: Apache-2.0
"""``timed.py COMMAND...``: run it, and print ``SECONDS CPU-SECONDS PEAK-BYTES STATUS``.

In a process of its own, and one that imports next to nothing: a program's peak memory is never
below that of the process which starts it.
"""

import os
import sys
import time


def main(command: list[str]) -> None:
    """Its standard output goes nowhere."""
    quiet = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    begin = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ, file_actions=[quiet])
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - begin
    spent = usage.ru_utime + usage.ru_stime
    print(seconds, spent, usage.ru_maxrss << 10, os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(sys.argv[1:])
