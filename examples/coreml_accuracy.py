"""What Core ML's INT8 is worth: top-1 of FP32 and INT8 on the same test images, through the reference interpreter.

    python examples/coreml_accuracy.py bench/cifar10/resnet18 --calibration-data data/cifar10/train \
        --test-data data/cifar10/test --json coreml.json

takes run folders with a classifier (examples/cifar10_classifiers.py makes some), exports each as midge export does, and
runs every package on every image: on Linux through `runtime/coreml_reference.py`, which computes what the package says
and knows nothing of the Neural Engine's rounding; on macOS through Core ML. FP32 is the torch network. An image of 32
px takes a tenth of a second or so; --workers shares them out.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from midge.export.config import ExportConfig
from midge.export.export import export_run
from midge.profiles.environment import describe_device
from midge.profiles.statistics import paired_top1
from midge.runtime.artifact import load_artifact
from midge.runtime.backend import BackendOptions, open_backend, predict
from midge.runtime.coreml_backend import NATIVE
from midge.runtime.files import write_json
from midge.runtime.images import list_images
from midge.runtime.parity import compare_outputs
from midge.runtime.progress import track
from midge.runtime.proportions import accuracy_json

REFERENCE = "torch-fp32"
PART = 50  # images that a process takes at a time


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with a classifier")
    parser.add_argument("--calibration-data", type=Path, required=True)
    parser.add_argument("--test-data", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="so many test images, drawn by seed 0")
    parser.add_argument("--precision", nargs="+", default=["int8"], help="fp16, int8 or both")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for run in given.runs:
            results += measure_run(run, given, Path(folder) / run.name)
            if given.json:
                write_json(given.json, {"schema": 1, "device": describe_device(), "results": results})
    print_table(results)


def measure_run(run: Path, given: argparse.Namespace, out: Path) -> list[dict[str, Any]]:
    """One result for each precision of a network, after FP32's."""
    exported = ExportConfig(
        run,
        out=out,
        targets=("coreml",),
        precision=tuple(given.precision),
        data=given.calibration_data,
        evaluation_data=given.test_data,
        workers=1,
    )
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the table's
        export_run(exported)
    artifact = load_artifact(out)
    images = list_images(given.test_data, given.limit)
    if images.labels is None or tuple(images.classes) != artifact.labels:
        raise SystemExit(f"The classes of {given.test_data} are not those of {run}: {', '.join(artifact.labels)}.")
    shown = (artifact.preprocess(images.load(index)) for index in track(range(len(images)), f"{run.name}: {REFERENCE}"))
    with open_backend(artifact.variants[REFERENCE]) as backend:
        reference = predict(backend, shown)
    results = []
    for variant in (REFERENCE, *(name for name in artifact.variants if name != REFERENCE)):
        packaged = variant != REFERENCE
        outputs = infer(out, variant, given.test_data, given.limit, given.workers) if packaged else reference
        classes = outputs.argmax(axis=1)
        found: dict[str, Any] = {"network": run.name, "variant": variant, "native": NATIVE}
        found["parity"] = compare_outputs(outputs, reference).to_json()
        found["accuracy"] = accuracy_json(int((classes == images.labels).sum()), len(images))
        found["vs_fp32"] = paired_top1(images.labels, classes, reference.argmax(axis=1))
        results.append(found)
    return results


def infer(artifact: Path, variant: str, data: Path, limit: int | None, workers: int) -> np.ndarray:
    """Logits (N, K) of all images, shared out to processes."""
    number = len(list_images(data, limit))
    parts = [
        (artifact, variant, data, limit, range(start, min(start + PART, number))) for start in range(0, number, PART)
    ]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        outputs = pool.imap(infer_part, parts)
        return np.concatenate(list(track(outputs, f"{artifact.name}: {variant}, {PART} images a step", len(parts))))


def infer_part(part: tuple[Path, str, Path, int | None, Sequence[int]]) -> np.ndarray:
    """Logits of some images, one at a time."""
    folder, variant, data, limit, indices = part
    artifact, images = load_artifact(folder), list_images(data, limit)
    with open_backend(artifact.variants[variant], BackendOptions(threads=1)) as backend:
        return predict(backend, (artifact.preprocess(images.load(index)) for index in indices))


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the results to stdout."""
    table = Table("network", "variant", "images", "top-1 %", "drop, points", "95 %", "agree %", "cosine", "min")
    for result in results:
        parity, accuracy, versus = result["parity"], result["accuracy"], result["vs_fp32"]
        table.add_row(
            result["network"],
            result["variant"],
            str(accuracy["n"]),
            f"{100 * accuracy['top1']:.2f}",
            f"{versus['top1_drop_points']:+.2f}",
            f"{versus['ci95'][0]:+.2f} … {versus['ci95'][1]:+.2f}",
            f"{100 * parity['top1_agreement']:.2f}",
            f"{parity['cosine_mean']:.5f}",
            f"{parity['cosine_min']:.4f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
