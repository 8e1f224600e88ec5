import json

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def one_thread():
    """One torch thread: equal bits from run to run, and no waiting for each other where tests run in parallel."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_settings():
    """Settings of a pretraining that takes a second: a quickstart with a small network and few steps."""
    return {
        "channels": (8, 8, 8, 8),
        "epochs": 2.0,
        "batch_size": 8,
        "head_hidden": 16,
        "head_bottleneck": 8,
        "head_outputs": 32,
        "num_local": 2,
        "base_lr": 0.48,
        "koleo_weight": 0.0,
        "freeze_batch_norm": False,
        "warmup_epochs": 0.5,
        "workers": 0,
        "device": "cpu",
        "checkpoint_every_steps": 2,
        "log_every_steps": 2,
    }


@pytest.fixture
def tiny(tiny_settings):
    """Make such a configuration: ``tiny(data, out, **changes)``."""
    from midge.train.recipes import quickstart

    return lambda data, out, **changes: quickstart(data, out, **{**tiny_settings, **changes})


@pytest.fixture
def image_folder(tmp_path):
    """Make a folder of small noisy gradients, each its own: ``image_folder(number)``."""

    def make(number=24, name="images", px=28):
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        ramp = np.linspace(0, 1, px)
        for index in range(number):
            slopes = rng.uniform(-1, 1, (2, 3))
            image = 0.5 + ramp[:, None, None] * slopes[0] / 2 + ramp[None, :, None] * slopes[1] / 2
            noisy = np.clip(255 * image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{index:03}.png")
        return folder

    return make


@pytest.fixture
def labelled_folder(tmp_path):
    """Make a folder of classes that differ in hue and in where they are bright: ``labelled_folder(name, each)``."""

    def make(name="train", each=12, px=28, seed=0, classes=("ant", "bee", "cat")):
        rng = np.random.default_rng(seed)
        for label, folder_name in enumerate(classes):
            folder = tmp_path / name / folder_name
            folder.mkdir(parents=True)
            for index in range(each):
                image = rng.normal(110, 40, (px, px, 3))
                image[label * px // 3 : (label + 1) * px // 3, :, label % 3] += 90
                Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{index:03}.png")
        return tmp_path / name

    return make


@pytest.fixture
def run_folder(tmp_path):
    """Make a run folder with an untrained backbone: ``run_folder(data)``."""

    def make(data=None, name="run", timm_name="resnet18", timm_args=None, feature_dim=16):
        import torch

        from midge.runtime.preprocess import Preprocess
        from midge.runtime.torch_model import ModelSpec, build_model, save_model

        timm_args = {"channels": (8, 8, 8, 16)} if timm_args is None else timm_args
        spec = ModelSpec(timm_name, timm_args, 0, feature_dim, (), Preprocess(32, 32), 32, {"method": "none"})
        torch.manual_seed(0)
        save_model(tmp_path / name, "backbone", build_model(spec), spec)
        if data is not None:
            (tmp_path / name / "config.json").write_text(json.dumps({"schema": 1, "config": {"data": str(data)}}))
        return tmp_path / name

    return make


@pytest.fixture
def pool():
    """A tiny backbone with batch normalization, for any image size: ``pool()`` gives 6 features."""
    from torch import nn

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x):
            return self.norm(self.conv(x)).relu().mean(dim=(2, 3))

    return Pool


@pytest.fixture
def tiny_views():
    """Make random views: ``tiny_views(images, local views, seed)``; 8 px and 5 px."""
    import torch

    from midge.train.method import Views

    def make(num_images, num_local, seed=1):
        generator = torch.Generator().manual_seed(seed)
        sizes = ((2, 8), (num_local, 5))
        return Views(*(torch.randn(views * num_images, 3, px, px, generator=generator) for views, px in sizes))

    return make
