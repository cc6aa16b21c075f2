"""Markdown files as readers use them: fenced blocks, commands that run, output that is shown."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
_INFO = re.compile(r"(?P<language>sh|python|text|json|yaml|toml)?(?P<norun> norun: \S.*)?")
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)[^)]*\)")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``reason``: why it is not run, None for one that is."""

    line: int
    language: str
    body: str
    reason: str | None = None


def blocks(text: str) -> list[Block]:
    """All of them, in order; ValueError for an info string that we do not know."""
    found = []
    for match in _FENCE.finditer(text):
        info = _INFO.fullmatch(match["info"])
        line = text.count("\n", 0, match.start()) + 1
        if info is None:
            raise ValueError(f"line {line}: what is ```{match['info']}?")
        reason = info["norun"].removeprefix(" norun: ") if info["norun"] else None
        found.append(Block(line, info["language"] or "", match["body"], reason))
    return found


def links(path: Path) -> list[Path]:
    """Where the relative links of a document lead."""
    return [path.parent / target for target in _LINK.findall(path.read_text())]


def likeness(text: str, directory: str = "") -> list[str]:
    """``text`` without what differs from run to run: durations, ids, ages, the ``directory``."""
    if directory:
        text = text.replace(directory, "$DIR")
    text = re.sub(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", "ID", text)
    text = re.sub(r"\b\d+(\.\d+)? ms\b", "N ms", text)
    text = re.sub(r"\bnow\b|\b\d+ s ago\b", "AGO", text)
    text = re.sub(r"\bin \d+ (h|min)( \d+ (min|s))?\b", "in TIME", text)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line]


def shape(value: Any) -> Any:
    """A JSON value with the type in place of each scalar; of a list, the shapes that it holds."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return sorted({json.dumps(shape(inner), sort_keys=True) for inner in value})
    return type(value).__name__
