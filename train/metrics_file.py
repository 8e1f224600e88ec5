"""Read ``metrics.jsonl`` while it is written: half lines, damaged lines and unknown series included (no torch)."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20  # of a longer file the end is read: about 200,000 lines
PLACES = frozenset({"step", "epoch"})


@dataclass(frozen=True)
class Metrics:
    """What was logged.

    Attributes:
        last: the last whole line, or {}.
        epoch: the epoch reached at the last line, or None.
        series: name -> (steps, values), in the order in which the names turn up; finite numbers only.
        damaged: lines that could not be read; a last line that is being written is none of them.
    """

    last: dict[str, Any] = field(default_factory=dict)
    epoch: float | None = None
    series: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    damaged: int = 0


def read_metrics(path: Path) -> Metrics:
    """Read the lines that are there; without a file there are none.

    Where a step was logged twice the later line holds.
    """
    lines: dict[int, dict[str, Any]] = {}
    damaged = 0
    for text in _whole_lines(path):
        line = _parsed(text)
        if line is None:
            damaged += bool(text.strip())
        else:
            lines[line["step"]] = line
    series: dict[str, tuple[list[int], list[float]]] = {}
    for step in sorted(lines):
        for name, value in lines[step].items():
            if name not in PLACES and (number := _finite(value)) is not None:
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(number)
    last = lines[max(lines)] if lines else {}
    return Metrics(last, _finite(last.get("epoch")), series, damaged)


def _whole_lines(path: Path) -> list[str]:
    """The lines that end; of a very long file the last ones."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = max(0, size - MAX_BYTES)
            file.seek(start)
            content = file.read(MAX_BYTES)
    except FileNotFoundError:
        return []
    lines = content.decode("utf-8", errors="replace").split("\n")[:-1]
    return lines[1:] if start else lines


def _parsed(text: str) -> dict[str, Any] | None:
    """A line that has a step, or None."""
    try:
        line = json.loads(text)
        step = line["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return line if type(step) is int and 0 <= step < 2**53 else None


def _finite(value: object) -> float | None:
    """A number, or None for whatever else there is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
