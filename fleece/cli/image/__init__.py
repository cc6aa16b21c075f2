# SPDX-License-Identifier: Apache-2.0
"""``fleece image``: what ``qemu-img`` does, with its flags, its output and its exit statuses.

Each command is a module of this package with ``configure(subparsers)`` and ``run(args)``. Only the
module of the command that is run is imported; what its ``--help`` line says is in `COMMANDS`.
"""

import argparse
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

from fleece.cli.arguments import Parser

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "info": ("fleece.cli.image.info", "what an image is, and what it names"),
    "check": ("fleece.cli.image.check", "what is wrong with an image; repair it"),
    "map": ("fleece.cli.image.map", "where an image has data, holes and zeroes"),
    "create": ("fleece.cli.image.create", "make a new image"),
    "measure": ("fleece.cli.image.measure", "how large an image will be"),
    "amend": ("fleece.cli.image.amend", "change the options of an image"),
    "snapshot": ("fleece.cli.image.snapshot", "internal snapshots of an image"),
    "bitmap": ("fleece.cli.image.bitmap", "persistent dirty bitmaps of an image"),
    "convert": ("fleece.cli.image.convert", "copy disks into another image"),
    "resize": ("fleece.cli.image.resize", "change the size of a disk"),
    "rebase": ("fleece.cli.image.rebase", "give an overlay another backing file"),
    "commit": ("fleece.cli.image.commit", "write an overlay into the image below it"),
    "dd": ("fleece.cli.image.dd", "copy a part of a disk"),
    "bench": ("fleece.cli.image.bench", "how fast requests to an image are"),
    "compare": ("fleece.cli.image.compare", "whether two images hold the same disk"),
}
"""Name of the command -> its module, and its line in ``fleece image --help``."""


class LazyCommands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Subcommands whose module is imported, and whose parser is made, when they are used."""

    def announce(self, name: str, help_text: str) -> None:
        """Make ``name`` known; `load` will give it arguments."""
        self.add_parser(name, help=help_text)

    def load(self, name: str) -> None:
        """Replace the stand-in of ``name`` by the real parser."""
        listed = list(self._choices_actions)
        del self._name_parser_map[name]
        import_module(COMMANDS[name][0]).configure(self)
        self._choices_actions[:] = listed  # one line for each in the help, as announced

    def load_all(self) -> None:
        """For the reference pages."""
        for name in COMMANDS:
            self.load(name)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Parse the rest with the parser of the command that was named."""
        assert isinstance(values, Sequence)
        if values[0] in COMMANDS:
            # numpy starts threads for linear algebra, which nothing here does: 20 ms of start-up.
            os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            self.load(values[0])
        super().__call__(parser, namespace, values, option_string)


class ImageParser(Parser):
    """Status 1 for a wrong command line, as ``qemu-img`` has it: 2 means something else there."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """What is not known is told here: the top parser would end with another status."""
        found, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> Any:
        """Raise UsageError, with the exit status 1."""
        try:
            super().error(message)
        except Exception as error:
            error.exit_status = 1  # type: ignore[attr-defined]
            raise


def configure(subparsers: Any) -> None:
    """Add the group, and the names of its commands."""
    parser = subparsers.add_parser(
        "image",
        help="look at, check, make and copy disk images",
        description="Look at, check, make and copy disk images, with the options, the output and "
        "the exit statuses of qemu-img.",
        example="fleece image info disk.qcow2\nfleece image map --picture disk.qcow2",
    )
    commands = parser.add_subparsers(
        title="commands",
        metavar="COMMAND",
        required=True,
        action=LazyCommands,
        parser_class=ImageParser,
    )
    for name, (_, help_text) in COMMANDS.items():
        commands.announce(name, help_text)
