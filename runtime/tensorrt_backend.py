"""TensorRT on a GPU: the engine is built here, from the ONNX file and its recipe, and kept in a cache.

An engine is bound to the version of TensorRT and to the GPU, so an artifact carries none. The first opening of a
variant takes as long as the builder does (seconds to minutes), later ones read the cache, which is keyed by the hash of
the ONNX file, the version, the GPU and the recipe. A timing cache per version and GPU makes further builds quicker.

All but the GPU's part is tested; running has not been tried yet, for want of one ("Verified on" in the README).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Placement, TensorSpec, cannot_load, check_batch
from .cuda_device import CudaDevice
from .engine_cache import EngineCache, default_folder
from .errors import UserError
from .progress import say
from .tensorrt_build import (
    RECIPE,
    Recipe,
    build_engine,
    import_tensorrt,
    keeps_timing,
    logger,
    read_recipe,
    take_messages,
)

SLOW_BUILD_S = 2.0


class TensorRtBackend:
    """A network in TensorRT.

    Args:
        model: the ONNX file, with its recipe beside it; one float32 input of static shape.
        threads: not used: the GPU does the work.
        device: the GPU's number, as text; None is the first.
        cache: folder of engines; None is the user's own.

    Attributes:
        input_dtype: of the input.
        dynamic_batch: an engine is built for one batch.
    """

    def __init__(self, model: Path, threads: int, device: str | None = None, cache: Path | None = None) -> None:
        self._trt = import_tensorrt()
        self._gpu = CudaDevice(device)
        try:
            recipe = read_recipe(model.parent / RECIPE)
            self._engine = open_engine(self._trt, model, recipe, self._gpu.describe(), cache)
            self._context = self._engine.create_execution_context()
            self._context.set_input_shape(recipe.input_name, recipe.input_shape)
            self.inputs, self.outputs = _specs(self._trt, self._engine, self._context)
            if len(self.inputs) != 1 or len(self.inputs[0].shape) != 4 or not self.outputs:
                raise UserError(f"The model '{model}' has {self.inputs}: it must have one input of 4 fixed sides.")
            self.input_shape, self.input_dtype, self.dynamic_batch = self.inputs[0].shape, self.inputs[0].dtype, False
            self._results = {spec.name: np.empty(spec.shape, spec.dtype) for spec in self.outputs}
            self._addresses = {
                spec.name: self._gpu.take(int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize)
                for spec in (*self.inputs, *self.outputs)
            }
            for name, address in self._addresses.items():
                self._context.set_tensor_address(name, address)
        except BaseException:
            self._gpu.close()
            raise

    def __enter__(self) -> TensorRtBackend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, batch: np.ndarray) -> np.ndarray:
        """The first output, (N, K) float32, for a batch of ``input_shape``, copied to the GPU and back."""
        return self.run_all(batch)[0]

    def run_all(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """All outputs, float32, in the engine's order."""
        check_batch(batch, self.input_shape, self.input_dtype)
        self._gpu.upload(self._addresses[self.inputs[0].name], np.ascontiguousarray(batch))
        if not self._context.execute_async_v3(self._gpu.stream):
            raise RuntimeError("; ".join(take_messages(self._trt)) or "TensorRT could not run the engine")
        for name, result in self._results.items():
            self._gpu.download(result, self._addresses[name])
        self._gpu.wait()
        return tuple(self._results[spec.name].astype(np.float32) for spec in self.outputs)

    def placement(self) -> Placement:
        """The layers of the engine, which tell no shapes of all fused operands: the integer share is not known."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        layers = json.loads(text).get("Layers", [])
        kinds = Counter(str(layer.get("LayerType")) if isinstance(layer, dict) else "layer" for layer in layers)
        return Placement(0, 0, dict(sorted(kinds.items())), dict(sorted(kinds.items())))

    def close(self) -> None:
        """Free the engine and its memory on the GPU."""
        del self._context, self._engine
        self._gpu.close()


def open_engine(trt: Any, model: Path, recipe: Recipe, gpu: dict[str, str], cache: Path | None) -> Any:
    """The engine of a model on a GPU, from the cache where it is there.

    Raises:
        UserError: TensorRT refuses the model, or the cache is not this user's alone.
    """
    content = model.read_bytes()
    machine = {"runtime": trt.__name__, "version": trt.__version__, "gpu": gpu}
    facts = {**machine, "onnx_sha256": hashlib.sha256(content).hexdigest(), "recipe": recipe.to_json()}
    engines = EngineCache(cache or default_folder())
    runtime = trt.Runtime(logger(trt))
    if stored := engines.load("engine", facts):
        if engine := runtime.deserialize_cuda_engine(stored):
            return engine
        engines.remove("engine", facts)
        say(f"The cached engine of '{model}' is built again: {'; '.join(take_messages(trt)) or 'it was refused'}.")
    start = time.monotonic()
    timing = (engines.load("timing", machine) or b"") if keeps_timing(trt) else None
    build = build_engine(trt, content, recipe, timing)
    if build.engine is None:
        raise cannot_load("TensorRT", model, RuntimeError("; ".join(build.messages)))
    for message in build.messages:
        say(f"TensorRT on '{model}': {message}")
    engine = runtime.deserialize_cuda_engine(build.engine)
    if engine is None:
        raise cannot_load("TensorRT", model, RuntimeError("; ".join(take_messages(trt))))
    engines.store("engine", facts, build.engine)
    if build.timing:
        engines.store("timing", machine, build.timing)
    if time.monotonic() - start > SLOW_BUILD_S:
        say(f"Built the engine of '{model}' in {time.monotonic() - start:.0f} s, kept in '{engines.folder}'.")
    return engine


def _specs(trt: Any, engine: Any, context: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an engine."""
    names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
    specs = {
        name: TensorSpec(
            name, tuple(context.get_tensor_shape(name)), np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name
        )
        for name in names
    }
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    return tuple(specs[name] for name in inputs), tuple(specs[name] for name in names if name not in inputs)
