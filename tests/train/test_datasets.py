import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from midge.runtime.errors import UserError
from midge.runtime.images import list_images, load_image
from midge.train.crops import crop_view
from midge.train.datasets import ViewDataset, load_batches
from midge.train.sampling import ViewSampler, epoch_order
from midge.train.views import AUGMENTATIONS, blur_range_px, view_policy

pytestmark = pytest.mark.usefixtures("one_thread")

POLICY = view_policy("lowcompute", "cnn", 32)


def dataset(folder, batch_size=4, seed=0):
    sampler = ViewSampler(POLICY, AUGMENTATIONS["dino"], blur_range_px(32), seed)
    return ViewDataset(list_images(folder), POLICY, sampler, batch_size, seed)


def assert_equal(a, b):
    for x, y in zip(a[:2], b[:2], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(a[2:4], b[2:4], strict=True):
        for name, array in vars(x).items():
            assert np.array_equal(array, getattr(y, name)), name


def test_batch_has_the_policys_views(image_folder):
    data = dataset(image_folder(10))
    batch = data[1]
    assert data.steps_per_epoch == 2
    assert batch.global_views.shape == (2 * 4, 32, 32, 3)
    assert batch.local_views.shape == (6 * 4, 18, 18, 3)
    assert batch.global_views.dtype == torch.uint8
    assert (len(batch.global_parameters.flip), len(batch.local_parameters.flip)) == (8, 24)
    assert batch.unreadable == []
    shares = batch.global_parameters.height * batch.global_parameters.width / 28**2
    assert shares.min() > 0.28
    shares = batch.local_parameters.height * batch.local_parameters.width / 28**2
    assert 0.04 < shares.min() < shares.max() < 0.32


def test_views_are_the_crops_of_the_epochs_images(image_folder):
    data = dataset(image_folder(10), seed=3)
    step = 3  # the second batch of the second epoch
    batch = data[step]
    indices = epoch_order(3, 1, 10)[4:8]
    for n, index in enumerate(indices):
        image = load_image(data.images.path(index))
        for view, (views, p) in enumerate(
            [(batch.global_views, batch.global_parameters)] * 2 + [(batch.local_views, batch.local_parameters)] * 6
        ):
            row = (view if view < 2 else view - 2) * 4 + n
            expected = np.empty(views.shape[1:], dtype=np.uint8)
            crop_view(image, p.top[row], p.left[row], p.height[row], p.width[row], bool(p.flip[row]), expected)
            assert np.array_equal(views[row].numpy(), expected)


def test_batches_do_not_depend_on_the_number_of_workers(image_folder):
    data = dataset(image_folder(18))
    here = list(load_batches(data, 0, 8, workers=0, pin_memory=False))
    elsewhere = list(load_batches(data, 0, 8, workers=2, pin_memory=False))
    assert (len(here), len(elsewhere)) == (8, 8)
    for a, b in zip(here, elsewhere, strict=True):
        assert_equal(a, b)


def test_a_run_goes_on_at_any_step(image_folder):
    data = dataset(image_folder(18))
    whole = list(load_batches(data, 0, 6, workers=0, pin_memory=False))
    rest = list(load_batches(dataset(data.images.root), 4, 6, workers=0, pin_memory=False))
    for a, b in zip(whole[4:], rest, strict=True):
        assert_equal(a, b)


def test_reading_batches_draws_nothing_from_the_trainings_generator(image_folder):
    data = dataset(image_folder(8))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(load_batches(data, 0, 2, workers=1, pin_memory=False))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_set_goes_to_spawned_workers(image_folder):
    data = dataset(image_folder(8))
    assert_equal(pickle.loads(pickle.dumps(data))[1], data[1])


def test_each_image_once_per_epoch(image_folder):
    data = dataset(image_folder(12), batch_size=4)
    seen = []
    read = data._read
    data._read = lambda index, unreadable: seen.append(index) or read(index, unreadable)
    for step in range(6):
        data[step]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen[:12] != seen[12:]


def test_unreadable_images_are_replaced_by_the_next_and_reported_once(image_folder):
    folder = image_folder(8)
    (folder / "002.png").write_bytes(b"not an image")
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:100])
    data = dataset(folder)
    reported = [error.path.name for step in range(4) for error in data[step].unreadable]
    assert sorted(reported) == ["002.png", "003.png"]
    unreadable = []
    assert np.array_equal(data._read(2, unreadable), load_image(folder / "004.png"))
    assert unreadable == []
    again = dataset(folder)
    for step in (3, 1):
        assert_equal(again[step], data[step])


def test_when_nothing_is_readable_the_main_process_hears_of_all(image_folder):
    folder = image_folder(5)
    for path in folder.iterdir():
        path.write_bytes(b"")
    batch = dataset(folder)[0]
    assert len(batch.unreadable) == 5
    assert not batch.global_views.any()


@pytest.mark.parametrize("size", [(1, 1), (3, 90), (7, 5)])
def test_images_smaller_than_the_crop(tmp_path, size):
    for index in range(4):
        Image.new("RGB", size, (200, 30, 60)).save(tmp_path / f"{index}.png")
    batch = dataset(tmp_path)[0]
    assert torch.equal(batch.local_views, torch.tensor([200, 30, 60], dtype=torch.uint8).expand_as(batch.local_views))


def test_fewer_images_than_a_batch(image_folder):
    folder = image_folder(3)
    with pytest.raises(UserError, match="gives 3 images, fewer than one batch of 4: lower --batch-size"):
        dataset(folder)
    for name in ("001.png", "002.png"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="gives 1 image, fewer than one batch"):
        dataset(folder)


def test_large_batches_are_read_in_chunks(image_folder):
    folder = image_folder(70)
    data = dataset(folder, batch_size=70)
    assert data[0].global_views.shape[0] == 140
    shutil.copy(folder / "000.png", folder / "zzz.png")
    halves = dataset(folder, batch_size=35)
    assert halves.steps_per_epoch == 2
