"""The configuration of ``midge watch`` (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..runtime.errors import check_ranges

RANGES: dict[str, tuple[float, float]] = {"every_s": (0.1, 3600)}


@dataclass(frozen=True)
class WatchConfig:
    """Curves of a running or finished run in the terminal, until the run ends or Ctrl-C."""

    run: Positional[Path]
    """Run folder, as midge pretrain writes it."""
    once: bool = False
    """Print the curves once and end; so it is too where the output is no terminal."""
    every_s: float = 2.0
    """Seconds between looks at the run."""
    json: bool = False
    """Print the last line of metrics.jsonl instead."""

    def check(self) -> None:
        """Refuse values that cannot work.

        Raises:
            UserError: a value is out of range.
        """
        check_ranges(self, RANGES)
