"""The configuration of ``midge compare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class CompareConfig:
    """Compare the records of a folder: a table, verdicts of INT8 against FP32, and on request a report page."""

    records: Positional[Path]
    """Folder of records, as midge profile wrote it; all records below it are read."""

    where: str | None = None
    """Keep only the valid rows that satisfy a condition, e.g. "p90_ms <= 5 and top1_drop <= 0.5": measures (top1 and
    int8_mac_share are fractions, top1_drop is in points) compared with numbers, joined by and, or, parentheses."""

    html: Path | None = None
    """Write the report page here: one file that opens offline."""

    summary: Path | None = None
    """Write the summary here, as JSON."""

    allow_mixed_devices: bool = False
    """Show records of different devices together. Verdicts and Pareto marks stay within a device."""

    allow_mixed_data: bool = False
    """Show accuracies on different test images together. Verdicts and Pareto marks stay within the same images."""

    json: bool = False
    """Print the summary as JSON instead of the table."""
