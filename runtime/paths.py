"""The paths of millions of files: walked in sorted order, and held in one block of bytes."""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm"})
SPLIT_NAMES = frozenset({"train", "val", "validation", "test"})

BLOCK = 1 << 16  # paths that are unpacked at a time


class PackedPaths(Sequence[str]):
    """Paths one after the other in one block of bytes.

    A tuple of as many strings takes three times the memory, and every process that is forked with it soon has a copy of
    its own, because reading a string writes to its reference count.

    Args:
        data: the paths without separators, as the file system spells them.
        offsets: (N + 1,) int64, where each begins, and where the last one ends.
    """

    def __init__(self, data: bytes, offsets: np.ndarray) -> None:
        self.data = data
        self.offsets = offsets

    @staticmethod
    def pack(paths: Iterable[str]) -> PackedPaths:
        """Pack paths as they come."""
        data, offsets = bytearray(), array("q", [0])
        for path in paths:
            data += os.fsencode(path)
            offsets.append(len(data))
        return PackedPaths(bytes(data), np.array(offsets, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PackedPaths: ...
    def __getitem__(self, index: int | slice) -> str | PackedPaths:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        index = range(len(self))[index]  # negative ones count from the end, others raise IndexError
        return os.fsdecode(self.data[self.offsets[index] : self.offsets[index + 1]])

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), BLOCK):
            bounds = self.offsets[first : first + BLOCK + 1].tolist()
            for start, end in itertools.pairwise(bounds):
                yield os.fsdecode(self.data[start:end])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedPaths):
            return self.data == other.data and np.array_equal(self.offsets, other.offsets)
        if isinstance(other, tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PackedPaths({len(self)} paths, {len(self.data)} bytes)"

    def take(self, indices: Iterable[int] | np.ndarray) -> PackedPaths:
        """The paths at some indices, in that order."""
        chosen = np.fromiter(indices, dtype=np.int64)
        starts, ends = self.offsets[chosen], self.offsets[chosen + 1]
        offsets = np.concatenate([[0], np.cumsum(ends - starts)]).astype(np.int64)
        data = b"".join(self.data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
        return PackedPaths(data, offsets)


def walk(root: Path) -> Iterator[str]:
    """Relative POSIX paths of the files below a folder, in the order in which ``sorted`` would put them.

    Hidden files and folders are left out; links to folders are followed, once. Only the names of the folders on the way
    to the current file are held.
    """
    here = str(root)
    open_folders = [(here, "", *_open_folder(here, frozenset()))]
    while open_folders:
        folder, prefix, ancestors, names = open_folders[-1]
        name = next(names, None)
        if name is None:
            open_folders.pop()
        elif name.endswith("/"):
            below = f"{folder}/{name[:-1]}"
            open_folders.append((below, prefix + name, *_open_folder(below, ancestors)))
        else:
            yield prefix + name


def _open_folder(
    folder: str, ancestors: frozenset[tuple[int, int]]
) -> tuple[frozenset[tuple[int, int]], Iterator[str]]:
    """The folders above what is in a folder, and the names in it: sorted, those of folders with a slash behind.

    The slash makes the order that of whole paths: ``a-b/x`` comes before ``a/x``.
    """
    status = Path(folder).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a folder that it lies in
        return ancestors, iter(())
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                names.append(f"{entry.name}/")
            # A dangling link is listed, so that it is found unreadable; a pipe is not: reading it would block.
            elif entry.is_file() or (entry.is_symlink() and not Path(entry.path).exists()):
                names.append(entry.name)
    names.sort()
    return ancestors | {identity}, iter(names)


def extension(path: str) -> str:
    """The extension of a path in small letters, without its dot."""
    return os.path.splitext(path)[1].lower()[1:]  # noqa: PTH122 - a Path for each of a million files is slow
