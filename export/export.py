"""``midge export``: a run, or weights of elsewhere, become an artifact: the torch reference and every target."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..runtime.artifact import NAME, REFERENCE, load_artifact, write_manifest
from ..runtime.backend import predict_all
from ..runtime.errors import UserError, require
from ..runtime.files import atomic_folder, check_replaceable
from ..runtime.golden import write_golden
from ..runtime.torch_backend import TorchBackend
from .calibration import Samples, draw_samples, find_images
from .config import ExportConfig
from .delivery import Delivery, describe_graph
from .fold import fold_batch_norm
from .onnx_export import export_onnx, save_onnx
from .prepare import RANGE_STEPS, Prepared, prepare, training
from .ranges import RangeTable, check_calibration_images, check_method, is_transformer, write_calibration
from .subject import Subject, check_subject, load_subject
from .targets import select_variants
from .tensorrt_export import CHECKER, note_builds
from .writers import WRITERS, Source, check_packages, suited

TOOLS = ("torch", "timm", "onnx", "onnxscript", "onnxslim", "onnxruntime", "numpy", "pillow")
GRAPH_TARGETS = ("onnx", "openvino")  # whose variants are made from the ONNX graph as it is delivered
TARGET_TOOLS = {"openvino": ("openvino",), "coreml": ("coremltools",)}


def export_run(config: ExportConfig) -> int:
    """Export a run's classifier, or its backbone where it has none; or weights that midge did not train.

    Raises:
        UserError: a name, the network, the images or the output folder is not usable, or a package is missing.
    """
    config.check()
    check_method(config.calibration)
    variants = select_variants(config.targets, config.precision)
    name = artifact_name(config)
    check_replaceable(config.out)
    check_packages(variants)
    if config.check_build:
        require(CHECKER, "tensorrt")
    check_subject(config)
    check_forms(config, variants)
    root, evaluation_root = find_images(config.run, config.data, config.evaluation_data)
    seconds: dict[str, float] = {}
    with timed(seconds, "images"):
        subject = load_subject(config)
        spec = subject.spec
        count = config.calibration_images if any("int8" in variant for variant in variants) else 0
        train = config.qat_images if count and config.qat_epochs else 0
        samples = draw_samples(root, evaluation_root, spec.preprocess, count, config.seed, config.workers, train)
    with atomic_folder(config.out) as folder:
        written, int8, table = write_variants(folder, (REFERENCE, *variants), config, subject, samples, seconds)
        models = {variant: f"{variant}/{WRITERS[variant].model}" for variant in written}
        with timed(seconds, "golden"):
            outputs = write_golden_pack(folder, folder / models[REFERENCE], samples)
        if count:
            tools, trained = tool_versions(variants), int8.trained if int8 else None
            write_calibration(
                folder, samples, table, config.calibration, config.seed, tools, config.float_layers, trained
            )
        builds = note_builds(folder, variants) if config.check_build else True
        write_manifest(
            folder,
            name=name,
            kind=subject.kind,
            input_shape=(1, *spec.preprocess.input_shape),
            outputs={name: (1, *output.shape[1:]) for name, output in zip(subject.outputs, outputs, strict=True)},
            preprocess=spec.preprocess,
            labels=spec.labels,
            models=models,
            notes={variant: WRITERS[variant].note for variant in models},
            origin=describe_origin(subject, samples),
            tools=tool_versions(variants),
            dynamic_batch=[name for name in variants if config.dynamic_batch and name.startswith(GRAPH_TARGETS)],
        )
    print_result(config, samples, seconds)
    return int(not builds)


def artifact_name(config: ExportConfig) -> str:
    """The artifact's name, which becomes part of the paths of records.

    Raises:
        UserError: it is not safe in a path.
    """
    name = config.out.resolve().name if config.name is None else config.name
    if not NAME.fullmatch(name):
        raise UserError(
            f"The name {name!r} cannot be an artifact's: it must be letters, digits, '.', '_', '-', at most 100, "
            "a letter or digit first. Give one with --name."
        )
    return name


def check_forms(config: ExportConfig, variants: Sequence[str]) -> None:
    """Refuse forms of the graph that a variant cannot have.

    Raises:
        UserError: one of the variants is not made from the graph as it is delivered.
    """
    others = [variant for variant in variants if not variant.startswith(GRAPH_TARGETS)]
    asked = {"--embed-preprocess": config.embed_preprocess, "--kind features": config.kind == "features"}
    for flag, given in asked.items():
        if others and given:
            raise UserError(f"{flag} is for {' and '.join(GRAPH_TARGETS)}, not {others[0]}: export it apart.")
    for flag, given in {"--kind features": config.kind == "features", "--dynamic-batch": config.dynamic_batch}.items():
        if config.qat_epochs and given:
            raise UserError(f"--qat-epochs trains networks of one output and a fixed batch: leave {flag} out.")


def write_variants(
    folder: Path,
    variants: Sequence[str],
    config: ExportConfig,
    subject: Subject,
    samples: Samples,
    seconds: dict[str, float],
) -> tuple[tuple[str, ...], Prepared | None, RangeTable | None]:
    """Write the variants, each into the folder of its name.

    Returns:
        Those that suit the network, what the INT8 ones are made from, and the ranges of the activations; None where no
        variant needed them.
    """
    model, spec, images = subject.model, subject.spec, samples.calibration.inputs
    if spec.preprocess.embedded:
        images = spec.preprocess.normalize(images)
    if len(images):
        check_calibration_images(images)
    with tempfile.TemporaryDirectory() as work:
        onnx_path = Path(work) / "model.onnx"
        with timed(seconds, "onnx"):
            folded = fold_batch_norm(model, spec.input_px)
            graph = export_onnx(
                folded, spec.input_px, *subject.outputs, opset=config.opset, dynamic_batch=config.dynamic_batch
            )
            save_onnx(graph, onnx_path)
        variants = suited(variants, is_transformer(graph))
        int8, table = None, None
        if any(WRITERS[variant].needs_ranges for variant in variants):
            steps = dict(RANGE_STEPS)
            if config.qat_epochs:
                sample = samples.training
                if spec.preprocess.embedded:
                    sample = dataclasses.replace(sample, inputs=spec.preprocess.normalize(sample.inputs))
                steps["training"] = training(graph, sample, config.qat_epochs, config.qat_lr, config.seed)
            with timed(seconds, "calibration"):
                int8, table = prepare(graph, images, config.calibration, config.float_layers, range_steps=steps)
        delivery = Delivery(spec.preprocess, describe_graph(subject.kind, spec))
        source = Source(model, folded, spec, graph, onnx_path, images, int8, delivery)
        for variant in variants:
            writer = WRITERS[variant]
            with timed(seconds, variant):
                writer.write(source, folder / variant / writer.model)
    return variants, int8, table


def write_golden_pack(folder: Path, model: Path, samples: Samples) -> tuple[np.ndarray, ...]:
    """Write golden.npz.

    Returns:
        The reference's outputs for the golden images, (N, …) float32 each.

    Raises:
        UserError: they are not finite.
    """
    with TorchBackend(model, threads=1) as backend:
        outputs = predict_all(backend, samples.golden.inputs)
    if not all(np.isfinite(output).all() for output in outputs):
        raise UserError(
            f"The network gives numbers that are not finite for '{samples.golden.paths[0]}': train it again."
        )
    write_golden(folder / "golden.npz", samples.golden.inputs, *outputs)
    return outputs


def describe_origin(subject: Subject, samples: Samples) -> dict[str, Any]:
    """Where an artifact comes from, for its manifest; no path of this machine and no time."""
    return {
        "midge": __version__,
        **subject.origin,
        "trained": subject.spec.trained,
        "golden_images": samples.golden.to_json(),
    }


def tool_versions(variants: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that made an artifact."""
    targets = dict.fromkeys(variant.partition("-")[0] for variant in variants)
    tools = [*TOOLS, *(tool for target in targets for tool in TARGET_TOOLS.get(target, ()))]
    return {"python": platform.python_version(), **{name: tool_version(name) for name in tools}}


def tool_version(name: str) -> str:
    """Version of a package: of the distribution of that name, or, as ONNX Runtime has several, of the module."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        try:
            return getattr(importlib.import_module(name), "__version__", "unknown")
        except ImportError:
            return "none"


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long a stage takes, in seconds."""
    start = time.monotonic()
    yield
    seconds[stage] = round(time.monotonic() - start, 3)


def print_result(config: ExportConfig, samples: Samples, seconds: dict[str, float]) -> None:
    """Print what was written, read back and checked, to stdout."""
    artifact = load_artifact(config.out)
    if config.json:
        variants = {
            variant.name: {
                "path": str(config.out / variant.model.relative_to(artifact.path.resolve())),
                "size_bytes": variant.size_bytes,
                "note": variant.note,
            }
            for variant in artifact.variants.values()
        }
        result = {
            "schema": 1,
            "artifact": str(config.out),
            "name": artifact.name,
            "kind": artifact.kind,
            "variants": variants,
            "calibration_images": len(samples.calibration),
            "excluded": samples.excluded,
            "golden_images": len(samples.golden),
            "seconds": seconds,
        }
        print(json.dumps(result))
        return
    width = max(map(len, artifact.variants))
    print(f"{'variant':<{width}}  {'size MB':>8}  model")
    for variant in artifact.variants.values():
        path = config.out / variant.model.relative_to(artifact.path.resolve())
        print(f"{variant.name:<{width}}  {variant.size_bytes / 1e6:8.2f}  {path}")
    if len(samples.calibration):
        print(
            f"INT8: calibrated on {len(samples.calibration)} images, "
            f"none of which is among the {samples.evaluation_images} evaluation images."
        )
    print("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
