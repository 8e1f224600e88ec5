"""Each operator of the reference interpreter against torch's, on random shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from midge.runtime.coreml_ops import OPS

RNG = np.random.default_rng(0)
SIDES = st.integers(1, 3)


def numbers(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def close(given: Any, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert isinstance(given, np.ndarray)
    assert given.dtype == np.float32
    assert given.shape == tuple(expected.shape)
    np.testing.assert_allclose(given, expected.numpy(), rtol=tolerance, atol=tolerance)


def t(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    multiplier=st.integers(1, 3),
    kernel=st.tuples(SIDES, SIDES),
    strides=st.tuples(SIDES, SIDES),
    dilations=st.tuples(SIDES, SIDES),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    sides=st.tuples(st.integers(7, 10), st.integers(7, 10)),
    with_bias=st.booleans(),
)
def test_conv(
    groups: int,
    per_group: int,
    multiplier: int,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: tuple[int, int, int, int],
    sides: tuple[int, int],
    with_bias: bool,
) -> None:
    x, weight = numbers(2, groups * per_group, *sides), numbers(groups * multiplier, per_group, *kernel)
    bias = numbers(groups * multiplier) if with_bias else None
    result = OPS["conv"](
        x=x,
        weight=weight,
        bias=bias,
        strides=np.array(strides),
        dilations=np.array(dilations),
        pad_type="custom",
        pad=np.array(pads),
        groups=np.int32(groups),
    )
    padded = functional.pad(t(x), (pads[2], pads[3], pads[0], pads[1]))
    expected = functional.conv2d(padded, t(weight), None if bias is None else t(bias), strides, 0, dilations, groups)
    close(result, expected, 2e-5)


@pytest.mark.parametrize("side", [5, 6, 7, 8])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_conv_same_has_the_side_over_the_step_and_pads_the_more_at_its_end(side: int, step: int) -> None:
    x, weight = numbers(1, 2, side, side), numbers(3, 2, 4, 4)
    outputs = -(-side // step)
    total = max((outputs - 1) * step + 4 - side, 0)
    for pad_type, before in (("same", total // 2), ("same_lower", total - total // 2)):
        result = OPS["conv"](x=x, weight=weight, strides=np.array([step, step]), pad_type=pad_type)
        padded = functional.pad(t(x), (before, total - before) * 2)
        close(result, functional.conv2d(padded, t(weight), stride=step), 2e-5)
        assert result.shape[2:] == (outputs, outputs)


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(2, 3), st.integers(2, 3)),
    strides=st.tuples(SIDES, SIDES),
    pads=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    sides=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    ceil_mode=st.booleans(),
    exclude=st.booleans(),
)
def test_pools(
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int],
    sides: tuple[int, int],
    ceil_mode: bool,
    exclude: bool,
) -> None:
    x = numbers(2, 3, *sides)
    arguments = {
        "x": x,
        "kernel_sizes": np.array(kernel),
        "strides": np.array(strides),
        "pad_type": "custom",
        "pad": np.repeat(pads, 2),
        "ceil_mode": ceil_mode,
    }
    close(OPS["max_pool"](**arguments), functional.max_pool2d(t(x), kernel, strides, pads, 1, ceil_mode))
    close(
        OPS["avg_pool"](**arguments, exclude_padding_from_average=exclude),
        functional.avg_pool2d(t(x), kernel, strides, pads, ceil_mode, not exclude),
    )


X = numbers(2, 3, 4, 5)
Y = numbers(3, 1, 5)
POSITIVE = np.abs(X) + 0.1

ALIKE = [
    ("relu", {"x": X}, functional.relu(t(X))),
    ("relu6", {"x": 5 * X}, functional.relu6(5 * t(X))),
    ("leaky_relu", {"x": X, "alpha": 0.1}, functional.leaky_relu(t(X), 0.1)),
    ("clip", {"x": X, "alpha": -0.5, "beta": 0.25}, t(X).clamp(-0.5, 0.25)),
    ("sigmoid", {"x": 40 * X}, torch.sigmoid(40 * t(X))),
    ("sigmoid_hard", {"x": X, "alpha": 1 / 6, "beta": 0.5}, functional.hardsigmoid(t(X))),
    ("silu", {"x": X}, functional.silu(t(X))),
    ("tanh", {"x": X}, torch.tanh(t(X))),
    ("gelu", {"x": 2 * X, "mode": "EXACT"}, functional.gelu(2 * t(X))),
    ("gelu", {"x": 2 * X, "mode": "TANH_APPROXIMATION"}, functional.gelu(2 * t(X), approximate="tanh")),
    ("gelu", {"x": X, "mode": "SIGMOID_APPROXIMATION"}, t(X) * torch.sigmoid(1.702 * t(X))),
    ("softmax", {"x": 50 * X, "axis": 1}, functional.softmax(50 * t(X), 1)),
    ("add", {"x": X, "y": Y}, t(X) + t(Y)),
    ("sub", {"x": X, "y": Y}, t(X) - t(Y)),
    ("mul", {"x": X, "y": Y}, t(X) * t(Y)),
    ("real_div", {"x": X, "y": POSITIVE}, t(X) / t(POSITIVE)),
    ("maximum", {"x": X, "y": Y}, torch.maximum(t(X), t(Y))),
    ("minimum", {"x": X, "y": Y}, torch.minimum(t(X), t(Y))),
    ("reduce_mean", {"x": X, "axes": np.array([-1, -2]), "keep_dims": True}, t(X).mean((2, 3), keepdim=True)),
    ("reduce_sum", {"x": X, "axes": np.array([1])}, t(X).sum(1)),
    ("reduce_max", {"x": X, "axes": np.array([0, 3])}, t(X).amax((0, 3))),
    ("reshape", {"x": X, "shape": np.array([6, -1])}, t(X).reshape(6, -1)),
    ("transpose", {"x": X, "perm": np.array([0, 2, 3, 1])}, t(X).permute(0, 2, 3, 1)),
    ("squeeze", {"x": X[:1, :, :1], "axes": np.array([0])}, t(X[0, :, :1])),
    ("expand_dims", {"x": X, "axes": np.array([0, 2])}, t(X)[None, :, None]),
    ("concat", {"values": (X, 2 * X), "axis": np.int32(-1)}, torch.cat([t(X), 2 * t(X)], -1)),
    (
        "pad",
        {"x": X, "pad": np.array([1, 0, 0, 2]), "constant_val": 0.5},
        functional.pad(t(X), (0, 2, 1, 0), value=0.5),
    ),
    ("identity", {"x": X}, t(X)),
]


@pytest.mark.parametrize(("name", "arguments", "expected"), ALIKE)
def test_the_others(name: str, arguments: dict[str, Any], expected: torch.Tensor) -> None:
    close(OPS[name](**arguments), expected)


def test_matrix_products() -> None:
    weight, bias, y = numbers(7, 5), numbers(7), numbers(3, 6, 5)
    close(OPS["linear"](x=X, weight=weight, bias=bias), functional.linear(t(X), t(weight), t(bias)), 1e-5)
    close(OPS["linear"](x=X, weight=weight), functional.linear(t(X), t(weight)), 1e-5)
    close(OPS["matmul"](x=X, y=y, transpose_y=True), t(X) @ t(y).transpose(-1, -2), 1e-5)
    close(OPS["matmul"](x=X, y=numbers(4, 2) * 0, transpose_x=True), torch.zeros(2, 3, 5, 2))


def test_normalizations() -> None:
    gamma, beta = numbers(4, 5), numbers(4, 5)
    close(
        OPS["layer_norm"](x=X, axes=np.array([2, 3]), gamma=gamma, beta=beta, epsilon=1e-3),
        functional.layer_norm(t(X), (4, 5), t(gamma), t(beta), 1e-3),
        1e-5,
    )
    mean, variance, scale, shift = numbers(3), POSITIVE[0, :, 0, 0].copy(), numbers(3), numbers(3)
    close(
        OPS["batch_norm"](x=X, mean=mean, variance=variance, gamma=scale, beta=shift, epsilon=1e-3),
        functional.batch_norm(t(X), t(mean), t(variance), t(scale), t(shift), eps=1e-3),
        1e-5,
    )


def test_parts() -> None:
    for arguments in ({"num_splits": 3}, {"split_sizes": np.array([1, 1, 1])}):
        parts = OPS["split"](x=X, axis=np.int32(1), **arguments)
        assert [part.tolist() for part in parts] == [part.tolist() for part in t(X).split(1, 1)]
    flags = {"begin_mask": [True, False, False, False], "end_mask": [False, False, True, False]}
    part = OPS["slice_by_index"](
        x=X,
        begin=np.array([1, 1, 1, 0]),
        end=np.array([2, 2, 2, -1]),
        stride=np.array([1, 1, 2, 3]),
        squeeze_mask=[False, True, False, False],
        **flags,
    )
    assert part.tolist() == X[:2, 1, 1::2, 0:-1:3].tolist()
    assert OPS["cast"](x=np.array([1.7, -1.7], np.float32), dtype="int32").tolist() == [1, -1]
    assert OPS["cast"](x=np.array([2], np.int32), dtype="fp16").dtype == np.float32


def test_quantization() -> None:
    scales, zero_points = np.array([0.1, 0.02, 0.3], np.float32), np.array([3, 128, 255], np.uint8)
    levels = OPS["quantize"](input=X, scale=scales, zero_point=zero_points, axis=np.int32(1), output_dtype="uint8")
    expected = torch.fake_quantize_per_channel_affine(t(X), t(scales), t(zero_points.astype(np.int32)), 1, 0, 255)
    assert levels.dtype == np.uint8
    close(OPS["dequantize"](input=levels, scale=scales, zero_point=zero_points, axis=np.int32(-3)), expected)
    halves = OPS["quantize"](
        input=np.array([0.5, 1.5, -2.5, 200], np.float32), scale=np.float32(1), output_dtype="int8"
    )
    assert halves.tolist() == [0, 2, -2, 127]  # half to even, and clipped


def test_stored_weights() -> None:
    levels, scales = RNG.integers(-127, 128, (6, 4), np.int8), np.array([1, 2, 3, 4, 5, 6], np.float32)
    affine = OPS["constexpr_affine_dequantize"](
        quantized_data=levels, zero_point=np.array([1] * 6, np.int8), scale=scales, axis=np.int32(0)
    )
    assert np.array_equal(affine, (levels.astype(np.float32) - 1) * scales[:, None])
    blocks, offsets = numbers(3, 2), np.array([[1, 2], [3, 4], [5, 6]], np.int8)
    blockwise = OPS["constexpr_blockwise_shift_scale"](data=levels, scale=blocks, offset=offsets)
    for row, column in np.ndindex(6, 4):
        block = (row // 2, column // 2)
        assert blockwise[row, column] == (np.float32(levels[row, column]) - offsets[block]) * blocks[block]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("conv", {"x": X, "weight": numbers(4, 2, 1, 1)}),
        ("conv", {"x": X, "weight": numbers(4, 3, 1, 1), "pad_type": "valid", "strides": np.array([0, 1])}),
        ("conv", {"x": X, "weight": numbers(4, 3, 1, 1), "pad_type": "custom", "pad": np.array([0, 0, -1, 0])}),
        ("conv", {"x": X, "weight": numbers(4, 3, 1, 1), "pad_type": "custom", "pad": np.array([1 << 20] * 4)}),
        ("conv", {"x": X, "weight": numbers(4, 3, 5, 6)}),
        ("conv", {"x": X, "weight": numbers(4, 3, 1, 1), "pad_type": "mirror"}),
        ("max_pool", {"x": X[0], "kernel_sizes": np.array([1, 1])}),
        ("add", {"x": np.zeros((1 << 15, 1), np.float32), "y": np.zeros((1, 1 << 15), np.float32)}),
        ("matmul", {"x": np.zeros((1 << 15, 1), np.float32), "y": np.zeros((1, 1 << 15), np.float32)}),
        ("split", {"x": X, "axis": 1, "split_sizes": np.array([1, 1])}),
        ("gelu", {"x": X, "mode": "OTHER"}),
        ("pad", {"x": X, "pad": np.array([1, 1]), "mode": "reflect"}),
        ("quantize", {"input": X, "scale": np.float32(1), "output_dtype": "int4"}),
        (
            "constexpr_blockwise_shift_scale",
            {"data": np.array([[1, 2, 3]], np.int8), "scale": np.array([[1, 2]], np.float32)},
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        OPS[name](**arguments)
