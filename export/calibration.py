"""Which images a network is calibrated on: a seeded subset of the training images, never one of the evaluation images.

Only the paths of the training images are looked at, not the labels that their folders may give. An image that also
occurs among the evaluation images, by the hash of its content, is passed over and counted. Images are decoded and
preprocessed by the same code as on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..runtime.errors import UserError
from ..runtime.images import ImageList, UnreadableBudget, UnreadableImageError, content_hash, list_images, load_image
from ..runtime.preprocess import Preprocess
from ..runtime.progress import say, track
from ..train.labelled import TEST_NAMES, run_data

MAX_UNREADABLE = 0.01
MAX_BYTES = 1 << 30  # of preprocessed calibration images in memory: 1783 at 224 px
MAX_GOLDEN = 64
MIN_GOLDEN = 4
GOLDEN_BYTES = 8 << 20  # of golden images, unless the fewest are larger: 13 at 224 px
READ_AHEAD = 64  # images that are decoded at a time


@dataclass(frozen=True, eq=False)
class Sample:
    """Some preprocessed images.

    Attributes:
        paths: relative to the folder they come from.
        hashes: SHA-256 of the content of each file.
        inputs: (N, …), as the network takes them.
    """

    paths: tuple[str, ...]
    hashes: tuple[str, ...]
    inputs: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def to_json(self) -> list[dict[str, str]]:
        """Path and hash of each image."""
        return [{"path": path, "sha256": sha256} for path, sha256 in zip(self.paths, self.hashes, strict=True)]


@dataclass(frozen=True, eq=False)
class Samples:
    """Images for an export.

    Attributes:
        calibration: to calibrate on.
        golden: for the golden pack; others than those, where there are enough images.
        training: to train for INT8 on, unlabelled; may be the calibration images too, never the golden ones.
        excluded: number of images that were passed over because they are evaluation images too.
        evaluation_images: number of evaluation images that were excluded from the draw; 0 where none are known.
    """

    calibration: Sample
    golden: Sample
    training: Sample
    excluded: int
    evaluation_images: int


def find_images(run: Path | None, data: Path | None, evaluation_data: Path | None) -> tuple[Path, Path | None]:
    """The folder of calibration images and that of evaluation images.

    Args:
        run: run folder, or None where ``data`` is given.
        data: calibration images, or None for those the run was trained on.
        evaluation_data: evaluation images, or None for the folder test, validation or val beside them, if any.

    Raises:
        UserError: the run names no images, or they are no longer there.
    """
    if data is None:
        assert run is not None
        root = run_data(run)
    else:
        root = data
    if data is None and not root.exists():
        raise UserError(f"The images '{root}' that the run was trained on are gone: name some with --data.")
    if evaluation_data is not None:
        return root, evaluation_data
    return root, evaluation_beside(root)


def evaluation_beside(root: Path) -> Path | None:
    """The folder test, validation or val beside a folder of training images, where there is one."""
    beside = (root.parent / name for name in TEST_NAMES)
    return next((path for path in beside if path.is_dir() and path.resolve() != root.resolve()), None)


def draw_samples(
    root: Path,
    evaluation_root: Path | None,
    preprocess: Preprocess,
    count: int,
    seed: int,
    workers: int,
    num_training: int = 0,
) -> Samples:
    """Draw calibration images, golden images and images to train for INT8 on.

    Args:
        root: folder of training images.
        evaluation_root: folder of images that must not be drawn, or None.
        preprocess: from an image to the network's input.
        count: number of calibration images; 0 where only golden ones are needed. Where there are too few images,
            at least a quarter of them become golden ones.
        seed: of the draw.
        workers: threads that decode images.
        num_training: number of images to train on; where there are too few images, as many as there are.

    Raises:
        UserError: a folder holds no images, too many of them are unreadable, or none is left.
    """
    images = list_images(root)
    evaluation = EvaluationImages(None if evaluation_root is None else list_images(evaluation_root))
    image_bytes = 4 * 3 * preprocess.crop_px**2  # as floats, which they become
    most = max(1, MAX_BYTES // image_bytes)
    for task, number in {"Calibrating": count, "Training for INT8": num_training}.items():
        if number > most:
            say(f"{task} on {most} images instead of {number}: more would take above {MAX_BYTES >> 20} MiB of memory.")
    count, num_training = min(count, most), min(num_training, most)
    num_golden = min(MAX_GOLDEN, max(MIN_GOLDEN, GOLDEN_BYTES // image_bytes))
    wanted = max(count, num_training) + num_golden
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    read = usable(read_images(images, order, preprocess, workers), evaluation)
    drawn = list(track(itertools.islice(read, wanted), "Reading calibration images", min(wanted, len(images))))
    if evaluation.met:
        say(f"Passed over {evaluation.met} images of '{root}' that are evaluation images in '{evaluation_root}' too.")
    if not drawn:
        raise UserError(
            f"No image of '{root}' can be calibrated on: {evaluation.met} of its {len(images)} are evaluation images "
            f"in '{evaluation_root}' too, the rest is unreadable. Name training images with --data."
        )
    num_golden = min(num_golden, max(len(drawn) - max(count, num_training), len(drawn) // 4, 1))
    golden = drawn[-num_golden:]
    others = max(len(drawn) - num_golden, 1)
    calibration, training = drawn[: min(count, others)], drawn[: min(num_training, others)]
    calibration, golden, training = (collect(part, preprocess) for part in (calibration, golden, training))
    return Samples(calibration, golden, training, evaluation.met, len(evaluation))


class EvaluationImages:
    """Images that must not be drawn. Only files of the same size as a candidate are read.

    Args:
        images: the evaluation images, or None.

    Attributes:
        met: number of candidates that were found among them.
    """

    def __init__(self, images: ImageList | None) -> None:
        self.met = 0
        self._number = 0 if images is None else len(images)
        self._images = images
        self._by_size: dict[int, list[int]] = {}
        self._hashes: dict[int, frozenset[str]] = {}
        for index in range(self._number):
            assert images is not None
            self._by_size.setdefault(images.size_bytes(index), []).append(index)  # below 0: never asked for

    def __len__(self) -> int:
        return self._number

    def meet(self, size_bytes: int, sha256: str) -> bool:
        """Whether a file of this size and hash is among them; if so it is counted."""
        if size_bytes not in self._hashes:
            self._hashes[size_bytes] = frozenset(map(self._hash, self._by_size.get(size_bytes, ())))
        found = sha256 in self._hashes[size_bytes]
        self.met += found
        return found

    def _hash(self, index: int) -> str:
        assert self._images is not None
        try:
            return content_hash(self._images.source(index))
        except UnreadableImageError:
            return ""  # nothing can be equal to it


class ReadImage(NamedTuple):
    """An image as it was read.

    Attributes:
        path: relative to its folder.
        sha256: of the file's content.
        size_bytes: of the file.
        input: preprocessed, as the network takes it.
    """

    path: str
    sha256: str
    size_bytes: int
    input: np.ndarray


def read_images(images: ImageList, order: Sequence[int], preprocess: Preprocess, workers: int) -> Iterator[ReadImage]:
    """Read, hash and preprocess images; unreadable ones are named and left out.

    Args:
        images: the folder's images.
        order: indices of those that may be read; no more than a few are read ahead.
        preprocess: from an image to the network's input.
        workers: threads that decode.

    Raises:
        UserError: too many are unreadable.
    """
    budget = UnreadableBudget(MAX_UNREADABLE, len(order))

    def read(index: int) -> ReadImage | UnreadableImageError:
        try:
            source = images.source(index)
            image = preprocess(load_image(source, images.path(index)))
        except UnreadableImageError as error:
            return error
        return ReadImage(images.paths[index], content_hash(source), images.size_bytes(index), image)

    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(order), READ_AHEAD):
            for result in pool.map(read, order[start : start + READ_AHEAD]):
                if isinstance(result, UnreadableImageError):
                    budget.skip(result)
                else:
                    yield result


def usable(read: Iterator[ReadImage], evaluation: EvaluationImages, known: Sequence[str] = ()) -> Iterator[ReadImage]:
    """Each content once, without those of the evaluation and those whose hashes are known."""
    seen = set(known)
    for image in read:
        if image.sha256 not in seen and not evaluation.meet(image.size_bytes, image.sha256):
            yield image
        seen.add(image.sha256)


def collect(drawn: Sequence[ReadImage], preprocess: Preprocess) -> Sample:
    """Images as one array, with their paths and hashes."""
    inputs = np.empty((len(drawn), *preprocess.input_shape), preprocess.input_dtype)
    for index, item in enumerate(drawn):
        inputs[index] = item.input
    return Sample(tuple(item.path for item in drawn), tuple(item.sha256 for item in drawn), inputs)
