"""The operators of ML Programs in NumPy: those that image networks and their INT8 forms are made of.

Each function takes the parameters of the MIL operator of its name, by their names, and computes in float32; what a
program types as fp16 is rounded by the caller. Names, defaults and meaning are those of coremltools' "MIL Ops"
reference (its iOS 15 to iOS 18 operator sets).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .coreml_program import DTYPES, MAX_ELEMENTS
from .coreml_windows import avg_pool, conv, max_pool

Array = np.ndarray


def _check_size(*shapes: tuple[int, ...]) -> None:
    """Refuse a result of broadcasting that would not fit the memory, before it is made."""
    if math.prod(np.broadcast_shapes(*shapes)) > MAX_ELEMENTS:
        raise ValueError(f"the shapes {shapes} broadcast to more than {MAX_ELEMENTS} numbers")


def binary(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    """An operator on two arrays that broadcast."""

    def operator(x: Array, y: Array) -> Array:
        _check_size(x.shape, y.shape)
        return function(x, y)

    return operator


def reduction(function: Callable[..., Array]) -> Callable[..., Array]:
    """An operator that takes axes away, all of them by default."""

    def operator(x: Array, axes: Array | None = None, keep_dims: Any = False) -> Array:
        return function(x, axis=None if axes is None else _ints(axes), keepdims=bool(keep_dims))

    return operator


def _ints(values: Array) -> tuple[int, ...]:
    return tuple(int(value) for value in np.ravel(values))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 0.5 * (1 + np.tanh(0.5 * x))  # which cannot overflow


def erf(x: Array) -> Array:
    """The error function within 2e-7, by Abramowitz and Stegun 7.1.26: NumPy has none."""
    size = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * size)
    series = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = t * (series + np.float32(factor))
    return np.copysign(1 - series * np.exp(-size * size), x)


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """The input times the normal distribution's share below it, or one of its two approximations."""
    if mode == "EXACT":
        return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(1.702 * x)
    raise ValueError(f"the mode {mode!r} is not known")


def softmax(x: Array, axis: Any = -1) -> Array:
    """Shares that sum to 1 along an axis."""
    powers = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return powers / powers.sum(axis=int(axis), keepdims=True)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """The input times the transpose of the weight (out, in)."""
    result = x @ weight.T
    return result if bias is None else result + bias


def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    """Matrix product of the last two axes; the others broadcast."""
    x, y = (np.swapaxes(a, -1, -2) if swap else a for a, swap in ((x, transpose_x), (y, transpose_y)))
    _check_size((*x.shape[:-2], x.shape[-2], 1), (*y.shape[:-2], 1, y.shape[-1]))
    return x @ y


def layer_norm(
    x: Array, axes: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5
) -> Array:
    """Mean 0 and variance 1 over the axes, then scaled and shifted."""
    over = _ints(axes)
    centred = x - x.mean(axis=over, keepdims=True)
    result = centred / np.sqrt((centred**2).mean(axis=over, keepdims=True) + np.float32(epsilon))
    result = result if gamma is None else result * gamma
    return result if beta is None else result + beta


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Any = 1e-5,
) -> Array:
    """Scale and shift of the channels (axis 1) by stored statistics."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    result = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + np.float32(epsilon))
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def concat(values: Sequence[Array], axis: Any, interleave: Any = False) -> Array:
    """Arrays one after the other along an axis."""
    if interleave:
        raise ValueError("interleave is not known")
    return np.concatenate(values, axis=int(axis))


def split(x: Array, axis: Any, num_splits: Any = None, split_sizes: Array | None = None) -> tuple[Array, ...]:
    """Parts of an array along an axis, of the given sizes or equal ones."""
    axis = int(axis)
    if split_sizes is None:
        return tuple(np.split(x, int(num_splits), axis=axis))
    if sum(_ints(split_sizes)) != x.shape[axis]:
        raise ValueError(f"the parts {split_sizes} do not sum to {x.shape[axis]}")
    return tuple(np.split(x, np.cumsum(split_sizes)[:-1], axis=axis))


def squeeze(x: Array, axes: Array | None = None) -> Array:
    """Without the given axes of length 1, or all of them."""
    return np.squeeze(x, None if axes is None else _ints(axes))


def slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """A part of each axis; a mask makes it start or end at the edge, or takes one position and the axis away."""
    none = [False] * x.ndim
    strides = [1] * x.ndim if stride is None else _ints(stride)
    masks = [none if mask is None else mask for mask in (begin_mask, end_mask, squeeze_mask)]
    parts = []
    for first, last, step, from_edge, to_edge, single in zip(_ints(begin), _ints(end), strides, *masks, strict=True):
        if single:
            parts.append(first)
        else:
            parts.append(slice(None if from_edge else first, None if to_edge else last, step))
    return x[tuple(parts)]


def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Any = 0.0) -> Array:  # the operator's own names
    """Constant values around the last axes."""
    if mode != "constant":
        raise ValueError(f"the mode {mode!r} is not known")
    sides = np.reshape(pad, (-1, 2))
    widths = [(0, 0)] * (x.ndim - len(sides)) + [(int(before), int(after)) for before, after in sides]
    if math.prod(side + sum(width) for side, width in zip(x.shape, widths, strict=True)) > MAX_ELEMENTS:
        raise ValueError(f"the padding {widths} gives more than {MAX_ELEMENTS} numbers")
    return np.pad(x, widths, constant_values=float(constant_val))


def cast(x: Array, dtype: str) -> Array:
    """Another type; of a float what is before its point."""
    return x.astype(np.float32 if dtype in ("fp16", "fp32") else DTYPES[dtype])


def _along(values: Array, data: Array, axis: Any) -> Array:
    """A scalar, or a vector along one axis of the data."""
    return (
        values
        if values.ndim == 0
        else values.reshape([-1 if i == int(axis) % data.ndim else 1 for i in range(data.ndim)])
    )


def quantize(input: Array, scale: Array, output_dtype: str, zero_point: Array | None = None, axis: Any = None) -> Array:
    """Integers: input over scale, rounded half to even, shifted by the zero point, clipped to the type."""
    if output_dtype not in ("int8", "uint8"):
        raise ValueError(f"the type {output_dtype!r} is not known")
    limits = np.iinfo(DTYPES[output_dtype])
    levels = np.round(input / _along(scale, input, axis))
    shift = 0 if zero_point is None else _along(zero_point, input, axis).astype(np.float32)
    return np.clip(levels + shift, limits.min, limits.max).astype(DTYPES[output_dtype])


def dequantize(input: Array, scale: Array, zero_point: Array | None = None, axis: Any = None) -> Array:
    """Numbers: the integers less the zero point, times the scale."""
    shift = 0 if zero_point is None else _along(zero_point, input, axis).astype(np.float32)
    return (input.astype(np.float32) - shift) * _along(scale, input, axis)


def constexpr_affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Any) -> Array:
    """Stored weights: as ``dequantize``."""
    return dequantize(quantized_data, scale, zero_point, axis)


def constexpr_blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """Stored weights (iOS 18): a scale and an offset for each block, whose sides are the data's over the scale's."""

    def spread(values: Array) -> Array:
        for axis, (side, blocks) in enumerate(zip(data.shape, scale.shape, strict=True)):
            if side % blocks:
                raise ValueError(f"blocks of the scale {scale.shape} do not fit the data {data.shape}")
            values = np.repeat(values, side // blocks, axis=axis)
        return values.astype(np.float32)

    return (data.astype(np.float32) - (0 if offset is None else spread(offset))) * spread(scale)


def clip(x: Array, alpha: Any, beta: Any) -> Array:
    """Nothing below ``alpha`` or above ``beta``."""
    return np.clip(x, np.float32(alpha), np.float32(beta))


OPS: dict[str, Callable[..., Any]] = {
    "identity": lambda x: x,
    "conv": conv,
    "linear": linear,
    "matmul": matmul,
    "max_pool": max_pool,
    "avg_pool": avg_pool,
    "add": binary(np.add),
    "sub": binary(np.subtract),
    "mul": binary(np.multiply),
    "real_div": binary(np.divide),
    "maximum": binary(np.maximum),
    "minimum": binary(np.minimum),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "leaky_relu": lambda x, alpha: np.where(x > 0, x, np.float32(alpha) * x),
    "clip": clip,
    "sigmoid": sigmoid,
    "sigmoid_hard": lambda x, alpha=0.2, beta=0.5: np.clip(np.float32(alpha) * x + np.float32(beta), 0, 1),
    "silu": lambda x: x * sigmoid(x),
    "tanh": lambda x: np.tanh(x),
    "gelu": gelu,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "batch_norm": batch_norm,
    "reduce_mean": reduction(np.mean),
    "reduce_sum": reduction(np.sum),
    "reduce_max": reduction(np.max),
    "reshape": lambda x, shape: x.reshape(_ints(shape)),
    "transpose": lambda x, perm: x.transpose(_ints(perm)),
    "concat": concat,
    "split": split,
    "squeeze": squeeze,
    "expand_dims": lambda x, axes: np.expand_dims(x, _ints(axes)),
    "slice_by_index": slice_by_index,
    "pad": pad,
    "cast": cast,
    "quantize": quantize,
    "dequantize": dequantize,
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_blockwise_shift_scale": constexpr_blockwise_shift_scale,
}
