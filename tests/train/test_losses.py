"""The KoLeo term against plain loops, and what each method adds of it."""

import numpy as np
import pytest
import torch

from midge.train.backbones import find_backbone
from midge.train.losses import koleo
from midge.train.methods import METHODS, Plan
from midge.train.views import view_policy

PARTS = ("student", "query", "network")  # what each method calls the network that learns

pytestmark = pytest.mark.usefixtures("one_thread")


def slow_koleo(embeddings):
    """-log of the distance to the nearest other embedding of the view, image by image."""
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    terms = []
    for view in unit:
        for i in range(len(view)):
            distances = [np.linalg.norm(view[i] - view[j]) for j in range(len(view)) if j != i]
            terms.append(-np.log(min(distances) + 1e-6))
    return np.mean(terms)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_koleo_equals_plain_loops(views):
    embeddings = torch.randn(views, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert koleo(embeddings).item() == pytest.approx(slow_koleo(embeddings.numpy()), rel=1e-9)


def test_koleo_drives_embeddings_apart_and_bears_two_alike():
    torch.manual_seed(0)
    embeddings = torch.randn(1, 8, 4)
    embeddings[0, 1] = embeddings[0, 0]
    embeddings.requires_grad_()
    before = koleo(embeddings)
    assert torch.isfinite(before) and before > 3  # two of eight have a distance of 0: 2/8 of -log(1e-6)
    apart = torch.randn(1, 8, 4, requires_grad=True)
    first = koleo(apart)
    (gradient,) = torch.autograd.grad(first, apart)
    assert koleo(apart - 0.05 * gradient) < first


@pytest.mark.parametrize("name", sorted(METHODS))
def test_each_method_adds_the_term_of_its_global_views(tiny, tiny_views, tmp_path, name):
    views, found, gradients = tiny_views(6, 2), {}, []
    for weight in (0.0, 0.3):
        config = tiny(tmp_path, tmp_path / "run", method=name, queue_size=8, koleo_weight=weight)
        backbone = find_backbone(config.backbone, config.image_px, config.channels)
        torch.manual_seed(0)
        plan = Plan(config, backbone, view_policy("lowcompute", "cnn", 32), steps_per_epoch=3, steps=6)
        method = METHODS[name](plan)
        found[weight] = method.loss(views, 0)
        found[weight].total.backward()
        trained = next(module for module in (getattr(method, part, None) for part in PARTS) if module is not None)
        gradients.append(trained.backbone.conv1.weight.grad)
    embeddings = found[0.3].embeddings.double().numpy()  # of the global views that are trained on
    term = slow_koleo(embeddings.reshape(-1, 6, embeddings.shape[1]))
    assert not torch.allclose(*gradients)  # it is of the network that learns
    assert found[0.3].total.item() == pytest.approx(found[0.0].total.item() + 0.3 * term, rel=1e-5)
