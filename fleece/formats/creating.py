# SPDX-License-Identifier: Apache-2.0
"""Make images of any format that we write, from options as people write them (``-o``).

Names, defaults and limits of the options are QEMU's (``qemu-img create -o help``).
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fleece.block import options as o
from fleece.errors import ImageError, UnsupportedFeature, UsageError
from fleece.formats.qcow2 import preallocate, replace
from fleece.formats.qcow2.create import COMPRESSIONS, PREALLOCATIONS, CreateOptions
from fleece.formats.qcow2.create import create as create_qcow2
from fleece.formats.qcow2.hosting import write_all
from fleece.units import align_up

if TYPE_CHECKING:
    from fleece.block.node import Node
    from fleece.formats.qcow2.amend import Changes
    from fleece.formats.qcow2.luks import LuksOptions
    from fleece.formats.qcow2.measure import Measure

MAX_SIZE: Final = (1 << 63) - 512

_CIPHERS: Final = ("aes-128", "aes-192", "aes-256")
_MODES: Final = ("ecb", "cbc", "xts", "ctr")
_IVS: Final = ("plain", "plain64", "essiv")
_HASHES: Final = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}

_LUKS: Final[o.Fields] = {
    "key-secret": o.text,
    "cipher-alg": o.choice(*_CIPHERS),
    "cipher-mode": o.choice(*_MODES),
    "ivgen-alg": o.choice(*_IVS),
    "ivgen-hash-alg": o.choice(*_HASHES),
    "hash-alg": o.choice(*_HASHES),
    "iter-time": o.integer,
}

QCOW2: Final[o.Fields] = {
    "size": o.size,
    "compat": o.choice(*_VERSIONS),
    "backing_file": o.text,
    "backing_fmt": o.text,
    "encryption": o.boolean,
    "encrypt": o.group({**_LUKS, "format": o.choice("luks", "aes")}),
    "cluster_size": o.size,
    "preallocation": o.choice(*PREALLOCATIONS),
    "lazy_refcounts": o.boolean,
    "refcount_bits": o.integer,
    "extended_l2": o.boolean,
    "compression_type": o.choice(*COMPRESSIONS),
    "data_file": o.text,
    "data_file_raw": o.boolean,
    "nocow": o.boolean,
}
RAW: Final[o.Fields] = {
    "size": o.size,
    "preallocation": o.choice("off", "falloc", "full"),
    "nocow": o.boolean,
}
LUKS: Final[o.Fields] = {"size": o.size, **_LUKS, "preallocation": RAW["preallocation"]}

FIELDS: Final[dict[str, o.Fields]] = {"qcow2": QCOW2, "raw": RAW, "luks": LUKS}
"""Formats that can be made -> their options."""

HELP: Final[dict[str, str]] = {
    "size": "size of the disk",
    "compat": "0.10 (version 2) or 1.1 (version 3)",
    "backing_file": "the image below it",
    "backing_fmt": "the format of that image",
    "encryption": "encrypt by the passphrase alone (not offered any more)",
    "encrypt.format": "luks",
    "encrypt.key-secret": "id of the --object secret with the passphrase",
    "encrypt.cipher-alg": ", ".join(_CIPHERS),
    "encrypt.cipher-mode": ", ".join(_MODES),
    "encrypt.ivgen-alg": ", ".join(_IVS),
    "encrypt.ivgen-hash-alg": "hash of essiv",
    "encrypt.hash-alg": ", ".join(_HASHES),
    "encrypt.iter-time": "milliseconds that unlocking takes",
    "encrypt.state": "active (add a passphrase) or inactive (remove one)",
    "encrypt.new-secret": "id of the --object secret with the passphrase to add",
    "encrypt.old-secret": "id of the --object secret with the passphrase to remove",
    "encrypt.keyslot": "the number of one slot, 0 to 7",
    "cluster_size": "512 to 2M",
    "preallocation": "off, metadata, falloc, full",
    "lazy_refcounts": "put off the writing of refcounts",
    "refcount_bits": "1, 2, 4, 8, 16, 32 or 64",
    "extended_l2": "subclusters",
    "compression_type": "zlib or zstd",
    "data_file": "keep the disk's data in this file",
    "data_file_raw": "and see to it that this file is a raw image",
    "nocow": "no copy on write in the file system (btrfs)",
}


@dataclass(frozen=True)
class Recipe:
    """A new image: ``options`` are those of `FIELDS`, typed. Made by `recipe`.

    ``size`` in bytes is what the options say; None if they do not. ``sync``: the empty image is on
    stable storage when it is made.
    """

    fmt: str
    options: Mapping[str, Any]
    size: int | None
    secrets: Mapping[str, bytes]
    sync: bool = True

    @property
    def backing(self) -> str | None:
        """The backing file that the options name."""
        return self.options.get("backing_file") or None


def recipe(fmt: str, texts: list[str], secrets: Mapping[str, bytes], **more: str | None) -> Recipe:
    """From the words of ``-o`` and what other flags say in QEMU's names (``backing_file=``).

    `UsageError` for what the format does not have, `UnsupportedFeature` for an unknown format.
    """
    fields = FIELDS.get(fmt)
    if fields is None:
        raise UnsupportedFeature(f"images of format {fmt!r} cannot be made; use {_names()}")
    words = o.parse_pairs(",".join(texts))
    words |= {name: value for name, value in more.items() if value is not None}
    options = o.typed(words, fields, f"format {fmt}")
    return Recipe(fmt, options, options.get("size"), secrets)


def _names() -> str:
    return ", ".join(FIELDS)


def make(path: str | os.PathLike[str], size: int, recipe: Recipe, *, overwrite: bool) -> None:
    """Make the image; without ``overwrite`` there must be nothing at the path.

    ``size`` in bytes is rounded up to 512. OSError or an `ImageError`.
    """
    if not 0 <= size <= MAX_SIZE:
        raise UnsupportedFeature(f"{size} bytes are no size of a disk; it is below 8 EiB")
    maker: Callable[..., None] = {"qcow2": _make_qcow2, "raw": _make_raw, "luks": _make_luks}[
        recipe.fmt
    ]
    maker(Path(path), align_up(size, 512), recipe, overwrite)


def _make_qcow2(path: Path, size: int, recipe: Recipe, overwrite: bool) -> None:
    create_qcow2(path, size, qcow2_options(recipe, overwrite=overwrite))


def qcow2_options(recipe: Recipe, *, overwrite: bool = False) -> CreateOptions:
    """The recipe as the qcow2 driver takes it."""
    given = recipe.options
    if given.get("backing_fmt") and not given.get("backing_file"):
        raise UsageError("a backing format needs a backing file: -b FILE")
    encryption, passphrase = _encryption(recipe)
    plain = ("cluster_size", "preallocation", "lazy_refcounts", "refcount_bits", "extended_l2")
    more = ("compression_type", "data_file", "data_file_raw", "nocow")
    return CreateOptions(
        version=_VERSIONS[given.get("compat", "1.1")],
        backing=given.get("backing_file") or None,
        backing_format=given.get("backing_fmt"),
        backing_verbatim=True,
        encryption=encryption,
        passphrase=passphrase,
        overwrite=overwrite,
        sync=recipe.sync,
        **{name: given[name] for name in plain + more if name in given},
    )


def _encryption(recipe: Recipe) -> "tuple[LuksOptions | None, bytes]":
    group = recipe.options.get("encrypt", {})
    if recipe.options.get("encryption") or group.get("format") == "aes":
        raise UnsupportedFeature("new images are encrypted with encrypt.format=luks only")
    if not group:
        return None, b""
    if "format" not in group:
        raise UsageError("option 'encrypt.format' is missing: luks")
    return luks_options(group), passphrase(group, recipe.secrets, "encrypt.key-secret")


def luks_options(group: Mapping[str, Any]) -> "LuksOptions":
    """The options of a LUKS header."""
    from fleece.formats.qcow2.luks import DEFAULT_ITERATION_MS, LuksOptions

    if "ivgen-hash-alg" in group and group.get("ivgen-alg") != "essiv":
        raise UsageError("option 'ivgen-hash-alg' goes with ivgen-alg=essiv only")
    return LuksOptions(
        cipher_alg=group.get("cipher-alg", "aes-256"),
        mode=group.get("cipher-mode", "xts"),
        iv_generator=group.get("ivgen-alg", "plain64"),
        iv_hash=group.get("ivgen-hash-alg"),
        hash=group.get("hash-alg", "sha256"),
        iteration_ms=group.get("iter-time", DEFAULT_ITERATION_MS),
    )


def passphrase(group: Mapping[str, Any], secrets: Mapping[str, bytes], option: str) -> bytes:
    """The secret that ``option`` names."""
    name = group.get(option.rpartition(".")[2])
    if name is None:
        raise UsageError(f"option {option!r} is missing: the id of an --object secret")
    if name not in secrets:
        raise UsageError(f"there is no secret {name!r}; give --object secret,id={name},file=PATH")
    return secrets[name]


def _make_raw(path: Path, size: int, recipe: Recipe, overwrite: bool) -> None:
    options = CreateOptions(
        preallocation=recipe.options.get("preallocation", "off"),
        nocow=recipe.options.get("nocow", False),
        overwrite=overwrite,
        sync=recipe.sync,
    )
    replace.make_data_file(path, size, options)


def _make_luks(path: Path, size: int, recipe: Recipe, overwrite: bool) -> None:
    from fleece.formats.qcow2 import luks

    if not recipe.options.get("key-secret"):
        raise UsageError("option 'key-secret' is missing: the id of an --object secret")
    secret = passphrase(recipe.options, recipe.secrets, "key-secret")
    region = luks.new(secret, luks_options(recipe.options))[0]
    if size + len(region) > MAX_SIZE:
        raise ImageError(f"{path}: a disk of {size} bytes does not fit into a file")
    fd, is_new = replace.open_emptied(path, size + len(region), CreateOptions(overwrite=overwrite))
    try:
        _fill_luks(fd, region, size, recipe.options.get("preallocation", "off"))
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _fill_luks(fd: int, region: bytes, size: int, preallocation: str) -> None:
    """All but the magic first."""
    os.ftruncate(fd, len(region) + size)
    preallocate.reserve(fd, len(region), size, preallocation)
    write_all(fd, region[8:], 8)
    os.fsync(fd)
    write_all(fd, region[:8], 0)
    os.fsync(fd)


def formatting(path: str, recipe: Recipe, size: int) -> str:
    """The line that ``qemu-img create`` says first."""
    given = dict(recipe.options) | {"size": size}
    flat = {
        f"{name}.{key}" if isinstance(value, dict) else name: inner
        for name, value in given.items()
        for key, inner in (value.items() if isinstance(value, dict) else ((name, value),))
    }
    shown = _shown_qcow2(flat) if recipe.fmt == "qcow2" else flat
    words = [f"{name}={_word(value)}" for name, value in shown.items()]
    return f"Formatting '{path}', fmt={recipe.fmt} {' '.join(words)}"


def _shown_qcow2(given: Mapping[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "cluster_size": 65536,
        "extended_l2": False,
        "compression_type": "zlib",
        "lazy_refcounts": False,
        "refcount_bits": 16,
    }
    encrypt = ["encryption", "encrypt.format", *(f"encrypt.{name}" for name in _LUKS)]
    order = [
        *encrypt,
        *("cluster_size", "extended_l2", "preallocation", "compression_type", "size", "compat"),
        *("backing_file", "backing_fmt", "data_file", "data_file_raw", "lazy_refcounts"),
        *("refcount_bits", "nocow"),
    ]
    both = {**defaults, **given}
    return {name: both[name] for name in order if name in both}


def _word(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def measure(recipe: Recipe, size: int, source: "Node | None" = None) -> "Measure":
    """How large the image would be, empty or as a copy of ``source`` of ``size`` bytes."""
    from fleece.formats.qcow2 import measure as measuring

    if not 0 <= size <= MAX_SIZE:
        raise UnsupportedFeature(f"{size} bytes are no size of a disk; it is below 8 EiB")
    if recipe.fmt == "raw":
        return measuring.of_raw(size)
    if recipe.fmt == "luks":
        passphrase(recipe.options, recipe.secrets, "key-secret")
        return measuring.of_luks(size, _luks_bytes(luks_options(recipe.options)))
    options = qcow2_options(recipe)
    header = _luks_bytes(options.encryption) if options.encryption else 0
    if source is None:
        return measuring.of_qcow2(size, options, header)
    return measuring.of_copy(source, options, header)


def _luks_bytes(options: "LuksOptions") -> int:
    from fleece.formats.qcow2 import luks

    return luks.new_length(options)


OF_SLOTS: Final = (
    "encrypt.state",
    "encrypt.new-secret",
    "encrypt.old-secret",
    "encrypt.keyslot",
)
"""Options of `HELP` that only an image has which is there."""


def option_lines(fmt: str, *, skip: tuple[str, ...] = OF_SLOTS) -> list[str]:
    """The options of a format with a few words on each. `UnsupportedFeature` if it is unknown."""
    if fmt not in FIELDS:
        raise UnsupportedFeature(f"images of format {fmt!r} cannot be made; use {_names()}")
    prefix = "encrypt." if fmt == "luks" else ""
    names = [name for name in FIELDS[fmt] if name != "encrypt"]
    if fmt == "qcow2":
        names += [name for name in HELP if name.startswith("encrypt.")]
    told = [(name, HELP.get(name) or HELP[prefix + name]) for name in names if name not in skip]
    width = max(len(name) for name, _ in told)
    return [f"  {name.ljust(width)} - {text}" for name, text in sorted(told)]


def changes(options: Mapping[str, Any]) -> "Changes":
    """Options of `QCOW2` as `fleece.formats.qcow2.amend` takes them."""
    from fleece.formats.qcow2.amend import Changes

    names = ("refcount_bits", "lazy_refcounts", "data_file", "data_file_raw", "backing_file")
    return Changes(
        version=_VERSIONS[options["compat"]] if "compat" in options else None,
        backing_format=options.get("backing_fmt"),
        **{name: options[name] for name in names if name in options},
    )
