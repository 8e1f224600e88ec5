"""Multiply-accumulates (MACs) of one operator from the shapes of its tensors, as every runtime reports them."""

from __future__ import annotations

import math
from collections.abc import Sequence

INTEGER_TYPES = frozenset({"int8", "uint8", "i8", "u8"})


def convolution_macs(output: Sequence[int], weight: Sequence[int], out_channels: int) -> int:
    """MACs of a convolution, grouped or not.

    Args:
        output: shape of the output, in any layout.
        weight: shape of the weights: (out, in / groups, kernel…) or (groups, out / groups, in / groups, kernel…).
        out_channels: output channels, over all groups.
    """
    return math.prod(output) * math.prod(weight) // out_channels


def matmul_macs(a: Sequence[int], b: Sequence[int], output: Sequence[int]) -> int | None:
    """MACs of a matrix product whose operands may be transposed in their last two axes.

    Args:
        a: shape of the left operand.
        b: shape of the right operand.
        output: shape of the product.

    Returns:
        MACs, or None where the shapes are not those of such a product.
    """
    inner_b = b[0] if len(b) == 1 else b[-1] * b[-2] // output[-1] if len(b) > 1 and output and output[-1] else 0
    if not inner_b or inner_b not in a:
        return None
    return math.prod(output) * inner_b
