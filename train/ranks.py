"""What several processes of one run share. Alone, each function gives its argument back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process, counted from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of ``x`` over all processes."""
    return _reduce(x, dist.ReduceOp.SUM)


def max_over_ranks(x: Tensor) -> Tensor:
    """Largest ``x`` of all processes, element by element."""
    return _reduce(x, dist.ReduceOp.MAX)


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of ``x`` over all processes."""
    return sum_over_ranks(x) / world_size() if world_size() > 1 else x


def gather_over_ranks(x: Tensor) -> Tensor:
    """All processes' ``x``, (n, …) each, one after the other by rank: (ranks * n, …), without gradient."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def _reduce(x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if world_size() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, operation)
    return x
