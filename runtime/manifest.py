"""The parts of an artifact's manifest, each checked as it is read: a folder may come from elsewhere."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .fields import Fields
from .files import sha256_file
from .preprocess import Preprocess

VARIANT_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+", re.ASCII)
PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*", re.ASCII)
MAX_VARIANTS = 64
MAX_FILES = 1024
MAX_BATCH = 1024


@dataclass(frozen=True)
class Variant:
    """One form of the network, for one runtime.

    Attributes:
        name: ``<target>-<precision>``, e.g. ``"onnx-int8-u8"``.
        model: absolute path of the file or folder that the runtime loads.
        size_bytes: size of all its files.
        sha256: of the list of its files, each with its own hash.
        note: what a reader should know about it; may be empty.
        dynamic_batch: it takes any number of images at a time, not just the batch of the artifact.
    """

    name: str
    model: Path
    size_bytes: int
    sha256: str
    note: str
    dynamic_batch: bool = False


def read_tensor(fields: Fields, dimensions: int) -> tuple[str, tuple[int, ...]]:
    """Name and shape of an input or output."""
    name = fields.text("name", 200)
    if not name.isprintable():
        raise fields.wrong("name", name, "printable text")
    return name, fields.integers("shape", 1, 1_000_000, [dimensions])


def check_input(fields: Fields, preprocess: Preprocess, input_shape: tuple[int, ...]) -> None:
    """Refuse an input that is not what the preprocessing makes."""
    batch, *sides = input_shape
    if batch > MAX_BATCH or sides != list(preprocess.input_shape):
        allowed = ", ".join(map(str, preprocess.input_shape))
        raise fields.wrong("input", list(input_shape), f"[batch, {allowed}] with a batch up to {MAX_BATCH}")
    fields.fields("input").choice("dtype", [preprocess.input_dtype])


def layout_of(preprocess: Preprocess) -> str:
    """Order of the input's sides."""
    return "NHWC" if preprocess.embedded else "NCHW"


def read_outputs(fields: Fields, listed: Sequence[Fields], kind: str, batch: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the outputs of a kind of network."""
    if kind != "features" and len(listed) > 1:
        raise fields.wrong("outputs", [item.value for item in listed], f"one output, as the kind is {kind}")
    outputs = dict(read_tensor(item, dimensions=4 if kind == "features" else 2) for item in listed)
    if len(outputs) < len(listed):
        raise fields.wrong("outputs", [item.text("name") for item in listed], "of different names")
    for item, shape in zip(listed, outputs.values(), strict=True):
        if shape[0] != batch:
            raise item.wrong("shape", list(shape), f"[{batch}, …], as the input's batch is {batch}")
    return outputs


def read_variants(folder: Path, fields: Fields) -> dict[str, Variant]:
    """The variants, all files of which are checked."""
    if not 1 <= len(fields.value) <= MAX_VARIANTS:
        raise UserError(f"The {fields.what} holds {len(fields.value)} variants: 1 to {MAX_VARIANTS} are allowed.")
    variants = {}
    for name in fields.value:
        if not VARIANT_NAME.fullmatch(name) or len(name) > 100:
            raise UserError(f"The {fields.what} has the name {name[:120]!r}: it must be like 'onnx-int8-u8'.")
        variants[name] = _variant(folder, name, fields.fields(name))
    return variants


def _variant(folder: Path, name: str, fields: Fields) -> Variant:
    files = fields.fields("files")
    if len(files.value) > MAX_FILES:
        raise UserError(f"The {files.what} names {len(files.value)} files: at most {MAX_FILES} are allowed.")
    model = fields.text("model")
    inside = [path for path in files.value if path.startswith(f"{model}/")]
    if model not in files.value and not inside:
        raise fields.wrong("model", model, "one of its files, or a folder of them")
    for path in files.value:
        checked_file(folder, path, files.fields(path))
    for path in (folder.resolve() / model).rglob("*") if inside else ():
        if not path.is_dir() and path.relative_to(folder.resolve()).as_posix() not in inside:
            raise UserError(f"The artifact holds '{path}', which its manifest does not name: copy it again.")
    return Variant(
        name=name,
        model=folder.resolve() / model,
        size_bytes=sum(file["size_bytes"] for file in files.value.values()),
        sha256=_list_sha256(files.value),
        note=fields.text("note"),
        dynamic_batch=fields.flag("dynamic_batch", False),
    )


def _list_sha256(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{file['sha256']}  {path}\n" for path, file in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def checked_file(folder: Path, relative: str, fields: Fields) -> Path:
    """The absolute path of a file inside ``folder`` whose size and hash are as the manifest says."""
    if len(relative) > 500 or not all(PATH_PART.fullmatch(part) for part in relative.split("/")):
        raise UserError(
            f"The {fields.what} names the path {relative[:120]!r}: it must be a plain one inside the folder."
        )
    path = folder.resolve() / relative
    size_bytes, sha256 = fields.integer("size_bytes", 0, 2**53), fields.sha256("sha256")
    if path.resolve() != path:
        raise UserError(f"The artifact's file '{folder / relative}' is reached through a link: copy the file itself.")
    if not path.is_file():
        raise UserError(f"The artifact's file '{folder / relative}' is missing: copy or export the artifact again.")
    found = path.stat().st_size
    if found != size_bytes:
        raise UserError(
            f"The artifact's file '{folder / relative}' has {found} bytes, its manifest says {size_bytes}: "
            "copy or export the artifact again."
        )
    if sha256_file(path) != sha256:
        raise UserError(
            f"The artifact's file '{folder / relative}' was changed: its SHA-256 is not the manifest's. "
            "Copy or export the artifact again."
        )
    return path
