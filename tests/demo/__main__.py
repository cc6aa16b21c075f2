# SPDX-License-Identifier: Apache-2.0
"""The main job, shown on a real disk: ``python tests/demo [--small] [--keep DIR]``.

Exit status 0 if every proof held, 1 if one did not, 2 for a wrong command line.
"""

import argparse
import signal
import sys
import tempfile
from pathlib import Path

# Started as a script, so that nothing has to be installed for it: make `tests.demo` importable.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.demo.screen import Screen
from tests.demo.story import Story
from tests.demo.tools import DemoFailed

MiB = 1 << 20


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="./run demo", description="The main job of fleece.")
    parser.add_argument("--small", action="store_true", help="a disk of 64 MiB, not 256 MiB")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and leave it there")
    return parser.parse_args(argv)


def play(directory: Path, small: bool, screen: Screen) -> int:
    """Tell the story in ``directory``; returns the exit status."""
    sizes = (64 * MiB, 16 * MiB) if small else (256 * MiB, 96 * MiB)
    story = Story(directory, *sizes, screen)
    try:
        story.tell()
    except DemoFailed as problem:
        screen.failed(str(problem), story.daemon.log_tail())
        return 1
    finally:
        story.close()
    return 0


def main(argv: list[str]) -> int:
    """Run the demo; returns the exit status."""
    options = parse(argv)
    screen = Screen(sys.stdout)
    # So that the daemon is ended and the directory removed, as on Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            if any(options.keep.iterdir()):
                screen.failed(f"{options.keep} is not empty; name a new directory", [])
                return 2
            return play(options.keep.resolve(), options.small, screen)
        with tempfile.TemporaryDirectory(prefix="fleece-demo-") as scratch:
            return play(Path(scratch), options.small, screen)
    except OSError as problem:
        screen.failed(str(problem), [])
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
