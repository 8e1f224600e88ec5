"""``midge knn``: weighted k-NN on frozen features (Wu et al. 2018, section 3.4), beside two baselines without training.

Cosine similarity; the k nearest of the bank vote with weight exp(similarity / temperature). The bank are labelled
training images, the queries the test images: never the same.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from ..runtime.errors import UserError
from ..runtime.files import write_json
from ..runtime.images import UnreadableBudget, fingerprint
from ..runtime.preprocess import Preprocess
from ..runtime.progress import say
from ..runtime.proportions import accuracy_json
from ..runtime.torch_model import ModelSpec, build_model, load_model
from .evaluation_config import KnnConfig
from .features import Encoder, encode, estimate_batch_statistics, find_device, pixel_encoder, place
from .labelled import LabelledSets, labelled_sets, stratified_split

SIMILARITIES_AT_ONCE = 1 << 24  # 64 MiB
SELECTION_SHARE = 0.2


def knn(config: KnnConfig) -> int:
    """Measure the k-NN accuracy of a run and write RUN/eval/knn.json.

    Raises:
        UserError: the run, the images or a value of the configuration is not usable.
    """
    config.check()
    device = find_device(config.device)
    backbone, spec = load_model(config.run, "backbone")
    sets = labelled_sets("k-NN", config.run, config.data, config.test, config.labels, config.limit, config.seed)
    budgets = [UnreadableBudget(config.max_unreadable, len(images)) for images in (sets.train, sets.test)]
    encoders: dict[str, Encoder] = {}
    if config.baselines:
        encoders["pixels"] = pixel_encoder(spec.preprocess)
        encoders |= random_inits(config, spec, sets, device, budgets[0])
    encoders["pretrained"] = place(backbone, device)
    result = evaluate(config, encoders, sets, spec.preprocess, device, budgets)
    write_json(config.run / "eval" / "knn.json", result)
    if config.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


def random_inits(
    config: KnnConfig, spec: ModelSpec, sets: LabelledSets, device: torch.device, budget: UnreadableBudget
) -> dict[str, Encoder]:
    """The network of a run before any training, at its best: no zero residual branches, in two forms.

    Batch normalization either has the statistics it starts with (0 and 1), so that it does nothing, or those of
    training images. A narrow ResNet18 on Fashion-MNIST has 77 % by the first and 66 % by the second, a deep network may
    have it the other way round.
    """

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                return build_model(dataclasses.replace(spec, timm_args={**spec.timm_args, "zero_init_last": False}))
            except UserError:  # a network that does not take the argument has no such initialization to be avoided
                torch.manual_seed(config.seed)
                return build_model(spec)

    estimated = estimate_batch_statistics(
        build(), sets.train, spec.preprocess, config.batch_size, device, config.workers, budget, seed=config.seed
    )
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in estimated.modules()):
        return {"random_init": estimated}
    return {"random_init, initial statistics": place(build(), device), "random_init, estimated statistics": estimated}


def evaluate(
    config: KnnConfig,
    encoders: dict[str, Encoder],
    sets: LabelledSets,
    preprocess: Preprocess,
    device: torch.device,
    budgets: list[UnreadableBudget],
) -> dict[str, Any]:
    """The JSON document of the command: an accuracy for each encoder, on the same bank and queries."""
    features, labels = [], []
    for name, images, budget in zip(("bank", "test"), (sets.train, sets.test), budgets, strict=True):
        description = f"Encoding the {name} images"
        encoded, kept = encode(
            encoders, images, preprocess, config.batch_size, device, config.workers, budget, description
        )
        assert images.labels is not None
        features.append(encoded)
        labels.append(images.labels[kept])
    result: dict[str, Any] = {
        "schema": 1,
        "bank": len(labels[0]),
        "k": config.k,
        "temperature": config.temperature,
        "seed": config.seed,
        "classes": len(sets.train.classes),
        "unreadable": sum(len(budget.paths) for budget in budgets),
        "bank_fingerprint": fingerprint(sets.train),
        "test_fingerprint": fingerprint(sets.test),
    }
    for name, forms in forms_by_name(features[0], features[1]).items():
        say(f"k-NN of {name}.")
        form, facts = stronger_form(forms, labels[0], config, device)
        bank, queries = forms[form]
        accuracy = knn_accuracy(bank, labels[0], queries, labels[1], config.k, config.temperature, device)
        result[name] = {**accuracy, **facts}
    return result


Forms = dict[str, tuple[np.ndarray, np.ndarray]]
"""Form -> bank (N, D) and queries (M, D), float32."""


def forms_by_name(bank: dict[str, np.ndarray], queries: dict[str, np.ndarray]) -> dict[str, Forms]:
    """The forms of each kind of features: pixels as they are and centred, and what encoders named ``kind, form``."""
    forms: dict[str, Forms] = {}
    for name in bank:
        kind, _, form = name.partition(", ")
        pair = bank[name], queries[name]
        if kind == "pixels":
            pair = drop_equal_channels(*pair)
            mean = pair[0].mean(axis=0)
            forms[kind] = {"plain": pair, "centred": (pair[0] - mean, pair[1] - mean)}
        else:
            forms.setdefault(kind, {})[form] = pair
    return forms


def stronger_form(
    forms: Forms, labels: np.ndarray, config: KnnConfig, device: torch.device
) -> tuple[str, dict[str, Any]]:
    """The form that makes the stronger baseline, where there are several.

    It is decided within the bank: four fifths of it judge the other fifth. The test images have no part in it.

    Args:
        forms: at least one.
        labels: (N,) int64 of the bank.
        config: k, temperature and seed.
        device: where to compute.

    Returns:
        The form, and what was found, for the JSON document; nothing where there was no choice.

    Raises:
        UserError: there are no two images of a class to choose it by.
    """
    if len(forms) == 1:
        return next(iter(forms)), {}
    inner, held_out = stratified_split(labels, SELECTION_SHARE, config.seed)
    if not len(held_out):
        raise UserError(
            f"The bank's {len(labels)} images are of as many classes, so none is left to choose the form of a baseline "
            "by: give more --labels, or leave --baselines out."
        )
    accuracies = {}
    for name, (bank, _) in forms.items():
        learn, judge = (bank[inner], labels[inner]), (bank[held_out], labels[held_out])
        accuracies[name] = knn_accuracy(*learn, *judge, config.k, config.temperature, device)["top1"]
    form = max(accuracies, key=lambda name: accuracies[name])
    return form, {"form": form, "held_out_top1": accuracies}


def drop_equal_channels(bank: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One channel of three where all images are grey: the cosine is the same at a third of the cost."""

    def is_grey(values: np.ndarray) -> bool:
        channels = values.reshape(len(values), 3, -1)
        return bool(np.abs(channels[:, 1:] - channels[:, :1]).max() < 1e-3)  # a quarter of a grey level of 255

    if not (is_grey(bank) and is_grey(queries)):
        return bank, queries
    size = bank.shape[1] // 3
    return bank[:, :size], queries[:, :size]


@torch.inference_mode()
def knn_predict(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Predict the class of each query by the weighted vote of its nearest neighbours; exact search.

    Args:
        bank: (N, D) float32 features.
        bank_labels: (N,) int64, 0 or above.
        queries: (M, D) float32 features.
        k: number of neighbours; the whole bank where it has fewer.
        temperature: of the weights exp(cosine similarity / temperature).
        device: where to compute.

    Returns:
        (M,) int64. On a tie the lower class wins.
    """
    keys = functional.normalize(torch.from_numpy(bank).to(device), dim=1)
    labels = torch.from_numpy(bank_labels).to(device)
    num_classes, k = int(labels.max()) + 1, min(k, len(keys))
    predictions = []
    for part in torch.from_numpy(queries).split(max(1, SIMILARITIES_AT_ONCE // len(keys))):
        similarity = functional.normalize(part.to(device), dim=1) @ keys.T  # (B, N)
        nearest, indices = similarity.topk(k, dim=1)  # (B, k)
        # relative to the nearest: exp(1 / temperature) would overflow below a temperature of 0.012
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(part), num_classes).scatter_add_(1, labels[indices], weights)  # (B, K)
        predictions.append(votes.argmax(dim=1).cpu())
    return torch.cat(predictions).numpy()


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Top-1 accuracy of :func:`knn_predict`: ``top1`` (0..1), ``correct``, ``n``, ``ci95``."""
    predictions = knn_predict(bank, bank_labels, queries, k, temperature, device)
    return accuracy_json(int((predictions == query_labels).sum()), len(query_labels))


ROWS = {"pixels": "raw pixels", "random_init": "random initialization", "pretrained": "pretrained"}


def print_table(result: dict[str, Any]) -> None:
    """Print the accuracies with their intervals."""
    table = Table(title=f"k-NN top-1 (k {result['k']}, bank of {result['bank']})", title_justify="left")
    for column in ("features", "top-1", "95 % interval", "images"):
        table.add_column(column, justify="left" if column == "features" else "right")
    for name, title in ROWS.items():
        if name in result:
            low, high = result[name]["ci95"]
            table.add_row(title, f"{result[name]['top1']:.2%}", f"{low:.2%} – {high:.2%}", str(result[name]["n"]))
    Console().print(table)
