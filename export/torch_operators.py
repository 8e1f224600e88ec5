"""The ONNX operators of image networks, in torch: one table, operator -> function of its attributes and inputs.

What they compute is defined in the ONNX standard's ``docs/Operators.md``; forms of opsets 11 to 21 are read. All are
differentiable in their floating-point inputs, apart from those that quantize.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..runtime.errors import UserError

Attributes = Mapping[str, Any]
Operator = Callable[..., Any]
"""(attributes, *inputs; None where one is left out) -> the output, or a tuple of the outputs."""

# Of ONNX's TensorProto.DataType.
DTYPES = {
    **{1: torch.float32, 2: torch.uint8, 3: torch.int8, 6: torch.int32, 7: torch.int64},
    **{9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16},
}
CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def ints(values: Tensor | Sequence[int] | None) -> list[int] | None:
    """What an operator takes as an attribute in old opsets and as an input in later ones."""
    if values is None:
        return None
    return [int(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]


def padding(attributes: Attributes, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Padding of a convolution or pooling as ``functional.pad`` takes it: the last dimension first, start and end.

    Args:
        attributes: of the node.
        sizes: of the input's spatial dimensions.
        kernel: of the window.
    """
    dims = len(sizes)
    mode = attributes.get("auto_pad", b"NOTSET").decode()
    if mode in {"SAME_UPPER", "SAME_LOWER"}:
        strides, dilations = attributes.get("strides", [1] * dims), attributes.get("dilations", [1] * dims)
        starts, ends = [], []
        for size, side, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            total = max(0, (math.ceil(size / stride) - 1) * stride + dilation * (side - 1) + 1 - size)
            small, large = total // 2, total - total // 2
            starts.append(small if mode == "SAME_UPPER" else large)
            ends.append(large if mode == "SAME_UPPER" else small)
    else:
        pads = [0] * 2 * dims if mode == "VALID" else attributes.get("pads", [0] * 2 * dims)
        starts, ends = pads[:dims], pads[dims:]
    return [side for start, end in zip(reversed(starts), reversed(ends), strict=True) for side in (start, end)]


def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dims = weight.ndim - 2
    pads = padding(attributes, x.shape[2:], weight.shape[2:])
    symmetric = pads[::2] == pads[1::2]
    if not symmetric:
        x = functional.pad(x, pads)
    return CONVOLUTIONS[dims](
        x,
        weight,
        bias,
        stride=attributes.get("strides", [1] * dims),
        padding=pads[::-2] if symmetric else 0,
        dilation=attributes.get("dilations", [1] * dims),
        groups=attributes.get("group", 1),
    )


def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    pads = padding(attributes, x.shape[2:], kernel)
    if any(pads):
        x = functional.pad(x, pads, value=-math.inf)
    return MAX_POOLS[len(kernel)](
        x,
        kernel,
        stride=attributes.get("strides", [1] * len(kernel)),
        dilation=attributes.get("dilations", [1] * len(kernel)),
        ceil_mode=bool(attributes.get("ceil_mode", 0)),
    )


def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    kernel = attributes["kernel_shape"]
    strides = attributes.get("strides", [1] * len(kernel))
    if len(kernel) != 2 or any(side != 1 for side in attributes.get("dilations", ())):
        raise UserError("The operator 'AveragePool' is read over two dimensions and without dilation only.")
    pads, ceil = padding(attributes, x.shape[2:], kernel), bool(attributes.get("ceil_mode", 0))
    pooled = functional.avg_pool2d(functional.pad(x, pads), kernel, strides, ceil_mode=ceil)
    if attributes.get("count_include_pad", 0) or not any(pads):
        return pooled
    return pooled / functional.avg_pool2d(functional.pad(torch.ones_like(x), pads), kernel, strides, ceil_mode=ceil)


def _clip(attributes: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is None and high is None:
        return x
    if low is None or high is None:
        return torch.clamp(x, low, high)
    return functional.hardtanh(x, float(low), float(high))  # one pass each way, where clamp's backward pass takes six


def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if attributes.get("transA", 0) else a
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    if attributes.get("transB", 0) and alpha == beta == 1 and (c is None or c.ndim == 1):
        return functional.linear(a, b, c)
    product = alpha * (a @ (b.T if attributes.get("transB", 0) else b))
    return product if c is None else product + beta * c


def _divide(attributes: Attributes, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def reduce_with(function: Callable[..., Tensor]) -> Operator:
    """An operator that reduces over given dimensions, or over all."""

    def reduce(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = ints(attributes.get("axes") if axes is None else axes)
        if not dims and attributes.get("noop_with_empty_axes", 0):
            return x
        return function(x, dim=dims or list(range(x.ndim)), keepdim=bool(attributes.get("keepdims", 1)))

    return reduce


def _flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _reshape(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sides = [int(side) for side in shape.tolist()]
    if not attributes.get("allowzero", 0):
        sides = [x.shape[dim] if side == 0 else side for dim, side in enumerate(sides)]
    return x.reshape(sides)


def _transpose(attributes: Attributes, x: Tensor) -> Tensor:
    return x.permute(attributes.get("perm", list(range(x.ndim))[::-1]))


def _layer_normalization(attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.layer_norm(x, x.shape[attributes.get("axis", -1) :], scale, bias, attributes.get("epsilon", 1e-5))


def _batch_normalization(
    attributes: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    factor = scale / (variance + attributes.get("epsilon", 1e-5)).sqrt()
    shape = (-1, *[1] * (x.ndim - 2))
    return x * factor.view(shape) + (bias - mean * factor).view(shape)


def _split(attributes: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, given = attributes.get("axis", 0), ints(attributes.get("split") if sizes is None else sizes)
    return x.split(given or math.ceil(x.shape[axis] / attributes["num_outputs"]), dim=axis)


def _slice(
    attributes: Attributes,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = starts.tolist(), ends.tolist()
    strides = ints(steps) or [1] * len(first)
    if min(strides) < 1:
        raise UserError("The operator 'Slice' is read with positive steps only.")
    for axis, start, end, step in zip(ints(axes) or range(len(first)), first, last, strides, strict=True):
        parts = [slice(None)] * x.ndim
        parts[axis] = slice(start, end, step)
        x = x[tuple(parts)]
    return x


def _squeeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = ints(attributes.get("axes") if axes is None else axes)
    return x.squeeze() if dims is None else x.squeeze(dims)


def _unsqueeze(attributes: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    dims = ints(attributes.get("axes") if axes is None else axes) or []
    for dim in sorted(dim % (x.ndim + len(dims)) for dim in dims):
        x = x.unsqueeze(dim)
    return x


def _expand(attributes: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(tuple(x.shape), shape.tolist()))


def _gather(attributes: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = attributes.get("axis", 0)
    if indices.ndim == 0:
        return x.select(axis, int(indices))
    axis %= x.ndim
    taken = x.index_select(axis, (indices % x.shape[axis]).flatten())
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _pad(
    attributes: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    sides = [[0, 0] for _ in range(x.ndim)]
    dims, given = ints(axes) or list(range(x.ndim)), pads.tolist()
    for dim, start, end in zip(dims, given[: len(dims)], given[len(dims) :], strict=True):
        sides[dim] = [start, end]
    while len(sides) > 1 and sides[0] == [0, 0]:
        sides.pop(0)
    flat = [side for both in reversed(sides) for side in both]
    mode = attributes.get("mode", b"constant").decode()
    if mode == "constant":
        return functional.pad(x, flat, value=float(value or 0))
    return functional.pad(x, flat, "replicate" if mode == "edge" else mode)


def along(axis: int, x: Tensor, values: Tensor) -> Tensor:
    """Scales or zero points, () or (C,), in the shape in which they apply to dimension ``axis`` of ``x``."""
    if values.numel() == 1:
        return values.reshape(())
    return values.view([-1 if dim == axis % x.ndim else 1 for dim in range(x.ndim)])


def _quantize_linear(attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    axis = attributes.get("axis", 1)
    dtype = torch.uint8 if zero_point is None else zero_point.dtype
    shift = 0 if zero_point is None else along(axis, x, zero_point).float()
    info = torch.iinfo(dtype)
    # torch.round rounds half to even, as the standard has it.
    return (torch.round(x / along(axis, x, scale)) + shift).clamp(info.min, info.max).to(dtype)


def _dequantize_linear(attributes: Attributes, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    axis = attributes.get("axis", 1)
    shift = 0 if zero_point is None else along(axis, x, zero_point).int()
    return (x.int() - shift).to(scale.dtype) * along(axis, x, scale)


def elementwise(function: Callable[..., Tensor]) -> Operator:
    """An operator without attributes."""
    return lambda attributes, *inputs: function(*inputs)


OPERATORS: dict[str, Operator] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": elementwise(torch.matmul),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda _, x: x.mean(dim=list(range(2, x.ndim)), keepdim=True),
    "BatchNormalization": _batch_normalization,
    "LayerNormalization": _layer_normalization,
    "Softmax": lambda attributes, x: x.softmax(attributes.get("axis", -1)),
    "Relu": elementwise(functional.relu),
    "LeakyRelu": lambda attributes, x: functional.leaky_relu(x, attributes.get("alpha", 0.01)),
    "PRelu": elementwise(lambda x, slope: torch.where(x < 0, slope * x, x)),
    "Clip": _clip,
    "Sigmoid": elementwise(torch.sigmoid),
    "HardSigmoid": lambda attributes, x: (attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": elementwise(functional.hardswish),
    "Gelu": lambda attributes, x: functional.gelu(x, approximate=attributes.get("approximate", b"none").decode()),
    **{name: elementwise(getattr(torch, name.lower())) for name in ("Erf", "Tanh", "Exp", "Log", "Sqrt", "Abs", "Neg")},
    **{name: elementwise(getattr(torch, name.lower())) for name in ("Reciprocal", "Pow", "Floor", "Where", "Equal")},
    "Add": elementwise(torch.add),
    "Sub": elementwise(torch.sub),
    "Mul": elementwise(torch.mul),
    "Div": _divide,
    "Min": elementwise(torch.minimum),
    "Max": elementwise(torch.maximum),
    "ReduceMean": reduce_with(torch.mean),
    "ReduceSum": reduce_with(torch.sum),
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Concat": lambda attributes, *inputs: torch.cat(inputs, dim=attributes["axis"]),
    "Split": _split,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Gather": _gather,
    "Pad": _pad,
    "Shape": lambda attributes, x: torch.tensor(tuple(x.shape)[attributes.get("start", 0) : attributes.get("end")]),
    "Cast": lambda attributes, x: x.to(DTYPES[attributes["to"]]),
    "Identity": lambda _, x: x,
    "QuantizeLinear": _quantize_linear,
    "DequantizeLinear": _dequantize_linear,
}
