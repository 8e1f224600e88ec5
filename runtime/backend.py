"""The one interface to every runtime: open a variant, run batches, ask what really executed, close."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .artifact import Variant, variant_runtime
from .errors import UserError, unknown_name
from .manifest import MAX_BATCH


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


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a network.

    Attributes:
        name: as the runtime knows it.
        shape: static.
        dtype: numpy's name of its type, e.g. ``"float32"``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class BackendOptions:
    """How a runtime is to run.

    Attributes:
        threads: that one inference may use on a CPU.
        device: where it runs, by the runtime's own names: an execution provider of ONNX Runtime, OpenVINO's ``CPU``,
            ``GPU``, ``NPU``, torch's ``cpu``, ``cuda``, ``mps``, the number of the GPU for TensorRT. None: the CPU, and
            TensorRT's first GPU.
        cache: folder for what the runtime compiles (OpenVINO, TensorRT); None: OpenVINO keeps nothing, TensorRT keeps
            its engines in the user's cache folder.
    """

    threads: int = 1
    device: str | None = None
    cache: Path | None = None


DEFAULTS = BackendOptions()


class Backend(Protocol):
    """A loaded network in one runtime; also a context manager that closes it.

    Attributes:
        input_shape: (N, 3, H, W), or (N, H, W, 3) where the network normalizes by itself, with the artifact's batch N.
        input_dtype: ``"float32"`` or ``"uint8"``.
        dynamic_batch: it takes any number of images at a time beside N.
        inputs: the one input.
        outputs: the outputs, of which ``run`` gives the first; with the artifact's batch, as the input.
    """

    input_shape: tuple[int, ...]
    input_dtype: str
    dynamic_batch: bool
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, batch: np.ndarray) -> np.ndarray:
        """The only output, or the first, (N, …) float32, for a batch of ``input_shape`` and ``input_dtype``."""
        ...

    def run_all(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs, (N, …) float32 each, in the order of the manifest."""
        ...

    def placement(self) -> Placement:
        """What really executes; it runs one batch more, and may load the network once more."""
        ...

    def close(self) -> None:
        """Free the network."""
        ...

    def __enter__(self) -> Backend: ...

    def __exit__(self, *exc: object) -> None: ...


# Runtime -> class, imported only when it is opened. It is called as Class(model, threads, device=, cache=).
BACKENDS = {
    "onnxruntime": "ort_backend:OrtBackend",
    "openvino": "openvino_backend:OpenVinoBackend",
    "tensorrt": "tensorrt_backend:TensorRtBackend",
    "torch": "torch_backend:TorchBackend",
    "coreml": "coreml_backend:CoreMlBackend",
}

# Runtime -> its packages in the order of import, and the extra that brings them.
PACKAGES = {
    "onnxruntime": (("onnxruntime",), "all"),
    "openvino": (("openvino",), "openvino"),
    "tensorrt": (("tensorrt",), "tensorrt"),
    "torch": (("torch", "timm", "safetensors"), "train"),
    "coreml": (("coremltools" if sys.platform == "darwin" else "numpy",), "coreml"),  # elsewhere it is interpreted
}

# Package -> another that does as well.
ALTERNATIVES = {"tensorrt": "tensorrt_rtx"}

# Runtime -> function that gives the reason for which this machine cannot run it, or None.
MACHINE_CHECKS = {"tensorrt": "cuda_device:why_no_gpu"}


def installed_package(package: str) -> str | None:
    """The package, or the other that does as well, that is installed; it is not imported."""
    names = [name for name in (package, ALTERNATIVES.get(package)) if name is not None]
    return next((name for name in names if importlib.util.find_spec(name) is not None), None)


def missing_packages(runtime: str) -> list[str]:
    """Packages that a runtime needs and that are not installed; none of them is imported."""
    return [package for package in PACKAGES[runtime][0] if installed_package(package) is None]


def why_not_on_this_machine(runtime: str) -> str | None:
    """The reason for which a runtime that is installed cannot run here; None where none is known."""
    if runtime not in MACHINE_CHECKS:
        return None
    return _load(MACHINE_CHECKS[runtime])()


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def open_backend(variant: Variant, options: BackendOptions = DEFAULTS) -> Backend:
    """Load a variant in its runtime.

    Args:
        variant: of a checked artifact.
        options: how it is to run.

    Raises:
        UserError: the runtime is not installed, does not have the device or cannot load the model, or the number of
            threads is below 1.
    """
    runtime = variant_runtime(variant.name)
    if runtime not in BACKENDS:
        raise unknown_name("runtime", runtime, BACKENDS)
    if options.threads < 1:
        raise UserError(f"Cannot run with {options.threads} threads: give at least 1.")
    given = {"device": options.device, "cache": options.cache}
    given = {name: value for name, value in given.items() if value is not None}  # else the class's own default
    return _load(BACKENDS[runtime])(variant.model, options.threads, **given)


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


def predict_all(backend: Backend, images: Iterable[np.ndarray]) -> tuple[np.ndarray, ...]:
    """As :func:`predict`, all outputs: (number of images, …) float32 each; () where there are no images."""
    outputs = [backend.run_all(image[None]) for image in images]
    return tuple(np.concatenate(rows) for rows in zip(*outputs, strict=True))


def check_batch(
    batch: np.ndarray, input_shape: tuple[int, ...], dtype: str = "float32", dynamic_batch: bool = False
) -> None:
    """Refuse a batch that the network was not made for, before a runtime reshapes or converts it silently.

    Raises:
        ValueError: another shape or type.
    """
    fits = batch.shape == input_shape
    if dynamic_batch:
        fits = batch.shape[1:] == input_shape[1:] and batch.ndim == len(input_shape) and 1 <= len(batch) <= MAX_BATCH
    if not fits or batch.dtype != np.dtype(dtype):
        takes = f"(1..{MAX_BATCH}, {', '.join(map(str, input_shape[1:]))})" if dynamic_batch else str(input_shape)
        raise ValueError(f"Got a batch {batch.shape} {batch.dtype}, the network takes {takes} {dtype}.")


def cannot_load(runtime: str, model: Path, error: Exception) -> UserError:
    """The error for a model that its runtime refuses, as one line."""
    return _refused(f"{runtime} cannot load", runtime, model, error)


def cannot_run(runtime: str, model: Path, error: Exception) -> UserError:
    """The error for a model that was loaded and fails on its input, as one line."""
    return _refused(f"{runtime} loads, but cannot run", runtime, model, error)


def _refused(what: str, runtime: str, model: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return UserError(f"{what} '{model}' ({reason}): export it again, or use another version of {runtime}.")
