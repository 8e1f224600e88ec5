"""Index tar shards of any origin by scanning their headers once; their labels come from ``.cls`` members or folders."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import UserError
from .files import sha256_file
from .paths import EXTENSIONS, SPLIT_NAMES, PackedPaths, extension
from .progress import Bar, say
from .shard_index import ShardIndex, write_index
from .shards import Shard, Shards
from .tar_scan import Member, clean_name, scan_tar

LABEL_EXTENSION = "cls"
MAX_LABEL_BYTES = 256


@dataclass
class Codes:
    """Names met for many images, each kept once.

    Attributes:
        names: name -> its code, in the order met.
        codes: the code of each image, -1 where it has none.
    """

    names: dict[str, int] = field(default_factory=dict)
    codes: array[int] = field(default_factory=lambda: array("q"))

    def append(self, name: str | None) -> None:
        """Note the name of the next image."""
        self.codes.append(-1 if name is None else self.names.setdefault(name, len(self.names)))


def index_shards(
    root: Path, files: Sequence[str], with_sha256: bool = False, urls: Mapping[str, str] | None = None
) -> ShardIndex:
    """Index the images in some shards, and keep the index beside them where the folder can be written.

    Args:
        root: folder of the shards.
        files: names of the tars in it.
        with_sha256: read all their bytes too, so that a change can be found.
        urls: where tars can be downloaded again, by name.

    Raises:
        UserError: one is no tar or damaged, or they hold no image.
    """
    shards: list[Shard] = []
    names: list[PackedPaths] = []
    number, offsets, sizes = array("i"), array("q"), array("q")
    folders, texts = Codes(), Codes()
    with Bar("Indexing shards", len(files)) as bar:
        for file in files:
            path = root / file
            images, labels = _scan_shard(path)
            sha256 = sha256_file(path) if with_sha256 else None
            for member in images:
                offsets.append(member.offset)
                sizes.append(member.size)
                folder = member.name.partition("/")[0] if "/" in member.name else ""
                folders.append(folder if member.size >= 0 else None)
                texts.append(labels.get(sample_key(member.name)) if member.size >= 0 else None)
            number.extend([len(shards)] * len(images))
            names.append(PackedPaths.pack(member.name for member in images))
            shards.append(Shard(file, path.stat().st_size, sha256, (urls or {}).get(file)))
            bar.advance()
    table = Shards(root, tuple(shards), np.array(number, np.int32), np.array(offsets, np.int64), np.array(sizes))
    if not len(table.number):
        raise UserError(f"The tar shards in '{root}' hold no image.")
    labels, classes = choose_labels(folders, texts, table.sizes >= 0)
    index = ShardIndex(PackedPaths.pack(_distinct(names, files)), labels, classes, table)
    try:
        write_index(index)
    except OSError as error:
        say(f"The index of the shards in '{root}' is not kept ({error.strerror}): it is made anew each time.")
    return index


def _scan_shard(path: Path) -> tuple[list[Member], dict[str, str]]:
    """The images of a tar, and the text of its labels by the key of their sample."""
    scan = scan_tar(path)
    images, labels = [], {}
    with path.open("rb") as file:
        for member in scan.members:
            if any(part.startswith(".") and part != ".." for part in member.name.split("/")):
                continue
            kind = extension(member.name)
            if kind in EXTENSIONS:
                images.append(member)
            elif kind == LABEL_EXTENSION and 0 < member.size <= MAX_LABEL_BYTES:
                text = os.pread(file.fileno(), member.size, member.offset).decode("utf-8", "replace")
                labels[sample_key(member.name)] = clean_name(text.strip())
    if not scan.whole:
        say(f"The shard '{path}' has no end mark: it may be cut off, after {len(images)} images.")
    return images, labels


def sample_key(name: str) -> str:
    """What the members of one WebDataset sample have in common: the path up to the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def choose_labels(folders: Codes, texts: Codes, usable: np.ndarray) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels from the ``.cls`` members where all images have one, else from ``<class>/<image>``, else none.

    Where folders and ``.cls`` say the same, the classes have the folders' names: ``.cls`` often holds but a number.
    Folders that are named like splits are no classes.

    Args:
        folders: first folder of each image, "" without one.
        texts: ``.cls`` of each image.
        usable: (N,) bool, images that are not refused; the others get the label 0, which nothing reads.

    Returns:
        (N,) int64 labels and the sorted names of the classes, or None and ().
    """
    by_folder, by_text = (np.array(codes.codes, dtype=np.int64)[usable] for codes in (folders, texts))
    splits = {name.lower() for name in folders.names} <= SPLIT_NAMES
    named_folders = "" not in folders.names and len(folders.names) > 1 and not splits
    if len(texts.names) > 1 and (by_text >= 0).all():
        pairs = np.unique(by_text * len(folders.names) + by_folder)
        same = len(pairs) == len(texts.names) == len(folders.names)
        chosen = folders if named_folders and same else texts
    elif named_folders:
        chosen = folders
    else:
        return None, ()
    ordered = sorted(chosen.names)
    if chosen is texts and all(name.isascii() and name.isdigit() for name in ordered):
        ordered.sort(key=int)
    position = np.zeros(len(ordered) + 1, dtype=np.int64)  # the last for the refused, whose code is -1
    position[[chosen.names[name] for name in ordered]] = np.arange(len(ordered))
    codes = np.where(usable, np.array(chosen.codes, dtype=np.int64), -1)
    return position[codes], tuple(ordered)


def _distinct(names: Sequence[PackedPaths], files: Sequence[str]) -> Iterator[str]:
    """The paths of the images: the members' names, behind that of their shard where two members have the same."""
    hashes = array("q")
    for part in names:
        for name in part:
            hashes.append(
                int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big", signed=True)
            )
    repeated = len(np.unique(np.array(hashes))) < len(hashes)
    for part, file in zip(names, files, strict=True):
        for name in part:
            yield f"{file}/{name}" if repeated else name
