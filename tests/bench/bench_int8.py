"""INT8 against FP32 and against others' defaults: python tests/bench/bench_int8.py --data PHOTOS [--networks NAME …]

For each network: FP32, our INT8 (`u8`, `s8`, for a ViT `dynamic`; in OpenVINO what `openvino-int8` is written from too,
of a ViT `s8`), ONNX Runtime's `quantize_static` and NNCF's `quantize`, both with their defaults, all calibrated on the
same photos. Each file that ONNX Runtime or OpenVINO takes runs on one thread in this process. The networks of one
runtime take turns, in rounds of alternating order; a sample is the CPU time of one inference, so that other load on the
machine counts less than on the clock. The ratio to FP32 is the geometric mean over rounds of the ratio of the medians,
with its 95 % interval. Beside it stands the cosine to FP32 on photos that were not calibrated on, and, where run
folders with classifiers are given and the photos' folders are their classes, the top-1. Without a run folder weights
are random: their cosine is no accuracy. ONNX Runtime runs as midge runs it: without VNNI, every file has its weights
made unsigned, that of others too. The last line on stdout is the JSON; nothing fails because of time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from midge.export.calibration import draw_samples
from midge.export.fold import fold_batch_norm
from midge.export.onnx_export import INPUT, export_onnx, save_onnx
from midge.export.prepare import prepare
from midge.export.quantize import quantize_dynamic
from midge.export.ranges import is_transformer
from midge.profiles.environment import describe_device
from midge.profiles.statistics import MIN_ROUNDS, paired_latency
from midge.runtime.backend import Backend, predict
from midge.runtime.errors import UserError
from midge.runtime.files import write_json
from midge.runtime.images import list_images
from midge.runtime.openvino_backend import OpenVinoBackend
from midge.runtime.ort_backend import OrtBackend
from midge.runtime.parity import compare_outputs
from midge.runtime.preprocess import Preprocess
from midge.runtime.progress import say
from midge.runtime.torch_model import ModelSpec, build_model, load_model

NETWORKS = ("mobilenetv2_100", "resnet18", "resnet34", "vit_tiny_patch16_224")
BACKENDS = {"onnxruntime": OrtBackend, "openvino": OpenVinoBackend}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="photos; they are parted by a seed")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="names of timm, random weights")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="run folders with classifiers")
    parser.add_argument("--image-px", type=int, default=224, help="of the networks with random weights")
    parser.add_argument("--calibration-images", type=int, default=32)
    parser.add_argument("--test-images", type=int, default=64)
    parser.add_argument("--runtimes", nargs="*", choices=BACKENDS, default=list(BACKENDS), help="default both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inferences", type=int, default=12, help="per network and round")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    given = parser.parse_args()
    if given.rounds < MIN_ROUNDS:
        parser.error(f"--rounds is {given.rounds}: an interval needs at least {MIN_ROUNDS}")
    torch.set_num_threads(1)
    load_before = os.getloadavg()[0]
    networks: list[dict[str, Any]] = []
    for model, spec in networks_of(given):
        say(f"{spec.timm_name} at {spec.input_px} px")
        networks.append(measure(model, spec, given))
    result = {
        "schema": 1,
        "device": describe_device(),
        "versions": {"onnxruntime": onnxruntime.__version__},
        "clock": "CPU time of the process, one thread",
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "networks": networks,
    }
    print_table(networks)
    if given.out:
        write_json(given.out, result)
    print(json.dumps(result))


def networks_of(given: argparse.Namespace) -> Iterator[tuple[Any, ModelSpec]]:
    """The networks with their weights, in eval mode."""
    for run in given.runs:
        yield load_model(run, "classifier")
    for name in given.networks:
        torch.manual_seed(0)
        side = given.image_px
        arguments: dict[str, Any] = {}
        if name.startswith("vit_"):
            arguments = {"img_size": side, **({"patch_size": 8} if side < 64 else {})}
        width = {"mobilenetv2_100": 1280, "vit_tiny_patch16_224": 192}.get(name, 512)
        spec = ModelSpec(name, arguments, 1000, width, (), Preprocess(side, side), side)
        yield build_model(spec), spec


def measure(model: Any, spec: ModelSpec, given: argparse.Namespace) -> dict[str, Any]:
    """All files of one network in all runtimes."""
    photos = draw_samples(given.data, None, spec.preprocess, given.calibration_images, seed=0, workers=1).calibration
    images = list_images(given.data)
    order = np.random.default_rng(0).permutation(len(images))
    picked = [index for index in order if images.paths[index] not in set(photos.paths)][: given.test_images]
    inputs = np.stack([spec.preprocess(images.load(int(index))) for index in picked])
    labels = images.labels[picked] if images.labels is not None and tuple(images.classes) == spec.labels else None
    runtimes = {}
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(model, spec, photos.inputs, Path(temporary), given.runtimes)
        for runtime, paths in files.items():
            backends, refused = open_all(runtime, paths)
            samples = take_turns(backends, inputs, given.rounds, given.inferences)
            outputs = {name: predict(backend, inputs) for name, backend in backends.items()}
            for backend in backends.values():
                backend.close()
            judged = {name: judge(name, samples, outputs, labels) for name in backends}
            runtimes[runtime] = {"forms": judged, "refused": refused}
    facts = {"network": spec.timm_name, "input_px": spec.input_px, "trained": spec.trained or None}
    return {**facts, "photos": len(inputs), "calibration_images": len(photos), "runtimes": runtimes}


def open_all(runtime: str, paths: dict[str, Path]) -> tuple[dict[str, Backend], dict[str, str]]:
    """The files that a runtime takes, by name, and why it does not take the others."""
    backends: dict[str, Backend] = {}
    refused = {}
    for name, path in paths.items():
        try:
            backend = BACKENDS[runtime](path, 1)
            backend.run(np.zeros(backend.input_shape, np.float32))  # what loads may still not run: NNCF's MobileNetV2
        except UserError as error:
            refused[name] = str(error).replace(str(path), path.name)
            say(f"{name}: {refused[name]}")
        else:
            backends[name] = backend
    return backends, refused


def write_files(
    model: Any, spec: ModelSpec, photos: np.ndarray, folder: Path, runtimes: Sequence[str]
) -> dict[str, dict[str, Path]]:
    """Runtime -> name of a form -> its file. FP32 is the first of each. NNCF's only where it is for OpenVINO too."""
    graph = export_onnx(fold_batch_norm(model, spec.input_px), spec.input_px, "logits")
    transformer = is_transformer(graph)
    prepared, _ = prepare(graph, photos, "mse")
    both = {"fp32": folder / "fp32.onnx"}
    save_onnx(graph, both["fp32"])
    for name in ("u8", "s8"):
        both[name] = folder / f"{name}.onnx"
        save_onnx(prepared.quantize(f"onnx-int8-{name}"), both[name])
    both["quantize_static defaults"] = folder / "static.onnx"
    quantize_static(both["fp32"], both["quantize_static defaults"], photos)
    files = {runtime: dict(both) for runtime in runtimes}
    if "openvino" in files:
        if not transformer:
            files["openvino"]["openvino"] = folder / "openvino.onnx"
            save_onnx(prepared.quantize_for_openvino(), files["openvino"]["openvino"])
        by_nncf = {"onnxruntime": folder / "nncf.onnx", "openvino": folder / "nncf" / "model.xml"}
        quantize_nncf(both["fp32"], by_nncf["onnxruntime"], by_nncf["openvino"], photos)
        for runtime in runtimes:
            files[runtime]["NNCF defaults"] = by_nncf[runtime]
    if transformer and "onnxruntime" in files:
        files["onnxruntime"]["dynamic"] = folder / "dynamic.onnx"
        save_onnx(quantize_dynamic(prepared.original or graph), files["onnxruntime"]["dynamic"])
    return files


class Photos:
    """Photos as ``quantize_static`` asks for them."""

    def __init__(self, photos: np.ndarray) -> None:
        self._photos = iter(photos)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one, or None after the last."""
        photo = next(self._photos, None)
        return None if photo is None else {INPUT: photo[None]}


def quantize_static(path: Path, quantized: Path, photos: np.ndarray) -> None:
    """ONNX Runtime's static quantization as it comes."""
    from onnxruntime.quantization import quantize_static as by_ort

    logging.getLogger().setLevel(logging.ERROR)  # it advises a preprocessing that changes nothing here
    by_ort(path, quantized, Photos(photos))  # type: ignore[arg-type] - it need not be of its class


def quantize_nncf(path: Path, onnx_path: Path, openvino_path: Path, photos: np.ndarray) -> None:
    """NNCF's quantization as it comes, of the ONNX graph and of OpenVINO's."""
    os.environ.setdefault("NNCF_CI", "1")  # else it reports its use to its makers
    import nncf
    import onnx
    import openvino

    nncf.set_log_level(logging.ERROR)
    quantized = nncf.quantize(
        onnx.load(path), nncf.Dataset([{INPUT: photo[None]} for photo in photos]), subset_size=len(photos)
    )
    save_onnx(quantized, onnx_path)
    model = openvino.Core().read_model(path)
    openvino_path.parent.mkdir()
    quantized = nncf.quantize(model, nncf.Dataset([photo[None] for photo in photos]), subset_size=len(photos))
    openvino.save_model(quantized, openvino_path, compress_to_fp16=False)


def take_turns(
    backends: dict[str, Backend], inputs: np.ndarray, rounds: int, inferences: int
) -> dict[str, list[list[float]]]:
    """Rounds of CPU times, ms, by name; before them a round that does not count."""
    samples: dict[str, list[list[float]]] = {name: [] for name in backends}
    for number in range(rounds + 1):
        for name in list(backends) if number % 2 else reversed(backends):
            times = []
            for image in inputs[np.arange(inferences) % len(inputs)]:
                start = time.process_time()
                backends[name].run(image[None])
                times.append(1000 * (time.process_time() - start))
            if number:
                samples[name].append(times)
    return samples


def judge(
    name: str, samples: dict[str, list[list[float]]], outputs: dict[str, np.ndarray], labels: np.ndarray | None
) -> dict[str, Any]:
    """Speed and accuracy of one form beside FP32's."""
    found: dict[str, Any] = {
        "p50_ms": float(np.median(np.concatenate(samples[name]))),
        "min_ms": float(np.min(np.concatenate(samples[name]))),
        "speedup": None if name == "fp32" else paired_latency(samples[name], samples["fp32"]),
        "parity": compare_outputs(outputs[name], outputs["fp32"]).to_json(),
    }
    if labels is not None:
        found["top1"] = float((outputs[name].argmax(axis=1) == labels).mean())
    return found


def print_table(networks: list[dict[str, Any]]) -> None:
    """Print the results to stdout."""
    table = Table("network", "runtime", "form", "p50 ms", "x FP32", "95 %", "cosine", "min", "top-1 %")
    for network in networks:
        for runtime, judged in network["runtimes"].items():
            for name, form in judged["forms"].items():
                speedup, parity = form["speedup"], form["parity"]
                table.add_row(
                    *(f"{network['network']} {network['input_px']} px", runtime, name, f"{form['p50_ms']:.2f}"),
                    f"{speedup['ratio']:.2f}" if speedup else "",
                    f"{speedup['ci95'][0]:.2f} … {speedup['ci95'][1]:.2f}" if speedup else "",
                    f"{parity['cosine_mean']:.5f}",
                    f"{parity['cosine_min']:.4f}",
                    f"{100 * form['top1']:.1f}" if "top1" in form else "",
                )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
