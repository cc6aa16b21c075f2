# SPDX-License-Identifier: Apache-2.0
"""``fleece serve``: the daemon, in the foreground."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from fleece.cli.arguments import add_json, checked
from fleece.cli.output import print_json
from fleece.control import paths
from fleece.errors import UsageError

if TYPE_CHECKING:
    from fleece.config import Config

_EXAMPLE = """\
fleece serve --disk vm1=/images/vm1.img --disk vm2=/dev/vg/vm2,format=raw
fleece serve -c /etc/fleece/fleece.yaml --log-level debug"""


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "serve",
        help="serve disks until told to stop",
        description="Serve disks over NBD and answer the other commands. Options replace what the "
        "configuration file says. Ends on SIGTERM or Ctrl-C.",
        example=_EXAMPLE,
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="the configuration, in YAML")
    parser.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="NAME=IMAGE",
        help="serve IMAGE as NAME; may come with ,format=raw|qcow2 ,read-only ,tracking=off "
        ",granularity=64k ,description=TEXT. May be repeated",
    )
    _add_addresses(parser)
    _add_logging(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _add_addresses(parser: argparse.ArgumentParser) -> None:
    defaults = paths.nbd_socket(), paths.control_socket(), str(paths.state_directory())
    nbd, control, state = (text.replace("%", "%%") for text in defaults)
    parser.add_argument(
        "--socket", metavar="PATH", help=f"listen for NBD at this unix socket (default: {nbd})"
    )
    parser.add_argument(
        "--listen",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="listen for NBD at this address, instead of the default socket. May be repeated",
    )
    parser.add_argument(
        "--control", metavar="PATH", help=f"the control socket to listen at (default: {control})"
    )
    parser.add_argument(
        "--state",
        metavar="DIR",
        help=f"where to keep what survives a restart (default: {state})",
    )


def _add_logging(parser: argparse.ArgumentParser) -> None:
    levels = ("debug", "info", "warning", "error", "critical")
    parser.add_argument(
        "--log-level", choices=levels, help="the least that is logged (default: info)"
    )
    parser.add_argument("--log-json", action="store_true", help="log one JSON object a line")
    parser.add_argument(
        "-v",
        "--verbose",
        dest="log_level",
        action="store_const",
        const="debug",
        help="the same as --log-level debug",
    )


def run(args: argparse.Namespace) -> int:
    """Run the daemon until it ends; its exit status."""
    config = _config(args)
    from fleece.appliance import run_daemon

    return int(run_daemon(config, ready=lambda: _announce(config, args.json)))


def _config(args: argparse.Namespace) -> "Config":
    from fleece.config import Config, load, override, parse_disk, parse_listen

    for address in args.listen:
        checked("--listen", parse_listen, address)
    config = override(
        load(args.config) if args.config else Config(),
        disks=[parse_disk(text) for text in args.disk],
        socket=args.socket,
        listen=args.listen,
        control=args.control,
        state=args.state,
        log_level=args.log_level,
        log_json=args.log_json or None,
    )
    if not config.disks:
        raise UsageError("no disk to serve; name one with --disk NAME=IMAGE or in a file with -c")
    return config


def _announce(config: "Config", as_json: bool) -> None:
    uris = [str(uri) for uri in config.listeners]
    if as_json:
        print_json({"pid": os.getpid(), "control": config.control, "listeners": uris})
    else:
        count = len(config.disks)
        print(f"serving {count} disk{'s' * (count > 1)} at {', '.join(uris)}")
        print(f"control socket {config.control}; end with Ctrl-C")
    sys.stdout.flush()
