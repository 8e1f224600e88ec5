"""A timm network that gives its feature maps at several strides, as detectors and segmenters want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn


def take_feature_maps(network: Any, strides: Sequence[int]) -> nn.Module:
    """A network that gives maps instead of a vector; what none of them needs is cut off.

    Args:
        network: of timm, whose ``forward_intermediates`` gives them: the last map of each stride, not normalized, as of
            timm's ``features_only``. It is changed.
        strides: px of the image per px of a map, rising.

    Returns:
        (N, 3, H, W) -> a tuple of (N, C, H / stride, W / stride), one for each stride; in the mode of the network.

    Raises:
        UserError: the network has no map of a stride, or gives none.
    """
    from torch import nn

    info = getattr(network, "feature_info", ())
    places = {stride: place for place, stride in enumerate(_reductions(info))}
    if not places or not hasattr(network, "forward_intermediates"):
        raise UserError("timm gives no feature maps of this network: choose another backbone.")
    if missing := [stride for stride in strides if stride not in places]:
        known = " ".join(map(str, sorted(places)))
        raise UserError(f"The network has no feature map of stride {missing[0]}: choose of --strides {known}.")
    indices = [places[stride] for stride in strides]
    if hasattr(network, "prune_intermediate_layers"):
        network.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)

    class FeatureMaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.train(network.training)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            maps = self.network.forward_intermediates(images, indices=indices, intermediates_only=True)
            return tuple(maps)

    return FeatureMaps()


def _reductions(info: Any) -> list[int]:
    """Stride of each map that timm knows of, from the first layer to the last."""
    return info.reduction() if hasattr(info, "reduction") else [entry["reduction"] for entry in info]
