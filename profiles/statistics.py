"""Statistics of latencies measured in rounds, and of predictions paired image by image (numpy only).

Latencies of one round share what the machine did meanwhile, so the rounds, not the samples, are what was drawn
independently. Every interval here is a hierarchical bootstrap (rounds, then samples within each of them) of medians on
a logarithmic scale. With four or five rounds the bootstrap's own percentiles are far too narrow, so it gives the
standard error alone, corrected by sqrt(R / (R - 1)), and Student's t with R - 1 degrees of freedom gives the width.
Variants are compared by the ratio of their medians within a round, where a drift that all of them share cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..runtime.proportions import wilson_interval

Samples = Sequence[Sequence[float]]

PERCENTILES = (50, 90, 95, 99)
BOOTSTRAPS = 4000
MIN_ROUNDS = 3  # with two, t has one degree of freedom and the interval spans orders of magnitude

# 97.5 % points of Student's t with 1, 2, … 30 degrees of freedom.
T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


def describe(samples: Samples) -> dict[str, float | int]:
    """Percentiles and the like over the samples of all rounds together.

    Args:
        samples: rounds of latencies, ms.

    Returns:
        ``p50_ms``, ``p90_ms``, ``p95_ms``, ``p99_ms`` (linear interpolation), ``mean_ms``, ``min_ms``, ``mad_ms``
        (median absolute deviation from the median, unscaled), ``n``.
    """
    flat = np.concatenate([np.asarray(part, np.float64) for part in samples])
    values = np.percentile(flat, PERCENTILES)
    return {
        **{f"p{q}_ms": float(value) for q, value in zip(PERCENTILES, values, strict=True)},
        "mean_ms": float(flat.mean()),
        "min_ms": float(flat.min()),
        "mad_ms": float(np.median(np.abs(flat - values[0]))),
        "n": int(flat.size),
    }


def p50_interval(samples: Samples) -> tuple[float, float] | None:
    """95 % interval of the p50 of another such set of rounds on the same machine.

    Args:
        samples: rounds of latencies, ms, all above 0.

    Returns:
        Both ends, ms, around the p50 of all samples; None for fewer than three rounds, which do not tell how much
        rounds differ.
    """
    if len(samples) < MIN_ROUNDS:
        return None
    rounds = [np.asarray(part, np.float64) for part in samples]
    rng = np.random.default_rng(0)
    picks = rng.integers(len(rounds), size=(BOOTSTRAPS, len(rounds)))
    low, high = _t_interval(_log_medians(rounds), _resampled_log_medians(rounds, picks, rng))
    p50 = float(np.median(np.concatenate(rounds)))
    return min(math.exp(low), p50), max(math.exp(high), p50)


def paired_latency(samples: Samples, reference_samples: Samples) -> dict[str, Any]:
    """How many times as fast a variant is as its reference, paired by the rounds in which both were measured.

    Args:
        samples: rounds of the variant's latencies, ms, all above 0.
        reference_samples: as many rounds of the reference's, in the same order.

    Returns:
        ``ratio`` (geometric mean over rounds of the reference's median / the variant's), ``ci95`` (its interval), and
        ``verdict``: ``"faster"``, ``"slower"``, or ``"not distinguishable"`` where the interval holds 1.

    Raises:
        ValueError: not the same number of rounds, or fewer than three.
    """
    if len(samples) != len(reference_samples) or len(samples) < MIN_ROUNDS:
        given = f"{len(samples)} and {len(reference_samples)}"
        raise ValueError(f"Got {given} rounds: both must be the same number, at least {MIN_ROUNDS}.")
    rounds, references = ([np.asarray(part, np.float64) for part in parts] for parts in (samples, reference_samples))
    rng = np.random.default_rng(0)
    picks = rng.integers(len(rounds), size=(BOOTSTRAPS, len(rounds)))
    replicates = _resampled_log_medians(references, picks, rng) - _resampled_log_medians(rounds, picks, rng)
    log_ratios = _log_medians(references) - _log_medians(rounds)
    low, high = (math.exp(end) for end in _t_interval(log_ratios, replicates))
    verdict = "faster" if low > 1 else "slower" if high < 1 else "not distinguishable"
    return {"ratio": math.exp(log_ratios.mean()), "ci95": [low, high], "verdict": verdict}


def _log_medians(rounds: Sequence[np.ndarray]) -> np.ndarray:
    return np.log([np.median(part) for part in rounds])


def _resampled_log_medians(rounds: Sequence[np.ndarray], picks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Log medians (B, R) of the picked rounds, each with its samples drawn anew.

    The median of n draws with replacement from sorted values x is x[floor(n u)], u being the middle one of n uniform
    numbers in order, which is Beta distributed: so n draws cost as much as one. For even n the two middle ones are
    averaged; given the lower one, the upper is the smallest of the n / 2 uniform numbers above it.
    """
    values = np.empty(picks.shape)
    for index, part in enumerate(rounds):
        chosen = picks == index
        ordered, n, count = np.sort(part), len(part), int(chosen.sum())
        rank = (n + 1) // 2  # of the lower middle one, from 1
        lower = rng.beta(rank, n + 1 - rank, count)
        upper = lower + (1 - lower) * rng.beta(1, n - rank, count) if n % 2 == 0 else lower
        middles = [ordered[np.minimum((n * u).astype(np.int64), n - 1)] for u in (lower, upper)]
        values[chosen] = np.log((middles[0] + middles[1]) / 2)
    return values


def _t_interval(log_values: np.ndarray, replicates: np.ndarray) -> tuple[float, float]:
    """Interval of the mean over R rounds of ``log_values`` (R,), from bootstrap replicates (B, R)."""
    num_rounds = len(log_values)
    error = replicates.mean(axis=1).std() * math.sqrt(num_rounds / (num_rounds - 1))
    reach = T_975[min(num_rounds - 1, len(T_975)) - 1] * error
    return float(log_values.mean() - reach), float(log_values.mean() + reach)


def paired_top1(labels: np.ndarray, predictions: np.ndarray, reference_predictions: np.ndarray) -> dict[str, Any]:
    """How many points of top-1 a variant loses against its reference on the same images.

    Args:
        labels: (N,) classes, N at least 1.
        predictions: (N,) the variant's classes.
        reference_predictions: (N,) the reference's classes.

    Returns:
        ``top1_drop_points`` (positive: the variant is worse), ``ci95`` (:func:`paired_difference_interval`, in points),
        ``discordant`` (images that the reference alone gets right, and the variant alone), ``mcnemar_p``.
    """
    right, reference_right = predictions == labels, reference_predictions == labels
    lost, won = int((reference_right & ~right).sum()), int((right & ~reference_right).sum())
    both = int((right & reference_right).sum())
    low, high = paired_difference_interval(both, lost, won, len(labels) - both - lost - won)
    return {
        "top1_drop_points": 100 * (lost - won) / len(labels),
        "ci95": [100 * low, 100 * high],
        "discordant": [lost, won],
        "mcnemar_p": mcnemar_p(lost, won),
    }


def paired_difference_interval(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """95 % interval of the difference of two proportions that were counted on the same things.

    Method 10 of Newcombe, Statistics in Medicine 17 (1998), 2635-2650: Wilson's intervals, squared and added, with a
    correction for the pairing that keeps its width above 0 where no pair differs.

    Args:
        both: pairs in which both succeeded.
        first: pairs in which the first alone succeeded.
        second: pairs in which the second alone succeeded.
        neither: pairs in which none did.

    Returns:
        Both ends of (first's share - second's share), within -1..1.
    """
    n = both + first + second + neither
    shares = (both + first) / n, (both + second) / n
    (low1, high1), (low2, high2) = (wilson_interval(both + count, n) for count in (first, second))
    margins = math.prod((both + first, second + neither, both + second, first + neither))
    excess = both * neither - first * second
    correlation = (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(margins) if margins else 0.0
    down1, up1, down2, up2 = shares[0] - low1, high1 - shares[0], shares[1] - low2, high2 - shares[1]
    below = math.sqrt(max(down1**2 - 2 * correlation * down1 * up2 + up2**2, 0.0))
    above = math.sqrt(max(up1**2 - 2 * correlation * up1 * down2 + down2**2, 0.0))
    difference = (first - second) / n
    return max(difference - below, -1.0), min(difference + above, 1.0)


def mcnemar_p(lost: int, won: int) -> float:
    """Exact two-sided p of McNemar's test: of ``lost + won`` fair coins, as uneven a result or more so."""
    total = lost + won
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    tail = np.arange(min(lost, won) + 1)
    logs = log_factorials[total] - log_factorials[tail] - log_factorials[total - tail] - total * math.log(2)
    return float(min(1.0, 2 * np.exp(logs).sum()))
