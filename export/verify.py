"""``midge verify``: every variant of an artifact against its torch reference, on whatever runtimes this machine has.

It needs neither torch nor onnx: the golden pack holds the reference's outputs. Only ``--data`` runs the reference live,
and ``--drift`` reads graphs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifact import REFERENCE, RUNTIMES, Artifact, load_artifact, variant_runtime
from ..runtime.backend import (
    DEFAULTS,
    Backend,
    BackendOptions,
    Placement,
    missing_packages,
    open_backend,
    why_not_on_this_machine,
)
from ..runtime.errors import UserError, unknown_name
from ..runtime.golden import load_golden
from ..runtime.images import list_images
from ..runtime.parity import Parity, compare_outputs
from ..runtime.progress import say, track
from .calibration import read_images
from .config import VerifyConfig

# Smallest mean cosine in INT8: of a classifier's logits, and of features by whether the network is a transformer.
INT8_MIN_COSINE = {"classifier": 0.95}
FEATURES_MIN_COSINE = {False: 0.995, True: 0.99}


@dataclass(frozen=True)
class Check:
    """A variant's outputs compared with the reference's for some images.

    Attributes:
        variant: its name.
        images: ``"golden"`` or ``"data"``.
        parity: how they agree.
        int8_mac_share: part of the variant's multiply-accumulates that ran in 8-bit integers, 0..1; None if unknown.
        missed: the thresholds that were missed, one phrase each.
    """

    variant: str
    images: str
    parity: Parity
    int8_mac_share: float | None
    missed: tuple[str, ...]


def verify(config: VerifyConfig) -> int:
    """Compare the variants of an artifact. Returns 1 where one misses a threshold, else 0.

    Raises:
        UserError: the artifact is damaged, or no variant can run here.
    """
    config.check()
    artifact = load_artifact(config.artifact)
    golden = load_golden(artifact.golden, artifact.input_shape, artifact.output_shape)
    if artifact.input_shape[0] != 1:
        raise UserError(f"The artifact takes {artifact.input_shape[0]} images at a time: only 1 can be verified.")
    if config.drift is not None:
        return show_drift(config, artifact, config.drift, golden.inputs)
    names, skipped = runnable(artifact, config.variants)
    for name, reason in skipped.items():
        say(f"Skipped {name}: {reason}.")
    if not names:
        raise UserError(f"No variant of '{config.artifact}' can run here: {'; '.join(skipped.values())}.")
    with contextlib.ExitStack() as stack:
        options = BackendOptions(device=config.device, cache=config.cache)
        backends = {name: stack.enter_context(open_checked(artifact, name, options)) for name in names}
        placements = {name: backend.placement() for name, backend in backends.items()}
        outputs = run_all(backends, artifact, track(golden.inputs, "Golden images"))
        compared = {(name, "golden"): compare_outputs(outputs[name], golden.outputs) for name in names}
        if config.data is not None and can_run_reference(artifact):
            if REFERENCE not in backends:
                backends[REFERENCE] = stack.enter_context(open_checked(artifact, REFERENCE))
            outputs = run_all(backends, artifact, read_inputs(config, config.data, artifact))
            compared |= {
                (name, "data"): compare_outputs(outputs[name], outputs[REFERENCE])
                for name in names
                if name != REFERENCE
            }
    checks = [
        Check(
            name,
            images,
            parity,
            placements[name].share,
            missed_thresholds(config, artifact.kind, name, parity, is_transformer(placements.values())),
        )
        for (name, images), parity in compared.items()
    ]
    if config.json:
        print(json.dumps(result_json(artifact, checks, skipped)))
    else:
        print_checks(artifact, checks)
    return int(any(check.missed for check in checks))


def runnable(artifact: Artifact, chosen: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The chosen variants, all by default, that can run here; and the others, each with the reason.

    Raises:
        UserError: the artifact has no such variant.
    """
    chosen = tuple(chosen) or tuple(artifact.variants)
    skipped = {}
    for name in chosen:
        if name not in artifact.variants:
            raise unknown_name("variant", name, artifact.variants)
        if name.partition("-")[0] not in RUNTIMES:
            skipped[name] = "this midge knows no runtime for it"
        elif missing := missing_packages(variant_runtime(name)):
            skipped[name] = f"{', '.join(missing)} is not installed"
        elif reason := why_not_on_this_machine(variant_runtime(name)):
            skipped[name] = reason
    return [name for name in dict.fromkeys(chosen) if name not in skipped], skipped


def show_drift(config: VerifyConfig, artifact: Artifact, variant: str, images: np.ndarray) -> int:
    """Print where a variant's error starts. Returns 0."""
    from .drift import drift_json, measure_drift, print_drift

    drifts = measure_drift(artifact, variant, images)
    if config.json:
        print(json.dumps(drift_json(artifact, variant, drifts, len(images))))
    else:
        print_drift(artifact, variant, drifts, len(images))
    return 0


def can_run_reference(artifact: Artifact) -> bool:
    """Whether the reference can run here; if not, why is said."""
    reason = ""
    if REFERENCE not in artifact.variants:
        reason = f"the artifact has no {REFERENCE}"
    elif missing := missing_packages("torch"):
        reason = f"{', '.join(missing)} is not installed"
    if reason:
        say(f"The images of --data are not looked at: {reason}, so there is no reference for them.")
    return not reason


def open_checked(artifact: Artifact, name: str, options: BackendOptions = DEFAULTS) -> Backend:
    """Load a variant.

    Raises:
        UserError: its runtime refuses it, or its input is not the one of the manifest.
    """
    backend = open_backend(artifact.variants[name], options)
    if backend.input_shape != artifact.input_shape:
        backend.close()
        raise UserError(
            f"The variant {name} takes {backend.input_shape}, the manifest says {artifact.input_shape}: "
            "export the artifact again."
        )
    return backend


def read_inputs(config: VerifyConfig, data: Path, artifact: Artifact) -> Iterable[np.ndarray]:
    """Preprocessed images (3, H, W) float32 of a folder, read while they are used."""
    images = list_images(data, config.limit, config.seed)
    read = read_images(images, range(len(images)), artifact.preprocess, config.workers)
    return (image.input for image in track(read, "Images of --data", len(images)))


def run_all(backends: dict[str, Backend], artifact: Artifact, images: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs (N, K) float32 of every backend for images (3, H, W) float32.

    Raises:
        UserError: a runtime fails, or gives outputs of another shape than the manifest says.
    """
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in backends}
    for image in images:
        for name, backend in backends.items():
            try:
                output = backend.run(image[None])
            except Exception as error:  # each runtime has its own kinds; the model may be hostile
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise UserError(f"The variant {name} cannot run ({reason}): export the artifact again.") from None
            if output.shape != artifact.output_shape or output.dtype != np.float32:
                raise UserError(
                    f"The variant {name} gives {output.shape} {output.dtype}, the manifest says "
                    f"{artifact.output_shape} float32: export the artifact again."
                )
            outputs[name].append(output[0])
    return {name: np.stack(rows) for name, rows in outputs.items()}


def is_transformer(placements: Iterable[Placement]) -> bool:
    """Whether one of the runtimes ran attention or the normalization that goes with it, by its own names."""
    operators = {op.lower().replace("_", "") for placement in placements for op in placement.ops}
    return any(part in op for op in operators for part in ("softmax", "layernorm", "attention", "mvn"))


def missed_thresholds(
    config: VerifyConfig, kind: str, variant: str, parity: Parity, transformer: bool = False
) -> tuple[str, ...]:
    """The thresholds that a variant misses.

    The cosine is the smallest of all images in FP32 and FP16, where each must be right, and the mean in INT8. The
    agreement counts for classifiers: features have no top-1.
    """
    missed = []
    precision = {"int8", "fp16"}.intersection(variant.split("-"))
    if "int8" in precision:
        min_agreement, min_cosine = config.int8_min_agreement, config.int8_min_cosine
        if min_cosine is None:
            min_cosine = INT8_MIN_COSINE.get(kind, FEATURES_MIN_COSINE[transformer])
        if parity.cosine_mean < min_cosine:
            missed.append(f"mean cosine {parity.cosine_mean:.4f} is below {min_cosine:g}")
    else:
        min_agreement, min_cosine = config.min_agreement, config.min_cosine
        if "fp16" in precision:
            min_agreement, min_cosine = config.fp16_min_agreement, config.fp16_min_cosine
        if parity.cosine_min < min_cosine:
            missed.append(f"smallest cosine {parity.cosine_min:.6f} is below {min_cosine:g}")
    if kind == "classifier" and parity.top1_agreement < min_agreement:
        missed.append(f"top-1 agreement {parity.top1_agreement:.4f} is below {min_agreement:g}")
    return tuple(missed)


def result_json(artifact: Artifact, checks: list[Check], skipped: dict[str, str]) -> dict[str, Any]:
    """The JSON document of ``--json``."""
    variants: dict[str, Any] = {}
    for check in checks:
        entry = variants.setdefault(check.variant, {"int8_mac_share": check.int8_mac_share, "missed": []})
        entry[check.images] = check.parity.to_json()
        entry["missed"] += [f"{check.images}: {missed}" for missed in check.missed]
    return {
        "schema": 1,
        "artifact": artifact.name,
        "ok": not any(check.missed for check in checks),
        "variants": variants,
        "skipped": skipped,
    }


def print_checks(artifact: Artifact, checks: list[Check]) -> None:
    """Print a table to stdout. Every name in it has passed the checks of the manifest: no control character is left."""
    width = max(len("variant"), *(len(check.variant) for check in checks))
    print(f"{artifact.name} ({artifact.kind}) against {REFERENCE}")
    print(f"{'variant':<{width}}  images  cos mean    cos min   max error  top-1 same %      n  INT8 MACs %  ok")
    for check in checks:
        parity = check.parity
        error = "not finite" if parity.max_abs_error is None else f"{parity.max_abs_error:.2e}"
        agreement = f"{100 * parity.top1_agreement:.2f}" if artifact.kind == "classifier" else "-"
        share = "unknown" if check.int8_mac_share is None else f"{100 * check.int8_mac_share:.1f}"
        cosines = f"{parity.cosine_mean:.6f}  {parity.cosine_min:9.6f}"
        print(
            f"{check.variant:<{width}}  {check.images:<6}  {cosines}  {error:>10}  {agreement:>12}  {parity.n:>5}  "
            f"{share:>11}  {'no' if check.missed else 'yes'}"
        )
    for check in checks:
        for missed in check.missed:
            print(f"{check.variant}, {check.images}: {missed}")
