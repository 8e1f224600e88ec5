"""Where a pretraining step spends its time: python tests/bench/bench_pretrain.py [--data FOLDER] [--batch-size 64] …

Prints milliseconds per step (wall clock, mean over the steps after the warm-up) of each part, run one after the other
in one process, and images/s; with `--workers 0` the views are made in that process too and their time is the data's.
Without --data it makes 28 px PNG images. The machine's load average stands beside, for all of it depends on that.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from midge.runtime.images import list_images
from midge.train.backbones import find_backbone
from midge.train.config import PretrainConfig
from midge.train.engine import build_fabric
from midge.train.interruption import StopRequest
from midge.train.pretrain import build_dataset
from midge.train.recipes import quickstart
from midge.train.run_folder import RunFolder
from midge.train.trainer import Trainer


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--batch-size", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--image-px", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = given.data or make_images(Path(folder) / "images", max(given.batch_size))
        for batch_size in given.batch_size:
            changes = {"image_px": given.image_px, "resize_px": given.image_px, "device": given.device}
            out = Path(folder) / f"run-{batch_size}"
            config = quickstart(data, out, batch_size=batch_size, workers=given.workers, **changes)
            print(json.dumps(measure(config, given.steps)))


def make_images(folder: Path, number: int) -> Path:
    """Noise on a slope, as 28 px PNG files."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(number):
        image = rng.integers(0, 64, (28, 28), dtype=np.uint8) + np.arange(28, dtype=np.uint8) * 4
        Image.fromarray(image).save(folder / f"{index}.png")
    return folder


def measure(config: PretrainConfig, steps: int) -> dict[str, Any]:
    """One run of some steps, the first quarter of them as a warm-up.

    Returns:
        Settings; milliseconds per step of each part; images/s; the load average before and after.
    """
    load_before = os.getloadavg()[0]
    fabric = build_fabric(config)
    images = list_images(config.data)
    backbone = find_backbone(config.backbone, config.image_px, config.channels, config.patch_px)
    dataset = build_dataset(config, images, backbone)
    config = replace(
        config, epochs=steps / dataset.steps_per_epoch, log_every_steps=steps, checkpoint_every_steps=steps
    )
    config.out.mkdir()
    trainer = Trainer(config, RunFolder(config.out, "bench"), fabric, backbone, dataset)
    clock = Clock(warmup=steps // 4)
    clock.wrap(dataset.__class__, "__getitem__", "decode and views, or their part in the workers")
    clock.wrap(trainer, "render", "views on the device")
    clock.wrap(trainer.method.teacher, "forward", "teacher forward")
    clock.wrap(trainer.method, "loss", "loss, with teacher and student forward")
    clock.wrap(fabric, "backward", "backward")
    clock.wrap(trainer.optimizer, "step", "optimizer")
    clock.wrap(trainer.method, "after_step", "averages", ends_step=True)
    with StopRequest() as stop:
        trainer.train(stop)
    policy = asdict(dataset.policy)
    return {
        "device": str(fabric.device),
        "batch_size": config.batch_size,
        "views": f"2 x {policy['global_px']} + {policy['num_local']} x {policy['local_px']} px",
        "channels": config.channels,
        "workers": config.workers,
        "images_per_s": round(config.batch_size / clock.step_s(), 1),
        "step_ms": round(1000 * clock.step_s(), 1),
        "parts_ms": clock.parts_ms(),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }


class Clock:
    """Adds up the wall-clock time inside some functions, step by step; times of nested ones are contained.

    Args:
        warmup: number of first steps that do not count.
    """

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.parts: dict[str, float] = defaultdict(float)
        self.ends: list[float] = []

    def wrap(self, owner: Any, name: str, part: str, ends_step: bool = False) -> None:
        """Time the calls of ``owner.name``."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(part):
                result = function(*args, **kwargs)
            if ends_step:
                self.ends.append(time.perf_counter())
            return result

        setattr(owner, name, timed)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if len(self.ends) > self.warmup:
            self.parts[part] += time.perf_counter() - start

    @property
    def steps(self) -> int:
        return len(self.ends) - self.warmup - 1

    def step_s(self) -> float:
        """Seconds from one step's end to the next one's."""
        return (self.ends[-1] - self.ends[self.warmup]) / self.steps

    def parts_ms(self) -> dict[str, float]:
        """Milliseconds per step by part, and what is in none of them."""
        parts = {part: round(1000 * seconds / self.steps, 1) for part, seconds in self.parts.items()}
        inside = parts.get("teacher forward", 0.0)
        parts["other"] = round(1000 * self.step_s() - sum(parts.values()) + inside, 1)
        return parts


if __name__ == "__main__":
    main()
