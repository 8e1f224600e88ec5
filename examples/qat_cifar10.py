"""What training for INT8 without labels is worth: top-1 of FP32, INT8, and INT8 after it, on CIFAR-10's test images.

    python examples/qat_cifar10.py --runs bench/cifar10/resnet18 --data data/cifar10 --out bench/qat.json

takes run folders as `examples/cifar10_classifiers.py` writes them. Calibrated and trained on images of train/, whose
labels are not looked at; judged on test/ through ONNX Runtime and OpenVINO: each dialect in both, and in OpenVINO what
openvino-int8 is written from. Differences to FP32 are given in points with a paired 95 % interval, from the images that
only one of the two gets right.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from midge.export.calibration import draw_samples
from midge.export.fold import fold_batch_norm
from midge.export.onnx_export import export_onnx, save_onnx
from midge.export.prepare import RANGE_STEPS, prepare, training
from midge.export.qat import QatConfig
from midge.export.quantize import DIALECTS
from midge.runtime.backend import predict
from midge.runtime.files import write_json
from midge.runtime.images import ImageList, list_images
from midge.runtime.openvino_backend import OpenVinoBackend
from midge.runtime.ort_backend import OrtBackend
from midge.runtime.preprocess import Preprocess
from midge.runtime.progress import say
from midge.runtime.proportions import Z_95
from midge.runtime.torch_model import load_model

RUNTIMES = {"onnxruntime": OrtBackend, "openvino": OpenVinoBackend}
CALIBRATION_IMAGES = 512


def judge(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy of logits (N, K), and how near they are to FP32's."""
    right, right_before = logits.argmax(1) == labels, reference.argmax(1) == labels
    gained, lost, number = int((right & ~right_before).sum()), int((~right & right_before).sum()), len(labels)
    difference = (gained - lost) / number
    half = Z_95 * math.sqrt(max(0.0, (gained + lost) / number - difference**2) / number)
    cosines = (logits * reference).sum(1) / np.linalg.norm(logits, axis=1) / np.linalg.norm(reference, axis=1)
    return {
        "top1": right.mean().item(),
        "points_to_fp32": 100 * difference,
        "points_ci95": [100 * (difference - half), 100 * (difference + half)],
        "agreement": (logits.argmax(1) == reference.argmax(1)).mean().item(),
        "mean_cosine": cosines.mean().item(),
    }


def infer(runtime: str, path: Path, images: ImageList, preprocess: Preprocess) -> np.ndarray:
    """Logits (N, K) of a file."""
    with RUNTIMES[runtime](path, threads=1) as backend:
        return predict(backend, (preprocess(images.load(index)) for index in range(len(images))))


def measure(run: Path, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of one network."""
    model, spec = load_model(run, "classifier")
    tests = list_images(given.data / "test", given.limit, given.seed)
    assert tests.labels is not None
    samples = draw_samples(
        given.data / "train", given.data / "test", spec.preprocess, CALIBRATION_IMAGES, given.seed, 1, given.images
    )
    graph, path = export_onnx(fold_batch_norm(model, spec.input_px), spec.input_px, "logits"), folder / "fp32.onnx"
    save_onnx(graph, path)
    reference = infer("onnxruntime", path, tests, spec.preprocess)
    calibration = samples.calibration.inputs
    ptq, table = prepare(graph, calibration, given.calibration)
    steps = {**RANGE_STEPS, "training": training(graph, samples.training, given.epochs, given.lr, given.seed)}
    start = time.monotonic()
    qat, _ = prepare(graph, calibration, given.calibration, stored=table, range_steps=steps)
    figures: dict[str, Any] = {"test_images": len(tests), "train_seconds": round(time.monotonic() - start, 1)}
    figures["held_out_loss"] = {"before": qat.trained["loss_before"], "after": qat.trained["loss_after"]}
    figures["fp32"] = judge(reference, reference, tests.labels)
    for name in (*DIALECTS, "openvino-int8"):
        for stage, prepared in {"ptq": ptq, "qat": qat}.items():
            graph = prepared.quantize(name) if name in DIALECTS else prepared.quantize_for_openvino()
            save_onnx(graph, folder / "int8.onnx")
            for runtime in RUNTIMES if name in DIALECTS else ("openvino",):
                logits = infer(runtime, folder / "int8.onnx", tests, spec.preprocess)
                judged = figures[f"{name} {stage} {runtime}"] = judge(logits, reference, tests.labels)
                say(f"{run.name} {name} {stage} {runtime}: {judged}")
    return figures


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run folders with a classifier")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as midge data fetch cifar10 writes it")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--epochs", type=int, default=QatConfig.epochs)
    parser.add_argument("--lr", type=float, default=QatConfig.lr)
    parser.add_argument("--calibration", default="mse", help="how ranges are chosen: mse, minmax, percentile, entropy")
    parser.add_argument("--images", type=int, default=4096, help="to train on")
    parser.add_argument("--limit", type=int, default=None, help="so many test images")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {name: getattr(given, name) for name in ("calibration", "epochs", "lr", "images", "seed")}
    for run in given.runs:
        with tempfile.TemporaryDirectory() as folder:
            result[run.name] = measure(run, given, Path(folder))
        write_json(given.out, result)


if __name__ == "__main__":
    main()
