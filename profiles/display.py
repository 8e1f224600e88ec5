"""How names and numbers are shown, on the page and in the terminal alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

RUNTIME_NAMES = {
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "coreml": "Core ML",
}


def runtime_name(runtime: str) -> str:
    """A runtime's own name, e.g. ``ONNX Runtime``; an unknown one as it is."""
    return RUNTIME_NAMES.get(runtime, runtime)


def shown(value: float | None, form: str) -> str:
    """A number as the page and the terminal show it; ``–`` for what was not measured.

    Args:
        value: the number, in the record's unit.
        form: percent, share (fractions -> %), ms, mib, mb (bytes -> MB), cosine or error.
    """
    return "–" if value is None else FORMS[form](value)


def _milliseconds(value: float) -> str:
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 4)}f}"


FORMS: dict[str, Callable[[float], str]] = {
    "percent": lambda value: f"{100 * value:.2f}",
    "share": lambda value: f"{100 * value:.1f}",
    "ms": _milliseconds,
    "mib": lambda value: f"{value:.0f}",
    "mb": lambda value: f"{value / 1e6:.2f}",
    "cosine": lambda value: f"{value:.6f}",
    "error": lambda value: f"{value:.2g}",
}


def method_paragraphs(records: Sequence[dict[str, Any]]) -> list[str]:
    """The protocol(s) in words, from what the records say."""
    paragraphs = []
    protocols = {}
    for record in records:  # those that differ by nothing but the cores are one
        shared = {key: value for key, value in record["protocol"].items() if key != "pinned_cpus"}
        protocols[repr(sorted(shared.items()))] = record["protocol"]
    for protocol in protocols.values():
        pinned = ", each pinned to as many cores as it has threads" if protocol.get("pinned_cpus") else ""
        paragraphs.append(
            f"Protocol {protocol['name']}: every variant runs in fresh processes{pinned}, batch {protocol['batch']}, "
            f"in {protocol['rounds']} rounds that go through the variants in alternating order. After a warm-up of at "
            f"least {protocol['warmup_min_runs']} runs and {protocol['warmup_min_s']:g} s, at least "
            f"{protocol['min_runs']} runs and {protocol['min_s']:g} s are timed; all samples are kept."
        )
    return [
        *paragraphs,
        "Latency is one inference on a preprocessed image; decoding, resizing and normalizing are timed apart. "
        "Accuracy is counted through the same runtime and the same preprocessing. Intervals are 95 %: Wilson's for "
        "accuracies, Student's t on a bootstrap over rounds for latencies. What could not be measured is left blank, "
        "never estimated.",
    ]
