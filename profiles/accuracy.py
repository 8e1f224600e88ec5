"""Top-1 of every variant through its real runtime, one image at a time, over the same labelled images.

The images are decoded, resized and cropped once, in this process, into a temporary file of 8-bit RGB that the child
processes map; each normalizes what it reads. That is exact: the values before the normalization are whole numbers. Very
many images go through in portions, so that the file stays below 512 MiB. Two children work side by side, as nothing is
timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifact import Artifact
from ..runtime.errors import UserError
from ..runtime.files import sha256_file
from ..runtime.images import ImageList, UnreadableBudget, UnreadableImageError, fingerprint
from ..runtime.preprocess import Preprocess
from ..runtime.progress import Bar
from ..runtime.proportions import wilson_interval
from .agent import SCHEMA
from .child import Children
from .statistics import paired_top1
from .verdicts import reference_name

Json = dict[str, Any]

PORTION_BYTES = 512 << 20
WORKERS = 2
REFERENCE = "torch-fp32"


@dataclass(frozen=True, eq=False)
class Predictions:
    """What the variants of one artifact make of the images that could be read.

    Attributes:
        labels: (n,) int64 positions in the artifact's labels.
        classes: by variant, (n,) int64 positions of the largest output; -1 where an output is not finite.
        data_fingerprint: of all the images, as listed.
        unreadable: how many of them were skipped.
    """

    labels: np.ndarray
    classes: dict[str, np.ndarray]
    data_fingerprint: str
    unreadable: int


def why_no_accuracy(artifact: Artifact, images: ImageList | None) -> str | None:
    """The reason for which there is no accuracy to count, or None."""
    if images is None:
        return "no test images were given (--data)"
    if artifact.kind != "classifier":
        return f"the artifact is of the kind {artifact.kind}, which names no class"
    if not artifact.labels:
        return "the artifact does not name its classes"
    if images.labels is None:
        return "the images have no labels: lay them out as <class>/<image>, two classes or more"
    return None


def match_labels(artifact: Artifact, images: ImageList) -> np.ndarray:
    """Labels (N,) int64 of the images as positions in the artifact's labels, matched by name.

    Raises:
        UserError: a class folder has a name that the artifact does not know.
    """
    positions = {name: position for position, name in enumerate(artifact.labels)}
    if unknown := [name for name in images.classes if name not in positions]:
        raise UserError(
            f"'{images.root}' has the class folders {_listed(unknown)}, which the artifact '{artifact.name}' does not "
            f"know: its classes are {_listed(artifact.labels)}. Rename the folders."
        )
    assert images.labels is not None
    return np.array([positions[name] for name in images.classes], np.int64)[images.labels]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:6])
    return f"{shown}, …" if len(names) > 6 else shown


def predict_all(
    artifact: Artifact, variants: Sequence[str], images: ImageList, children: Children, max_unreadable: float
) -> Predictions:
    """The classes that each variant gives to each readable image.

    Args:
        artifact: a classifier of batch 1.
        variants: those to run.
        images: with labels.
        children: to run the variants in.
        max_unreadable: largest share of unreadable images that is put up with, 0..1.

    Raises:
        UserError: the class names do not match, too many images are unreadable, or a variant cannot run.
    """
    labels = match_labels(artifact, images)
    budget = UnreadableBudget(max_unreadable, len(images))
    kept: list[int] = []
    classes: dict[str, list[int]] = {variant: [] for variant in variants}
    crop_px = artifact.preprocess.crop_px
    size = max(PORTION_BYTES // (3 * crop_px**2), 1)
    manifest_sha256 = sha256_file(artifact.path / "manifest.json")
    with Bar(f"Top-1 of {artifact.name}, images", len(images) * (1 + len(variants))) as bar:
        for start in range(0, len(images), size):
            indices = range(start, min(start + size, len(images)))
            with tempfile.TemporaryDirectory(prefix="midge-") as folder:
                path = Path(folder) / "images.npy"
                readable = write_crops(path, images, indices, artifact.preprocess, budget, bar)
                kept += readable
                job = {
                    "schema": SCHEMA,
                    "task": "accuracy",
                    "threads": 1,
                    "artifact": str(artifact.path.resolve()),
                    "manifest_sha256": manifest_sha256,
                    "inputs": str(path),
                }
                if readable:
                    for variant, found in _classify(job, variants, len(readable), children):
                        bar.advance(len(indices), variant)
                        classes[variant] += found
    if not kept:
        raise UserError(f"None of the {len(images)} images in '{images.root}' can be read.")
    return Predictions(
        labels=labels[kept],
        classes={variant: np.array(found, np.int64) for variant, found in classes.items()},
        data_fingerprint=fingerprint(images),
        unreadable=len(budget.paths),
    )


def write_crops(
    path: Path, images: ImageList, indices: Sequence[int], preprocess: Preprocess, budget: UnreadableBudget, bar: Bar
) -> list[int]:
    """Write the readable images, resized and cropped, as an .npy file (n, H, W, 3) uint8.

    Returns:
        The indices of the readable ones, n of them.
    """
    side = preprocess.crop_px
    crops = np.empty((len(indices), side, side, 3), np.uint8)
    readable = []

    def crop(index: int) -> np.ndarray | UnreadableImageError:
        try:
            return preprocess.crop(images.load(index))
        except UnreadableImageError as error:
            return error

    with ThreadPoolExecutor(WORKERS) as pool:
        for index, result in zip(indices, pool.map(crop, indices), strict=True):
            if isinstance(result, UnreadableImageError):
                budget.skip(result)
            else:
                crops[len(readable)] = result
                readable.append(index)
            bar.advance()
    np.save(path, crops[: len(readable)], allow_pickle=False)
    return readable


def _classify(job: Json, variants: Sequence[str], n: int, children: Children) -> Iterator[tuple[str, list[int]]]:
    """Each variant with its n classes, in the given order."""

    def run(variant: str) -> list[int]:
        found = children.run({**job, "variant": variant}, f"the accuracy of {variant}").get("predictions")
        if not isinstance(found, list) or len(found) != n or not all(type(each) is int for each in found):
            raise UserError(f"The accuracy of {variant} came back damaged: {n} classes were expected.")
        return found

    pool = ThreadPoolExecutor(WORKERS)
    try:
        yield from zip(variants, pool.map(run, variants), strict=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # children that still run are ended by their owner


def accuracy_json(predictions: Predictions, variant: str) -> Json:
    """The accuracy of a variant as it stands in a record: alone, and image by image against others.

    ``vs`` pairs it with FP32 of the same target, ``agreement_with_reference`` counts the images to which torch gives
    the same class; each is null where that variant was not measured with it.
    """
    classes, labels = predictions.classes[variant], predictions.labels
    n, correct = len(labels), int((classes == labels).sum())
    partner = reference_name(variant)
    reference = predictions.classes.get(REFERENCE)
    agreement = None
    if reference is not None:
        agreement = {"variant": REFERENCE, "share": float((classes == reference).mean()), "n": n}
    versus = None
    if partner != variant and partner in predictions.classes:
        versus = {"variant": partner, **paired_top1(labels, classes, predictions.classes[partner])}
    return {
        "top1": correct / n,
        "n": n,
        "correct": correct,
        "top1_ci95": list(wilson_interval(correct, n)),
        "data_fingerprint": predictions.data_fingerprint,
        "unreadable": predictions.unreadable,
        "not_finite": int((classes == -1).sum()),
        "agreement_with_reference": agreement,
        "vs": versus,
    }
