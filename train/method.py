"""What every self-supervised method takes and gives; each is one file beside this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn


class Views(NamedTuple):
    """All views of N images, float32, normalized, channels last in memory; view by view, so each is a block of N.

    Attributes:
        global_views: (2 N, 3, h, h).
        local_views: (L N, 3, l, l).
    """

    global_views: Tensor
    local_views: Tensor


class Losses(NamedTuple):
    """What a step gives.

    Attributes:
        total: scalar, the one with a gradient.
        global_pairs: scalar, detached: mean loss over the pairs of global views, before its weight.
        local_pairs: scalar, detached: the same for the pairs with a local view.
        embeddings: (M, D), detached: of the global views, for the watch on collapse.
    """

    total: Tensor
    global_pairs: Tensor
    local_pairs: Tensor
    embeddings: Tensor


class Method(Protocol):
    """A self-supervised method: an ``nn.Module`` whose trained parameters are those that require a gradient."""

    @property
    def backbone(self) -> nn.Module:
        """The network that pretraining is for."""
        ...

    def loss(self, views: Views, step: int) -> Losses:
        """Forward all views; ``step`` is the global step, from 0."""
        ...

    def frozen(self, step: int) -> Sequence[nn.Parameter]:
        """Parameters that this step leaves as they are."""
        ...

    def after_step(self, step: int) -> None:
        """What follows the optimizer's step: moving averages, queues."""
        ...
