# SPDX-License-Identifier: Apache-2.0
"""``serve``: offer files, or memory, until a signal comes."""

import argparse
import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from nbdwire.tools.files import FileExport
from nbdwire.tools.options import add_json, print_json, size, uri
from nbdwire.uri import NBDURI

if TYPE_CHECKING:
    from nbdwire.server import Server
    from nbdwire.tls import ServerTLS

_ENDS: Final = (signal.SIGINT, signal.SIGTERM)
_EPILOG: Final = """\
FILE is a path, or NAME=PATH to offer it as the export NAME; several need names.

example: python -m nbdwire serve --memory 1G --socket /tmp/nbd.sock
others:
  python -m nbdwire serve -r root=root.img data=/dev/vg/data --listen nbd://0.0.0.0
  python -m nbdwire serve disk.img --tls required --tls-certificates /etc/pki/nbd
"""


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The verb and its options."""
    parser = verbs.add_parser(
        "serve",
        help="offer files, or memory",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.description = "Offer files, block devices or memory until SIGINT or SIGTERM comes."
    option = parser.add_argument
    option("files", nargs="*", metavar="FILE", help="a file or a block device, as it is")
    option("--memory", type=size, metavar="SIZE", help="an empty disk in memory")
    option("--socket", action="append", default=[], metavar="PATH",
           help="listen on this Unix socket; may be repeated")  # fmt: skip
    option("--listen", action="append", default=[], type=uri, metavar="URI",
           help="listen there; may be repeated (default: nbd://localhost)")  # fmt: skip
    option("-r", "--read-only", action="store_true", help="refuse writes")
    option("-n", "--export", "--name", dest="name", default="", metavar="NAME",
           help="of a single export (default: empty)")  # fmt: skip
    option("-d", "--description", default="", help="for those who list the exports")
    _add_tls(parser)
    option("-v", "--verbose", action="store_true", help="log clients on stderr")
    add_json(parser)
    parser.set_defaults(run=run, parser=parser)


def _add_tls(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TLS")
    option = group.add_argument
    option("--tls", choices=("off", "allowed", "required"),
           help="default: required if there are certificates or keys, else off")  # fmt: skip
    option("--tls-certificates", metavar="DIR",
           help="with server-cert.pem, server-key.pem and ca-cert.pem")  # fmt: skip
    option("--tls-psk", metavar="FILE", help="names and keys of the clients, name:hex a line")
    option("--tls-verify-peer", action="store_true",
           help="clients must show a certificate that ca-cert.pem has signed")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Listen, print where, and wait for a signal."""
    _check(options)
    if options.verbose:
        import logging

        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    # Blocked before there are threads, so that none of them is interrupted and no handler runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        _serve(options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _check(options: argparse.Namespace) -> None:
    """What argparse cannot tell: exit status 2."""
    wrong = options.parser.error
    if bool(options.files) == (options.memory is not None):
        wrong("give either files or --memory SIZE")
    names = [name for name, _ in _named(options)]
    if len(set(names)) < len(names):
        wrong("every export needs a name of its own: write NAME=PATH for each file")
    given = options.tls_certificates or options.tls_psk
    if options.tls_certificates and options.tls_psk:
        wrong("--tls-certificates and --tls-psk: only one of the two")
    if options.tls in ("allowed", "required") and not given:
        wrong(f"--tls {options.tls}: needs --tls-certificates DIR or --tls-psk FILE")
    if options.tls == "off" and given:
        wrong("--tls off: takes neither certificates nor keys")
    if options.tls_verify_peer and not options.tls_certificates:
        wrong("--tls-verify-peer: needs --tls-certificates DIR")


def _named(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Name and path of each export; None for memory."""
    if options.memory is not None:
        return [(options.name, None)]
    return [_split(text, options.name) for text in options.files]


def _split(text: str, name: str) -> tuple[str, str]:
    """A file that has an equals sign in its name is still a file."""
    before, sign, path = text.partition("=")
    if not sign or "/" in before or os.path.lexists(text):
        return name, text
    return before, path


def _serve(options: argparse.Namespace) -> None:
    from nbdwire.server import Server  # the other tools need none

    tls = _tls(options)
    with ExitStack() as stack:
        exports: dict[str, FileExport] = {}
        for name, path in _named(options):
            exports[name] = _open(options, path)
            stack.callback(exports[name].close)
        with Server(tls=tls) as server:
            for name, export in exports.items():
                server.add(name, export, description=options.description)
            listeners = [_listen(server, place) for place in _places(options)]
            if tls is not None and tls.mode == "required":
                listeners = [_as_tls(place) for place in listeners]
            _announce(listeners, exports, options.json)
            signal.sigwait(_ENDS)
        for export in exports.values():
            export.flush()


def _listen(server: "Server", place: NBDURI) -> NBDURI:
    try:
        return server.listen(place)
    except OSError as problem:
        if problem.errno is None:
            raise
        reason = os.strerror(problem.errno) if problem.errno > 0 else problem.strerror
        raise OSError(problem.errno, f"cannot listen on {place}: {reason}") from problem


def _tls(options: argparse.Namespace) -> "ServerTLS | None":
    if not (options.tls_certificates or options.tls_psk):
        return None
    from nbdwire.tls import ServerTLS

    return ServerTLS(
        options.tls or "required",
        certificates=options.tls_certificates,
        psk_file=options.tls_psk,
        verify_peer=options.tls_verify_peer,
    )


def _as_tls(place: NBDURI) -> NBDURI:
    return NBDURI(place.host, place.port, place.socket, place.export, True, vsock=place.vsock)


def _open(options: argparse.Namespace, path: str | None) -> FileExport:
    if path is None:
        return FileExport.memory(options.memory, options.read_only)
    return FileExport.open(path, options.read_only)


def _places(options: argparse.Namespace) -> list[NBDURI]:
    places = [NBDURI(socket=os.path.abspath(path)) for path in options.socket] + options.listen
    return places or [NBDURI(host="localhost")]


def _announce(listeners: list[NBDURI], exports: dict[str, FileExport], as_json: bool) -> None:
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "size": export.size,
            "read-only": export.read_only,
            "uris": [str(place.with_export(name)) for place in listeners],
        }
        for name, export in exports.items()
    ]
    if as_json:
        first = {"uri": found[0]["uris"][0]}
        facts = {key: found[0][key] for key in ("size", "read-only")}
        print_json({**first, **facts, "exports": found})
    else:
        for export in found:
            print("\n".join(export["uris"]))
    sys.stdout.flush()  # whoever started us waits for it
