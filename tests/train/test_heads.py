from typing import Any

import pytest
import torch
from torch.nn import functional as F

from midge.train.heads import DINOHead, NormalizedLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def head(**changes) -> Any:
    torch.manual_seed(0)
    sizes = {
        "in_features": 6,
        "hidden": 16,
        "bottleneck": 8,
        "outputs": 32,
        "batch_norm": True,
        "fixed_magnitude": True,
    }
    return DINOHead(**{**sizes, **changes})


def test_normalized_linear_equals_torchs_weight_norm():
    ours = NormalizedLinear(5, 7, fixed_magnitude=False)
    theirs: Any = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 7, bias=False), dim=0)
    magnitudes = torch.linspace(0.5, 2, 7).unsqueeze(1)
    with torch.no_grad():
        ours.magnitude.copy_(magnitudes)
        theirs.parametrizations.weight.original0.copy_(magnitudes)
        theirs.parametrizations.weight.original1.copy_(ours.direction)
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_fixed_magnitude_is_not_trained():
    trained = {name for name, p in head().last_layer.named_parameters() if p.requires_grad}
    assert trained == {"direction"}
    trained = {name for name, p in head(fixed_magnitude=False).last_layer.named_parameters() if p.requires_grad}
    assert trained == {"direction", "magnitude"}


@pytest.mark.parametrize(("batch_norm", "layers"), [(True, "LBGLBGL"), (False, "LGLGL")])
def test_layers(batch_norm, layers):
    names = "".join(
        {"Linear": "L", "BatchNorm1d": "B", "GELU": "G"}[type(m).__name__] for m in head(batch_norm=batch_norm).mlp
    )
    assert names == layers


def test_output_is_the_cosine_with_each_row():
    module = head(batch_norm=False)
    x = torch.randn(3, 6)
    embedding = module.mlp(x)
    expected = torch.stack([F.cosine_similarity(embedding, row, dim=1) for row in module.last_layer.direction], dim=1)
    torch.testing.assert_close(module(x), expected)


def test_embedding_length_does_not_overflow_in_half_precision():
    module = head(batch_norm=False)
    module.mlp[-1].bias.data.fill_(1000)  # 8 squares of it are beyond float16
    expected = module(torch.zeros(2, 6))
    with torch.autocast("cpu", dtype=torch.float16):
        out = module(torch.zeros(2, 6))
    assert out.dtype == torch.float32  # a cosine rounded to 16 bits, over a temperature of 0.04, tells too little
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)
    assert expected.abs().max() > 0.1
