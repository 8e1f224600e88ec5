from typing import Any

import pytest
import torch

from midge.runtime.errors import UserError
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model
from midge.train.backbones import MultiCropNetwork, feature_dim, find_backbone

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "options", "sizes", "family", "dim"),
    [
        ("resnet18", {"channels": (8, 8, 16, 24)}, (32, 18), "cnn", 24),
        ("test_byobnet", {}, (32, 18), "cnn", 256),
        ("mobilenetv2_035", {}, (32, 18), "cnn", 1280),
        ("mobilenetv3_small_050", {}, (32, 18), "cnn", 1024),
        ("vit_tiny_patch16_224", {"patch_px": 4}, (32, 20), "vit", 192),
        ("test_vit", {}, (32, 16), "vit", 64),
    ],
)
def test_networks_take_both_view_sizes_and_are_rebuilt_from_their_arguments(name, options, sizes, family, dim):
    backbone = find_backbone(name, sizes[0], **options)
    assert backbone.family == family
    network = backbone.build()
    for px in sizes:
        assert network(torch.rand(2, 3, px, px)).shape == (2, dim)
    assert feature_dim(network) == dim
    spec = ModelSpec(name, backbone.args, 0, dim, (), Preprocess(sizes[0], sizes[0]), sizes[0])
    twin = build_model(spec)
    twin.load_state_dict(network.state_dict(), strict=True)
    x = torch.rand(2, 3, sizes[0], sizes[0])
    torch.testing.assert_close(twin(x), network.eval()(x))


def test_patch_size():
    assert find_backbone("vit_tiny_patch16_224", 224).patch_px == 16
    assert find_backbone("vit_tiny_patch16_224", 32, patch_px=4).patch_px == 4
    assert find_backbone("resnet18", 32).patch_px == 1


def test_residual_branches_do_not_start_at_zero():
    network: Any = find_backbone("resnet18", 32, (8, 8, 8, 8)).build()
    last_norms = [block.bn2.weight for stage in (1, 2, 3, 4) for block in getattr(network, f"layer{stage}")]
    assert len(last_norms) == 8
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in last_norms)


def test_drop_path_is_the_students_alone():
    backbone = find_backbone("vit_tiny_patch16_224", 32, patch_px=8)
    torch.manual_seed(0)
    student, teacher = backbone.build(drop_path=0.5), backbone.build()
    teacher.load_state_dict(student.state_dict())
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(student.eval()(x), teacher(x))
    assert not torch.allclose(student.train()(x), teacher(x))


def test_multi_crop_keeps_the_order_of_the_groups():
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network = MultiCropNetwork(backbone, torch.nn.Linear(3, 5))
    groups = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 6, 6)
    embeddings, outputs = network(groups)
    expected = torch.cat([group.mean(dim=(2, 3)) for group in groups])
    torch.testing.assert_close(embeddings, expected)
    torch.testing.assert_close(outputs, network.head(expected))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, "Unknown backbone 'resnet81': did you mean .*resnet18"),
        ("zzzz", {}, "Unknown backbone 'zzzz': timm.list_models"),
        ("mobilenetv2_100", {"channels": (8, 8)}, "--channels is for ResNets"),
        ("resnet18", {"patch_px": 4}, "--patch-px is for ViTs"),
    ],
)
def test_errors_name_the_way_out(name, options, message):
    with pytest.raises(UserError, match=message):
        find_backbone(name, 32, **options)


def test_channels_that_timm_cannot_build():
    with pytest.raises(UserError, match=r"timm cannot build 'resnet18' with channels=\(8, 8, 8, 7.5\)"):
        find_backbone("resnet18", 32, (8, 8, 8, 7.5)).build()  # type: ignore[arg-type]
