"""What the losses of several methods share."""

from __future__ import annotations

from torch import Tensor


def cross_entropy(target: Tensor, log_prediction: Tensor) -> Tensor:
    """Mean of H(target, prediction) over all distributions: target (…, K) probabilities, broadcast; scalar, in nats."""
    return -(target * log_prediction).sum(dim=-1).mean()
