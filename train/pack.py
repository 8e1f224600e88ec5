"""``midge data pack``: images as tar shards in the WebDataset format, with an index for random access.

The members are the image files as they are, in the list's order, each followed by its label as ``.cls``. Equal images
give equal bytes: no time, owner or permission is taken over. A run that was started on the folder goes on with its
shards, and the other way round, because neither order nor content differ; but not where images had to be renamed for
WebDataset's sake, which is said.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..runtime.decode import UnreadableImageError
from ..runtime.errors import UserError, check_ranges
from ..runtime.files import atomic_folder, refuse_existing
from ..runtime.images import ImageList, list_images
from ..runtime.progress import Bar, say
from ..runtime.shard_index import ShardIndex, shard_files
from ..runtime.shard_scan import LABEL_EXTENSION, index_shards, sample_key
from ..runtime.shards import MAX_IMAGE_BYTES
from .data_config import PackConfig

RANGES = {"shard_mib": (1, 1 << 20)}


class Sample(NamedTuple):
    """An image on its way into a shard.

    Attributes:
        name: of its member, relative.
        data: the image file's bytes.
        label: index of its class, or None.
    """

    name: str
    data: bytes
    label: int | None


def pack(config: PackConfig) -> int:
    """Pack the images of a folder.

    Returns:
        1 where some images could not be read and were left out, else 0.

    Raises:
        UserError: there is no folder, no image in it, or the folder to write is taken.
    """
    check_ranges(config, RANGES)
    refuse_existing(config.out)
    images = list_images(config.data)
    with atomic_folder(config.out) as partial, Bar("Packing images", len(images)) as bar:
        index = write_shards(partial, _samples(images, bar), config.shard_mib << 20)
    left_out = len(images) - len(index.paths)
    result = {
        "schema": 1,
        "out": str(config.out),
        "images": len(index.paths),
        "left_out": left_out,
        "classes": len(index.classes),
        "shards": len(index.shards.shards),
        "bytes": sum(shard.size_bytes for shard in index.shards.shards),
    }
    if config.json:
        print(json.dumps(result))
    else:
        labels = f"{result['classes']} classes" if index.classes else "no labels"
        print(
            f"{result['images']} images ({labels}) are in {result['shards']} shards "
            f"of {result['bytes'] / 2**20:.1f} MiB in '{config.out}'."
        )
    return 1 if left_out else 0


def write_shards(folder: Path, samples: Iterable[Sample], shard_bytes: int) -> ShardIndex:
    """Write samples as ``shard-000000.tar``, … and index them.

    Args:
        folder: existing and empty.
        samples: in the order of the index.
        shard_bytes: a shard is closed once it has reached this size.

    Raises:
        UserError: there is no sample.
    """
    number, archive = 0, None
    try:
        for sample in samples:
            if archive is None:
                path = folder / f"shard-{number:06}.tar"
                archive = tarfile.open(path, "x", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - the next ones too
            _add(archive, sample.name, sample.data)
            if sample.label is not None:
                _add(archive, f"{sample_key(sample.name)}.{LABEL_EXTENSION}", b"%d" % sample.label)
            if archive.offset >= shard_bytes:
                archive.close()
                number, archive = number + 1, None
    finally:
        if archive is not None:
            archive.close()
    if not (files := shard_files(folder)):
        raise UserError("None of the images can be read: there is nothing to pack.")
    return index_shards(folder, files, with_sha256=True)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
    archive.members.clear()  # type: ignore[attr-defined]  # they are not needed again, and there may be millions


def _samples(images: ImageList, bar: Bar) -> Iterator[Sample]:
    """The images that can be read, as files; they are not decoded."""
    last_key, renamed = "", 0
    for index, path in enumerate(images.paths):
        bar.advance()
        try:
            data = _read(images, index)
        except UnreadableImageError as error:
            say(f"Left out '{error.path}': {error.reason}.")
            continue
        name = member_name(path, index, last_key)
        last_key = sample_key(name)
        renamed += name != path
        yield Sample(name, data, None if images.labels is None else int(images.labels[index]))
    if renamed:
        say(
            f"Renamed {renamed} of {len(images)} images, whose names WebDataset would cut or confuse: a run on the "
            "folder does not go on with these shards."
        )


def _read(images: ImageList, index: int) -> bytes:
    source = images.source(index)
    if isinstance(source, bytes):
        return source
    try:
        if (size := source.stat().st_size) > MAX_IMAGE_BYTES:
            raise UnreadableImageError(source, f"it has {size} bytes, more than the {MAX_IMAGE_BYTES} that are read")
        return source.read_bytes()
    except OSError as error:
        raise UnreadableImageError(source, error.strerror or str(error)) from None


def member_name(path: str, index: int, last_key: str) -> str:
    """The name of an image's member: its path, unless WebDataset would not tell it from its neighbour.

    WebDataset cuts a file's name at its first dot, and takes neighbours with the same rest for one sample. So an image
    that has more than one dot, or the same rest as the one before, gets a name with its number.

    Args:
        path: of the image.
        index: of the image.
        last_key: rest of the member before.
    """
    folder, slash, file = path.rpartition("/")
    stem, _, kind = file.rpartition(".")
    if "." in stem or sample_key(path) == last_key:
        return f"{folder}{slash}{stem.replace('.', '_')}-{index:09}.{kind}"
    return path
