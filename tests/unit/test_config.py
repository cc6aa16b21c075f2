# SPDX-License-Identifier: Apache-2.0
import textwrap
from pathlib import Path

import pytest

from fleece.config import (
    Config,
    DiskConfig,
    check_disk_name,
    load,
    override,
    parse_disk,
    parse_listen,
)
from fleece.errors import ConfigError, UsageError
from fleece.yamlfile import MAX_FILE

EXAMPLE = Path(__file__).parents[2] / "config" / "fleece.yaml"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(b"")
    return path


def refusal(tmp_path: Path, text: str) -> str:
    """What the error says after the path of the file."""
    path = tmp_path / "fleece.yaml"
    path.write_text(textwrap.dedent(text))
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}:")
    return message.removeprefix(f"{path}:")


def test_the_example_in_the_repository_loads_and_names_every_key() -> None:
    config = load(str(EXAMPLE), check_paths=False)
    assert [disk.name for disk in config.disks] == ["vm1", "isos"]
    assert config.disks[0] == DiskConfig(
        "vm1", "/var/lib/fleece/images/vm1.img", "raw", False, "the database server", True, 65536
    )
    assert config.disks[1].read_only
    assert not config.disks[1].tracking
    assert [str(uri) for uri in config.listeners] == [
        "nbd+unix:///?socket=/run/fleece/nbd.sock",
        "nbd://localhost/",
        "nbd://[::1]/",
    ]
    assert config.overlay_directory == "/var/lib/fleece/overlays"
    assert (config.cluster_size, config.on_cbw_error, config.lease) == (
        65536,
        "break-snapshot",
        43200,
    )
    assert (config.log_level, config.log_json) == ("info", False)
    assert (config.control, config.state) == ("/run/fleece/control.sock", "/var/lib/fleece")


def test_the_example_refuses_images_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r":9: disks\.vm1\.image: .* does not exist$"):
        load(str(EXAMPLE))


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# nothing\n")
    assert load(str(path)) == Config()


def test_relative_paths_begin_at_the_file(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "c.yaml").write_text(
        "disks: {a: {image: a.img}}\nnbd: {socket: n.sock}\ncontrol: ~/c.sock\n"
        "snapshots: {overlay-directory: o}\nstate: s\n"
    )
    monkeypatch.setenv("HOME", "/home/u")
    config = load(str(tmp_path / "c.yaml"))
    assert config.disks[0].image == str(image)
    assert config.socket == str(tmp_path / "n.sock")
    assert config.overlay_directory == str(tmp_path / "o")
    assert config.state == str(tmp_path / "s")
    assert config.control == "/home/u/c.sock"


def test_numbers_are_taken_for_sizes_and_durations(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("snapshots: {cluster-size: 4096, lease: 90.5}\n")
    config = load(str(tmp_path / "c.yaml"))
    assert (config.cluster_size, config.lease) == (4096, 90.5)


def test_a_number_may_be_the_name_of_a_disk(tmp_path: Path, image: Path) -> None:
    (tmp_path / "c.yaml").write_text("disks: {101: {image: a.img}, yes: {image: a.img}}\n")
    assert [disk.name for disk in load(str(tmp_path / "c.yaml")).disks] == ["101", "yes"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "1: expected a mapping, found a list"),
        ("\n\nhello\n", "3: expected a mapping, found text"),
        ("disk: {}\n", "1: disk: unknown key; did you mean 'disks'?"),
        ("state: /s\nxyzzy: 1\n", "2: xyzzy: unknown key; known are disks, nbd, control, "),
        ("disks:\n", "1: disks: expected a mapping, found nothing"),
        ("disks: [a]\n", "1: disks: expected a mapping, found a list"),
        ("disks:\n  vm1:\n", "2: disks.vm1: expected a mapping, found nothing"),
        ("disks:\n  vm1: {}\n", "2: disks.vm1: the key 'image' is missing"),
        (
            "disks:\n  vm1:\n    image:\n      - a\n",
            "4: disks.vm1.image: expected text, found a list",
        ),
        (
            "disks:\n  vm1:\n    image: 12\n",
            "3: disks.vm1.image: expected text, found a number; put it in quotes",
        ),
        ("disks:\n  vm1:\n    image: ''\n", "3: disks.vm1.image: expected a path"),
        (
            "disks:\n  vm1:\n    format: raw\n    image: /no/such.img\n",
            "4: disks.vm1.image: /no/such.img does not exist",
        ),
        (
            "disks:\n  vm1:\n    image: a.img\n    format: vhd\n",
            "4: disks.vm1.format: 'vhd' is not a format; use raw or qcow2",
        ),
        (
            "disks:\n  vm1:\n    image: a.img\n    readonly: true\n",
            "4: disks.vm1.readonly: unknown key; did you mean 'read-only'?",
        ),
        (
            "disks:\n  vm1:\n    image: a.img\n    read-only: 'yes'\n",
            "4: disks.vm1.read-only: expected true or false, found text",
        ),
        (
            "disks:\n  vm1:\n    image: a.img\n    granularity: 3k\n",
            "4: disks.vm1.granularity: 3k is not a power of two between 4k and 16M",
        ),
        (
            "disks:\n  vm1:\n    image: a.img\n    description: 2026-01-01\n",
            "4: disks.vm1.description: expected text, found a date; put it in quotes",
        ),
        (
            "disks:\n  a: {image: a.img}\n  b: {image: a.img}\n  a: {image: a.img}\n",
            "4: disks: 'a' was already given in line 2",
        ),
        ("disks:\n  a/b: {image: a.img}\n", "2: disks.a/b: a disk's name cannot hold '/'"),
        ("disks:\n  '': {image: a.img}\n", "2: disks.: a disk's name cannot be empty"),
        ("disks:\n  ? [a]\n  : b\n", "2: disks: a key must be plain text"),
        ("nbd:\n  listen: 10809\n", "2: nbd.listen: expected text, found a number; put it in"),
        ("nbd:\n  listen: host:99999\n", "2: nbd.listen: 'host:99999' is no address: a port"),
        (
            "nbd:\n  listen:\n    - localhost:1\n    - ::1\n",
            "4: nbd.listen[1]: '::1' is no address; write it like localhost:10809 or [::1]:10809",
        ),
        ("nbd:\n  sockte: x\n", "2: nbd.sockte: unknown key; did you mean 'socket'?"),
        (
            "snapshots:\n  overlay-directory: /no/such\n",
            "2: snapshots.overlay-directory: /no/such is not a directory",
        ),
        (
            "snapshots:\n  cluster-size: 4M\n",
            "2: snapshots.cluster-size: 4M is not a power of two between 4k and 2M",
        ),
        ("snapshots:\n  cluster-size: [1]\n", "2: snapshots.cluster-size: expected text, found a"),
        (
            "snapshots:\n  on-cbw-error: report\n",
            "2: snapshots.on-cbw-error: 'report' is none of break-snapshot, break-guest-write",
        ),
        ("snapshots:\n  lease: 0\n", "2: snapshots.lease: 0 is not a lease: it must be longer"),
        ("snapshots:\n  lease: 1:30\n", "2: snapshots.lease: '1:30' is not a duration; write it"),
        ("log:\n  level: loud\n", "2: log.level: 'loud' is none of debug, info, "),
        ("log:\n  json: 1\n", "2: log.json: expected true or false, found a number"),
        ("log: !!python/object:os.system {}\n", "1: log: expected a mapping, found "),
        ("control: !thing x\n", "1: control: expected text, found a '!thing'; put it in quotes"),
        ("a: &a {x: 1}\nlog:\n  <<: *a\n", "1: a: unknown key"),
        ("log:\n  <<: {level: info}\n", "2: log: merging with << is not supported"),
        ("state: /s\nlog: {level: info\n", "3: not valid YAML: "),
        ("state: *nobody\n", "1: not valid YAML: found undefined alias"),
        ("state: /s\n\tlog: x\n", "2: not valid YAML: "),
        ("state: a\x01b\n", "1: not valid YAML: special characters are not allowed"),
        ("state: /s\n---\nstate: /t\n", "2: not valid YAML: expected a single document"),
        ("state: " + "[" * 5000 + "\n", " not a configuration: nested too deeply"),
        ("? " * 3000 + "a\n", " not a configuration: nested too deeply"),
    ],
)
def test_an_error_names_file_line_and_key(
    tmp_path: Path, image: Path, text: str, expected: str
) -> None:
    assert refusal(tmp_path, text).startswith(expected)


def test_aliases_are_not_expanded_without_end(tmp_path: Path, image: Path) -> None:
    bomb = "".join(f"  b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 30))
    assert refusal(tmp_path, f"disks:\n  b0: &b0 [x]\n{bomb}").startswith("2: disks.b0: expected")
    assert refusal(tmp_path, "disks: &d {a: *d}\n").startswith("1: disks.a.a: unknown key")


def test_an_alias_may_stand_for_a_value(tmp_path: Path, image: Path) -> None:
    (tmp_path / "c.yaml").write_text("disks: {a: &a {image: a.img}, b: *a}\n")
    assert [disk.image for disk in load(str(tmp_path / "c.yaml")).disks] == [str(image)] * 2


def test_a_file_that_is_not_text_is_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"state: /s\n# \xff\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:2: not valid UTF-8$"):
        load(str(path))


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with path.open("wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(ConfigError, match="is larger than 256 KiB"):
        load(str(path))


@pytest.mark.parametrize("name", ["none.yaml", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read "):
        load(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    "name", ["", "a/b", "a@b", "a\nb", "a\x7f", "a\u202eb", "x" * 201, "é" * 101, "\udcff"]
)
def test_a_name_that_no_file_or_export_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a disk's name"):
        check_disk_name(name)


@pytest.mark.parametrize("name", ["a", "x" * 200, "é" * 100, "vm 1.img", "-"])
def test_other_names_are_fine(name: str) -> None:
    assert check_disk_name(name) == name


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:1", "localhost", 1),
        ("localhost", "localhost", 10809),
        (":0", "localhost", 0),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1]", "fe80::1", 10809),
        (" 0.0.0.0:80 ", "0.0.0.0", 80),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    uri = parse_listen(text)
    assert (uri.host, uri.port) == (host, port)


@pytest.mark.parametrize("text", ["::1", "::1:80", "a:b", "a:", "a:-1", "a:65536", "[a]:1", "a:²"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="is no address"):
        parse_listen(text)


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("a=b.img", DiskConfig("a", "b.img")),
        ("a=b=c.img", DiskConfig("a", "b=c.img")),
        ("a=b,,c.img,format=raw", DiskConfig("a", "b,c.img", "raw")),
        ("a=b,read-only", DiskConfig("a", "b", read_only=True)),
        ("a=b,read-only=off,tracking=off", DiskConfig("a", "b", tracking=False)),
        (
            "a=b,description=x,, y,granularity=4k",
            DiskConfig("a", "b", description="x, y", granularity=4096),
        ),
    ],
)
def test_disks_on_the_command_line(text: str, disk: DiskConfig) -> None:
    assert parse_disk(text) == disk


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a", "write it as NAME=IMAGE"),
        ("=b", "cannot be empty"),
        ("a=", "the image is missing"),
        ("a=,read-only", "the image is missing"),
        ("a@b=c", "cannot hold '@'"),
        ("a=b,c.img", "there is no option 'c.img'; a comma in a path is written twice"),
        ("a=b,format=vhd", "'vhd' is not a format"),
        ("a=b,read-only=maybe", "there is no option"),
        ("a=b,granularity=5", "is not a power of two"),
    ],
)
def test_a_disk_on_the_command_line_that_is_wrong(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_disk(text)
    assert str(caught.value).startswith(f"--disk {text}: ")
    assert why in str(caught.value)


def test_the_command_line_replaces_what_the_file_says() -> None:
    a, b, c = DiskConfig("a", "1"), DiskConfig("b", "2"), DiskConfig("a", "3")
    config = Config(disks=(a, b), socket="/s", listen=("h:1",), state="/state", log_json=True)
    assert override(config) == config
    changed = override(config, disks=[c], listen=["h:2"], control="/c", log_level="debug")
    assert changed.disks == (c, b)
    assert (changed.socket, changed.listen) == (None, ("h:2",))
    assert (changed.control, changed.state) == ("/c", "/state")
    assert (changed.log_level, changed.log_json) == ("debug", True)


def test_without_an_address_it_is_the_default_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleece.control.paths.nbd_socket", lambda: "/r/nbd.sock")
    assert [str(uri) for uri in Config().listeners] == ["nbd+unix:///?socket=/r/nbd.sock"]
    assert [str(uri) for uri in Config(listen=(":1",)).listeners] == ["nbd://localhost:1/"]
