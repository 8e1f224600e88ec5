"""Images/s of the views: python tests/bench/bench_views.py [--data FOLDER] [--out FILE.json] …

What is timed is the way from encoded images in memory to all views of each (2 x 224 + 6 x 128 px by default), by:

- the recipe of the papers' code, on Pillow images through torchvision, to normalized float tensors;
- torchvision v2 on uint8 tensors, and kornia where it is installed (without antialiasing): both get our decode;
- ours on the CPU, to float and to uint8 (which the device normalizes);
- ours by the device path, on CPU tensors, and on a GPU where there is one (from page-locked decoded images);
- the decode alone, by Pillow and ours.

CPU rows run on one thread and count CPU time of the process, which a busy machine disturbs least: images/s per core.
GPU rows count wall-clock time between synchronizations. All rows take turns in rounds, in alternating order; the ratio
to the Pillow recipe is paired by round, with its 95 % interval. Without --data it makes 500 x 375 px JPEGs of about 90
kB. A row that cannot be measured is null, with its reason. The last line on stdout is the JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import torch
import torchvision
from pictures import make_jpegs, read
from recipes_of_others import PillowRecipe, kornia, torchvision_v2
from rich.console import Console
from rich.table import Table

from midge.profiles.environment import describe_device
from midge.profiles.statistics import p50_interval, paired_latency
from midge.runtime.decode import load_image
from midge.runtime.files import write_json
from midge.runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD
from midge.train.cpu_views import Normalizer, cut_batch
from midge.train.crops import crop_view
from midge.train.device_views import DeviceViews, pack_batch
from midge.train.executors import map_tensors, rendered
from midge.train.jpeg import decode_jpeg
from midge.train.recolour import recolour
from midge.train.sampling import ViewSampler
from midge.train.views import AUGMENTATIONS, blur_range_px, view_policy

REFERENCE = "Pillow recipe"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of images; default generated JPEGs")
    parser.add_argument("--images", type=int, default=16, help="per row and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--image-px", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256, help="images per batch on a GPU")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = read(given.data, given.images) if given.data else make_jpegs(given.images)
    bench = Bench(data, given.image_px, given.batch_size)
    load_before = os.getloadavg()[0]
    samples = run_rounds(bench.rows, given.rounds)
    result = {
        "views": f"2 x {bench.policy.global_px} + {bench.policy.num_local} x {bench.policy.local_px} px",
        "data": {"images": len(data), "mean_kb": round(np.mean([len(item) for item in data]) / 1000, 1)},
        "rounds": given.rounds,
        "device": describe_device(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
            "opencv": cv2.__version__,
        },
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "rows": summarize(samples, bench.missing),
        "stages_ms_per_image": bench.stages(samples),
        "floor_of_the_device_path": bench.floor(samples),
    }
    print_tables(result)
    if given.out:
        write_json(given.out, result)
    print(json.dumps(result))


class Bench:
    """The rows: each a function that makes the views of all images once, and says how many milliseconds per image."""

    def __init__(self, data: list[bytes], image_px: int, batch_size: int) -> None:
        self.data = data
        self.policy = policy = view_policy("lowcompute", "cnn", image_px)
        blur_px = blur_range_px(image_px)
        self.sampler = ViewSampler(policy, AUGMENTATIONS["dino"], blur_px, seed=0)
        recipe = (policy, AUGMENTATIONS["dino"], blur_px, IMAGENET_MEAN, IMAGENET_STD)
        self.pillow = PillowRecipe(*recipe)
        self.normalizer = Normalizer(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"))
        device_views = DeviceViews(policy, IMAGENET_MEAN, IMAGENET_STD, blur_px[1], torch.device("cpu"))
        v2, by_kornia = torchvision_v2(*recipe), kornia(*recipe)
        self.missing: dict[str, str] = {}
        self.rows: dict[str, Callable[[], float]] = {
            REFERENCE: self.cpu(lambda: self.pillow(data)),
            "torchvision v2, uint8 tensors": self.cpu(lambda: v2(self.decode())),
            "kornia, float tensors": self.cpu(lambda: by_kornia(self.stacked())) if by_kornia else absent,
            "ours, CPU, float": self.cpu(lambda: self.normalizer(self.cut())),
            "ours, CPU, uint8": self.cpu(self.cut),
            "ours, CPU, uint8, without the decode": self.cpu(lambda: self.cut(self.decoded)),
            "ours, device path on CPU tensors": self.cpu(lambda: device_views(self.pack())),
            "ours, on the GPU (from decoded images)": absent,
            "decode alone, Pillow": self.cpu(lambda: [load_image(item) for item in data]),
            "decode alone, ours": self.cpu(self.decode),
            "stage: crop, resize, flip": self.cpu(self.crop),
            "stage: recolour": self.cpu(self.recolour),
            "stage: sample": self.cpu(lambda: self.draw(self.decoded)),
            "stage: normalize": self.cpu(lambda: self.normalizer(self.ready)),
        }
        self.decoded = self.decode()
        self.parameters = self.draw(self.decoded)
        self.ready = self.cut()
        self.views = [np.zeros((px, px, 3), np.uint8) for px in (policy.global_px, policy.local_px)]
        if len({image.shape for image in self.decoded}) > 1 or not by_kornia:
            reason = "the images differ in size" if by_kornia else "kornia is not installed"
            self.missing["kornia, float tensors"] = reason
        name = "ours, on the GPU (from decoded images)"
        if torch.cuda.is_available():
            self.rows[name] = self.gpu(torch.device("cuda"), batch_size)
        else:
            self.missing[name] = "no CUDA GPU here"

    def cpu(self, function: Callable[[], Any]) -> Callable[[], float]:
        """Milliseconds of CPU time per image."""

        def measure() -> float:
            start = time.process_time()
            function()
            return 1000 * (time.process_time() - start) / len(self.data)

        return measure

    def gpu(self, device: torch.device, batch_size: int) -> Callable[[], float]:
        """Wall-clock milliseconds per image of copy and rendering, of batches that lie ready in page-locked memory."""
        images = [self.decoded[n % len(self.decoded)] for n in range(batch_size)]
        batch = pack_batch([(images, self.draw(images))], batch_size, self.policy)
        batch = map_tensors(batch, torch.Tensor.pin_memory)
        render = DeviceViews(self.policy, IMAGENET_MEAN, IMAGENET_STD, blur_range_px(self.policy.global_px)[1], device)

        def measure(batches: int = 10) -> float:
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in rendered([batch] * batches, render, device):
                pass
            torch.cuda.synchronize(device)
            return 1000 * (time.perf_counter() - start) / (batches * batch_size)

        return measure

    def decode(self) -> list[np.ndarray]:
        return [load_image(item, decode_jpeg=decode_jpeg) for item in self.data]

    def draw(self, images: Sequence[np.ndarray]) -> Any:
        sizes = np.array([image.shape[:2] for image in images])
        return self.sampler(0, np.arange(len(images)), *sizes.T)

    def stacked(self) -> torch.Tensor:
        return torch.from_numpy(np.stack(self.decode())).permute(0, 3, 1, 2).float().div_(255)

    def cut(self, images: list[np.ndarray] | None = None) -> Any:
        images = images or self.decode()
        return cut_batch([(images, self.draw(images))], len(images), self.policy)

    def pack(self) -> Any:
        images = self.decode()
        return pack_batch([(images, self.draw(images))], len(images), self.policy)

    def each_view(self, function: Callable[[int, int, np.ndarray], None]) -> None:
        for n in range(len(self.decoded)):
            for v in range(self.policy.num_views):
                function(v, n, self.views[v > 1])

    def crop(self) -> None:
        p = self.parameters
        boxes = np.stack([p.top, p.left, p.height, p.width, p.flip], axis=-1).tolist()
        self.each_view(lambda v, n, view: crop_view(self.decoded[n], *boxes[v][n], out=view))

    def recolour(self) -> None:
        p = self.parameters
        colours = (p.jitter_order, p.jitter_factor, p.grayscale, p.blur_sigma, p.solarize)
        drawn = [array.tolist() for array in colours]
        self.each_view(lambda v, n, view: recolour(view, *(values[v][n] for values in drawn)))

    def stages(self, samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        """Milliseconds per image: ours as medians over the rounds, the Pillow recipe's as means over all it ran."""
        ours = {
            "decode": "decode alone, ours",
            "sample": "stage: sample",
            "crop, resize, flip": "stage: crop, resize, flip",
        }
        ours |= {"recolour": "stage: recolour", "normalize": "stage: normalize"}
        runs = (len(samples[REFERENCE]) + 1) * len(self.data)
        return {
            REFERENCE: {name: round(1000 * value / runs, 3) for name, value in self.pillow.seconds.items()},
            "ours, CPU": {name: round(float(np.median(samples[row])), 3) for name, row in ours.items()},
        }

    def floor(self, samples: dict[str, list[float]]) -> dict[str, Any]:
        """What the two products of the device path need at this machine's measured rate of products, one thread."""
        height, width = np.mean([image.shape[:2] for image in self.decoded], axis=0)
        kinds = ((2, self.policy.global_px), (self.policy.num_local, self.policy.local_px))
        macs = sum(number * px * width * 3 * (height + px) for number, px in kinds)
        a = torch.rand(1024, 1024)
        start = time.process_time()
        for _ in range(10):
            torch.mm(a, a)
        rate = 10 * 1024**3 / (time.process_time() - start)
        measured = float(np.median(samples["ours, device path on CPU tensors"]))
        return {
            "gmacs_per_image": round(macs / 1e9, 3),
            "products_gmacs_per_s": round(rate / 1e9, 1),
            "products_ms_per_image": round(1000 * macs / rate, 2),
            "measured_ms_per_image": round(measured, 2),
            "gpu": None if not torch.cuda.is_available() else "see the row of the GPU",
        }


def absent() -> float:
    """The row of something that is not here."""
    return float("nan")


def run_rounds(rows: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per image of each row, by round; the first round warms up and is dropped."""
    samples: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name in list(rows) if number % 2 else reversed(rows):
            samples[name].append(rows[name]())
    return {name: values[1:] for name, values in samples.items()}


def summarize(samples: dict[str, list[float]], missing: dict[str, str]) -> dict[str, Any]:
    """Images/s with its interval, and the ratio to the Pillow recipe, by row."""
    rows: dict[str, Any] = {}
    reference = [[value] for value in samples[REFERENCE]]
    for name, values in samples.items():
        if name.startswith("stage: "):
            continue
        if name in missing or not np.isfinite(values).all():
            rows[name] = {"images_per_s": None, "reason": missing.get(name, "not measured")}
            continue
        rounds = [[value] for value in values]
        interval = p50_interval(rounds)
        paired = paired_latency(rounds, reference)
        rows[name] = {
            "images_per_s": round(1000 / float(np.median(values)), 1),
            "ci95": [round(1000 / end, 1) for end in reversed(interval)] if interval else None,
            "times_as_fast": round(paired["ratio"], 2),
            "times_as_fast_ci95": [round(end, 2) for end in paired["ci95"]],
            "ms_per_image": [round(value, 3) for value in values],
        }
    return rows


def print_tables(result: dict[str, Any]) -> None:
    """For people, on stdout."""
    console = Console(width=110, highlight=False)
    table = Table(
        "way", "images/s", "95 % int.", "× Pillow", "95 % int.", title=f"{result['views']}, per core", box=None
    )
    for name, row in result["rows"].items():
        if row["images_per_s"] is None:
            table.add_row(name, "–", row["reason"], "", "")
            continue
        interval, ratio = row["ci95"], row["times_as_fast_ci95"]
        shown = (f"{row['images_per_s']:g}", f"{interval[0]:g}–{interval[1]:g}" if interval else "")
        table.add_row(name, *shown, f"{row['times_as_fast']:.2f}", f"{ratio[0]:.2f}–{ratio[1]:.2f}")
    console.print(table)
    for name, stages in result["stages_ms_per_image"].items():
        listed = ", ".join(f"{stage} {value:.2f}" for stage, value in stages.items())
        console.print(f"{name}, ms per image: {listed}; together {sum(stages.values()):.2f}", soft_wrap=True)


if __name__ == "__main__":
    main()
