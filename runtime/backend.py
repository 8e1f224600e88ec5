"""The one interface to every runtime: open a variant, run batches, ask what really executed, close."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from .artifact import Variant, variant_runtime
from .errors import UserError, unknown_name


@dataclass(frozen=True)
class Placement:
    """What a runtime really executed for one batch, from its own optimized graph.

    Attributes:
        int8_macs: multiply-accumulates done on 8-bit integers (both data and weights).
        total_macs: all multiply-accumulates of convolutions and matrix products.
        ops: executed operator -> how many of it, by the runtime's own names.
        uncounted: executed operators whose multiply-accumulates are not known (a recurrent cell, say) -> how many.
    """

    int8_macs: int
    total_macs: int
    ops: dict[str, int]
    uncounted: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """Part of the multiply-accumulates that ran in 8-bit integers, 0..1; None where it is not known."""
        return None if self.uncounted or not self.total_macs else self.int8_macs / self.total_macs


class Backend(Protocol):
    """A loaded network in one runtime; also a context manager that closes it.

    Attributes:
        input_shape: (N, 3, H, W) with the artifact's static batch N.
    """

    input_shape: tuple[int, ...]

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Outputs (N, K) float32 for a batch (N, 3, H, W) float32 of exactly ``input_shape``."""
        ...

    def placement(self) -> Placement:
        """What really executes; it runs one batch more, and may load the network once more."""
        ...

    def close(self) -> None:
        """Free the network."""
        ...

    def __enter__(self) -> Backend: ...

    def __exit__(self, *exc: object) -> None: ...


# Runtime -> class, imported only when it is opened. It is called as Class(model, threads).
BACKENDS = {
    "onnxruntime": "ort_backend:OrtBackend",
    "openvino": "openvino_backend:OpenVinoBackend",
    "torch": "torch_backend:TorchBackend",
}

# Runtime -> its packages in the order of import, and the extra that brings them.
PACKAGES = {
    "onnxruntime": (("onnxruntime",), "all"),
    "openvino": (("openvino",), "openvino"),
    "torch": (("torch", "timm", "safetensors"), "train"),
}


def missing_packages(runtime: str) -> list[str]:
    """Packages that a runtime needs and that are not installed; none of them is imported."""
    return [package for package in PACKAGES[runtime][0] if importlib.util.find_spec(package) is None]


def open_backend(variant: Variant, threads: int = 1) -> Backend:
    """Load a variant in its runtime.

    Args:
        variant: of a checked artifact.
        threads: threads that one inference may use.

    Raises:
        UserError: the runtime is not installed or cannot load the model, or ``threads`` is below 1.
    """
    runtime = variant_runtime(variant.name)
    if runtime not in BACKENDS:
        raise unknown_name("runtime", runtime, BACKENDS)
    if threads < 1:
        raise UserError(f"Cannot run with {threads} threads: give at least 1.")
    module, _, name = BACKENDS[runtime].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)(variant.model, threads)


def predict(backend: Backend, images: Iterable[np.ndarray]) -> np.ndarray:
    """Outputs for preprocessed images, one at a time, as a device meets them.

    Args:
        backend: a network whose batch is 1.
        images: (3, H, W) float32 each.

    Returns:
        (number of images, K) float32; (0, 0) where there are none.
    """
    outputs = [backend.run(image[None])[0] for image in images]
    return np.stack(outputs) if outputs else np.empty((0, 0), np.float32)


def check_batch(batch: np.ndarray, input_shape: tuple[int, ...]) -> None:
    """Refuse a batch that the network was not made for, before a runtime reshapes or converts it silently.

    Raises:
        ValueError: another shape or type.
    """
    if batch.shape != input_shape or batch.dtype != np.float32:
        raise ValueError(f"Got a batch {batch.shape} {batch.dtype}, the network takes {input_shape} float32.")


def cannot_load(runtime: str, model: Path, error: Exception) -> UserError:
    """The error for a model that its runtime refuses, as one line."""
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return UserError(
        f"{runtime} cannot load '{model}' ({reason}): export it again, or use another version of {runtime}."
    )
