"""Optimizers: LARS for a CNN, AdamW for a ViT, and which parameters each decays and adapts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.errors import unknown_name


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017, arXiv 1708.03888), as SSL recipes use it.

    For each tensor w with gradient g: u = g + weight_decay w; where the group adapts, u is scaled by
    trust_coefficient |w| / |u|, unless either length is zero; m <- momentum m + u; w <- w - lr m.

    Args:
        groups: parameter groups, see :func:`parameter_groups`. ``weight_decay`` holds where ``decay`` is true.
        momentum: share of the old update.
        trust_coefficient: length of an update relative to the length of the weights, before lr.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, trust_coefficient: float) -> None:
        defaults = {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "trust_coefficient": trust_coefficient}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)
        return loss

    def _update(self, weight: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            update = update.add(weight, alpha=group["weight_decay"])
        if group["adapt"]:
            length, update_length = weight.norm(), update.norm()
            ratio = group["trust_coefficient"] * length / update_length
            update = update * torch.where((length > 0) & (update_length > 0), ratio, 1.0)
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].mul_(group["momentum"]).add_(update)
        weight.add_(state["momentum"], alpha=-group["lr"])


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Sort the trained parameters into the recipe's three groups; empty ones are left out.

    Matrices and kernels: decay and adaptation. Kernels of depthwise convolutions: adaptation alone. Vectors (biases,
    batch normalization): neither.
    """
    depthwise = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.groups == module.in_channels > 1
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1 and id(p) not in depthwise], "decay": True, "adapt": True},
        {"params": [p for p in trained if id(p) in depthwise], "decay": False, "adapt": True},
        {"params": [p for p in trained if p.ndim <= 1], "decay": False, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def _lars(model: nn.Module, momentum: float, trust_coefficient: float) -> torch.optim.Optimizer:
    return LARS(parameter_groups(model), momentum, trust_coefficient)


def _adamw(model: nn.Module, momentum: float, trust_coefficient: float) -> torch.optim.Optimizer:
    """With torch's betas; here depthwise kernels are decayed like other kernels."""
    groups = [{**group, "decay": group["adapt"]} for group in parameter_groups(model)]
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)


OPTIMIZERS = {"lars": _lars, "adamw": _adamw}


def build_optimizer(name: str, model: nn.Module, momentum: float, trust_coefficient: float) -> torch.optim.Optimizer:
    """An optimizer of the model's trained parameters; lr and weight decay come from :func:`prepare_step`.

    Args:
        name: ``"lars"`` or ``"adamw"``.
        model: what is trained.
        momentum: of LARS.
        trust_coefficient: of LARS.

    Raises:
        UserError: no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name](model, momentum, trust_coefficient)


def prepare_step(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, frozen: Sequence[nn.Parameter]
) -> None:
    """Between backward and step: set lr and weight decay, and take the gradients of frozen parameters away.

    A parameter without gradient is left out of the step altogether, its momentum too. A zero gradient would not do:
    LARS would make a full-sized update out of the weight decay.
    """
    for group in optimizer.param_groups:
        group["lr"] = float(lr)
        group["weight_decay"] = float(weight_decay) if group["decay"] else 0.0
    for parameter in frozen:
        parameter.grad = None
