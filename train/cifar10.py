"""CIFAR-10, as torchvision downloads it."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.errors import UserError, require
from ..runtime.files import sha256_file
from .torchvision_download import Splits, downloading


@dataclass(frozen=True)
class CifarDataset:
    """What the download must hold.

    Attributes:
        sha256: of the archive, by its name. Its files are pickles, so nothing in it is opened before that is checked.
        counts: number of images of each split.
        classes: class folder of each label.
        licence: SPDX name; NOASSERTION, for its authors state none.
    """

    sha256: dict[str, str]
    counts: dict[str, int]
    classes: tuple[str, ...]
    licence: str = "NOASSERTION"

    def read(self) -> tuple[str, Splits]:
        """Where the set comes from, in words, and its images.

        Raises:
            UserError: it cannot be had, or does not match its checksums.
        """
        datasets = require("torchvision.datasets", "train")
        cifar = datasets.CIFAR10
        temporary = tempfile.TemporaryDirectory(prefix="midge-fetch-")
        with temporary as root, downloading("CIFAR10", "try again with a network"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of the arrays that Python 2 has pickled
            datasets.utils.download_url(cifar.url, root, cifar.filename, cifar.tgz_md5)
            self._check(Path(root) / cifar.filename)
            parts = {split: cifar(root, train=split == "train", download=True) for split in self.counts}
        splits = {split: (part.data, np.array(part.targets, dtype=np.int64)) for split, part in parts.items()}
        if {split: len(images) for split, (images, _) in splits.items()} != self.counts:
            raise UserError("The download of CIFAR10 does not hold the images it should: fetch it again.")
        return "torchvision.datasets.CIFAR10", splits

    def _check(self, archive: Path) -> None:
        expected = self.sha256[archive.name]
        if (found := sha256_file(archive)) != expected:
            raise UserError(f"'{archive.name}' has the SHA-256 {found}, not {expected}: fetch it again.")


CIFAR10 = CifarDataset(
    sha256={"cifar-10-python.tar.gz": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"},
    counts={"train": 50_000, "test": 10_000},
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
