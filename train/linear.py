"""``midge linear``: a linear classifier on frozen features, folded into a network that is ready for export.

Multinomial logistic regression with L2 on standardized features, solved by L-BFGS in float64. How much L2 is chosen on
a held-out fifth of the training labels; the test images are used once, at the end.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.errors import UserError
from ..runtime.files import write_json
from ..runtime.images import ImageList, UnreadableBudget, fingerprint
from ..runtime.progress import track
from ..runtime.proportions import accuracy_json
from ..runtime.torch_model import ModelSpec, build_model, load_model, save_model
from .evaluation_config import LinearConfig
from .features import Encoder, encode, extract_features, find_device, place
from .finetune import finetune
from .labelled import labelled_sets, stratified_split

L2_GRID = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001, 0.00001)  # strong to weak
PATIENCE = 2  # so many strengths worse than the best: the weaker ones take longest, and overfit
HELD_OUT_SHARE = 0.2
MAX_ITERATIONS = 300


def linear(config: LinearConfig) -> int:
    """Train a run's classifier; write RUN/classifier.safetensors, .json and RUN/eval/linear.json.

    Raises:
        UserError: the run, the images or a value of the configuration is not usable.
    """
    config.check()
    device = find_device(config.device)
    backbone, spec = load_model(config.run, "backbone")
    sets = labelled_sets("A classifier", config.run, config.data, config.test, config.labels, config.limit, config.seed)
    budget = UnreadableBudget(config.max_unreadable, len(sets.train))
    features, train = training_features(config, backbone, spec, sets.train, device, budget)
    assert train.labels is not None
    probe = fit_probe(features, train.labels, len(train.classes), config.seed)
    facts: dict[str, Any] = {
        "labels": len(train),
        "seed": config.seed,
        "flip": config.flip,
        "l2": probe.l2,
        "held_out_top1": probe.held_out_top1,
        "finetune_epochs": config.finetune_epochs,
        "data_fingerprint": fingerprint(train),
    }
    spec = dataclasses.replace(
        spec,
        num_classes=len(train.classes),
        labels=train.classes,
        trained={**spec.trained, "classifier": facts},
    )
    model = with_classifier(backbone, spec, probe)
    test_budget = UnreadableBudget(config.max_unreadable, len(sets.test))
    result: dict[str, Any] = {"schema": 1, **facts, "test_fingerprint": fingerprint(sets.test)}
    if config.finetune_epochs:
        result["probe"] = accuracy(config, model, spec, sets.test, device, test_budget)
        finetune(model, train, spec.preprocess, config, device, budget)
    save_model(config.run, "classifier", model, spec)
    saved, spec = load_model(config.run, "classifier")
    result |= accuracy(config, saved, spec, sets.test, device, test_budget)
    result["unreadable"] = len(budget.paths) + len(test_budget.paths)
    write_json(config.run / "eval" / "linear.json", result)
    if config.json:
        print(json.dumps(result))
    else:
        print_result(config, result)
    return 0


def training_features(
    config: LinearConfig,
    backbone: nn.Module,
    spec: ModelSpec,
    images: ImageList,
    device: torch.device,
    budget: UnreadableBudget,
) -> tuple[np.ndarray, ImageList]:
    """Features of the labelled images, and of their mirror images.

    Returns:
        (V, N, D) float32 with V 2 where the images are mirrored too, else 1; and the N images that could be read.

    Raises:
        UserError: a class has fewer than two images, so that none can be held out.
    """
    place(backbone, device)
    encoders: dict[str, Encoder] = {"plain": backbone}
    if config.flip:
        encoders["mirrored"] = lambda batch: backbone(batch.flip(-1))
    features, kept = encode(
        encoders,
        images,
        spec.preprocess,
        config.batch_size,
        device,
        config.workers,
        budget,
        "Encoding the training images",
    )
    train = images.take(kept)
    assert train.labels is not None
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if counts.min() < 2:
        name = train.classes[int(counts.argmin())]
        raise UserError(
            f"The class '{name}' has {counts.min()} of the {len(train)} labelled images that were drawn and needs two: "
            f"raise --labels, now {config.labels}, or add images to '{images.root}'."
        )
    return np.stack(list(features.values())), train


@dataclass(frozen=True)
class Probe:
    """A linear classifier on unscaled features, and how it was chosen.

    Attributes:
        weight: (K, D) float64.
        bias: (K,) float64.
        l2: strength of the regularization, of standardized features, per mean cross-entropy.
        held_out_top1: accuracy with it on the held-out labels, 0..1, before the fit to all labels.
    """

    weight: np.ndarray
    bias: np.ndarray
    l2: float
    held_out_top1: float


def fit_probe(features: np.ndarray, labels: np.ndarray, num_classes: int, seed: int) -> Probe:
    """Choose the regularization on held-out labels, then fit to all.

    Args:
        features: (V, N, D) float32: V versions of each of N images; only the first is held out.
        labels: (N,) int64, each class at least twice.
        num_classes: K.
        seed: of the draw of the held-out images.
    """
    learn, held_out = stratified_split(labels, HELD_OUT_SHARE, seed)
    mean, transform = standardization(features[:, learn])
    values, targets = standardized(features[:, learn], mean, transform), np.tile(labels[learn], len(features))
    judged = standardized(features[:1, held_out], mean, transform).numpy()
    start, l2, best, worse = None, L2_GRID[0], -1.0, 0
    for tried in track(L2_GRID, "Choosing the regularization"):
        start = fit_logistic(values, torch.from_numpy(targets), num_classes, tried, start)
        predictions = (judged @ start[0].numpy().T + start[1].numpy()).argmax(axis=1)
        accuracy = float((predictions == labels[held_out]).mean())
        if accuracy > best:  # the strongest of equally good ones
            l2, best, worse = tried, accuracy, 0
        elif accuracy < best:  # equally good ones may be those that all give the most frequent class
            worse += 1
        if worse == PATIENCE:
            break
    mean, transform = standardization(features)
    values, targets = standardized(features, mean, transform), np.tile(labels, len(features))
    weight, bias = fit_logistic(values, torch.from_numpy(targets), num_classes, l2)
    return Probe(*fold(weight.numpy(), bias.numpy(), mean, transform), l2, best)


def standardization(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How to bring features to mean 0, deviation 1 and no correlation.

    After the division by the deviations, a rotation to the principal axes: it changes no length, so the regularized
    optimum is the same, but the solver needs far fewer steps where it can scale the axes one by one.

    Args:
        features: (V, N, D).

    Returns:
        Mean (D,) and transform (D, D), float64; a feature that is constant is multiplied by 0.
    """
    values = features.reshape(-1, features.shape[-1]).astype(np.float64)
    mean, std = values.mean(axis=0), values.std(axis=0)
    varies = std > 1e-6 * (np.abs(mean) + std.max(initial=0.0))
    inverse_std = np.where(varies, 1 / np.where(varies, std, 1.0), 0.0)
    scaled = (values - mean) * inverse_std
    _, axes = np.linalg.eigh(scaled.T @ scaled / len(scaled))
    return mean, inverse_std[:, None] * axes


def standardized(features: np.ndarray, mean: np.ndarray, transform: np.ndarray) -> Tensor:
    """(V, N, D) float32 -> (V * N, D) float64, see :func:`standardization`."""
    return torch.from_numpy((features.reshape(-1, features.shape[-1]) - mean) @ transform)


def fit_logistic(
    values: Tensor, targets: Tensor, num_classes: int, l2: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Minimize the mean cross-entropy + l2 / 2 * ||weight||^2; the bias is not regularized. Convex: one minimum.

    Args:
        values: (N, D) float64; quickest where uncorrelated.
        targets: (N,) int64.
        num_classes: K.
        l2: strength, above 0.
        start: where to start; default zero.

    Returns:
        Weight (K, D) and bias (K,), float64.
    """
    # The Hessian's diagonal where all classes are equally likely: with it, all axes are equally steep at the start.
    steepness = (values.square().mean(dim=0) / num_classes + l2).sqrt()  # (D,)
    scaled = values / steepness
    weight = values.new_zeros(num_classes, values.shape[1]) if start is None else start[0] * steepness
    bias = values.new_zeros(num_classes) if start is None else start[1].clone()
    weight.requires_grad_()
    bias.requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        solver.zero_grad()
        penalty = l2 / 2 * (weight / steepness).square().sum()
        loss = functional.cross_entropy(scaled @ weight.T + bias, targets) + penalty
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    return (weight / steepness).detach(), bias.detach()


def fold(
    weight: np.ndarray, bias: np.ndarray, mean: np.ndarray, transform: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, D) and bias (K,) that give on features what the given ones give on standardized features."""
    folded = weight @ transform.T
    return folded, bias - folded @ mean


def with_classifier(backbone: nn.Module, spec: ModelSpec, probe: Probe) -> nn.Module:
    """The network of ``spec`` with the backbone's weights and the probe as its classifier, in eval mode on the CPU.

    Raises:
        UserError: the network's classifier is not one linear layer on the backbone's features.
    """
    model = build_model(spec)
    classifier: Any = model.get_classifier()  # type: ignore[operator]
    names = [name for name, module in model.named_modules() if module is classifier]
    if (
        not isinstance(classifier, nn.Linear)
        or classifier.bias is None
        or classifier.weight.shape != probe.weight.shape
    ):
        raise UserError(
            f"The classifier of '{spec.timm_name}' is no linear layer on its features: choose another backbone."
        )
    state = {name: tensor.detach().cpu() for name, tensor in backbone.state_dict().items()}
    state[f"{names[0]}.weight"] = torch.from_numpy(probe.weight).float()
    state[f"{names[0]}.bias"] = torch.from_numpy(probe.bias).float()
    model.load_state_dict(state, strict=True)
    return model


def accuracy(
    config: LinearConfig,
    model: nn.Module,
    spec: ModelSpec,
    images: ImageList,
    device: torch.device,
    budget: UnreadableBudget,
) -> dict[str, Any]:
    """Top-1 of a classifier: ``top1`` (0..1), ``correct``, ``n``, ``ci95``."""
    logits, kept = extract_features(
        model, images, spec.preprocess, config.batch_size, device, config.workers, budget, "Classifying the test images"
    )
    assert images.labels is not None
    return accuracy_json(int((logits.argmax(axis=1) == images.labels[kept]).sum()), len(kept))


def print_result(config: LinearConfig, result: dict[str, Any]) -> None:
    """Say what the classifier gives and where it lies."""

    def show(title: str, values: dict[str, Any]) -> str:
        low, high = values["ci95"]
        return f"{title}: top-1 {values['top1']:.2%} ({low:.2%} – {high:.2%}) on {values['n']} test images"

    lines = [show("linear probe", result.get("probe", result))]
    if "probe" in result:
        lines.append(show(f"fine-tuned for {result['finetune_epochs']} epochs", result))
    lines.append(f"{result['labels']} labels, L2 {result['l2']:g}: {config.run / 'classifier.safetensors'}")
    Console(highlight=False).print("\n".join(lines), markup=False, soft_wrap=True)
