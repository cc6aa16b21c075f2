"""The daemon as its users meet it: the commands of the issue, how it ends, what it survives."""

import ctypes
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdwire.client import Client
from nbdwire.errors import NBDError
from nbdwire.uri import NBDURI
from tests.support import nbdraw
from tests.support.daemon import FLEECE, Daemon, daemon, environment, fleece
from tests.support.managed import patched
from tests.support.threads import wait_until
from tests.support.tools import require

SIZE = 8 << 20


def image(path: Path, size: int = SIZE) -> Path:
    with path.open("wb") as file:
        file.write(b"content " * (min(size, 1 << 20) // 8))
        file.truncate(size)
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One that the tests which change nothing for good have in common."""
    directory = tmp_path_factory.mktemp("shared")
    image(directory / "a.img")
    image(directory / "b.img")
    disks = {"a": directory / "a.img", "b": directory / "b.img"}
    with daemon(directory, disks, "--listen", "127.0.0.1:0") as made:
        yield made
        assert made.end() == 0
        assert "Traceback" not in made.log.read_text()


def one_line(text: str) -> str:
    """The only line, which is one of ours."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("fleece: ")
    assert "Traceback" not in text
    return lines[0]


# What the commands say


def test_the_life_of_a_snapshot_by_the_commands(shared: Daemon) -> None:
    made = shared.json("snapshot", "create", "a", "b", "--name", "s", "--consumer", "nightly")
    assert made["name"] == "s"
    assert [disk["export"] for disk in made["disks"]] == ["a@s", "b@s"]
    assert shared.json("snapshot", "list") == [made]
    assert shared.json("snapshot", "extend", "s", "--lease", "1h")["lease-expires"] is not None
    acked = shared.json("snapshot", "ack", "s")
    assert [disk["disk"] for disk in acked["disks"]] == ["a", "b"]
    cursors = shared.json("cursor", "list")
    assert [(c["disk"], c["consumer"]) for c in cursors] == [("a", "nightly"), ("b", "nightly")]
    status = shared.json("status")
    assert [disk["name"] for disk in status["disks"]] == ["a", "b"]
    assert status["pid"] == shared.running.pid
    assert [snapshot["name"] for snapshot in status["snapshots"]] == ["s"]
    [dropped] = shared.json("snapshot", "drop", "s")
    assert dropped["name"] == "s"
    assert shared.left() == set()
    assert len(shared.json("cursor", "remove", "nightly")) == 2


def test_people_get_tables_and_the_next_commands_instead(shared: Daemon) -> None:
    made = shared.cli("snapshot", "create", "a", "--name", "s", "--lease", "1h")
    assert made.returncode == 0
    assert made.stderr == ""
    assert shared.uri("a@s") in made.stdout
    assert "fleece snapshot drop" in made.stdout
    assert shared.cli("snapshot", "list").stdout.splitlines()[1].split()[0] == "s"
    assert "s" in shared.cli("status").stdout
    assert shared.cli("snapshot", "drop", "s").stdout.startswith("dropped snapshot s")
    assert shared.cli("snapshot", "list").stdout == "no snapshots\n"


@pytest.mark.parametrize(
    ("words", "status", "code", "said"),
    [
        (["snapshot", "create", "c"], 4, "not-found", "there is no disk named 'c' (disks: a, b)"),
        (["snapshot", "create", "a", "a"], 2, "usage", "a disk is named twice"),
        (["snapshot", "create", "a", "--name", "x/y"], 62, "invalid-argument", "'x/y' cannot name"),
        (["snapshot", "create", "a", "--consumer", "x/y"], 62, "invalid-argument", "consumer"),
        (["snapshot", "create", "a", "--cluster-size", "3k"], 62, "invalid-argument", "power of"),
        (["snapshot", "create", "a", "--lease", "0"], 62, "invalid-argument", "above 0"),
        (["snapshot", "create", "a", "--lease", "soon"], 2, "usage", "is not a duration"),
        (["snapshot", "create"], 2, "usage", "DISK"),
        (["snapshot", "drop", "x"], 4, "not-found", "no snapshot named 'x' (snapshots: none)"),
        (["snapshot", "ack", "x"], 4, "not-found", "no snapshot named 'x'"),
        (["snapshot", "extend", "x", "--lease", "1h"], 4, "not-found", "no snapshot named 'x'"),
        (["cursor", "remove", "nobody"], 4, "not-found", "'nobody' has no cursor on any disk"),
        (["cursor", "remove", "n", "--disk", "z"], 4, "not-found", "no disk named 'z'"),
        (["snapshot", "freeze"], 2, "usage", "freeze"),
    ],
)
def test_what_cannot_be_is_one_line_a_status_and_json_on_standard_output(
    shared: Daemon, words: list[str], status: int, code: str, said: str
) -> None:
    done = shared.cli(*words, "--json")
    assert done.returncode == status
    assert said in one_line(done.stderr)
    document = json.loads(done.stdout)
    assert document["error"] == code
    assert said in document["message"]
    assert shared.ask("snapshot-list") == []


def test_a_name_that_is_taken_has_a_status_of_its_own(shared: Daemon) -> None:
    shared.ask("snapshot-create", disks=["a"], name="s")
    done = shared.cli("snapshot", "create", "a", "--name", "s")
    assert (done.returncode, done.stdout) == (6, "")
    assert "there is a snapshot named 's' already" in one_line(done.stderr)
    shared.ask("snapshot-drop", name="s")


def test_without_a_daemon_the_commands_say_so(tmp_path: Path) -> None:
    for words in (["status"], ["snapshot", "list"], ["snapshot", "create", "a"]):
        done = fleece(*words, "--control", tmp_path / "c.sock")
        assert done.returncode == 7
        assert "fleece serve" in one_line(done.stderr)


# Garbage, and the daemon goes on


GARBAGE = [b"", b"\0" * 64, b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 100_000, b"NBDMAGIC" * 1000]


@pytest.mark.parametrize("data", GARBAGE, ids=["nothing", "zeroes", "http", "ones", "magic"])
@pytest.mark.parametrize("where", ["nbd", "tcp", "control"])
def test_garbage_on_a_socket_ends_that_connection_and_nothing_else(
    shared: Daemon, data: bytes, where: str
) -> None:
    log = len(shared.log.read_text())
    with shared.client("a") as bystander:
        with door(shared, where) as sock:
            sock.settimeout(20)
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass
            except (ConnectionResetError, BrokenPipeError):
                pass  # it has hung up on us: just as good
        assert bystander.pread(8, 0) == b"content "
    assert shared.ask("status")["pid"] == shared.running.pid
    assert "Traceback" not in shared.log.read_text()[log:]
    assert "fault of this program" not in shared.log.read_text()[log:]


def door(shared: Daemon, where: str) -> socket.socket:
    if where == "tcp":
        [uri] = [u for u in shared.ask("status")["listeners"] if "127.0.0.1" in u]
        port = int(uri.rsplit(":", 1)[1].strip("/"))
        return socket.create_connection(("127.0.0.1", port))
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(shared.socket if where == "nbd" else shared.control))
    return sock


def test_an_unknown_export_is_refused_by_name(shared: Daemon) -> None:
    with pytest.raises(NBDError, match="nope"):
        shared.client("nope")
    with pytest.raises(NBDError, match="a@gone"):
        shared.client("a@gone")
    with shared.client("a") as client:
        assert client.size == SIZE


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["header", "half", "unread-reply"])
def test_a_client_that_goes_away_in_the_middle_of_a_write_harms_nobody(
    shared: Daemon, share: float
) -> None:
    """P3: nothing waits for it, and the snapshot is exact."""
    before = shared.read("b")
    shared.ask("snapshot-create", disks=["b"], name="s")
    blob = bytes(4 << 20)
    with nbdraw.connected(NBDURI(socket=str(shared.socket)), "b") as client:
        for offset in (1000, 70_001):
            client.send(nbdraw.request(nbdraw.WRITE, offset, len(blob), payload=blob))
        last = nbdraw.request(nbdraw.WRITE, 5000, len(blob))
        client.send(last + blob[: int(len(blob) * share)])
    with shared.client("b") as other:
        other.pwrite(b"second" * 1000, 5)
        assert other.pread(6, 5) == b"second"
        assert shared.read("b@s") == before
        wait_until(lambda: shared.ask("status")["disks"][1]["clients"] == 1)
        other.pwrite(before, 0)
    assert shared.read("b@s") == before
    shared.ask("snapshot-drop", name="s")


def _write_until_cut(client: Client, blob: bytes) -> None:
    try:
        for _ in range(100):
            client.pwrite(blob, 1000)
    except NBDError:
        pass


# The end, and the next beginning


def test_sigterm_ends_it_soon_with_clients_that_are_idle_busy_or_half_way(tmp_path: Path) -> None:
    with daemon(tmp_path, {"a": image(tmp_path / "a.img")}) as made:
        made.ask("snapshot-create", disks=["a"], name="s")
        idle, reader, busy = made.client("a"), made.client("a@s"), made.client("a")
        writer = threading.Thread(target=_write_until_cut, args=(busy, bytes(4 << 20)))
        writer.start()
        with door(made, "nbd"), door(made, "control"):  # and two that say nothing
            began = time.monotonic()
            assert made.end(signal.SIGTERM) == 0
            assert time.monotonic() - began < 5
        writer.join(20)
        for client in (idle, reader, busy):
            client.close()
        assert not made.socket.exists()
        assert not made.control.exists()
        assert "Traceback" not in made.log.read_text()


def test_sigterm_ends_it_whichever_of_its_threads_the_kernel_gives_it_to(tmp_path: Path) -> None:
    """Python runs handlers in the main thread, and that one sleeps in a system call."""
    with daemon(tmp_path, {"a": image(tmp_path / "a.img")}) as made:
        pid = made.running.pid
        tasks = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
        another = next(task for task in tasks if task != pid)
        assert ctypes.CDLL(None).tgkill(pid, another, signal.SIGTERM) == 0
        assert made.running.wait(10) == 0


@pytest.mark.parametrize("how", ["SIGINT", "quit"])
def test_it_ends_in_other_ways_too(tmp_path: Path, how: str) -> None:
    with daemon(tmp_path, {"a": image(tmp_path / "a.img")}) as made:
        if how == "SIGINT":
            assert made.end(signal.SIGINT) == 0
        else:
            with door(made, "control") as sock, sock.makefile("rw") as file:
                file.readline()
                for command in ("qmp_capabilities", "quit"):
                    file.write(json.dumps({"execute": command}) + "\n")
                    file.flush()
                    assert json.loads(file.readline()) == {"return": {}}
            assert made.running.wait(10) == 0
        assert not made.socket.exists()


def test_after_a_clean_end_snapshots_and_cursors_go_on(tmp_path: Path) -> None:
    with daemon(tmp_path, {"a": image(tmp_path / "a.img")}) as made:
        made.json("snapshot", "create", "a", "--name", "one", "--consumer", "c")
        one = made.read("a@one")
        with made.client("a") as client:
            client.pwrite(b"between" * 10_000, 12_345)
        made.json("snapshot", "ack", "one")
        assert made.end() == 0
        made.start()
        with made.client("a") as client:
            client.pwrite(b"after", 4 << 20)
        assert made.read("a@one") == one
        two = made.json("snapshot", "create", "a", "--name", "two", "--consumer", "c")["disks"][0]
        assert two["mode"] == "incremental"
        assert two["dirty-bytes"] < SIZE // 4
        with made.client("a@two", [two["context"]]) as client:
            dirty = [e for e in client.extents(0, SIZE, two["context"]) if e.is_dirty]
        assert patched(dirty, one, made.read("a@two")) == made.read("a")
        made.json("snapshot", "drop", "one", "two")
        assert made.left() == set()


def test_a_lease_runs_out_by_itself(tmp_path: Path) -> None:
    with daemon(tmp_path, {"a": image(tmp_path / "a.img")}) as made:
        made.json("snapshot", "create", "a", "--lease", "200ms")
        wait_until(lambda: made.left() == set())
        assert made.json("snapshot", "list") == []
        assert "its lease has run out" in made.log.read_text()


# fleece export


def run_export(*words: object, **options: object) -> "subprocess.CompletedProcess[str]":
    return fleece("export", *words, **options)


@pytest.mark.parametrize("status", [0, 1, 77])
def test_the_status_of_the_command_is_that_of_export(tmp_path: Path, status: int) -> None:
    done = run_export(image(tmp_path / "a.img"), "--", "sh", "-c", f"echo out; exit {status}")
    assert (done.returncode, done.stdout, done.stderr) == (status, "out\n", "")


def test_the_command_finds_the_export_in_its_environment(tmp_path: Path) -> None:
    nbdinfo = require("nbdinfo")
    path = image(tmp_path / "a.img")
    script = f'{nbdinfo} --size "$uri" && test -S "$unixsocket" && echo "$exportname"'
    done = run_export("--name", "x y", path, "--", "sh", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{SIZE}\nx y\n", "")


def test_options_after_the_dashes_are_the_commands(tmp_path: Path) -> None:
    done = run_export("-r", image(tmp_path / "a.img"), "--", "echo", "--json", "-f", "--")
    assert (done.returncode, done.stdout) == (0, "--json -f --\n")


def test_a_command_that_is_killed_has_the_status_that_shells_give_it(tmp_path: Path) -> None:
    path = image(tmp_path / "a.img")
    assert run_export(path, "--", "sh", "-c", "kill -TERM $$").returncode == 128 + 15
    assert run_export(path, "--", "sh", "-c", "kill -KILL $$").returncode == 128 + 9


def test_a_command_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run_export(image(tmp_path / "a.img"), "--", "no-such-program", "x")
    assert done.returncode == 70
    assert one_line(done.stderr).startswith("fleece: cannot run 'no-such-program': No such file")


def test_dashes_without_a_command_are_a_wrong_command_line(tmp_path: Path) -> None:
    done = run_export(image(tmp_path / "a.img"), "--")
    assert done.returncode == 2
    assert "no command after --" in one_line(done.stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_export_ends_cleanly_when_it_is_told_to(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "e.sock"
    command = [*FLEECE, "export", "--json", "--socket", str(path), str(image(tmp_path / "a.img"))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        assert json.loads("".join(lines))["pid"] == process.pid
        process.send_signal(number)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert not path.exists()


def test_sigterm_to_export_reaches_its_command(tmp_path: Path) -> None:
    script = "trap 'echo told; exit 9' TERM; echo up; while :; do sleep 0.05; done"
    command = [*FLEECE, "export", str(image(tmp_path / "a.img")), "--", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.terminate()
        assert process.stdout.readline() == "told\n"
        assert process.wait(10) == 9


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_what_is_written_to_an_export_is_in_the_image(tmp_path: Path, fmt: str) -> None:
    qemu_io, qemu_img = require("qemu-io"), require("qemu-img")
    path = tmp_path / "a.img"
    subprocess.run([qemu_img, "create", "-q", "-f", fmt, path, "8M"], check=True)
    write = f'{qemu_io} -f raw -c "write -P 7 12345 70000" "$uri"'
    done = run_export("-f", fmt, path, "--", "sh", "-c", write)
    assert done.returncode == 0, done.stderr + done.stdout
    read = "read -P 7 12345 70000"
    checked = subprocess.run([qemu_io, "-f", fmt, "-c", read, path], capture_output=True, text=True)
    assert "Pattern verification failed" not in checked.stdout
    assert checked.returncode == 0
