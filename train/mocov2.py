"""MoCo v2 (He et al., 2020, arXiv 1911.05722; Chen et al., 2020, arXiv 2003.04297) with several weighted query views.

A slowly moving key network embeds the first global view of each image; the query network embeds the second global
view and the local ones, and has to tell the image's key from the keys of the images before it, which wait in a queue.
The weights of global and local queries are those of Tan et al. (2023, arXiv 2210.02808).

Batch normalization could give the answer away: a query and its key would share their batch's statistics. ShuffleBN
(MoCo, section 3.3) prevents it where every device normalizes by itself. Here keys are shuffled over all processes and
go through the key network in several groups, each with its own statistics: on one device that is what eight devices do.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .averages import update_ema
from .backbones import MultiCropNetwork, has_batch_norm
from .heads import ProjectionHead, without_autocast
from .losses import koleo
from .method import Losses, Views
from .queues import write_ring
from .ranks import gather_over_ranks, rank, world_size


class MoCoV2(nn.Module):
    """Query network, key network and queue.

    Args:
        query: the backbone and a head that gives embeddings of length 1, (M, D).
        key: the same networks without drop path; they take over the query's weights.
        weight_global: weight of the loss of the global query.
        weight_local: weight of the mean loss of the local queries.
        temperature: of the softmax over the key and the queue.
        key_momentum: (steps,), share of the old key network in its moving average.
        queue_size: keys kept.
        key_groups: groups over all processes that the keys are normalized in; at least one on each.
        keep_key: the key network's backbone is the result, not the query's.
        koleo_weight: weight of the KoLeo term on the embeddings of the global query.
    """

    queue: Tensor

    def __init__(
        self,
        query: MultiCropNetwork[ProjectionHead],
        key: MultiCropNetwork[ProjectionHead],
        *,
        weight_global: float,
        weight_local: float,
        temperature: float,
        key_momentum: np.ndarray,
        queue_size: int,
        key_groups: int,
        keep_key: bool = False,
        koleo_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.query = query
        self.key = key
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        self.weight_global = weight_global
        self.weight_local = weight_local
        self.temperature = temperature
        self.key_momentum = key_momentum
        self.key_groups = key_groups
        self.koleo_weight = koleo_weight
        self.kept = self.key if keep_key else self.query
        start = torch.randn(queue_size, query.head.out_features)
        self.register_buffer("queue", functional.normalize(start, dim=1))
        self._fresh: list[Tensor] = []  # keys of all processes, (N, D) each, of the step's parts

    @property
    def backbone(self) -> nn.Module:
        """The query network's backbone, or the key network's where that is kept."""
        return self.kept.backbone

    def loss(self, views: Views, step: int) -> Losses:
        """InfoNCE (MoCo, equation 1) of the second global view and of the local views against the first one's key.

        Args:
            views: of N images.
            step: global step, counted from 0.
        """
        first, second = views.global_views.chunk(2)  # (N, 3, h, h) each
        num_images = len(first)
        everyones = self.keys(first, step)  # (ranks N, D)
        self._fresh.append(everyones)
        keys = everyones[rank() * num_images :][:num_images]
        embeddings, queries = self.query([second, views.local_views])  # ((1 + L) N, D)
        losses = info_nce(queries.unflatten(0, (-1, num_images)), keys, self.queue, self.temperature)  # (1 + L, N)
        loss_global, loss_local = losses[0].mean(), losses[1:].mean()
        total = self.weight_global * loss_global + self.weight_local * loss_local
        if self.koleo_weight:
            total = total + self.koleo_weight * koleo(embeddings[None, :num_images])
        return Losses(total, loss_global.detach(), loss_local.detach(), embeddings[:num_images].detach())

    @torch.no_grad()
    def keys(self, views: Tensor, step: int) -> Tensor:
        """Embed the key views.

        Args:
            views: (N, 3, h, h) of this process.
            step: global step, the seed of the shuffle.

        Returns:
            (ranks N, D) float32, of all processes, in their order.
        """
        if not has_batch_norm(self.key):
            return gather_over_ranks(self.key([views])[1])
        everyones = gather_over_ranks(views)  # (ranks N, 3, h, h)
        # Drawn where it is used: a copy to a GPU would make it wait.
        generator = torch.Generator(views.device).manual_seed(step)
        order = torch.randperm(len(everyones), generator=generator, device=views.device)
        mine = everyones[order.chunk(world_size())[rank()]]
        groups = min(max(1, self.key_groups // world_size()), max(1, len(mine) // MIN_GROUP))
        shuffled = gather_over_ranks(torch.cat([self.key([group])[1] for group in mine.tensor_split(groups)]))
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        return keys

    def frozen(self, step: int) -> tuple[nn.Parameter, ...]:
        """Nothing."""
        return ()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the key network towards the query network, and put the step's keys into the queue."""
        update_ema(self.key, self.query, self.key_momentum[step])
        write_ring(self.queue, torch.cat(self._fresh), step)
        self._fresh.clear()


MIN_GROUP = 4
"""Images that a group of keys has at least: the statistics of fewer are noise."""


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """-log softmax of a query's key among that key and the queue.

    Args:
        queries: (V, N, D) of length 1, with gradient.
        keys: (N, D) of length 1.
        queue: (Q, D) of length 1.
        temperature: of the softmax.

    Returns:
        (V, N), in nats.
    """
    with without_autocast(queries):
        positive = (queries * keys).sum(dim=-1, keepdim=True)  # (V, N, 1)
        logits = torch.cat([positive, queries @ queue.T], dim=-1) / temperature  # (V, N, 1 + Q)
    return logits.logsumexp(dim=-1) - logits[..., 0]
