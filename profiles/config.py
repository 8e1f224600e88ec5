"""The configuration of ``midge profile`` (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..runtime.errors import UserError, check_ranges, unknown_name
from .child import TRANSPORTS
from .latency import PROTOCOLS

# Inclusive, by field.
RANGES: dict[str, tuple[float, float]] = {"limit": (1, 10**9), "seed": (0, 2**63 - 1), "max_unreadable": (0, 0.5)}
MAX_THREADS = 1024


@dataclass(frozen=True)
class ProfileConfig:
    """Measure the variants of an artifact on this device: accuracy, latency, start-up, memory, parity, placement.

    One record per variant and number of threads; exit code 1 where a record is invalid because of what was measured.
    """

    artifacts: Positional[tuple[Path, ...]]
    """Folders of artifacts, as midge export wrote them; several are measured by turns."""

    out: Path
    """Folder of records; others may lie in it already."""

    data: Path | None = None
    """Labelled test images, ImageFolder layout; without them there is no accuracy and the golden pack is run."""

    variants: tuple[str, ...] | None = None
    """Variants to measure, e.g. onnx-fp32 onnx-int8-u8; default all whose runtime is installed."""

    threads: tuple[int, ...] = (1,)
    """Numbers of threads that one inference may use; each is measured."""

    protocol: str = "standard"
    """How long at least: smoke (to try), quick (64 runs, 6 s), standard (200, 10 s) or rigorous (1024, 60 s)."""

    limit: int | None = None
    """Take a seeded random subset of so many test images; default all."""

    on: str = "local"
    """Where to measure: local is this machine."""

    seed: int = 0
    """Seed of the subset and of the images that are the latency's input."""

    max_unreadable: float = 0.01
    """Largest share of unreadable images that are skipped, 0..1; above it the command stops."""

    overwrite: bool = False
    """Replace records that exist already."""

    json: bool = False
    """Print one JSON document instead of a table."""

    def check(self) -> None:
        """Refuse values that are out of range.

        Raises:
            UserError: names the flag, its value and what is allowed.
        """
        if not self.artifacts:
            raise UserError("No artifact was given: name one folder or more that 'midge export' wrote.")
        if self.protocol not in PROTOCOLS:
            raise unknown_name("protocol", self.protocol, PROTOCOLS)
        if self.on not in TRANSPORTS:
            raise unknown_name("device", self.on, TRANSPORTS)
        check_ranges(self, RANGES)
        if not self.threads or not all(1 <= threads <= MAX_THREADS for threads in self.threads):
            given = " ".join(map(str, self.threads)) or "empty"
            raise UserError(f"--threads is {given}: give one number or more from 1 to {MAX_THREADS}.")
