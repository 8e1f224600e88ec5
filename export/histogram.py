"""The range that the 8-bit form of a tensor stands for, from a histogram of its values, by one of several methods.

The bins are those of ``[-2**k, 2**k)`` for the smallest ``k`` that holds all values. Where a value is larger than those
before, bins merge in pairs: the histogram is the same in whatever order and whatever parts the values come, and one
pass is enough. Zeros are counted apart: every 8-bit form that is written here holds them exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ..runtime.errors import UserError

BINS = 8192  # at least a quarter of them lie between 0 and the largest magnitude: 8 to a step of the 8-bit form
HALF = BINS // 2
MIN_EXPONENT = -60  # values below 2**-60 are as good as 0
BLOCK = 65536  # values that are binned at a time, so that they stay in the cache: a third of the time
CANDIDATES = 128  # thresholds that are tried on each side of 0
ENTROPY_LEVELS = 128  # magnitudes of a signed 8-bit integer

Range = tuple[float, float]


@dataclass(eq=False)
class Histogram:
    """How often a tensor has which values.

    Attributes:
        counts: (BINS,) number of values in each bin, zeros among them.
        exponent: the bins divide ``[-2**exponent, 2**exponent)``.
        zeros: number of values that are 0.
        low: smallest value.
        high: largest value.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    exponent: int = MIN_EXPONENT
    zeros: int = 0
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: np.ndarray) -> None:
        """Count the values of a float32 array that is not empty.

        Raises:
            UserError: one is not finite.
        """
        low, high = float(values.min()), float(values.max())
        if not math.isfinite(low) or not math.isfinite(high):
            raise UserError("The network gives numbers that are not finite for a calibration image: train it again.")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if low or high:
            self._widen(math.frexp(max(-low, high))[1])
        scale = np.float32(HALF / 2.0**self.exponent)  # a power of 2: nothing is rounded
        flat = values.ravel()
        for start in range(0, len(flat), BLOCK):
            places = flat[start : start + BLOCK] * scale
            np.floor(places, out=places)
            places += HALF
            self.counts += np.bincount(places.astype(np.int32), minlength=BINS)
        self.zeros += int(np.count_nonzero(values == 0))  # counting booleans is what NumPy does fast

    def _widen(self, exponent: int) -> None:
        """Merge bins until values up to ``2**exponent`` fit."""
        if exponent <= self.exponent:
            return
        merged = min(2 ** (exponent - self.exponent), HALF)
        left = HALF // merged
        counts = np.zeros(BINS, np.int64)
        counts[HALF - left : HALF + left] = self.counts.reshape(-1, merged).sum(axis=1)
        self.counts, self.exponent = counts, exponent

    @property
    def edges(self) -> np.ndarray:
        """(BINS + 1,) float64."""
        return np.linspace(-1, 1, BINS + 1) * 2.0**self.exponent

    def nonzero(self) -> tuple[np.ndarray, np.ndarray]:
        """(BINS,) middle of each bin, within the smallest and largest value, and its values that are not 0."""
        middles = np.clip((self.edges[:-1] + self.edges[1:]) / 2, self.low, self.high)
        counts = self.counts.copy()
        counts[HALF] -= self.zeros
        return middles, counts


def minmax(histogram: Histogram) -> Range:
    """From the smallest to the largest value."""
    return histogram.low, histogram.high


def percentile(histogram: Histogram, percent: float) -> Range:
    """The bins that hold ``percent`` % of the values: on each side half of the rest is cut, at most."""
    total = int(histogram.counts.sum())
    cut = math.floor(total * (100 - percent) / 200)
    below = np.cumsum(histogram.counts)  # values below the upper edge of each bin
    first = int(np.searchsorted(below, cut, side="right"))
    last = int(np.searchsorted(below, total - cut))
    low, high = histogram.edges[[first, last + 1]]
    return max(float(low), histogram.low), min(float(high), histogram.high)


def mse(histogram: Histogram) -> Range:
    """The range, 0 in it, of 256 steps that gives the smallest mean squared error.

    A value inside is rounded to the nearest step, which costs a twelfth of a step's square on average; one outside
    is cut off, and each bin of those is counted with its distance.
    """
    lows = np.linspace(0, min(histogram.low, 0), CANDIDATES)[:, None]
    highs = np.linspace(0, max(histogram.high, 0), CANDIDATES)[None, :]
    errors = _squared_error(histogram, lows, highs, (highs - lows) / 255)  # (CANDIDATES, CANDIDATES)
    low, high = np.unravel_index(np.argmin(errors), errors.shape)
    return float(lows[low, 0]), float(highs[0, high])


def mse_symmetric(histogram: Histogram) -> Range:
    """As :func:`mse`, of the ranges from ``-t`` to ``t`` in 254 steps."""
    bounds = np.linspace(0, max(-histogram.low, histogram.high), 2 * CANDIDATES)
    best = float(bounds[np.argmin(_squared_error(histogram, -bounds, bounds, bounds / 127))])
    return -best, best


def _squared_error(histogram: Histogram, lows: np.ndarray, highs: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Sum of squared errors of the values for each range, whose shapes are broadcast."""
    middles, counts = histogram.nonzero()
    # Sums of 1, x and x² over the bins before each place, from which those of any stretch follow.
    sums = [np.concatenate([[0.0], np.cumsum(counts * middles**power)]) for power in (0, 1, 2)]
    below = np.searchsorted(middles, lows, side="left")
    upto = np.searchsorted(middles, highs, side="right")
    ones, first, second = ([table[below], table[-1] - table[upto], table[upto] - table[below]] for table in sums)
    cut_low = second[0] - 2 * lows * first[0] + lows**2 * ones[0]
    cut_high = second[1] - 2 * highs * first[1] + highs**2 * ones[1]
    return cut_low + cut_high + ones[2] * steps**2 / 12


def entropy(histogram: Histogram) -> Range:
    """The threshold for magnitudes at which the 8-bit form tells most about the values, by Kullback and Leibler.

    As in Migacz, "8-bit Inference with TensorRT" (2017): what is cut off is put into the last bin of the distribution
    that the quantized one is compared with.
    """
    counts = histogram.nonzero()[1]
    magnitudes = (counts[HALF:] + counts[HALF - 1 :: -1]).astype(np.float64)  # (HALF,)
    used = int(np.flatnonzero(magnitudes)[-1]) + 1 if magnitudes.any() else 0
    tried = range(used, ENTROPY_LEVELS, -max(1, used // CANDIDATES))
    best = min(tried, key=lambda kept: _divergence(magnitudes, kept), default=used)
    bound = best / HALF * 2.0**histogram.exponent
    return max(histogram.low, -bound), min(histogram.high, bound)


def _divergence(magnitudes: np.ndarray, kept: int) -> float:
    """Kullback-Leibler divergence of the first ``kept`` bins, the rest in the last of them, from their 8-bit form."""
    inside = magnitudes[:kept]
    starts = np.arange(ENTROPY_LEVELS) * kept // ENTROPY_LEVELS  # of the bins that share a level
    sizes = np.diff(starts, append=kept)
    filled = np.add.reduceat((inside > 0).astype(np.float64), starts)
    even = np.add.reduceat(inside, starts) / np.maximum(filled, 1)
    coarse = np.where(inside > 0, np.repeat(even, sizes), 0)
    fine = inside.copy()
    fine[-1] += magnitudes[kept:].sum()
    fine, coarse = fine / fine.sum(), coarse / max(coarse.sum(), 1)
    there = fine > 0
    return float(np.sum(fine[there] * np.log(fine[there] / np.maximum(coarse[there], 1e-9))))


PERCENTS = (99.9, 99.99, 99.999)

# What is stored of each tensor: name -> its range by a histogram.
ESTIMATES: dict[str, Callable[[Histogram], Range]] = {
    "minmax": minmax,
    **{f"percentile-{percent}": functools.partial(percentile, percent=percent) for percent in PERCENTS},
    "mse": mse,
    "mse-symmetric": mse_symmetric,
    "entropy": entropy,
}
