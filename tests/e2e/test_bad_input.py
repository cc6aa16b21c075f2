"""What cannot be served is one clear line and a status; nothing is left behind by it."""

import os
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import FLEECE, Daemon, daemon, environment, fleece
from tests.support.peers import qemu_nbd
from tests.support.tools import find, require

SIZE = 1 << 20


def image(directory: Path, name: str = "a.img", size: int = SIZE) -> Path:
    path = directory / name
    with path.open("wb") as file:
        file.truncate(size)
    return path


def serve(directory: Path, *words: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    """``fleece serve`` that must end by itself."""
    places = ["--socket", directory / "n.sock", "--control", directory / "c.sock"]
    return fleece("serve", *places, "--state", directory / "state", *words, **options)


def refused(done: "subprocess.CompletedProcess[str]", status: int, *said: str) -> None:
    """One line, but for what the log says of the lifecycle before it."""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if " level=info " not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("fleece: ")
    for words in said:
        assert words in lines[0]
    assert done.returncode == status
    assert done.stdout == ""


def nothing_is_left(directory: Path) -> None:
    assert not (directory / "n.sock").exists()
    assert not (directory / "c.sock").exists()


# Images


def make_directory(path: Path) -> None:
    path.mkdir()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_nothing(path: Path) -> None:
    """It is not there."""


@pytest.mark.parametrize("command", ["serve", "export"])
@pytest.mark.parametrize(
    ("make", "status", "said"),
    [
        (make_nothing, 4, "there is no image"),
        (make_directory, 20, "it is a directory"),
        (make_fifo, 20, "it is a FIFO"),
        (make_loop, 20, "too many levels of symbolic links"),
    ],
)
def test_what_is_no_image(
    tmp_path: Path, command: str, make: Callable[[Path], None], status: int, said: str
) -> None:
    path = tmp_path / "x"
    make(path)
    if command == "serve":
        refused(serve(tmp_path, "--disk", f"a={path}"), status, said, str(path))
        nothing_is_left(tmp_path)
    else:
        refused(fleece("export", path, "--", "true"), status, said, str(path))


@pytest.mark.parametrize("command", ["serve", "export"])
def test_an_image_of_another_format_than_was_said(tmp_path: Path, command: str) -> None:
    path = image(tmp_path)
    if command == "serve":
        done = serve(tmp_path, "--disk", f"a={path},format=qcow2")
    else:
        done = fleece("export", "-f", "qcow2", path, "--", "true")
    refused(done, 21, "this is not a qcow2 image")


def test_a_qcow2_image_called_raw_is_served_as_the_bytes_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    subprocess.run([require("qemu-img"), "create", "-q", "-f", "qcow2", path, "4M"], check=True)
    with daemon(tmp_path, {"a": f"{path},format=raw"}) as made, made.client("a") as client:
        assert client.size == path.stat().st_size
        assert client.pread(4, 0) == b"QFI\xfb"


def test_an_unknown_format(tmp_path: Path) -> None:
    path = image(tmp_path)
    refused(serve(tmp_path, "--disk", f"a={path},format=vmdk"), 2, "'vmdk' is not a format")
    refused(fleece("export", "-f", "vmdk", path), 2, "vmdk")


def test_a_qcow2_image_that_is_garbage_or_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(b"QFI\xfb" + b"\xff" * 1000)
    done = serve(tmp_path, "--disk", f"a={path}")
    assert 20 <= done.returncode <= 24
    refused(done, done.returncode, str(path))
    path.write_bytes(b"QFI\xfb")
    done = serve(tmp_path, "--disk", f"a={path}")
    assert 20 <= done.returncode <= 24
    refused(done, done.returncode, str(path))


def test_an_image_without_a_byte_can_be_served(tmp_path: Path) -> None:
    with daemon(tmp_path, {"a": image(tmp_path, size=0)}) as made:
        made.json("snapshot", "create", "a", "--name", "s")
        for export in ("a", "a@s"):
            with made.client(export) as client:
                assert client.size == 0
        made.json("snapshot", "drop", "s")


def test_an_image_that_qemu_uses(tmp_path: Path) -> None:
    path = image(tmp_path)
    with qemu_nbd(path, tmp_path / "q.sock"):
        refused(serve(tmp_path, "--disk", f"a={path}"), 24, "is in use by another process")
        refused(fleece("export", path, "--", "true"), 24, "is in use by another process")
    nothing_is_left(tmp_path)
    with daemon(tmp_path, {"a": path}):
        done = subprocess.run(
            [require("qemu-io"), "-f", "raw", "-c", "write 0 1", path], capture_output=True
        )
        assert done.returncode == 1
        assert b"lock" in done.stderr


def test_an_image_that_another_fleece_uses(tmp_path: Path) -> None:
    path = image(tmp_path)
    second = tmp_path / "second"
    second.mkdir()
    with daemon(tmp_path, {"a": path}) as made:
        refused(serve(second, "--disk", f"a={path}"), 24, "is in use by another process")
        refused(fleece("export", path, "--", "true"), 24, "is in use by another process")
        with made.client("a") as client:
            client.pwrite(b"still here", 0)


def test_an_image_that_may_not_be_written(tmp_path: Path) -> None:
    path = image(tmp_path)
    path.chmod(0o400)
    # Root may do everything, until that right is taken away.
    powerless = [require("setpriv"), "--bounding-set=-dac_override,-dac_read_search"]
    prefix = powerless if os.geteuid() == 0 else []
    command = [*prefix, *FLEECE, "export", str(path), "--", "true"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment()}
    done = subprocess.run(command, **options)
    refused(done, 20, "permission denied", "open it read-only")
    path.chmod(0)
    command.insert(command.index("export") + 1, "-r")
    refused(subprocess.run(command, **options), 20, "permission denied")


def test_an_image_on_a_read_only_file_system(tmp_path: Path) -> None:
    unshare = require("unshare")
    path = image(tmp_path)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    prefix = [unshare, "-m", "sh", "-c", mount, str(tmp_path)]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    command = [*prefix, *FLEECE, "export", str(path), "--", "true"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment()}
    refused(subprocess.run(command, **options), 20, "read-only file system", "open it read-only")
    command.insert(command.index("export") + 1, "-r")
    assert subprocess.run(command, **options).returncode == 0


# Names and places


@pytest.mark.parametrize(
    ("disk", "said"),
    [
        ("a", "write it as NAME=IMAGE"),
        ("=x", "cannot be empty"),
        ("a/b=x", "cannot hold '/'"),
        ("a@b=x", "cannot hold '@'"),
        ("a\nb=x", "cannot hold '\\n'"),
        ("a\x1b[31m=x", "cannot hold '\\x1b'"),
        ("x" * 201 + "=x", "at most 200 bytes"),
        ("a=", "the image is missing"),
        ("a=x,colour=red", "no option 'colour=red'"),
        ("a=x,granularity=5k", "power of two"),
    ],
)
def test_a_disk_that_cannot_be_named_so(tmp_path: Path, disk: str, said: str) -> None:
    refused(serve(tmp_path, "--disk", disk), 2, said)


def test_one_image_under_two_names(tmp_path: Path) -> None:
    path = image(tmp_path)
    link = tmp_path / "link.img"
    link.symlink_to(path)
    done = serve(tmp_path, f"--disk=a={path}", f"--disk=b={link}")
    refused(done, 3, "'a' and 'b' are the same image")


def test_one_name_for_two_images(tmp_path: Path) -> None:
    one, two = image(tmp_path), image(tmp_path, "b.img")
    done = serve(tmp_path, f"--disk=a={one}", f"--disk=a={two}")
    refused(done, 2, "--disk names 'a' twice")


def test_no_disk_at_all(tmp_path: Path) -> None:
    refused(serve(tmp_path), 2, "no disk to serve")


def test_disks_with_odd_names_are_served_and_frozen(tmp_path: Path) -> None:
    names = ["vm 1", "üñï", "a:b", "%41", "-x", "'quoted\"", "a,b", "$(id)", "..", "日本" * 12]
    disks = {name: image(tmp_path, f"{number}.img") for number, name in enumerate(names)}
    with daemon(tmp_path, disks) as made:
        made.ask("snapshot-create", disks=names, name="s", consumer="ü c")
        for name in names:
            with made.client(name) as client:
                client.pwrite(b"new", 0)
            with made.client(f"{name}@s", ["qemu:dirty-bitmap:ü c"]) as client:
                assert client.pread(3, 0) == bytes(3)
                assert client.contexts == ("qemu:dirty-bitmap:ü c",)
        made.kill()
        made.start()
        for name in names:
            assert made.read(f"{name}@s") == bytes(SIZE)
        assert made.cli("status").returncode == 0
        made.ask("snapshot-drop", name="s")
        assert made.left() == set()


@pytest.mark.parametrize("option", ["--socket", "--control"])
@pytest.mark.parametrize("what", ["file", "directory", "live"])
def test_a_socket_path_that_exists(tmp_path: Path, option: str, what: str) -> None:
    path = tmp_path / "there"
    with ExitStack() as stack:
        if what == "file":
            path.write_bytes(b"precious")
        elif what == "directory":
            path.mkdir()
        else:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(path))
            sock.listen()
        done = serve(tmp_path, "--disk", f"a={image(tmp_path)}", option, path)
        refused(done, 8, str(path), f"choose another path with {option}")
    assert path.exists()
    if what == "file":
        assert path.read_bytes() == b"precious"


def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    with daemon(tmp_path, {"a": image(tmp_path)}) as made:
        made.kill()
        assert made.socket.exists()
        assert made.control.exists()
        made.start()
        assert len(made.read("a")) == SIZE


def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path) -> None:
    disk = f"a={image(tmp_path)}"
    long = tmp_path / ("x" * 120)
    refused(serve(tmp_path, "--disk", disk, "--control", long), 8, "107 bytes", "--control")
    refused(serve(tmp_path, "--disk", disk, "--socket", long), 8, str(long))


def test_a_socket_in_a_directory_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "no" / "n.sock"
    done = serve(tmp_path, "--disk", f"a={image(tmp_path)}", "--socket", path)
    refused(done, 8, str(path), "its directory does not exist")


def test_a_port_that_is_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        disk = f"a={image(tmp_path)}"
        refused(serve(tmp_path, "--disk", disk, "--listen", address), 8, address, "in use")
        done = fleece("export", "--listen", address, image(tmp_path))
        refused(done, 8, address, "in use", "choose another port")
    nothing_is_left(tmp_path)


@pytest.mark.parametrize("address", ["localhost:99999", "a:b:c", "host:port", "[::1"])
def test_an_address_that_is_none(tmp_path: Path, address: str) -> None:
    done = serve(tmp_path, "--disk", f"a={image(tmp_path)}", "--listen", address)
    refused(done, 2, "--listen", "is no address")


def test_a_state_directory_that_another_daemon_uses(tmp_path: Path) -> None:
    other = image(tmp_path, "b.img")
    with daemon(tmp_path, {"a": image(tmp_path)}) as made:
        places = ["--socket", tmp_path / "n2", "--control", tmp_path / "c2"]
        done = fleece("serve", *places, "--state", made.state, "--disk", f"b={other}")
        refused(done, 5, "another fleece daemon uses the state directory", "--state")


def test_a_state_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    disk = f"a={image(tmp_path)}"
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(serve(tmp_path, "--disk", disk, "--state", path), 3, str(path), "--state")


def test_a_configuration_that_is_not_there_or_wrong(tmp_path: Path) -> None:
    refused(serve(tmp_path, "-c", tmp_path / "no.yaml"), 3, "no.yaml")
    path = tmp_path / "f.yaml"
    path.write_text(f"disks:\n  a:\n    image: {image(tmp_path)}\n    sise: 5\n")
    refused(serve(tmp_path, "-c", path), 3, f"{path}:4", "sise")


def test_an_overlay_directory_that_is_full_refuses_the_snapshot_and_not_the_guest(
    tmp_path: Path,
) -> None:
    """P8, with a real file system that fills: the guest goes on, the snapshot says so."""
    if os.geteuid() or find("mount") is None:
        pytest.skip("file systems cannot be mounted here")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=768k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        config = tmp_path / "f.yaml"
        config.write_text(f"snapshots:\n  overlay-directory: {small}\n")
        disks = {"a": image(tmp_path, size=8 << 20)}
        with daemon(tmp_path, disks, "-c", str(config)) as made:
            _fill(made, small)
            assert made.end() == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def _fill(made: Daemon, small: Path) -> None:
    with made.client("a") as client:
        client.pwrite(b"o" * (8 << 20), 0)
        made.ask("snapshot-create", disks=["a"], name="s", consumer="c")
        client.pwrite(b"n" * (8 << 20), 0)
        assert client.pread(1, 4 << 20) == b"n"
    [listed] = made.ask("snapshot-list")
    assert listed["state"] == "broken"
    assert listed["disks"][0]["error"] == "No space left on device"
    with made.client("a@s") as client, pytest.raises(OSError, match="broken"):
        client.pread(1, 0)
    assert made.cli("snapshot", "ack", "s").returncode == 31
    made.kill()
    made.start()
    [listed] = made.ask("snapshot-list")
    assert listed["state"] == "broken"
    made.ask("snapshot-drop", name="s")
    assert list(small.iterdir()) == []
