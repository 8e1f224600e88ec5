"""The rules of ``midge lint`` on why a convolution or matrix product is computed in float: at most one per runtime."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

from .lint_checks_file import Found, quantizes
from .lint_graph import Graph, Node
from .lint_placement_ort import LEFT_FLOAT, ort_reason
from .lint_placement_others import openvino_reason, tensorrt_reason
from .lint_rule import NOTE, OPENVINO_LPT, ORT_OPTIMIZER, PLACEMENT_RULES, WARNING, Check, Rule, Says, on, on_tensorrt
from .lint_targets import TENSORRT

PLACEMENTS: dict[str, Callable[[Graph, Node], tuple[str, str]]] = {
    "onnxruntime": ort_reason,
    "openvino": openvino_reason,
    **dict.fromkeys(TENSORRT, tensorrt_reason),
}


@functools.lru_cache(maxsize=len(PLACEMENTS))
def float_nodes(graph: Graph, target: str) -> dict[Node, tuple[str, str]]:
    """The convolutions and matrix products that a runtime computes in float -> the rule that says why, and a phrase."""
    reasons = {node: PLACEMENTS[target](graph, node) for node in graph.weighted}
    return {node: (why, detail) for node, (why, detail) in reasons.items() if why}


def float_because(reason: str) -> Check:
    """A check for the nodes that run in float for one reason. A file that quantizes nothing has its own rule."""

    def check(graph: Graph, target: str) -> Iterable[Found]:
        if reason == LEFT_FLOAT and not quantizes(graph):
            return []
        return [
            Found(node.name, f"{node.op}: {detail}")
            for node, (why, detail) in float_nodes(graph, target).items()
            if why == reason
        ]

    return check


ORT = {"onnxruntime": Says(WARNING, "computed in float, with the Q/DQ around it as extra work", ORT_OPTIMIZER)}
ORT_ON_X86 = {"onnxruntime": Says(WARNING, "computed in float on x86, where only UINT8 has kernels", ORT_OPTIMIZER)}
OPENVINO = {"openvino": Says(WARNING, "computed in float", OPENVINO_LPT)}
OPENVINO_WITH_AMX = {"openvino": Says(WARNING, "computed in float on CPUs with AMX", OPENVINO_LPT)}
BY_NVIDIAS_RULES = on_tensorrt(WARNING, "computed in float, by NVIDIA's rules", PLACEMENT_RULES, tried=False)
ALL = ORT | OPENVINO | BY_NVIDIAS_RULES
AS_SAID = on(PLACEMENTS, NOTE, "computed in float, as the file says")

# Reason -> what to do, and where the reason holds.
REASONS: dict[str, tuple[str, dict[str, Says]]] = {
    LEFT_FLOAT: ("Quantize it too, unless it was left out on purpose.", AS_SAID),
    "float-input": ("Quantize data and weights, or neither.", ALL),
    "float-weights": ("Quantize data and weights, or neither.", ALL),
    "float-operator": ("Use static Q/DQ instead of integer operators.", OPENVINO),
    "no-kernel": ("Leave it in float.", ORT),
    "float-type": ("Quantize to 8 bits.", ORT | OPENVINO),
    "float-scale": ("Store one constant scale for the data.", ORT | OPENVINO),
    "float-output": ("Round its output too (Q/DQ after it).", ORT),
    "shared-output": ("Let all that follows take the rounded output.", ORT),
    "unfolded-activation": (
        "Quantize its output to UINT8, with a range from the activation's lowest value to at most its highest.",
        ORT,
    ),
    "float-bias": ("Store the bias as INT32 in the scale of data times weights.", ORT),
    "float-bias-output": ("Round its output too, or store the bias as INT32.", ORT),
    "bias-scale": ("Store the bias in the scale of data times weights.", ORT),
    "float-gemm": ("Fold alpha and beta into weights and bias.", ORT),
    "signed-fanout": ("Quantize activations to UINT8, as midge's onnx-int8-u8 does.", ORT_ON_X86),
    "signed-zero-point": ("Quantize data to UINT8, or to INT8 without a zero point.", OPENVINO_WITH_AMX),
    "unsigned-second": ("Quantize weights, and second factors, to INT8.", OPENVINO),
    "second-zero-point": ("Quantize weights, and second factors, symmetrically.", OPENVINO),
    "weight-axis-float": ("Quantize weights per output channel.", ORT | OPENVINO),
}

FLOAT_RULES = {reason: Rule(float_because(reason), fix, said) for reason, (fix, said) in REASONS.items()}
