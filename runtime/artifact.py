"""An artifact folder: the variants of one network, the manifest that describes them, and the golden pack.

``manifest.json`` names every file with its size and SHA-256. A folder may come from elsewhere: nothing in it is used
before the manifest has been checked field by field, every path has been found to stay inside the folder, and every
file has the size and then the hash that the manifest says.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError, unknown_name
from .fields import Fields
from .files import read_json, sha256_file, write_json
from .golden import check_golden
from .preprocess import MAX_PX, Preprocess

SCHEMA = 1
KINDS = ("classifier", "embedding")
MANIFEST = "manifest.json"

REFERENCE = "torch-fp32"
"""The variant that every other is compared with; part of every artifact that midge writes."""

# Target (the first word of a variant's name) -> runtime.
RUNTIMES = {
    "torch": "torch",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
}

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)  # becomes part of the paths of records
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
        model: absolute path of the file that the runtime loads.
        size_bytes: size of all its files.
        sha256: of the list of its files, each with its own hash.
        note: what a reader should know about it; may be empty.
    """

    name: str
    model: Path
    size_bytes: int
    sha256: str
    note: str


@dataclass(frozen=True)
class Artifact:
    """A checked artifact folder.

    Attributes:
        path: the folder.
        name: its name, safe in file names.
        kind: ``"classifier"`` (gives logits) or ``"embedding"`` (gives features).
        input_name: the network's input.
        input_shape: (batch, 3, H, W), float32.
        output_name: the network's output.
        output_shape: (batch, K), float32.
        preprocess: from an image to the input.
        labels: names of the K classes; () where they have none.
        variants: by name.
        golden: absolute path of the golden pack (:mod:`.golden`).
        manifest: the whole JSON object.
    """

    path: Path
    name: str
    kind: str
    input_name: str
    input_shape: tuple[int, ...]
    output_name: str
    output_shape: tuple[int, ...]
    preprocess: Preprocess
    labels: tuple[str, ...]
    variants: dict[str, Variant]
    golden: Path
    manifest: dict[str, Any]


def variant_runtime(variant: str) -> str:
    """The runtime of a variant, e.g. ``"onnxruntime"`` of ``"onnx-int8-u8"``.

    Raises:
        UserError: no runtime is known for its target.
    """
    target = variant.partition("-")[0]
    if target not in RUNTIMES:
        raise unknown_name("target", target, RUNTIMES)
    return RUNTIMES[target]


def load_artifact(path: Path) -> Artifact:
    """Read and check an artifact folder, hashing every file that its manifest names.

    Raises:
        UserError: there is none, its manifest is damaged or of a later schema, or a file is missing or was changed.
    """
    path = Path(path)
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(f"No artifact at '{path}': it {found}. Give the folder that 'midge export' wrote.")
    what = f"manifest '{path / MANIFEST}'"
    fields = Fields(read_json(path / MANIFEST, "manifest"), what)
    fields.schema(SCHEMA)
    name = fields.text("name")
    if not NAME.fullmatch(name):
        raise fields.wrong("name", name, "letters, digits, '.', '_', '-', at most 100 of them")
    kind = fields.choice("kind", KINDS)
    preprocess = Preprocess.from_json(fields.object("preprocess"), f"{what}, preprocess")
    input_name, input_shape = _tensor(fields.fields("input"), dimensions=4)
    output_name, output_shape = _tensor(fields.fields("output"), dimensions=2)
    _check_shapes(fields, preprocess, input_shape, output_shape)
    labels = fields.texts("labels")
    if labels and len(labels) != output_shape[1]:
        raise fields.wrong("labels", labels, f"one name for each of the {output_shape[1]} outputs, or empty")
    variants = _variants(path, fields.fields("variants"))
    golden = _checked_file(path, fields.fields("golden").text("path"), fields.fields("golden"))
    check_golden(golden, input_shape, output_shape)
    if fields.value.get("calibration") is not None:
        calibration = fields.fields("calibration")
        _checked_file(path, calibration.text("path"), calibration)
    for key in ("origin", "tools"):
        fields.object(key)
    return Artifact(
        path=path,
        name=name,
        kind=kind,
        input_name=input_name,
        input_shape=input_shape,
        output_name=output_name,
        output_shape=output_shape,
        preprocess=preprocess,
        labels=labels,
        variants=variants,
        golden=golden,
        manifest=fields.value,
    )


def _tensor(fields: Fields, dimensions: int) -> tuple[str, tuple[int, ...]]:
    return fields.text("name", 200), fields.integers("shape", 1, 1_000_000, [dimensions])


def _check_shapes(
    fields: Fields, preprocess: Preprocess, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> None:
    batch, channels, height, width = input_shape
    if batch > MAX_BATCH or channels != 3 or not height == width == preprocess.crop_px <= MAX_PX:
        crop = preprocess.crop_px
        raise fields.wrong("input", list(input_shape), f"[batch, 3, {crop}, {crop}] with a batch up to {MAX_BATCH}")
    fields.fields("input").choice("dtype", ["float32"])
    if output_shape[0] != batch:
        raise fields.wrong("output", list(output_shape), f"[{batch}, K], as the input's batch is {batch}")


def _variants(folder: Path, fields: Fields) -> dict[str, Variant]:
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
    if model not in files.value:
        raise fields.wrong("model", model, "one of its files")
    for path in files.value:
        _checked_file(folder, path, files.fields(path))
    return Variant(
        name=name,
        model=folder.resolve() / model,
        size_bytes=sum(file["size_bytes"] for file in files.value.values()),
        sha256=_list_sha256(files.value),
        note=fields.text("note"),
    )


def _list_sha256(files: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{file['sha256']}  {path}\n" for path, file in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _checked_file(folder: Path, relative: str, fields: Fields) -> Path:
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


def write_manifest(
    folder: Path,
    *,
    name: str,
    kind: str,
    input_shape: Sequence[int],
    output_shape: Sequence[int],
    preprocess: Preprocess,
    labels: Sequence[str],
    models: Mapping[str, str],
    notes: Mapping[str, str],
    origin: Mapping[str, Any],
    tools: Mapping[str, str],
    input_name: str = "image",
    output_name: str = "logits",
) -> None:
    """Describe what lies in ``folder`` and write ``manifest.json``, which is then read back and checked.

    A variant's files are all those in the folder of its name. ``golden.npz`` must be there, ``calibration.json`` may.

    Args:
        folder: the artifact, usually inside ``atomic_folder``.
        name: its name.
        kind: ``"classifier"`` or ``"embedding"``.
        input_shape: (batch, 3, H, W).
        output_shape: (batch, K).
        preprocess: from an image to the input.
        labels: names of the K classes, or empty.
        models: variant -> path of its model, relative to ``folder``, e.g. ``"onnx-fp32/model.onnx"``.
        notes: variant -> note; "" where there is none.
        origin: run, hash of its config, data fingerprint, version of midge.
        tools: package -> version.
        input_name: the network's input.
        output_name: the network's output.
    """

    def describe(path: Path) -> dict[str, Any]:
        return {"sha256": sha256_file(path), "size_bytes": path.stat().st_size}

    variants = {}
    for variant, model in models.items():
        paths = sorted(path for path in (folder / variant).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): describe(path) for path in paths}
        variants[variant] = {"model": model, "files": files, "note": notes.get(variant, "")}
    calibration = folder / "calibration.json"
    manifest = {
        "schema": SCHEMA,
        "name": name,
        "kind": kind,
        "input": {"name": input_name, "shape": list(input_shape), "dtype": "float32"},
        "output": {"name": output_name, "shape": list(output_shape)},
        "preprocess": preprocess.to_json(),
        "labels": list(labels),
        "variants": variants,
        "golden": {"path": "golden.npz", **describe(folder / "golden.npz")},
        "calibration": {"path": "calibration.json", **describe(calibration)} if calibration.exists() else None,
        "origin": dict(origin),
        "tools": dict(tools),
    }
    write_json(folder / MANIFEST, manifest)
    load_artifact(folder)
