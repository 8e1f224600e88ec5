"""Fashion-MNIST: gzipped IDX files of a Debian package, or as torchvision downloads them."""

from __future__ import annotations

import gzip
import hashlib
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.errors import UserError, require
from .torchvision_download import Splits, downloading


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
class IdxDataset:
    """Where a set of IDX files comes from and what it must hold.

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

    @property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of the decompressed content by file name."""
        return {file.name: file.sha256 for files in self.splits.values() for file in files}

    def read(self) -> tuple[str, Splits]:
        """Where the set comes from, in words, and its images.

        Raises:
            UserError: it cannot be had, or does not match its checksums.
        """
        if self.debian_folder.is_dir():
            return f"Debian package {self.debian_package}", self.read_folder(self.debian_folder)
        with tempfile.TemporaryDirectory(prefix="midge-fetch-") as temporary:
            self._download(temporary)
            folder = Path(temporary) / self.torchvision / "raw"
            return f"torchvision.datasets.{self.torchvision}", self.read_folder(folder)

    def _download(self, root: str) -> None:
        package = f"install the Debian package ('apt-get install {self.debian_package}')"
        try:
            datasets = require("torchvision.datasets", "train")
        except UserError as error:
            raise UserError(f"{error} Or {package}.") from None
        with downloading(self.torchvision, f"{package} or try again with a network"):
            getattr(datasets, self.torchvision)(root=root, download=True)

    def read_folder(self, folder: Path) -> Splits:
        """Read and verify all files."""
        return {
            split: (read_idx(folder / images.name, images), read_idx(folder / labels.name, labels))
            for split, (images, labels) in self.splits.items()
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


FASHION_CLASSES = ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")

FASHION_MNIST = IdxDataset(
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
)
