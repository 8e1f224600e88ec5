"""Projection heads: what lies between the backbone and the loss, and is thrown away after pretraining."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormalizedLinear(nn.Module):
    """A linear layer without bias whose rows are a direction and a length: y_k = g_k <v_k / |v_k|, x>.

    Args:
        in_features: of the input.
        out_features: of the output.
        fixed_magnitude: keep every length g_k at 1; otherwise it is learned, from 1.
    """

    def __init__(self, in_features: int, out_features: int, fixed_magnitude: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(in_features, out_features, bias=False).weight.detach())
        self.magnitude = nn.Parameter(torch.ones(out_features, 1), requires_grad=not fixed_magnitude)

    def forward(self, x: Tensor) -> Tensor:
        """(M, in_features) -> (M, out_features)."""
        return F.linear(x, self.magnitude * F.normalize(self.direction, dim=1))


class DINOHead(nn.Module):
    """The projection head of DINO (Caron et al., 2021, section 3.2 and appendix C).

    A three-layer MLP with GELU, L2 normalization of its bottleneck, and a weight-normalized last layer.

    Args:
        in_features: dimension of the backbone's embedding.
        hidden: width of the MLP.
        bottleneck: dimension of the MLP's output.
        outputs: dimension of the last layer's output.
        batch_norm: batch normalization after the two hidden layers.
        fixed_magnitude: keep the last layer's rows at length 1.
    """

    def __init__(
        self, in_features: int, hidden: int, bottleneck: int, outputs: int, batch_norm: bool, fixed_magnitude: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_features, hidden):
            layers += [nn.Linear(width, hidden), *([nn.BatchNorm1d(hidden)] if batch_norm else []), nn.GELU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = NormalizedLinear(bottleneck, outputs, fixed_magnitude)

    def forward(self, x: Tensor) -> Tensor:
        """(M, in_features) -> (M, outputs); each output lies between minus and plus its row's magnitude."""
        embeddings = F.normalize(at_least_float32(self.mlp(x)), dim=1)
        with without_autocast(embeddings):
            return self.last_layer(embeddings)


class ProjectionHead(nn.Module):
    """The projection head of SwAV and of MoCo v2: a two-layer MLP with ReLU, then L2 normalization.

    Args:
        in_features: dimension of the backbone's embedding.
        hidden: width of the hidden layer.
        out_features: dimension of the output.
        batch_norm: batch normalization after the hidden layer; SwAV has it for a CNN, MoCo v2 has none.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int, batch_norm: bool) -> None:
        super().__init__()
        self.out_features = out_features
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        self.mlp = nn.Sequential(
            nn.Linear(in_features, hidden), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, out_features)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(M, in_features) -> (M, out_features) float32 of length 1."""
        return F.normalize(at_least_float32(self.mlp(x)), dim=1)


def without_autocast(x: Tensor) -> torch.autocast:
    """Compute in the operands' own precision where ``x`` is.

    A cosine in bfloat16 has an error of 0.004: divided by a temperature of 0.05, in an exponential, that is 8 %.
    """
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Lift 16-bit values, as autocast gives them: a sum of squares overflows at 65504, a softmax loses its tail."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
