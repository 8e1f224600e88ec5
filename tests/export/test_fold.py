from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from midge.export.fold import fold_batch_norm
from midge.runtime.errors import UserError

PX = 32


def randomize(model: nn.Module) -> nn.Module:
    """Give every batch normalization statistics and weights that do something, one channel of each a dead one."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.weight.shape
            module.running_mean = 0.1 * torch.randn(shape, generator=generator)
            module.running_var = 0.5 + torch.rand(shape, generator=generator)
            module.weight.data = 0.5 + torch.rand(shape, generator=generator)
            module.bias.data = 0.1 * torch.randn(shape, generator=generator)
            module.weight.data[0], module.running_var[0] = 0, 0
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet18", {"channels": (8, 16, 24, 32)}),
        ("mobilenetv2_050", {}),
        ("vit_tiny_patch16_224", {"img_size": PX, "patch_size": 8, "depth": 1, "embed_dim": 48}),
        ("regnety_002", {}),
        ("tf_mobilenetv3_small_minimal_100", {}),  # pads as TensorFlow does
    ],
)
def test_the_folded_network_computes_the_same(name: str, arguments: dict[str, Any]) -> None:
    model = randomize(timm.create_model(name, num_classes=5, **arguments))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norm(model, PX)
    images = torch.randn(2, 3, PX, PX, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, given = model(images), folded(images)
    assert (expected - given).abs().max() <= 1e-5 * expected.abs().max()
    assert norms(folded) == 0
    assert not folded.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())  # a copy was folded


def test_what_cannot_be_folded_stays() -> None:
    class Shared(nn.Module):
        """Its first convolution's output is used twice, its second normalization stands before a convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm, self.before = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found = self.first(images)
            return self.second(self.before((found + self.norm(found)).relu())).mean(dim=(2, 3))

    model = randomize(Shared())
    folded = fold_batch_norm(model, 4)
    images = torch.randn(2, 3, 4, 4)
    assert norms(folded) == 2
    torch.testing.assert_close(folded(images), model(images))


def test_code_that_cannot_be_followed_is_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(2, 3)) if images.sum() > 0 else images.amax(dim=(2, 3))

    with pytest.raises(UserError, match="torch cannot follow this network") as caught:
        fold_batch_norm(Branching().eval(), 4)
    assert "\n" not in str(caught.value)
