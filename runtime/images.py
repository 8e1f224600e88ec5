"""Folders of images: list them, read them, label them by folder, and fingerprint them.

A folder in the ImageFolder layout (``<class>/<anything>/x.png``, two classes or more) gives labels; any other nesting
gives the images alone. Hidden files and folders are ignored; links to folders are followed.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .decode import UnreadableImageError, load_image
from .errors import UserError
from .files import sha256_file
from .progress import say

__all__ = [
    "ImageList",
    "UnreadableBudget",
    "UnreadableImageError",
    "content_hash",
    "fingerprint",
    "list_images",
    "load_image",
]

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm"})
SPLIT_NAMES = frozenset({"train", "val", "validation", "test"})

FINGERPRINT_FILES = 256


class UnreadableBudget:
    """Counts the distinct images that had to be skipped, and stops the work when they are too many.

    Args:
        max_share: largest share of unreadable images that is put up with, 0..1.
        total: number of images of which the share is taken.
    """

    def __init__(self, max_share: float, total: int) -> None:
        self.max_share = max_share
        self.total = total
        self.paths: set[Path] = set()

    def skip(self, error: UnreadableImageError) -> None:
        """Count and name an image the first time it is met.

        Raises:
            UserError: the share of unreadable images is now above ``max_share``.
        """
        if error.path in self.paths:
            return
        self.paths.add(error.path)
        say(f"Skipped '{error.path}': {error.reason}.")
        share = len(self.paths) / self.total
        if share > self.max_share:
            raise UserError(
                f"{len(self.paths)} of {self.total} images are unreadable ({share:.1%}, allowed {self.max_share:.1%}), "
                f"the last one '{error.path}': {error.reason}. List them with 'midge data check' and remove them."
            )


@dataclass(frozen=True, eq=False)
class ImageList:
    """Images below one folder, and their labels where it has the ImageFolder layout.

    Attributes:
        root: the folder.
        paths: POSIX paths relative to ``root``, sorted as :func:`list_images` returns them.
        labels: (N,) int64 indices into ``classes``, or None.
        classes: names of the class folders, sorted; () without labels. Two folders may hold different classes: match
            them by name, not by index.
    """

    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """Path of one image."""
        return self.root / self.paths[index]

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageList:
        """The images at ``indices``, in that order, with the same classes."""
        labels = None if self.labels is None else self.labels[np.asarray(indices, dtype=np.int64)]
        return ImageList(self.root, tuple(self.paths[i] for i in indices), labels, self.classes)


def list_images(root: Path, limit: int | None = None, seed: int = 0) -> ImageList:
    """List the images below a folder.

    Args:
        root: folder of images, of any nesting.
        limit: take a random subset of so many images (all where there are fewer), each class in proportion.
        seed: seed of that subset.

    Raises:
        UserError: no such folder, no image in it, or it holds splits (train, test, …) of which one must be named.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"No folder at '{root}': check the path, or fetch a known set with 'midge data fetch'.")
    if not root.is_dir():
        raise UserError(f"'{root}' is a file: give the folder that holds the images.")
    if limit is not None and limit < 1:
        raise UserError(f"Cannot take {limit} images: the limit must be at least 1.")
    files = list(_walk(root))
    paths = sorted(path for path in files if _extension(path) in EXTENSIONS)
    if not paths:
        raise UserError(_describe_no_images(root, files))
    folders = {path.partition("/")[0] if "/" in path else "" for path in paths}
    if {folder.lower() for folder in folders} <= SPLIT_NAMES:
        raise UserError(
            f"'{root}' holds the splits {', '.join(sorted(folders))}: name one of them, "
            f"e.g. '{root / sorted(folders)[-1]}'."
        )
    classes, labels = (), None
    if "" not in folders and len(folders) > 1:
        classes = tuple(sorted(folders))
        index = {name: i for i, name in enumerate(classes)}
        labels = np.array([index[path.partition("/")[0]] for path in paths], dtype=np.int64)
    images = ImageList(root, tuple(paths), labels, classes)
    return images if limit is None or limit >= len(images) else images.take(_subset(images, limit, seed))


def _walk(root: Path) -> Iterator[str]:
    """Relative POSIX paths of the files below ``root``, unsorted."""
    stack: list[tuple[str, str, frozenset[tuple[int, int]]]] = [(str(root), "", frozenset())]
    while stack:
        folder, prefix, ancestors = stack.pop()
        status = Path(folder).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:  # a link to a folder that it lies in
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    stack.append((entry.path, f"{prefix}{entry.name}/", ancestors | {identity}))
                # A dangling link is listed, so that it is found unreadable; a pipe is not: reading it would block.
                elif entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
                    yield prefix + entry.name


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()[1:]  # noqa: PTH122 - a Path for each of a million files is slow


def _describe_no_images(root: Path, files: Sequence[str]) -> str:
    allowed = f"images end in {', '.join(f'.{extension}' for extension in sorted(EXTENSIONS))}"
    if not files:
        return f"'{root}' is an empty folder: put images into it ({allowed})."
    found = Counter(f".{_extension(path)}" if _extension(path) else "no extension" for path in files)
    listed = ", ".join(f"{count} × {name}" for name, count in found.most_common(3))
    return f"'{root}' holds {len(files)} files but no image ({listed}{', …' if len(found) > 3 else ''}): {allowed}."


def _subset(images: ImageList, limit: int, seed: int) -> np.ndarray:
    """Sorted indices of a random subset; each class in proportion, by largest remainder, ties broken at random."""
    rng = np.random.default_rng(seed)
    if images.labels is None:
        return np.sort(rng.permutation(len(images))[:limit])
    sizes = np.bincount(images.labels, minlength=len(images.classes))
    exact = sizes * limit / len(images)
    counts = np.floor(exact).astype(np.int64)
    remainders = exact - counts
    order = np.lexsort((rng.permutation(len(sizes)), -remainders))
    counts[order[: limit - counts.sum()]] += 1
    chosen = [rng.permutation(np.flatnonzero(images.labels == label))[:count] for label, count in enumerate(counts)]
    return np.sort(np.concatenate(chosen))


def fingerprint(images: ImageList) -> str:
    """Identify a set of images without reading all of it.

    It covers the classes; of each image the relative path, the label and the size in bytes, in the list's order; and
    the whole content of up to 256 images, evenly spaced. It does not cover the root, the times, nor the content of the
    other images.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in images.classes:
        digest.update(b"class\0" + os.fsencode(name) + b"\0")
    labels = [-1] * len(images) if images.labels is None else images.labels.tolist()
    root = str(images.root)
    for path, label in zip(images.paths, labels, strict=True):
        digest.update(b"%s\0%d\0%d\0" % (os.fsencode(path), label, _size_bytes(f"{root}/{path}")))
    for index in np.unique(np.linspace(0, len(images) - 1, FINGERPRINT_FILES).astype(np.int64)) if len(images) else ():
        if _size_bytes(f"{root}/{images.paths[index]}") >= 0:
            digest.update(bytes.fromhex(content_hash(images.path(index))))
    return digest.hexdigest()


def _size_bytes(path: str) -> int:
    """Size of a file, or -1 where there is none (a dangling link)."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a Path for each of a million files is slow
    except OSError:
        return -1


def content_hash(path: Path) -> str:
    """SHA-256 of an image file's bytes, as 64 hexadecimal digits."""
    return sha256_file(path)
