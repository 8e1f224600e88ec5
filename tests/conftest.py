"""Real images for the tests of the whole path: a part of Fashion-MNIST, fetched as a user would."""

from __future__ import annotations

from pathlib import Path

import pytest

TRAIN_IMAGES, TEST_IMAGES = 300, 120


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of Fashion-MNIST, from the Debian package where it is installed, else downloaded by torchvision."""
    from midge.__main__ import main

    folder = tmp_path_factory.mktemp("data") / "fashion-mnist"
    assert main(["data", "fetch", "fashion-mnist", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def small_fashion(fashion: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of each class: 300 to train on, 120 to test on."""
    folder = tmp_path_factory.mktemp("small") / "fashion-mnist"
    for split, number in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        for source in sorted((fashion / split).iterdir()):
            target = folder / split / source.name
            target.mkdir(parents=True)
            for path in sorted(source.iterdir())[: number // 10]:
                (target / path.name).hardlink_to(path)
    return folder
