"""A queue of embeddings as a ring whose place is a function of the step: no pointer to save, none to lose."""

from __future__ import annotations

import torch
from torch import Tensor


def write_ring(ring: Tensor, rows: Tensor, writes: int) -> None:
    """Overwrite the oldest rows of a ring.

    Args:
        ring: (Q, …), written to; Q need not be a multiple of B.
        rows: (B, …), B <= Q, the same number every time.
        writes: how often it was written to before.
    """
    first = writes * len(rows) % len(ring)
    places = torch.arange(first, first + len(rows), device=ring.device) % len(ring)
    ring[places] = rows.to(ring.dtype)
