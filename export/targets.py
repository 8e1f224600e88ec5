"""What can be exported: target -> precision -> the variants that it makes (no torch, no onnx).

The reference, ``torch-fp32``, is part of every artifact and so no choice.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.errors import UserError, unknown_name

TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "onnx": {
        "fp32": ("onnx-fp32",),
        "fp16": ("onnx-fp16",),
        "int8": ("onnx-int8-u8", "onnx-int8-s8", "onnx-int8-dynamic"),
    },
    "openvino": {"fp32": ("openvino-fp32",), "fp16": ("openvino-fp16",), "int8": ("openvino-int8",)},
    "tensorrt": {"fp32": ("tensorrt-fp32",), "fp16": ("tensorrt-fp16",), "int8": ("tensorrt-int8",)},
    "coreml": {"fp16": ("coreml-fp16",), "int8": ("coreml-int8",)},
}


def select_variants(targets: Sequence[str], precisions: Sequence[str]) -> tuple[str, ...]:
    """The variants of some targets in some precisions, in the table's order, each once.

    Raises:
        UserError: a name is not in the table, no name is given, or a target has none of the precisions.
    """
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("target", target, TARGETS)
    known = {precision for table in TARGETS.values() for precision in table}
    for precision in precisions:
        if precision not in known:
            raise unknown_name("precision", precision, known)
    if not targets or not precisions:
        flag, allowed = ("--precision", known) if targets else ("--targets", TARGETS)
        raise UserError(f"{flag} names nothing: give one or more of {', '.join(sorted(allowed))}.")
    for target in targets:
        if not TARGETS[target].keys() & set(precisions):
            allowed = ", ".join(sorted(TARGETS[target]))
            raise UserError(f"The target '{target}' has no {' or '.join(precisions)}: give --precision {allowed}.")
    return tuple(
        variant
        for target, table in TARGETS.items()
        for precision, variants in table.items()
        for variant in variants
        if target in targets and precision in precisions
    )
