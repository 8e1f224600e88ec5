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
        inputs: (N, 3, H, W) float32, preprocessed.
        outputs: (N, K) float32.
    """

    inputs: np.ndarray
    outputs: np.ndarray


def write_golden(path: Path, inputs: np.ndarray, outputs: np.ndarray) -> None:
    """Write (N, 3, H, W) and (N, K) arrays as float32; equal arrays give equal bytes."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        np.savez(file, inputs=np.asarray(inputs, np.float32), outputs=np.asarray(outputs, np.float32))


def check_golden(path: Path, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> None:
    """Check the declared arrays of a golden pack against the shapes of a network, whose first axis is the batch.

    Raises:
        UserError: it is no such pack, or one of other shapes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
            if names != ["inputs.npy", "outputs.npy"]:
                raise UserError(f"The golden pack '{path}' holds {names[:5]}, not the arrays inputs and outputs.")
            inputs, outputs = (_declared_shape(path, archive, name) for name in names)
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy's header parser raise many kinds on a damaged file
        raise _unreadable(path, error) from None
    if inputs[:1] != outputs[:1] or inputs[1:] != input_shape[1:] or outputs[1:] != output_shape[1:] or inputs[0] < 1:
        raise UserError(
            f"The golden pack '{path}' holds inputs {inputs} and outputs {outputs}: the network takes "
            f"(N, {_join(input_shape)}) and gives (N, {_join(output_shape)}) with N at least 1."
        )


def load_golden(path: Path, input_shape: tuple[int, ...], output_shape: tuple[int, ...]) -> Golden:
    """Read a golden pack after :func:`check_golden`.

    Raises:
        UserError: it is no pack of these shapes, or holds values that are not finite.
    """
    check_golden(path, input_shape, output_shape)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            golden = Golden(arrays["inputs"], arrays["outputs"])
    except Exception as error:  # as above
        raise _unreadable(path, error) from None
    if not all(np.isfinite(array).all() for array in golden):
        raise UserError(f"The golden pack '{path}' holds values that are not finite: export it again.")
    return golden


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"The golden pack '{path}' cannot be read ({reason}): copy or export it again.")


def _declared_shape(path: Path, archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as member:
        if np.lib.format.read_magic(member) != (1, 0):  # what numpy writes for plain arrays
            raise ValueError(f"{name} is not of npy version 1.0")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
    size = 4 * math.prod(shape)
    if dtype != np.float32 or fortran_order or not shape:
        raise ValueError(f"{name} is {dtype} {shape}, not float32 in C order")
    if size > MAX_BYTES or archive.getinfo(name).file_size > MAX_BYTES + 4096:
        raise UserError(f"The golden pack '{path}' declares {size} bytes: more than the {MAX_BYTES} that are read.")
    return shape


def _join(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape[1:]))
