"""An ONNX graph run in torch, differentiably and on batches, though its file says a batch of 1.

Training needs the very graph that is deployed. Libraries that turn ONNX into torch were tried on the graphs written
here: onnx2torch 1.5.15 (2024) refuses each of seven networks (ReduceMean of opset 18, Reshape with ``allowzero``) and
every Q/DQ; onnx2fx is at 0.0.1 and needs a later Python than midge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..runtime.errors import UserError
from .torch_operators import OPERATORS, Operator

if TYPE_CHECKING:
    from onnx import ModelProto

Replacement = Callable[..., Tensor]
"""The inputs of a node -> its output, instead of what its operator computes."""


@dataclass(frozen=True)
class Step:
    """One node of a graph.

    Attributes:
        operator: what computes its outputs.
        attributes: of the node.
        inputs: names of its inputs; "" where one is left out.
        outputs: names of its outputs.
        dead: names of the values that no later step needs.
    """

    operator: Operator
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dead: tuple[str, ...]


class TorchGraph:
    """A function from a batch of images to tensors of a graph.

    A graph for a batch of 1 computes each image by itself, through ``torch.vmap``: its constants may hold the batch
    wherever they like, and one image never touches another.

    Args:
        model: the graph, with one input.
        keep: further tensors to give beside the graph's outputs.
        replaced: output of a node -> what computes it instead.

    Attributes:
        constants: the initializers by name, without gradients.
        names: what a call gives: the outputs, then ``keep``.

    Raises:
        UserError: an operator is not known, or the graph has another form.
    """

    def __init__(
        self, model: ModelProto, keep: Sequence[str] = (), replaced: Mapping[str, Replacement] | None = None
    ) -> None:
        from onnx import numpy_helper

        graph = model.graph
        self.constants = {
            tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer
        }
        inputs = [info for info in graph.input if info.name not in self.constants]
        if len(inputs) != 1:
            raise UserError(f"The graph has {len(inputs)} inputs: give one with a single input, the image.")
        self._input = inputs[0].name
        self._single = inputs[0].type.tensor_type.shape.dim[0].dim_value == 1
        self.names = tuple(dict.fromkeys([*(output.name for output in graph.output), *keep]))
        self._steps = _steps(model, self.names, replaced or {}, self.constants)

    def __call__(self, images: Tensor, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            images: (N, 3, H, W) float32.
            values: tensors that take the place of initializers, by name.

        Returns:
            The tensors of ``names``; the first dimension is N times what the file says.
        """
        constants = {**self.constants, **(values or {})}
        if not self._single:
            return self._run(images, constants)
        outputs = torch.vmap(lambda image: self._run(image, constants))(images.unsqueeze(1))
        return {name: output.flatten(0, 1) for name, output in outputs.items()}

    def _run(self, images: Tensor, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known: dict[str, Tensor | None] = {**constants, self._input: images, "": None}
        for step in self._steps:
            made = step.operator(step.attributes, *(known[name] for name in step.inputs))
            known.update(zip(step.outputs, made if isinstance(made, tuple) else (made,), strict=False))
            for name in step.dead:
                del known[name]
        return {name: value for name in self.names if (value := known[name]) is not None}


def _steps(
    model: ModelProto, names: Sequence[str], replaced: Mapping[str, Replacement], constants: dict[str, Tensor]
) -> list[Step]:
    """The nodes as steps; values of Constant nodes join the constants."""
    from onnx import helper, numpy_helper

    nodes = []
    for node in model.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Constant":
            if "value" not in attributes:
                raise UserError(f"The constant '{node.output[0]}' has none but a short form: slim the graph.")
            constants[node.output[0]] = torch.from_numpy(numpy_helper.to_array(attributes["value"]).copy())
        elif node.domain not in {"", "ai.onnx"} or (node.op_type not in OPERATORS and node.output[0] not in replaced):
            raise UserError(
                f"The graph has an operator that torch is not taught here, '{node.op_type}' (node '{node.name}'): "
                "export without training for INT8, with --qat-epochs 0."
            )
        else:
            nodes.append((node, attributes))
    last_use = {name: index for index, (node, _) in enumerate(nodes) for name in (*node.output, *node.input)}
    steps = []
    for index, (node, attributes) in enumerate(nodes):
        function = replaced.get(node.output[0])
        operator = OPERATORS[node.op_type] if function is None else _without_attributes(function)
        dead = [
            name
            for name in dict.fromkeys((*node.input, *node.output))
            if name and last_use[name] == index and name not in constants and name not in names
        ]
        steps.append(Step(operator, attributes, tuple(node.input), tuple(filter(None, node.output)), tuple(dead)))
    return steps


def _without_attributes(function: Replacement) -> Operator:
    return lambda attributes, *inputs: function(*inputs)
