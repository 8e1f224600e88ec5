from __future__ import annotations

import math

import numpy as np
import pytest

from midge.export.histogram import (
    BINS,
    ENTROPY_LEVELS,
    ESTIMATES,
    HALF,
    PERCENTS,
    Histogram,
    entropy,
    minmax,
    mse,
    mse_symmetric,
)
from midge.runtime.errors import UserError

RNG = np.random.default_rng(0)
TENSORS = {
    "normal": RNG.normal(size=20_000),
    "after relu": np.maximum(RNG.normal(size=20_000), 0) ** 1.5,
    "after relu6": np.clip(RNG.normal(2, 3, size=20_000), 0, 6),
    "an outlier": np.append(RNG.normal(size=20_000), 40.0),
    "off zero": RNG.normal(9, 1, size=20_000),
    "negative": -RNG.exponential(size=20_000),
    "tiny": RNG.normal(size=20_000) * 1e-6,
}
TENSORS = {name: values.astype(np.float32) for name, values in TENSORS.items()}


def histogram_of(values: np.ndarray, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(values, parts):
        histogram.add(part)
    return histogram


@pytest.fixture(params=sorted(TENSORS))
def values(request: pytest.FixtureRequest) -> np.ndarray:
    return TENSORS[request.param]


def test_bins_hold_what_is_counted_one_by_one(values: np.ndarray) -> None:
    histogram = histogram_of(values)
    exponent = next(exponent for exponent in range(-60, 60) if np.abs(values).max() < 2.0**exponent)
    counts = [0] * BINS
    for value in values.tolist():
        counts[math.floor(value * HALF / 2**exponent) + HALF] += 1
    assert histogram.counts.tolist() == counts
    assert histogram.zeros == sum(value == 0 for value in values.tolist())
    assert (histogram.low, histogram.high) == (values.min(), values.max())


def test_order_and_parts_do_not_show(values: np.ndarray) -> None:
    whole = histogram_of(values)
    np.testing.assert_array_equal(histogram_of(values[::-1], 7).counts, whole.counts)
    rising = values[np.argsort(np.abs(values))]  # each part is wider than the ones before
    np.testing.assert_array_equal(histogram_of(rising, 100).counts, whole.counts)


@pytest.mark.parametrize("percent", PERCENTS)
def test_percentiles_cut_half_of_the_rest_on_each_side(values: np.ndarray, percent: float) -> None:
    histogram = histogram_of(values)
    low, high = ESTIMATES[f"percentile-{percent}"](histogram)
    allowed = math.floor(len(values) * (100 - percent) / 200)
    width = 2.0**histogram.exponent / HALF
    assert (values < low).sum() <= allowed < (values < low + 1.001 * width).sum()
    assert (values > high).sum() <= allowed < (values > high - 1.001 * width).sum()


def quantized(values: np.ndarray, low: float, high: float, levels: int) -> np.ndarray:
    """Values as an 8-bit form of a range gives them back, rounded one by one; 0 is held exactly."""
    if high <= low:
        return np.zeros_like(values)
    step = (high - low) / levels
    zero = round(-low / step)
    return (np.clip(np.rint(values / step) + zero, 0, levels) - zero) * step


def error_of(values: np.ndarray, low: float, high: float, levels: int) -> float:
    return float(np.mean((quantized(values.astype(np.float64), low, high, levels) - values) ** 2))


def test_mse_is_as_good_as_trying_all_ranges(values: np.ndarray) -> None:
    low, high = mse(histogram_of(values))
    assert low <= 0 <= high
    lows, highs = (np.linspace(0, end, 33) for end in (min(values.min(), 0), max(values.max(), 0)))
    best = min(error_of(values, a, b, 255) for a in np.unique(lows) for b in np.unique(highs))
    assert error_of(values, low, high, 255) <= 1.05 * best


def test_symmetric_mse_is_as_good_as_trying_all_bounds(values: np.ndarray) -> None:
    low, high = mse_symmetric(histogram_of(values))
    assert low == -high
    best = min(error_of(values, -bound, bound, 254) for bound in np.linspace(0, np.abs(values).max(), 200)[1:])
    assert error_of(values, low, high, 254) <= 1.05 * best


def divergence(magnitudes: list[int], kept: int) -> float:
    """Bin by bin, as the talk of 2017 describes it, with groups of bins that differ in size by one."""
    reference = [float(count) for count in magnitudes[:kept]]
    reference[-1] += sum(magnitudes[kept:])
    candidate = [0.0] * kept
    for level in range(ENTROPY_LEVELS):
        group = range(level * kept // ENTROPY_LEVELS, (level + 1) * kept // ENTROPY_LEVELS)
        filled = [index for index in group if magnitudes[index]]
        for index in filled:
            candidate[index] = sum(magnitudes[other] for other in group) / len(filled)
    p, q = sum(reference), sum(candidate)
    pairs = zip(reference, candidate, strict=True)
    return sum(a / p * math.log(a / p / max(b / q, 1e-9)) for a, b in pairs if a)


@pytest.mark.parametrize("name", ["normal", "after relu", "an outlier"])
def test_entropy_is_the_threshold_of_the_smallest_divergence(name: str) -> None:
    histogram = histogram_of(TENSORS[name])
    magnitudes = [0] * HALF
    for value in np.abs(TENSORS[name][TENSORS[name] != 0]).tolist():
        magnitudes[int(value * HALF / 2**histogram.exponent)] += 1
    used = max(index for index, count in enumerate(magnitudes) if count) + 1
    low, high = entropy(histogram)
    found = round(max(-low, high) * HALF / 2**histogram.exponent)
    assert ENTROPY_LEVELS <= found <= used
    least = min(divergence(magnitudes, kept) for kept in range(used, ENTROPY_LEVELS, -16 * max(1, used // 128)))
    assert divergence(magnitudes, found) <= least + 1e-9
    assert low >= histogram.low


def test_an_outlier_is_cut_by_all_but_minmax() -> None:
    histogram = histogram_of(TENSORS["an outlier"])
    assert minmax(histogram)[1] == 40
    for name in ("percentile-99.9", "mse-symmetric", "entropy"):
        assert ESTIMATES[name](histogram)[1] < 39


def test_a_tensor_of_zeros_has_no_range() -> None:
    histogram = histogram_of(np.zeros(10, np.float32))
    assert {estimate(histogram) for estimate in ESTIMATES.values()} == {(0, 0)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match="numbers that are not finite for a calibration image"):
        histogram_of(np.array([0, bad], np.float32))
