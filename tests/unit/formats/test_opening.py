"""What a name or options open, and what they are refused for."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fleece.block.detect_zeroes import DetectZeroes
from fleece.block.discard import IgnoreDiscard
from fleece.block.file import FileNode
from fleece.block.memory import MemoryNode
from fleece.block.node import Node
from fleece.block.null import NullNode
from fleece.block.options import parse_pairs
from fleece.block.remote import RemoteNode
from fleece.block.window import Window
from fleece.errors import (
    FleeceError,
    ImageCorrupt,
    ImageError,
    ImageInUse,
    NotAnImage,
    NotFound,
    UnsupportedFeature,
    UsageError,
)
from fleece.formats.chain import Policy
from fleece.formats.opening import open_node
from fleece.formats.qcow2 import overlap
from fleece.formats.qcow2.image import Qcow2Node
from nbdwire.server import Server
from nbdwire.uri import NBDURI
from tests.support.qcow2 import make, pread
from tests.support.threads import wait_until

SIZE = 1 << 20


@contextmanager
def opened(source: Any, fmt: str | None = None, **how: Any) -> Iterator[Any]:
    if isinstance(source, Path):
        source = str(source)
    node = open_node(source, fmt, **how)
    try:
        yield node
    finally:
        node.close()


def refuse(
    kind: type[FleeceError], text: str, source: Any, fmt: str | None = None, **how: Any
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(kind, match=text) as caught, opened(source, fmt, **how):
        pass
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    # A server of ours, in this process, needs a moment to see that its client is gone.
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\1" * SIZE)
    return path


@pytest.fixture
def qcow2(tmp_path: Path, raw: Path) -> Path:
    return make(tmp_path / "disk.qcow2", 2 * SIZE, backing=raw.name, backing_format="raw")


def test_a_plain_name_is_a_file_of_the_format_that_it_looks_like(raw: Path, qcow2: Path) -> None:
    with opened(raw) as node:
        assert isinstance(node, FileNode)
    with opened(raw, "raw") as node:
        assert type(node) is FileNode
    for fmt in (None, "qcow2"):
        with opened(qcow2, fmt) as node:
            assert isinstance(node, Qcow2Node)
            assert pread(node, 3, SIZE - 2) == b"\1\1\0"


@pytest.mark.parametrize(
    "text",
    [
        'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "PATH"}}',
        'json:{"driver": "qcow2", "file.filename": "PATH"}',
        'json:{"file.filename": "PATH"}',
        'json:{"filename": "PATH"}',
    ],
)
def test_json_names_open_the_same(text: str, qcow2: Path) -> None:
    with opened(text.replace("PATH", str(qcow2)), read_only=True) as node:
        assert isinstance(node, Qcow2Node)
        assert node.read_only
        assert pread(node, 2, 0) == b"\1\1"


def test_options_open_the_same(qcow2: Path) -> None:
    for text in ("driver=qcow2,file.driver=file,file.filename=PATH", "file.filename=PATH"):
        with opened(parse_pairs(text.replace("PATH", str(qcow2)))) as node:
            assert isinstance(node, Qcow2Node)


def test_a_json_name_relative_to_here_opens(qcow2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(qcow2.parent)
    with opened('json:{"file.filename": "disk.qcow2"}') as node:
        assert pread(node, 1, 0) == b"\1"


def test_a_driver_named_twice_must_be_one(raw: Path) -> None:
    source = f'json:{{"driver": "raw", "file.filename": "{raw}"}}'
    with opened(source, "raw"):
        pass
    refuse(UsageError, "named twice", source, "qcow2")


def test_a_protocol_alone_is_a_node(raw: Path) -> None:
    with opened(
        f'json:{{"driver": "file", "filename": "{raw}", "read-only": true}}', read_only=True
    ) as n:
        assert type(n) is FileNode
        assert n.read_only
    with opened(parse_pairs("driver=null-co,size=64k")) as node:
        assert isinstance(node, NullNode)
        assert node.size == 65536


def test_raw_has_a_window(raw: Path) -> None:
    raw.write_bytes(b"a" * 4096 + b"b" * 4096)
    source = f"driver=raw,offset=4k,size=512,file.filename={raw}"
    with opened(parse_pairs(source)) as node:
        assert isinstance(node, Window)
        assert (node.size, pread(node, 512, 0)) == (512, b"b" * 512)
    refuse(UsageError, "change offset", parse_pairs(source.replace("size=512", "size=8k")))


def test_one_format_in_another(tmp_path: Path) -> None:
    outer = make(tmp_path / "outer.qcow2", 4 * SIZE)
    inner = make(tmp_path / "inner.qcow2", SIZE)
    with opened(outer) as node:
        node.pwrite(memoryview(inner.read_bytes()), 0)
    source = f"driver=qcow2,file.driver=qcow2,file.file.filename={outer}"
    with opened(parse_pairs(source)) as node:
        node.pwrite(memoryview(b"deep"), 5)
        assert node.size == SIZE
    with opened(parse_pairs(source)) as node:
        assert pread(node, 6, 4) == b"\0deep\0"


def test_filters_are_put_on_top_of_what_asks_for_them(raw: Path, qcow2: Path) -> None:
    with opened(
        parse_pairs(f"driver=raw,detect-zeroes=unmap,discard=ignore,file.filename={raw}")
    ) as n:
        assert isinstance(n, DetectZeroes)
        assert isinstance(n.next, IgnoreDiscard)
    with opened(
        parse_pairs(f"driver=qcow2,detect-zeroes=on,discard=unmap,file.filename={qcow2}")
    ) as n:
        assert isinstance(n, DetectZeroes)
        assert isinstance(n.next, Qcow2Node)
        n.pwrite(memoryview(bytes(65536)), SIZE)
        assert all(extent.is_zero for extent in n.extents(SIZE, 65536))


def test_runtime_options_reach_the_driver(qcow2: Path) -> None:
    text = (
        f"driver=qcow2,file.filename={qcow2},lazy-refcounts=off,discard=ignore,"
        "pass-discard-request=off,pass-discard-snapshot=off,pass-discard-other=on,"
        "discard-no-unref=on,overlap-check.template=constant,overlap-check.active-l2=on,"
        "overlap-check.main-header=off,cache-size=4M,refcount-cache-size=1M,"
        "l2-cache-entry-size=4k,cache-clean-interval=0,cache.direct=on,cache.no-flush=off,"
        "node-name=top,auto-read-only=off,read-only=off,file.aio=threads,file.locking=auto"
    )
    with opened(parse_pairs(text)) as node:
        options = node.options
        assert node.name == "top"
        assert (options.lazy_refcounts, options.discard, options.discard_no_unref) == (
            *(False, False),
            True,
        )
        assert (options.pass_discard_request, options.pass_discard_other) == (False, True)
        assert (
            options.overlap_check == (overlap.CONSTANT & ~overlap.MAIN_HEADER) | overlap.ACTIVE_L2
        )
        assert (options.l2_cache_bytes, options.refcount_cache_bytes) == (3 << 20, 1 << 20)
    text = f"driver=qcow2,file.filename={qcow2},overlap-check=none,cache-size=4M"
    with opened(parse_pairs(text)) as node:
        assert node.options.overlap_check == 0
        assert (node.options.l2_cache_bytes, node.options.refcount_cache_bytes) == (
            3 << 20,
            1 << 20,
        )
    bad = f"driver=qcow2,file.filename={qcow2},cache-size=1M,l2-cache-size=2M"
    refuse(UsageError, "more than cache-size", parse_pairs(bad))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("driver=vmdk,file.filename=x", "'vmdk' is not supported"),
        ("driver=qcow2", "file is missing"),
        ("driver=file", "filename is missing"),
        ("driver=qcow2,file.driver=gluster,file.filename=x", "'gluster' is not supported|file is"),
        ("driver=qcow2,file.filename=PATH,lazy-refcount=on", "did you mean 'lazy-refcounts'"),
        ("driver=raw,file.filename=PATH,file.locks=on", "did you mean 'locking'"),
        ("driver=qcow2,file.filename=PATH,overlap-check=some", "one of none, constant"),
        ("driver=qcow2,file.filename=PATH,backing=node0", "no nodes of other names"),
        ("driver=nbd,server.type=unix", "server.path is missing"),
        ("driver=nbd,host=h,port=99999", "not a port"),
        ("driver=nbd,sever.type=unix", "did you mean 'server'"),
        ("driver=raw,file.filename=ftp://x/y", "no protocol 'ftp'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: str, message: str, qcow2: Path) -> None:
    with pytest.raises((UsageError, UnsupportedFeature), match=message) as caught:
        open_node(parse_pairs(options.replace("PATH", str(qcow2))))
    assert "\n" not in str(caught.value)


def test_a_name_with_a_colon_needs_a_slash_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """formats.md §11: anything before a colon, if there is no slash, is a protocol."""
    monkeypatch.chdir(tmp_path)
    Path("a:b.img").write_bytes(b"x" * 512)
    refuse(UsageError, r"a file of this name is \./a:b.img", "a:b.img")
    for name in ("./a:b.img", "file:./a:b.img"):
        with opened(name) as node:
            assert node.size == 512
    for name in ("nbd:localhost", "nbd:unix:", "nbd:h:p", "nbd:h:1:export=x"):
        refuse(UsageError, "neither nbd:unix:PATH nor", name)
    refuse(UsageError, "no NBD URI|socket is missing", "nbd+unix:///x")


@contextmanager
def server(directory: Path, node: Node, name: str = "a b") -> Iterator[Path]:
    path = directory / "nbd.sock"
    serving = Server()
    serving.add(name, node)
    serving.listen(NBDURI(socket=str(path)))
    try:
        yield path
    finally:
        serving.stop()


def test_every_spelling_of_an_nbd_export_is_a_remote_node(tmp_path: Path) -> None:
    node = MemoryNode(SIZE)
    node.pwrite(memoryview(b"far"), 0)
    with server(tmp_path, node) as path:
        for source in (
            f"nbd+unix:///a%20b?socket={path}",
            f"nbd:unix:{path}:exportname=a b",
            f'json:{{"driver": "nbd", "path": "{path}", "export": "a b"}}',
            parse_pairs(
                "driver=raw,file.driver=nbd,file.server.type=unix,"
                f"file.server.path={path},file.export=a b"
            ),
            parse_pairs(f"file.filename=nbd+unix:///a%20b?socket={path}"),
        ):
            with opened(source, read_only=True) as remote:
                assert pread(remote, 3, 0) == b"far"
        with opened(f"nbd+unix:///a%20b?socket={path}", "raw") as remote:
            assert isinstance(remote, RemoteNode)
            remote.pwrite(memoryview(b"QFI\xfb"), 0)
        refuse(NotFound, "names that it has", f"nbd+unix:///none?socket={path}")
    refuse(ImageError, "that an NBD server listens there", f"nbd+unix:///x?socket={path}")
    node.close()


def test_a_remote_disk_that_was_guessed_raw_stays_raw(tmp_path: Path) -> None:
    """CVE-2008-2004."""
    with server(tmp_path, MemoryNode(SIZE), "") as path, opened(f"nbd:unix:{path}") as node:
        node.pwrite(memoryview(b"QFI"), 0)
        with pytest.raises(OSError, match="qcow2"):
            node.pwrite(memoryview(b"\xfb"), 3)
        node.pwrite(memoryview(b"ok"), 4)


def test_a_chain_over_the_network_follows_no_relative_name(tmp_path: Path, qcow2: Path) -> None:
    with opened(qcow2, "raw") as image, server(tmp_path, image, "") as path:
        source = f"nbd:unix:{path}"
        refuse(ImageError, "image is no file", source, "qcow2", read_only=True)
        file = {"driver": "nbd", "path": str(path)}
        override = {"driver": "qcow2", "file": file, "backing": None}
        with opened(override, read_only=True) as node:
            assert pread(node, 1, 0) == b"\0"


def test_a_backing_file_that_the_user_names_is_trusted(tmp_path: Path, qcow2: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "other.raw").write_bytes(b"\2" * SIZE)
    text = f"driver=qcow2,file.filename={qcow2},backing.file.filename={elsewhere}/other.raw"
    with opened(parse_pairs(text + ",backing.driver=raw")) as node:
        assert pread(node, 1, 0) == b"\2"
    with opened(parse_pairs(f"driver=qcow2,file.filename={qcow2},backing=")) as node:
        assert pread(node, 1, 0) == b"\0"
    with opened(parse_pairs(f"driver=qcow2,file.filename={qcow2},backing.driver=null-co")) as node:
        assert pread(node, 1, 0) == b"\0"
    with opened(parse_pairs(f"driver=qcow2,file.filename={qcow2},backing.detect-zeroes=on")) as n:
        assert pread(n, 1, 0) == b"\1"
    refuse(
        UsageError,
        "did you mean",
        parse_pairs(f"driver=qcow2,file.filename={qcow2},backing.offst=1"),
    )


@pytest.mark.parametrize("where", ["backing", "data"])
def test_what_an_image_names_is_opened_only_where_that_is_allowed(
    where: str, tmp_path: Path
) -> None:
    """formats.md §12: CVE-2015-5163 (backing files), CVE-2024-32498 (data files)."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    target = away / "secret.raw"
    target.write_bytes(b"s" * SIZE)
    names = {"backing": {"backing": "../away/secret.raw", "backing_format": "raw"}}
    image = make(home / "i.qcow2", SIZE, **names.get(where, {}))
    if where == "data":
        _add_data_file(image, b"../away/secret.raw")
    refuse(ImageError, "--allow-backing", image)
    refuse(ImageError, "not allowed", image, allow_backing=Policy.of(["none"]))
    for words in (["any"], [str(away)], ["/nonexistent/..", str(tmp_path)]):
        with opened(image, allow_backing=Policy.of(words)):
            pass
    (home / "link.raw").symlink_to(target)
    (home / "near.raw").write_bytes(b"n" * SIZE)


def _add_data_file(image: Path, name: bytes) -> None:
    from fleece.formats.qcow2 import constants as c
    from fleece.formats.qcow2 import header as headers

    data = bytearray(image.read_bytes())
    header = headers.parse(bytes(data[:65536]), len(data), "x")
    header = headers.with_extension(header, c.EXT_DATA_FILE, name)
    fields = {**header.__dict__, "incompatible": c.INCOMPATIBLE_DATA_FILE}
    data[:65536] = headers.build(headers.Header(**fields)).ljust(65536, b"\0")
    image.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["fifo", "directory", "missing", "json:{}", "nbd:x:1", "/dev/zero"]
)
def test_a_data_file_must_be_a_regular_file(name: str, tmp_path: Path) -> None:
    """CVE-2024-4467: a data file's name is never a protocol."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    image = make(tmp_path / "i.qcow2", SIZE)
    _add_data_file(image, name.encode())
    kind = NotFound if name == "missing" else ImageError
    text = "not exist|not a regular file|not a plain path"
    refuse(kind, text, image, allow_backing=Policy.of(["any"]))


def test_a_data_file_holds_the_data_and_can_be_another_one(tmp_path: Path) -> None:
    image = make(tmp_path / "i.qcow2", SIZE)
    _add_data_file(image, b"data.raw")
    (tmp_path / "data.raw").write_bytes(bytes(SIZE))
    with opened(image) as node:
        node.pwrite(memoryview(b"here"), 4096)
    assert (tmp_path / "data.raw").read_bytes()[4096:4100] == b"here"
    (tmp_path / "other.raw").write_bytes(b"o" * SIZE)
    other = f"data-file.driver=file,data-file.filename={tmp_path}/other.raw"
    text = f"driver=qcow2,file.filename={image},{other}"
    with opened(parse_pairs(text), read_only=True) as node:
        assert pread(node, 4, 4096) == b"oooo"


def test_a_data_file_that_is_the_image_is_a_loop(tmp_path: Path) -> None:
    image = make(tmp_path / "i.qcow2", SIZE)
    _add_data_file(image, b"i.qcow2")
    refuse(ImageCorrupt, "comes back", image, read_only=True)


def test_a_policy_is_made_of_words(tmp_path: Path) -> None:
    assert Policy.of([]) == Policy.of(["same-tree"]) == Policy()
    assert Policy.of([str(tmp_path)]).directories == (tmp_path.resolve(),)
    assert Policy.of(["none"]).nothing
    for words, text in ((["some"], "unknown"), (["none", "any"], "allows nothing")):
        with pytest.raises(UsageError, match=text):
            Policy.of(words)


def test_locks_are_taken_unless_it_is_shared(raw: Path) -> None:
    with opened(raw, "raw"):
        refuse(ImageInUse, "in use", raw, read_only=True)
        with opened(raw, read_only=True, force_share=True):
            pass
        with opened(parse_pairs(f"file.filename={raw},file.locking=off"), read_only=True):
            pass
        text = f"driver=raw,file.force-share=on,file.filename={raw}"
        with opened(parse_pairs(text), read_only=True):
            pass
        refuse(UsageError, "without locks", parse_pairs(text))
    refuse(UsageError, "without locks", raw, force_share=True)


def test_read_only_is_read_only_at_every_level(raw: Path, qcow2: Path) -> None:
    for text in ("read-only=on", "file.read-only=on"):
        source = f"driver=qcow2,file.filename={qcow2},{text}"
        with opened(parse_pairs(source), read_only=True) as node:
            assert node.read_only
        refuse(ImageError, "read-only", parse_pairs(source))


def test_auto_read_only_of_what_cannot_be_written(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fleece.formats import opening

    class Stubborn(FileNode):
        def __init__(self, path: Any, *, read_only: bool = False, **how: Any) -> None:
            if not read_only:
                raise ImageError("no")
            super().__init__(path, read_only=read_only, **how)

    monkeypatch.setattr(opening, "FileNode", Stubborn)
    text = f"driver=raw,auto-read-only=on,file.auto-read-only=on,file.filename={raw}"
    with opened(parse_pairs(text)) as node:
        assert node.read_only


def test_a_fifo_a_socket_and_a_directory_do_not_block(tmp_path: Path) -> None:
    """formats.md §12: opening a FIFO waits for ever for who writes into it."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name in ("fifo", "socket", "."):
            done = threading.Event()

            def attempt(path: Path = tmp_path / name, done: threading.Event = done) -> None:
                refuse(ImageError, "name a regular file", path)
                done.set()

            thread = threading.Thread(target=attempt, daemon=True)
            thread.start()
            assert done.wait(10)
            thread.join()


def test_what_is_no_qcow2_says_so(raw: Path, tmp_path: Path) -> None:
    refuse(NotAnImage, "not a qcow2 image", raw, "qcow2")
    short = tmp_path / "short"
    short.write_bytes(b"QFI\xfb" + bytes(10))
    refuse(NotAnImage, "not a qcow2 image", short)
    refuse(NotFound, "there is no image", tmp_path / "none")
    refuse(
        UsageError,
        "there is no secret",
        parse_pairs(f"driver=luks,key-secret=s,file.filename={raw}"),
    )
    refuse(UsageError, "give its passphrase", parse_pairs(f"driver=luks,file.filename={raw}"))


def test_snapshots_are_of_qcow2_images_only(raw: Path) -> None:
    refuse(UnsupportedFeature, "only qcow2", raw, snapshot="one", read_only=True)
