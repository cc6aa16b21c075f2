"""Options of nodes, in their three spellings."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleece.block import options as o
from fleece.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("driver=raw", {"driver": "raw"}),
        ("a=1,b=2,a=3", {"a": "3", "b": "2"}),
        ("file.filename=x,,y", {"file": {"filename": "x,y"}}),
        ("a=,,", {"a": ","}),
        ("a=,b=", {"a": "", "b": ""}),
        ("a=1,,,b=2", {"a": "1,", "b": "2"}),
        ("a==b", {"a": "=b"}),
        ("l.0=x,l.1=y", {"l": ["x", "y"]}),
        ("l.0.k=x,l.1.k=y", {"l": [{"k": "x"}, {"k": "y"}]}),
        (
            "driver=qcow2,file.driver=nbd,file.host=H",
            {"driver": "qcow2", "file": {"driver": "nbd", "host": "H"}},
        ),
        ("", {}),
    ],
)
def test_pairs_become_one_nested_dictionary(text: str, expected: dict[str, Any]) -> None:
    """formats.md §11: a comma is doubled, lists are a.0=, a.1=."""
    assert o.parse_pairs(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        '{"driver": "qcow2", "file": {"driver": "file", "filename": "x"}}',
        '{"driver": "qcow2", "file.driver": "file", "file.filename": "x"}',
        '{"driver": "qcow2", "file": {"driver": "file"}, "file.filename": "x"}',
    ],
)
def test_json_may_be_nested_or_dotted_or_both(text: str) -> None:
    expected = {"driver": "qcow2", "file": {"driver": "file", "filename": "x"}}
    assert o.parse_json(text) == o.parse_json("json:" + text) == expected


def test_json_keeps_its_types_and_lists() -> None:
    found = o.parse_json('{"a": [1, true, null, {"b": "c"}], "e": {}, "f.0": 1}')
    assert found == {"a": [1, True, None, {"b": "c"}], "e": {}, "f": [1]}


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (o.parse_pairs, "read-only", "has no value"),
        (o.parse_pairs, "=x", "is not a name"),
        (o.parse_pairs, "a..b=x", "is not a name"),
        (o.parse_pairs, "a=1,a.b=2", "has a value already"),
        (o.parse_pairs, "a.b=1,a=2", "there twice"),
        (o.parse_pairs, "a.0=1,a.2=2", "must be 0, 1, 2"),
        (o.parse_pairs, "a.0=1,a.x=2", "must be 0, 1, 2"),
        (o.parse_pairs, "a.00=1", "must be 0, 1, 2"),
        (o.parse_pairs, "a.b" + ".c" * 300 + "=1", "too deeply"),
        (o.parse_pairs, "a=" + "x" * (1 << 20), "too long"),
        (o.parse_json, "json:", "JSON object"),
        (o.parse_json, "json:[1]", "JSON object"),
        (o.parse_json, 'json:{"a": 1, "a": 2}', "twice"),
        (o.parse_json, 'json:{"a": NaN}', "NaN is not JSON"),
        (o.parse_json, "json:" + '{"a":' * 100_000, "JSON object"),
        (o.parse_json, 'json:{"a":' + "[" * 400 + "1" + "]" * 400 + "}", "too deeply"),
        (o.parse_json, "json:{" + '"a.b": 1, "a": {"b": 2}}', "there twice"),
    ],
)
def test_what_is_wrong_is_one_line(parse: Any, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


_FIELDS: o.Fields = {
    "driver": o.text,
    "read-only": o.boolean,
    "size": o.size,
    "count": o.integer,
    "port": o.number_text,
    "discard": o.choice("unmap", "ignore"),
    "cache": o.group({"direct": o.boolean}),
    "file": o.node,
    "backing": o.node_or_none,
}


def typed(**options: Any) -> dict[str, Any]:
    return o.typed({k.replace("_", "-"): v for k, v in options.items()}, _FIELDS, "driver x")


def test_values_are_converted() -> None:
    assert typed(read_only="on", size="64k", count="3", port=10809, discard="unmap") == {
        "read-only": True,
        "size": 65536,
        "count": 3,
        "port": "10809",
        "discard": "unmap",
    }
    assert typed(read_only=False, size=5, port="x") == {"read-only": False, "size": 5, "port": "x"}
    assert typed(cache={"direct": "off"}) == {"cache": {"direct": False}}
    assert typed(backing=None) == typed(backing="") == {"backing": None}
    assert typed(file={"driver": "y"}) == {"file": {"driver": "y"}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readonly": "on"}, "did you mean 'read-only'"),
        ({"zzzz": "on"}, "it has backing, cache"),
        ({"read_only": "maybe"}, "'maybe'"),
        ({"read_only": 1}, "on or off"),
        ({"size": "big"}, "not a size"),
        ({"size": -1}, "must be a number"),
        ({"size": True}, "must be a number"),
        ({"size": "9999999E"}, "must be a number"),
        ({"count": "1" * 30}, "must be a number"),
        ({"driver": 5}, "must be a string"),
        ({"driver": "a\0b"}, "must be a string"),
        ({"port": True}, "must be a string"),
        ({"discard": "on"}, "one of unmap, ignore"),
        ({"cache": "off"}, "is a group"),
        ({"cache": {"dirct": "on"}}, "did you mean 'direct'"),
        ({"file": "node0"}, "no nodes of other names"),
    ],
)
def test_values_and_names_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        typed(**options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text(max_size=60))
def test_any_text_is_options_or_a_usage_error(text: str) -> None:
    for parse in (o.parse_pairs, o.parse_json):
        with suppress(UsageError):
            assert isinstance(parse(text), dict)


_NAMES = st.text("abcd-", min_size=1, max_size=4)
_VALUES = st.dictionaries(
    _NAMES,
    st.recursive(
        st.text(max_size=5), lambda inner: st.dictionaries(_NAMES, inner, min_size=1, max_size=3)
    ),
    max_size=4,
)


def _flat(value: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, item in value.items():
        pairs += _flat(item, f"{above}{key}.") if isinstance(item, dict) else [(above + key, item)]
    return pairs


@settings(derandomize=True, deadline=None, max_examples=100)
@given(_VALUES)
def test_all_spellings_mean_the_same(value: dict[str, Any]) -> None:
    pairs = _flat(value)
    text = ",".join(f"{key}={item.replace(',', ',,')}" for key, item in pairs)
    assert o.parse_json(json.dumps(value)) == value
    assert o.parse_json(json.dumps(dict(pairs))) == value
    if not any(item.endswith(",") or item.startswith(",") for _, item in pairs):
        assert o.parse_pairs(text) == value
