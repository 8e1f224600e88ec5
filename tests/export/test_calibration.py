from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import midge.export.calibration as calibration
from midge.export.calibration import MAX_GOLDEN, draw_samples, find_images, read_images
from midge.runtime.errors import UserError
from midge.runtime.images import content_hash, list_images, load_image
from midge.runtime.preprocess import Preprocess
from midge.train.data_config import PackConfig
from midge.train.pack import pack

PREPROCESS = Preprocess(24, 24)


def hashes(folder: Path) -> set[str]:
    return {content_hash(path) for path in folder.rglob("*.png")}


def test_no_evaluation_image_is_drawn(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, test = images / "train", images / "test"
    shared = hashes(root) & hashes(test)
    assert len(shared) == 3
    samples = draw_samples(root, test, PREPROCESS, 1000, seed=0, workers=2)
    drawn = {*samples.calibration.hashes, *samples.golden.hashes}
    assert drawn == hashes(root) - shared
    assert (samples.excluded, samples.evaluation_images) == (3, 30)
    assert "Passed over 3 images" in capsys.readouterr().err
    without = draw_samples(root, None, PREPROCESS, 1000, seed=0, workers=2)
    assert shared <= {*without.calibration.hashes, *without.golden.hashes}
    assert (without.excluded, without.evaluation_images) == (0, 0)


def test_calibration_and_golden_images_are_different_ones(images: Path) -> None:
    samples = draw_samples(images / "train", None, PREPROCESS, 20, seed=0, workers=2)
    assert (len(samples.calibration), len(samples.golden)) == (20, MAX_GOLDEN)
    assert not set(samples.calibration.hashes) & set(samples.golden.hashes)
    assert len(set(samples.calibration.hashes)) == 20


def test_samples_are_what_the_device_computes(images: Path) -> None:
    samples = draw_samples(images / "train", None, PREPROCESS, 5, seed=0, workers=2)
    for path, sha256, image in zip(
        samples.calibration.paths, samples.calibration.hashes, samples.calibration.inputs, strict=True
    ):
        file = images / "train" / path
        assert content_hash(file) == sha256
        np.testing.assert_array_equal(image, PREPROCESS(load_image(file)))
    assert samples.calibration.inputs.dtype == np.float32


def test_shards_give_the_samples_of_the_folder(images: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        assert pack(PackConfig(images / split, tmp_path / split)) == 0
    expected = draw_samples(images / "train", images / "test", PREPROCESS, 20, seed=0, workers=2)
    found = draw_samples(tmp_path / "train", tmp_path / "test", PREPROCESS, 20, seed=0, workers=2)
    assert found.calibration.to_json() == expected.calibration.to_json()
    np.testing.assert_array_equal(found.golden.inputs, expected.golden.inputs)
    assert (found.excluded, found.evaluation_images) == (expected.excluded, expected.evaluation_images)


def test_the_seed_decides_and_the_workers_do_not(images: Path) -> None:
    def paths(seed: int, workers: int) -> tuple[str, ...]:
        return draw_samples(images / "train", None, PREPROCESS, 20, seed, workers).calibration.paths

    assert paths(0, 1) == paths(0, 4)
    assert paths(0, 1) != paths(1, 1)


def test_labels_are_not_looked_at(images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((images / "train").rglob("*.png")):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    assert list_images(flat).labels is None
    labelled = draw_samples(images / "train", None, PREPROCESS, 20, seed=0, workers=2)
    unlabelled = draw_samples(flat, None, PREPROCESS, 20, seed=0, workers=2)
    assert labelled.calibration.hashes == unlabelled.calibration.hashes


def test_few_images_are_shared_out(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "train" / "ant", tmp_path / "few")
    samples = draw_samples(tmp_path / "few", None, PREPROCESS, 512, seed=0, workers=2)
    assert (len(samples.calibration), len(samples.golden)) == (24, 7)
    only_golden = draw_samples(tmp_path / "few", None, PREPROCESS, 0, seed=0, workers=2)
    assert (len(only_golden.calibration), len(only_golden.golden)) == (0, 31)
    for path in sorted((tmp_path / "few").iterdir())[1:]:
        path.unlink()
    one = draw_samples(tmp_path / "few", None, PREPROCESS, 512, seed=0, workers=2)
    assert one.calibration.hashes == one.golden.hashes
    assert len(one.golden) == 1


def test_images_to_train_on(images: Path) -> None:
    """More of the same draw; never the golden ones, of which fewer images leave at least a quarter."""
    without = draw_samples(images / "train", None, PREPROCESS, 20, seed=0, workers=2)
    samples = draw_samples(images / "train", None, PREPROCESS, 20, seed=0, workers=2, num_training=25)
    assert samples.calibration.hashes == without.calibration.hashes
    assert len(without.training) == 0
    assert (len(samples.training), samples.training.hashes[:20]) == (25, samples.calibration.hashes)
    assert not {*samples.training.hashes} & {*samples.golden.hashes}
    many = draw_samples(images / "train", None, PREPROCESS, 20, seed=0, workers=2, num_training=1000)
    assert (len(many.training), len(many.calibration), len(many.golden)) == (70, 20, 23)
    assert not {*many.training.hashes} & {*many.golden.hashes}


def test_a_repeated_image_counts_once(images: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(images / "train" / "ant", tmp_path / "twice" / name)
    samples = draw_samples(tmp_path / "twice", None, PREPROCESS, 512, seed=0, workers=2)
    assert len(samples.calibration) + len(samples.golden) == 31


def test_memory_is_bounded(images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    image_bytes = 4 * 3 * 24 * 24
    monkeypatch.setattr(calibration, "MAX_BYTES", 10 * image_bytes)
    monkeypatch.setattr(calibration, "GOLDEN_BYTES", 6 * image_bytes)
    samples = draw_samples(images / "train", None, PREPROCESS, 20, seed=0, workers=2)
    assert (len(samples.calibration), len(samples.golden)) == (10, 6)
    assert "Calibrating on 10 images instead of 20" in capsys.readouterr().err


def test_only_evaluation_images(images: Path) -> None:
    with pytest.raises(UserError, match=r"30 of its 30 are evaluation images .* Name training images with --data"):
        draw_samples(images / "test", images / "test", PREPROCESS, 20, seed=0, workers=2)


def test_unreadable_images_are_replaced_up_to_a_share(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(images / "train" / "ant", folder / "ant")
    (folder / "ant" / "broken.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"1 of 32 images are unreadable .*broken\.png"):
        draw_samples(folder, None, PREPROCESS, 512, seed=0, workers=2)
    for index in range(100):
        image = np.full((8, 8, 3), index, np.uint8)
        path = folder / "ant" / f"plain{index}.png"

        Image.fromarray(image).save(path)
    images_read = [image.path for image in read_images(list_images(folder), range(132), PREPROCESS, 2)]
    assert len(images_read) == 131
    assert "ant/broken.png" not in images_read


def test_find_images(run: Path, images: Path, tmp_path: Path) -> None:
    train, test = images / "train", images / "test"
    assert find_images(run, None, None) == (train, test)
    assert find_images(run, test, None) == (test, None)
    assert find_images(run, train, tmp_path) == (train, tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"data": "/nowhere/at/all"}}')
    with pytest.raises(
        UserError, match="'/nowhere/at/all' that the run was trained on are gone: name some with --data"
    ):
        find_images(tmp_path, None, None)
