"""Weights in safetensors files that may come from elsewhere: names, shapes and types are compared before reading.

A safetensors file starts with a list of what is in it. That list is compared with what the network needs, so that a
file which does not fit costs no memory, and is refused by the name of the first tensor that differs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, require

if TYPE_CHECKING:
    import torch

Described = Mapping[str, tuple[tuple[int, ...], str]]
"""Tensor -> its shape and safetensors' name of its type, e.g. ((64, 3, 7, 7), "F32")."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def describe_weights(weights: Mapping[str, torch.Tensor]) -> Described:
    """What a file of these tensors would list."""
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    return {name: (tuple(value.shape), names.get(value.dtype, str(value.dtype))) for name, value in weights.items()}


def list_weights(path: Path) -> Described:
    """What a file lists; no tensor is read.

    Raises:
        UserError: it is missing or damaged.
    """
    safetensors = require("safetensors", "train")
    if not path.is_file():
        raise UserError(f"No weights at '{path}': check the path.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return {name: (tuple(item.get_shape()), item.get_dtype()) for name, item in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def check_weights(what: str, given: Described, expected: Described, fits: str, any_float: bool = False) -> None:
    """Compare what is given with what a network needs.

    Args:
        what: name of the given, for errors.
        given: what there is.
        expected: what the network needs.
        fits: what the given would have to fit, for errors.
        any_float: whether one floating-point type may stand for another.

    Raises:
        UserError: a tensor is missing, unknown, or of another shape or type; the first by name is named.
    """
    for verb, names in (("lacks", expected.keys() - given.keys()), ("has the unknown", given.keys() - expected.keys())):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"The {what} {verb} tensor '{min(names)}'{rest}: it does not fit {fits}.")
    for name in sorted(given):
        (shape, kind), (needed_shape, needed_kind) = given[name], expected[name]
        converted = any_float and {kind, needed_kind} <= FLOATS
        if shape != needed_shape or (kind != needed_kind and not converted):
            raise UserError(f"The {what} has '{name}' as {given[name]}, the network needs {expected[name]}.")


def read_weights(path: Path, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Some tensors of a file whose list has been checked.

    Raises:
        UserError: it is damaged.
    """
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return UserError(f"The weights '{path}' are damaged ({reason}): make them again.")
