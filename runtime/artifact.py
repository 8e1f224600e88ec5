"""An artifact folder: the variants of one network, the manifest that describes them, and the golden pack.

``manifest.json`` names every file with its size and SHA-256. A folder may come from elsewhere: nothing in it is used
before the manifest has been checked field by field, every path has been found to stay inside the folder, and every
file has the size and then the hash that the manifest says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError, unknown_name
from .fields import Fields
from .files import read_json, sha256_file, write_json
from .golden import Golden, check_golden, load_golden
from .manifest import Variant, check_input, checked_file, layout_of, read_outputs, read_tensor, read_variants
from .preprocess import Preprocess

SCHEMA = 2  # 1: one output, named "output"
KINDS = ("classifier", "embedding", "features")
MANIFEST = "manifest.json"

REFERENCE = "torch-fp32"
"""The variant that every other is compared with; part of every artifact that midge writes."""

# Target (the first word of a variant's name) -> runtime.
RUNTIMES = {
    "torch": "torch",
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "coreml": "coreml",
}

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)  # becomes part of the paths of records
MAX_OUTPUTS = 16


@dataclass(frozen=True)
class Artifact:
    """A checked artifact folder.

    Attributes:
        path: the folder.
        name: its name, safe in file names.
        kind: ``"classifier"`` (gives logits), ``"embedding"`` (gives a feature vector) or ``"features"`` (gives maps of
            features of several strides).
        input_name: the network's input.
        input_shape: (batch, 3, H, W) float32; or (batch, H, W, 3) uint8 where the preprocessing is embedded.
        outputs: name -> shape, float32: one of (batch, K), or of features one or more of (batch, C, h, w).
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
    outputs: dict[str, tuple[int, ...]]
    preprocess: Preprocess
    labels: tuple[str, ...]
    variants: dict[str, Variant]
    golden: Path
    manifest: dict[str, Any]

    @property
    def input_dtype(self) -> str:
        """Type of the input: ``"float32"`` or ``"uint8"``."""
        return self.preprocess.input_dtype

    @property
    def output_name(self) -> str:
        """Name of the first output."""
        return next(iter(self.outputs))

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the first output."""
        return self.outputs[self.output_name]

    def read_golden(self) -> Golden:
        """The golden pack.

        Raises:
            UserError: it is damaged, or holds values that are not finite.
        """
        return load_golden(self.golden, self.input_shape, *self.outputs.values(), input_dtype=self.input_dtype)


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
    schema = fields.schema(SCHEMA)
    name = fields.text("name")
    if not NAME.fullmatch(name):
        raise fields.wrong("name", name, "letters, digits, '.', '_', '-', at most 100 of them")
    kind = fields.choice("kind", KINDS)
    preprocess = Preprocess.from_json(fields.object("preprocess"), f"{what}, preprocess")
    input_name, input_shape = read_tensor(fields.fields("input"), dimensions=4)
    check_input(fields, preprocess, input_shape)
    if schema > 1:
        fields.fields("input").choice("layout", [layout_of(preprocess)])
    listed = [fields.fields("output")] if schema == 1 else fields.items("outputs", range(1, MAX_OUTPUTS + 1))
    outputs = read_outputs(fields, listed, kind, input_shape[0])
    labels = fields.texts("labels")
    num_classes = 0 if kind == "features" else next(iter(outputs.values()))[1]
    if labels and len(labels) != num_classes:
        raise fields.wrong("labels", labels, f"one name for each of the {num_classes} outputs, or empty")
    variants = read_variants(path, fields.fields("variants"))
    golden = checked_file(path, fields.fields("golden").text("path"), fields.fields("golden"))
    check_golden(golden, input_shape, *outputs.values(), input_dtype=preprocess.input_dtype)
    if fields.value.get("calibration") is not None:
        calibration = fields.fields("calibration")
        checked_file(path, calibration.text("path"), calibration)
    for key in ("origin", "tools"):
        fields.object(key)
    return Artifact(
        path=path,
        name=name,
        kind=kind,
        input_name=input_name,
        input_shape=input_shape,
        outputs=outputs,
        preprocess=preprocess,
        labels=labels,
        variants=variants,
        golden=golden,
        manifest=fields.value,
    )


def write_manifest(
    folder: Path,
    *,
    name: str,
    kind: str,
    input_shape: Sequence[int],
    outputs: Mapping[str, Sequence[int]],
    preprocess: Preprocess,
    labels: Sequence[str],
    models: Mapping[str, str],
    notes: Mapping[str, str],
    origin: Mapping[str, Any],
    tools: Mapping[str, str],
    input_name: str = "image",
    dynamic_batch: Collection[str] = (),
) -> None:
    """Describe what lies in ``folder`` and write ``manifest.json``, which is then read back and checked.

    A variant's files are all those in the folder of its name. ``golden.npz`` must be there, ``calibration.json`` may.

    Args:
        folder: the artifact, usually inside ``atomic_folder``.
        name: its name.
        kind: one of ``KINDS``.
        input_shape: (batch, 3, H, W), or (batch, H, W, 3) where the preprocessing is embedded.
        outputs: name -> shape: (batch, K), or of features (batch, C, h, w).
        preprocess: from an image to the input.
        labels: names of the K classes, or empty.
        models: variant -> path of its model, relative to ``folder``, e.g. ``"onnx-fp32/model.onnx"``.
        notes: variant -> note; "" where there is none.
        origin: run, hash of its config, data fingerprint, version of midge.
        tools: package -> version.
        input_name: the network's input.
        dynamic_batch: the variants that take any number of images at a time.
    """

    def describe(path: Path) -> dict[str, Any]:
        return {"sha256": sha256_file(path), "size_bytes": path.stat().st_size}

    variants = {}
    for variant, model in models.items():
        paths = sorted(path for path in (folder / variant).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): describe(path) for path in paths}
        variants[variant] = {"model": model, "files": files, "note": notes.get(variant, "")}
        if variant in dynamic_batch:
            variants[variant]["dynamic_batch"] = True
    calibration = folder / "calibration.json"
    manifest = {
        "schema": SCHEMA,
        "name": name,
        "kind": kind,
        "input": {
            "name": input_name,
            "shape": list(input_shape),
            "dtype": preprocess.input_dtype,
            "layout": layout_of(preprocess),
        },
        "outputs": [{"name": output, "shape": list(shape)} for output, shape in outputs.items()],
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
