from __future__ import annotations

import json
import math

import numpy as np
import pytest

from midge.runtime.parity import Parity, compare_outputs


def float32(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_equal_outputs() -> None:
    outputs = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    parity = compare_outputs(outputs, outputs)
    assert parity.cosine_min == pytest.approx(1, abs=1e-12)
    assert (parity.max_abs_error, parity.top1_agreement, parity.n) == (0, 1, 7)


def test_against_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    reference = rng.normal(size=(40, 6)).astype(np.float32)
    outputs = reference + rng.normal(scale=0.6, size=(40, 6)).astype(np.float32)
    cosines, agreed, worst = [], 0, 0.0
    for given, expected in zip(outputs.tolist(), reference.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(given, expected, strict=True))
        cosines.append(dot / math.hypot(*given) / math.hypot(*expected))
        agreed += given.index(max(given)) == expected.index(max(expected))
        worst = max(worst, *(abs(a - b) for a, b in zip(given, expected, strict=True)))
    parity = compare_outputs(outputs, reference)
    assert 0 < agreed < 40
    assert parity.cosine_min == pytest.approx(min(cosines))
    assert parity.cosine_mean == pytest.approx(sum(cosines) / 40)
    assert parity.max_abs_error == pytest.approx(worst)
    assert parity.top1_agreement == agreed / 40


def test_a_common_scale_changes_the_error_and_nothing_else() -> None:
    reference = float32([1, 2, 3], [3, 2, 1])
    parity = compare_outputs(2 * reference, reference)
    assert parity.cosine_min == pytest.approx(1)
    assert (parity.max_abs_error, parity.top1_agreement) == (3, 1)


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_extreme_magnitudes_do_not_vanish(scale: float) -> None:
    parity = compare_outputs(float32([scale, scale]), float32([scale, 0]))
    assert parity.cosine_min == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("swap", [False, True])
def test_what_is_not_finite_is_the_worst(bad: float, swap: bool) -> None:
    pair = [float32([1, 2], [bad, 2]), float32([1, 2], [1, 2])]
    parity = compare_outputs(*(reversed(pair) if swap else pair))
    assert parity.cosine_min == -1
    assert parity.cosine_mean == pytest.approx(0)
    assert parity.max_abs_error is None
    assert (parity.top1_agreement, parity.n) == (0.5, 2)
    json.dumps(parity.to_json(), allow_nan=False)


def test_zero_vectors() -> None:
    zero, other = float32([0, 0]), float32([0, 1])
    assert compare_outputs(zero, zero).cosine_min == 1
    assert compare_outputs(zero, other).cosine_min == 0
    assert compare_outputs(other, zero).cosine_min == 0


def test_one_output_always_agrees_but_its_sign_shows() -> None:
    parity = compare_outputs(float32([2], [-1]), float32([1], [1]))
    assert (parity.top1_agreement, parity.cosine_min, parity.max_abs_error) == (1, -1, 2)


@pytest.mark.parametrize(
    "shapes", [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((3,), (3,)), ((0, 3), (0, 3)), ((2, 0), (2, 0))]
)
def test_other_shapes(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    given, expected = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(ValueError, match="both must be"):
        compare_outputs(given, expected)


def test_to_json() -> None:
    parity = Parity(0.9, 0.95, 0.5, 1.0, 3)
    expected = {"cosine_min": 0.9, "cosine_mean": 0.95, "max_abs_error": 0.5, "top1_agreement": 1.0, "n": 3}
    assert parity.to_json() == expected
