"""A reference interpreter of ML Programs in NumPy, for machines without Core ML.

It proves what a program computes: its operators, their order and parameters, the stored weights and scales, and the
rounding to 16 bits of every value that the program types as fp16. Inside an operator it computes in float32, so it does
not show how the Neural Engine, a GPU or Core ML's own CPU kernels round, nor in which form they run the program, nor in
what time. An operator that it does not know is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .coreml_ops import OPS
from .coreml_program import DTYPES, Name, Operation, Program, TensorType, read_program
from .errors import UserError

FLOATS = ("fp16", "fp32")


class Step(NamedTuple):
    """One operator, ready to run.

    Attributes:
        operation: what the program says.
        function: what computes it.
        known: its constant arguments.
        needed: parameter -> what is bound to it, where some of that is only known while running.
    """

    operation: Operation
    function: Callable[..., Any]
    known: Mapping[str, Any]
    needed: Mapping[str, tuple[Any, ...]]


class Interpreter:
    """A program with its constants worked out.

    Args:
        package: the ``.mlpackage`` folder.

    Raises:
        UserError: it cannot be read, or has an operator that is not known.
    """

    def __init__(self, package: Path) -> None:
        self._package = package
        self.program: Program = read_program(package)
        unknown = sorted({operation.kind for operation in self.program.operations} - {*OPS, "const"})
        if unknown:
            raise UserError(
                f"The Core ML model '{package}' has the operator {', '.join(map(repr, unknown))}, which the reference "
                "interpreter does not know: run it by Core ML on macOS."
            )
        self._constants: dict[str, Any] = {}
        self._steps: list[Step] = []
        for operation in self.program.operations:
            if operation.kind == "const":
                name, kind = self._only_output(operation)
                self._constants[name] = self._typed(operation, operation.constants.get("val"), kind)
                continue
            step = self._step(operation)
            if step.needed:
                self._steps.append(step)
            else:
                self._constants |= self._run(step, {})

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Run the program.

        Args:
            inputs: of the names, shapes and types that the program states.

        Returns:
            Its outputs: float32 or integer arrays, and what ``classify`` gives.

        Raises:
            UserError: an operator cannot be computed, or gives something else than the program says.
        """
        values = dict(self._constants)
        for name, kind in self.program.inputs.items():
            if name not in inputs or inputs[name].shape != kind.shape or kind.dtype not in FLOATS:
                raise UserError(f"The Core ML model '{self._package}' needs the input {name!r} as {kind}.")
            values[name] = _rounded(inputs[name].astype(np.float32), kind)
        for step in self._steps:
            values |= self._run(step, values)
        missing = [name for name in self.program.outputs if name not in values]
        if missing:
            raise UserError(f"The Core ML model '{self._package}' computes no {missing[0]!r}: export it again.")
        return {name: values[name] for name in self.program.outputs}

    def _step(self, operation: Operation) -> Step:
        known: dict[str, Any] = dict(operation.constants)
        needed: dict[str, tuple[Any, ...]] = {}
        for parameter, bound in operation.inputs.items():
            if len(bound) != 1 and parameter != "values":
                raise self._wrong(operation, f"{parameter} has {len(bound)} values")
            if all(value in self._constants for value in bound if isinstance(value, Name)):
                known[parameter] = _taken(parameter, bound, self._constants)
            else:
                needed[parameter] = bound
        return Step(operation, OPS[operation.kind], {name: _number(value) for name, value in known.items()}, needed)

    def _run(self, step: Step, values: Mapping[str, Any]) -> dict[str, Any]:
        """The results of an operator, by name, rounded to and checked against the types that the program states."""
        try:
            taken = {parameter: _taken(parameter, bound, values) for parameter, bound in step.needed.items()}
            with np.errstate(all="ignore"):  # infinity and NaN are results like others here
                result = step.function(**step.known, **taken)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, MemoryError) as error:
            raise self._wrong(step.operation, str(error)) from None
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(step.operation.outputs):
            raise self._wrong(step.operation, f"it gives {len(results)} values")
        return {
            name: self._typed(step.operation, value, kind)
            for value, (name, kind) in zip(results, step.operation.outputs, strict=True)
        }

    def _only_output(self, operation: Operation) -> tuple[str, TensorType]:
        if len(operation.outputs) != 1:
            raise self._wrong(operation, f"it gives {len(operation.outputs)} values")
        return operation.outputs[0]

    def _typed(self, operation: Operation, value: Any, kind: TensorType) -> Any:
        if kind.dtype not in DTYPES:  # strings, dictionaries
            return value
        if not isinstance(value, np.ndarray | np.generic):
            raise self._wrong(operation, f"it gives no {kind.dtype}")
        value = _number(np.asarray(value))
        expected = np.dtype(np.float32) if kind.dtype in FLOATS else DTYPES[kind.dtype]
        if value.shape != kind.shape or value.dtype != expected:
            raise self._wrong(operation, f"it gives {value.dtype} {value.shape}, the program says {kind}")
        return _rounded(value, kind)

    def _wrong(self, operation: Operation, reason: str) -> UserError:
        name = operation.outputs[0][0] if operation.outputs else ""
        reason = " ".join(reason.split())[:200] or "it fails"
        return UserError(f"The Core ML model '{self._package}' cannot run: {operation.kind} {name[:100]!r}: {reason}.")


def _taken(parameter: str, bound: tuple[Any, ...], values: Mapping[str, Any]) -> Any:
    """An argument: one value, or a tuple of the parameter ``values``."""
    taken = tuple(values[value] if isinstance(value, Name) else _number(value) for value in bound)
    return taken if parameter == "values" else taken[0]


def _number(value: Any) -> Any:
    """An array as it is computed with: floats in float32."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype != np.float32:
        return value.astype(np.float32)
    return value


def _rounded(value: np.ndarray, kind: TensorType) -> np.ndarray:
    """A value to the precision of its type, in float32 all the same."""
    if kind.dtype != "fp16":
        return value
    with np.errstate(over="ignore"):  # beyond 65504 it is infinite in 16 bits
        return value.astype(np.float16).astype(np.float32)
