"""What matrix products on maps of a few positions win: python tests/bench/bench_small_maps.py [--rounds 5] [--out FILE]

Forward and backward pass of whole networks as midge trains them (train mode, channels last), with the products of
`train/small_maps.py` and without: the same weights and batch, in turns, in rounds of alternating order, in one process
on one thread, in CPU time. Then the whole step of `midge pretrain`, by the paper's DINO at 32 px on ready-made views,
likewise. The last line on stdout is the JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_methods import trainer_of
from bench_step import train_step, write_jpegs
from rich.console import Console
from rich.table import Table
from torch import nn

from midge.profiles.environment import describe_device
from midge.profiles.statistics import paired_latency
from midge.runtime.files import write_json
from midge.train.backbones import find_backbone
from midge.train.executors import rendered
from midge.train.small_maps import SmallMapConv2d, use_small_map_products

HALF_WIDTH = (32, 64, 128, 256)  # the quickstart's
NETWORKS: dict[str, tuple[str, Sequence[int] | None]] = {
    "resnet18": ("resnet18", None),
    "resnet18, half width": ("resnet18", HALF_WIDTH),
    "resnet34": ("resnet34", None),
    "resnet50": ("resnet50", None),
    "mobilenetv2_100": ("mobilenetv2_100", None),
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--image-px", type=int, nargs="*", default=[32, 18])
    parser.add_argument("--batch-size", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--steps-of", nargs="*", default=["resnet18", "mobilenetv2_100"], help="whole steps of these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    rows = [
        measure_network(name, px, batch_size, given.rounds)
        for name in given.networks
        for px in given.image_px
        for batch_size in given.batch_size
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows += [measure_step(Path(folder) / name, name, given.rounds) for name in given.steps_of]
    result = {
        "device": describe_device(),
        "torch": torch.__version__,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "rows": rows,
    }
    print_table(rows)
    if given.out:
        write_json(given.out, result)
    print(json.dumps(result))


def measure_network(name: str, px: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Both passes of a network."""
    timm_name, channels = NETWORKS[name]
    torch.manual_seed(0)
    plain: Any = find_backbone(timm_name, 32, channels).build()
    plain.to(memory_format=torch.channels_last)
    products = copy.deepcopy(plain)
    use_small_map_products(products)
    images = torch.randn(batch_size, 3, px, px).contiguous(memory_format=torch.channels_last)

    def both_passes(network: nn.Module) -> None:
        network.zero_grad()
        network(images).square().mean().backward()

    ways = {"without": lambda: both_passes(plain), "with": lambda: both_passes(products)}
    return {"what": name, "px": str(px), "batch_size": batch_size, **take_turns(ways, rounds)}


def measure_step(folder: Path, backbone: str, rounds: int, batch_size: int = 64) -> dict[str, Any]:
    """The whole step of DINO: all forward passes, the backward pass, LARS, moving averages."""
    folder.mkdir()
    data = write_jpegs(folder / "images", batch_size)
    given = argparse.Namespace(image_px=32, batch_size=batch_size, backbone=backbone)
    trainers = {way: trainer_of("dino", given, data, folder / way) for way in ("without", "with")}
    for module in trainers["without"].method.modules():
        if type(module) is SmallMapConv2d:
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    trainer = trainers["with"]
    views = next(rendered([trainer.dataset[0]], trainer.render, trainer.fabric.device)).views
    policy, numbers = trainer.dataset.policy, {way: count() for way in trainers}
    ways = {way: lambda way=way: train_step(trainers[way], views, next(numbers[way])) for way in trainers}
    px = f"{policy.global_px}, {policy.num_local} x {policy.local_px}"
    return {"what": f"DINO, {backbone}", "px": px, "batch_size": batch_size, **take_turns(ways, rounds)}


def take_turns(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, Any]:
    """Milliseconds of both ways, and how many times as fast the second is."""
    samples: dict[str, list[list[float]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in list(ways) if number % 2 else reversed(list(ways)):
            start = time.process_time()
            ways[way]()
            samples[way].append([1000 * (time.process_time() - start)])
    samples = {way: values[1:] for way, values in samples.items()}  # the first round warms up
    against = paired_latency(samples["with"], samples["without"])
    return {
        **{f"{way}_ms": round(median(value for (value,) in values), 1) for way, values in samples.items()},
        "times_as_fast": round(against["ratio"], 2),
        "ci95": [round(end, 2) for end in against["ci95"]],
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """For people, on stdout."""
    table = Table("what", "px", "batch", "without, ms", "with, ms", "times as fast", "95 % int.", box=None)
    for row in rows:
        times = (f"{row['without_ms']:.0f}", f"{row['with_ms']:.0f}", f"{row['times_as_fast']:.2f}")
        low, high = row["ci95"]
        table.add_row(row["what"], row["px"], str(row["batch_size"]), *times, f"{low:.2f}–{high:.2f}")
    Console(width=110, highlight=False).print(table)


if __name__ == "__main__":
    main()
