"""``python -m midge.profiles.agent``: one measurement in a fresh process, one JSON job in, one JSON answer out.

The job comes on stdin, the answer goes to stdout; whatever a runtime prints there meanwhile goes to stderr. The answer
is ``{"result": {…}}``, or ``{"error": "one line"}`` with exit code 2. A job may come from elsewhere and is checked
field by field; the artifact that it names is read with every hash checked. Only a torch variant imports torch.

``latency``: import of the runtime, load, first inference, warm-up, timed runs (:mod:`.latency` states the protocol),
each apart and in this order; then the peak of the resident memory, which so covers nothing else; then decoding and
preprocessing of given images, parity on the golden pack, and what really executed. What is imported before the runtime
(Python, numpy, Pillow) counts for the memory alone. The process is new each time, the system's file cache is not.

``accuracy``: the class of each image, one at a time.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifact import Artifact, load_artifact, variant_runtime
from ..runtime.backend import (
    PACKAGES,
    Backend,
    BackendOptions,
    installed_package,
    open_backend,
    predict,
    predict_all,
)
from ..runtime.errors import UserError, require, unknown_name
from ..runtime.fields import Fields
from ..runtime.files import sha256_file
from ..runtime.parity import compare_outputs
from ..runtime.preprocess import Preprocess
from .latency import Round, time_runs, warm_up
from .process import die_with_parent, peak_rss_mib, pin
from .sensors import read_sensors

Json = dict[str, Any]

SCHEMA = 1
MAX_JOB_BYTES = 64 << 20
MAX_INPUT_BYTES = 4 << 30
MAX_IMAGES = 1000
PREPROCESS_PASSES = 2


def main() -> int:
    """Entry point."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # below Python too: native code prints to the descriptor
    try:
        answer, code = {"result": work(sys.stdin.buffer.read(MAX_JOB_BYTES + 1))}, 0
    except UserError as error:
        answer, code = {"error": str(error)}, 2
    except MemoryError:
        answer, code = {"error": "the memory did not suffice"}, 2
    except Exception as error:  # of a runtime; the parent names the variant
        traceback.print_exc()
        answer, code = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}, 2
    with os.fdopen(answer_fd, "w", encoding="utf-8") as file:
        file.write(json.dumps(answer, allow_nan=False) + "\n")
    return code


def work(text: bytes) -> Json:
    """Do a job.

    Args:
        text: the job, JSON.

    Returns:
        The result: see :func:`measure_latency` and :func:`classify`.

    Raises:
        UserError: the job is not valid or cannot be done.
    """
    if len(text) > MAX_JOB_BYTES:
        raise UserError(f"The job is larger than {MAX_JOB_BYTES} bytes.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError("The job is not valid JSON: give one JSON object on stdin.") from None
    job = Fields(value, "job")
    job.schema(SCHEMA)
    task = TASKS[job.choice("task", TASKS)]
    threads = job.integer("threads", 1, 1024)
    if job.value.get("parent") is not None:
        die_with_parent(job.integer("parent", 0, 2**31))
    if (cpus := job.value.get("cpus")) is not None:
        pin(job.integers("cpus", 0, 65_535, [max(len(cpus), 1) if isinstance(cpus, list) else threads]))
    folder = Path(job.text("artifact"))
    artifact = load_artifact(folder)
    if sha256_file(folder / "manifest.json") != job.sha256("manifest_sha256"):
        raise UserError(f"The artifact '{folder}' is not the one that the job means: its manifest was changed.")
    name = job.text("variant")
    if name not in artifact.variants:
        raise unknown_name("variant", name, artifact.variants)
    return task(job, artifact, name, threads)


def measure_latency(job: Fields, artifact: Artifact, name: str, threads: int) -> Json:
    """One round of one variant.

    The job's fields: ``inputs`` (an .npy file of preprocessed images), ``plan`` (:class:`Round`), ``images`` (files to
    time the preprocessing on; may be empty), ``checks`` (whether to look at parity and placement).

    Returns:
        ``runtime_version``, ``import_ms``, ``load_ms``, ``first_inference_ms``, ``warmup``, ``samples_ms``,
        ``sensors`` (before and after), ``peak_rss_mib``, ``preprocess_ms`` (a list), ``parity``, ``placement``.
    """
    plan = Round.from_json(job.fields("plan"))
    cpus = job.value.get("cpus")
    inputs = load_array(Path(job.text("inputs")), np.dtype(artifact.input_dtype), artifact.input_shape)
    images = [Path(path) for path in job.texts("images")[:MAX_IMAGES]]
    start = time.perf_counter_ns()
    version = import_runtime(variant_runtime(name))
    imported = time.perf_counter_ns()
    backend = open_backend(artifact.variants[name], BackendOptions(threads))
    loaded = time.perf_counter_ns()
    with backend:
        check_input(backend, artifact, name)

        def run(index: int) -> object:
            return backend.run(inputs[index % len(inputs)])

        before_first = time.perf_counter_ns()
        run(0)
        after_first = time.perf_counter_ns()
        warmup = warm_up(run, plan)
        sensors = [read_sensors(cpus)]
        samples = time_runs(run, plan)
        sensors.append(read_sensors(cpus))
        result = {
            "runtime_version": version,
            "import_ms": (imported - start) / 1e6,
            "load_ms": (loaded - imported) / 1e6,
            "first_inference_ms": (after_first - before_first) / 1e6,
            "warmup": warmup,
            "samples_ms": samples,
            "sensors": sensors,
            "peak_rss_mib": peak_rss_mib(),
            "preprocess_ms": time_preprocessing(artifact.preprocess, images),
            "parity": None,
            "placement": None,
        }
        if job.value.get("checks") is True:
            result["parity"] = check_parity(backend, artifact)
            result["placement"] = placement_json(backend)
    return result


def classify(job: Fields, artifact: Artifact, name: str, threads: int) -> Json:
    """The classes of images, one at a time.

    The job's field ``inputs`` names an .npy file (N, H, W, 3) uint8 of images that are resized and cropped already, so
    that all that is left of the preprocessing is the normalization.

    Returns:
        ``predictions``: N positions of the largest output, -1 where an output is not finite.
    """
    side = artifact.preprocess.crop_px
    images = load_array(Path(job.text("inputs")), np.dtype(np.uint8), (1, side, side, 3))
    normalize = replace(artifact.preprocess, resize_px=artifact.preprocess.crop_px)
    predictions = []
    with open_backend(artifact.variants[name], BackendOptions(threads)) as backend:
        check_input(backend, artifact, name)
        for image in images:
            outputs = backend.run(normalize(image[0])[None])[0]
            predictions.append(int(outputs.argmax()) if np.isfinite(outputs).all() else -1)
    return {"predictions": predictions}


TASKS: dict[str, Callable[[Fields, Artifact, str, int], Json]] = {"latency": measure_latency, "accuracy": classify}


def load_array(path: Path, dtype: np.dtype[Any], item_shape: tuple[int, ...]) -> list[np.ndarray]:
    """The items of an .npy file, each of ``item_shape``, whose first side is 1; float32 is read, uint8 is mapped.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The inputs '{path}' cannot be read ({' '.join(str(error).split())[:200]}).") from None
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape[1:] != item_shape[1:] or not len(array):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"The inputs '{path}' are {found}, not {dtype} (N, {', '.join(map(str, item_shape[1:]))}).")
    if array.nbytes > MAX_INPUT_BYTES:
        raise UserError(
            f"The inputs '{path}' have {array.nbytes} bytes: more than the {MAX_INPUT_BYTES} that are read."
        )
    items = np.array(array) if dtype == np.float32 else array  # timed runs are not to wait for a page of the file
    return [items[index : index + 1] for index in range(len(items))]


def import_runtime(runtime: str) -> str:
    """Import the packages of a runtime, and return the version of the first."""
    packages, extra = PACKAGES[runtime]
    modules = [require(installed_package(package) or package, extra) for package in packages]
    return str(getattr(modules[0], "__version__", "unknown"))[:100]


def check_input(backend: Backend, artifact: Artifact, name: str) -> None:
    """Refuse a model whose input is not the one of the manifest."""
    if backend.input_shape != artifact.input_shape:
        raise UserError(
            f"The variant {name} takes {backend.input_shape}, its manifest says {artifact.input_shape}: "
            "export the artifact again."
        )


def time_preprocessing(preprocess: Preprocess, images: list[Path]) -> list[float]:
    """Times of reading, decoding and preprocessing one image each, ms; the first pass over the images is not timed."""
    from ..runtime.decode import load_image

    samples = []
    for number in range(PREPROCESS_PASSES + 1):
        for path in images:
            start = time.perf_counter_ns()
            preprocess(load_image(path))
            taken = time.perf_counter_ns() - start
            if number:
                samples.append(taken / 1e6)
    return samples


def check_parity(backend: Backend, artifact: Artifact) -> Json:
    """Agreement with the reference's outputs on the golden pack."""
    golden = artifact.read_golden()
    several = bool(golden.more)
    outputs = predict_all(backend, golden.inputs) if several else (predict(backend, golden.inputs),)
    expected = (golden.outputs, *golden.more)
    if [output.shape for output in outputs] != [output.shape for output in expected]:
        given, needed = (", ".join(str(output.shape[1:]) for output in arrays) for arrays in (outputs, expected))
        raise UserError(f"It gives outputs {given}, its manifest says {needed}.")
    return compare_outputs(_as_vectors(outputs), _as_vectors(expected)).to_json()


def _as_vectors(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """All outputs for an image as one vector: (N, K)."""
    return np.concatenate([output.reshape(len(output), -1) for output in outputs], axis=1)


def placement_json(backend: Backend) -> Json:
    """What really executed; the share and the counts are null, with a reason, where they are not known."""
    empty: Json = {"int8_mac_share": None, "int8_macs": None, "total_macs": None, "ops": {}}
    try:
        placement = backend.placement()
    except Exception as error:  # of a runtime's own reporting: the measurement stands without it
        return {**empty, "reason": f"the runtime did not tell ({' '.join(str(error).split())[:200]})"}
    if placement.uncounted:
        unknown = ", ".join(f"{op} ×{count}" for op, count in sorted(placement.uncounted.items()))
        reason = f"the multiply-accumulates of some operators are not known: {unknown}"
        return {**empty, "ops": placement.ops, "reason": reason[:900]}
    return {
        "int8_mac_share": placement.share,
        "int8_macs": placement.int8_macs,
        "total_macs": placement.total_macs,
        "ops": placement.ops,
        "reason": None if placement.share is not None else "the network has no convolution or matrix product",
    }


if __name__ == "__main__":
    sys.exit(main())
