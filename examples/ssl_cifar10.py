"""What pretraining on 10,000 images of CIFAR-10 is worth: three methods against raw pixels and a random initialization.

    python examples/ssl_cifar10.py --data data/cifar10 --out bench/ssl-cifar10 --json ssl.json

pretrains ResNet18 at 32 px for 8 epochs with each method and seed, in one thread, and measures k-NN on the 10,000 test
images; the bank are 10,000 labelled training images. What is finished is not done again. `--channels 32 64 128 256` is
a network of half the width, which takes a quarter of the arithmetic.

The settings differ from the paper's recipes in what 1,250 steps of 64 images at 32 px ask for, found on training images
that were held out: batch normalization at its initial statistics (the last maps are of one position, and the statistics
of 64 values are noise), views that show more of an image, AdamW, and for MoCo a queue of two batches, as a network that
moves fast tells older keys by their age. For SwAV hard assignments and KoLeo: with smoother ones most runs made all
images alike. Then smaller crops than the other two take, and a quarter of its colour jitter, which is made for photos
of 224 px: colours are much of what tells images of 32 px apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from midge.profiles.environment import describe_device
from midge.runtime.files import write_json
from midge.runtime.progress import say
from midge.train.evaluation_config import KnnConfig
from midge.train.knn import knn
from midge.train.pretrain import pretrain
from midge.train.recipes import RECIPES

COMMON: dict[str, Any] = {
    "fit_to_data": False,
    "image_px": 32,
    "resize_px": 32,
    "local_px": 16,
    "num_local": 6,
    "global_area": (0.6, 1.0),
    "local_area": (0.25, 0.7),
    "batch_size": 64,
    "optimizer": "adamw",
    "base_lr": 0.004,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "weight_decay_end": 0.05,
    "warmup_epochs": 0.5,
    "head_hidden": 512,
    "head_bottleneck": 128,
    "freeze_batch_norm": True,
}
METHODS: dict[str, dict[str, Any]] = {
    "moco": {
        "queue_size": 128,
        "key_groups": 2,
        "temperature": 0.1,
        "teacher_momentum": 0.98,
        "teacher_momentum_end": 0.995,
    },
    "dino": {
        "local_area": (0.3, 0.8),
        "head_outputs": 1024,
        "teacher_temperature": 0.04,
        "teacher_temperature_warmup_epochs": 0.0,
        "teacher_momentum": 0.98,
        "freeze_last_layer_epochs": 0.2,
        "koleo_weight": 0.05,
    },
    "swav": {
        "global_area": (0.4, 1.0),
        "local_area": (0.2, 0.6),
        "base_lr": 0.002,
        "warmup_lr": 0.0,
        "jitter_strength": 0.25,
        "head_outputs": 128,
        "queue_size": 0,
        "sinkhorn_epsilon": 0.01,
        "temperature": 0.05,
        "koleo_weight": 0.1,
    },
}
KINDS = ("pixels", "random_init", "pretrained")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as midge data fetch cifar10 writes it")
    parser.add_argument("--out", type=Path, required=True, help="one run folder for each method and seed goes here")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--channels", nargs=4, type=int, help="of the four stages; default ResNet18's own")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--images", type=int, default=10_000, help="so many training images, and at most in the bank")
    parser.add_argument("--limit", type=int, help="so many test images; default all")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(method, seed, given) for seed in given.seeds for method in given.methods]
    if given.json:
        write_json(given.json, {"schema": 1, "device": describe_device(), "results": results})
    print_table(results)


def measure(method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Pretrain and evaluate, where that has not been done."""
    run = given.out / f"{method}-{seed}"
    found = run / "eval" / "knn.json"
    changes = {**COMMON, **METHODS[method], "epochs": given.epochs, "limit": given.images, "seed": seed, "workers": 0}
    if given.channels:
        changes["channels"] = tuple(given.channels)
    if not found.exists():
        say(f"{method}, seed {seed}")
        config = RECIPES[f"{method}-cnn"](given.data / "train", run, **changes)
        pretrain(dataclasses.replace(config, resume=True, device="cpu"))
        knn(KnnConfig(run, labels=given.images, limit=given.limit, baselines=True, seed=seed, device="cpu"))
    evaluated = json.loads(found.read_text(encoding="utf-8"))
    return {"method": method, "seed": seed, "settings": changes, "knn": evaluated}


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the results to stdout."""
    table = Table("method", "seed", *(f"{kind}, k-NN % (95 %)" for kind in KINDS))
    for result in results:
        accuracies = [result["knn"][kind] for kind in KINDS]
        cells = [
            f"{100 * found['top1']:.2f} ({100 * found['ci95'][0]:.1f}–{100 * found['ci95'][1]:.1f})"
            for found in accuracies
        ]
        table.add_row(result["method"], str(result["seed"]), *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
