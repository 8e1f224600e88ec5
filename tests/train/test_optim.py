import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from midge.runtime.errors import UserError
from midge.train.optim import LARS, build_optimizer, parameter_groups, prepare_step

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),  # depthwise
        nn.Conv2d(8, 8, 3, groups=2, bias=False),  # grouped, not depthwise
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


KINDS = ["weight", "vector", "vector", "vector", "depthwise", "weight", "weight", "vector"]  # of network().parameters()


def test_groups_by_kind():
    model = network()
    model[6].weight.requires_grad_(False)
    groups = parameter_groups(model)
    flags = [(group["decay"], group["adapt"]) for group in groups]
    assert flags == [(True, True), (False, True), (False, False)]
    parameters = list(model.parameters())
    for group, kind in zip(groups, ["weight", "depthwise", "vector"], strict=True):
        expected = [p for p, k in zip(parameters, KINDS, strict=True) if k == kind and p.requires_grad]
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]


def plain_lars(weights, gradients, lr, weight_decay, eta, momentum):
    """LARS in float64 numpy, one tensor after the other: the weights after each step."""
    weights = [w.astype(np.float64) for w in weights]
    momenta = [np.zeros_like(w) for w in weights]
    for step_gradients, step_lr in zip(gradients, lr, strict=True):
        for i, kind in enumerate(KINDS):
            update = step_gradients[i].astype(np.float64)
            if kind == "weight":
                update = update + weight_decay * weights[i]
            if kind != "vector":
                w_norm, u_norm = np.sqrt((weights[i] ** 2).sum()), np.sqrt((update**2).sum())
                if w_norm > 0 and u_norm > 0:
                    update = update * eta * w_norm / u_norm
            momenta[i] = momentum * momenta[i] + update
            weights[i] = weights[i] - step_lr * momenta[i]
    return weights


def test_lars_equals_the_plain_derivation():
    model = network()
    parameters = list(model.parameters())
    start = [p.detach().numpy().copy() for p in parameters]
    rng = np.random.default_rng(0)
    gradients = [[rng.normal(size=w.shape).astype(np.float32) for w in start] for _ in range(6)]
    for step in gradients:
        step[5][:] = 0  # no gradient: weight decay alone, and adapted, moves the grouped convolution
    optimizer = build_optimizer("lars", model, momentum=0.9, trust_coefficient=1e-3)
    lrs = [0.0, 0.5, 1.0, 0.8, 0.4, 0.1]
    for step_gradients, lr in zip(gradients, lrs, strict=True):
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        prepare_step(optimizer, lr, 0.01, frozen=())
        optimizer.step()
    expected = plain_lars(start, gradients, lrs, weight_decay=0.01, eta=1e-3, momentum=0.9)
    for parameter, want, before in zip(parameters, expected, start, strict=True):
        got = parameter.detach().numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        assert not np.array_equal(got, before)


def test_lars_with_zero_weights_takes_the_plain_step():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    optimizer = LARS([{"params": [weight], "decay": True, "adapt": True}], momentum=0.9, trust_coefficient=1e-3)
    prepare_step(optimizer, 0.5, 0.1, frozen=())
    optimizer.step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.5))


def test_frozen_parameters_stay_and_gather_no_momentum():
    model = network()
    optimizer = build_optimizer("lars", model, momentum=0.9, trust_coefficient=1e-3)
    last = model[6].weight
    before = last.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    prepare_step(optimizer, 1.0, 0.1, frozen=(last,))
    optimizer.step()
    assert torch.equal(last.detach(), before)
    assert last not in optimizer.state
    assert model[0].weight in optimizer.state


def test_adamw_equals_torchs_with_decay_on_matrices_only():
    model = network()
    reference = copy.deepcopy(model)
    optimizer = build_optimizer("adamw", model, momentum=0.9, trust_coefficient=1e-3)
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}], lr=0.01
    )
    for step in range(3):
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            a.grad = torch.full_like(a, 0.1 + step)
            b.grad = a.grad.clone()
        prepare_step(optimizer, 0.01, 0.3, frozen=())
        optimizer.step()
        plain.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_state_survives_a_round_trip():
    model = network()
    optimizer = build_optimizer("lars", model, 0.9, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    prepare_step(optimizer, np.float64(0.5), np.float64(0.1), frozen=())
    optimizer.step()
    twin = copy.deepcopy(model)
    other = build_optimizer("lars", twin, 0.9, 1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        for parameter in m.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(UserError, match=r"Unknown optimizer 'sgd': choose one of adamw, lars\."):
        build_optimizer("sgd", network(), 0.9, 1e-3)
