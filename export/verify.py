"""``midge verify``: every variant of an artifact against its torch reference, on whatever runtimes this machine has.

It needs neither torch nor onnx: the golden pack holds the reference's outputs. Only ``--data`` runs the reference live,
and ``--drift`` reads graphs.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime import coreml_backend
from ..runtime.artifact import REFERENCE, RUNTIMES, Artifact, load_artifact, variant_runtime
from ..runtime.backend import (
    DEFAULTS,
    Backend,
    BackendOptions,
    missing_packages,
    open_backend,
    why_not_on_this_machine,
)
from ..runtime.errors import UserError, unknown_name
from ..runtime.images import list_images
from ..runtime.parity import Parity, compare_outputs
from ..runtime.progress import say, track
from .calibration import read_images
from .config import VerifyConfig
from .thresholds import missed_thresholds, ran_attention

BATCH = 3  # images at once, to check a variant that takes any number
MAX_BYTES = 1 << 30  # of outputs in memory


@dataclass(frozen=True)
class Check:
    """A variant's outputs compared with the reference's for some images.

    Attributes:
        variant: its name.
        images: ``"golden"``, ``"batch"`` (some golden images at once, where a variant takes them) or ``"data"``.
        output: its name where the network has several, else "".
        parity: how they agree.
        int8_mac_share: part of the variant's multiply-accumulates that ran in 8-bit integers, 0..1; None if unknown.
        missed: the thresholds that were missed, one phrase each.
    """

    variant: str
    images: str
    output: str
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
    golden = artifact.read_golden()
    if artifact.input_shape[0] != 1:
        raise UserError(f"The artifact takes {artifact.input_shape[0]} images at a time: only 1 can be verified.")
    if config.drift is not None:
        return show_drift(config, artifact, config.drift, golden.inputs)
    names, skipped = runnable(artifact, config.variants)
    for name, reason in skipped.items():
        say(f"Skipped {name}: {reason}.")
    if not coreml_backend.NATIVE and any(variant_runtime(name) == "coreml" for name in names):
        say("Core ML is on macOS only: its programs run in the reference interpreter, which proves what they compute.")
    if not names:
        raise UserError(f"No variant of '{config.artifact}' can run here: {'; '.join(skipped.values())}.")
    with contextlib.ExitStack() as stack:
        options = BackendOptions(device=config.device, cache=config.cache)
        backends = {name: stack.enter_context(open_checked(artifact, name, options)) for name in names}
        placements = {name: backend.placement() for name, backend in backends.items()}
        expected = (golden.outputs, *golden.more)
        outputs = run_all(backends, artifact, track(golden.inputs, "Golden images"))
        compared = {(name, "golden"): compare_all(outputs[name], expected) for name in names}
        chosen = np.arange(BATCH) % len(golden.inputs)
        for name in names:
            if artifact.variants[name].dynamic_batch:
                found = run_checked(backends[name], name, artifact, golden.inputs[chosen])
                compared[name, "batch"] = compare_all(found, tuple(array[chosen] for array in expected))
        if config.data is not None and can_run_reference(artifact):
            if REFERENCE not in backends:
                backends[REFERENCE] = stack.enter_context(open_checked(artifact, REFERENCE))
            outputs = run_all(backends, artifact, read_inputs(config, config.data, artifact, len(backends)))
            compared |= {
                (name, "data"): compare_all(outputs[name], outputs[REFERENCE]) for name in names if name != REFERENCE
            }
    checks = [
        Check(
            name,
            images,
            output,
            parity,
            placements[name].share,
            missed_thresholds(config, artifact.kind, name, parity, ran_attention(placements.values())),
        )
        for (name, images), parities in compared.items()
        for output, parity in zip(artifact.outputs if len(parities) > 1 else [""], parities, strict=True)
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
    if artifact.variants[name].dynamic_batch and not backend.dynamic_batch:
        backend.close()
        raise UserError(f"The variant {name} takes one image at a time, the manifest says any: export it again.")
    return backend


def read_inputs(config: VerifyConfig, data: Path, artifact: Artifact, backends: int) -> Iterable[np.ndarray]:
    """Preprocessed images of a folder, as the network takes them, read while they are used.

    There are no more than the outputs of all backends leave memory for.
    """
    image_bytes = backends * sum(4 * math.prod(shape) for shape in artifact.outputs.values())
    most = max(1, MAX_BYTES // image_bytes)
    if config.limit > most:
        say(f"No more than {most} images are compared: the outputs of more would take above {MAX_BYTES >> 20} MiB.")
    images = list_images(data, min(config.limit, most), config.seed)
    read = read_images(images, range(len(images)), artifact.preprocess, config.workers)
    return (image.input for image in track(read, "Images of --data", len(images)))


def run_all(
    backends: dict[str, Backend], artifact: Artifact, images: Iterable[np.ndarray]
) -> dict[str, tuple[np.ndarray, ...]]:
    """All outputs, (N, …) float32 each, of every backend for images as the network takes them.

    Raises:
        UserError: a runtime fails, or gives outputs of another shape than the manifest says.
    """
    outputs: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in backends}
    for image in images:
        for name, backend in backends.items():
            outputs[name].append(run_checked(backend, name, artifact, image[None]))
    return {name: tuple(np.concatenate(arrays) for arrays in zip(*rows, strict=True)) for name, rows in outputs.items()}


def run_checked(backend: Backend, name: str, artifact: Artifact, batch: np.ndarray) -> tuple[np.ndarray, ...]:
    """All outputs for a batch.

    Raises:
        UserError: the runtime fails, or gives outputs of another shape than the manifest says.
    """
    try:
        outputs = backend.run_all(batch) if len(artifact.outputs) > 1 else (backend.run(batch),)
    except Exception as error:  # each runtime has its own kinds; the model may be hostile
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"The variant {name} cannot run ({reason}): export the artifact again.") from None
    given = [(output.shape, output.dtype.name) for output in outputs]
    needed = [((len(batch), *shape[1:]), "float32") for shape in artifact.outputs.values()]
    if given != needed:
        given_text, needed_text = (
            ", ".join(f"{shape} {dtype}" for shape, dtype in described) for described in (given, needed)
        )
        raise UserError(
            f"The variant {name} gives {given_text}, the manifest says {needed_text}: export the artifact again."
        )
    return outputs


def compare_all(outputs: tuple[np.ndarray, ...], reference: tuple[np.ndarray, ...]) -> list[Parity]:
    """Compare each output with the reference's, an image's maps as one vector."""
    return [
        compare_outputs(given.reshape(len(given), -1), expected.reshape(len(expected), -1))
        for given, expected in zip(outputs, reference, strict=True)
    ]


def result_json(artifact: Artifact, checks: list[Check], skipped: dict[str, str]) -> dict[str, Any]:
    """The JSON document of ``--json``."""
    variants: dict[str, Any] = {}
    for check in checks:
        entry = variants.setdefault(check.variant, {"int8_mac_share": check.int8_mac_share, "missed": []})
        if check.output:
            entry.setdefault(check.images, {})[check.output] = check.parity.to_json()
        else:
            entry[check.images] = check.parity.to_json()
        entry["missed"] += [f"{_of(check)}: {missed}" for missed in check.missed]
    return {
        "schema": 1,
        "artifact": artifact.name,
        "ok": not any(check.missed for check in checks),
        "variants": variants,
        "skipped": skipped,
    }


def print_checks(artifact: Artifact, checks: list[Check]) -> None:
    """Print a table to stdout. Every name in it has passed the checks of the manifest: no control character is left."""
    named = [f"{check.variant} {check.output}".rstrip() for check in checks]
    width = max(len("variant"), *map(len, named))
    print(f"{artifact.name} ({artifact.kind}) against {REFERENCE}")
    print(f"{'variant':<{width}}  images  cos mean    cos min   max error  top-1 same %      n  INT8 MACs %  ok")
    for name, check in zip(named, checks, strict=True):
        parity = check.parity
        error = "not finite" if parity.max_abs_error is None else f"{parity.max_abs_error:.2e}"
        agreement = f"{100 * parity.top1_agreement:.2f}" if artifact.kind == "classifier" else "-"
        share = "unknown" if check.int8_mac_share is None else f"{100 * check.int8_mac_share:.1f}"
        cosines = f"{parity.cosine_mean:.6f}  {parity.cosine_min:9.6f}"
        print(
            f"{name:<{width}}  {check.images:<6}  {cosines}  {error:>10}  {agreement:>12}  {parity.n:>5}  "
            f"{share:>11}  {'no' if check.missed else 'yes'}"
        )
    for check in checks:
        for missed in check.missed:
            print(f"{check.variant}, {_of(check)}: {missed}")


def _of(check: Check) -> str:
    return f"{check.images}, {check.output}" if check.output else check.images
