"""What is exported: the network of a run, or weights that midge did not train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.artifact import KINDS
from ..runtime.errors import UserError, unknown_name
from ..runtime.feature_maps import take_feature_maps
from ..runtime.files import read_json, sha256_file
from ..runtime.torch_model import ModelSpec, load_model
from .config import ExportConfig

if TYPE_CHECKING:
    from torch import nn

OUTPUTS = {"classifier": "logits", "embedding": "features"}
STRIDES = (8, 16, 32)
OF_WEIGHTS = ("backbone", "head", "labels_file", "image_px", "resize_px", "interpolation", "mean", "std")
"""Flags that say what a run says itself."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A network that is to be exported.

    Attributes:
        model: in eval mode on the CPU.
        spec: how to rebuild it, its preprocessing and labels.
        kind: ``"classifier"``, ``"embedding"`` or ``"features"``.
        outputs: names of what it gives.
        origin: where it comes from, as JSON; no path and no time.
    """

    model: nn.Module
    spec: ModelSpec
    kind: str
    outputs: tuple[str, ...]
    origin: dict[str, Any]


def check_subject(config: ExportConfig) -> None:
    """Refuse flags that do not say what to export, before any work.

    Raises:
        UserError: there is not exactly one source, a flag belongs to the other one, or a file is missing.
    """
    if (config.run is None) == (config.weights is None):
        raise UserError("Give either a run folder or --weights FILE.safetensors, which is what is exported.")
    if config.kind is not None and config.kind not in KINDS:
        raise unknown_name("kind", config.kind, KINDS)
    if config.strides is not None and config.kind != "features":
        raise UserError("--strides goes with --kind features: a network gives one vector otherwise.")
    if config.run is not None:
        if given := [name for name in OF_WEIGHTS if getattr(config, name) is not None]:
            raise UserError(f"--{given[0].replace('_', '-')} goes with --weights: the run says it itself.")
        find_stem(config.run, config.kind)
        return
    if config.backbone is None:
        raise UserError("--weights needs --backbone, timm's name of the network, e.g. --backbone resnet18.")
    if config.data is None:
        raise UserError("--weights needs --data, a folder of images to calibrate on and to check the variants with.")
    if config.head is not None and config.kind not in (None, "classifier"):
        raise UserError(f"--head makes a classifier, not --kind {config.kind}: leave one of them out.")


def load_subject(config: ExportConfig) -> Subject:
    """Read what a checked configuration names.

    Raises:
        UserError: it is damaged or does not fit.
    """
    if config.run is None:
        from .foreign_weights import load_foreign

        model, spec, origin = load_foreign(config)
    else:
        stem = find_stem(config.run, config.kind)
        model, spec = load_model(config.run, stem)
        origin = describe_run(config.run, stem)
    if config.embed_preprocess:
        spec = replace(spec, preprocess=replace(spec.preprocess, embedded=True))
    if config.kind == "features":
        strides = tuple(sorted(set(config.strides or STRIDES)))
        spec = replace(spec, strides=strides)
        names = tuple(f"stride{stride}" for stride in strides)
        return Subject(take_feature_maps(model, strides), spec, "features", names, origin)
    kind = "classifier" if spec.num_classes else "embedding"
    return Subject(model, spec, kind, (OUTPUTS[kind],), origin)


def find_stem(run: Path, kind: str | None) -> str:
    """The network of a run: its classifier where there is one, unless the kind says otherwise, else its backbone.

    Raises:
        UserError: it has none, or not that one.
    """
    stems = {None: ("classifier", "backbone"), "classifier": ("classifier",)}.get(kind, ("backbone",))
    for stem in stems:
        if (run / f"{stem}.safetensors").is_file():
            return stem
    files = " nor ".join(f"{stem}.safetensors" for stem in stems)
    neither = "neither" if len(stems) > 1 else "no"
    raise UserError(f"'{run}' holds {neither} {files}: give the folder that 'midge pretrain' wrote.")


def describe_run(run: Path, stem: str) -> dict[str, Any]:
    """A run's name and what its configuration says of the code and the data."""
    config_path = run / "config.json"
    config = read_json(config_path, "run configuration") if config_path.exists() else {}
    known = config if isinstance(config, dict) else {}
    return {
        "run": run.resolve().name,
        "exported": stem,
        "config_sha256": sha256_file(config_path) if config_path.exists() else None,
        "git_commit": known.get("git_commit"),
        "data_fingerprint": known.get("data_fingerprint"),
    }
