"""Core ML: on macOS its own runtime, elsewhere the reference interpreter, which proves semantics and times nothing.

A package takes an 8-bit image and normalizes it itself, while a backend is given normalized images. So they are turned
back into the 8-bit image that they come from, by the preprocessing in the package's metadata; a batch that comes from
none is refused rather than rounded.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Placement, TensorSpec, cannot_load, check_batch
from .coreml_program import Name, Operation, Program, TensorType, read_program
from .coreml_reference import Interpreter
from .errors import UserError, require, unknown_name
from .macs import convolution_macs, matmul_macs
from .preprocess import Preprocess

# Keys of a package's user-defined metadata; each value is JSON.
PREPROCESS, LABELS, ORIGIN = "midge.preprocess", "midge.labels", "midge.origin"

NATIVE = sys.platform == "darwin"
"""Whether Core ML itself runs here."""

LARGEST_ROUNDING = 0.02  # of a grey level; float32 leaves 1e-4
COMPUTE_UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")


class CoreMlBackend:
    """A network in Core ML or in the reference interpreter.

    Args:
        model: the ``.mlpackage`` folder; one RGB image in, one (1, K) output.
        threads: not used: Core ML chooses its own.
        device: where Core ML may run it, one of ``COMPUTE_UNITS``; None is all of them.
        cache: not used: nothing is kept.
    """

    def __init__(self, model: Path, threads: int, device: str | None = None, cache: Path | None = None) -> None:
        self.model = model
        compute_units = device or COMPUTE_UNITS[0]
        if compute_units not in COMPUTE_UNITS:
            raise unknown_name("compute units", compute_units, COMPUTE_UNITS)
        interpreter = None if NATIVE else Interpreter(model)
        program = read_program(model) if interpreter is None else interpreter.program
        if program.image_inputs != tuple(program.inputs) or not len(program.inputs) == len(program.outputs) == 1:
            raise UserError(
                f"The Core ML model '{model}' takes {list(program.inputs)} and gives {list(program.outputs)}: it must "
                "take one image and give one output."
            )
        (self._input, kind), self._output = next(iter(program.inputs.items())), program.outputs[0]
        self.input_shape: tuple[int, ...] = kind.shape
        self.input_dtype = "float32"
        self.dynamic_batch = False
        kinds = dict(output for operation in program.operations for output in operation.outputs)
        if self._output not in kinds:
            raise UserError(f"The Core ML model '{model}' computes no {self._output!r}: export it again.")
        self.inputs = (TensorSpec(self._input, kind.shape),)
        self.outputs = (TensorSpec(self._output, kinds[self._output].shape),)
        self._preprocess = _preprocess(program, model)
        self._program = program
        self._interpreter = interpreter
        self._native: Any = _open_native(model, compute_units) if interpreter is None else None

    def __enter__(self) -> CoreMlBackend:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Outputs (1, K) float32 for a batch of ``input_shape``, made by the artifact's preprocessing.

        Raises:
            UserError: the batch does not come from 8-bit images.
        """
        check_batch(batch, self.input_shape)
        pixels = self._pixels(batch)
        if self._interpreter is not None:
            output = self._interpreter({self._input: pixels.astype(np.float32)})[self._output]
        else:
            from PIL import Image

            image = Image.fromarray(np.ascontiguousarray(pixels[0].transpose(1, 2, 0)))
            output = self._native.predict({self._input: image})[self._output]
        return np.asarray(output, np.float32)

    def run_all(self, batch: np.ndarray) -> tuple[np.ndarray, ...]:
        """The one output, (1, K) float32."""
        return (self.run(batch),)

    def close(self) -> None:
        """Free the network."""
        del self._program, self._interpreter, self._native

    def placement(self) -> Placement:
        """The program's operators and multiply-accumulates; in which types they run is not known in either case."""
        ops, total_macs = count_macs(self._program)
        where = "computed by the reference interpreter" if self._interpreter else "Core ML does not tell"
        return Placement(0, total_macs, ops, {f"({where})": 1})

    def _pixels(self, batch: np.ndarray) -> np.ndarray:
        """The 8-bit images (N, 3, H, W) that a batch comes from."""
        mean, std = (np.array(values)[:, None, None] for values in (self._preprocess.mean, self._preprocess.std))
        levels = 255 * (batch * std + mean)
        pixels = np.clip(np.round(levels), 0, 255)
        if not np.abs(levels - pixels).max() <= LARGEST_ROUNDING:
            raise UserError("Core ML takes 8-bit images: give images that the artifact's preprocessing made.")
        return pixels.astype(np.uint8)


def _preprocess(program: Program, model: Path) -> Preprocess:
    """The preprocessing that a package was exported with."""
    try:
        value = json.loads(program.metadata.get(PREPROCESS, ""))
    except (ValueError, RecursionError):
        raise UserError(f"The Core ML model '{model}' does not say its preprocessing: export it by midge.") from None
    return Preprocess.from_json(value, f"preprocessing of the Core ML model '{model}'")


def _open_native(model: Path, compute_units: str) -> Any:
    """The network in Core ML."""
    coremltools = require("coremltools", "coreml")
    try:
        return coremltools.models.MLModel(str(model), compute_units=coremltools.ComputeUnit[compute_units])
    except Exception as error:  # its exceptions share no base class
        raise cannot_load("Core ML", model, error) from None


def count_macs(program: Program) -> tuple[dict[str, int], int]:
    """How many of each operator a program has, constants aside, and its multiply-accumulates."""
    kinds = {name: kind for operation in program.operations for name, kind in operation.outputs} | dict(program.inputs)
    ops: Counter[str] = Counter()
    macs = 0
    for operation in program.operations:
        if operation.kind == "const" or operation.kind.startswith("constexpr_"):
            continue
        ops[operation.kind] += 1
        output = operation.outputs[0][1].shape
        x, y = (_shape(operation, parameter, kinds) for parameter in ("x", "y"))
        weight = _shape(operation, "weight", kinds)
        if operation.kind == "conv" and weight:
            macs += convolution_macs(output, weight, weight[0])
        elif operation.kind == "linear" and weight:
            macs += math.prod(output) * weight[-1]
        elif operation.kind == "matmul":
            macs += matmul_macs(x, y, output) or 0
    return dict(sorted(ops.items())), macs


def _shape(operation: Operation, parameter: str, kinds: Mapping[str, TensorType]) -> tuple[int, ...]:
    """Shape of what is bound to a parameter by name; () where nothing is."""
    bound = operation.inputs.get(parameter, ())
    return kinds[bound[0]].shape if bound and isinstance(bound[0], Name) and bound[0] in kinds else ()
