"""Backbones: any timm network without its classifier, fit for views of two sizes, and the arguments that rebuild it."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ..runtime.errors import UserError, require

# timm's modules; what is in neither runs as a CNN.
RESNETS = ("resnet",)
VITS = ("vision_transformer", "deit")
# Those that start residual branches at zero, unless told not to.
ZERO_INIT = ("byobnet", "cspnet", "regnet", "res2net", "resnest", "resnet", "resnetv2", "sknet")


@dataclass(frozen=True)
class Backbone:
    """A timm network that is known to exist, before it is built.

    Attributes:
        name: timm's.
        family: ``"cnn"`` or ``"vit"``: decides which view policy holds.
        patch_px: side of a ViT's patches, px, of which the view sizes must be multiples; 1 for a CNN.
        args: arguments of ``timm.create_model`` that rebuild the network for one input size.
        training_args: what comes on top for pretraining and changes neither the weights' names nor their shapes.
    """

    name: str
    family: str
    patch_px: int
    args: dict[str, Any]
    training_args: dict[str, Any]

    def build(self, drop_path: float = 0.0) -> nn.Module:
        """A randomly initialized network, in train mode: (N, 3, h, w) -> (N, feature_dim), for any h, w that fit.

        Args:
            drop_path: probability of dropping a residual branch.

        Raises:
            UserError: the network does not take these arguments.
        """
        args = {**self.args, **self.training_args} | ({"drop_path_rate": drop_path} if drop_path else {})
        return _create(self.name, args)

    def refused(self, sizes: Iterable[int]) -> list[int]:
        """Those sides of images, px, that the network cannot take; nothing is computed."""
        with torch.device("meta"):
            network = self.build()

            def takes(px: int) -> bool:
                try:
                    network(torch.empty(2, 3, px, px))
                except Exception:  # which one depends on the network's own code
                    return False
                return True

            return [px for px in sizes if not takes(px)]

    def check_views(self, sizes: Iterable[int]) -> None:
        """Refuse views that the network cannot take.

        Args:
            sizes: sides of the views, px.

        Raises:
            UserError: it is made for images of another size.
        """
        for px in self.refused(sizes):
            way_out = f"give --local-px {self.args['img_size']}" if "img_size" in self.args else "give another size"
            raise UserError(
                f"'{self.name}' cannot take views of {px} px, it is bound to its own size: {way_out}, or choose "
                "another backbone."
            )


def find_backbone(
    name: str, image_px: int, channels: Sequence[int] | None = None, patch_px: int | None = None
) -> Backbone:
    """Look up a timm network.

    Args:
        name: timm's, e.g. ``"resnet18"`` or ``"vit_tiny_patch16_224"``.
        image_px: side of the input, px.
        channels: channels of a ResNet's stages, or None for its own.
        patch_px: side of a ViT's patches, px, or None for its own.

    Raises:
        UserError: timm has no such network, or it takes no channels, or no patch size.
    """
    timm = check_known(name)
    is_resnet = timm.models.is_model_in_modules(name, RESNETS)
    if channels is not None and not is_resnet:
        raise UserError(f"--channels is for ResNets: '{name}' takes none.")
    if timm.models.is_model_in_modules(name, VITS):
        args = {"img_size": image_px} | ({} if patch_px is None else {"patch_size": patch_px})
        training_args = {"dynamic_img_size": True}  # the position embedding is interpolated for the local views
        with torch.device("meta"):
            own: Any = _create(name, args | training_args)
        return Backbone(name, "vit", own.patch_embed.patch_size[0], args, training_args)
    if patch_px is not None:
        raise UserError(f"--patch-px is for ViTs: '{name}' takes none.")
    # timm starts a ResNet's residual branches at zero; torchvision's, which the paper used, do not. So untrained, its
    # features are also much poorer than those of the network that one would compare with.
    training_args = {"zero_init_last": False} if timm.models.is_model_in_modules(name, ZERO_INIT) else {}
    backbone = Backbone(name, "cnn", 1, {} if channels is None else {"channels": tuple(channels)}, training_args)
    if backbone.refused([image_px]):  # its attention has a table of positions for one size of image
        sized = replace(backbone, args={**backbone.args, "img_size": image_px})
        with contextlib.suppress(UserError):
            return backbone if sized.refused([image_px]) else sized
    return backbone


def check_known(name: str) -> Any:
    """timm, which has such a network.

    Raises:
        UserError: it has not, or is not installed.
    """
    timm = require("timm", "train")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists what there is."
        raise UserError(f"Unknown backbone '{name}': {hint}")
    return timm


def _create(name: str, args: dict[str, Any]) -> nn.Module:
    timm = require("timm", "train")
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **args)
    except Exception as error:  # which one depends on the network's own code
        given = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise UserError(f"timm cannot build '{name}' with {given}: {str(error).splitlines()[0]}.") from error


def feature_dim(network: nn.Module) -> int:
    """Length of the feature vector that a timm network without classifier gives."""
    return getattr(network, "head_hidden_size", None) or network.num_features  # type: ignore[return-value]


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a network normalizes by the statistics of a batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


Head = TypeVar("Head", bound=nn.Module)


class MultiCropNetwork(nn.Module, Generic[Head]):
    """A backbone and a projection head for views of several sizes.

    Views of one size pass the backbone together, then all embeddings together pass the head: so the backbone's batch
    normalization sees each size by itself, the head's sees all views.

    Args:
        backbone: (M, 3, h, w) -> (M, D).
        head: (M, D) -> (M, K).
        freeze_batch_norm: the backbone's batch normalization keeps its statistics, in every mode.
    """

    head: Head

    def __init__(self, backbone: nn.Module, head: Head, freeze_batch_norm: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.freeze_batch_norm = freeze_batch_norm
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Switch to training, all but batch normalization that is to keep its statistics."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Embed and project.

        Args:
            groups: views of one size each: (M_i, 3, h_i, w_i).

        Returns:
            Embeddings (sum M_i, D) and outputs (sum M_i, K), in the order of the groups.
        """
        embeddings = torch.cat([self.backbone(views) for views in groups])
        return embeddings, self.head(embeddings)
