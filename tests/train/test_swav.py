"""SwAV against a slow re-derivation: every pair of views by itself, Sinkhorn and Knopp's by loops, in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from midge.train.backbones import MultiCropNetwork
from midge.train.heads import ProjectionHead
from midge.train.method import Views
from midge.train.swav import SwAV, sinkhorn

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_IMAGES, NUM_LOCAL, DIM, PROTOTYPES = 4, 3, 5, 12
TEMPERATURE, EPSILON, ITERATIONS = 0.1, 0.05, 3


def method(pool, **changes) -> Any:
    torch.manual_seed(0)
    given = {
        "weight_global": 0.4,
        "weight_local": 0.6,
        "temperature": TEMPERATURE,
        "epsilon": EPSILON,
        "iterations": ITERATIONS,
        "queue_size": 0,
        "queue_start_step": 0,
        "freeze_prototypes_steps": 2,
    }
    network = MultiCropNetwork(pool(), ProjectionHead(6, hidden=8, out_features=DIM, batch_norm=True))
    return SwAV(network, PROTOTYPES, **{**given, **changes})


def slow_sinkhorn(scores):
    """SwAV, algorithm 1 of its appendix: rows are prototypes, columns images, sums by loops."""
    weights = np.exp(np.asarray(scores, dtype=np.float64) / EPSILON).T  # (K, B)
    weights /= weights.sum()
    num_prototypes, num_images = weights.shape
    for _ in range(ITERATIONS):
        for k in range(num_prototypes):
            weights[k] /= weights[k].sum() * num_prototypes
        for b in range(num_images):
            weights[:, b] /= weights[:, b].sum() * num_images
    return weights.T * num_images


def slow_losses(swav, batch, queued=None):
    """Mean loss over global-global and over global-local pairs."""
    network = copy.deepcopy(swav.network).double()
    embeddings = torch.cat([network.backbone(group.double()) for group in batch])
    projections = network.head(embeddings).detach().numpy().reshape(-1, NUM_IMAGES, DIM)
    prototypes = swav.prototypes.detach().double().numpy()
    scores = projections @ prototypes.T  # (V, N, K)
    pairs = {"global": [], "local": []}
    for t in range(2):
        together = scores[t] if queued is None else np.concatenate([scores[t], queued[t] @ prototypes.T])
        targets = slow_sinkhorn(together)[:NUM_IMAGES]
        for s in range(2 + NUM_LOCAL):
            if s == t:
                continue
            logits = scores[s] / TEMPERATURE
            log_prediction = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            pairs["global" if s < 2 else "local"].append(-(targets * log_prediction).sum(axis=1).mean())
    assert (len(pairs["global"]), len(pairs["local"])) == (2, 2 * NUM_LOCAL)
    return np.mean(pairs["global"]), np.mean(pairs["local"])


@pytest.mark.parametrize("weights", [(0.4, 0.6), (1 / 7, 6 / 7)])
def test_loss_equals_the_double_loop(pool, tiny_views, weights):
    swav, batch = method(pool, weight_global=weights[0], weight_local=weights[1]), tiny_views(NUM_IMAGES, NUM_LOCAL)
    loss_global, loss_local = slow_losses(swav, batch)
    losses = swav.loss(batch, 0)
    assert losses.global_pairs.item() == pytest.approx(loss_global, rel=1e-6)
    assert losses.local_pairs.item() == pytest.approx(loss_local, rel=1e-6)
    assert losses.total.item() == pytest.approx(weights[0] * loss_global + weights[1] * loss_local, rel=1e-6)
    assert abs(loss_global - loss_local) > 1e-4


def test_gradient_equals_a_finite_difference_with_the_assignment_held(pool, tiny_views):
    swav = method(pool).double()
    batch = Views(*(v.double() for v in tiny_views(NUM_IMAGES, NUM_LOCAL)))
    target = swav.assign(swav.network(batch)[1][:NUM_IMAGES].detach(), 0, 0)
    swav.assign = lambda embeddings, view, step: target
    for weight in (swav.prototypes, swav.network.backbone.conv.weight):
        swav.zero_grad()
        swav.loss(batch, 0).total.backward()
        direction = torch.randn_like(weight)
        expected = (weight.grad * direction).sum()
        difference = []
        for sign in (1, -2):  # forth by one, then back by two
            with torch.no_grad():
                weight.add_(sign * 1e-5 * direction)
                difference.append(swav.loss(batch, 0).total)
        torch.testing.assert_close((difference[0] - difference[1]) / 2e-5, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_sinkhorn_equals_the_loops_and_does_not_overflow(scale):
    torch.manual_seed(0)
    scores = torch.rand(7, 9) * 2 - 1
    result = sinkhorn(scores * scale, EPSILON * scale, ITERATIONS)
    np.testing.assert_allclose(result.numpy(), slow_sinkhorn(scores), rtol=1e-4)
    torch.testing.assert_close(result.sum(dim=1), torch.ones(7))


def test_sinkhorn_takes_half_precision_and_prototypes_that_nothing_resembles():
    scores = torch.tensor([[1.0, 0.9, -1.0], [0.9, 1.0, -1.0]])
    half = sinkhorn(scores.half(), 0.003, 3)
    assert half.dtype == torch.float32
    assert torch.isfinite(half).all()
    torch.testing.assert_close(half.sum(dim=1), torch.ones(2))


def test_many_iterations_use_all_prototypes_alike():
    torch.manual_seed(0)
    result = sinkhorn(torch.rand(8, 4), EPSILON, 200)
    torch.testing.assert_close(result.sum(dim=0), torch.full((4,), 2.0), rtol=1e-3, atol=0)


def test_queue_is_filled_from_its_start_and_used_once_full(pool, tiny_views):
    # In float64: when the queue is full the loss is 7, and float32's rounding alone is 1.6e-6 of it on some CPUs.
    swav = method(pool, queue_size=8, queue_start_step=1).double()
    batch = Views(*(group.double() for group in tiny_views(NUM_IMAGES, NUM_LOCAL)))
    full = []
    kept = []
    for step in range(4):
        full.append(swav.queue_is_full(step, NUM_IMAGES))
        if full[-1]:
            queued = swav.queue.double().numpy()
            loss_global, loss_local = slow_losses(swav, batch, queued)
            losses = swav.loss(batch, step)
            assert losses.global_pairs.item() == pytest.approx(loss_global, rel=1e-6)
            assert losses.local_pairs.item() == pytest.approx(loss_local, rel=1e-6)
            assert abs(loss_global - slow_losses(swav, batch)[0]) > 1e-6
        else:
            swav.loss(batch, step)
        kept.append(swav._fresh[0].clone())
        with torch.no_grad():
            swav.network.backbone.conv.weight.add_(0.1 * torch.randn_like(swav.network.backbone.conv.weight))
        swav.after_step(step)
    assert full == [False, False, False, True]
    expected = torch.cat([kept[3], kept[2]], dim=1)  # step 3 took the place of step 1
    torch.testing.assert_close(swav.queue, expected)


def test_portions_fill_the_queue_together(pool):
    whole, portions = (method(pool, queue_size=8, queue_start_step=1, portions=number) for number in (1, 2))
    steps = range(6)
    expected = [whole.queue_is_full(step, NUM_IMAGES) for step in steps]
    assert [portions.queue_is_full(step, NUM_IMAGES // 2) for step in steps] == expected


def test_prototypes_stay_at_length_one_and_are_frozen_at_first(pool, tiny_views):
    swav = method(pool)
    assert [len(swav.frozen(step)) for step in range(4)] == [1, 1, 0, 0]
    assert swav.frozen(0)[0] is swav.prototypes
    with torch.no_grad():
        swav.prototypes.mul_(3)
    swav.loss(tiny_views(NUM_IMAGES, NUM_LOCAL), 0)
    swav.after_step(0)
    torch.testing.assert_close(swav.prototypes.norm(dim=1), torch.ones(PROTOTYPES))


def test_loss_in_bfloat16_stays_near(pool, tiny_views):
    swav, batch = method(pool), tiny_views(NUM_IMAGES, NUM_LOCAL)
    expected = copy.deepcopy(swav).loss(batch, 0).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = swav.loss(batch, 0)
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(expected.item(), rel=0.05)


def test_everything_learns(pool, tiny_views):
    swav = method(pool)
    swav.loss(tiny_views(NUM_IMAGES, NUM_LOCAL), 0).total.backward()
    assert all(p.grad is not None for p in swav.parameters())
    assert isinstance(swav.backbone, nn.Module) and swav.backbone is swav.network.backbone
