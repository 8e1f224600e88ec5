"""Convolution and pooling of ML Programs in NumPy, by strided views of the padded input and one matrix product."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .coreml_program import MAX_ELEMENTS

Array = np.ndarray
Pair = tuple[int, int]


class Grid(NamedTuple):
    """How a kernel goes over two axes.

    Attributes:
        kernel: its sides.
        strides: steps between positions.
        dilations: steps between its own points.
        pads: (before, after) of each axis.
        spans: sides of what it covers, gaps and all.
    """

    kernel: Pair
    strides: Pair
    dilations: Pair
    pads: tuple[Pair, Pair]
    spans: Pair


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: Any = 1,
) -> Array:
    """Convolution of two axes: x (N, C, H, W), weight (out, C / groups, KH, KW)."""
    batch, channels = x.shape[:2]
    out, per_group = weight.shape[:2]
    groups = int(groups)
    if weight.ndim != 4 or groups < 1 or per_group * groups != channels or out % groups:
        raise ValueError(f"the weight {weight.shape} in {groups} groups does not fit the input {x.shape}")
    grid = _grid(x.shape, weight.shape[2:], strides, pad_type, pad, dilations)
    padded = _padded(x, grid.pads, 0)
    if per_group == 1:
        result = _depthwise(padded, weight, grid)
    else:
        windows = _windows(padded, grid)  # (N, C, OH, OW, KH, KW)
        sides = windows.shape[2:4]
        columns = windows.transpose(0, 1, 4, 5, 2, 3).reshape(batch, groups, -1, math.prod(sides))
        result = (weight.reshape(groups, out // groups, -1) @ columns).reshape(batch, out, *sides)
    return result if bias is None else result + bias[:, None, None]


def max_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    ceil_mode: Any = False,
) -> Array:
    """The largest value of each window; what is padded is none."""
    grid = _grid(x.shape, kernel_sizes, strides, pad_type, pad, ceil_mode=bool(ceil_mode))
    return _windows(_padded(x, grid.pads, -np.inf), grid).max(axis=(4, 5))


def avg_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
) -> Array:
    """The mean of each window, with padded zeros unless they are excluded; what ``ceil_mode`` adds never counts."""
    plain = _grid(x.shape, kernel_sizes, strides, pad_type, pad)
    grid = _grid(x.shape, kernel_sizes, strides, pad_type, pad, ceil_mode=bool(ceil_mode))
    counted = np.ones((1, 1, *x.shape[2:]), np.float32)
    counted = _padded(counted, plain.pads, 0 if exclude_padding_from_average else 1)
    added = tuple((0, after - before) for (_, after), (_, before) in zip(grid.pads, plain.pads, strict=True))
    counts = _windows(_padded(counted, added, 0), grid).sum(axis=(4, 5))
    return _windows(_padded(x, grid.pads, 0), grid).sum(axis=(4, 5)) / counts


def _grid(
    shape: tuple[int, ...],
    kernel: Any,
    strides: Array | None,
    pad_type: str,
    pad: Array | None,
    dilations: Array | None = None,
    ceil_mode: bool = False,
) -> Grid:
    """The grid of an operator on an input (N, C, H, W)."""
    if len(shape) != 4:
        raise ValueError(f"the input {shape} has {len(shape)} axes: only (N, C, H, W) is known")
    sides, steps, gaps = (_pair(values) for values in (kernel, strides, dilations))
    spans = (gaps[0] * (sides[0] - 1) + 1, gaps[1] * (sides[1] - 1) + 1)
    if pad_type == "custom":
        flat = [0] * 4 if pad is None else [int(value) for value in pad]
        pads = [(flat[0], flat[1]), (flat[2], flat[3])]
    elif pad_type == "valid":
        pads = [(0, 0), (0, 0)]
    elif pad_type in ("same", "same_lower"):
        pads = [_same(*axis, lower=pad_type == "same_lower") for axis in zip(shape[2:], spans, steps, strict=True)]
    else:
        raise ValueError(f"the pad type {pad_type!r} is not known")
    if min(map(min, pads)) < 0:
        raise ValueError(f"the padding {pads} is negative")
    if ceil_mode:
        pads = [_ceil(*axis) for axis in zip(shape[2:], spans, steps, pads, strict=True)]
    return Grid(sides, steps, gaps, (pads[0], pads[1]), spans)


def _pair(values: Any) -> Pair:
    first, second = (1, 1) if values is None else (int(value) for value in values)
    if min(first, second) < 1:
        raise ValueError(f"{first}, {second} must both be at least 1")
    return first, second


def _same(side: int, span: int, step: int, lower: bool) -> Pair:
    """Padding that gives an output of the input's side over the step, rounded up."""
    total = max(span + (math.ceil(side / step) - 1) * step - side, 0)
    half = total // 2
    return (total - half, half) if lower else (half, total - half)


def _ceil(side: int, span: int, step: int, pads: Pair) -> Pair:
    """More padding after, so that one more window fits, where that one begins before the padding after the input."""
    before, after = pads
    length = side + before + after
    windows = math.ceil((length - span) / step) + 1
    if (windows - 1) * step >= side + before:
        windows -= 1
    return before, after + max((windows - 1) * step + span - length, 0)


def _padded(x: Array, pads: Any, value: float) -> Array:
    if not any(map(any, pads)):
        return x
    height, width = (side + sum(pad) for side, pad in zip(x.shape[2:], pads, strict=True))
    if math.prod(x.shape[:2]) * height * width > MAX_ELEMENTS:
        raise ValueError(f"the padding {pads} gives more than {MAX_ELEMENTS} numbers")
    return np.pad(x, ((0, 0), (0, 0), *pads), constant_values=value)


def _windows(padded: Array, grid: Grid) -> Array:
    """What the kernel sees at each position, (N, C, OH, OW, KH, KW), a view."""
    windows = sliding_window_view(padded, grid.spans, axis=(2, 3))  # refuses a kernel larger than the input
    windows = windows[:, :, :: grid.strides[0], :: grid.strides[1], :: grid.dilations[0], :: grid.dilations[1]]
    if windows.size > MAX_ELEMENTS:
        raise ValueError(f"its windows {windows.shape} are more than {MAX_ELEMENTS} numbers")
    return windows


def _depthwise(padded: Array, weight: Array, grid: Grid) -> Array:
    """One input channel for each output channel, or for several in a row: a sum over the kernel's points."""
    windows = _windows(padded, grid)
    out, channels = len(weight), padded.shape[1]
    weight = weight.reshape(channels, out // channels, *grid.kernel)
    result = np.zeros((len(padded), channels, out // channels, *windows.shape[2:4]), np.float32)
    for row, column in np.ndindex(*grid.kernel):
        result += windows[:, :, None, :, :, row, column] * weight[:, :, row, column, None, None]
    return result.reshape(len(padded), out, *windows.shape[2:4])
