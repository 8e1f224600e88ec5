"""``midge data fetch``: a known image set as a folder of PNGs, from a Debian package or by torchvision's download."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import urllib.error
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..runtime.errors import UserError, require, unknown_name
from ..runtime.files import atomic_folder, read_json, refuse_existing, write_json
from ..runtime.progress import Bar, say
from .data_config import FetchConfig


@dataclass(frozen=True)
class IdxFile:
    """A gzipped IDX file, known by its content: two sources may compress it differently.

    Attributes:
        size_bytes: size once decompressed.
        sha256: SHA-256 once decompressed, 64 hexadecimal digits.
        shape: shape of its uint8 array; the header has 4 bytes, and 4 for each dimension.
    """

    name: str
    size_bytes: int
    sha256: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """Where an image set comes from and what it must hold.

    Attributes:
        debian_folder: where its Debian package puts it.
        debian_package: that package.
        torchvision: name of the class in ``torchvision.datasets`` that downloads it.
        licence: SPDX name.
        splits: split -> (images, labels).
        classes: class folder of each label.
    """

    debian_folder: Path
    debian_package: str
    torchvision: str
    licence: str
    splits: dict[str, tuple[IdxFile, IdxFile]]
    classes: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each split."""
        return {split: images.shape[0] for split, (images, _) in self.splits.items()}


FASHION_CLASSES = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")

DATASETS = {
    "fashion-mnist": Dataset(
        debian_folder=Path("/usr/share/datasets/fashion-mnist"),
        debian_package="dataset-fashion-mnist",
        torchvision="FashionMNIST",
        licence="MIT",
        splits={
            "train": (
                IdxFile(
                    "train-images-idx3-ubyte.gz",
                    47_040_016,
                    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                    (60_000, 28, 28),
                ),
                IdxFile(
                    "train-labels-idx1-ubyte.gz",
                    60_008,
                    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                    (60_000,),
                ),
            ),
            "test": (
                IdxFile(
                    "t10k-images-idx3-ubyte.gz",
                    7_840_016,
                    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                    (10_000, 28, 28),
                ),
                IdxFile(
                    "t10k-labels-idx1-ubyte.gz",
                    10_008,
                    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
                    (10_000,),
                ),
            ),
        },
        classes=FASHION_CLASSES,
    ),
}

SOURCE_FILE = "SOURCE.json"
IMAGES_PER_TASK = 1000
DOWNLOAD_TIMEOUT_S = 30.0


def fetch(config: FetchConfig) -> int:
    """Fetch an image set, or say that it is already there.

    Raises:
        UserError: unknown set, a source that cannot be had or does not match its checksum, or the folder is taken.
    """
    if config.name not in DATASETS:
        raise unknown_name("image set", config.name, DATASETS)
    dataset = DATASETS[config.name]
    out = config.out or Path("data") / config.name
    if fetched := not is_complete(out, config.name, dataset):
        refuse_existing(out)
        with source_folder(dataset) as (source, folder):
            arrays = read_splits(dataset, folder)
        with atomic_folder(out) as partial:
            write_splits(partial, arrays, dataset.classes)
            write_json(partial / SOURCE_FILE, describe(config.name, dataset, source))
    result = {"schema": 1, "dataset": config.name, "out": str(out), "fetched": fetched, "counts": dataset.counts}
    if config.json:
        print(json.dumps(result))
    else:
        counts = ", ".join(f"{count} {split}" for split, count in dataset.counts.items())
        print(f"{config.name} {'is in' if fetched else 'is already complete in'} '{out}': {counts} images.")
    return 0


def is_complete(out: Path, name: str, dataset: Dataset) -> bool:
    """Whether ``out`` holds the whole set; its images are counted, not read.

    Raises:
        UserError: it holds this set, but not all of it.
    """
    if not (out / SOURCE_FILE).is_file():
        return False
    source = read_json(out / SOURCE_FILE, "source description", max_bytes=1 << 20)
    if not isinstance(source, dict) or source.get("dataset") != name:
        return False
    if source.get("counts") != dataset.counts or source.get("sha256") != checksums(dataset):
        raise UserError(f"'{out}' holds another version of {name}: remove it, or name a new folder with --out.")
    for split, expected in dataset.counts.items():
        found = sum(1 for label in dataset.classes for _ in (out / split / label).glob("*.png"))
        if found != expected:
            raise UserError(
                f"'{out}' holds {found} of the {expected} {split} images of {name}: remove it and fetch it again."
            )
    return True


def checksums(dataset: Dataset) -> dict[str, str]:
    """SHA-256 of the decompressed content by file name."""
    return {file.name: file.sha256 for files in dataset.splits.values() for file in files}


def describe(name: str, dataset: Dataset, source: str) -> dict[str, Any]:
    """What ``SOURCE.json`` says: where the images come from, and of what content."""
    return {
        "schema": 1,
        "dataset": name,
        "source": source,
        "licence": dataset.licence,
        "sha256": checksums(dataset),
        "counts": dataset.counts,
        "classes": list(dataset.classes),
    }


@contextlib.contextmanager
def source_folder(dataset: Dataset) -> Iterator[tuple[str, Path]]:
    """Yield where the set comes from, in words, and the folder of its gzipped IDX files."""
    if dataset.debian_folder.is_dir():
        yield f"Debian package {dataset.debian_package}", dataset.debian_folder
        return
    with tempfile.TemporaryDirectory(prefix="midge-fetch-") as temporary:
        download(dataset, Path(temporary))
        yield f"torchvision.datasets.{dataset.torchvision}", Path(temporary) / dataset.torchvision / "raw"


def download(dataset: Dataset, root: Path) -> None:
    """Let torchvision download the set below ``root``.

    Raises:
        UserError: torchvision is not installed, or the download has failed.
    """
    either = f"install the Debian package ('apt-get install {dataset.debian_package}') or try again with a network"
    try:
        datasets = require("torchvision.datasets", "train")
    except UserError as error:
        raise UserError(f"{error} Or {either.partition(' or ')[0]}.") from None
    say(f"Downloading {dataset.torchvision} with torchvision.")
    timeout_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none: a silent server would hold it for ever
    try:
        with contextlib.redirect_stdout(sys.stderr):
            getattr(datasets, dataset.torchvision)(root=str(root), download=True)
    except (RuntimeError, urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"The download of {dataset.torchvision} failed ({reason}): {either}.") from None
    finally:
        socket.setdefaulttimeout(timeout_s)


def read_splits(dataset: Dataset, folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read and verify all files.

    Returns:
        split -> images (N, H, W) uint8 and labels (N,) uint8.
    """
    return {
        split: (read_idx(folder / images.name, images), read_idx(folder / labels.name, labels))
        for split, (images, labels) in dataset.splits.items()
    }


def read_idx(path: Path, expected: IdxFile) -> np.ndarray:
    """Read a gzipped IDX file whose content is known; at most one byte more than its size is decompressed.

    Returns:
        The uint8 array of ``expected.shape``.

    Raises:
        UserError: it is missing, damaged, or has another content.
    """
    way_out = "remove it and fetch it again, or reinstall the package that brought it"
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(expected.size_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"'{path}' is missing: {way_out}.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"'{path}' is damaged ({error}): {way_out}.") from None
    if len(content) > expected.size_bytes:
        raise UserError(f"'{path}' holds more than the {expected.size_bytes} bytes it should: {way_out}.")
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected.sha256:
        raise UserError(f"'{path}' has the content SHA-256 {digest}, not {expected.sha256}: {way_out}.")
    header = 4 + 4 * len(expected.shape)
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(expected.shape)


def write_splits(out: Path, arrays: dict[str, tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...]) -> None:
    """Write ``<split>/<class>/<index>.png`` for all images, in as many processes as there are cores, up to four.

    Args:
        out: existing folder.
        arrays: split -> images (N, H, W) uint8 and labels (N,) uint8.
        classes: class folder of each label.
    """
    tasks = []
    for split, (images, labels) in arrays.items():
        for name in classes:
            (out / split / name).mkdir(parents=True)
        for first in range(0, len(images), IMAGES_PER_TASK):
            part = slice(first, first + IMAGES_PER_TASK)
            folders = [str(out / split / classes[label]) for label in labels[part]]
            tasks.append((images[part], folders, first))
    processes = min(os.cpu_count() or 1, 4, len(tasks))
    with Bar("Writing images", sum(len(folders) for _, folders, _ in tasks)) as bar, contextlib.ExitStack() as stack:
        if processes > 1:
            # spawn: the progress bar has a thread, and a fork with threads may hang
            context = multiprocessing.get_context("spawn")
            results = stack.enter_context(ProcessPoolExecutor(processes, mp_context=context)).map(write_images, tasks)
        else:
            results = map(write_images, tasks)
        for count in results:
            bar.advance(count)


def write_images(task: tuple[np.ndarray, list[str], int]) -> int:
    """Write grey images as lossless PNGs named by their index.

    Args:
        task: images (N, H, W) uint8, the folder of each, and the index of the first.

    Returns:
        Their number.
    """
    images, folders, first = task
    for index, (image, folder) in enumerate(zip(images, folders, strict=True), start=first):
        Image.fromarray(image).save(f"{folder}/{index:05d}.png", compress_level=1)  # 4 % larger, 10 % quicker than 6
    return len(images)
