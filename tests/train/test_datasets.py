import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from midge.runtime.errors import UserError
from midge.runtime.images import list_images, load_image
from midge.train.cpu_views import cut_batch
from midge.train.datasets import ViewDataset, load_batches
from midge.train.sampling import ViewSampler, epoch_order
from midge.train.views import AUGMENTATIONS, blur_range_px, view_policy

pytestmark = pytest.mark.usefixtures("one_thread")

POLICY = view_policy("lowcompute", "cnn", 32)


def dataset(folder, batch_size=4, seed=0, executor="cpu", min_px=None):
    sampler = ViewSampler(POLICY, AUGMENTATIONS["dino"], blur_range_px(32), seed)
    return ViewDataset(list_images(folder), POLICY, sampler, batch_size, seed, executor=executor, min_px=min_px)


def assert_equal(a, b):
    """Two batches of any executor, bit by bit."""
    assert type(a) is type(b)
    for x, y in zip(a, b, strict=True):
        assert type(x) is type(y)
        if isinstance(x, torch.Tensor):
            assert torch.equal(x, y)
        elif isinstance(x, np.ndarray):
            assert np.array_equal(x, y)
        elif isinstance(x, tuple):
            assert_equal(x, y)


def test_batch_has_the_policys_views(image_folder):
    data = dataset(image_folder(10))
    batch = data[1]
    assert data.steps_per_epoch == 2
    assert batch.global_views.shape == (2 * 4, 32, 32, 3)
    assert batch.local_views.shape == (6 * 4, 18, 18, 3)
    assert batch.global_views.dtype == torch.uint8
    assert batch.unreadable == []


def test_views_are_those_of_the_epochs_images(image_folder):
    data = dataset(image_folder(10), seed=3)
    step = 3  # the second batch of the second epoch
    indices = epoch_order(3, 1, 10)[4:8]
    images = [load_image(data.images.path(index)) for index in indices]
    parameters = data.sampler(1, indices, np.full(4, 28), np.full(4, 28))
    assert_equal(data[step], cut_batch([(images, parameters)], 4, POLICY)._replace(unreadable=[]))
    for index in range(4):  # one by one, though read together
        alone = data.sampler(1, indices[index : index + 1], np.array([28]), np.array([28]))
        views = cut_batch([(images[index : index + 1], alone)], 1, POLICY)
        assert torch.equal(views.local_views, data[step].local_views[index::4])


@pytest.mark.parametrize("executor", ["cpu", "device"])
def test_batches_do_not_depend_on_the_number_of_workers(image_folder, executor):
    data = dataset(image_folder(18), executor=executor)
    here = list(load_batches(data, 0, 8, workers=0, pin_memory=False))
    elsewhere = list(load_batches(data, 0, 8, workers=2, pin_memory=False))
    assert (len(here), len(elsewhere)) == (8, 8)
    assert_equal(elsewhere[5], data[5])  # arrays are arrays still: what stays on the host is not sent to a device
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


@pytest.mark.parametrize("executor", ["cpu", "device"])
def test_data_set_goes_to_spawned_workers(image_folder, executor):
    data = dataset(image_folder(8), executor=executor)
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
    data = dataset(tmp_path)
    for flat in (data.sampler.chance[name] for name in ("jitter", "grayscale", "solarize")):
        flat[:] = 0
    batch = data[0]
    assert torch.equal(batch.local_views, torch.tensor([200, 30, 60], dtype=torch.uint8).expand_as(batch.local_views))


def test_large_images_are_decoded_at_a_part_of_their_size(tmp_path):
    for index in range(4):
        Image.new("RGB", (300, 200), (200, 30, 60)).save(tmp_path / f"{index}.jpg")
    whole, part = dataset(tmp_path, executor="device")[0], dataset(tmp_path, executor="device", min_px=100)[0]
    assert whole.sizes.max() > 150
    assert part.sizes.max() <= 150
    for ours, theirs in zip(whole.global_steps, part.global_steps, strict=True):  # the same draws
        assert np.array_equal(ours, theirs)


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


def test_workers_end_with_the_batches(image_folder):
    batches = load_batches(dataset(image_folder(10)), 0, 2, workers=2, pin_memory=False)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()  # what is left of it, as a traceback would keep it, holds no worker
    assert multiprocessing.active_children() == []
    assert list(batches) == []
