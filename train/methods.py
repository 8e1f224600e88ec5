"""The methods by name: here the configuration ends and plain arguments begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from timm.layers.norm_act import convert_sync_batchnorm

from ..runtime.errors import UserError
from .backbones import Backbone, Head, MultiCropNetwork, feature_dim
from .config import PretrainConfig
from .dino import DINO
from .heads import DINOHead, ProjectionHead
from .method import Method
from .mocov2 import MoCoV2
from .schedules import cosine, warmup_constant
from .small_maps import use_small_map_products
from .swav import SwAV
from .views import ViewPolicy


@dataclass(frozen=True)
class Plan:
    """What a method is built from.

    Attributes:
        config: of the run.
        backbone: what is trained.
        policy: weights of the two kinds of pairs.
        steps_per_epoch: optimizer steps in an epoch.
        steps: of the whole run.
        sync: several processes normalize batches together, for which torch needs CUDA.
    """

    config: PretrainConfig
    backbone: Backbone
    policy: ViewPolicy
    steps_per_epoch: int
    steps: int
    sync: bool = False

    def steps_of(self, epochs: float) -> int:
        """A length in epochs, in steps."""
        return round(epochs * self.steps_per_epoch)

    def network(
        self, head: Callable[[int], Head], drop_path: float = 0.0, own_batch_norm: bool = False
    ) -> MultiCropNetwork[Head]:
        """A randomly initialized backbone, and a head for its number of features.

        Args:
            head: from the number of features.
            drop_path: of the backbone.
            own_batch_norm: every process normalizes by itself.
        """
        backbone: Any = self.backbone.build(drop_path)
        use_small_map_products(backbone)
        if self.config.compile:
            backbone.compile(dynamic=False)  # in place, so that names of weights stay; one graph per size of views
        network = MultiCropNetwork(backbone, head(feature_dim(backbone)), self.config.freeze_batch_norm)
        if self.sync and not own_batch_norm:
            network: Any = convert_sync_batchnorm(network)
        return network

    def momentum(self) -> np.ndarray:
        """Share of the old weights in the moving average, (steps,)."""
        return cosine(self.config.teacher_momentum, self.config.teacher_momentum_end, self.steps)


def build_dino(plan: Plan) -> DINO:
    """DINO, randomly initialized."""
    config = plan.config

    def head(features: int) -> DINOHead:
        return DINOHead(
            features,
            hidden=config.head_hidden,
            bottleneck=config.head_bottleneck,
            outputs=config.head_outputs,
            batch_norm=config.head_batch_norm,
            fixed_magnitude=config.fixed_magnitude,
        )

    return DINO(
        plan.network(head, config.drop_path),
        plan.network(head),
        weight_global=plan.policy.weight_global,
        weight_local=plan.policy.weight_local,
        temperature=config.temperature,
        teacher_temperature=warmup_constant(
            config.teacher_temperature_start,
            config.teacher_temperature,
            plan.steps_of(config.teacher_temperature_warmup_epochs),
            plan.steps,
        ),
        teacher_momentum=plan.momentum(),
        center_momentum=config.center_momentum,
        freeze_last_layer_steps=plan.steps_of(config.freeze_last_layer_epochs),
        keep_teacher=config.export_weights == "teacher",
        koleo_weight=config.koleo_weight,
    )


def build_swav(plan: Plan) -> SwAV:
    """SwAV, randomly initialized.

    Raises:
        UserError: the teacher is asked for, or the queue is smaller than a batch.
    """
    config = plan.config
    if config.export_weights == "teacher":
        raise UserError("--export-weights teacher: SwAV has no teacher; give student.")
    check_queue(config)
    return SwAV(
        plan.network(projection_head(config), config.drop_path),
        config.head_outputs,
        weight_global=plan.policy.weight_global,
        weight_local=plan.policy.weight_local,
        temperature=config.temperature,
        epsilon=config.sinkhorn_epsilon,
        iterations=config.sinkhorn_iterations,
        queue_size=config.queue_size,
        queue_start_step=plan.steps_of(config.queue_start_epochs),
        freeze_prototypes_steps=plan.steps_of(config.freeze_last_layer_epochs),
        koleo_weight=config.koleo_weight,
        portions=config.accumulate,
    )


def build_mocov2(plan: Plan) -> MoCoV2:
    """MoCo v2, randomly initialized.

    Raises:
        UserError: there is no queue, or it is smaller than a batch.
    """
    config = plan.config
    if config.queue_size == 0:
        raise UserError("--queue-size is 0: MoCo v2 needs a queue of earlier keys, of one batch or more.")
    check_queue(config)
    return MoCoV2(
        plan.network(projection_head(config), config.drop_path),
        plan.network(projection_head(config), own_batch_norm=True),
        weight_global=plan.policy.weight_global,
        weight_local=plan.policy.weight_local,
        temperature=config.temperature,
        key_momentum=plan.momentum(),
        queue_size=config.queue_size,
        key_groups=config.key_groups,
        keep_key=config.export_weights == "teacher",
        koleo_weight=config.koleo_weight,
    )


def projection_head(config: PretrainConfig) -> Callable[[int], ProjectionHead]:
    """The head of SwAV and of MoCo v2, by its number of input features."""
    return lambda features: ProjectionHead(features, config.head_hidden, config.head_bottleneck, config.head_batch_norm)


def check_queue(config: PretrainConfig) -> None:
    """Refuse a queue that one step would more than fill."""
    if 0 < config.queue_size < config.batch_size:
        raise UserError(
            f"--queue-size is {config.queue_size}: a step puts in {config.batch_size} embeddings (--batch-size); give "
            f"{config.batch_size} or more."
        )


METHODS: dict[str, Callable[[Plan], Method]] = {"dino": build_dino, "mocov2": build_mocov2, "swav": build_swav}
