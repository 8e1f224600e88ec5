"""What a step costs beyond its arithmetic, by method: python tests/bench/bench_methods.py [--image-px 32] …

The whole step of `midge pretrain` on ready-made views (forward, backward, LARS, moving averages, queue) takes turns
with its bare arithmetic (the forward passes, the loss and the backward pass, called on the networks directly), in
rounds of alternating order, in one process on one thread, in CPU time; then the whole step once more, part by part. The
memory is what the forward pass keeps for the backward one, per image, beside a plain loop that passes view by view. The
last line on stdout is the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_step import train_step, write_jpegs
from rich.console import Console
from rich.table import Table

from midge.profiles.environment import describe_device
from midge.profiles.statistics import paired_latency
from midge.runtime.files import write_json
from midge.runtime.images import list_images
from midge.train.backbones import find_backbone
from midge.train.engine import build_fabric
from midge.train.executors import rendered
from midge.train.method import Views
from midge.train.pretrain import build_dataset
from midge.train.recipes import METHOD_RECIPES, RECIPES
from midge.train.run_folder import RunFolder
from midge.train.small_data import fit_to_data
from midge.train.trainer import Trainer


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=sorted(METHOD_RECIPES))
    parser.add_argument("--image-px", type=int, default=32)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2, help="per way and round")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        data = write_jpegs(Path(folder) / "images", given.batch_size)
        methods = {name: measure(trainer_of(name, given, data, Path(folder) / name), given) for name in given.methods}
    result = {
        "device": describe_device(),
        "torch": torch.__version__,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "backbone": given.backbone,
        "batch_size": given.batch_size,
        "methods": methods,
    }
    print_table(methods)
    if given.out:
        write_json(given.out, result)
    print(json.dumps(result))


def trainer_of(method: str, given: argparse.Namespace, data: Path, out: Path) -> Trainer:
    """A run of the paper's recipe at the given size, fitted to 10,000 images; it has one batch."""
    sizes = {"image_px": given.image_px, "batch_size": given.batch_size, "backbone": given.backbone, "device": "cpu"}
    config, _ = fit_to_data(RECIPES[f"{METHOD_RECIPES[method]}-cnn"](data, out, **sizes), 10_000)
    config = replace(config, epochs=10_000.0)  # one step each: the schedules reach as far as the rounds
    backbone = find_backbone(config.backbone, config.image_px)
    dataset = build_dataset(config, list_images(data), backbone)
    out.mkdir()
    return Trainer(config, RunFolder(out, "bench"), build_fabric(config), backbone, dataset)


def measure(trainer: Trainer, given: argparse.Namespace) -> dict[str, Any]:
    """One method: the whole step against its arithmetic, its parts, and its memory."""
    batches = rendered([trainer.dataset[0]], trainer.render, trainer.fabric.device)
    views = next(batch.views for batch in batches)
    step = 0
    samples: dict[str, list[list[float]]] = {"step": [], "arithmetic": []}
    for number in range(given.rounds + 1):
        for way in list(samples) if number % 2 else reversed(list(samples)):
            start = time.process_time()
            spent = 0.0
            for _ in range(given.steps):
                if way == "step":
                    train_step(trainer, views, step)
                else:
                    spent -= time_of_rest(trainer, views, step)
                step += 1
            samples[way].append([1000 * (time.process_time() - start + spent) / given.steps])
    samples = {way: values[1:] for way, values in samples.items()}  # the first round warms up
    against = paired_latency(samples["arithmetic"], samples["step"])  # its ratio is step / arithmetic
    median = sorted(value for (value,) in samples["step"])[len(samples["step"]) // 2]
    policy = trainer.dataset.policy
    return {
        "views": f"2 x {policy.global_px} + {policy.num_local} x {policy.local_px} px",
        "step_ms": round(median, 1),
        "images_per_s": round(1000 * trainer.dataset.batch_size / median, 1),
        "step_over_arithmetic": round(against["ratio"], 3),
        "step_over_arithmetic_ci95": [round(end, 3) for end in against["ci95"]],
        "parts_ms": parts_ms(trainer, views, step),
        "kept_kib_per_image": round(kept_bytes(trainer, views, step) / trainer.dataset.batch_size / 1024, 1),
        "kept_kib_per_image_view_by_view": round(
            kept_bytes(trainer, views, step, by_view=True) / trainer.dataset.batch_size / 1024, 1
        ),
    }


def time_of_rest(trainer: Trainer, views: Views, step: int) -> float:
    """Do the arithmetic of a step; give the seconds of what has to follow and does not belong to it."""
    trainer.method.loss(views, step).total.backward()
    start = time.process_time()
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.method.after_step(step)
    return time.process_time() - start


def parts_ms(trainer: Trainer, views: Views, step: int) -> dict[str, float]:
    """Milliseconds of CPU time of each part of one more step."""
    parts = {}
    method, last = trainer.method, time.process_time()

    def note(part: str) -> None:
        nonlocal last
        parts[part], last = round(1000 * (time.process_time() - last), 1), time.process_time()

    losses = trainer.network.loss(views, step)
    note("forward and loss")
    trainer.fabric.backward(losses.total)
    note("backward")
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    note("optimizer")
    method.after_step(step)
    note("averages and queue")
    trainer.render(trainer.dataset[0])
    note("data and views, made in this process")
    return parts


def kept_bytes(trainer: Trainer, views: Views, step: int, by_view: bool = False) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward one, each storage once, weights left out.

    Args:
        trainer: of the method.
        views: of a batch.
        step: for the schedules.
        by_view: pass the backbone view by view, as a plain multi-crop loop does, instead of size by size.
    """
    method, size = trainer.method, trainer.dataset.batch_size
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*method.parameters(), *method.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    network = next(module for module in method.children() if any(p.requires_grad for p in module.parameters()))
    forward = network.backbone.forward
    if by_view:
        network.backbone.forward = lambda x: torch.cat([forward(view) for view in x.split(size)])
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = method.loss(views, step)
    finally:
        network.backbone.forward = forward
    del losses
    method.after_step(step)
    return sum(storages.values())


def print_table(methods: dict[str, Any]) -> None:
    """For people, on stdout."""
    table = Table("method", "views", "step ms", "images/s", "step / arithmetic", "95 % int.", "kept KiB", box=None)
    for name, row in methods.items():
        low, high = row["step_over_arithmetic_ci95"]
        kept = f"{row['kept_kib_per_image']:.0f} (view by view {row['kept_kib_per_image_view_by_view']:.0f})"
        ratio = (f"{row['step_over_arithmetic']:.3f}", f"{low:.3f}–{high:.3f}")
        table.add_row(name, row["views"], f"{row['step_ms']:.0f}", f"{row['images_per_s']:.0f}", *ratio, kept)
    console = Console(width=130, highlight=False)
    console.print(table)
    for name, row in methods.items():
        console.print(f"{name}: " + ", ".join(f"{part} {ms:.0f} ms" for part, ms in row["parts_ms"].items()))


if __name__ == "__main__":
    main()
