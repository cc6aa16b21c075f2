# SPDX-License-Identifier: Apache-2.0
import json
import logging
from typing import Any

import pytest

from fleece.control.commands import REGISTRY
from fleece.control.session import Session
from fleece.errors import FleeceError
from tests.support.control import FakeService


def session(negotiated: bool = True) -> Session:
    made = Session(REGISTRY, FakeService())
    if negotiated:
        assert ask(made, b'{"execute": "qmp_capabilities"}') == [{"return": {}}]
    return made


def ask(asked: Session, data: bytes) -> list[dict[str, Any]]:
    lines = list(asked.receive(data))
    assert all(line.isascii() and line.endswith(b"\r\n") for line in lines)
    return [json.loads(line) for line in lines]


def failure(reply: dict[str, Any]) -> tuple[str, str]:
    return reply["error"]["class"], reply["error"]["desc"]


def test_the_greeting_tells_the_version_and_no_capability() -> None:
    greeting = json.loads(session(negotiated=False).greeting())
    assert greeting["QMP"]["capabilities"] == []
    assert set(greeting["QMP"]["version"]["qemu"]) == {"major", "minor", "micro"}
    assert greeting["QMP"]["version"]["package"].startswith("fleece ")


def test_commands_wait_for_the_negotiation() -> None:
    early = session(negotiated=False)
    (reply,) = ask(early, b'{"execute": "query-version", "id": 7}')
    text = "Expecting capabilities negotiation with 'qmp_capabilities'"
    assert failure(reply) == ("CommandNotFound", text)
    assert reply["id"] == 7
    assert not early.negotiated


def test_a_refused_negotiation_can_be_tried_again() -> None:
    early = session(negotiated=False)
    (reply,) = ask(early, b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
    assert failure(reply) == ("GenericError", "Capability 'oob' is not available")
    assert ask(early, b'{"execute": "qmp_capabilities"}') == [{"return": {}}]


def test_the_negotiation_comes_once() -> None:
    (reply,) = ask(session(), b'{"execute": "qmp_capabilities"}')
    text = "Capabilities negotiation is already complete, command ignored"
    assert failure(reply) == ("CommandNotFound", text)


@pytest.mark.parametrize("identity", ["1", '"x"', "null", '{"a": ["\\ud800"]}'])
def test_any_id_is_echoed(identity: str) -> None:
    data = f'{{"execute": "query-version", "id": {identity}}}'.encode()
    (reply,) = ask(session(), data)
    assert reply["id"] == json.loads(identity)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"[]", "QMP input must be a JSON object"),
        (b"17\n", "QMP input must be a JSON object"),
        (b"{}", "QMP input lacks member 'execute'"),
        (b'{"execute": 1}', "QMP input member 'execute' must be a string"),
        (b'{"execute": "quit", "x": 1}', "QMP input member 'x' is unexpected"),
        (b'{"exec-oob": "quit"}', "QMP input member 'exec-oob' is unexpected"),
        (
            b'{"execute": "quit", "arguments": []}',
            "QMP input member 'arguments' must be an object",
        ),
        (b'{"execute": "quit", "arguments": {"a": 1}}', "Parameter 'a' is unexpected"),
        (b"not json\n", "JSON parse error, Expecting value at column 1"),
        (b'{"a": 1, "a": 2}', "JSON parse error, duplicate key"),
        (b'{"a": NaN}', "JSON parse error, invalid keyword 'NaN'"),
        (b'{"a": "\xc3"}', "JSON parse error, invalid UTF-8 sequence in string"),
        (b'{"a": "\xff"}', "JSON parse error, stray byte 0xff"),
        (b'{"a": ]}', "JSON parse error, Expecting value at column 7"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON parse error, "),
        (b'{"a": ' + b"[" * 1000 + b"]" * 1000 + b"}", ""),
    ],
)
def test_bad_input_is_answered_and_the_session_goes_on(data: bytes, text: str) -> None:
    asked = session()
    reply = ask(asked, data)[0]
    assert reply["error"]["class"] == "GenericError"
    assert text in reply["error"]["desc"]
    assert not asked.over
    last = ask(asked, b'\n{"execute": "query-version", "id": 1}')[-1]
    assert last["id"] == 1
    assert "return" in last


def test_an_unknown_command_has_its_own_class() -> None:
    (reply,) = ask(session(), b'{"execute": "foo"}')
    assert failure(reply) == ("CommandNotFound", "The command foo has not been found")
    assert reply["error"]["data"] == {"code": "command-not-found"}


def test_an_error_carries_our_code() -> None:
    data = b'{"execute": "x-fleece-snapshot-drop", "arguments": {"name": "s9"}}'
    (reply,) = ask(session(), data)
    assert reply["error"]["class"] == "GenericError"
    assert reply["error"]["data"] == {"code": "not-found"}


def test_single_quotes_are_taken_as_qemu_takes_them() -> None:
    data = rb"""{'execute': 'x-fleece-snapshot-drop', 'arguments': {'name': 'it\'s "a"\n'}}"""
    (reply,) = ask(session(), data)
    assert """there is no snapshot 'it\\'s "a"\\n'""" in reply["error"]["desc"]


def test_a_message_too_long_is_answered_and_ends_the_session() -> None:
    asked = session()
    (reply,) = ask(asked, b'{"a": "' + b"x" * (1 << 20) + b'"}')
    assert failure(reply) == ("GenericError", "JSON token size limit exceeded")
    assert asked.over


class Broken(FakeService):
    def snapshot_list(self) -> list[dict[str, Any]]:
        raise ZeroDivisionError("a bug")

    def cursor_list(self) -> list[dict[str, Any]]:
        return [{"bytes": b"cannot be JSON"}]


def test_a_bug_of_ours_is_an_answer_and_its_traceback_is_for_the_debug_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = Session(REGISTRY, Broken())
    ask(asked, b'{"execute": "qmp_capabilities"}')
    with caplog.at_level(logging.DEBUG):
        replies = ask(asked, b'{"execute": "x-fleece-snapshot-list", "id": 1}')
        replies += ask(asked, b'{"execute": "x-fleece-cursor-list"}')
    assert replies[0]["id"] == 1
    assert all("internal error in x-fleece" in reply["error"]["desc"] for reply in replies)
    assert all(reply["error"]["data"]["code"] == FleeceError.code for reply in replies)
    assert not any("Traceback" in reply["error"]["desc"] for reply in replies)
    levels = {record.levelno for record in caplog.records if record.exc_info}
    assert levels == {logging.DEBUG}


def test_each_reply_is_handed_out_before_the_next_command_is_run() -> None:
    service = FakeService()
    asked = Session(REGISTRY, service)
    create = b'{"execute": "x-fleece-snapshot-create", "arguments": {"disks": ["a"]}}'
    replies = asked.receive(b'{"execute": "qmp_capabilities"}' + create)
    next(replies)
    assert service.calls == []
    next(replies)
    assert len(service.calls) == 1
