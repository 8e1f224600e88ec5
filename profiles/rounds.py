"""The rounds of a measurement: every variant by turns in fresh processes, and what they come to for a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifact import Artifact, variant_runtime
from ..runtime.errors import UserError
from ..runtime.fields import Fields
from ..runtime.images import ImageList, UnreadableImageError, load_image
from ..runtime.progress import Bar
from .agent import SCHEMA
from .child import Children
from .latency import PROTOCOLS, latency_faults, latency_json, protocol_json, round_of
from .process import keep_off
from .sensors import find_throttling, trace
from .verdicts import threads_text

Json = dict[str, Any]

INPUTS = 16  # so that caches are not kinder than they are to new images, and the memory is hardly more than one's
MAX_SAMPLES = 10**8

# What the outputs of a variant must agree with the reference's for a latency to mean anything: by precision, the lowest
# cosine, of INT8 the mean one: single images fall far below it in good networks.
MIN_COSINE = {"fp32": 0.9999, "fp16": 0.999, "int8": 0.9}


@dataclass(frozen=True, eq=False)
class Cell:
    """One variant with one number of threads: what a record describes.

    Attributes:
        artifact: it belongs to.
        manifest_sha256: of the artifact.
        variant: its name.
        threads: of one inference.
        cpus: the cores it is pinned to; None where the system cannot pin.
        answers: what the child of each round measured, in order.
    """

    artifact: Artifact
    manifest_sha256: str
    variant: str
    threads: int
    cpus: list[int] | None
    answers: list[Json] = field(default_factory=list)

    @property
    def runtime(self) -> str:
        """The runtime of the variant."""
        return variant_runtime(self.variant)

    def describe(self) -> str:
        """Its name for errors and progress."""
        return f"{self.variant} of {self.artifact.name} ({threads_text({'threads': self.threads})})"


def pick_images(images: ImageList | None, seed: int, folder: Path) -> list[Path]:
    """Up to 16 readable images, drawn at random, as input of the latency.

    Args:
        images: to draw from.
        seed: of the draw.
        folder: where images that lie in shards are put as files, for the child processes read files.
    """
    if images is None:
        return []
    found: list[Path] = []
    for index in np.random.default_rng(seed).permutation(len(images))[: 4 * INPUTS]:
        path = images.path(index)
        try:
            source = images.source(index)
            load_image(source, path)
        except UnreadableImageError:
            continue
        if isinstance(source, bytes):
            path = folder / f"{len(found)}{path.suffix}"
            path.write_bytes(source)
        found.append(path.resolve())
        if len(found) == INPUTS:
            break
    return found


def write_inputs(path: Path, artifact: Artifact, images: Sequence[Path]) -> None:
    """Write the input of the latency, n of what the network takes: the preprocessed images, or else golden ones."""
    if images:
        inputs = np.stack([artifact.preprocess(load_image(image)) for image in images])
    else:
        inputs = artifact.read_golden().inputs[:INPUTS]
    np.save(path, inputs, allow_pickle=False)


def measure(
    cells: Sequence[Cell], protocol: str, inputs: Mapping[str, Path], images: Sequence[Path], children: Children
) -> None:
    """Run all rounds; the answers are appended to the cells.

    Args:
        cells: in the order in which the first round goes through them.
        protocol: its name.
        inputs: by the name of the artifact, the file that :func:`write_inputs` wrote.
        images: to time decoding and preprocessing on; may be empty.
        children: to run in.

    Raises:
        UserError: a variant cannot be measured.
    """
    plan = round_of(PROTOCOLS[protocol])
    num_rounds = PROTOCOLS[protocol].rounds
    measured_on = {cpu for cell in cells for cpu in cell.cpus or ()}
    # The bar's thread starts where this one is.
    with keep_off(measured_on), Bar("Latency, rounds", num_rounds * len(cells)) as bar:
        for number in range(num_rounds):
            for cell in cells if number % 2 == 0 else reversed(cells):
                job = {
                    "schema": SCHEMA,
                    "task": "latency",
                    "artifact": str(cell.artifact.path.resolve()),
                    "manifest_sha256": cell.manifest_sha256,
                    "variant": cell.variant,
                    "threads": cell.threads,
                    "cpus": cell.cpus,
                    "inputs": str(inputs[cell.manifest_sha256]),
                    "plan": plan.to_json(),
                    "images": [str(image) for image in images],
                    "checks": number == 0,
                }
                cell.answers.append(check_answer(children.run(job, cell.describe()), cell))
                bar.advance(note=cell.variant)


def check_answer(answer: Json, cell: Cell) -> Json:
    """The answer of a round, where it holds the samples that a record needs.

    Raises:
        UserError: it does not.
    """
    what = f"answer for {cell.describe()}"
    samples = Fields(answer, what).value.get("samples_ms")
    if not isinstance(samples, list) or not 1 <= len(samples) <= MAX_SAMPLES:
        raise UserError(f"The {what} holds no samples: it was damaged on the way.")
    return answer


def measured_json(cell: Cell, protocol: str) -> Json:
    """What the rounds come to, in the fields of a record: latency, start-up, memory, parity, placement, clocks.

    Start-up times and the preprocessing are medians, the memory is the largest of the rounds.
    """
    answers = cell.answers
    peaks = [answer["peak_rss_mib"] for answer in answers if answer["peak_rss_mib"] is not None]
    preprocessing = [value for answer in answers for value in answer["preprocess_ms"]]
    return {
        "runtime_version": answers[0]["runtime_version"],
        "protocol": protocol_json(protocol, cell.cpus, "test images" if preprocessing else "golden pack"),
        "parity": answers[0]["parity"],
        "latency": latency_json([answer["samples_ms"] for answer in answers]),
        "warmup": [answer["warmup"] for answer in answers],
        "cold_start": {
            key: float(np.median([answer[key] for answer in answers]))
            for key in ("import_ms", "load_ms", "first_inference_ms")
        },
        "preprocess_ms": {"p50": float(np.median(preprocessing)), "n": len(preprocessing)} if preprocessing else None,
        "memory": {"peak_rss_mib": max(peaks)} if peaks else None,
        "placement": answers[0]["placement"],
        "clocks": trace([reading for answer in answers for reading in answer["sensors"]]),
    }


def find_faults(cell: Cell, protocol: str, not_finite: int, n: int) -> list[str]:
    """Why the record of a cell is not valid, because of something that was measured.

    Args:
        cell: after its rounds.
        protocol: its name.
        not_finite: images of the accuracy whose outputs were not finite.
        n: images of the accuracy.
    """
    faults = latency_faults([answer["samples_ms"] for answer in cell.answers], protocol)
    if throttled := find_throttling([tuple(answer["sensors"]) for answer in cell.answers]):
        faults.append(throttled)
    parity = cell.answers[0]["parity"]
    precision = cell.variant.split("-")[1]
    least = MIN_COSINE.get(precision, MIN_COSINE["int8"])
    kind, measure = ("lowest", "cosine_min") if precision in ("fp32", "fp16") else ("mean", "cosine_mean")
    if parity["max_abs_error"] is None:
        faults.append("outputs that are not finite in the golden pack")
    elif parity[measure] < least:
        faults.append(f"parity: the {kind} cosine to the reference is {parity[measure]:.6f}, below {least:g}")
    if not_finite:
        faults.append(f"outputs that are not finite for {not_finite} of {n} test images")
    return faults
