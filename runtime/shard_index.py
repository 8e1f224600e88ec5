"""The index of a folder of tar shards, ``index.jsonl``: a first line about all of it, then one line per shard.

JSON by lines, because the index of millions of images is then read and checked shard by shard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .errors import UserError
from .files import atomic_file
from .paths import PackedPaths
from .shards import Shard, Shards
from .tar_scan import BLOCK_BYTES, REFUSED

INDEX_FILE = "index.jsonl"
SCHEMA = 1
MAX_LINE_BYTES = 256 << 20  # of one shard's line: some two million images

FILE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f.][^/\\\x00-\x1f\x7f]*\.tar")
ADDRESS = re.compile(r"https?://[^\s\x00-\x1f\x7f]+")


class ShardIndex(NamedTuple):
    """What ``index.jsonl`` says.

    Attributes:
        paths: of the images, unlike each other.
        labels: (N,) int64 indices into ``classes``, or None.
        classes: sorted names, () without labels.
        shards: where the images lie; ``number`` never decreases.
    """

    paths: PackedPaths
    labels: np.ndarray | None
    classes: tuple[str, ...]
    shards: Shards


def write_index(index: ShardIndex) -> None:
    """Write ``index.jsonl`` into the folder of the shards, atomically."""
    shards = index.shards
    bounds = np.searchsorted(shards.number, np.arange(len(shards.shards) + 1))
    head = {
        "schema": SCHEMA,
        "kind": "shards",
        "shards": len(shards.shards),
        "images": len(index.paths),
        "classes": list(index.classes),
    }
    with atomic_file(shards.root / INDEX_FILE) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        for number, shard in enumerate(shards.shards):
            part = slice(int(bounds[number]), int(bounds[number + 1]))
            line = {
                **shard._asdict(),
                "paths": list(index.paths[part]),
                "labels": None if index.labels is None else index.labels[part].tolist(),
                "offsets": shards.offsets[part].tolist(),
                "sizes": shards.sizes[part].tolist(),
            }
            file.write(json.dumps(line) + "\n")


def read_index(root: Path) -> ShardIndex:
    """Read the index of a folder of shards, which may be hostile.

    Raises:
        UserError: it is damaged, of a later schema, or the shards in the folder are not those it lists.
    """
    path = root / INDEX_FILE
    try:
        index = _parse(root, path)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(
            f"The index of shards '{path}' is damaged ({type(error).__name__}: {error}): "
            "remove it, and the shards are indexed again."
        ) from None
    _check_files(index.shards, path)
    return index


def _parse(root: Path, path: Path) -> ShardIndex:
    """Read an index; anything may be raised where it is damaged."""
    with path.open("rb") as file:
        head = _line(file)
        if head["kind"] != "shards" or type(head["schema"]) is not int:
            raise ValueError("it is of another kind")
        if head["schema"] > SCHEMA:
            raise UserError(
                f"The index of shards '{path}' has the schema {head['schema']}, this midge reads up to {SCHEMA}: "
                "update midge, or remove the index, and the shards are indexed again."
            )
        classes = tuple(_strings(head["classes"]))
        lines = [_read_shard(_line(file), len(classes)) for _ in range(_count(head["shards"]))]
        if file.read(1):
            raise ValueError("it goes on behind its end")
    counts = [len(line.offsets) for line in lines]
    if sum(counts) != head["images"] or not lines:
        raise ValueError(f"it lists {sum(counts)} images of {head['images']}")
    if len({line.shard.file for line in lines}) < len(lines):
        raise ValueError("it lists a shard twice")
    shards = Shards(
        root,
        tuple(line.shard for line in lines),
        np.repeat(np.arange(len(lines), dtype=np.int32), counts),
        np.concatenate([line.offsets for line in lines]),
        np.concatenate([line.sizes for line in lines]),
    )
    labels = np.concatenate([line.labels for line in lines]) if classes else None
    offsets = [line.paths.offsets[1:] for line in lines]
    ends = np.cumsum([0, *(len(line.paths.data) for line in lines)])[:-1]
    joined = np.concatenate([[0], *(o + e for o, e in zip(offsets, ends, strict=True))]).astype(np.int64)
    paths = PackedPaths(b"".join(line.paths.data for line in lines), joined)
    return ShardIndex(paths, labels, classes, shards)


class _ShardLine(NamedTuple):
    shard: Shard
    paths: PackedPaths
    labels: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def _read_shard(line: dict[str, Any], num_classes: int) -> _ShardLine:
    shard = Shard(line["file"], _count(line["size_bytes"]), line["sha256"], line["url"])
    if not FILE_NAME.fullmatch(shard.file):
        raise ValueError(f"{shard.file!r} is no name of a shard")
    if shard.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"{shard.sha256!r} is no SHA-256")
    if shard.url is not None and not ADDRESS.fullmatch(shard.url):
        raise ValueError(f"{shard.url!r} is no http address")
    offsets, sizes = _integers(line["offsets"]), _integers(line["sizes"])
    paths = PackedPaths.pack(_strings(line["paths"]))
    labels = _integers(line["labels"]) if num_classes else np.empty(0, dtype=np.int64)
    expected = (len(paths), len(paths), len(paths) if num_classes else 0)
    if (len(offsets), len(sizes), len(labels)) != expected:
        raise ValueError(f"'{shard.file}' lists {expected}, {(len(offsets), len(sizes), len(labels))} values")
    if ((offsets < BLOCK_BYTES) | (offsets > shard.size_bytes) | (sizes < min(REFUSED))).any():
        raise ValueError(f"'{shard.file}' has images outside of it")
    if ((labels < 0) | (labels >= max(num_classes, 1))).any():
        raise ValueError(f"'{shard.file}' has labels beyond the classes")
    return _ShardLine(shard, paths, labels, offsets, sizes)


def _line(file: BinaryIO) -> dict[str, Any]:
    line = file.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError("a line is no JSON object")
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no number of things")
    return value


def _integers(values: object) -> np.ndarray:
    """(N,) int64 from a JSON list of whole numbers."""
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise ValueError("a list of numbers is none")
    return np.array(values, dtype=np.int64)


def _strings(values: object) -> Sequence[str]:
    if not isinstance(values, list) or not set(map(type, values)) <= {str}:
        raise ValueError("a list of names is none")
    return values


def _check_files(shards: Shards, index: Path) -> None:
    """Refuse a folder whose shards are not those that were indexed.

    Raises:
        UserError: one is missing and has no address, has another size, or is not in the index.
    """
    for shard in shards.shards:
        try:
            found = (shards.root / shard.file).stat().st_size
        except FileNotFoundError:
            if shard.url is None:
                raise UserError(
                    f"The shard '{shards.root / shard.file}' is missing: put it back, or remove '{index}', "
                    "and the shards that are there are indexed."
                ) from None
            continue
        if found != shard.size_bytes:
            again = "remove it, and it is downloaded again" if shard.url else f"put it back, or remove '{index}'"
            raise UserError(f"In '{shards.root}' the {shard.describe_change(found)}: {again}.")
    if unknown := sorted(set(shard_files(shards.root)) - {shard.file for shard in shards.shards}):
        raise UserError(
            f"'{shards.root / unknown[0]}' is not in the index of the shards: remove '{index}', and all are indexed."
        )


def shard_files(root: Path) -> list[str]:
    """Names of the tars in a folder, sorted."""
    return sorted(path.name for path in root.glob("*.tar") if FILE_NAME.fullmatch(path.name) and path.is_file())
