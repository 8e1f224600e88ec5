"""What a rule of ``midge lint`` is made of, and the documents that rules refer to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .lint_checks_file import Found
from .lint_graph import Graph
from .lint_targets import TARGETS, TENSORRT

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)

Check = Callable[[Graph, str], Iterable[Found]]

ORT_OPTIMIZER = "the optimizer of ONNX Runtime 1.32"
OPENVINO_LPT = "OpenVINO documentation, Low Precision Transformations"
QUANTIZED_TYPES = "NVIDIA TensorRT documentation, Working with Quantized Types"
PLACEMENT_RULES = f"{QUANTIZED_TYPES}: Q/DQ layer-placement recommendations"
DEQUANTIZE_ROW = "ONNX-TensorRT, docs/operators.md: QuantizeLinear and DequantizeLinear"
ONNX_SPEC = "the ONNX specification of QuantizeLinear and DequantizeLinear"


class Says(NamedTuple):
    """What a rule says about a runtime.

    Attributes:
        severity: one of ``SEVERITIES``.
        consequence: what the runtime does, a sentence without its full stop.
        source: where that is written, or with what it was tried.
        tried: whether it was tried; None as the runtime's ``tried`` in ``TARGETS``.
    """

    severity: str
    consequence: str
    source: str
    tried: bool | None = None


class Rule(NamedTuple):
    """A rule.

    Attributes:
        check: yields what it found, for a graph and a target.
        fix: what to do, a sentence.
        on: target -> what it means there.
    """

    check: Check
    fix: str
    on: dict[str, Says]


def on_tensorrt(severity: str, consequence: str, source: str, tried: bool | None = None) -> dict[str, Says]:
    """The same for every TensorRT."""
    return dict.fromkeys(TENSORRT, Says(severity, consequence, source, tried))


def on(targets: Iterable[str], severity: str, consequence: str) -> dict[str, Says]:
    """The same for several targets, by each one's own source; a note needs none."""
    return {name: Says(severity, consequence, "" if severity == NOTE else TARGETS[name].source) for name in targets}
