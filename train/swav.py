"""SwAV (Caron et al., 2020, arXiv 2006.09882) with weighted pairs of views (Tan et al., 2023, arXiv 2210.02808).

Each global view is assigned to prototypes, and every other view of the image has to predict that assignment. The
assignments of a batch use all prototypes alike, by a few iterations of Sinkhorn and Knopp's, so that the trivial answer
of one prototype for all is excluded. Small batches are joined by the embeddings of earlier ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backbones import MultiCropNetwork
from .heads import ProjectionHead, at_least_float32, without_autocast
from .losses import cross_entropy, koleo
from .method import Losses, Views
from .queues import write_ring
from .ranks import gather_over_ranks, max_over_ranks, rank, sum_over_ranks, world_size


class SwAV(nn.Module):
    """Network, prototypes and the queue of each global view.

    Args:
        network: the backbone and a head that gives embeddings of length 1, (M, D).
        prototypes: number K of prototypes.
        weight_global: weight of the mean loss over the 2 global-global pairs.
        weight_local: weight of the mean loss over the global-local pairs.
        temperature: of the prediction's softmax.
        epsilon: of the assignment; the smaller, the harder it is.
        iterations: of Sinkhorn and Knopp's.
        queue_size: embeddings kept of each of the two global views; 0 for none.
        queue_start_step: the queue is filled from this step on, and used once it is full.
        freeze_prototypes_steps: the prototypes are not trained in the first so many steps.
        koleo_weight: weight of the KoLeo term on the embeddings of global views.
        portions: parts that a step's images come in, one after the other.
    """

    prototypes: nn.Parameter
    queue: Tensor

    def __init__(
        self,
        network: MultiCropNetwork[ProjectionHead],
        prototypes: int,
        *,
        weight_global: float,
        weight_local: float,
        temperature: float,
        epsilon: float,
        iterations: int,
        queue_size: int,
        queue_start_step: int,
        freeze_prototypes_steps: int,
        koleo_weight: float = 0.0,
        portions: int = 1,
    ) -> None:
        super().__init__()
        self.network = network
        start = nn.Linear(network.head.out_features, prototypes, bias=False).weight.detach()
        self.prototypes = nn.Parameter(functional.normalize(start, dim=1))  # (K, D), rows of length 1
        self.weight_global = weight_global
        self.weight_local = weight_local
        self.temperature = temperature
        self.epsilon = epsilon
        self.iterations = iterations
        self.queue_start_step = queue_start_step
        self.freeze_prototypes_steps = freeze_prototypes_steps
        self.koleo_weight = koleo_weight
        self.portions = portions
        self.register_buffer("queue", torch.zeros(2, queue_size, network.head.out_features))
        self._fresh: list[Tensor] = []  # (2, N, D) each, of the step's parts

    @property
    def backbone(self) -> nn.Module:
        """The network that is kept."""
        return self.network.backbone

    def loss(self, views: Views, step: int) -> Losses:
        """Cross-entropy between the assignment of each global view and the predictions of all other views.

        Args:
            views: of N images.
            step: global step, counted from 0.
        """
        num_images = len(views.global_views) // 2
        embeddings, projections = self.network(views)  # ((2 + L) N, D), in the order of the views
        with without_autocast(projections):
            scores = projections @ self.prototypes.T  # ((2 + L) N, K), cosines
        fresh = projections[: 2 * num_images].detach().unflatten(0, (2, num_images))
        self._fresh.append(fresh)
        targets = torch.stack([self.assign(fresh[view], view, step) for view in range(2)])  # (2, N, K)
        predictions = (scores / self.temperature).log_softmax(dim=1).unflatten(0, (-1, num_images))
        predictions_global, predictions_local = predictions.tensor_split([2])
        loss_global = cross_entropy(targets, predictions_global.flip(0))
        # Every assignment with every local view: cross-entropy is linear in the target, so the mean of both will do.
        loss_local = cross_entropy(targets.mean(dim=0), predictions_local)
        total = self.weight_global * loss_global + self.weight_local * loss_local
        if self.koleo_weight:
            both = embeddings[: 2 * num_images].unflatten(0, (2, num_images))
            total = total + self.koleo_weight * koleo(both)
        return Losses(total, loss_global.detach(), loss_local.detach(), embeddings[: 2 * num_images].detach())

    @torch.no_grad()
    def assign(self, embeddings: Tensor, view: int, step: int) -> Tensor:
        """Assign the images of a global view, together with those of its queue once that is full.

        Args:
            embeddings: (N, D) of this process.
            view: 0 or 1.
            step: global step.

        Returns:
            (N, K), rows of sum 1.
        """
        num_images = len(embeddings)
        if self.queue_is_full(step, num_images):
            embeddings = torch.cat([embeddings, self.queue[view, rank() :: world_size()]])
        with without_autocast(embeddings):
            scores = embeddings @ self.prototypes.T
        return sinkhorn(scores, self.epsilon, self.iterations)[:num_images]

    def queue_is_full(self, step: int, num_images: int) -> bool:
        """Whether the steps before ``step`` have filled the queue, with at least so many images of each process."""
        filled = (step - self.queue_start_step) * num_images * self.portions * world_size()
        return 0 < self.queue.shape[1] <= filled

    def frozen(self, step: int) -> tuple[nn.Parameter, ...]:
        """The prototypes, in the first steps."""
        return (self.prototypes,) if step < self.freeze_prototypes_steps else ()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Bring the prototypes back to length 1, and put the step's embeddings into the queue."""
        self.prototypes.copy_(functional.normalize(self.prototypes, dim=1))
        fresh = torch.cat(self._fresh, dim=1)  # (2, N, D)
        self._fresh.clear()
        if self.queue.shape[1] and step >= self.queue_start_step:
            everyones = gather_over_ranks(fresh.transpose(0, 1))  # (ranks N, 2, D)
            write_ring(self.queue.transpose(0, 1), everyones, step - self.queue_start_step)


def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Spread images evenly over prototypes while they keep to those that they resemble (SwAV, equation 3).

    Args:
        scores: (B, K) cosines of this process's images; those of all processes are assigned together.
        epsilon: smoothness of the assignment.
        iterations: normalizations over prototypes and over images, in turn.

    Returns:
        (B, K), rows of sum 1; over all processes the columns have about equal sums.
    """
    scores = at_least_float32(scores) / epsilon
    # Without this the exponential of 1 / 0.05 overflows 16 bits, and that of a smaller epsilon 32.
    weights = torch.exp(scores - max_over_ranks(scores.max()))
    for _ in range(iterations):
        weights = weights / sum_over_ranks(weights.sum(dim=0)).clamp_min(TINY)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(TINY)
    return weights


TINY = torch.finfo(torch.float32).tiny  # a prototype that nothing resembles has underflowed to a sum of 0
