"""Schedules, as arrays that the global step indexes."""

from __future__ import annotations

import numpy as np


def cosine(start: float, end: float, steps: int) -> np.ndarray:
    """Half a cosine from ``start`` towards ``end``, which step ``steps`` would reach: (steps,) float64."""
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(steps) / max(steps, 1)))


def warmup_cosine(start: float, peak: float, end: float, warmup_steps: int, steps: int) -> np.ndarray:
    """A linear warm-up whose last step is the peak, then half a cosine: (steps,) float64.

    Args:
        start: value at step 0.
        peak: value at step ``warmup_steps - 1``.
        end: value that step ``steps`` would reach.
        warmup_steps: length of the warm-up; where the run is shorter, it ends within.
        steps: length of the run.
    """
    warmup = np.linspace(start, peak, warmup_steps)[:steps]
    return np.concatenate([warmup, cosine(peak, end, steps - len(warmup))])


def warmup_constant(start: float, end: float, warmup_steps: int, steps: int) -> np.ndarray:
    """A line from ``start`` to ``end`` over the warm-up, then ``end``: (steps,) float64. Arguments as above."""
    warmup = np.linspace(start, end, warmup_steps)[:steps]
    return np.concatenate([warmup, np.full(steps - len(warmup), end)])
