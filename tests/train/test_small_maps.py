import copy
import itertools
import json
from typing import Any

import pytest
import torch
from torch import nn

from midge.runtime.images import list_images
from midge.train import small_maps
from midge.train.backbones import find_backbone
from midge.train.engine import build_fabric
from midge.train.interruption import StopRequest
from midge.train.pretrain import build_dataset
from midge.train.recipes import RECIPES
from midge.train.run_folder import RunFolder
from midge.train.small_maps import SmallMapConv2d, use_small_map_products
from midge.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = {
    "channels": (8, 8, 16, 16),
    "image_px": 32,
    "resize_px": 32,
    "epochs": 2.0,
    "batch_size": 8,
    "head_hidden": 16,
    "head_bottleneck": 8,
    "head_outputs": 32,
    "num_local": 2,
    "queue_size": 16,
    "key_groups": 2,
    "workers": 0,
    "device": "cpu",
    "log_every_steps": 1,
}


@pytest.fixture
def products(monkeypatch):
    """The names of the products that convolutions became, in a list that grows."""
    taken = []

    def note(name, function):
        def noted(*args):
            taken.append(name)
            return function(*args)

        monkeypatch.setattr(small_maps, name, noted)

    for name in ("dense", "depthwise", "pointwise"):
        note(name, getattr(small_maps, name))
    return taken


def pair(*args: Any, memory_format=torch.channels_last, **options: Any) -> tuple[nn.Conv2d, nn.Conv2d]:
    """A float64 convolution and its twin by products."""
    torch.manual_seed(0)
    plain = nn.Conv2d(*args, **options, dtype=torch.float64)
    plain.to(memory_format=memory_format)  # type: ignore[call-overload]
    twin = copy.deepcopy(plain)
    use_small_map_products(twin)
    assert type(plain) is nn.Conv2d and type(twin) is SmallMapConv2d
    return plain, twin


def assert_alike(plain: nn.Conv2d, twin: nn.Conv2d, x: torch.Tensor) -> None:
    """Outputs and all gradients are equal, and those of the weights lie in memory as the weights do."""
    results = []
    for conv in (plain, twin):
        own = x.clone(memory_format=torch.preserve_format).requires_grad_()
        output = conv(own)
        torch.manual_seed(1)
        output.backward(torch.randn(output.shape, dtype=output.dtype))
        results.append([output, own.grad, *(parameter.grad for parameter in conv.parameters())])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        if twin.weight.is_contiguous(memory_format=memory_format):
            assert twin.weight.grad is not None
            assert twin.weight.grad.is_contiguous(memory_format=memory_format)


SIZES = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (1, 2), (3, 1)]


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, (3, 2)])
@pytest.mark.parametrize(("outputs", "groups", "bias"), [(4, 1, True), (4, 1, False), (3, 3, True)])
def test_results_are_those_of_the_convolution(kernel, outputs, groups, bias, products):
    for size, stride, padding in itertools.product(SIZES, (1, 2), (0, 1, 2, 3)):
        plain, twin = pair(3, outputs, kernel, stride=stride, padding=padding, groups=groups, bias=bias)
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        try:
            plain(x)
        except RuntimeError:  # the kernel is larger than the padded map
            with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
                twin(x)
            continue
        assert_alike(plain, twin, x.contiguous(memory_format=torch.channels_last))
    assert ("dense" in products, "depthwise" in products) == (groups == 1, groups > 1)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "way"),
    [
        (1, 3, 1, 1, ["dense"]),
        (2, 3, 1, 1, ["dense"]),
        (2, 3, 2, 1, ["dense"]),
        (2, 5, 1, 2, ["dense"]),
        (1, 1, 1, 0, ["pointwise"]),
        (4, 1, 2, 0, ["pointwise"]),
        (3, 3, 1, 1, []),
        (3, 3, 2, 1, []),
        (4, 3, 2, 1, []),
        (3, 1, 1, 0, []),
    ],
)
def test_small_maps_are_products(size, kernel, stride, padding, way, products):
    _, twin = pair(2, 3, kernel, stride=stride, padding=padding)
    twin(torch.randn(2, 2, size, size, dtype=torch.float64))
    assert products == way


@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"dilation": 2, "padding": 2},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect"},
        {"padding": "same", "stride": 1},
    ],
)
def test_other_convolutions_are_left(options, products):
    plain, twin = pair(4, 6, 3, **{"padding": 1, "stride": 2, **options})
    assert_alike(plain, twin, torch.randn(3, 4, 2, 2, dtype=torch.float64))
    assert products == []


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [1, 2])
def test_both_memory_formats(size, memory_format, products):
    plain, twin = pair(4, 6, 3, padding=1, memory_format=memory_format)
    x = torch.randn(3, 4, size, size, dtype=torch.float64)
    for layout in (torch.channels_last, torch.contiguous_format):
        assert_alike(plain, twin, x.contiguous(memory_format=layout))
        plain.zero_grad()
        twin.zero_grad()
    assert len(products) == 2


def test_unused_taps_have_a_gradient_of_zero():
    conv = pair(2, 3, 3, padding=1)[1]
    conv(torch.randn(4, 2, 1, 1, dtype=torch.float64)).sum().backward()
    assert conv.weight.grad is not None
    unused = torch.ones(3, 3, dtype=torch.bool)
    unused[1, 1] = False
    assert torch.equal(conv.weight.grad[:, :, unused], torch.zeros(3, 2, 8, dtype=torch.float64))
    assert (conv.weight.grad[:, :, 1, 1] != 0).all()


def test_frozen_weights_pass_gradients_on():
    plain, twin = (conv.requires_grad_(False) for conv in pair(2, 3, 3, padding=1))
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64)
    grads = []
    for conv in (plain, twin):
        own = x.clone().requires_grad_()
        conv(own).square().sum().backward()
        grads.append(own.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-10)


def test_autocast_and_other_devices_are_left(products):
    twin = pair(4, 4, 3, padding=1)[1].float()
    x = torch.randn(2, 4, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert twin(x).dtype == torch.bfloat16
    assert twin.to("meta")(x.to("meta")).shape == (2, 4, 1, 1)
    assert products == []


def test_one_image_and_no_image(products):
    plain, twin = pair(4, 4, 3, padding=1)
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(twin(x[0]), plain(x[0]))  # without the dimension of the batch
    assert products == []
    assert twin(x[:0]).shape == (0, 4, 2, 2)
    assert products == ["dense"]


def test_depthwise_forward_alone_is_left(products):
    twin = pair(4, 4, 3, padding=1, groups=4)[1]
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        without = twin(x)
    assert products == []
    torch.testing.assert_close(twin(x), without, rtol=0, atol=1e-10)
    assert products == ["depthwise"]


def test_compiled_code_is_left(products):
    plain, twin = pair(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 1, 1, dtype=torch.float64)
    twin.compile(backend="eager", fullgraph=True)
    assert_alike(plain, twin, x)
    assert products == []


def test_copies_and_weights_stay():
    network: Any = find_backbone("resnet18", 32, (8, 8, 8, 16)).build()
    state, names = copy.deepcopy(network.state_dict()), [name for name, _ in network.named_parameters()]
    use_small_map_products(network)
    twin = copy.deepcopy(network)
    assert type(twin.layer4[1].conv2) is SmallMapConv2d
    assert [name for name, _ in twin.named_parameters()] == names
    assert list(twin.state_dict()) == list(state)
    fresh = find_backbone("resnet18", 32, (8, 8, 8, 16)).build()
    fresh.load_state_dict(twin.state_dict(), strict=True)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(twin(x), fresh(x))


def test_convolutions_of_a_class_of_their_own_are_left():
    class Scaled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    network = nn.Sequential(nn.Conv2d(2, 2, 3), Scaled(2, 2, 3))
    use_small_map_products(network)
    assert [type(module) for module in network] == [SmallMapConv2d, Scaled]


@pytest.mark.parametrize("recipe", ["quickstart", "moco-cnn", "swav-cnn"])
def test_pretraining_goes_as_without(recipe, image_folder, tmp_path, monkeypatch, products):
    """Two steps, so that the second sees what the first made of all weights."""
    data = image_folder(8)
    losses = {}
    for way in ("with", "without"):
        if way == "without":
            monkeypatch.setattr("midge.train.methods.use_small_map_products", lambda network: None)
        (tmp_path / way).mkdir()
        config = RECIPES[recipe](data, tmp_path / way, **TINY)
        backbone = find_backbone(config.backbone, config.image_px, config.channels)
        dataset = build_dataset(config, list_images(data), backbone)
        trainer = Trainer(config, RunFolder(config.out, "test"), build_fabric(config), backbone, dataset)
        products.clear()
        with StopRequest() as stop:
            assert trainer.train(stop) == 0
        assert set(products) == ({"dense", "pointwise"} if way == "with" else set())
        lines = trainer.folder.metrics.read_text().splitlines()
        losses[way] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["with"]) == 2
    assert losses["with"] == pytest.approx(losses["without"], rel=0, abs=1e-5)
