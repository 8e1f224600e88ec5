"""The configurations of ``midge data fetch``, ``check`` and ``pack`` (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class FetchConfig:
    """Fetch a known image set, one folder per split, or tar shards from an address."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """The image set: fashion-mnist, cifar10, imagenet-1k (of the Hugging Face hub, for those who have access), or the
    address of tar shards, e.g. 'http://host/train-{000000..000146}.tar' or 'pipe:ssh host cat train-{0..9}.tar'."""

    out: Path | None = None
    """Folder to write; default data/<name>, none for an address."""

    json: bool = False
    """Print one JSON document instead of text."""


@dataclass(frozen=True)
class CheckConfig:
    """Read every image of a folder; exit code 1 where some cannot be read."""

    data: Positional[Path]
    """Folder of images, of any nesting, or of tar shards."""

    json: bool = False
    """Print one JSON document instead of text."""


@dataclass(frozen=True)
class PackConfig:
    """Pack a folder of images into tar shards in the WebDataset format, which every command takes in its place."""

    data: Positional[Path]
    """Folder of images, of any nesting, or of tar shards."""

    out: Path
    """Folder to write: shard-000000.tar, …, and their index."""

    shard_mib: int = 256
    """Size at which a shard is closed, MiB."""

    json: bool = False
    """Print one JSON document instead of text."""
