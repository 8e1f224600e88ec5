"""MoCo v2 against a slow re-derivation: every query and every key by itself, in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from midge.train.backbones import MultiCropNetwork
from midge.train.heads import ProjectionHead
from midge.train.mocov2 import MoCoV2

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_IMAGES, NUM_LOCAL, DIM, QUEUE, TEMPERATURE = 4, 3, 5, 10, 0.2


def method(pool, **changes) -> Any:
    torch.manual_seed(0)
    given = {
        "weight_global": 0.4,
        "weight_local": 0.6,
        "temperature": TEMPERATURE,
        "key_momentum": np.array([0.9, 0.99, 0.999, 1.0]),
        "queue_size": QUEUE,
        "key_groups": 1,
    }
    networks = [MultiCropNetwork(pool(), ProjectionHead(6, 8, DIM, batch_norm=False)) for _ in range(2)]
    moco = MoCoV2(*networks, **{**given, **changes})
    with torch.no_grad():  # so that query and key network differ
        for parameter in moco.key.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return moco


def outputs(network, groups):
    """(V, N, D) float64, length 1: one backbone pass per size."""
    network = copy.deepcopy(network).double()
    embeddings = torch.cat([network.backbone(group.double()) for group in groups])
    return network.head(embeddings).detach().numpy().reshape(-1, NUM_IMAGES, DIM)


def slow_losses(moco, batch):
    """Loss of the global query, and the mean over local queries; MoCo, equation 1, one term of its sum at a time."""
    first, second = batch.global_views.chunk(2)
    keys, queries = outputs(moco.key, [first])[0], outputs(moco.query, [second, batch.local_views])
    queue = moco.queue.double().numpy()
    losses = np.zeros((1 + NUM_LOCAL, NUM_IMAGES))
    for v, n in np.ndindex(losses.shape):
        positive = np.exp(queries[v, n] @ keys[n] / TEMPERATURE)
        negatives = sum(np.exp(queries[v, n] @ queue[i] / TEMPERATURE) for i in range(QUEUE))
        losses[v, n] = -np.log(positive / (positive + negatives))
    return losses[0].mean(), losses[1:].mean()


@pytest.mark.parametrize("weights", [(0.4, 0.6), (1 / 7, 6 / 7)])
def test_loss_equals_the_double_loop(pool, tiny_views, weights):
    moco, batch = method(pool, weight_global=weights[0], weight_local=weights[1]), tiny_views(NUM_IMAGES, NUM_LOCAL)
    loss_global, loss_local = slow_losses(moco, batch)
    losses = moco.loss(batch, 0)
    assert losses.global_pairs.item() == pytest.approx(loss_global, rel=1e-6)
    assert losses.local_pairs.item() == pytest.approx(loss_local, rel=1e-6)
    assert losses.total.item() == pytest.approx(weights[0] * loss_global + weights[1] * loss_local, rel=1e-6)
    assert abs(loss_global - loss_local) > 1e-4


def test_baseline_weights_give_the_plain_mean_over_queries(pool, tiny_views):
    queries = 1 + NUM_LOCAL
    moco = method(pool, weight_global=1 / queries, weight_local=NUM_LOCAL / queries)
    batch = tiny_views(NUM_IMAGES, NUM_LOCAL)
    loss_global, loss_local = slow_losses(moco, batch)
    plain_mean = (loss_global + NUM_LOCAL * loss_local) / queries
    assert moco.loss(batch, 0).total.item() == pytest.approx(plain_mean, rel=1e-6)


def test_only_the_query_network_learns(pool, tiny_views):
    moco = method(pool)
    moco.loss(tiny_views(NUM_IMAGES, NUM_LOCAL), 0).total.backward()
    assert all(p.grad is not None for p in moco.query.parameters())
    assert all(p.grad is None and not p.requires_grad for p in moco.key.parameters())


def test_key_network_starts_as_the_query_network_and_follows_it(pool, tiny_views):
    networks = [MultiCropNetwork(pool(), ProjectionHead(6, 8, DIM, batch_norm=False)) for _ in range(2)]
    given = {"weight_global": 0.4, "weight_local": 0.6, "temperature": 0.2, "queue_size": QUEUE, "key_groups": 1}
    moco = MoCoV2(*networks, key_momentum=np.array([0.9]), **given)
    for a, b in zip(moco.query.state_dict().values(), moco.key.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    moco = method(pool)
    before = [p.detach().double().numpy().copy() for p in moco.key.parameters()]
    moco.loss(tiny_views(NUM_IMAGES, NUM_LOCAL), 1)
    moco.after_step(1)
    for new, old, source in zip(moco.key.parameters(), before, moco.query.parameters(), strict=True):
        np.testing.assert_allclose(new.numpy(), 0.99 * old + 0.01 * source.detach().double().numpy(), atol=1e-6)


def test_queue_that_is_no_multiple_of_the_batch_drops_the_oldest_keys(pool, tiny_views):
    moco = method(pool)
    keys = []
    for step in range(4):
        moco.loss(tiny_views(NUM_IMAGES, NUM_LOCAL, seed=step), step)
        keys.append(moco._fresh[0].clone())
        moco.after_step(step)
    newest = torch.cat(keys)[-QUEUE:]  # 16 keys came, 10 stay
    assert sorted(map(tuple, moco.queue.tolist())) == sorted(map(tuple, newest.tolist()))
    torch.testing.assert_close(moco.queue.norm(dim=1), torch.ones(QUEUE))


def test_portions_of_a_step_enter_the_queue_together(pool, tiny_views):
    moco = method(pool)
    for seed in range(2):
        moco.loss(tiny_views(NUM_IMAGES, NUM_LOCAL, seed=seed), 0)
    fresh = torch.cat(moco._fresh)
    moco.after_step(0)
    torch.testing.assert_close(moco.queue[: 2 * NUM_IMAGES], fresh)
    assert not moco._fresh


def test_shuffle_changes_the_statistics_that_a_key_is_normalized_by_and_not_the_order(pool, tiny_views):
    views = tiny_views(8, 1).global_views[:8]
    together, apart = method(pool, key_groups=1), method(pool, key_groups=2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    expected = torch.empty(8, DIM)
    for group in order.chunk(2):
        expected[group] = apart.key([views[group]])[1]
    torch.testing.assert_close(apart.keys(views, step=3), expected)
    assert not torch.allclose(together.keys(views, step=3), expected, atol=1e-3)
    torch.testing.assert_close(together.keys(views, step=3), together.key([views])[1])


def test_network_without_batch_statistics_needs_no_shuffle(tiny_views):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)

        def forward(self, x):
            return self.conv(x).relu().mean(dim=(2, 3))

    moco, views = method(Plain, key_groups=4), tiny_views(8, 1).global_views[:8]
    torch.testing.assert_close(moco.keys(views, 0), moco.key([views])[1], rtol=0, atol=0)


def test_kept_backbone(pool):
    moco = method(pool)
    assert moco.backbone is moco.query.backbone
    moco = method(pool, keep_key=True)
    assert moco.backbone is moco.key.backbone
    assert moco.frozen(0) == ()


def test_loss_in_bfloat16_stays_near(pool, tiny_views):
    moco, batch = method(pool), tiny_views(NUM_IMAGES, NUM_LOCAL)
    expected = copy.deepcopy(moco).loss(batch, 0).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = moco.loss(batch, 0)
    assert losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(expected.item(), rel=0.02)
