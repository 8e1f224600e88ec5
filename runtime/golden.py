"""The golden pack: real preprocessed images and the reference's outputs for them, in ``golden.npz``.

Every runtime on every device is compared with it. It may come from elsewhere, so the sizes that its headers declare are
checked before anything is read, and pickled objects are never loaded.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import UserError
from .files import atomic_file

MAX_BYTES = 1 << 30


class Golden(NamedTuple):
    """Images and what the reference makes of them.

    Attributes:
        inputs: (N, 3, H, W) float32, preprocessed; or (N, H, W, 3) uint8 for a network that normalizes by itself.
        outputs: (N, K) float32; the first, where there are several, (N, C, h, w).
        more: the others, (N, C, h, w) float32 each.
    """

    inputs: np.ndarray
    outputs: np.ndarray
    more: tuple[np.ndarray, ...] = ()


def array_names(outputs: int) -> list[str]:
    """Names of the arrays of a pack with so many outputs."""
    return ["inputs", "outputs", *(f"outputs_{number}" for number in range(1, outputs))]


def write_golden(path: Path, inputs: np.ndarray, *outputs: np.ndarray) -> None:
    """Write images, as 8-bit integers where they are such, else as float32, and outputs as float32.

    Equal arrays give equal bytes.
    """
    arrays = [inputs if inputs.dtype == np.uint8 else np.asarray(inputs, np.float32)]
    arrays += [np.asarray(output, np.float32) for output in outputs]
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **dict(zip(array_names(len(outputs)), arrays, strict=True)))  # type: ignore[arg-type]


def check_golden(
    path: Path, input_shape: tuple[int, ...], *output_shapes: tuple[int, ...], input_dtype: str = "float32"
) -> None:
    """Check the declared arrays of a golden pack against the shapes of a network, whose first axis is the batch.

    Raises:
        UserError: it is no such pack, or one of other shapes or types.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = array_names(len(output_shapes))
            if (found := sorted(archive.namelist())) != sorted(f"{name}.npy" for name in names):
                raise UserError(f"The golden pack '{path}' holds {found[:5]}, not the arrays {' and '.join(names)}.")
            dtypes = (input_dtype, *("float32" for _ in output_shapes))
            inputs, *outputs = (
                _declared_shape(path, archive, f"{name}.npy", dtype) for name, dtype in zip(names, dtypes, strict=True)
            )
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy's header parser raise many kinds on a damaged file
        raise _unreadable(path, error) from None
    needed = [(inputs[0], *shape[1:]) for shape in (input_shape, *output_shapes)]
    if [inputs, *outputs] != needed or inputs[0] < 1:
        given = " and ".join(f"(N, {_join(shape)})" for shape in output_shapes)
        raise UserError(
            f"The golden pack '{path}' holds inputs {inputs} and outputs {', '.join(map(str, outputs))}: the network "
            f"takes (N, {_join(input_shape)}) and gives {given} with N at least 1."
        )


def load_golden(
    path: Path, input_shape: tuple[int, ...], *output_shapes: tuple[int, ...], input_dtype: str = "float32"
) -> Golden:
    """Read a golden pack after :func:`check_golden`.

    Raises:
        UserError: it is no pack of these shapes, or holds values that are not finite.
    """
    check_golden(path, input_shape, *output_shapes, input_dtype=input_dtype)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            inputs, outputs, *more = (arrays[name] for name in array_names(len(output_shapes)))
    except Exception as error:  # as above
        raise _unreadable(path, error) from None
    if not all(np.isfinite(array).all() for array in (inputs, outputs, *more)):
        raise UserError(f"The golden pack '{path}' holds values that are not finite: export it again.")
    return Golden(inputs, outputs, tuple(more))


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"The golden pack '{path}' cannot be read ({reason}): copy or export it again.")


def _declared_shape(path: Path, archive: zipfile.ZipFile, name: str, needed: str) -> tuple[int, ...]:
    with archive.open(name) as member:
        if np.lib.format.read_magic(member) != (1, 0):  # what numpy writes for plain arrays
            raise ValueError(f"{name} is not of npy version 1.0")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
    size = dtype.itemsize * math.prod(shape)
    if dtype != np.dtype(needed) or fortran_order or not shape:
        raise ValueError(f"{name} is {dtype} {shape}, not {needed} in C order")
    if size > MAX_BYTES or archive.getinfo(name).file_size > MAX_BYTES + 4096:
        raise UserError(f"The golden pack '{path}' declares {size} bytes: more than the {MAX_BYTES} that are read.")
    return shape


def _join(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape[1:]))
