import io
import json
import logging
from collections.abc import Iterator

import pytest

from fleece import log as fleece_log


@pytest.fixture(autouse=True)
def _root_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


log = logging.getLogger("fleece.test")


def test_a_line_is_key_value_text(stream: io.StringIO) -> None:
    fleece_log.setup(stream=stream)
    log.info("disk added", extra={"disk": "vm1", "size": 4096})
    line = stream.getvalue()
    assert line.startswith("time=20")
    assert line.endswith('Z level=info logger=fleece.test msg="disk added" disk=vm1 size=4096\n')


def test_json_carries_the_same_keys(stream: io.StringIO) -> None:
    fleece_log.setup(json=True, stream=stream)
    log.warning("%d left", 3, extra={"disk": "vm 1", "path": object})
    found = json.loads(stream.getvalue())
    assert list(found) == ["time", "level", "logger", "msg", "disk", "path"]
    assert (found["level"], found["msg"], found["disk"]) == ("warning", "3 left", "vm 1")


@pytest.mark.parametrize("as_json", [False, True])
def test_whatever_a_client_calls_itself_it_stays_one_line(
    stream: io.StringIO, as_json: bool
) -> None:
    fleece_log.setup(json=as_json, stream=stream)
    log.info("x", extra={"export": 'a\nlevel=error msg="forged" \x1b[31m'})
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()
    assert "\nlevel" not in stream.getvalue()


@pytest.mark.parametrize("value", ["", "a b", "a=b", 'a"b', "a\\b", "a\tb", "\u2028"])
def test_a_value_that_could_be_mistaken_is_quoted(stream: io.StringIO, value: str) -> None:
    fleece_log.setup(stream=stream)
    log.info("x", extra={"key": value})
    shown = stream.getvalue().partition(" key=")[2].rstrip("\n")
    assert shown[0] == shown[-1] == '"'
    assert json.loads(shown) == value


def test_the_level_holds_and_the_last_setup_wins(stream: io.StringIO) -> None:
    first = io.StringIO()
    fleece_log.setup("debug", stream=first)
    fleece_log.setup("WARNING", stream=stream)
    log.info("not shown")
    log.error("shown")
    assert first.getvalue() == ""
    assert stream.getvalue().count("\n") == 1


def test_an_unknown_level_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'loud' is not a log level; use one of debug, info"):
        fleece_log.setup("loud")


@pytest.mark.parametrize(("level", "traceback"), [("info", False), ("debug", True)])
def test_an_error_is_named_and_its_traceback_only_for_developers(
    stream: io.StringIO, level: str, traceback: bool
) -> None:
    fleece_log.setup(level, stream=stream)
    try:
        raise OSError(5, "Input/output error")
    except OSError:
        log.exception("flush failed")
    line = stream.getvalue()
    assert 'error="OSError: [Errno 5] Input/output error"' in line
    assert ("traceback=" in line) is traceback
    assert line.count("\n") == 1


def test_a_standard_error_that_is_gone_does_not_matter(
    stream: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    fleece_log.setup(stream=stream)
    stream.close()
    log.error("nobody hears this")
    assert capsys.readouterr().err == ""
