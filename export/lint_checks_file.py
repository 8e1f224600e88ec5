"""What ``midge lint`` looks for in a file as a whole: versions, operators, shapes. Each check yields what it found."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from ..runtime.errors import require
from .lint_graph import DEQUANTIZE, INTEGER_OPERATORS, QUANTIZE, Graph
from .lint_targets import COREML_CONVERTS, TARGETS, TENSORRT


class Found(NamedTuple):
    """Something that a check found.

    Attributes:
        node: its name; "" where it is the file as a whole.
        detail: what there is, a phrase without a full stop.
    """

    node: str
    detail: str


def later_version(graph: Graph, target: str) -> Iterator[Found]:
    """The file's format, or its opset, is later than the target reads."""
    table, opset = TARGETS[target], graph.opsets.get("", 0)
    if table.max_ir_version is not None and graph.model.ir_version > table.max_ir_version:
        yield Found("", f"IR version {graph.model.ir_version}, read up to {table.max_ir_version}")
    if table.last_opset is not None and opset > table.last_opset:
        yield Found("", f"opset {opset}, read up to {table.last_opset}")


def later_opset(graph: Graph, target: str) -> Iterator[Found]:
    """Operators whose definition was changed after the latest opset that the target reads."""
    limit = TARGETS[target].max_opset
    for node, domain, op in graph.operators():
        since = since_version(graph, domain, op)
        if limit is not None and not domain and op not in TARGETS[target].unsupported and since > limit:
            yield Found(node.name, f"{op} as defined by opset {since}, documented up to {limit}")


def unknown_operator(graph: Graph, target: str) -> Iterator[Found]:
    """Operators that the target does not read."""
    table, functions = TARGETS[target], {(item.domain, item.name) for item in graph.model.functions}
    others = dict(table.domains)
    for node, domain, op in graph.operators():
        if (domain, op) in functions:
            continue
        if not domain:
            bad = op in table.unsupported or not since_version(graph, domain, op)
        elif domain in others:
            known = others[domain]
            bad = known is not None and op not in known
        else:
            # TensorRT's parser goes by the name alone: com.microsoft's QuantizeLinear is read, its FastGelu is not.
            bad = target not in TENSORRT or not is_standard(op) or op in table.unsupported
        if not bad and target == "onnxruntime":
            bad = not has_kernel(domain, op, since_version(graph, domain, op))
        if bad:
            yield Found(node.name, f"{domain}.{op}" if domain else op)


def later_release(graph: Graph, target: str) -> Iterator[Found]:
    """Operators that only a later release of the target reads."""
    releases = dict(TARGETS[target].later_releases)
    for node, domain, op in graph.operators():
        if not domain and op in releases:
            yield Found(node.name, f"{op}, from release {releases[op]} on")


def needs_int8_flag(graph: Graph, target: str) -> Iterator[Found]:
    """Q/DQ, which the builder of a weakly typed network must be told of."""
    if graph.quantizations:
        yield Found("", f"{len(graph.quantizations)} Q/DQ nodes")


def unconverted_operator(graph: Graph, target: str) -> Iterator[Found]:
    """Operators for whose torch counterpart coremltools is not known to have a conversion."""
    for node, domain, op in graph.operators():
        if domain or (op not in COREML_CONVERTS and op not in INTEGER_OPERATORS):
            yield Found(node.name, f"{domain}.{op}" if domain else op)


def is_onnx(graph: Graph, target: str) -> Iterator[Found]:
    """The file is ONNX, which it always is."""
    quantized = sum(node.op in {QUANTIZE, DEQUANTIZE} for node in graph.nodes)
    yield Found("", f"an ONNX file with {quantized} Q/DQ nodes" if quantized else "an ONNX file")


def dynamic_shape(graph: Graph, target: str) -> Iterator[Found]:
    """Inputs whose sides are not all numbers."""
    stored = {tensor.name for tensor in graph.model.graph.initializer}
    for tensor in graph.model.graph.input:
        sides = tensor.type.tensor_type.shape.dim
        unknown = [side.dim_param or "?" for side in sides if not side.HasField("dim_value")]
        if tensor.name not in stored and (unknown or not tensor.type.tensor_type.HasField("shape")):
            yield Found(tensor.name, f"the input has the sides {', '.join(unknown) or '?'} open")


def float_file(graph: Graph, target: str) -> Iterator[Found]:
    """Nothing in the file is quantized."""
    if graph.weighted and not quantizes(graph):
        yield Found("", f"no Q/DQ at {len(graph.weighted)} convolutions and matrix products")


def quantizes(graph: Graph) -> bool:
    """Whether anything in the file is quantized."""
    return bool(graph.quantizations) or any(node.op in INTEGER_OPERATORS for node in graph.weighted)


def invalid(graph: Graph, target: str) -> Iterator[Found]:
    """What ONNX's own checker has against the file."""
    if reason := checker_message(graph):
        yield Found("", reason)


@functools.lru_cache(maxsize=4)
def checker_message(graph: Graph) -> str:
    """The first line of what ONNX's checker says; "" where it finds nothing."""
    onnx = require("onnx", "export")
    try:
        onnx.checker.check_model(str(graph.path), full_check=True)
    except Exception as error:  # a ValidationError, an InferenceError, or whatever a hostile file provokes
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return line.rstrip(".")[:200]
    return ""


def since_version(graph: Graph, domain: str, op: str) -> int:
    """The opset that defined the operator as this file means it; 0 where ONNX knows none, 1 in other domains."""
    if domain not in {"", "ai.onnx.ml"}:
        return 1
    version = graph.opsets.get(domain, 0)
    return _since_version(op, version, domain)


def is_standard(op: str) -> bool:
    """Whether ONNX itself has an operator of this name, in any opset."""
    return bool(_since_version(op, require("onnx", "export").defs.onnx_opset_version(), ""))


@functools.lru_cache(maxsize=4096)
def _since_version(op: str, version: int, domain: str) -> int:
    defs = require("onnx", "export").defs
    try:
        return defs.get_schema(op, version, domain).since_version
    except (defs.SchemaError, TypeError):
        return 0


@functools.cache
def _kernels() -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(domain, operator) -> the ranges of opsets for which the installed ONNX Runtime has a CPU kernel.

    Empty where this build of it does not say.
    """
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "all")
    kernels: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in getattr(state, "get_all_opkernel_def", list)():
        if kernel.provider == "CPUExecutionProvider":
            kernels.setdefault((kernel.domain, kernel.op_name), []).append(kernel.version_range)
    return kernels


def has_kernel(domain: str, op: str, since: int) -> bool:
    """Whether ONNX Runtime can run an operator on the CPU: by a kernel of its own, or as ONNX composes it."""
    if (domain, op) == ("", "Constant"):  # read into the stored tensors before anything runs
        return True
    ranges = _kernels().get((domain, op), [])
    if not _kernels() or any(first <= since <= last for first, last in ranges):
        return True
    if domain:
        return bool(ranges)
    defs = require("onnx", "export").defs
    try:
        schema = defs.get_schema(op, since, domain)
    except defs.SchemaError:
        return False
    return schema.has_function or schema.has_context_dependent_function
