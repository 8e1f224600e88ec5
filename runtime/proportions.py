"""The interval of an accuracy that was counted on a sample."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # 97.5 % point of the standard normal distribution


def wilson_interval(correct: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927): sound near 0 and 1 and for small samples.

    Args:
        correct: number of successes.
        total: number of trials, at least 1.
        z: normal quantile; the default gives 95 %.

    Returns:
        The lower and the upper end, within 0..1.
    """
    if not 0 <= correct <= total or total < 1:
        raise ValueError(f"No proportion: {correct} of {total}.")
    share = correct / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    scale = 1 + z * z / total
    low = 0.0 if correct == 0 else (centre - half) / scale  # exactly, where rounding would leave 1e-17
    high = 1.0 if correct == total else (centre + half) / scale
    return low, high


def accuracy_json(correct: int, total: int) -> dict[str, object]:
    """The fields that stand for an accuracy in every JSON file: ``top1`` (0..1), ``correct``, ``n``, ``ci95``."""
    return {"top1": correct / total, "correct": correct, "n": total, "ci95": list(wilson_interval(correct, total))}
