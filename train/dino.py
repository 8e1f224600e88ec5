"""DINO (Caron et al., 2021, arXiv 2104.14294) with weighted pairs of views (Tan et al., 2023, arXiv 2210.02808).

A student learns to predict, from every view, what its teacher says of the global views. The teacher is a moving
average of the student. Centring keeps the teacher from choosing one output for all images, its low temperature keeps
it from giving all outputs alike.

Two things are not DINO's, and off by default. The KoLeo term keeps the embeddings from falling into few dimensions. And
batch normalization may keep its initial statistics: in a network without training, normalizing layer upon layer
amplifies what differs between two views of an image, so that the teacher has next to nothing to teach at first.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from .averages import update_ema
from .backbones import MultiCropNetwork
from .heads import DINOHead, at_least_float32
from .losses import cross_entropy, koleo
from .method import Losses, Views
from .ranks import mean_over_ranks


class DINO(nn.Module):
    """Student, teacher and centre.

    Args:
        student: the backbone and the head.
        teacher: the same networks without drop path; they take over the student's weights.
        weight_global: weight of the mean loss over the 2 global-global pairs.
        weight_local: weight of the mean loss over the global-local pairs.
        temperature: of the student's softmax.
        teacher_temperature: (steps,), of the teacher's softmax.
        teacher_momentum: (steps,), share of the old teacher in its moving average.
        center_momentum: share of the old centre in its moving average.
        freeze_last_layer_steps: the last layer is not trained in the first so many steps.
        keep_teacher: the teacher's backbone is the result, not the student's.
        koleo_weight: weight of the KoLeo term on the student's embeddings of global views.
    """

    center: Tensor

    def __init__(
        self,
        student: MultiCropNetwork[DINOHead],
        teacher: MultiCropNetwork[DINOHead],
        *,
        weight_global: float,
        weight_local: float,
        temperature: float,
        teacher_temperature: np.ndarray,
        teacher_momentum: np.ndarray,
        center_momentum: float,
        freeze_last_layer_steps: int,
        keep_teacher: bool = False,
        koleo_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.last_layer = tuple(student.head.last_layer.parameters())
        self.weight_global = weight_global
        self.weight_local = weight_local
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.teacher_momentum = teacher_momentum
        self.center_momentum = center_momentum
        self.freeze_last_layer_steps = freeze_last_layer_steps
        self.kept = self.teacher if keep_teacher else self.student
        self.koleo_weight = koleo_weight
        self.register_buffer("center", torch.zeros(len(student.head.last_layer.direction)))
        self._teacher_means: list[Tensor] = []  # (K,) each, of the step's parts

    @property
    def backbone(self) -> nn.Module:
        """The student's backbone, or the teacher's where that is kept."""
        return self.kept.backbone

    def loss(self, views: Views, step: int) -> Losses:
        """Cross-entropy between teacher and student over all pairs of different views.

        Args:
            views: of N images.
            step: global step, counted from 0.
        """
        num_images = len(views.global_views) // 2
        with torch.no_grad():
            embeddings, logits = self.teacher([views.global_views])
            logits = at_least_float32(logits)
            self._teacher_means.append(logits.mean(dim=0))
            teacher = ((logits - self.center) / self.teacher_temperature[step]).softmax(dim=1)  # (2 N, K)
        student_embeddings, logits = self.student(views)
        student = (at_least_float32(logits) / self.temperature).log_softmax(dim=1)  # ((2 + L) N, K)
        teacher = teacher.unflatten(0, (2, num_images))  # (2, N, K)
        student_globals, student_locals = student.unflatten(0, (-1, num_images)).tensor_split([2])
        # Pairs of the one global view with the other: each teacher faces the student that saw the other view.
        loss_global = cross_entropy(teacher, student_globals.flip(0))
        # Every teacher with every local view: cross-entropy is linear in the teacher, so the mean of both will do.
        loss_local = cross_entropy(teacher.mean(dim=0), student_locals)
        total = self.weight_global * loss_global + self.weight_local * loss_local
        if self.koleo_weight:
            both = student_embeddings[: 2 * num_images].unflatten(0, (2, num_images))
            total = total + self.koleo_weight * koleo(both)
        return Losses(total, loss_global.detach(), loss_local.detach(), embeddings)

    def frozen(self, step: int) -> tuple[nn.Parameter, ...]:
        """The last layer, in the first steps."""
        return self.last_layer if step < self.freeze_last_layer_steps else ()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher towards the student, and the centre towards the teacher's mean output."""
        update_ema(self.teacher, self.student, self.teacher_momentum[step])
        mean = mean_over_ranks(torch.stack(self._teacher_means).mean(dim=0))
        self._teacher_means.clear()
        self.center.lerp_(mean, 1 - self.center_momentum)
