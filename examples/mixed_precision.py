r"""What layers in float buy: accuracy and speed of ever more of them, on photos that were not calibrated on.

    python examples/mixed_precision.py lite0 --data photos/train --test photos/test --out mixed.json

takes an artifact of ``midge export`` with a classifier in FP32 and INT8, and the folder that it was calibrated on. The
sets of layers are those among which ``midge quantize --budget`` chooses; each is calibrated, rounded and corrected like
a release, and judged through ONNX Runtime on one thread against FP32: the share of photos with the same class, of all
and of those that FP32 is sure of (a probability of at least a half), and the CPU time of one inference, all networks by
turns, with the 95 % interval of the ratio to FP32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from midge.export.config import QuantizeConfig
from midge.export.mixed_precision import float_price, macs_of, measure_roundings, order_float_layers
from midge.export.onnx_export import save_onnx
from midge.export.prepare import prepare
from midge.export.ranges import FILE, WEIGHTED
from midge.export.requantize import read_float_graph, read_method, read_stored_images
from midge.profiles.environment import describe_device
from midge.profiles.statistics import paired_latency
from midge.runtime.artifact import load_artifact
from midge.runtime.backend import Backend
from midge.runtime.fields import Fields
from midge.runtime.files import read_json, write_json
from midge.runtime.images import list_images
from midge.runtime.ort_backend import OrtBackend
from midge.runtime.parity import compare_outputs
from midge.runtime.progress import say, track

ROUNDS, INFERENCES = 5, 12
VARIANT = "onnx-int8-u8"


def time_by_turns(backends: list[Backend], image: np.ndarray) -> list[list[list[float]]]:
    """CPU times in ms, by network and round; the round before them does not count."""
    samples: list[list[list[float]]] = [[] for _ in backends]
    for number in range(ROUNDS + 1):
        for place in range(len(backends)) if number % 2 else reversed(range(len(backends))):
            times = []
            for _ in range(INFERENCES):
                start = time.process_time()
                backends[place].run(image)
                times.append(1000 * (time.process_time() - start))
            if number:
                samples[place].append(times)
    return samples


def judge(outputs: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """How near logits (N, K) are to FP32's."""
    same = outputs.argmax(axis=1) == reference.argmax(axis=1)
    exponents = np.exp(reference - reference.max(axis=1, keepdims=True))
    sure = exponents.max(axis=1) / exponents.sum(axis=1) >= 0.5
    second, first = np.sort(reference, axis=1)[:, -2:].T
    return {
        "same_class": same.mean().item(),
        "close_photos": int((first - second < 0.1).sum()),
        "sure_photos": int(sure.sum()),
        "same_class_of_sure": same[sure].mean().item() if sure.any() else None,
        "cosine_mean": compare_outputs(outputs, reference).cosine_mean,
        "relative_error": float(np.square(outputs - reference).sum() / np.square(reference).sum()),
    }


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="the folder that it was calibrated on")
    parser.add_argument("--test", type=Path, required=True, help="photos to judge by")
    parser.add_argument("--limit", type=int, default=None, help="so many of them")
    parser.add_argument("--measured", type=int, default=64, help="calibration images on which roundings are measured")
    parser.add_argument(
        "--most", type=float, default=0.5, help="share of the multiply-accumulates that may be in float"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    artifact = load_artifact(given.artifact)
    graph = read_float_graph(artifact)
    stored = Fields(read_json(artifact.path / FILE, "calibration"), "calibration")
    method, table = read_method(stored, None)
    inputs = read_stored_images(stored, QuantizeConfig(artifact.path, data=given.data), artifact).calibration.inputs
    plain, table = prepare(graph, inputs, method, stored=table, range_steps={})
    roundings = measure_roundings(plain, inputs[: given.measured])
    macs, weighted = macs_of(graph), {node.name for node in graph.graph.node if node.op_type in WEIGHTED}
    sets = order_float_layers(graph, roundings)
    shares = {names: sum(macs[name] for name in names) / sum(macs.values()) for names in sets}
    sets = [names for names in sets if shares[names] <= given.most]
    with tempfile.TemporaryDirectory() as folder:
        paths = [artifact.variants["onnx-fp32"].model]
        for number, names in enumerate(sets):
            say(f"{len({*names} & weighted)} of {len(weighted)} layers in float")
            paths.append(Path(folder) / f"{number}.onnx")
            save_onnx(prepare(graph, inputs, method, names, table)[0].quantize(VARIANT), paths[-1])
        backends: list[Backend] = [OrtBackend(path, 1) for path in paths]
        photos = list_images(given.test, given.limit)
        rows: list[list[np.ndarray]] = [[] for _ in backends]
        for index in track(range(len(photos)), "Photos"):
            image = artifact.preprocess(photos.load(index))[None]
            for place, backend in enumerate(backends):
                rows[place].append(backend.run(image)[0])
        samples = time_by_turns(backends, inputs[:1])
        reference, *others = map(np.stack, rows)
        found = []
        for place, (names, outputs) in enumerate(zip(sets, others, strict=True)):
            found.append(
                {
                    "float_layers": names,
                    "weighted_float_layers": len({*names} & weighted),
                    "integer_macs": 1 - shares[names],
                    "price": float_price(roundings, macs, frozenset(names)),
                    "predicted_error": sum(each.noise for each in roundings if not each.layers <= {*names}),
                    "p50_ms": float(np.median(np.concatenate(samples[place + 1]))),
                    "speedup": paired_latency(samples[place + 1], samples[0]),
                    **judge(outputs, reference),
                }
            )
    result = {"schema": 1, "device": describe_device(), "photos": len(photos), "calibration_images": len(inputs)}
    write_json(given.out, {**result, "fp32_p50_ms": float(np.median(np.concatenate(samples[0]))), "sets": found})
    printed = Table(
        "layers in float", "INT8 MACs %", "same class %", "of the sure", "cosine", "p50 ms", "x FP32", "95 %"
    )
    for each in found:
        low, high = each["speedup"]["ci95"]
        printed.add_row(
            str(each["weighted_float_layers"]),
            *(f"{100 * each['integer_macs']:.1f}", f"{100 * each['same_class']:.2f}"),
            *(f"{100 * (each['same_class_of_sure'] or 0):.2f}", f"{each['cosine_mean']:.5f}", f"{each['p50_ms']:.2f}"),
            *(f"{each['speedup']['ratio']:.2f}", f"{low:.2f} … {high:.2f}"),
        )
    Console(width=120).print(printed)


if __name__ == "__main__":
    main()
