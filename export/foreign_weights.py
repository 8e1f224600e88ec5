"""Weights that midge did not train: a plain timm state dict in a safetensors file, maybe with a head of one's own.

Nothing is read before names, shapes and types of all tensors agree with timm's network. What the weights do not say is
taken from timm: the preprocessing from its configuration for pretrained weights of that name, unless it is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UserError, require
from ..runtime.files import sha256_file
from ..runtime.preprocess import Preprocess
from ..runtime.progress import say
from ..runtime.torch_model import ModelSpec, build_model, skeleton
from ..runtime.weights import check_weights, describe_weights, list_weights, read_weights
from .config import ExportConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..runtime.weights import Described

MAX_LABELS_BYTES = 16 << 20
MAX_LABEL = 200


def load_foreign(config: ExportConfig) -> tuple[nn.Module, ModelSpec, dict[str, Any]]:
    """The network of ``--weights``, ``--backbone`` and ``--head``, in eval mode on the CPU.

    Returns:
        The network, how to rebuild it, and where it comes from.

    Raises:
        UserError: timm has no such network, or a file does not fit it.
    """
    assert config.weights is not None and config.backbone is not None  # as subject.check_subject says
    preprocess = find_preprocess(config)
    bare = find_spec(config.backbone, preprocess)
    given, what = list_weights(config.weights), f"weights '{config.weights}'"
    fits = f"timm's '{config.backbone}'"
    needed = describe_weights(skeleton(bare).state_dict())
    own = own_classes(config.backbone, given, needed)
    # BatchNorm's counter of batches, which some files lack, has no part in what the network computes.
    counters = {name for name in needed if name.endswith(".num_batches_tracked") and name not in given}
    with_head = needed if own is None else describe_weights(skeleton(replace(bare, num_classes=own)).state_dict())
    check_weights(what, given, _without(with_head, counters), fits, any_float=True)
    wants_classifier = config.kind in (None, "classifier")
    if config.head is not None:
        if own is not None:
            say(f"The classifier of '{config.weights}' gives way to that of --head.")
        spec, head = read_head(config.head, bare)
    elif own is not None and wants_classifier:
        spec, head = replace(bare, num_classes=own), read_weights(config.weights, with_head.keys() - needed.keys())
    elif config.kind == "classifier":
        raise UserError(f"'{config.weights}' has no classifier: give one with --head, or --kind embedding.")
    else:
        spec, head = bare, {}
    spec = replace(spec, labels=find_labels(config, spec.num_classes))
    state = read_weights(config.weights, needed.keys() - counters) | head
    model = build_model(spec)
    load_state(model, state)
    return model, spec, describe_files(config)


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load checked tensors, as the network's own types; what a checked file may lack stays as it is built."""
    own = model.state_dict()
    model.load_state_dict({**own, **{name: tensor.to(own[name].dtype) for name, tensor in state.items()}}, strict=True)


def find_preprocess(config: ExportConfig) -> Preprocess:
    """What the flags say, and else timm's configuration for pretrained weights of the backbone.

    Raises:
        UserError: a value is out of range, or that configuration is for images that are not square.
    """
    from ..train.backbones import check_known

    assert config.backbone is not None
    timm = check_known(config.backbone)
    known = timm.get_pretrained_cfg(config.backbone)
    facts = timm.data.resolve_data_config(pretrained_cfg=known.to_dict() if known else {})
    _, height, width = facts["input_size"]
    if config.image_px is None and height != width:
        raise UserError(f"timm's '{config.backbone}' takes {height} × {width} px: give a square with --image-px.")
    image_px = config.image_px or height
    if config.resize_px is None and facts["crop_mode"] != "center":
        say(f"timm resizes images for '{config.backbone}' by '{facts['crop_mode']}': midge crops the centre.")
    mean, std = config.mean or facts["mean"], config.std or facts["std"]
    return Preprocess(
        resize_px=config.resize_px or math.floor(image_px / facts["crop_pct"]),
        crop_px=image_px,
        interpolation=config.interpolation or facts["interpolation"],
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )


def find_spec(name: str, preprocess: Preprocess) -> ModelSpec:
    """The backbone, which gives features.

    Raises:
        UserError: timm has no such network, or not for this size.
    """
    import torch

    from ..train.backbones import feature_dim, find_backbone

    args = find_backbone(name, preprocess.crop_px).args
    timm = require("timm", "train")
    with torch.device("meta"):
        features = feature_dim(timm.create_model(name, pretrained=False, num_classes=0, **args))
    return ModelSpec(name, args, 0, features, (), preprocess, preprocess.crop_px, {"method": "weights of elsewhere"})


def own_classes(name: str, given: Described, needed: Described) -> int | None:
    """Number of classes of the classifier that a file holds beside the backbone's tensors; None without one."""
    timm = require("timm", "train")
    known = timm.get_pretrained_cfg(name)
    classifier = known.classifier if known else None
    first = classifier if isinstance(classifier, str) or not classifier else classifier[0]
    weight = f"{first}.weight"
    if weight not in given or weight in needed or not given[weight][0]:
        return None
    return given[weight][0][0]


def read_head(path: Path, bare: ModelSpec) -> tuple[ModelSpec, dict[str, torch.Tensor]]:
    """A linear classifier: ``weight`` (K, D) and ``bias`` (K,).

    Returns:
        The spec of the network with it, and its tensors by their names in that network.

    Raises:
        UserError: it is another one, or does not fit the backbone's features.
    """
    what = f"head '{path}'"
    given = list_weights(path)
    shape = given["weight"][0] if "weight" in given else ()
    classes = shape[0] if shape and shape[0] else 1
    if len(shape) == 2 and shape[1] != bare.feature_dim:
        raise UserError(
            f"The {what} is for {shape[1]} features, '{bare.timm_name}' gives {bare.feature_dim}: give its own head."
        )
    needed: Described = {"weight": ((classes, bare.feature_dim), "F32"), "bias": ((classes,), "F32")}
    check_weights(what, given, needed, "a linear classifier, which has weight (K, D) and bias (K,)", any_float=True)
    spec = replace(bare, num_classes=classes)
    full = describe_weights(skeleton(spec).state_dict())
    names = sorted(full.keys() - describe_weights(skeleton(bare).state_dict()).keys())
    shapes = {name: full[name][0] for name in names}
    if list(shapes.values()) != [(classes,), (classes, bare.feature_dim)] or not names[1].endswith("weight"):
        raise UserError(
            f"The classifier of '{bare.timm_name}' is no linear layer on its features: --head cannot stand for it."
        )
    tensors = read_weights(path, needed)
    return spec, {names[0]: tensors["bias"], names[1]: tensors["weight"]}


def find_labels(config: ExportConfig, num_classes: int) -> tuple[str, ...]:
    """Names of the classes: the lines of ``--labels-file``, else their numbers.

    Raises:
        UserError: it cannot be read, or has another number of lines than there are classes.
    """
    path = config.labels_file
    if path is None:
        return tuple(map(str, range(num_classes)))
    if not num_classes:
        raise UserError(f"--labels-file names classes, but features of '{config.weights}' have none: leave it out.")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_LABELS_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"The labels '{path}' cannot be read ({reason}): give a text file, a name per line.") from None
    if len(content) > MAX_LABELS_BYTES:
        raise UserError(f"The labels '{path}' are longer than {MAX_LABELS_BYTES} bytes: give one name per line.")
    labels = tuple(line.strip() for line in text.splitlines())
    for number, label in enumerate(labels, start=1):
        if not label or len(label) > MAX_LABEL or not label.isprintable():
            raise UserError(
                f"The labels '{path}' have {label[:80]!r} in line {number}: each must be a printable name of at most "
                f"{MAX_LABEL} characters."
            )
    if len(labels) != num_classes:
        raise UserError(f"The labels '{path}' are {len(labels)}, the network has {num_classes} classes: give one each.")
    return labels


def describe_files(config: ExportConfig) -> dict[str, Any]:
    """Names and hashes of the files, for the manifest; no path."""
    files = {"weights": config.weights, "head": config.head}
    named = {key: {"name": path.name, "sha256": sha256_file(path)} for key, path in files.items() if path is not None}
    return {"backbone": config.backbone, **named}


def _without(described: Described, names: set[str]) -> Described:
    return {name: value for name, value in described.items() if name not in names}
