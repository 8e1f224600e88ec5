"""An ONNX graph as ``midge lint`` looks at it: nodes with their neighbours, constants, and what each Q/DQ node says.

Only the graph is read, never a weight file, and no operator is computed. Whatever cannot be known without running the
graph (a scale that is worked out at run time) is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..runtime.errors import UserError, require
from ..runtime.printable import printable
from .lint_names import text, type_name

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
INTEGER_OPERATORS = frozenset({"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
FLOAT_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
MAX_STEPS = 64  # that a tensor is followed through operators which only move numbers


@dataclass(frozen=True, eq=False)
class Node:
    """A node of the graph.

    Attributes:
        index: its place in the file.
        op: operator.
        domain: of the operator; "" for ONNX's own.
        name: its name, or what it makes where it has none.
        inputs: names of the tensors that it takes; "" for one left out.
        outputs: names of the tensors that it makes.
        attributes: by name.
    """

    index: int
    op: str
    domain: str
    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: dict[str, AttributeProto]

    def number(self, name: str, default: float) -> float:
        """A numeric attribute."""
        attribute = self.attributes.get(name)
        if attribute is None:
            return default
        return attribute.f if attribute.type == attribute.FLOAT else attribute.i


class Use(NamedTuple):
    """Where a tensor is taken: by which node, as its how manyeth input."""

    node: Node
    position: int


@dataclass(frozen=True, eq=False)
class Quantization:
    """What a QuantizeLinear or DequantizeLinear node says.

    Attributes:
        node: the node.
        scale: its scales; None where they are no constant.
        zero_point: its zero points; None where they are no constant; 0 where they are left out.
        type: of the integers, e.g. ``"uint8"``; "" where it cannot be told.
        axis: along which there is one scale each, as the file says it.
        is_constant: whether it dequantizes a constant, i.e. weights or a bias.
    """

    node: Node
    scale: np.ndarray | None
    zero_point: np.ndarray | None
    type: str
    axis: int
    is_constant: bool

    def same_steps(self, other: Quantization) -> bool:
        """Whether both mean the same numbers by the same integers, one for all or for each channel.

        Unknown ones count as the same.
        """
        pairs = ((self.scale, other.scale), (self.zero_point, other.zero_point))
        known = self.type and other.type
        return (not known or self.type == other.type) and all(
            a is None or b is None or _equal(a.ravel(), b.ravel()) for a, b in pairs
        )


class Graph:
    """The main graph of a model.

    Args:
        model: as parsed.
        path: its file.

    Raises:
        UserError: its nodes are not in the order in which they can run, which is how a cycle shows.
    """

    def __init__(self, model: ModelProto, path: Path) -> None:
        self.model = model
        self.path = path
        self.nodes = [_node(index, proto) for index, proto in enumerate(model.graph.node)]
        self.outputs = frozenset(text(output.name) for output in model.graph.output)
        given = {text(tensor.name) for tensor in model.graph.input}
        changeable = given if model.ir_version >= 4 else set()  # before, every stored tensor was listed as an input
        self.initializers = {
            text(item.name): item for item in model.graph.initializer if text(item.name) not in changeable
        }
        self.producer = {name: node for node in self.nodes for name in node.outputs if name}
        self.uses: dict[str, list[Use]] = {}
        for node in self.nodes:
            for position, name in enumerate(node.inputs):
                self.uses.setdefault(name, []).append(Use(node, position))
        self.used_inside = {name for node in self.nodes for name in _names_used_inside(node)}
        self._check_order(given)

    def _check_order(self, given: set[str]) -> None:
        made = given | {tensor.name for tensor in self.model.graph.initializer} | {""}
        made |= {tensor.values.name for tensor in self.model.graph.sparse_initializer}
        for node in self.nodes:
            missing = next((name for name in node.inputs if name not in made), None)
            if missing is not None:
                later = missing in self.producer
                raise UserError(
                    f"The node '{node.name}' takes '{printable(missing)}', which "
                    f"{'a later node makes (a cycle, or nodes out of order)' if later else 'nothing makes'}: "
                    "export the model again."
                )
            made.update(node.outputs)

    @cached_property
    def opsets(self) -> dict[str, int]:
        """Domain -> version that the file imports."""
        names = {"ai.onnx": ""}
        return {names.get(text(item.domain), item.domain): item.version for item in self.model.opset_import}

    @cached_property
    def weighted(self) -> list[Node]:
        """Convolutions and matrix products, in whatever form."""
        operators = FLOAT_OPERATORS | INTEGER_OPERATORS
        return [node for node in self.nodes if node.op in operators and not node.domain and len(node.inputs) > 1]

    @cached_property
    def quantizations(self) -> dict[Node, Quantization]:
        """Every QuantizeLinear and DequantizeLinear node of the main graph, in its order."""
        found: dict[Node, Quantization] = {}
        for node in self.nodes:
            if node.op in {QUANTIZE, DEQUANTIZE} and len(node.inputs) >= 2 and node.outputs:
                found[node] = self._quantization(node, found)
        return found

    def of(self, op: str) -> Iterator[Quantization]:
        """The quantizations by one of both operators."""
        return (quantization for node, quantization in self.quantizations.items() if node.op == op)

    def _quantization(self, node: Node, earlier: dict[Node, Quantization]) -> Quantization:
        zero_name = node.inputs[2] if len(node.inputs) > 2 else ""
        source = self.producer.get(node.inputs[0])
        stored = self.constant(node.inputs[0])
        kind = ""
        if zero_name:
            tensor = self.constant(zero_name)
            kind = type_name(tensor.data_type) if tensor is not None else ""
        elif node.op == QUANTIZE:
            kind = type_name(int(node.number("output_dtype", 0))) or "uint8"
        if not kind and stored is not None:
            kind = type_name(stored.data_type)
        elif not kind and source in earlier:
            kind = earlier[source].type
        return Quantization(
            node=node,
            scale=self.values(node.inputs[1]),
            zero_point=self.values(zero_name) if zero_name else np.zeros(1, np.int64),
            type=kind,
            axis=int(node.number("axis", 1)),
            is_constant=node.op == DEQUANTIZE and self.is_constant(node.inputs[0]),
        )

    def is_constant(self, name: str) -> bool:
        """Whether a tensor is stored, or is a stored float tensor that is rounded first."""
        source = self.producer.get(name)
        rounds = source is not None and source.op == QUANTIZE
        return self.constant(source.inputs[0] if source is not None and rounds else name) is not None

    def constant(self, name: str) -> TensorProto | None:
        """A stored tensor: an initializer that is no input, or the value of a Constant node."""
        if name in self.initializers:
            return self.initializers[name]
        node = self.producer.get(name)
        if node is not None and node.op == "Constant" and "value" in node.attributes:
            return node.attributes["value"].t
        return None

    def values(self, name: str) -> np.ndarray | None:
        """The numbers of a stored tensor; None where it is not stored, or its numbers are in another file.

        Raises:
            UserError: it holds other numbers than its shape says.
        """
        tensor = self.constant(name)
        if tensor is None or tensor.data_location == tensor.EXTERNAL:
            return None
        onnx = require("onnx", "export")
        try:
            return onnx.numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"The tensor '{printable(name)}' is damaged ({reason}): export the model again.") from None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a stored tensor, also through its Q/DQ; None of any other."""
        tensor, source = self.constant(name), self.producer.get(name)
        for _ in range(2):
            if tensor is None and source is not None and source.op in {QUANTIZE, DEQUANTIZE}:
                name = source.inputs[0]
                tensor, source = self.constant(name), self.producer.get(name)
        return None if tensor is None else tuple(tensor.dims)

    def sides(self, name: str) -> tuple[int, ...] | None:
        """Shape of any tensor, as far as the file itself says it; 0 for a side that it leaves open."""
        if name in self._described:
            return tuple(side.dim_value for side in self._described[name].type.tensor_type.shape.dim)
        return self.shape(name)

    @cached_property
    def _described(self) -> dict[str, ValueInfoProto]:
        graph = self.model.graph
        infos = (*graph.input, *graph.output, *graph.value_info)
        return {info.name: info for info in infos if info.type.tensor_type.HasField("shape")}

    def dequantized(self, name: str, through: Sequence[str] = ()) -> Quantization | None:
        """The DequantizeLinear that makes a tensor.

        Args:
            name: the tensor.
            through: operators that may stand between, of which the first input is followed.
        """
        node = self.producer.get(name)
        for _ in range(MAX_STEPS):
            if node is None or node.op not in through or not node.inputs:
                break
            node = self.producer.get(node.inputs[0])
        return self.quantizations.get(node) if node is not None and node.op == DEQUANTIZE else None

    def operators(self) -> Iterator[tuple[Node, str, str]]:
        """(node of the main graph, domain, operator) of every node, those of inner graphs among them."""
        for node in self.nodes:
            yield node, node.domain, node.op
            for inner in _inner_nodes(node):
                yield node, _domain(inner.domain), text(inner.op_type)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two rows of numbers are equal, where one number stands for as many as the other has."""
    one, other = np.broadcast_arrays(a, b) if 1 in {a.size, b.size} else (a, b)
    return np.array_equal(one, other, equal_nan=a.dtype.kind == "f")


def _node(index: int, proto: NodeProto) -> Node:
    inputs, outputs = tuple(map(text, proto.input)), tuple(map(text, proto.output))
    name = printable(text(proto.name) or next((output for output in outputs if output), "")) or f"node {index}"
    if not outputs:
        raise UserError(f"The node '{name}' makes nothing: export the model again.")
    attributes = {text(attribute.name): attribute for attribute in proto.attribute}
    return Node(index, text(proto.op_type), _domain(proto.domain), name, inputs, outputs, attributes)


def _domain(domain: str) -> str:
    return "" if text(domain) == "ai.onnx" else domain


def _graphs(attributes: Iterable[AttributeProto]) -> Iterator[GraphProto]:
    for attribute in attributes:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _inner_nodes(node: Node) -> Iterator[NodeProto]:
    """Nodes of the graphs in a node's attributes, however deep: protobuf parses no more than 100 levels."""
    level = list(_graphs(node.attributes.values()))
    while level:
        nodes = [inner for graph in level for inner in graph.node]
        yield from nodes
        level = [graph for inner in nodes for graph in _graphs(inner.attribute)]


def _names_used_inside(node: Node) -> Iterator[str]:
    for inner in _inner_nodes(node):
        yield from map(text, inner.input)
