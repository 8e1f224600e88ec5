"""The statistics against slow re-derivations, and their intervals by simulation."""

from __future__ import annotations

import math
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midge.profiles.statistics import (
    T_975,
    _resampled_log_medians,
    describe,
    mcnemar_p,
    p50_interval,
    paired_difference_interval,
    paired_latency,
    paired_top1,
)

latencies = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30)


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the ordered values, written out."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@given(st.lists(latencies, min_size=1, max_size=4))
def test_description_against_plain_python(samples: list[list[float]]) -> None:
    flat = [value for part in samples for value in part]
    found = describe(samples)
    for q in (50, 90, 95, 99):
        assert found[f"p{q}_ms"] == pytest.approx(percentile(flat, q / 100))
    assert found["mean_ms"] == pytest.approx(math.fsum(flat) / len(flat))
    assert found["min_ms"] == min(flat)
    assert found["mad_ms"] == pytest.approx(median(abs(value - median(flat)) for value in flat), abs=1e-12)
    assert found["n"] == len(flat)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30])
def test_the_t_quantiles_by_integration(degrees: int) -> None:
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    x = np.linspace(0, T_975[degrees - 1], 200_001)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_resampled_medians_are_those_of_draws_with_replacement(size: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.gamma(2.0, 1.0, size)
    fast = _resampled_log_medians([values], np.zeros((40_000, 1), np.int64), rng)[:, 0]
    slow = np.log(np.median(rng.choice(values, (40_000, size)), axis=1))
    outcomes = np.unique(np.round(slow, 9))
    for outcome in outcomes:
        shares = [np.mean(np.abs(draws - outcome) < 1e-8) for draws in (fast, slow)]
        assert shares[0] == pytest.approx(shares[1], abs=0.016)  # over 4 standard errors
    assert np.isin(np.round(fast, 9), outcomes).mean() > 0.999


def simulated_round(rng: np.random.Generator, p50: float, runs: int) -> list[float]:
    """Right-skewed samples whose true median is ``p50``."""
    skewed = 1 + rng.gamma(2.0, 0.03, runs)
    return (p50 * skewed / (1 + 0.03 * 1.678347)).tolist()  # 1.678347: the median of a Gamma(2, 1)


@pytest.mark.parametrize(("num_rounds", "runs"), [(4, 16), (4, 200), (5, 60)])
@pytest.mark.parametrize("own_noise", [0.0, 0.03])
def test_the_paired_interval_covers_the_true_ratio(num_rounds: int, runs: int, own_noise: float) -> None:
    """The machine drifts by 15 % from round to round for both; each process has a noise of its own."""
    rng = np.random.default_rng([num_rounds, runs])
    simulations, covered, p50_covered = 300, 0, 0
    for _ in range(simulations):
        drift = np.exp(0.15 * rng.standard_normal(num_rounds))
        own = np.exp(own_noise * rng.standard_normal((2, num_rounds)))
        variant = [simulated_round(rng, 0.8 * d * o, runs) for d, o in zip(drift, own[0], strict=True)]
        reference = [simulated_round(rng, 1.0 * d * o, runs) for d, o in zip(drift, own[1], strict=True)]
        low, high = paired_latency(variant, reference)["ci95"]
        covered += low <= 1 / 0.8 <= high
        interval = p50_interval(reference)
        assert interval is not None
        p50_covered += interval[0] <= 1.0 <= interval[1]
    # 95 % less three standard errors of 300 simulations.
    assert covered / simulations >= 0.912
    assert p50_covered / simulations >= 0.89  # the drift's median and not its mean is 1: slightly less is expected


def test_equal_variants_are_rarely_told_apart_and_small_differences_are_found() -> None:
    rng = np.random.default_rng(0)
    verdicts = {"same": [], "faster": [], "slower": []}
    for _ in range(100):
        drift = np.exp(0.15 * rng.standard_normal(5))
        own = np.exp(0.005 * rng.standard_normal((2, 5)))
        for name, p50 in {"same": 1.0, "faster": 0.95, "slower": 1.05}.items():
            rounds = [
                [simulated_round(rng, scale * d * o, 100) for d, o in zip(drift, each, strict=True)]
                for scale, each in zip((p50, 1.0), own, strict=True)
            ]
            verdicts[name].append(paired_latency(*rounds)["verdict"])
    assert verdicts["same"].count("not distinguishable") >= 90
    assert verdicts["faster"].count("faster") >= 90
    assert verdicts["slower"].count("slower") >= 90


@settings(max_examples=30)
@given(st.integers(3, 6), st.integers(1, 40), st.floats(0.1, 10), st.integers(0, 2**32))
def test_the_ratio_turns_with_the_pair_and_scales_with_the_times(
    num_rounds: int, runs: int, factor: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.gamma(4.0, 1.0, (2, num_rounds, runs)).tolist()
    there, back = paired_latency(a, b), paired_latency(b, a)
    assert there["ratio"] == pytest.approx(1 / back["ratio"])
    plain = math.prod(median(y) / median(x) for x, y in zip(a, b, strict=True)) ** (1 / num_rounds)
    assert there["ratio"] == pytest.approx(plain)
    assert there["ci95"][0] <= there["ratio"] <= there["ci95"][1]
    scaled = paired_latency((np.array(a) * factor).tolist(), b)
    np.testing.assert_allclose(np.array(scaled["ci95"]) * factor, there["ci95"], rtol=1e-9)
    assert paired_latency(a, b) == there


def test_rounds_that_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        paired_latency([[1.0]] * 2, [[1.0]] * 2)
    with pytest.raises(ValueError, match="Got 3 and 4 rounds"):
        paired_latency([[1.0]] * 3, [[1.0]] * 4)
    assert p50_interval([[1.0, 2.0]] * 2) is None


def test_the_interval_holds_the_p50_whatever_the_rounds() -> None:
    for rounds in ([[1.0]] * 9 + [[50.0]], [[1.0, 1.1], [1.0, 9.0], [1.0, 1.2]], [[2.0]] * 4):
        interval = p50_interval(rounds)
        assert interval is not None
        assert interval[0] <= median(value for part in rounds for value in part) <= interval[1]


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_against_the_sum_of_binomials(lost: int, won: int) -> None:
    total = lost + won
    tail = sum(math.comb(total, i) for i in range(min(lost, won) + 1)) / 2**total
    assert mcnemar_p(lost, won) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_of_many_images() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(20_000, 20_000) == 1.0
    assert 0 <= mcnemar_p(0, 5000) < 1e-300


def test_the_paired_interval_of_newcombe() -> None:
    # Newcombe (1998), table II, first column, method 10.
    assert paired_difference_interval(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    turned = paired_difference_interval(36, 2, 12, 0)
    assert turned == pytest.approx((-0.3404, -0.0569), abs=1e-4)


@given(*[st.integers(0, 60)] * 4)
def test_the_paired_interval_holds_the_difference(both: int, first: int, second: int, neither: int) -> None:
    n = both + first + second + neither
    if n:
        low, high = paired_difference_interval(both, first, second, neither)
        assert -1 <= low <= (first - second) / n <= high <= 1
        assert low < high


def test_the_interval_of_the_drop_covers_it() -> None:
    rng = np.random.default_rng(0)
    n, simulations, covered = 500, 1000, 0
    for _ in range(simulations):
        labels = rng.integers(0, 10, n)
        reference = np.where(rng.random(n) < 0.85, labels, (labels + 1) % 10)
        hit = rng.random(n)
        predictions = np.where((reference == labels) & (hit < 0.04), (labels + 2) % 10, reference)
        predictions = np.where((reference != labels) & (hit < 0.06), labels, predictions)
        low, high = paired_top1(labels, predictions, reference)["ci95"]
        covered += low <= 100 * (0.85 * 0.04 - 0.15 * 0.06) <= high
    assert 0.93 <= covered / simulations <= 0.985


def test_paired_top1_by_counting() -> None:
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 7])
    reference = np.array([0, 1, 2, 3, 4, 0, 0, 0])  # 5 right
    predictions = np.array([9, 9, 9, 3, 4, 5, 0, 1])  # loses 3, wins 1
    result = paired_top1(labels, predictions, reference)
    assert result["discordant"] == [3, 1]
    assert result["top1_drop_points"] == pytest.approx(25.0)
    assert result["mcnemar_p"] == pytest.approx(2 * (1 + 4) / 16)
    assert paired_top1(labels, reference, reference)["top1_drop_points"] == 0
