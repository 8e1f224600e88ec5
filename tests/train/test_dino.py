"""DINO against a slow re-derivation: every pair of views by itself, in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from midge.train.averages import update_ema
from midge.train.backbones import MultiCropNetwork
from midge.train.dino import DINO
from midge.train.heads import DINOHead
from midge.train.losses import cross_entropy
from midge.train.method import Views

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_IMAGES, NUM_LOCAL, OUTPUTS = 4, 3, 24


class Pool(nn.Module):
    """A tiny backbone with batch normalization, for any image size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(self.conv(x)).relu().mean(dim=(2, 3))


def method(**changes) -> Any:
    torch.manual_seed(0)
    head = DINOHead(6, hidden=12, bottleneck=8, outputs=OUTPUTS, batch_norm=True, fixed_magnitude=True)
    given = {
        "weight_global": 0.4,
        "weight_local": 0.6,
        "temperature": 0.1,
        "teacher_temperature": np.array([0.04, 0.05, 0.06, 0.07]),
        "teacher_momentum": np.array([0.9, 0.95, 0.99, 1.0]),
        "center_momentum": 0.9,
        "freeze_last_layer_steps": 2,
    }
    freeze = changes.pop("freeze_batch_norm", False)
    networks = [MultiCropNetwork(Pool(), copy.deepcopy(head), freeze) for _ in range(2)]
    dino = DINO(*networks, **{**given, **changes})
    with torch.no_grad():  # so that student and teacher differ, and the centre matters
        dino.center.copy_(torch.randn(OUTPUTS) / 10)
        for parameter in dino.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return dino


def views(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return Views(
        torch.randn(2 * NUM_IMAGES, 3, 8, 8, generator=generator),
        torch.randn(NUM_LOCAL * NUM_IMAGES, 3, 5, 5, generator=generator),
    )


def outputs(network, groups):
    """(V, N, K) float64: one backbone pass per size, all embeddings together through the head."""
    network = copy.deepcopy(network).double()
    embeddings = torch.cat([network.backbone(group.double()) for group in groups])
    return network.head(embeddings).detach().numpy().reshape(-1, NUM_IMAGES, OUTPUTS)


def slow_losses(dino, batch, step):
    """Mean loss over global-global and over global-local pairs."""
    teacher, student = outputs(dino.teacher, [batch.global_views]), outputs(dino.student, batch)
    center = dino.center.double().numpy()
    pairs = {"global": [], "local": []}
    for t in range(2):
        for s in range(2 + NUM_LOCAL):
            if s == t:
                continue
            per_image = []
            for n in range(NUM_IMAGES):
                target = np.exp((teacher[t, n] - center) / dino.teacher_temperature[step])
                target /= target.sum()
                logits = student[s, n] / dino.temperature
                log_prediction = logits - np.log(np.exp(logits).sum())
                per_image.append(-(target * log_prediction).sum())
            pairs["global" if s < 2 else "local"].append(np.mean(per_image))
    assert (len(pairs["global"]), len(pairs["local"])) == (2, 2 * NUM_LOCAL)
    return np.mean(pairs["global"]), np.mean(pairs["local"])


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("weights", [(0.4, 0.6), (1 / 7, 6 / 7)])
def test_loss_equals_the_double_loop(step, weights):
    dino = method(weight_global=weights[0], weight_local=weights[1])
    batch = views()
    loss_global, loss_local = slow_losses(dino, batch, step)
    losses = dino.loss(batch, step)
    assert losses.global_pairs.item() == pytest.approx(loss_global, rel=1e-6)
    assert losses.local_pairs.item() == pytest.approx(loss_local, rel=1e-6)
    assert losses.total.item() == pytest.approx(weights[0] * loss_global + weights[1] * loss_local, rel=1e-6)
    assert abs(loss_global - loss_local) > 1e-3


def test_baseline_weights_give_the_plain_mean_over_pairs():
    dino = method(weight_global=2 / (2 + 2 * NUM_LOCAL), weight_local=2 * NUM_LOCAL / (2 + 2 * NUM_LOCAL))
    batch = views()
    loss_global, loss_local = slow_losses(dino, batch, 0)
    plain_mean = (2 * loss_global + 2 * NUM_LOCAL * loss_local) / (2 + 2 * NUM_LOCAL)
    assert dino.loss(batch, 0).total.item() == pytest.approx(plain_mean, rel=1e-6)


def test_gradient_equals_a_finite_difference():
    dino, batch = method().double(), Views(*(v.double() for v in views()))
    weight = dino.student.backbone.conv.weight
    dino.loss(batch, 1).total.backward()
    direction = torch.randn_like(weight)
    expected = (weight.grad * direction).sum()
    difference = []
    for sign in (1, -1):
        moved = copy.deepcopy(dino)
        with torch.no_grad():
            moved.student.backbone.conv.weight.add_(sign * 1e-5 * direction)
            difference.append(moved.loss(batch, 1).total)
    torch.testing.assert_close((difference[0] - difference[1]) / 2e-5, expected, rtol=1e-5, atol=0)


def test_only_the_student_learns():
    dino = method()
    dino.loss(views(), 0).total.backward()
    assert all(p.grad is not None for p in dino.student.parameters() if p.requires_grad)
    assert all(p.grad is None and not p.requires_grad for p in dino.teacher.parameters())


def test_teacher_starts_as_the_student():
    torch.manual_seed(0)
    head = DINOHead(6, 12, 8, OUTPUTS, batch_norm=True, fixed_magnitude=True)
    dino = DINO(
        MultiCropNetwork(Pool(), head),
        MultiCropNetwork(Pool(), copy.deepcopy(head)),
        weight_global=0.4,
        weight_local=0.6,
        temperature=0.1,
        teacher_temperature=np.array([0.04]),
        teacher_momentum=np.array([0.9]),
        center_momentum=0.9,
        freeze_last_layer_steps=0,
    )
    for a, b in zip(dino.student.state_dict().values(), dino.teacher.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


def test_center_and_teacher_move_as_averages():
    dino, batch = method(), views()
    step = 1
    center = dino.center.double().numpy().copy()
    mean = outputs(dino.teacher, [batch.global_views]).mean(axis=(0, 1))
    teacher = [p.detach().double().numpy().copy() for p in dino.teacher.parameters()]
    dino.loss(batch, step)
    np.testing.assert_allclose(dino.center.numpy(), center, rtol=1e-6)  # the step's own loss uses the old centre
    dino.after_step(step)
    np.testing.assert_allclose(dino.center.numpy(), 0.9 * center + 0.1 * mean, atol=1e-6)
    for new, old, source in zip(dino.teacher.parameters(), teacher, dino.student.parameters(), strict=True):
        expected = 0.95 * old + 0.05 * source.detach().double().numpy()
        np.testing.assert_allclose(new.numpy(), expected, atol=1e-6)


def test_ema_leaves_the_statistics_alone():
    dino = method()
    dino.student.backbone.norm.running_mean.fill_(7)
    update_ema(dino.teacher, dino.student, 0.0)
    assert torch.equal(dino.teacher.backbone.conv.weight, dino.student.backbone.conv.weight)
    assert not dino.teacher.backbone.norm.running_mean.eq(7).any()


def test_last_layer_is_frozen_at_first():
    dino = method()
    assert [len(dino.frozen(step)) for step in range(4)] == [2, 2, 0, 0]
    assert dino.frozen(0)[0] is dino.student.head.last_layer.direction


def test_kept_backbone():
    assert method().backbone is not method(keep_teacher=True).backbone
    dino = method(keep_teacher=True)
    assert dino.backbone is dino.teacher.backbone
    dino = method()
    assert dino.backbone is dino.student.backbone


def test_cross_entropy_of_equal_uniform_distributions_is_the_log_of_their_size():
    uniform = torch.full((3, 8), 1 / 8)
    assert cross_entropy(uniform, uniform.log()).item() == pytest.approx(np.log(8))


def test_loss_in_bfloat16_stays_near():
    dino, batch = method(), views()
    expected = copy.deepcopy(dino).loss(batch, 0).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = dino.loss(batch, 0)
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(expected.item(), rel=0.02)


def test_backbone_sees_each_size_by_itself_and_the_head_sees_all():
    dino, batch = method(), views()
    sizes = []
    dino.student.backbone.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[-1]))
    rows = []
    dino.student.head.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    dino.loss(batch, 0)
    assert (sizes, rows) == ([8, 5], [(2 + NUM_LOCAL) * NUM_IMAGES])


def test_frozen_batch_normalization_keeps_its_statistics_in_every_mode():
    dino = method(freeze_batch_norm=True)
    dino.eval()
    dino.train()
    before = {name: value.clone() for name, value in dino.state_dict().items() if "backbone.norm.running" in name}
    batch = views()
    one_by_one = torch.cat([dino.student.backbone(view[None]) for view in batch.global_views])
    torch.testing.assert_close(dino.student.backbone(batch.global_views), one_by_one)
    dino.loss(batch, 0).total.backward()
    assert before and all(torch.equal(dino.state_dict()[name], value) for name, value in before.items())
    assert dino.student.backbone.norm.weight.grad is not None
    assert any(module.training for module in dino.student.head.modules() if isinstance(module, nn.BatchNorm1d))
    assert method().student.backbone.norm.training
