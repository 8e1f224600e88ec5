"""One step of every method on small networks of many families, as timm builds them."""

import dataclasses
from typing import Any

import pytest
import torch

from midge.runtime.errors import UserError
from midge.train.backbones import find_backbone
from midge.train.engine import build_fabric
from midge.train.method import Views
from midge.train.methods import METHODS, Plan
from midge.train.optim import build_optimizer, prepare_step
from midge.train.recipes import defaults
from midge.train.views import view_policy

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = [
    "mobilenetv2_050",
    "mobilenetv2_140",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_050",
    "tf_efficientnet_lite0",
    "resnet34",
    "regnetx_002",
    "convnext_atto",
    "repvgg_a0",
    "mobilevit_xxs",
    "mobileone_s0",
    "efficientformerv2_s0",
    "edgenext_xx_small",
    "ghostnet_050",
    "fastvit_t8",
    "repghostnet_050",
    "vit_tiny_patch16_224",
]
PX = 64


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("name", FAMILIES)
def test_one_step(name, method, tmp_path):
    config = dataclasses.replace(
        defaults(["--method", method, "--backbone", name]),
        data=tmp_path,
        out=tmp_path / "run",
        backbone=name,
        image_px=PX,
        batch_size=4,
        num_local=1,
        head_hidden=16,
        head_bottleneck=8,
        head_outputs=12,
        queue_size=8,
        device="cpu",
    )
    fabric = build_fabric(config)
    backbone = find_backbone(name, PX)
    policy = view_policy("lowcompute", backbone.family, PX, backbone.patch_px)
    if "img_size" in backbone.args and backbone.family == "cnn":  # takes one size only
        policy = dataclasses.replace(policy, local_px=PX)
    backbone.check_views((policy.global_px, policy.local_px))
    torch.manual_seed(0)
    built: Any = METHODS[method](Plan(config, backbone, policy, steps_per_epoch=2, steps=4))
    optimizer = build_optimizer(config.optimizer, built, config.momentum, config.trust_coefficient)
    network, optimizer = fabric.setup(built, optimizer)
    network.mark_forward_method("loss")
    images = [torch.randn(views * 4, 3, px, px) for views, px in ((2, PX), (1, policy.local_px))]
    losses = network.loss(Views(*images), 3)
    assert torch.isfinite(losses.total)
    fabric.backward(losses.total)
    trained = {name: value for name, value in built.named_parameters() if value.requires_grad}
    # A few have none: the bias of a convolution before batch normalization.
    idle = [name for name, value in trained.items() if value.grad is None or not value.grad.any()]
    assert len(idle) < 0.1 * len(trained), idle
    prepare_step(optimizer, 0.1, 1e-6, built.frozen(3))
    optimizer.step()
    built.after_step(3)
    assert all(value.isfinite().all() for value in built.state_dict().values())
    assert built.backbone.training


def test_network_bound_to_one_size_names_the_way_out():
    backbone = find_backbone("efficientformerv2_s0", PX)
    assert backbone.args == {"img_size": PX}
    with pytest.raises(UserError, match=r"cannot take views of 36 px, .*give --local-px 64"):
        backbone.check_views((PX, 36))
    with pytest.raises(UserError, match=r"cannot take views of 64 px, .*give another size"):
        find_backbone("efficientformer_l1", PX).check_views((PX, 36))
