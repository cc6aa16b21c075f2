import errno
import re
from collections.abc import Iterator

import pytest

import fleece.errors
import nbdwire.errors
from fleece.errors import FleeceError
from nbdwire.errors import NBDError, RequestError, from_wire, to_wire

WIRE = {0, 1, 5, 12, 22, 28, 75, 95, 108}


def family(root: type[Exception], module: str) -> Iterator[type[Exception]]:
    """``root`` and all that inherit from it, of one module."""
    yield root
    for child in root.__subclasses__():
        if child.__module__ == module:
            yield from family(child, module)


FLEECE = list(dict.fromkeys(family(FleeceError, "fleece.errors")))
NBD = list(dict.fromkeys(family(NBDError, "nbdwire.errors")))


def test_every_code_is_unique_and_a_plain_word() -> None:
    codes = [kind.__dict__.get("code") for kind in FLEECE + NBD]
    assert None not in codes, "each class has a code of its own"
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", str(code)) for code in codes)


def test_every_exit_status_is_unique_and_none_of_the_shells() -> None:
    statuses = [kind.__dict__.get("exit_status") for kind in FLEECE]
    assert None not in statuses, "each class has an exit status of its own"
    assert len(set(statuses)) == len(statuses)
    assert all(isinstance(status, int) and 0 < status < 124 for status in statuses)


def test_every_error_has_a_docstring() -> None:
    assert all(kind.__doc__ for kind in FLEECE + NBD)


def tree(text: str) -> list[tuple[int, str, list[str]]]:
    """Depth, class name and the words after it, of each line of a docstring's tree."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"    ((?:│   |    )*)((?:├── |└── )?)(\w+)(?:\([\w, ]+\))?(.*)", line)
        if match and (match[2] or not found) and not match[3].islower():
            depth = len(match[1]) // 4 + bool(match[2])
            found.append((depth, match[3], match[4].split()))
    return found


def nesting(root: type[Exception], module: str, depth: int = 0) -> set[tuple[int, str]]:
    out = {(depth, root.__name__)}
    for child in root.__subclasses__():
        if child.__module__ == module:
            out |= nesting(child, module, depth + 1)
    return out


@pytest.mark.parametrize(
    ("module", "root"), [(fleece.errors, FleeceError), (nbdwire.errors, NBDError)]
)
def test_the_tree_in_the_docstring_is_the_tree_of_classes(
    module: object, root: type[Exception]
) -> None:
    name = root.__module__
    lines = tree(str(module.__doc__))
    assert {(depth, kind) for depth, kind, _ in lines} == nesting(root, name)
    assert len(lines) == len(nesting(root, name))


def test_the_docstring_shows_the_right_codes_and_exit_statuses() -> None:
    by_name = {kind.__name__: kind for kind in FLEECE}
    for _, name, words in tree(str(fleece.errors.__doc__))[1:]:
        kind = by_name[name]
        assert words[:2] == [kind.code, str(kind.exit_status)]


def test_only_numbers_of_the_protocol_go_on_the_wire() -> None:
    assert {to_wire(number) for number in range(1, 140)} <= WIRE - {0}
    assert to_wire(None) == to_wire(0) == to_wire(errno.ENOTTY) == 5


def test_every_number_of_the_protocol_survives_the_way_there_and_back() -> None:
    for number in WIRE - {0}:
        assert to_wire(from_wire(number)) == number
    assert from_wire(12345) == errno.EINVAL


def test_a_failed_request_is_an_oserror_with_its_errno() -> None:
    error = RequestError(errno.ENOSPC)
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror) == (errno.ENOSPC, "No space left on device")
    assert RequestError(errno.EIO, "bad sector").strerror == "bad sector"
