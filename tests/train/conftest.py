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
