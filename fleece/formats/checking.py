# SPDX-License-Identifier: Apache-2.0
"""Check an image of any format, and look at it again after a repair."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from fleece.block.node import Node
from fleece.errors import UnsupportedFeature
from fleece.formats.filenames import normal
from fleece.formats.opening import open_node
from fleece.formats.raw import format_of

if TYPE_CHECKING:
    from fleece.formats.qcow2.check import CheckResult


CHECKABLE: Final = ("qcow2",)
"""Formats with metadata that could be wrong."""
NO_CHECKS: Final = "This image format does not support checks"


def open_for_check(
    source: str | Mapping[str, Any], fmt: str | None, *, writable: bool, force_share: bool = False
) -> tuple[Node, str]:
    """The node with the bytes of the image, and the format; nothing that it names is opened.

    Errors as those of `fleece.formats.opening.open_node`.
    """
    options = normal(source, fmt)
    driver = options.get("driver")
    layer = options.get("file", options)
    node = open_node(
        {"driver": "raw", "file": layer}, read_only=not writable, force_share=force_share
    )
    try:
        return node, str(driver or format_of(node))
    except BaseException:
        node.close()
        raise


def check_image(
    node: Node,
    fmt: str,
    *,
    repair: str | None = None,
    report: Callable[[str], None] | None = None,
    again: Callable[["CheckResult"], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "CheckResult":
    """Check, with ``repair`` mend, and then check what there is now; ``again`` hears of the latter.

    The figures are those of the last look, with what the first one fixed. Errors as those of
    `fleece.formats.qcow2.check.check`, and `UnsupportedFeature` for a format without checks.
    """
    if fmt not in CHECKABLE:
        raise UnsupportedFeature(NO_CHECKS)
    from fleece.formats.qcow2.check import Current, check, read_damaged

    header = read_damaged(node)
    result = check(node, header, name=node.name, repair=repair, report=report, progress=progress)
    if not result.repaired:
        return result
    if again is not None:
        again(result)
    header = read_damaged(Current(node))
    second = check(node, header, name=node.name, report=report, progress=progress)
    return replace(
        second, corruptions_fixed=result.corruptions_fixed, leaks_fixed=result.leaks_fixed
    )
