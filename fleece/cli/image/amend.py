# SPDX-License-Identifier: Apache-2.0
"""``fleece image amend``: change the options of an image that is there."""

import argparse
from typing import TYPE_CHECKING, Any, Final

from fleece.cli.image import common
from fleece.cli.image.create import add_options, asks_for_help, print_options
from fleece.cli.output import print_json
from fleece.errors import ImageError, UnsupportedFeature, UsageError

if TYPE_CHECKING:
    from fleece.block.node import Node
    from fleece.block.options import Options

_FIXED: Final = (
    "cluster_size",
    "compression_type",
    "encrypt.cipher-alg",
    "encrypt.cipher-mode",
    "encrypt.format",
    "encrypt.hash-alg",
    "encrypt.ivgen-alg",
    "encrypt.ivgen-hash-alg",
    "encrypt.key-secret",
    "encryption",
    "extended_l2",
    "nocow",
    "preallocation",
    "size",
)
"""Options of new images that an image keeps."""


def configure(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "amend",
        help="change the options of an image",
        description="Change options of an image that is there: its version, the width of its "
        "refcounts, the name of its data file, its passphrases. -o help lists the options. "
        "Passphrases: encrypt.state=active,encrypt.new-secret=ID adds one, and "
        "encrypt.state=inactive,encrypt.keyslot=N (or old-secret=ID) removes one.",
        example="fleece image amend -o compat=1.1,lazy_refcounts=on disk.qcow2\n"
        "fleece image amend --object secret,id=old,file=a --object secret,id=new,file=b \\\n"
        "  --image-opts -o encrypt.state=active,encrypt.new-secret=new \\\n"
        "  driver=qcow2,file.filename=disk.qcow2,encrypt.key-secret=old",
    )
    common.add_source(parser)
    common.add_progress(parser)
    add_options(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    parser.add_argument("--force", action="store_true", help="even if nobody can read it then")
    parser.add_argument("--json", action="store_true", help="say in JSON what was changed")
    parser.add_argument("filename", metavar="IMAGE", nargs="?", help="the image")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Change it; the exit status."""
    return common.run_as_qemu(args, _run)


def _run(args: argparse.Namespace) -> int:
    if asks_for_help(args.options):
        return print_options("qcow2", skip=_FIXED)
    if not args.options or args.filename is None:
        raise UsageError("give options with -o and the name of an image; see -o help")
    options = _options(args)
    source, _ = common.source_of(args, args.filename, args.format)
    node = common.open_source(args, args.filename, args.format, writable=True)
    with common.closing_all(node):
        _amend(args, node, options, source)
    if args.json:
        print_json({"filename": args.filename, "amended": sorted(options)})
    return 0


def _options(args: argparse.Namespace) -> "Options":
    from fleece.block import options as o
    from fleece.formats.creating import QCOW2

    words = o.parse_pairs(",".join(args.options))
    slots: o.Fields = {
        "state": o.choice("active", "inactive"),
        "keyslot": o.integer,
        "new-secret": o.text,
        "old-secret": o.text,
        "iter-time": o.integer,
    }
    fields = {**QCOW2, "encrypt": o.group(slots)}
    found = o.typed(words, fields, "format qcow2")
    for name in found:
        if name in _FIXED:
            hint = "fleece image resize" if name == "size" else "fleece image convert"
            raise UnsupportedFeature(f"option {name!r} cannot be amended; use: {hint}")
    return found


def _amend(
    args: argparse.Namespace, node: "Node", options: "Options", source: "str | Options"
) -> None:
    from fleece.formats.creating import changes
    from fleece.formats.qcow2.amend import amend
    from fleece.formats.qcow2.image import Qcow2Node

    if not isinstance(node, Qcow2Node):
        raise ImageError(f"{node.name}: only qcow2 images can be amended")
    if "encrypt" in options:
        _amend_slots(args, node, options["encrypt"], source)
    with common.progress(args) as progress:
        amend(node.file, node.header, changes(options), node.name, progress)


def _amend_slots(
    args: argparse.Namespace, node: Any, group: "Options", source: "str | Options"
) -> None:
    from fleece.formats.qcow2 import keyslots, luks

    where = luks.place(node.header, node.name)
    secrets = common.secrets(args)
    slot = group.get("keyslot")
    if group.get("state") == "inactive":
        if "new-secret" in group:
            raise UsageError("encrypt.new-secret does not go with encrypt.state=inactive")
        if slot is None and "old-secret" not in group:
            raise UsageError("say which: encrypt.keyslot=N or encrypt.old-secret=ID")
        old = _secret(secrets, group["old-secret"]) if "old-secret" in group else None
        keyslots.remove(node.file, where, node.name, slot=slot, passphrase=old, force=args.force)
        return
    if group.get("state") != "active" or "new-secret" not in group:
        raise UsageError(
            "encrypt.state=active needs encrypt.new-secret=ID, and the other way round"
        )
    keyslots.add(
        node.file,
        where,
        _secret(secrets, _key_secret(source)),
        _secret(secrets, group["new-secret"]),
        node.name,
        slot=slot,
        iteration_ms=group.get("iter-time", luks.DEFAULT_ITERATION_MS),
    )


def _key_secret(source: "str | Options") -> str:
    group = source.get("encrypt") if isinstance(source, dict) else None
    name = group.get("key-secret") if isinstance(group, dict) else None
    if not isinstance(name, str):
        raise UsageError(
            "the image's passphrase is missing: --image-opts ...,encrypt.key-secret=ID"
        )
    return name


def _secret(secrets: dict[str, bytes], name: str) -> bytes:
    if name not in secrets:
        raise UsageError(f"there is no secret {name!r}; give --object secret,id={name},file=PATH")
    return secrets[name]
