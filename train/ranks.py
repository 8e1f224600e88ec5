"""What several processes of one run share."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of ``x`` over all processes; ``x`` itself where there is only one."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()
