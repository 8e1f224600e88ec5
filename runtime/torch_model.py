"""A network on disk: ``<stem>.safetensors`` (weights) and ``<stem>.json`` (how timm rebuilds it), without any pickle.

Both files may come from elsewhere. So the arguments for timm are plain JSON values from which nothing can be loaded or
fetched, and names, shapes and types of all weights are compared with the network before memory is spent on either.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError, require
from .feature_maps import take_feature_maps
from .fields import Fields
from .files import atomic_file, read_json, sha256_file, write_json
from .preprocess import MAX_PX, Preprocess
from .weights import check_weights, describe_weights, list_weights, read_weights

if TYPE_CHECKING:
    from torch import nn

SCHEMA = 1

# What would load or fetch weights, change the kind of network, or is decided by other fields of the spec.
REFUSED_ARGS = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "device",
        "dtype",
        "exportable",
        "features_only",
        "in_chans",
        "kwargs_filter",
        "model_name",
        "no_jit",
        "num_classes",
        "out_indices",
        "scriptable",
    }
)
MAX_ARG = 65_536
MAX_ARG_DEPTH = 4
FITS = "the description beside it"


@dataclass(frozen=True)
class ModelSpec:
    """How to rebuild a network, and what its numbers mean.

    Attributes:
        timm_name: name of the architecture, e.g. ``"resnet18"``.
        timm_args: keyword arguments for ``timm.create_model``: numbers, strings, booleans, None, and tuples of them.
        num_classes: outputs of the classifier; 0 for a backbone, which gives features.
        feature_dim: length of the feature vector before the classifier.
        labels: names of the classes; () where there are none.
        preprocess: from an image to the network's input.
        input_px: side of the square input; equal to ``preprocess.crop_px``.
        trained: free-form facts of how it was trained, as JSON; no time and no path.
        strides: of the feature maps that the network gives, rising; () where it gives one vector.
    """

    timm_name: str
    timm_args: dict[str, Any]
    num_classes: int
    feature_dim: int
    labels: tuple[str, ...]
    preprocess: Preprocess
    input_px: int
    trained: dict[str, Any] = field(default_factory=dict)
    strides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w+(\.\w+)?", self.timm_name, re.ASCII):
            raise UserError(f"The timm name {self.timm_name!r} is refused: give a plain name such as 'resnet18'.")
        for key in self.timm_args:
            if key in REFUSED_ARGS or key.startswith("pretrained"):
                raise UserError(f"The timm argument '{key}' is refused: a network is rebuilt from plain sizes only.")
        object.__setattr__(self, "timm_args", {key: _plain(key, value) for key, value in self.timm_args.items()})
        if self.labels and len(self.labels) != self.num_classes:
            raise UserError(f"The network has {self.num_classes} classes but {len(self.labels)} labels.")
        if list(self.strides) != sorted(set(self.strides)) or (self.strides and self.num_classes):
            raise UserError(f"The strides {self.strides} of feature maps must rise, and leave no classifier.")
        if self.input_px != self.preprocess.crop_px:
            raise UserError(
                f"The network takes {self.input_px} px but images are cropped to {self.preprocess.crop_px}."
            )

    def to_json(self) -> dict[str, Any]:
        """The JSON object that :meth:`from_json` reads."""
        strides = {"strides": list(self.strides)} if self.strides else {}
        return {
            "schema": SCHEMA,
            "timm_name": self.timm_name,
            "timm_args": {key: _listed(value) for key, value in self.timm_args.items()},
            "num_classes": self.num_classes,
            "feature_dim": self.feature_dim,
            "labels": list(self.labels),
            "preprocess": self.preprocess.to_json(),
            "input_px": self.input_px,
            "trained": self.trained,
            **strides,
        }

    @classmethod
    def from_json(cls, value: object, what: str = "model description") -> ModelSpec:
        """Read what :meth:`to_json` wrote.

        Args:
            value: the JSON object, which may be hostile.
            what: its name for errors.

        Raises:
            UserError: a field is missing, out of range or refused.
        """
        fields = Fields(value, what)
        fields.schema(SCHEMA)
        return cls(
            timm_name=fields.text("timm_name", 200),
            timm_args=fields.object("timm_args"),
            num_classes=fields.integer("num_classes", 0, 1_000_000),
            feature_dim=fields.integer("feature_dim", 1, 1_000_000),
            labels=fields.texts("labels"),
            preprocess=Preprocess.from_json(fields.object("preprocess"), f"{what}, preprocess"),
            input_px=fields.integer("input_px", 1, MAX_PX),
            trained=fields.object("trained"),
            strides=fields.integers("strides", 1, MAX_PX, range(1, 17)) if "strides" in fields.value else (),
        )


def _plain(key: str, value: Any, depth: int = 0) -> Any:
    """An argument for timm: a bounded scalar or nested tuples of them."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) and abs(value) <= MAX_ARG:
        return value
    if isinstance(value, (list, tuple)) and len(value) <= MAX_ARG and depth < MAX_ARG_DEPTH:
        return tuple(_plain(key, item, depth + 1) for item in value)
    shown = repr(value)[:80]
    raise UserError(
        f"The timm argument '{key}' is {shown}: allowed are strings, booleans, numbers up to {MAX_ARG}, lists of them."
    )


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def build_model(spec: ModelSpec) -> nn.Module:
    """The network of a spec with random weights, in eval mode on the CPU.

    Raises:
        UserError: torch or timm is not installed, timm has no such network, or it does not take these arguments.
    """
    require("torch", "train")
    timm = require("timm", "train")
    if not timm.is_model(spec.timm_name):
        near = difflib.get_close_matches(spec.timm_name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists what there is."
        raise UserError(f"Unknown timm model '{spec.timm_name}': {hint}")
    try:
        model = timm.create_model(spec.timm_name, pretrained=False, num_classes=spec.num_classes, **spec.timm_args)
    except Exception as error:  # which one depends on the network's own code and on arguments that may be hostile
        given = ", ".join(f"{key}={value!r}" for key, value in spec.timm_args.items()) or "no arguments"
        raise UserError(f"timm cannot build '{spec.timm_name}' with {given}: {_one_line(error)}.") from error
    feature_dim = getattr(model, "head_hidden_size", None) or model.num_features
    if feature_dim != spec.feature_dim:
        raise UserError(f"The network '{spec.timm_name}' has {feature_dim} features, its spec says {spec.feature_dim}.")
    return take_feature_maps(model.eval(), spec.strides) if spec.strides else model.eval()


def save_model(folder: Path, stem: str, model: nn.Module, spec: ModelSpec) -> None:
    """Write ``<stem>.safetensors`` and ``<stem>.json``; equal weights and specs give equal bytes.

    Args:
        folder: where to; made if need be.
        stem: ``"backbone"``, ``"classifier"`` or ``"model"``.
        model: the network, on any device, in any mode.
        spec: its description; ``build_model(spec)`` must give the same tensors by name, shape and type.

    Raises:
        UserError: the network is not the one of the spec.
    """
    safetensors = require("safetensors.torch", "train")
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    expected = describe_weights(skeleton(spec).state_dict())
    check_weights(f"network to be saved as '{stem}'", describe_weights(weights), expected, FITS)
    weights_path = folder / f"{stem}.safetensors"
    with atomic_file(weights_path) as partial:
        # No metadata: their order in the file is not reproducible. And no save_file: a full disk is no OSError there.
        partial.write_bytes(safetensors.save(weights))
    write_json(folder / f"{stem}.json", {**spec.to_json(), "weights_sha256": sha256_file(weights_path)})


def load_model(folder: Path, stem: str) -> tuple[nn.Module, ModelSpec]:
    """Read what :func:`save_model` wrote.

    Args:
        folder: where it lies.
        stem: ``"backbone"``, ``"classifier"`` or ``"model"``.

    Returns:
        The network in eval mode on the CPU, and its description.

    Raises:
        UserError: a file is missing, damaged, or does not fit the network.
    """
    what = f"model description '{folder / stem}.json'"
    description = read_json(folder / f"{stem}.json", "model description")
    spec = ModelSpec.from_json(description, what)
    expected_sha256 = Fields(description, what).sha256("weights_sha256")
    path = folder / f"{stem}.safetensors"
    if not path.is_file():
        raise UserError(f"No weights at '{path}': check the path.")
    if sha256_file(path) != expected_sha256:
        raise UserError(f"The weights '{path}' are not those that '{stem}.json' describes: copy or make both again.")
    expected = describe_weights(skeleton(spec).state_dict())
    check_weights(f"weights '{path}'", list_weights(path), expected, FITS)
    weights = read_weights(path, expected)
    model = build_model(spec)
    model.load_state_dict(weights, strict=True)
    return model, spec


def skeleton(spec: ModelSpec) -> nn.Module:
    """The network without memory behind it: a spec that asks for terabytes costs nothing here."""
    import torch

    with torch.device("meta"):
        return build_model(spec)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
