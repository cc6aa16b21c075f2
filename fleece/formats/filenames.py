# SPDX-License-Identifier: Apache-2.0
"""What a filename on the command line means, as the options of a node.

A plain path, ``json:{...}``, an NBD URI, or one of QEMU's older forms ``nbd:unix:PATH`` and
``nbd:HOST:PORT``, both with ``:exportname=NAME`` behind if need be. A name with a colon before its
first slash is no plain path, as in QEMU: write ``./a:b.img`` for such a file.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from fleece.block.options import Options, nest, parse_json
from fleece.errors import UsageError
from fleece.formats.chain import has_protocol
from nbdwire.constants import DEFAULT_PORT
from nbdwire.uri import NBDURI
from nbdwire.uri import parse as parse_uri

_URI: Final = re.compile(r"nbds?(?:\+(?:unix|vsock))?://")
_OLD_UNIX: Final = re.compile(r"nbd:unix:(?P<path>[^:]+)(?::exportname=(?P<export>.*))?", re.DOTALL)
_OLD_INET: Final = re.compile(
    r"nbd:(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:/\[]*)):(?P<port>\d{1,5})(?::exportname=(?P<export>.*))?",
    re.DOTALL,
)


def protocol_options(name: str) -> Options:
    """The options of the node that holds the bytes which ``name`` stands for (no ``json:``)."""
    if _URI.match(name):
        return {"driver": "nbd", "uri": name}
    if name.startswith("nbd:"):
        return {"driver": "nbd", **_old_nbd(name)}
    name = name.removeprefix("file:")
    if has_protocol(name):
        protocol = name.partition(":")[0]
        raise UsageError(
            f"there is no protocol {protocol!r} (nbd is there); a file of this name is ./{name}"
        )
    return {"driver": "file", "filename": name}


def _old_nbd(name: str) -> Options:
    if match := _OLD_UNIX.fullmatch(name):
        server = {"type": "unix", "path": match["path"]}
    elif match := _OLD_INET.fullmatch(name):
        server = {"type": "inet", "host": match["v6"] or match["host"], "port": match["port"]}
    else:
        raise UsageError(
            f"{name!r} is neither nbd:unix:PATH nor nbd:HOST:PORT; write nbd://HOST:PORT/EXPORT"
        )
    return {"server": server, "export": match["export"] or ""}


def normal(source: str | Mapping[str, Any], fmt: str | None = None) -> Options:
    """The nested options of a whole node: a driver (unless it is to be guessed) above a file.

    ``fmt`` is the driver if ``source`` does not name one. `UsageError`.
    """
    if isinstance(source, str) and not source.startswith("json:"):
        options: Options = {"file": protocol_options(source)}
    else:
        options = parse_json(source) if isinstance(source, str) else nest(source.items())
    if fmt is not None and options.setdefault("driver", fmt) != fmt:
        raise UsageError(f"the driver is named twice: {fmt!r} and {options['driver']!r}")
    if "driver" not in options and "file" not in options and "filename" in options:
        options["file"] = protocol_options(str(options.pop("filename")))
    return options


def nbd_uri(options: Options) -> str:
    """The URI that the options of an ``nbd`` node mean."""
    if "uri" in options:
        return str(options["uri"])
    server = options.get("server") or {key: options[key] for key in _FLAT if key in options}
    export = options.get("export", "")
    kind = server.get("type", "unix" if "path" in server else "inet")
    if kind == "unix":
        if not server.get("path"):
            raise UsageError("driver nbd: server.path is missing, the path of the socket")
        return str(NBDURI(socket=server["path"], export=export))
    port = server.get("port", str(DEFAULT_PORT))
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise UsageError(f"driver nbd: port {port!r} is not a port number")
    return str(NBDURI(host=server.get("host", ""), port=int(port), export=export))


_FLAT: Final = ("path", "host", "port")


_STRONG: Final = ("offset", "size", "backing", "data-file", "key-secret")
"""Options that say which disk it is; the others only say how it is used."""


def filename(driver: str, options: Options) -> str:
    """A name that opens the node again: a path or URI if that is enough, else ``json:{...}``."""
    strong: Options = {key: options[key] for key in _STRONG if key in options}
    if secret := options.get("encrypt", {}).get("key-secret"):
        strong["encrypt.key-secret"] = secret
    file = options.get("file", options)
    plain = protocol_name(file)
    if plain is not None and not strong:
        return plain
    return "json:" + json.dumps({**strong, "driver": driver, "file": {"driver": "file", **file}})


def protocol_name(options: Options) -> str | None:
    """The same for a node without a file below it; None if only options can say it."""
    driver = options.get("driver", "file")
    if driver == "nbd":
        return _nbd_name(nbd_uri(options))
    if driver == "null-co":
        return "null-co://"
    name = options.get("filename")
    if not isinstance(name, str):
        return None
    return f"./{name}" if has_protocol(name) else name


def _nbd_name(text: str) -> str:
    """An NBD address as QEMU spells it: with the port, and no empty path of a socket's URI."""
    uri = parse_uri(text)
    if uri.socket and not uri.params and not uri.tls:
        where = f"/{uri.export}" if uri.export else ""
        return f"nbd+unix://{where}?socket={uri.socket}"
    if uri.socket or uri.params or uri.tls or uri.vsock:
        return text
    host = f"[{uri.host}]" if ":" in uri.host else uri.host or "localhost"
    return f"nbd://{host}:{uri.port or DEFAULT_PORT}" + (f"/{uri.export}" if uri.export else "")
