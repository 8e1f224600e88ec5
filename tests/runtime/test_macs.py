from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from midge.runtime.macs import convolution_macs, matmul_macs

side = st.integers(1, 7)


@given(groups=side, out_per_group=side, in_per_group=side, kernel=side, height=side, width=side)
def test_convolution_counts_each_product_once(
    groups: int, out_per_group: int, in_per_group: int, kernel: int, height: int, width: int
) -> None:
    outputs = groups * out_per_group
    expected = sum(in_per_group * kernel * kernel for _ in range(outputs * height * width))
    flat, nested = (outputs, in_per_group, kernel, kernel), (groups, out_per_group, in_per_group, kernel, kernel)
    for weight, output in itertools.product((flat, nested), ((1, outputs, height, width), (1, height, width, outputs))):
        assert convolution_macs(output, weight, outputs) == expected


@given(batch=st.lists(side, max_size=2), m=side, k=side, n=side, turn_a=st.booleans(), turn_b=st.booleans())
def test_matrix_product_with_operands_turned(
    batch: list[int], m: int, k: int, n: int, turn_a: bool, turn_b: bool
) -> None:
    a = (*batch, k, m) if turn_a else (*batch, m, k)
    b = (n, k) if turn_b else (k, n)
    output = (*batch, m, n)
    assert matmul_macs(a, b, output) == int(np.prod(batch, dtype=int)) * m * k * n


def test_vectors_and_what_is_no_product() -> None:
    assert matmul_macs((5,), (5, 3), (3,)) == 15
    assert matmul_macs((2, 5), (5,), (2,)) == 10
    assert matmul_macs((2, 5), (4, 3), (2, 3)) is None
    assert matmul_macs((2, 5), (), (2, 5)) is None
    assert matmul_macs((2, 5), (5, 3), ()) is None


@pytest.mark.parametrize("channels", [16, 24])
def test_depthwise(channels: int) -> None:
    assert convolution_macs((1, channels, 8, 8), (channels, 1, 3, 3), channels) == channels * 64 * 9
