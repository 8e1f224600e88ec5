import math

import numpy as np
import pytest

from midge.train.schedules import cosine, warmup_constant, warmup_cosine


def test_cosine_equals_the_formula():
    got = cosine(0.996, 1.0, 50)
    expected = [1.0 + 0.5 * (0.996 - 1.0) * (1 + math.cos(math.pi * step / 50)) for step in range(50)]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-15)
    assert (got[0], len(got)) == (0.996, 50)
    assert np.all(np.diff(got) > 0)


def test_warmup_ends_at_the_peak_and_the_cosine_starts_there():
    got = warmup_cosine(0.1, 2.0, 0.5, warmup_steps=20, steps=100)
    assert len(got) == 100
    assert (got[0], got[19], got[20]) == pytest.approx((0.1, 2.0, 2.0))
    np.testing.assert_allclose(np.diff(got[:20]), (2.0 - 0.1) / 19)
    expected = [0.5 + 0.5 * 1.5 * (1 + math.cos(math.pi * step / 80)) for step in range(80)]
    np.testing.assert_allclose(got[20:], expected)


def test_a_run_that_ends_within_its_warmup():
    assert np.array_equal(warmup_cosine(0, 1, 0, 101, 11), np.linspace(0, 0.1, 11))
    assert np.array_equal(warmup_constant(0, 1, 101, 11), np.linspace(0, 0.1, 11))


def test_no_warmup():
    assert np.array_equal(warmup_cosine(5, 1, 0, 0, 10), cosine(1, 0, 10))
    assert np.array_equal(warmup_constant(0.04, 0.07, 0, 3), [0.07] * 3)


def test_warmup_then_constant():
    got = warmup_constant(0.04, 0.07, 4, 6)
    np.testing.assert_allclose(got, [0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
