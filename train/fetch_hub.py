"""Image sets of the Hugging Face hub, by name, through its ``datasets`` library: their files, in tar shards."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..runtime.decode import FORMATS
from ..runtime.errors import UserError, require
from ..runtime.files import atomic_folder, refuse_existing
from ..runtime.images import list_images
from ..runtime.progress import Bar
from .pack import Sample, write_shards
from .source_file import read_source, write_source

SHARD_BYTES = 256 << 20
KINDS = {"JPEG": "jpg", "DIB": "bmp", "TIFF": "tif"}  # extensions that are not the format's name


@dataclass(frozen=True)
class HubDataset:
    """An image set of the hub.

    Attributes:
        repository: its name there, or a local folder in the same format.
        licence: SPDX name.
        splits: split of the hub -> folder to write; splits without labels are left out.
        image: column of the image.
        label: column of the class.
    """

    repository: str
    licence: str
    splits: dict[str, str]
    image: str = "image"
    label: str = "label"


HUB_DATASETS = {
    "imagenet-1k": HubDataset(
        "ILSVRC/imagenet-1k", "LicenseRef-ImageNet-terms", {"train": "train", "validation": "validation"}
    ),
}


def fetch_hub(name: str, dataset: HubDataset, out: Path) -> tuple[dict[str, int], bool]:
    """Write a set as a folder of shards per split, unless it is there.

    Returns:
        Number of images of each split, and whether they have been fetched now.

    Raises:
        UserError: it cannot be had (no access, no network), is not in the expected format, or the folder is taken.
    """
    if source := read_source(out, name, {"repository": dataset.repository}):
        counts = {folder: len(list_images(out / folder)) for folder in dataset.splits.values()}
        if counts != source.get("counts"):
            raise UserError(f"'{out}' does not hold all images of {name}: remove it and fetch it again.")
        return counts, False
    refuse_existing(out)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    datasets = require("datasets", "hub")
    with atomic_folder(out) as partial:
        counts = {}
        for split, folder in dataset.splits.items():
            (partial / folder).mkdir()
            samples = read_samples(datasets, name, dataset, split)
            counts[folder] = len(write_shards(partial / folder, samples, SHARD_BYTES).paths)
        described = {"repository": dataset.repository, "counts": counts}
        write_source(partial, name, f"Hugging Face hub, {dataset.repository}", dataset.licence, described)
    return counts, True


def read_samples(datasets: Any, name: str, dataset: HubDataset, split: str) -> Iterator[Sample]:
    """The images of one split with their labels, as files; they are streamed and not decoded."""
    with hub_errors(name):
        rows = datasets.load_dataset(dataset.repository, split=split, streaming=True)
        features = rows.features or {}
    image: Any = features.get(dataset.image)
    label: Any = features.get(dataset.label)
    if not isinstance(image, datasets.Image) or not isinstance(label, datasets.ClassLabel):
        raise UserError(
            f"'{dataset.repository}' has no column '{dataset.image}' of images and '{dataset.label}' of classes: "
            f"its columns are {', '.join(features) or 'none'}."
        )
    folders = class_folders(label.names or [])
    rows = iter(rows.cast_column(dataset.image, datasets.Image(decode=False)))
    with Bar(f"Fetching {name}, {split}") as bar:
        for index in range(1 << 62):
            with hub_errors(name):
                if (row := next(rows, None)) is None:
                    return
                data = row[dataset.image]["bytes"] or Path(row[dataset.image]["path"]).read_bytes()
            if not 0 <= (number := row[dataset.label]) < len(folders):
                raise UserError(f"Image {index} of the split '{split}' of '{dataset.repository}' has no class.")
            yield Sample(f"{folders[number]}/{index:08}.{image_kind(data)}", data, number)
            bar.advance()


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn the errors of the hub's libraries into one line that names the way out.

    Raises:
        UserError: the set cannot be had.
    """
    try:
        yield
    except Exception as error:  # of datasets, huggingface_hub, fsspec, pyarrow, httpx, …: they have no class in common
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{name} cannot be had from the Hugging Face hub ({reason[:300].rstrip('.')}): check the network, accept "
            "the set's terms on its page there, and log in with 'hf auth login'."
        ) from None


def class_folders(names: list[str]) -> list[str]:
    """Folder of each class: its number, so that they sort as they are numbered and differ, and its first name."""
    digits = len(str(len(names) - 1))
    slugs = (re.sub(r"[^a-z0-9]+", "-", name.partition(",")[0].lower()).strip("-") for name in names)
    return [f"{number:0{digits}}-{slug}" for number, slug in enumerate(slugs)]


def image_kind(data: bytes) -> str:
    """Extension of an image file by its content; jpg where it is none, so that it is found unreadable."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return KINDS.get(image.format or "", (image.format or "").lower())
    except Exception:  # a damaged file may raise anything inside a decoder
        return "jpg"
