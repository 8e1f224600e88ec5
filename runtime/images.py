"""Folders of images or of tar shards: list the images, read them, label them by folder, and fingerprint them.

A folder in the ImageFolder layout (``<class>/<anything>/x.png``, two classes or more) gives labels; any other nesting
gives the images alone. Hidden files and folders are ignored; links to folders are followed. A folder that holds tar
shards is the same to all who use the images: only :class:`ImageList` knows where they come from.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .decode import UnreadableImageError, load_image
from .errors import UserError
from .files import sha256_file
from .paths import EXTENSIONS, SPLIT_NAMES, PackedPaths, extension, walk
from .progress import say
from .shard_index import INDEX_FILE, read_index, shard_files
from .shard_scan import index_shards
from .shards import Shards

__all__ = [
    "ImageList",
    "UnreadableBudget",
    "UnreadableImageError",
    "content_hash",
    "fingerprint",
    "list_images",
    "load_image",
]


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

    What it holds of each image are bytes in arrays: worker processes share it, whatever the number of images.

    Attributes:
        root: the folder.
        paths: POSIX paths relative to ``root`` (of a member: in its shard), as :func:`list_images` orders them.
        labels: (N,) int64 indices into ``classes``, or None.
        classes: names of the class folders, sorted; () without labels. Two folders may hold different classes: match
            them by name, not by index.
        shards: where the images lie in tar shards, or None where each is a file.
    """

    root: Path
    paths: PackedPaths
    labels: np.ndarray | None
    classes: tuple[str, ...]
    shards: Shards | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """Path of one image; of a member of a shard, a name for messages: the shard's path, then the member's."""
        path = self.paths[index]
        if self.shards is None:
            return self.root / path
        return self.root / self.shards.shard_of(index).file / path.removeprefix(f"{self.shards.shard_of(index).file}/")

    def source(self, index: int) -> Path | bytes:
        """What one image is decoded from: its file, or its bytes where it lies in a shard.

        Raises:
            UnreadableImageError: its bytes cannot be had.
        """
        path = self.path(index)
        return path if self.shards is None else self.shards.read(index, path)

    def load(self, index: int) -> np.ndarray:
        """Decode one image: (H, W, 3) uint8 RGB.

        Raises:
            UnreadableImageError: it cannot be decoded.
        """
        return load_image(self.source(index), self.path(index))

    def size_bytes(self, index: int) -> int:
        """Size of one image's file, or below 0 where there is none (a dangling link, a refused member)."""
        return int(self.shards.sizes[index]) if self.shards is not None else _size_bytes(str(self.path(index)))

    def take(self, indices: Sequence[int] | np.ndarray) -> ImageList:
        """The images at ``indices``, in that order, with the same classes."""
        chosen = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        shards = None if self.shards is None else self.shards.take(chosen)
        return replace(self, paths=self.paths.take(chosen), labels=labels, shards=shards)


def list_images(root: Path, limit: int | None = None, seed: int = 0) -> ImageList:
    """List the images below a folder, sorted by path, or those in the tar shards of a folder, in the shards' order.

    Args:
        root: folder of images, of any nesting; or of tar shards, with or without an index.
        limit: take a random subset of so many images (all where there are fewer), each class in proportion.
        seed: seed of that subset.

    Raises:
        UserError: no such folder, no image in it, damaged shards, or it holds splits (train, test, …) of which one must
            be named.
    """
    root = Path(root)
    if address := re.match(r"(https?|pipe):", str(root)):
        raise UserError(
            f"'{root}' is an address: fetch its shards once with 'midge data fetch {address[0]}… --out FOLDER', "
            "and give that folder."
        )
    if not root.exists():
        raise UserError(f"No folder at '{root}': check the path, or fetch a known set with 'midge data fetch'.")
    if not root.is_dir():
        raise UserError(f"'{root}' is a file: give the folder that holds the images.")
    if limit is not None and limit < 1:
        raise UserError(f"Cannot take {limit} images: the limit must be at least 1.")
    images = _list_shards(root) if (root / INDEX_FILE).is_file() else _list_files(root)
    return images if limit is None else draw_subset(images, limit, seed)


def _list_shards(root: Path, files: Sequence[str] = ()) -> ImageList:
    """The images in the shards of a folder: those that its index lists, or those in ``files``, where it has none."""
    paths, labels, classes, shards = index_shards(root, files) if files else read_index(root)
    if files:
        say(f"Indexed {len(paths)} images in the shards of '{root}'.")
    return ImageList(root, paths, labels, classes, shards)


def _list_files(root: Path) -> ImageList:
    """The images below a folder that are files of their own; where there is none, those in the folder's tars."""
    folders, others = [], Counter()  # runs of images in the same folder of the first level; other files

    def images() -> Iterator[str]:
        for path in walk(root):
            if (kind := extension(path)) not in EXTENSIONS:
                others[kind] += 1
                continue
            folder = path.partition("/")[0] if "/" in path else ""
            if not folders or folders[-1][0] != folder:
                folders.append([folder, 0])
            folders[-1][1] += 1
            yield path

    paths = PackedPaths.pack(images())
    if not paths:
        if tars := shard_files(root):
            return _list_shards(root, tars)
        raise UserError(_describe_no_images(root, others))
    names = sorted({folder for folder, _ in folders})
    if {name.lower() for name in names} <= SPLIT_NAMES:
        raise UserError(f"'{root}' holds the splits {', '.join(names)}: name one of them, e.g. '{root / names[-1]}'.")
    if "" in names or len(names) < 2:
        return ImageList(root, paths, None, ())
    index = {name: i for i, name in enumerate(names)}
    labels = np.repeat([index[folder] for folder, _ in folders], [count for _, count in folders]).astype(np.int64)
    return ImageList(root, paths, labels, tuple(names))


def _describe_no_images(root: Path, found: Counter[str]) -> str:
    allowed = f"images end in {', '.join(f'.{kind}' for kind in sorted(EXTENSIONS))}"
    if not found:
        return f"'{root}' is an empty folder: put images into it ({allowed})."
    listed = ", ".join(f"{n} × {f'.{kind}' if kind else 'no extension'}" for kind, n in found.most_common(3))
    more = ", …" if len(found) > 3 else ""
    return f"'{root}' holds {found.total()} files but no image ({listed}{more}): {allowed}."


def draw_subset(images: ImageList, limit: int, seed: int) -> ImageList:
    """A random subset of ``limit`` images, all where there are fewer, in the list's order.

    Each class is there in proportion, by largest remainder, ties broken at random.
    """
    if limit >= len(images):
        return images
    rng = np.random.default_rng(seed)
    if images.labels is None:
        return images.take(np.sort(rng.permutation(len(images))[:limit]))
    sizes = np.bincount(images.labels, minlength=len(images.classes))
    exact = sizes * limit / len(images)
    counts = np.floor(exact).astype(np.int64)
    remainders = exact - counts
    order = np.lexsort((rng.permutation(len(sizes)), -remainders))
    counts[order[: limit - counts.sum()]] += 1
    chosen = [rng.permutation(np.flatnonzero(images.labels == label))[:count] for label, count in enumerate(counts)]
    return images.take(np.sort(np.concatenate(chosen)))


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
    labels = itertools.repeat(-1, len(images)) if images.labels is None else images.labels.tolist()
    root = str(images.root)
    for index, (path, label) in enumerate(zip(images.paths, labels, strict=True)):
        size = _size_bytes(f"{root}/{path}") if images.shards is None else images.shards.sizes[index]
        digest.update(b"%s\0%d\0%d\0" % (os.fsencode(path), label, size))
    for index in np.unique(np.linspace(0, len(images) - 1, FINGERPRINT_FILES).astype(np.int64)) if len(images) else ():
        if images.size_bytes(index) >= 0:
            digest.update(bytes.fromhex(content_hash(images.source(index))))
    return digest.hexdigest()


def _size_bytes(path: str) -> int:
    """Size of a file, or -1 where there is none (a dangling link)."""
    try:
        return os.stat(path).st_size  # noqa: PTH116 - a Path for each of a million files is slow
    except OSError:
        return -1


def content_hash(source: Path | bytes) -> str:
    """SHA-256 of an image file's bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256_file(source)
