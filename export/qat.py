"""Quantization-aware training without labels: the FP32 network teaches the INT8 one on unlabelled training images.

Short and close to where it starts. Weights move by parts of a step of their own grids, ranges by parts of theirs, so
that one learning rate, counted in steps of a grid, serves every layer and network. The files of all dialects are
written afterwards by the writers that also write them without training, from one set of weights and each dialect's own
ranges: training steps alternate between the dialects.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..runtime.errors import UserError
from ..runtime.progress import Bar, say
from ..train.finetune import augment, cosine
from .fake_quantize import LearnedRanges, SimulatedGraph, weight_step
from .ranges import WEIGHTED, Ranges
from .torch_graph import TorchGraph

if TYPE_CHECKING:
    from onnx import ModelProto

MIN_IMAGES = 32
HELD_OUT = 8  # one of so many images is not trained on: it tells whether training helped
RANGE_RATE = 10  # learning rate of the ends of ranges to that of weights: each hears of all values, not of one input
RANGE_UNIT = 1 / 255  # of the logarithm of a range: its end moves by one step of its grid
LOGITS = "logits"


@dataclass(frozen=True)
class QatConfig:
    """How long and how to train.

    Attributes:
        epochs: passes over the images.
        lr: peak of Adam's learning rate for weights, in steps of their 8-bit grids; a cosine takes it to 0.
        batch_size: images per step.
        temperature: that the logits are divided by (Hinton et al. 2015).
        seed: of the order, flips and crops.
    """

    epochs: int = 4
    lr: float = 0.001
    batch_size: int = 64
    temperature: float = 2.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Written:
    """A network in one dialect.

    Attributes:
        graph: with Q/DQ, as it would run.
        ranges: of the FP32 graph's activations, which it was written from.
    """

    graph: ModelProto
    ranges: Ranges


@dataclass(frozen=True, eq=False)
class Trained:
    """What training gives.

    Attributes:
        graph: the FP32 graph with the learned weights, under the same names.
        ranges: dialect -> learned ranges, of the same tensors as were given.
        loss_before: distillation loss on held-out images, the mean of the dialects, before training.
        loss_after: the same afterwards.
    """

    graph: ModelProto
    ranges: dict[str, Ranges]
    loss_before: float
    loss_after: float

    @property
    def helped(self) -> bool:
        """Whether the loss is lower; where it is not, the graph and the ranges are those that were given."""
        return self.loss_after < self.loss_before


def train_quantized(
    graph: ModelProto,
    written: Mapping[str, Written],
    images: np.ndarray,
    config: QatConfig,
    teacher: ModelProto | None = None,
) -> Trained:
    """Train a network to give in INT8 what it gives in FP32.

    Args:
        graph: FP32, batch normalization folded.
        written: dialect -> its Q/DQ graph, written from ``graph``; the steps alternate between them.
        images: (N, 3, H, W) float32, preprocessed, unlabelled.
        config: how.
        teacher: the network to imitate, where ``graph`` is not that one any more (after bias correction, say).

    Returns:
        The learned weights and ranges; those that were given, where training did not lower the loss on the eighth of
        the images that is kept apart.

    Raises:
        UserError: there are too few images, an operator is not known, or the loss is no number.
    """
    if len(images) < MIN_IMAGES:
        raise UserError(
            f"Training for INT8 needs at least {MIN_IMAGES} images and has {len(images)}: name more with --data, or "
            "leave it out with --qat-epochs 0."
        )
    student = Student(graph, written)
    distillation = Distillation(graph if teacher is None else teacher, student.features, config.temperature)
    cut = len(images) - len(images) // HELD_OUT  # calibration images come first
    kept, held_out = images[:cut], images[cut:]
    before = held_out_loss(student, distillation, held_out, config.batch_size)
    fit(student, distillation, kept, config)
    after = held_out_loss(student, distillation, held_out, config.batch_size)
    if not math.isfinite(after):
        raise UserError("Training for INT8 diverged at its last step: give a smaller --qat-lr.")
    say(f"Trained for INT8 on {len(kept)} images: loss on {len(held_out)} others {before:.3g} -> {after:.3g}.")
    trained = Trained(student.graph(), student.ranges(), before, after)
    if trained.helped:
        return trained
    say("Training for INT8 did not help: the weights and ranges from before are kept. Try a smaller --qat-lr.")
    return dataclasses.replace(trained, graph=graph, ranges={name: given.ranges for name, given in written.items()})


class Student:
    """The INT8 network, in each dialect, with one set of weights.

    Args:
        graph: FP32.
        written: dialect -> its Q/DQ graph.

    Attributes:
        features: tensors beside the outputs that the teacher is imitated in: what a classifier's last layer takes.
        dialects: it is simulated in these.
        parameters: what is trained, all 0 at the start, and the factors of their learning rates.
    """

    def __init__(self, graph: ModelProto, written: Mapping[str, Written]) -> None:
        self.features = head_inputs(graph)
        self.dialects = tuple(written)
        self._given, self._written = graph, written
        names, constants = weights_and_biases(graph), TorchGraph(graph).constants
        self._start = {name: constants[name] for name in names}
        self._learned = {dialect: LearnedRanges(graph, given.ranges, RANGE_UNIT) for dialect, given in written.items()}
        self._simulated = {
            dialect: SimulatedGraph(given.graph, names, self._learned[dialect], self.features)
            for dialect, given in written.items()
        }
        axes = {name: axis for simulated in self._simulated.values() for name, axis in simulated.axes.items()}
        self._steps = {name: weight_step(value, axes.get(name)) for name, value in self._start.items()}
        self._moved = {name: torch.zeros_like(value, requires_grad=True) for name, value in self._start.items()}
        ends = [end for learned in self._learned.values() for end in learned.parameters.values()]
        self.parameters = [(list(self._moved.values()), 1.0), (ends, float(RANGE_RATE))]

    def __call__(self, images: Tensor, dialect: str) -> dict[str, Tensor]:
        """(N, 3, H, W) float32 -> outputs and ``features`` in a dialect."""
        return self._simulated[dialect](images, self.weights())

    def weights(self) -> dict[str, Tensor]:
        """Weights and biases as they are now, differentiable."""
        return {name: start + self._moved[name] * self._steps[name] for name, start in self._start.items()}

    def keep_in_bounds(self) -> None:
        """To be called after each step."""
        for learned in self._learned.values():
            learned.keep_in_bounds()

    def graph(self) -> ModelProto:
        """The FP32 graph with the weights as they are now."""
        from onnx import ModelProto, numpy_helper

        copied = ModelProto()
        copied.CopyFrom(self._given)
        weights = self.weights()
        for tensor in copied.graph.initializer:
            if tensor.name in weights:
                tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].detach().numpy(), tensor.name))
        return copied

    def ranges(self) -> dict[str, Ranges]:
        """Of each dialect the ranges as they are now."""
        return {
            dialect: {**self._written[dialect].ranges, **self._simulated[dialect].ranges()} for dialect in self.dialects
        }


def weights_and_biases(graph: ModelProto) -> list[str]:
    """Initializers that a convolution or matrix product takes beside its activation."""
    initializers = {tensor.name for tensor in graph.graph.initializer}
    taken = (name for node in graph.graph.node if node.op_type in WEIGHTED for name in node.input[1:])
    return [name for name in dict.fromkeys(taken) if name in initializers]


def head_inputs(graph: ModelProto) -> tuple[str, ...]:
    """The pooled features of a classifier: what the layer that gives its logits takes."""
    return tuple(
        node.input[0] for node in graph.graph.node if LOGITS in node.output and node.op_type in {"Gemm", "MatMul"}
    )


class Distillation:
    """How far the student is from the teacher.

    Args:
        teacher: FP32.
        features: to compare beside the outputs.
        temperature: of the logits.
    """

    def __init__(self, teacher: ModelProto, features: Sequence[str], temperature: float) -> None:
        made = {name for node in teacher.graph.node for name in node.output}
        self._teacher = TorchGraph(teacher, [name for name in features if name in made])
        self._temperature = temperature

    def __call__(self, images: Tensor, student: Mapping[str, Tensor]) -> Tensor:
        """The loss, (): Kullback-Leibler divergence of the logits, relative squared error of all other tensors.

        Args:
            images: (N, 3, H, W) float32.
            student: what it gives for them.
        """
        with torch.no_grad():
            wanted = self._teacher(images)
        losses = [
            self._divergence(student[name], target) if name == LOGITS else relative_error(student[name], target)
            for name, target in wanted.items()
        ]
        return torch.stack(losses).sum()

    def _divergence(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", with its factor T^2."""
        given, target = ((values / self._temperature).log_softmax(dim=1) for values in (logits, wanted))
        divergence = functional.kl_div(given, target, reduction="batchmean", log_target=True)
        return divergence * self._temperature**2


def relative_error(values: Tensor, wanted: Tensor) -> Tensor:
    """Squared error over the squared length, that of the longer of the two, the mean over the images.

    So no image counts for more than 4. With the length of ``wanted`` alone, one image of a MobileNetV2 whose ReLU6 all
    saturate in INT8, and not in FP32, counted for 3000, and undid what the others taught.
    """
    error, *lengths = (part.flatten(1).square().sum(dim=1) for part in (values - wanted, wanted, values.detach()))
    return (error / torch.maximum(*lengths).clamp(min=1e-12)).mean()


@torch.no_grad()
def held_out_loss(student: Student, distillation: Distillation, images: np.ndarray, batch_size: int) -> float:
    """Mean loss over the images and dialects."""
    summed = 0.0
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size])
        losses = [distillation(batch, student(batch, dialect)).item() for dialect in student.dialects]
        summed += len(batch) * sum(losses) / len(losses)
    return summed / len(images)


def fit(student: Student, distillation: Distillation, images: np.ndarray, config: QatConfig) -> None:
    """Train in place: Adam, a cosine, flips and shifted crops."""
    optimizer = torch.optim.Adam([{"params": parameters} for parameters, _ in student.parameters])
    generator = torch.Generator().manual_seed(config.seed)
    batch_size = min(config.batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    total, step = steps_per_epoch * config.epochs, 0
    with Bar("Training for INT8", total) as bar:
        for _ in range(config.epochs):
            order = torch.randperm(len(images), generator=generator)[: steps_per_epoch * batch_size]
            for kept in order.view(steps_per_epoch, batch_size).numpy():
                for group, (_, factor) in zip(optimizer.param_groups, student.parameters, strict=True):
                    group["lr"] = factor * cosine(config.lr, step, total)
                batch = augment(torch.from_numpy(images[kept]), generator, mirror=True)
                loss = distillation(batch, student(batch, student.dialects[step % len(student.dialects)]))
                if not torch.isfinite(loss):
                    raise UserError(f"Training for INT8 diverged at step {step + 1}: give a smaller --qat-lr.")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                student.keep_in_bounds()
                step += 1
                bar.advance(note=f"loss {loss.item():.3g}")
