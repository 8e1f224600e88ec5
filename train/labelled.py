"""Labelled images for the evaluations: which folders, how many, and the same classes on both sides (no torch)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..runtime.errors import UserError
from ..runtime.files import read_json
from ..runtime.images import ImageList, list_images

TEST_NAMES = ("test", "validation", "val")


@dataclass(frozen=True)
class LabelledSets:
    """Images to learn from and images to be judged on.

    Attributes:
        train: a seeded subset; labels are indices into ``train.classes``.
        test: images of another folder; labels are indices into ``train.classes`` too.
    """

    train: ImageList
    test: ImageList


def labelled_sets(
    purpose: str, run: Path, data: Path | None, test: Path | None, labels: int, limit: int | None, seed: int
) -> LabelledSets:
    """Find and list the labelled images of an evaluation.

    Args:
        purpose: what needs them, for errors, e.g. ``"k-NN"``.
        run: run folder.
        data: training images, or None for those of the run.
        test: test images, or None for the folder test, validation or val beside the training images.
        labels: number of training images to take.
        limit: number of test images to take, or None for all.
        seed: seed of both subsets.

    Raises:
        UserError: a folder is missing, has no labels, holds the other one, or their classes do not agree.
    """
    train_root = run_data(run) if data is None else data
    test_root = test_folder(train_root) if test is None else test
    train = list_labelled(purpose, "--data", train_root, labels, seed)
    inner, outer = test_root.resolve(), train_root.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(
            f"The training images '{train_root}' and the test images '{test_root}' overlap: name two separate folders."
        )
    return LabelledSets(train, align_classes(list_labelled(purpose, "--test", test_root, limit, seed), train))


def run_data(run: Path) -> Path:
    """The images that a run was trained on, as its config.json names them."""
    config = read_json(run / "config.json", "run configuration")
    values = config.get("config") if isinstance(config, dict) else None
    data = values.get("data") if isinstance(values, dict) else None
    if not isinstance(data, str) or not data:
        raise UserError(f"'{run / 'config.json'}' names no images: name labelled ones with --data.")
    return Path(data)


def test_folder(train_root: Path) -> Path:
    """The test images beside the training images."""
    for name in TEST_NAMES:
        if (folder := train_root.parent / name).is_dir() and folder.resolve() != train_root.resolve():
            return folder
    raise UserError(
        f"No test images beside '{train_root}' (a folder {', '.join(TEST_NAMES)}): name labelled ones with --test."
    )


def list_labelled(purpose: str, flag: str, root: Path, limit: int | None, seed: int) -> ImageList:
    """List images that must have labels."""
    images = list_images(root, limit, seed)
    if images.labels is None:
        raise UserError(
            f"{purpose} needs labels: '{root}' is not in ImageFolder layout (<class>/<image>, two classes or more). "
            f"Name labelled images with {flag}."
        )
    return images


def align_classes(test: ImageList, train: ImageList) -> ImageList:
    """The test images with labels that are indices into the training classes, matched by name.

    Raises:
        UserError: a test class is unknown to the training images.
    """
    assert test.labels is not None
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"The test images '{test.root}' have the class '{unknown[0]}'"
            f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''} that the training images '{train.root}' "
            f"do not have: {', '.join(train.classes[:20])}."
        )
    index = np.array([train.classes.index(name) for name in test.classes], dtype=np.int64)
    return replace(test, labels=index[test.labels], classes=train.classes)


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split images at random, each class in proportion: at least one to each side where it has two or more.

    Args:
        labels: (N,) int64.
        share: share of the second part, 0..1.
        seed: of the draw.

    Returns:
        Sorted indices of the first and of the second part. A class with one image is in the first.
    """
    rng = np.random.default_rng(seed)
    second = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        second.append(members[:count])
    held_out = np.sort(np.concatenate(second))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out
