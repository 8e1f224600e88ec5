"""The Wilson interval against its defining equation and published values."""

from __future__ import annotations

import math

import pytest

from midge.runtime.proportions import Z_95, accuracy_json, wilson_interval


@pytest.mark.parametrize(("correct", "total"), [(1, 3), (50, 100), (8700, 10_000), (9_999, 10_000)])
def test_the_ends_are_where_the_score_test_turns(correct: int, total: int):
    """Each end p solves |share - p| = z * sqrt(p (1 - p) / total)."""
    share = correct / total
    low, high = wilson_interval(correct, total)
    assert 0 < low < share < high < 1
    for end in (low, high):
        assert math.isclose(abs(share - end), Z_95 * math.sqrt(end * (1 - end) / total), rel_tol=1e-9)


def test_published_values():
    # Newcombe (1998), table I, method 3
    for correct, total, expected in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0.0, 0.1611))):
        assert wilson_interval(correct, total) == pytest.approx(expected, abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1.0


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (-1, 5), (6, 5)])
def test_no_proportion(correct: int, total: int):
    with pytest.raises(ValueError, match="No proportion"):
        wilson_interval(correct, total)


def test_fields_of_an_accuracy():
    assert accuracy_json(3, 4) == {"top1": 0.75, "correct": 3, "n": 4, "ci95": list(wilson_interval(3, 4))}
