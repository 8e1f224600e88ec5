"""Realistic records of six variants in four interleaved rounds; and a real artifact, tiny, with images for it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from midge.profiles.statistics import p50_interval, paired_top1
from midge.runtime.artifact import write_manifest
from midge.runtime.golden import write_golden
from midge.runtime.preprocess import Preprocess
from midge.runtime.proportions import wilson_interval

Json = dict[str, Any]

ROUNDS, RUNS, IMAGES, CLASSES = 4, 64, 2000, 10
# variant: runtime, version, p50 in ms, images (of 2000) that FP32 gets right and this wrong, and the reverse,
# MACs in integers, MB, MiB
VARIANTS = {
    "torch-fp32": ("torch", "2.14.1", 3.12, 0, 0, 0.0, 5.2, 413.0),
    "onnx-fp32": ("onnxruntime", "1.32.0", 0.624, 0, 0, 0.0, 5.1, 92.4),
    "onnx-int8-u8": ("onnxruntime", "1.32.0", 0.391, 9, 6, 0.998, 1.4, 88.1),
    "onnx-int8-s8": ("onnxruntime", "1.32.0", 0.621, 11, 9, 0.998, 1.4, 88.3),
    "openvino-fp32": ("openvino", "2026.4.0", 0.583, 0, 0, 0.0, 5.1, 121.0),
    "openvino-int8": ("openvino", "2026.4.0", 0.331, 52, 6, 0.991, 1.5, 117.2),
}
TOTAL_MACS = 11_170_000


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def fp32_predictions() -> tuple[np.ndarray, np.ndarray]:
    """Labels and the FP32 network's predictions, both (2000,) int64; it is right in 1746."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, CLASSES, IMAGES)
    predictions = labels.copy()
    predictions[:254] = (labels[:254] + 1) % CLASSES
    return labels, predictions


def predictions_of(variant: str) -> np.ndarray:
    labels, predictions = fp32_predictions()
    lost, won = VARIANTS[variant][3:5]
    predictions[254 : 254 + lost] = (labels[254 : 254 + lost] + 2) % CLASSES
    predictions[:won] = labels[:won]
    return predictions


def latency_samples(variant: str) -> list[list[float]]:
    """Four rounds of 64 samples, ms: a drift of the machine that all variants share, and a right-skewed noise."""
    drift = (1.0, 1.12, 0.97, 1.05)
    generator = np.random.default_rng(list(variant.encode()))
    p50 = VARIANTS[variant][2]
    jitter = 1 + 0.006 * generator.standard_normal(ROUNDS)
    return [(p50 * drift[i] * jitter[i] * (1 + generator.gamma(2.0, 0.012, RUNS))).tolist() for i in range(ROUNDS)]


def latency_of(samples: Sequence[Sequence[float]]) -> Json:
    flat = np.concatenate([np.asarray(part) for part in samples])
    return {
        **{f"p{q}_ms": float(np.percentile(flat, q)) for q in (50, 90, 95, 99)},
        "mean_ms": float(flat.mean()),
        "min_ms": float(flat.min()),
        "mad_ms": float(np.median(np.abs(flat - np.median(flat)))),
        "n": int(flat.size),
        "p50_ci95": list(p50_interval(samples) or ()),
        "samples_ms": [list(part) for part in samples],
        "timer": "perf_counter_ns",
    }


def accuracy_of(variant: str) -> Json:
    labels, reference = fp32_predictions()
    correct = int((predictions_of(variant) == labels).sum())
    accuracy = {
        "top1": correct / IMAGES,
        "n": IMAGES,
        "correct": correct,
        "top1_ci95": list(wilson_interval(correct, IMAGES)),
        "data_fingerprint": sha("test images"),
        "agreement_with_reference": {
            "variant": "torch-fp32",
            "share": float((predictions_of(variant) == reference).mean()),
            "n": IMAGES,
        },
    }
    if not variant.endswith("-fp32"):
        paired = paired_top1(labels, predictions_of(variant), reference)
        accuracy["vs"] = {"variant": f"{variant.partition('-')[0]}-fp32", **paired}
    return accuracy


def record_of(variant: str, artifact: str, device: str, threads: int) -> Json:
    runtime, version, _, _, _, share, size_mb, rss = VARIANTS[variant]
    return {
        "schema": 1,
        "artifact": {"name": artifact, "manifest_sha256": sha(artifact), "kind": "classifier"},
        "variant": variant,
        "variant_sha256": sha(artifact + variant),
        "runtime": runtime,
        "runtime_version": version,
        "threads": threads,
        "device": {
            "id": device,
            "fingerprint": sha(device),
            "cpu_model": "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz",
            "isa": ["avx2", "avx512f", "avx512_vnni"],
            "kernel": "6.1.0-37-amd64",
            "governor": None,
            "cores": 2,
        },
        "protocol": {
            "name": "quick",
            "rounds": ROUNDS,
            "min_runs": 64,
            "min_s": 6.0,
            "warmup_min_runs": 10,
            "warmup_min_s": 1.0,
            "batch": 1,
            "pinned_cpus": [1],
        },
        "accuracy": accuracy_of(variant),
        "parity": {
            "cosine_min": 0.99931 if share else 0.9999998,
            "cosine_mean": 0.9998,
            "max_abs_error": 0.213 if share else 3.1e-6,
            "top1_agreement": 0.99 if share else 1.0,
            "n": 100,
        },
        "latency": latency_of(latency_samples(variant)),
        "cold_start": {"import_ms": 182.3, "load_ms": 31.2, "first_inference_ms": 1.9},
        "preprocess_ms": {"p50": 0.21},
        "memory": {"peak_rss_mib": rss},
        "size_bytes": int(size_mb * 1e6),
        "placement": {
            "int8_mac_share": share,
            "int8_macs": int(share * TOTAL_MACS),
            "total_macs": TOTAL_MACS,
            "ops": {"QLinearConv": 20, "QLinearAdd": 8, "MaxPool": 1}
            if share
            else {"Conv": 20, "Add": 8, "MaxPool": 1},
        },
        "energy": None,
        "energy_reason": "no power sensor was found",
        "valid": True,
        "invalid_reasons": [],
        "created_utc": "2026-11-24T09:12:00Z",
        "midge": "0.1.0",
        "session": sha("one run")[:16],
    }


@pytest.fixture
def make_records() -> Callable[..., list[Json]]:
    """Records by variant name (default: all six)."""

    def make(*variants: str, artifact: str = "quickstart", device: str = "xeon-8370c", threads: int = 1) -> list[Json]:
        return [record_of(variant, artifact, device, threads) for variant in variants or VARIANTS]

    return make


@pytest.fixture
def write_records() -> Callable[[Path, Sequence[Json]], Path]:
    """Lay records out in a folder as ``midge profile`` does, with the predictions beside them."""

    def write(folder: Path, records: Sequence[Json]) -> Path:
        for record in records:
            stem = f"{record['variant']}@{record['runtime']}-t{record['threads']}"
            place = folder / record["device"]["id"] / record["artifact"]["name"]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{stem}.json").write_text(json.dumps(record), encoding="utf-8")
            if record["accuracy"]["top1"] is not None and record["variant"] in VARIANTS:
                np.save(place / f"{stem}.predictions.npy", predictions_of(record["variant"]))
        return folder

    return write


PX = 16
COLOURS = ("red", "green", "blue")  # the network's order, which is not that of the folders


def write_colour_network(path: Path) -> None:
    """A convolution and a mean: the logits are the mean red, green and blue of the image, and a little noise."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.02, (3, 3, 3, 3)).astype(np.float32)
    weight[range(3), range(3), 1, 1] += 1
    nodes = [
        helper.make_node("Conv", ["image", "weight"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["maps"], ["logits"], axes=[2, 3], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, PX, PX])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.parent.mkdir(parents=True)
    path.write_bytes(model.SerializeToString())


def quantize_network(model: Path, quantized: Path, images: np.ndarray) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.items = iter([{"image": image[None]} for image in images])

        def get_next(self) -> dict[str, np.ndarray]:
            return next(self.items, {})

    quantized.parent.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quantizer uses what its own dependencies deprecate
        quantize_static(
            str(model), str(quantized), Reader(), activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
        )


def write_artifact(folder: Path, golden_error: float = 0.0, kind: str = "classifier", **options: Any) -> Path:
    """An artifact of ONNX variants, and of two for other runtimes whose files are never loaded.

    Args:
        folder: the artifact.
        golden_error: added to the first output of the golden pack.
        kind: of the artifact.
        options: in place of the manifest's fields.
    """
    import onnxruntime

    preprocess = Preprocess(PX, PX)
    write_colour_network(folder / "onnx-fp32" / "model.onnx")
    rng = np.random.default_rng(1)
    pictures = (rng.integers(0, 256, (24, 1, 1, 3)) * rng.uniform(0.5, 1, (24, PX, PX, 1))).astype(np.uint8)
    inputs = np.stack([preprocess(picture) for picture in pictures])
    quantize_network(folder / "onnx-fp32" / "model.onnx", folder / "onnx-int8-u8" / "model.onnx", inputs)
    session: Any = onnxruntime.InferenceSession(folder / "onnx-fp32" / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = np.concatenate([session.run(None, {"image": image[None]})[0] for image in inputs])
    outputs[:, 0] += golden_error
    write_golden(folder / "golden.npz", inputs, outputs)
    models = {name: f"{name}/model.onnx" for name in ("onnx-fp32", "onnx-int8-u8")}
    for name in ("torch-fp32", "openvino-fp32"):
        models[name] = f"{name}/model.bin"
        (folder / name).mkdir()
        (folder / models[name]).write_bytes(b"never loaded")
    fields: Json = {
        "name": folder.name,
        "kind": kind,
        "input_shape": (1, 3, PX, PX),
        "outputs": {"logits": (1, 3)},
        "preprocess": preprocess,
        "labels": COLOURS,
        "models": models,
        "notes": {},
        "origin": {},
        "tools": {},
    }
    write_manifest(folder, **{**fields, **options})
    return folder


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact called ``tiny``: see :func:`write_artifact`."""
    return write_artifact(tmp_path_factory.mktemp("artifacts") / "tiny")


@pytest.fixture(scope="session")
def make_artifact() -> Callable[..., Path]:
    """:func:`write_artifact`, for artifacts that differ."""
    return write_artifact


@pytest.fixture(scope="session")
def colour_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty labelled pictures, larger than the input; the network is right in most and not in all of them."""
    folder = tmp_path_factory.mktemp("images") / "colours"
    rng = np.random.default_rng(2)
    for number in range(60):
        name = COLOURS[number % 3]
        colour = rng.uniform(0, 200, 3)
        colour[number % 3] += 40
        picture = (colour * rng.uniform(0.8, 1.0, (20, 24, 1))).clip(0, 255).astype(np.uint8)
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / name / f"{number:02}.png")
    return folder
