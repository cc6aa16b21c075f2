# SPDX-License-Identifier: Apache-2.0
"""Write the pages of ``docs/reference`` that follow from the code: ``python docs/generate.py``.

``--check`` writes nothing and ends with status 1 if a page is stale; a test does the same. Only
what is the same on every host and every Python goes into a page, so argparse's own layout does not.
"""

import argparse
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fleece import config, yamlfile
from fleece.cli.image import LazyCommands
from fleece.cli.main import BROKEN_PIPE, INTERRUPTED, build_parser
from fleece.control.commands import REGISTRY
from fleece.control.events import MEMBERS
from fleece.control.kinds import Choice, Kind, ListOf
from fleece.control.registry import Argument, Command
from fleece.errors import FleeceError
from nbdwire.errors import NBDError, to_wire

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
EXAMPLE = ROOT / "config" / "fleece.yaml"
NOTE = "<!-- Written by docs/generate.py from the code: change it there. -->\n"


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; a vertical bar in a cell stays one."""
    head = list(headers)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def markdown(docstring: str | None) -> str:
    """A docstring as Markdown: ``x`` becomes `x`, and lines of a paragraph are joined."""
    text = inspect.cleandoc(docstring or "").replace("``", "`")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def summary(kind: type[Exception]) -> str:
    """The first paragraph of a class's docstring."""
    return markdown(kind.__doc__).partition("\n\n")[0]


# The command line


def cli() -> str:
    """Every command with its arguments."""
    environment = {k: v for k, v in os.environ.items() if k != "FLEECE_CONTROL"}
    # Defaults differ between users: the page shows those of root.
    with (
        mock.patch.dict(os.environ, environment, clear=True),
        mock.patch("os.geteuid", return_value=0),
    ):
        parser = build_parser()
    parts = [
        "# The command line\n",
        NOTE,
        "Standard output has the result, standard error one line if something went wrong; the exit "
        "status says what ([errors](errors.md)). With `--json` the result is JSON and standard "
        "output holds nothing else; an error is then an object with `error` (a code) and "
        "`message`. Options cannot be abbreviated. Paths that are "
        "defaults are shown as they are for root; [configuration](config.md) has those of other "
        "users.\n",
        *(_command(command) for command in _commands(parser)),
    ]
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, LazyCommands):
            action.load_all()
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                nested = list(_commands(child))
                yield from nested or [child]


def _command(parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if action.dest != "help"]
    rows = [(_spelling(action), (action.help or "").replace("%%", "%")) for action in actions]
    parts = [
        f"## {parser.prog}\n",
        " ".join((parser.description or "").split()) + "\n",
        table(("argument", "meaning"), rows),
    ]
    if parser.epilog:
        lines = inspect.cleandoc(parser.epilog.removeprefix("example:")).strip()
        parts.append(f"```text\n{lines}\n```\n")
    return "\n".join(parts)


def _spelling(action: argparse.Action) -> str:
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        value = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return f"`{value}{' ...' if action.nargs == '+' else ''}`"
    takes = "" if action.nargs == 0 else f" {value}"
    must = " (required)" if action.required else ""
    return ", ".join(f"`{name}{takes}`" for name in action.option_strings) + must


# The control socket


def control() -> str:
    """Every command and event of the control socket."""
    parts = [
        "# The control socket\n",
        NOTE,
        "The daemon listens at a unix socket that only its own user can open, and speaks QMP, "
        "QEMU's machine protocol: one JSON object on each line. After the greeting a client sends "
        '`{"execute": "qmp_capabilities"}`; then each '
        '`{"execute": NAME, "arguments": {...}, "id": ANYTHING}` is answered by '
        '`{"return": ...}` or by `{"error": {"class": ..., "desc": ..., "data": {"code": ...}}}`, '
        "both with the `id` if there was one. `code` is a word of the list of [errors](errors.md). "
        "Commands that QEMU does not have begin with `x-fleece-`. Sizes are in bytes, times in "
        "ISO 8601 and UTC. What the commands answer is shown in [JSON](json.md).\n",
        *(_control_command(command) for command in REGISTRY),
        "## Events\n",
        "An event is sent to every client that has negotiated, as "
        '`{"event": NAME, "data": {...}, "timestamp": {...}}`.\n',
        table(("event", "members of `data`"), map(_event, MEMBERS)),
    ]
    return "\n".join(parts)


def _control_command(command: Command) -> str:
    text = f"## {command.name}\n\n{markdown(command.function.__doc__)}\n"
    if command.arguments:
        rows = map(_argument, command.arguments)
        text += "\n" + table(("argument", "type", "required"), rows)
    return text


def _argument(argument: Argument) -> tuple[str, str, str]:
    return f"`{argument.name}`", _type(argument.kind), "yes" if argument.required else "no"


def _type(kind: Kind) -> str:
    if isinstance(kind, ListOf):
        return f"list of {_type(kind.element)}"
    if isinstance(kind, Choice):
        return " or ".join(f"`{word}`" for word in kind.values)
    return kind.expected


def _event(name: str) -> tuple[str, str]:
    words = {str: "string", bool: "boolean"}
    members = (f"`{member}` ({words[kind]})" for member, kind in MEMBERS[name].items())
    return f"`{name}`", ", ".join(members)


# The configuration


def configuration() -> str:
    """Every key of the configuration, with what the commented example says of it."""
    comments: dict[str, str] = {}
    for key, comment in _comments(EXAMPLE.read_text()):
        comments[key] = comments.get(key) or comment
    known = _known_keys()
    if missing := {key for key in known if not comments.get(key)} - SECTIONS:
        raise ValueError(f"{EXAMPLE} does not explain: {', '.join(sorted(missing))}")
    rows = [
        (f"`{key.replace('disks.*', 'disks.NAME')}`", _default(key), comment)
        for key, comment in comments.items()
        if key in known and comment
    ]
    parts = [
        "# Configuration\n",
        NOTE,
        "`fleece serve -c FILE` reads a YAML file. A key that is unknown, given twice or of the "
        "wrong type, and a path that does not exist, is an error that names file, line and key. "
        "Options of the command line replace what the file says.\n",
        table(("key", "default", "meaning"), rows),
        "The runtime directory is `/run/fleece` for root and `$XDG_RUNTIME_DIR/fleece` for "
        "everybody else; the state directory is `/var/lib/fleece` for root and "
        "`$XDG_STATE_HOME/fleece` (else `~/.local/state/fleece`) for everybody else. Without "
        "`XDG_RUNTIME_DIR` the runtime directory is the state directory.\n",
        "## An example with every key\n",
        f"```yaml\n{EXAMPLE.read_text().rstrip()}\n```\n",
    ]
    return "\n".join(parts)


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """``(key path, comment above it)``; of every disk the path is ``disks.*``."""
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("#"):
            comment.append(bare.removeprefix("#").strip())
        elif match := re.match(r"( *)([\w-]+):", line):
            path = [(depth, name) for depth, name in path if depth < len(match[1])]
            path.append((len(match[1]), "*" if [n for _, n in path] == ["disks"] else match[2]))
            key = ".".join(name for _, name in path)
            yield key, " ".join(comment) or _OBVIOUS.get(key, "")
            comment = []
        elif not bare:
            comment = []


def _known_keys() -> set[str]:
    """What the reader of the file accepts: asked of it while it reads the example."""
    found: set[str] = set()
    original = yamlfile.Node.only

    def only(self: yamlfile.Node, *known: str) -> None:
        where = re.sub(r"^disks\.[^.]+", "disks.*", self.key)
        found.update(f"{where}.{key}".lstrip(".") for key in known)
        original(self, *known)

    yamlfile.Node.only = only  # type: ignore[method-assign]
    try:
        config.load(str(EXAMPLE), check_paths=False)
    finally:
        yamlfile.Node.only = original  # type: ignore[method-assign]
    return found


SECTIONS = {"disks", "nbd", "snapshots", "log"}
_OBVIOUS = {"disks.*.image": "A file or a block device.", "nbd.socket": "A unix socket."}
_DEFAULTS = {
    **dict.fromkeys(SECTIONS, ""),
    "disks.*.image": "none: required",
    "disks.*.format": "what the image looks like",
    "disks.*.granularity": "64k",
    "nbd.socket": "`nbd.sock` in the runtime directory, unless `nbd.listen` is given",
    "nbd.listen": "none",
    "control": "`$FLEECE_CONTROL`, else `control.sock` in the runtime directory",
    "state": "the state directory",
    "snapshots.overlay-directory": "`snapshots` in the state directory",
    "snapshots.lease": "none",
}


def _default(key: str) -> str:
    if key in _DEFAULTS:
        return _DEFAULTS[key]
    section, _, name = key.rpartition(".")
    kind: Any = config.DiskConfig if section == "disks.*" else config.Config
    field = ("log_" if section == "log" else "") + name.replace("-", "_")
    value = {f.name: f.default for f in dataclasses.fields(kind)}[field]
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value >> 10}k`" if isinstance(value, int) else f"`{value}`" if value else "none"


# Errors


def errors() -> str:
    """Exit statuses, codes, and the error numbers of the protocol."""
    shell = [
        (str(INTERRUPTED), "", "", "Ctrl-C ended it."),
        (str(BROKEN_PIPE), "", "", "The reader of its output went away."),
    ]
    ours = [
        (str(kind.exit_status), f"`{kind.code}`", f"`{kind.__name__}`", summary(kind))
        for kind in sorted(_family(FleeceError), key=lambda kind: kind.exit_status)
    ]
    wire = [(f"`{kind.code}`", f"`{kind.__name__}`", summary(kind)) for kind in _nbd()]
    parts = [
        "# Errors\n",
        NOTE,
        "## Exit statuses\n",
        "`code` is the field `error` of what `--json` prints, and `data.code` of an error on the "
        "control socket. `fleece export IMAGE -- COMMAND` ends with the status of COMMAND once "
        "that was started.\n",
        table(
            ("status", "code", "class in `fleece.errors`", "meaning"),
            [("0", "", "", "It was done."), *ours, *shell],
        ),
        "## Errors of the package nbdwire\n",
        table(("code", "class in `nbdwire.errors`", "meaning"), wire),
        "## Failed NBD requests\n",
        "A request that fails is answered with one of the protocol's error numbers, made from the "
        "`errno` of what failed; all that are not listed become `EIO`.\n",
        table(("errno", "NBD error"), _wire_numbers()),
    ]
    return "\n".join(parts)


def _family(root: type[FleeceError]) -> Iterator[type[FleeceError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == root.__module__:
            yield from _family(child)


def _nbd() -> Iterator[type[NBDError]]:
    todo: list[type[NBDError]] = [NBDError]
    while todo:
        kind = todo.pop(0)
        yield kind
        todo += [
            child for child in kind.__subclasses__() if child.__module__ == NBDError.__module__
        ]


def _wire_numbers() -> Iterator[tuple[str, str]]:
    import errno

    names = {number: name for name, number in vars(errno).items() if isinstance(number, int)}
    for number, name in sorted((n, errno.errorcode[n]) for n in set(names)):
        if (sent := to_wire(number)) != to_wire(errno.EIO) or number == errno.EIO:
            yield f"`{name}`", f"`{errno.errorcode[sent].replace('EOPNOTSUPP', 'ENOTSUP')}`"


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": cli,
    "control.md": control,
    "config.md": configuration,
    "errors.md": errors,
}


def stale(folder: Path = FOLDER) -> list[str]:
    """The names of the pages that are not what the code says."""

    def current(path: Path) -> str:
        return path.read_text() if path.exists() else ""

    return [name for name, page in PAGES.items() if current(folder / name) != page()]


def main(words: list[str]) -> int:
    """Write the pages, or with ``--check`` name those that are stale; the exit status."""
    if words == ["--check"]:
        for name in (old := stale()):
            print(f"docs/reference/{name} is stale: run docs/generate.py")
        return 1 if old else 0
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
