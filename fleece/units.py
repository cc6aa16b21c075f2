# SPDX-License-Identifier: Apache-2.0
"""Sizes and durations as people write them, and arithmetic on aligned offsets."""

import re
from typing import Final

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

_SIZE: Final = re.compile(r"(\d{1,30})(?:\.(\d{1,30}))?\s*([kmgtpe]?)(?:i?b)?", re.IGNORECASE)
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)?", re.IGNORECASE)
_SECONDS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_size(text: str) -> int:
    """Bytes of ``"64k"``, ``"1.5 GiB"`` or ``"4096"``, in powers of 1024; else ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write it like 64k, 512M or 1.5G")
    whole, decimals, unit = match.groups(default="")
    shift = 10 * " kmgtpe".index(unit.lower() or " ")
    # Not through a float: from 8 PiB on it would be another number.
    scale: int = 10 ** len(decimals)
    return (int(whole + decimals) << shift) // scale


def parse_duration(text: str) -> float:
    """Seconds of ``"90"``, ``"1h"``, ``"1.5d"`` or ``"250ms"``. ValueError if not."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write it like 30s, 15m, 1h or 7d")
    number, unit = match.groups()
    return float(number) * _SECONDS[(unit or "s").lower()]


def format_size(count: int) -> str:
    """``1.5 GiB`` for 1610612736; bytes below 1 KiB stay bytes."""
    if count < KiB:
        return f"{count} B"
    power = 1
    while power < 6 and count / KiB**power >= 1023.95:
        power += 1
    return f"{count / KiB**power:.1f}".removesuffix(".0") + f" {' KMGTPE'[power]}iB"


def align_down(value: int, unit: int) -> int:
    """The last multiple of ``unit`` (a power of two) that is not above ``value``."""
    return value & -unit


def align_up(value: int, unit: int) -> int:
    """The first multiple of ``unit`` (a power of two) that is not below ``value``."""
    return (value + unit - 1) & -unit


def is_power_of_two(value: int) -> bool:
    """Whether ``value`` is 1, 2, 4, 8, ..."""
    return value > 0 and value & (value - 1) == 0
