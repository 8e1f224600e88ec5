"""The methods by name: here the configuration ends and plain arguments begin."""

from __future__ import annotations

from collections.abc import Callable

from .backbones import Backbone, feature_dim
from .config import PretrainConfig
from .dino import DINO
from .heads import DINOHead
from .method import Method
from .schedules import cosine, warmup_constant
from .views import ViewPolicy


def build_dino(
    config: PretrainConfig, backbone: Backbone, policy: ViewPolicy, steps_per_epoch: int, steps: int
) -> DINO:
    """DINO, randomly initialized."""
    student = backbone.build(config.drop_path)
    head = DINOHead(
        feature_dim(student),
        hidden=config.head_hidden,
        bottleneck=config.head_bottleneck,
        outputs=config.head_outputs,
        batch_norm=config.head_batch_norm,
        fixed_magnitude=config.fixed_magnitude,
    )
    return DINO(
        student,
        backbone.build(),
        head,
        weight_global=policy.weight_global,
        weight_local=policy.weight_local,
        student_temperature=config.student_temperature,
        teacher_temperature=warmup_constant(
            config.teacher_temperature_start,
            config.teacher_temperature,
            round(config.teacher_temperature_warmup_epochs * steps_per_epoch),
            steps,
        ),
        teacher_momentum=cosine(config.teacher_momentum, config.teacher_momentum_end, steps),
        center_momentum=config.center_momentum,
        freeze_last_layer_steps=round(config.freeze_last_layer_epochs * steps_per_epoch),
        keep_teacher=config.export_weights == "teacher",
        koleo_weight=config.koleo_weight,
        freeze_batch_norm=config.freeze_batch_norm,
    )


METHODS: dict[str, Callable[[PretrainConfig, Backbone, ViewPolicy, int, int], Method]] = {"dino": build_dino}
