"""The moving average of a network's weights: DINO's teacher, MoCo's key network."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_ema(average: nn.Module, source: nn.Module, momentum: float) -> None:
    """Average <- momentum * average + (1 - momentum) * source, for all parameters.

    Buffers are left: they are the statistics of the average's own forward passes.
    """
    for old, new in zip(average.parameters(), source.parameters(), strict=True):
        old.lerp_(new, 1 - momentum)
