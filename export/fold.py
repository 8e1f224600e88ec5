"""Batch normalization folded into the convolutions before it, in torch: what every target is converted from.

Folding first, instead of leaving it to each converter, gives all targets the same weights under the same names, so that
weights which were changed for quantization find their way back; and no converter meets a batch normalization, which one
of them traces in training mode (coremltools on timm's ``BatchNormAct2d``: batch statistics in the graph, silently).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UserError, require

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx, nn


def fold_batch_norm(model: nn.Module, input_px: int) -> nn.Module:
    """A copy of a network without the batch normalizations that follow a convolution alone.

    Args:
        model: in eval mode on the CPU; (N, 3, H, W) float32 -> (N, K).
        input_px: H and W.

    Returns:
        The network that computes the same, in eval mode. A batch normalization stays where the convolution's output is
        used elsewhere too, or the module is none that can be taken apart.

    Raises:
        UserError: torch cannot follow the network's code.
    """
    from timm.layers import Conv2dSame  # type: ignore[attr-defined] - pads as TensorFlow does
    from torch import nn

    folded = copy.deepcopy(model).eval()
    for convolution_name, norm_name in list(_pairs(folded, input_px)):
        convolution, norm = folded.get_submodule(convolution_name), folded.get_submodule(norm_name)
        rest = _without_norm(norm)
        if rest is None or type(convolution) not in (nn.Conv2d, Conv2dSame):
            continue
        _fold(convolution, norm)
        folded.set_submodule(norm_name, rest)
    return folded


def _pairs(model: nn.Module, input_px: int) -> Iterator[tuple[str, str]]:
    """Names of a convolution and of the batch normalization that alone takes its output, of modules used once."""
    torch = require("torch", "train")
    try:
        program = torch.export.export(model, (torch.zeros(1, 3, input_px, input_px),), strict=False)
    except Exception as error:  # its kinds depend on what in the network's code it cannot follow
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"torch cannot follow this network ({reason}): choose another backbone.") from error
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    for node in program.graph.nodes:
        if "batch_norm" not in str(node.target) or not _is_convolution(node.args[0]):
            continue
        convolution, weight, scale = node.args[0], node.args[0].args[1], node.args[1]
        if len(convolution.users) > 1 or len(weight.users) > 1 or scale is None or len(scale.users) > 1:
            continue
        if weight.name in names and scale.name in names:
            yield names[weight.name].rpartition(".")[0], names[scale.name].rpartition(".")[0]


def _is_convolution(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) in {"aten.conv2d.default", "aten.convolution.default"}


def _without_norm(norm: Any) -> nn.Module | None:
    """What a normalization does beside normalizing; None where that is not known."""
    from torch import nn

    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    from timm.layers import BatchNormAct2d  # type: ignore[attr-defined]

    if type(norm) is not BatchNormAct2d:
        return None
    kept: list[Any] = [norm.drop, norm.act]
    return nn.Sequential(*kept).eval()


def _fold(convolution: Any, norm: Any) -> None:
    """Scale and shift a convolution as a normalization does, in float64."""
    import torch
    from torch import nn

    with torch.no_grad():
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()  # (out,)
        bias = 0.0 if convolution.bias is None else convolution.bias.double()
        weight = convolution.weight.double() * scale[:, None, None, None]
        shift = norm.bias.double() + (bias - norm.running_mean.double()) * scale
        convolution.weight.copy_(weight)
        convolution.bias = nn.Parameter(shift.to(convolution.weight.dtype), requires_grad=False)
