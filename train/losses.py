"""What the losses of several methods share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .heads import at_least_float32

KOLEO_EPSILON = 1e-6  # two images alike would otherwise have an infinite loss


def cross_entropy(target: Tensor, log_prediction: Tensor) -> Tensor:
    """Mean of H(target, prediction) over all distributions: target (…, K) probabilities, broadcast; scalar, in nats."""
    return -(target * log_prediction).sum(dim=-1).mean()


def koleo(embeddings: Tensor) -> Tensor:
    """The KoLeo term: mean of -log of the distance to the nearest neighbour on the unit sphere, within each view.

    Sablayrolles et al., 2019, arXiv 1806.03198, equation 2; in self-supervision Oquab et al., 2023, arXiv 2304.07193.

    Args:
        embeddings: (V, N, D) of V views of the same N images, N >= 2.

    Returns:
        Scalar; the lower, the more evenly they are spread.
    """
    directions = functional.normalize(at_least_float32(embeddings), dim=-1)
    with torch.no_grad():
        similarities = directions @ directions.mT  # (V, N, N)
        similarities.diagonal(dim1=1, dim2=2).fill_(-2)
        nearest = similarities.argmax(dim=2, keepdim=True)
    neighbours = directions.take_along_dim(nearest, dim=1)
    return -((directions - neighbours).norm(dim=-1) + KOLEO_EPSILON).log().mean()
