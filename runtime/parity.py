"""How closely the outputs of one runtime agree with those of the reference, image by image (no torch).

The cosine forgives a common scale, the largest absolute error does not, and the top-1 agreement is what a user of a
classifier notices. An output that is not finite counts as the worst there is, never as NaN.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Parity:
    """Agreement of N outputs with N reference outputs.

    Attributes:
        cosine_min: smallest cosine between an output and its reference, -1..1; -1 where an output is not finite.
        cosine_mean: mean cosine, -1..1.
        max_abs_error: largest absolute difference of two numbers, in the outputs' own unit; None where one of them is
            not finite, as JSON has no infinity.
        top1_agreement: share of the images whose largest output is at the same position, 0..1. An output that is not
            finite agrees with nothing. Of features (an embedding) it is the same argmax, which has no meaning as a
            class but still moves where features do; with one output (K = 1) every finite output agrees.
        n: number of images.
    """

    cosine_min: float
    cosine_mean: float
    max_abs_error: float | None
    top1_agreement: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


def compare_outputs(outputs: np.ndarray, reference: np.ndarray) -> Parity:
    """Compare outputs with the reference's for the same images.

    Two zero vectors have the cosine 1, a zero vector and another have 0.

    Args:
        outputs: (N, K) float32.
        reference: (N, K) float32.

    Raises:
        ValueError: other shapes, or N or K is 0.
    """
    if outputs.shape != reference.shape or outputs.ndim != 2 or 0 in outputs.shape:
        raise ValueError(
            f"Got outputs {outputs.shape} and a reference {reference.shape}: both must be (N, K), N, K > 0."
        )
    given, expected = outputs.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(given).all(axis=1) & np.isfinite(expected).all(axis=1)  # (N,)
    cosines = np.full(len(given), -1.0)
    cosines[finite] = _cosines(given[finite], expected[finite])
    agree = finite.copy()
    agree[finite] = given[finite].argmax(axis=1) == expected[finite].argmax(axis=1)
    return Parity(
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        max_abs_error=float(np.abs(given - expected).max()) if finite.all() else None,
        top1_agreement=float(agree.mean()),
        n=len(given),
    )


def _cosines(given: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Cosines (N,) of two (N, K) float64 arrays of finite numbers."""
    # Scaled to 1 first: squares of the largest float32 still fit float64, those of the smallest do not.
    scales = [np.abs(rows).max(axis=1, keepdims=True) for rows in (given, expected)]
    units = []
    for rows, scale in zip((given, expected), scales, strict=True):
        scaled = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
        length = np.linalg.norm(scaled, axis=1, keepdims=True)
        units.append(np.divide(scaled, length, out=scaled, where=length > 0))
    both_zero = (scales[0] == 0).ravel() & (scales[1] == 0).ravel()
    return np.where(both_zero, 1.0, np.clip((units[0] * units[1]).sum(axis=1), -1.0, 1.0))
