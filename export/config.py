"""The configurations of ``midge export``, ``verify``, ``lint`` and ``quantize`` (no torch, no onnx)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from tyro.conf import Positional

from ..runtime.errors import check_ranges

# Inclusive, by field; where one is not a field of a command it does not hold for it.
RANGES: dict[str, tuple[float, float]] = {
    "calibration_images": (1, 1_000_000),
    "opset": (18, 23),
    "image_px": (1, 4096),
    "resize_px": (1, 4096),
    "qat_epochs": (0, 1000),
    "qat_images": (32, 1_000_000),
    "qat_lr": (1e-7, 10),
    "seed": (0, 2**63 - 1),
    "workers": (1, 256),
    "limit": (1, 10**9),
    "held_out": (1, 10**6),
    "budget": (0, 100),
    "min_cosine": (-1, 1),
    "min_agreement": (0, 1),
    "fp16_min_cosine": (-1, 1),
    "fp16_min_agreement": (0, 1),
    "int8_min_cosine": (-1, 1),
    "int8_min_agreement": (0, 1),
}


@dataclass(frozen=True)
class ExportConfig:
    """Export a run, or weights of elsewhere, to an artifact: the torch reference, and each target in each precision."""

    run: Positional[Path | None] = None
    """Run folder; its classifier is exported where it has one, else its backbone, which gives features. Or give
    --weights."""

    _: KW_ONLY

    out: Path
    """Artifact folder to write: manifest.json, golden.npz, calibration.json, one folder per variant."""

    targets: tuple[str, ...] = ("onnx", "openvino")
    """Runtimes to export for: onnx, openvino, tensorrt, coreml. The torch reference is always written."""

    precision: tuple[str, ...] = ("fp32", "int8")
    """Precisions: fp32, fp16, int8. INT8 for ONNX is written in dialects: u8 (CPUs), s8 (TensorRT) and, for a network
    with attention, dynamic (ONNX Runtime on CPUs)."""

    kind: str | None = None
    """What the network gives: classifier (logits), embedding (a feature vector) or features (maps of --strides);
    default a classifier where there is one, else an embedding."""

    strides: tuple[int, ...] | None = None
    """With --kind features: strides of the feature maps, px of the image per px of a map; default 8 16 32."""

    weights: Path | None = None
    """Instead of a run: a safetensors file of a plain timm state dict, with or without its classifier."""

    backbone: str | None = None
    """With --weights: timm's name of the network, e.g. resnet18."""

    head: Path | None = None
    """With --weights: a safetensors file of a linear classifier on the features: weight (K, D) and bias (K,)."""

    labels_file: Path | None = None
    """With --weights: a text file with the name of each class in a line; default their numbers, from 0."""

    image_px: int | None = None
    """With --weights: side of the input, px; default what timm's configuration of pretrained weights says, as for the
    following flags."""

    resize_px: int | None = None
    """With --weights: short side of the resized image, of which --image-px are cropped."""

    interpolation: str | None = None
    """With --weights: how images are resized: nearest, bilinear, bicubic, lanczos."""

    mean: tuple[float, float, float] | None = None
    """With --weights: mean of red, green and blue, of values in 0..1."""

    std: tuple[float, float, float] | None = None
    """With --weights: standard deviation of red, green and blue, of values in 0..1."""

    dynamic_batch: bool = False
    """ONNX and OpenVINO take any number of images at a time, instead of one."""

    embed_preprocess: bool = False
    """Put scaling and normalization into the network, which then takes (1, H, W, 3) 8-bit images, resized and cropped.
    For ONNX and OpenVINO."""

    opset: int = 18
    """Version of ONNX's operators. Earlier runtimes want an early one; below 18 torch cannot write."""

    data: Path | None = None
    """Folder of calibration images, whose labels are not looked at; default those the run was trained on."""

    evaluation_data: Path | None = None
    """Images that must not be calibrated on, known by their content; default the folder test, validation or val beside
    the calibration images, where there is one."""

    calibration_images: int = 512
    """Number of calibration images: a seeded random subset."""

    calibration: str = "mse"
    """How the ranges of activations are chosen: minmax, percentile (99.99 %; also percentile-99.9, percentile-99.999),
    mse (smallest squared error), entropy. All are stored."""

    float_layers: tuple[str, ...] = ()
    """Leave these layers in float in the INT8 variants: names as midge quantize prints them, with --sensitivity or
    --budget."""

    qat_epochs: int = 0
    """Train the network for INT8 for so many passes over --qat-images: the FP32 network teaches it, labels are not
    needed. 0 does not."""

    qat_images: int = 4096
    """Number of images for that, of the same folder; fewer where they would take above 1 GiB of memory."""

    qat_lr: float = 0.001
    """Learning rate of that: how far a step moves a weight at most, in steps of its 8-bit grid; an end of a range moves
    ten times as far."""

    name: str | None = None
    """Name of the artifact; default the name of the folder OUT."""

    seed: int = 0
    """Seed of the calibration subset and of the golden images."""

    check_build: bool = False
    """Build the TensorRT variants once by TensorRT-RTX, which needs no GPU, and note in their recipes what it said;
    exit code 1 where it refuses or warns."""

    workers: int = 2
    """Threads that decode images."""

    json: bool = False
    """Print one JSON document instead of a table."""

    def check(self) -> None:
        """Refuse values that are out of range."""
        check_ranges(self, RANGES)


@dataclass(frozen=True)
class VerifyConfig:
    """Compare every variant of an artifact with its torch reference; exit code 1 where one misses a threshold."""

    artifact: Positional[Path]
    """Artifact folder, as midge export wrote it."""

    data: Path | None = None
    """Folder of images on which the variants are also compared with the reference, run live (this needs torch)."""

    limit: int = 1000
    """Take a seeded random subset of so many of these images."""

    variants: tuple[str, ...] = ()
    """Variants to compare, e.g. onnx-fp32; default all whose runtime is installed."""

    drift: str | None = None
    """Show instead where this variant's error starts: the drift of each layer from onnx-fp32, and the biggest drops."""

    device: str | None = None
    """Device of the chosen variants, by their runtime's own name: an execution provider of ONNX Runtime, OpenVINO's
    CPU, GPU or NPU, torch's cuda, the number of TensorRT's GPU; default the CPU, and TensorRT's first GPU."""

    cache: Path | None = None
    """Folder for what OpenVINO and TensorRT compile; default none, and for TensorRT the user's cache folder."""

    min_cosine: float = 0.99999
    """Smallest cosine that the outputs of an FP32 variant may have to the reference's, -1..1, for any image."""

    min_agreement: float = 0.999
    """Smallest share of images on which an FP32 classifier names the reference's class, 0..1."""

    fp16_min_cosine: float = 0.9995
    """As --min-cosine, for an FP16 variant."""

    fp16_min_agreement: float = 0.98
    """As --min-agreement, for an FP16 variant."""

    int8_min_cosine: float | None = None
    """Smallest mean cosine that the outputs of an INT8 variant may have: single images fall far below in good ones.
    Default 0.995 for the features of a CNN, 0.99 for those of a transformer; 0.95 for logits, which top-1 judges."""

    int8_min_agreement: float = 0.85
    """As --min-agreement, for an INT8 variant."""

    seed: int = 0
    """Seed of the subset."""

    workers: int = 2
    """Threads that decode images."""

    json: bool = False
    """Print one JSON document instead of a table."""

    def check(self) -> None:
        """Refuse values that are out of range."""
        check_ranges(self, RANGES)


@dataclass(frozen=True)
class LintConfig:
    """Say whether runtimes take an ONNX file and compute it in integers, without running it; exit code 1 where not."""

    model: Positional[Path]
    """Model: an ONNX file, or an artifact folder as midge export wrote it, of which every ONNX variant is looked at."""

    targets: tuple[str, ...] = (
        *("onnxruntime", "openvino", "tensorrt8", "tensorrt10", "tensorrt11", "tensorrt-rtx", "coreml"),
    )
    """Runtimes: onnxruntime (on a CPU), openvino (on a CPU), tensorrt8, tensorrt10, tensorrt11, tensorrt-rtx, coreml.
    No INT8 file is good for all of them: name those you mean."""

    json: bool = False
    """Print one JSON document, with every node of every finding, instead of a summary."""


@dataclass(frozen=True)
class QuantizeConfig:
    """Quantize an artifact anew from its calibration.json, or show which layer costs how much, or both."""

    artifact: Positional[Path]
    """Artifact folder, as midge export wrote it, with FP32."""

    data: Path
    """Folder of the images that the artifact was calibrated on; their hashes are checked."""

    out: Path | None = None
    """Artifact folder to write; what is not INT8 is copied."""

    calibration: str | None = None
    """How ranges are chosen, as in midge export; default as the artifact's were."""

    sensitivity: bool = False
    """Quantize one layer at a time and print what it costs: SQNR, cosine and top-1 agreement with FP32."""

    budget: float | None = None
    """Leave as few layers in float as let at most so many points be lost on held-out images: images with another top-1
    than FP32 of a classifier, 100 (1 - mean cosine) of features. It is held for onnx-int8-u8; the other INT8 variants
    keep the same layers in float, and are not measured."""

    limit: int = 128
    """Calibration images on which the costs of layers, and of rounding each activation, are measured."""

    held_out: int = 1000
    """Images of --data, not calibrated on and no evaluation images, on which the budget is held; no labels needed."""

    evaluation_data: Path | None = None
    """Images that must not be looked at; default the folder test, validation or val beside --data."""

    seed: int = 0
    """Seed of the held-out images."""

    workers: int = 2
    """Threads that decode images."""

    json: bool = False
    """Print one JSON document instead of a table."""

    def check(self) -> None:
        """Refuse values that are out of range."""
        check_ranges(self, RANGES)
