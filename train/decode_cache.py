"""Decoded images in one memory-mapped file, for data that is read hundreds of times.

A cache is a folder: ``pixels.bin`` (image after image, (H, W, 3) uint8), ``index.npy`` (where each lies, and its
CRC-32) and ``cache.json`` (whose it is). Its size is said first; it is made beside its place and renamed, so that it is
whole or absent. One process makes it while the others wait; all then read the same pages of memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL

from ..runtime.decode import UnreadableImageError, image_size
from ..runtime.errors import UserError
from ..runtime.files import atomic_folder, read_json, sha256_file, write_json
from ..runtime.images import ImageList
from ..runtime.progress import Bar, say
from .jpeg import load

SCHEMA = 1
ENTRY = np.dtype([("offset", "<u8"), ("height", "<u4"), ("width", "<u4"), ("crc32", "<u4")])
AHEAD = 64  # images that wait to be written


class DecodeCache:
    """The decoded images of one data set; a reader in each process, and what it unpickles to in another one.

    Args:
        folder: of the cache, whole and fitting.
        images: that it was made from.
        min_px: as they were decoded.
        unreadable: index of each image that cannot be decoded -> why.
    """

    def __init__(self, folder: Path, images: ImageList, min_px: int | None, unreadable: dict[int, str]) -> None:
        self.folder, self.images, self.min_px, self.unreadable = folder, images, min_px, unreadable
        self.index = np.load(folder / "index.npy", allow_pickle=False)
        self._checked = np.zeros(len(self.index), dtype=bool)
        # Copy on write: torch takes only writable memory without a warning, and nothing comes to the file.
        self._pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="c")

    def __reduce__(self) -> tuple[type[DecodeCache], tuple[Any, ...]]:
        return type(self), (self.folder, self.images, self.min_px, self.unreadable)

    def load(self, index: int) -> np.ndarray:
        """One image, as :func:`~midge.runtime.decode.load_image` gives it: (H, W, 3) uint8, not to be written to.

        The first time that a process reads an image it compares the checksum; where it is wrong, the image is decoded
        from its file.

        Raises:
            UnreadableImageError: the image cannot be decoded.
        """
        if index in self.unreadable:
            raise UnreadableImageError(self.images.path(index), self.unreadable[index])
        entry = self.index[index]
        start, height, width = int(entry["offset"]), int(entry["height"]), int(entry["width"])
        pixels = self._pixels[start : start + height * width * 3]
        if not self._checked[index]:
            if zlib.crc32(pixels.data) != entry["crc32"]:
                path = self.images.path(index)
                say(f"The decode cache '{self.folder}' is damaged at '{path}': this image is decoded from its file.")
                return load(self.images, index, self.min_px)
            self._checked[index] = True
        return pixels.view(np.ndarray).reshape(height, width, 3)


def open_cache(folder: Path, images: ImageList, fingerprint: str, min_px: int | None, workers: int) -> DecodeCache:
    """Open the cache of some images, after making it where there is none.

    Args:
        folder: where it is, or is to be.
        images: the data.
        fingerprint: of the images.
        min_px: as :func:`~midge.runtime.decode.load_image` takes it.
        workers: threads that decode.

    Raises:
        UserError: it is of other images, of another version, or damaged; what is there is no cache; the disk is full.
    """
    identity = {
        "schema": SCHEMA,
        "data_fingerprint": fingerprint,
        "min_px": min_px,
        "versions": {"pillow": PIL.__version__, "opencv": cv2.__version__},  # others may decode to other bits
    }
    if not (folder / "cache.json").exists():
        with _locked(folder):
            if not (folder / "cache.json").exists():  # another process may have made it meanwhile
                _make(folder, images, identity, min_px, max(1, workers))
    description = _check(folder, identity)
    unreadable = {int(index): str(reason) for index, reason in description["unreadable"].items()}
    return DecodeCache(folder, images, min_px, unreadable)


def _check(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The description of the cache in ``folder``, found to be that of ``identity`` and to have its sizes and hash."""
    description = read_json(folder / "cache.json", "description of the decode cache", max_bytes=1 << 30)
    there = description if isinstance(description, dict) else {}
    named = {
        "data_fingerprint": "other images",
        "min_px": "another --decode-px or --image-px",
        "versions": "other versions of Pillow or OpenCV",
        "schema": "another version of midge",
    }
    differing = [text for name, text in named.items() if there.get(name) != identity[name]]
    if differing:
        raise UserError(
            f"The decode cache '{folder}' was made from {', '.join(differing)}: "
            "give another folder with --decode-cache, or remove this one."
        )
    try:
        sizes = [(folder / name).stat().st_size for name in ("pixels.bin", "index.npy")]
        whole = sizes == there["bytes"] and sha256_file(folder / "index.npy") == there["index_sha256"]
    except (OSError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"The decode cache '{folder}' is damaged: remove it, and it will be made again.")
    return there


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock that stands for making the cache; the system releases it with the process, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Waiting for another process that makes the decode cache '{folder}'.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(folder: Path, images: ImageList, identity: dict[str, Any], min_px: int | None, threads: int) -> None:
    """Decode all images into a new cache."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"'{folder}' holds something that is no decode cache: give another --decode-cache.")
    for left_over in folder.parent.glob(f".{folder.name}.partial-*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(left_over, ignore_errors=True)
    with ThreadPoolExecutor(threads) as pool:
        _check_space(folder, pool, images, min_px)
        try:
            with atomic_folder(folder) as partial:
                index, unreadable = _write_pixels(partial / "pixels.bin", pool, images, min_px)
                np.save(partial / "index.npy", index, allow_pickle=False)
                sizes = [(partial / name).stat().st_size for name in ("pixels.bin", "index.npy")]
                hashes = {"bytes": sizes, "index_sha256": sha256_file(partial / "index.npy")}
                write_json(partial / "cache.json", {**identity, **hashes, "unreadable": unreadable})
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                f"The disk is full: the decode cache '{folder}' could not be written, and nothing of it is left. "
                "Make room, give another --decode-cache, or leave it out."
            ) from None


def _check_space(folder: Path, pool: ThreadPoolExecutor, images: ImageList, min_px: int | None) -> None:
    """Say how large the cache will be, by the headers of the images, and refuse what does not fit."""

    def size_bytes(index: int) -> int:
        try:
            height, width = image_size(images.source(index), min_px)
        except UnreadableImageError:  # of a shard that cannot be read; told when it is decoded
            return 0
        return height * width * 3

    sizes = _map_ahead(pool, size_bytes, range(len(images)))
    needed, free = sum(sizes), shutil.disk_usage(folder.parent).free
    room = f"{needed / 1e9:.2f} GB of {free / 1e9:.2f} GB free"
    say(f"The decode cache '{folder}' takes {room}, for {len(images)} images.")
    if needed > free:
        raise UserError(
            f"The decode cache '{folder}' needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free there: "
            "give another --decode-cache, a smaller --decode-px, or leave it out."
        )


def _write_pixels(
    path: Path, pool: ThreadPoolExecutor, images: ImageList, min_px: int | None
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode and write; the index and the reasons of the unreadable images, which get no pixels."""

    def decode(index: int) -> np.ndarray | UnreadableImageError:
        try:
            return load(images, index, min_px)
        except UnreadableImageError as error:
            return error

    index, unreadable, offset = np.zeros(len(images), dtype=ENTRY), {}, 0
    with path.open("wb") as file, Bar("Decoding", len(images)) as bar:
        for number, image in enumerate(_map_ahead(pool, decode, range(len(images)))):
            if isinstance(image, UnreadableImageError):
                unreadable[number] = image.reason
            else:
                image = np.ascontiguousarray(image)
                index[number] = (offset, *image.shape[:2], zlib.crc32(image.data))
                file.write(image.data)
                offset += image.nbytes
            bar.advance()
        file.flush()
        os.fsync(file.fileno())
    if not offset:
        raise UserError(f"None of the {len(images)} images in '{images.root}' can be decoded: {unreadable[0]}.")
    return index, unreadable


def _map_ahead(pool: ThreadPoolExecutor, function: Any, items: Any) -> Iterator[Any]:
    """``pool.map`` that holds few results: the next items are begun as the first ones are taken."""
    iterator = iter(items)
    waiting = [pool.submit(function, item) for item in islice(iterator, AHEAD)]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(function, item) for item in islice(iterator, 1)]
