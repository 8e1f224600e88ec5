"""What the views add to a training step: python tests/bench/bench_step.py [--data FOLDER] [--image-px 32 64] …

The steps are those of `midge pretrain` (forward, backward, optimizer, moving averages; the quickstart's network), on
ready-made views, on ours (decoded, sampled, cut, recoloured, normalized in this process), and on those of the Pillow
recipe of the papers' code. They take turns, in rounds of alternating order. On the CPU all runs in one process on one
thread and counts CPU time, so the share of the views is that of the work and holds for any number of workers; on a GPU
the views come from workers, wall-clock time between synchronizations counts, and their share is what they add to the
step. Without --data it makes 500 x 375 px JPEGs of about 90 kB. The last line on stdout is the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import make_jpegs
from recipes_of_others import PillowRecipe
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from midge.profiles.environment import describe_device
from midge.profiles.statistics import paired_latency
from midge.runtime.files import write_json
from midge.runtime.images import fingerprint, list_images
from midge.train.backbones import find_backbone
from midge.train.config import PretrainConfig
from midge.train.datasets import ViewDataset, load_batches
from midge.train.decode_cache import open_cache
from midge.train.engine import build_fabric
from midge.train.executors import map_tensors, rendered
from midge.train.method import Views
from midge.train.optim import prepare_step
from midge.train.pretrain import build_dataset
from midge.train.recipes import quickstart
from midge.train.run_folder import RunFolder
from midge.train.trainer import Trainer
from midge.train.views import AUGMENTATIONS


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images; default generated JPEGs")
    parser.add_argument("--image-px", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--full-width", action="store_true", help="not the quickstart's half")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--limit", type=int, default=512, help="images of --data")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2, help="per way and round")
    parser.add_argument("--workers", type=int, default=16, help="on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--decode-px", type=int, help="as of midge pretrain")
    parser.add_argument("--cached", action="store_true", help="ours from a decode cache, made beforehand")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    given = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = given.data or write_jpegs(folder / "images", given.batch_size)
        configs = [config_of(given, data, folder / f"run-{px}", px) for px in given.image_px]
        configs = [replace(config, decode_cache=folder / "cache" if given.cached else None) for config in configs]
        sizes = [measure(config, given.rounds, given.steps, given.workers) for config in configs]
    result = {
        "device": describe_device(),
        "torch": torch.__version__,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "sizes": sizes,
        "gpu": None if sizes[0]["device"] == "cpu" else sizes[0]["device"],
    }
    print_table(sizes)
    if given.out:
        write_json(given.out, result)
    print(json.dumps(result))


def write_jpegs(folder: Path, number: int) -> Path:
    """Generated images as files."""
    folder.mkdir()
    for index, data in enumerate(make_jpegs(number)):
        (folder / f"{index:04}.jpg").write_bytes(data)
    return folder


def config_of(given: argparse.Namespace, data: Path, out: Path, px: int) -> PretrainConfig:
    """The quickstart at one size."""
    network = {"backbone": given.backbone, **({"channels": None} if given.full_width else {})}
    sizes = {
        "image_px": px,
        "resize_px": px,
        "batch_size": given.batch_size,
        "decode_px": given.decode_px,
        "limit": given.limit,
    }
    return quickstart(data, out, device=given.device, precision=given.precision, **network, **sizes)


class PillowBatches(Dataset[Views]):
    """The same batches by the Pillow recipe, as item ``step``."""

    def __init__(self, config: PretrainConfig, dataset: ViewDataset) -> None:
        self.dataset = dataset
        recipe = (dataset.sampler.blur_px, config.mean, config.std)
        self.recipe = PillowRecipe(dataset.policy, AUGMENTATIONS[config.method], *recipe)

    def __getitem__(self, step: int) -> Views:
        images, size = self.dataset.images, self.dataset.batch_size
        first = step * size
        data = [images.path(index % len(images)).read_bytes() for index in range(first, first + size)]
        by_view = list(zip(*self.recipe(data), strict=True))
        kinds = (torch.cat([torch.stack(view) for view in views]) for views in (by_view[:2], by_view[2:]))
        return Views(*(kind.contiguous(memory_format=torch.channels_last) for kind in kinds))


def sources(trainer: Trainer, steps: int, workers: int) -> dict[str, Iterator[Views]]:
    """Views without end or for ``steps`` steps, by way."""
    dataset, device = trainer.dataset, trainer.fabric.device
    pin = device.type == "cuda"
    batches = load_batches(dataset, 0, steps, workers, pin)
    ours = (ready.views for ready in rendered(batches, trainer.render, device))
    ready_made = next(batch.views for batch in rendered([dataset[0]], trainer.render, device))
    loader = DataLoader(
        PillowBatches(trainer.config, dataset),
        batch_size=None,
        sampler=range(steps),
        num_workers=workers,
        pin_memory=pin,
    )
    pillow = (map_tensors(views, lambda tensor: tensor.to(device, non_blocking=True)) for views in loader)
    return {"ready-made views": repeat(ready_made), "ours": ours, "Pillow recipe": pillow}


def measure(config: PretrainConfig, rounds: int, steps: int, workers: int) -> dict[str, Any]:
    """All ways at one size: milliseconds per step, images/s, and what the views are of it."""
    fabric = build_fabric(config)
    gpu = fabric.device.type == "cuda"
    if not gpu:
        torch.set_num_threads(1)
    backbone = find_backbone(config.backbone, config.image_px, config.channels, config.patch_px)
    dataset = build_dataset(config, list_images(config.data, config.limit, config.seed), backbone)
    if config.decode_cache:
        images = dataset.images
        dataset.cache = open_cache(config.decode_cache, images, fingerprint(images), dataset.min_px, workers)
    total = (rounds + 1) * steps
    config = replace(config, epochs=3 * total / dataset.steps_per_epoch)
    config.out.mkdir()
    trainer = Trainer(config, RunFolder(config.out, "bench"), fabric, backbone, dataset)
    views, done = sources(trainer, total, workers if gpu else 0), count()
    samples: dict[str, list[float]] = {way: [] for way in views}
    waited: dict[str, list[float]] = {way: [] for way in views}
    clock = time.perf_counter if gpu else time.process_time
    for number in range(rounds + 1):
        for way in list(views) if number % 2 else reversed(views):
            start, waiting = clock(), 0.0
            for _ in range(steps):
                before = clock()
                batch = next(views[way])
                waiting += clock() - before
                train_step(trainer, batch, next(done))
            if gpu:
                torch.cuda.synchronize()
            samples[way].append(1000 * (clock() - start) / steps)
            waited[way].append(1000 * waiting / steps)
    policy = dataset.policy
    return {
        "device": str(fabric.device),
        "views": f"2 x {policy.global_px} + {policy.num_local} x {policy.local_px} px",
        "backbone": config.backbone,
        "channels": config.channels,
        "batch_size": config.batch_size,
        "executor": dataset.executor,
        "decode_px": dataset.min_px,
        "decode_cache": dataset.cache is not None,
        **summarize(drop_first(samples), None if gpu else drop_first(waited), config.batch_size),
    }


def train_step(trainer: Trainer, views: Views, step: int) -> None:
    """One step of :meth:`Trainer.train`, without its log."""
    with trainer.fabric.autocast():
        losses = trainer.network.loss(views, step)
    trainer.fabric.backward(losses.total)
    prepare_step(trainer.optimizer, 1e-3, 0.0, trainer.method.frozen(step))
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.method.after_step(step)


def drop_first(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """Without the round that warms up."""
    return {way: values[1:] for way, values in samples.items()}


def summarize(
    samples: dict[str, list[float]], waited: dict[str, list[float]] | None, batch_size: int
) -> dict[str, Any]:
    """By way: ms per step, images/s, and the share of the views with its interval.

    Args:
        samples: ms per step, by round.
        waited: ms of each step in which the views were made; None: take what the steps on ready-made views lack.
        batch_size: images per step.
    """
    rounds = {way: [[value] for value in values] for way, values in samples.items()}
    ways: dict[str, Any] = {}
    for way, values in samples.items():
        ms = float(np.median(values))
        rest = rounds["ready-made views"]
        if waited:
            rest = [[value - part] for value, part in zip(values, waited[way], strict=True)]
        step = paired_latency(rounds[way], rest)  # its ratio is rest / step
        ways[way] = {
            "step_ms": round(ms, 1),
            "images_per_s": round(1000 * batch_size / ms, 1),
            "views_percent": round(100 * (1 - step["ratio"]), 1),
            "views_percent_ci95": [round(100 * (1 - end), 1) for end in reversed(step["ci95"])],
            "samples_ms": [round(value, 1) for value in values],
        }
    against = paired_latency(rounds["ours"], rounds["Pillow recipe"])
    return {"ways": ways, "ours_times_pillow": {"ratio": round(against["ratio"], 2), "ci95": against["ci95"]}}


def print_table(sizes: list[dict[str, Any]]) -> None:
    """For people, on stdout."""
    table = Table("step", "views from", "ms", "images/s", "views, % of the step", "95 % int.", box=None)
    for size in sizes:
        for way, row in size["ways"].items():
            low, high = row["views_percent_ci95"]
            share = ("", "") if way == "ready-made views" else (f"{row['views_percent']:.1f}", f"{low:.1f}–{high:.1f}")
            numbers = (f"{row['step_ms']:.0f}", f"{row['images_per_s']:.0f}")
            table.add_row(f"{size['backbone']}, {size['views']}", way, *numbers, *share)
    Console(width=120, highlight=False).print(table)


if __name__ == "__main__":
    main()
