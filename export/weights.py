"""Weights of an ONNX graph, by operator, and their way back into the torch network that the graph was made from.

Most initializers keep the names of torch's parameters, but not all: equal ones become one, those of linear layers are
transposed under a new name. So operators are matched, by the names of their results, not initializers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import UserError, require

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto
    from torch import fx, nn

# Operators of torch's exported programs that have weights, and those that only give a tensor another shape.
WEIGHTED = ("aten.conv2d.default", "aten.convolution.default", "aten.linear.default", "aten.layer_norm.default")
VIEWS = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.flatten.using_ints")


@dataclass(frozen=True, eq=False)
class Weighted:
    """An operator of an ONNX graph with weights.

    Attributes:
        node: its own name.
        names: of its result, and of the result with a bias added or in another shape.
        data: the tensor that it takes.
        weight: (out, in…), as torch has it, or (K,) of a layer normalization.
        bias: (out,); None where it has none.
    """

    node: str
    names: tuple[str, ...]
    data: str
    weight: np.ndarray
    bias: np.ndarray | None


def weighted_nodes(graph: ModelProto) -> Iterator[Weighted]:
    """Convolutions, products with stored matrices, and layer normalizations of a float graph."""
    numpy_helper = require("onnx.numpy_helper", "export")
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    consumers: dict[str, list[NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)

    def array(name: str) -> np.ndarray | None:
        return numpy_helper.to_array(stored[name]) if name in stored else None

    for node in graph.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul", "LayerNormalization"):
            continue
        weight = array(node.input[1])
        if weight is None:
            continue
        bias = array(node.input[2]) if len(node.input) > 2 else None
        names = [node.output[0]]
        while len(users := consumers.get(names[-1], [])) == 1 and users[0].op_type in ("Add", "Reshape"):
            if users[0].op_type == "Add":
                added = next((array(name) for name in users[0].input if name in stored), None)
                if added is None or bias is not None or node.op_type != "MatMul" or added.shape != weight.shape[1:]:
                    break
                bias = added
            names.append(users[0].output[0])
        transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attribute(node, "transB"))
        yield Weighted(node.name, tuple(names), node.input[0], weight.T if transposed else weight, bias)


def _attribute(node: NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def load_weights(folded: nn.Module, graph: ModelProto, input_px: int) -> nn.Module:
    """A copy of a network with the weights of an ONNX graph that was made from it, which may have changed since.

    Args:
        folded: in eval mode on the CPU; (N, 3, H, W) float32 -> (N, K).
        graph: a float graph with the operators and names of its export.
        input_px: H and W.

    Raises:
        UserError: an operator of the network has no counterpart of its shape in the graph.
    """
    torch = require("torch", "train")
    network = copy.deepcopy(folded)
    program = torch.export.export(network, (torch.zeros(1, 3, input_px, input_px),), strict=False)
    program = program.run_decompositions({})  # as the exporters do, which so name the nodes
    owners = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    found = {name: weighted for weighted in weighted_nodes(graph) for name in weighted.names}
    for node in program.graph.nodes:
        if str(node.target) not in WEIGHTED:
            continue
        position = 2 if "layer_norm" in str(node.target) else 1
        owner = owners.get(getattr(_argument(node, position), "name", ""))
        weighted = next((found[name] for name in _names(node, graph.graph.output[0].name) if name in found), None)
        if owner is None and position == 2:  # a normalization without weights
            continue
        if owner is None or weighted is None:
            raise UserError(f"The ONNX graph has no weights for the operator '{node.name}': export the network again.")
        _set(network.get_submodule(owner.rpartition(".")[0]), node.name, weighted)
    return network


def _argument(node: fx.Node, position: int) -> Any:
    return node.args[position] if position < len(node.args) else None


def _names(node: fx.Node, output_name: str) -> Iterator[str]:
    """The name of an operator's result, and those that it has in other shapes."""
    while True:
        yield node.name
        users = list(node.users)
        if len(users) == 1 and users[0].op == "output":
            yield output_name
        if len(users) != 1 or str(users[0].target) not in VIEWS:
            return
        node = users[0]


def _set(module: Any, name: str, weighted: Weighted) -> None:
    import torch

    if module.weight.shape != weighted.weight.shape:
        given, needed = weighted.weight.shape, tuple(module.weight.shape)
        raise UserError(f"The ONNX graph has weights {given} for the operator '{name}', the network needs {needed}.")
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(np.array(weighted.weight)))
        if weighted.bias is not None:
            module.bias = torch.nn.Parameter(torch.from_numpy(np.array(weighted.bias)), requires_grad=False)
        elif module.bias is not None:
            module.bias.zero_()
