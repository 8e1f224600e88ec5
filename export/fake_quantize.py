"""INT8 simulated in floating point, at the very places where a written Q/DQ graph has it, so that it can be trained.

The placement is not modelled but read off the graph that ``quantize_onnx`` writes: its QuantizeLinear nodes become
:class:`FakeQuantize` with ranges that learn, its quantized weights and biases the float ones rounded to their grids.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .ranges import Ranges
from .torch_graph import Replacement, TorchGraph

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# What ORT's quantizer appends to the names of tensors.
QUANTIZED_SUFFIX = "_quantized"
SCALE_SUFFIX = "_scale"

LIMITS = {torch.uint8: (0, 255), torch.int8: (-128, 127)}
LARGEST_WEIGHT = 127  # of a signed symmetric grid: -128 is not used


class FakeQuantize(torch.autograd.Function):
    """Round to an 8-bit grid over a range and clip to it, with gradients for the range too.

    Straight through inside of the range; the range learns by LSQ's gradient (Esser et al. 2020, "Learned Step Size
    Quantization", equation 3) in the form of LSQ+ (Bhalgat et al. 2020, section 3.1) for a grid with a zero point. With
    v = x / scale: d y / d scale is round(v) - v inside, and clipped values follow the end of the range.

    LSQ's gradient scale is left out: Adam's steps do not depend on it.
    """

    @staticmethod
    def forward(x: Tensor, low: Tensor, high: Tensor, qmin: int, qmax: int) -> Tensor:
        """The values after quantizing and dequantizing.

        Args:
            x: any shape, float32.
            low: (), lowest value of the range, at most 0.
            high: (), highest value, at least 0 and above ``low``.
            qmin: smallest integer of the grid.
            qmax: largest integer.
        """
        scale = (high - low) / (qmax - qmin)
        zero_point = int(torch.round(qmin - low / scale))
        return x.contiguous().div(scale).round_().clamp_(qmin - zero_point, qmax - zero_point).mul_(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the gradients need."""
        x, low, high, qmin, qmax = inputs
        ctx.save_for_backward(x, low, high, output)
        ctx.limits = qmin, qmax

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Gradients of x, low and high."""
        (gradient,), (x, low, high, y), (qmin, qmax) = gradients, ctx.saved_tensors, ctx.limits
        gradient, x = gradient.contiguous(), x.contiguous()
        scale = (high - low) / (qmax - qmin)
        zero_point = torch.round(qmin - low / scale)
        first, last = (((limit - zero_point) * scale).item() for limit in (qmin, qmax))
        # A mask that multiplies is turned into floats first, and that was a third of a training step. Below may be many
        # values, where a ReLU folds into the rounding; above are few, which are found by their places.
        inside = torch.where(x < first, 0.0, gradient)
        of_low = gradient.sum() - inside.sum()
        above = (x > last).view(-1).nonzero().squeeze(1)
        of_high = gradient.view(-1)[above].sum()
        inside.view(-1).index_fill_(0, above, 0.0)
        # What a longer scale does inside.
        rounding = torch.dot(inside.view(-1), (y - x).view(-1)) / scale / (qmax - qmin)
        return inside, of_low - rounding, of_high + rounding, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """Each value by itself, so a batch of images is no other case."""
        return FakeQuantize.apply(*inputs), in_dims[0]


class LearnedRanges:
    """The ranges of activations as parameters: the logarithm of what both ends are multiplied by.

    So a range keeps its signs: an end at 0, as after a ReLU, stays there, where a zero point stands for it exactly and
    the ReLU folds into the rounding. An end never passes what a Clip (ReLU6) leaves, which folds just so.

    Args:
        graph: the FP32 graph.
        ranges: to start from.
        unit: what a parameter is counted in.

    Attributes:
        parameters: (2,) for each tensor, low and high: 0 at the start.
    """

    def __init__(self, graph: ModelProto, ranges: Ranges, unit: float) -> None:
        self._unit = unit
        bounds = _clip_bounds(graph)
        self._start: dict[str, Tensor] = {}
        self._most: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        for name, (low, high) in ranges.items():
            low, high = min(low, 0.0), max(high, 0.0)
            if not high > low:
                continue  # a dead tensor: the writer gives it a scale
            ends = zip((low, high), bounds.get(name, (-math.inf, math.inf)), strict=True)
            most = [math.log(bound / end) / unit if end and bound else math.inf for end, bound in ends]
            self._start[name], self._most[name] = torch.tensor([low, high]), torch.tensor(most).clamp(min=0)
            self.parameters[name] = torch.zeros(2, requires_grad=True)

    def ends(self, name: str) -> Tensor:
        """(2,), lowest and highest value of a tensor's range, differentiable."""
        return self._start[name] * torch.exp(self.parameters[name] * self._unit)

    @torch.no_grad()
    def keep_in_bounds(self) -> None:
        """Take back what a step moved too far."""
        for name, parameter in self.parameters.items():
            parameter.copy_(torch.minimum(parameter, self._most[name]))


def _clip_bounds(graph: ModelProto) -> dict[str, tuple[float, float]]:
    """Lowest and highest value that a Clip lets through, of its output."""
    from onnx import numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    bounds = {}
    for node in graph.graph.node:
        if node.op_type == "Clip" and len(node.input) > 1:
            low, high = (*node.input[1:], "")[:2]
            bounds[node.output[0]] = (
                float(constants[low]) if low in constants else -math.inf,
                float(constants[high]) if high in constants else math.inf,
            )
    return bounds


class SimulatedGraph:
    """A written Q/DQ graph in floating point, with weights and ranges that can learn.

    Args:
        quantized: as ``quantize_onnx`` wrote it from the ranges that ``learned`` starts with.
        names: float weights and biases, by their names in the FP32 graph, that will be given to each call.
        learned: ranges of the activations; a scale that is not theirs stays what the file says.
        keep: further tensors to give beside the outputs.

    Attributes:
        axes: quantized weight -> dimension of its scales; None where it has one scale.
        shared: activation that is quantized -> activation whose range it takes, which is another behind pooling.
    """

    def __init__(
        self, quantized: ModelProto, names: Collection[str], learned: LearnedRanges, keep: Sequence[str] = ()
    ) -> None:
        self.axes: dict[str, int | None] = {}
        self.shared: dict[str, str] = {}
        self._learned = learned
        self._ends: dict[str, Tensor] = {}
        self._limits: dict[str, tuple[int, int]] = {}
        self._weights: dict[str, Tensor] = {}
        self._bias_inputs: dict[str, tuple[str, str]] = {}
        self._constants = TorchGraph(quantized).constants
        self._consumers = {name: node for node in quantized.graph.node for name in node.input}
        self._producers = {name: node for node in quantized.graph.node for name in node.output}
        replaced: dict[str, Replacement] = {}
        for node in quantized.graph.node:
            if node.op_type == "QuantizeLinear":
                replaced[node.output[0]] = self._quantize(node)
            elif node.op_type == "DequantizeLinear" and node.input[0] in replaced:
                replaced[node.output[0]] = lambda x, *_: x  # rounded before, as a float
            elif node.op_type == "DequantizeLinear" and node.input[0].removesuffix(QUANTIZED_SUFFIX) in names:
                replaced[node.output[0]] = self._dequantize(node)
        self._graph = TorchGraph(quantized, keep, replaced)

    def __call__(self, images: Tensor, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            images: (N, 3, H, W) float32.
            trained: the weights and biases, float.

        Returns:
            As of :class:`TorchGraph`.
        """
        self._ends = {name: self._learned.ends(name) for name in self.shared.values()}
        self._weights = {
            name: round_to(weight, weight_step(weight, self.axes[name])) if name in self.axes else weight
            for name, weight in trained.items()
        }
        for bias, (weight, scale) in self._bias_inputs.items():
            step = weight_step(trained[weight], self.axes[weight]).flatten() * self._scale(scale)
            self._weights[bias] = round_to(trained[bias], step)
        return self._graph(images, trained)

    @torch.no_grad()
    def ranges(self) -> Ranges:
        """The learned ranges, of every activation that is quantized."""
        named = {**self.shared, **{tensor: tensor for tensor in self.shared.values()}}
        ends = {name: self._learned.ends(tensor).tolist() for name, tensor in named.items()}
        return {name: (low, high) for name, (low, high) in ends.items()}

    def _quantize(self, node: NodeProto) -> Replacement:
        scale, zero_point = self._constants[node.input[1]], self._constants[node.input[2]]
        limits = LIMITS[zero_point.dtype]
        tensor = node.input[1].removesuffix(SCALE_SUFFIX)
        if tensor in self._learned.parameters:
            low, high = grid_ends(self._learned.ends(tensor).detach(), *limits)
            if torch.isclose((high - low) / 255, scale, rtol=1e-4):
                self.shared[node.input[0]] = tensor
                self._limits[tensor] = limits
                return lambda x, *_: FakeQuantize.apply(x, *grid_ends(self._ends[tensor], *limits), *limits)
        low, high = ((limit - zero_point.int()) * scale for limit in limits)
        return lambda x, *_: FakeQuantize.apply(x, low, high, *limits)

    def _dequantize(self, node: NodeProto) -> Replacement:
        name = node.input[0].removesuffix(QUANTIZED_SUFFIX)
        if self._constants[node.input[0]].dtype == torch.int8:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            self.axes[name] = axis if self._constants[node.input[1]].numel() > 1 else None
        else:  # a bias, in units of its activation times its weight
            activation, weight = (self._producers[name] for name in self._consumers[node.output[0]].input[:2])
            self._bias_inputs[name] = (weight.input[0].removesuffix(QUANTIZED_SUFFIX), activation.input[1])
        return lambda *_: self._weights[name]

    @torch.no_grad()
    def _scale(self, name: str) -> Tensor:
        """Scale of an activation as it is now, by the name of its constant."""
        tensor = name.removesuffix(SCALE_SUFFIX)
        if tensor not in self._ends:
            return self._constants[name]
        low, high = grid_ends(self._ends[tensor], *self._limits[tensor])
        return (high - low) / 255


def grid_ends(ends: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of a grid for a range, (2,): of a signed one so that its zero point is 0."""
    low, high = ends
    if qmin == 0:
        return low, high
    most = torch.maximum(-low, high)
    return most * qmin / qmax, most


def weight_step(weight: Tensor, axis: int | None) -> Tensor:
    """Step of the grid of a signed symmetric weight, in a shape that broadcasts; 0 where all of a channel is 0."""
    dims = [dim for dim in range(weight.ndim) if axis is None or dim != axis % weight.ndim]
    return weight.detach().abs().amax(dim=dims, keepdim=True) / LARGEST_WEIGHT


def round_to(weight: Tensor, step: Tensor) -> Tensor:
    """A weight rounded to a grid, as the writer does; the gradient goes straight. A step of 0 rounds nothing."""
    step = torch.where(step > 0, step, torch.ones_like(step))
    return weight + (torch.round(weight.detach() / step) * step - weight.detach())
