"""The cache against the images it was made from; damage, other data, several processes, a full disk."""

import json
import multiprocessing
import pickle
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from midge.runtime.errors import UserError
from midge.runtime.images import UnreadableImageError, fingerprint, list_images, load_image
from midge.train.data_config import PackConfig
from midge.train.decode_cache import open_cache
from midge.train.pack import pack


def opened(data, folder, min_px=None, limit=None):
    images = list_images(data, limit)
    return open_cache(folder, images, fingerprint(images), min_px, workers=2)


def left(path):
    return sorted(child.name for child in path.iterdir() if child.name.startswith(("cache", ".cache")))


def test_the_same_images_bit_by_bit(image_folder, tmp_path, capsys):
    data = image_folder(100)
    cache = opened(data, tmp_path / "cache")
    error = capsys.readouterr().err
    assert "takes 0.00 GB of " in error
    assert "for 100 images" in error
    for index in range(100):
        np.testing.assert_array_equal(cache.load(index), load_image(cache.images.path(index)))
    again = opened(data, tmp_path / "cache")
    assert capsys.readouterr().err == ""  # it was there
    np.testing.assert_array_equal(again.load(7), cache.load(7))
    unpickled = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(unpickled.load(7), cache.load(7))
    assert len(pickle.dumps(cache)) < 20_000  # the pixels stay where they are


def test_it_holds_the_reduced_images(image_folder, tmp_path):
    cache = opened(image_folder(4, px=64), tmp_path / "cache", min_px=16)
    assert cache.load(0).shape == (16, 16, 3)
    np.testing.assert_array_equal(cache.load(0), load_image(cache.images.path(0), min_px=16))


def test_unreadable_images_stay_unreadable(image_folder, tmp_path):
    data = image_folder(6)
    (data / "002.png").write_bytes(b"broken")
    cache = opened(data, tmp_path / "cache")
    with pytest.raises(UnreadableImageError) as expected:
        load_image(data / "002.png")
    with pytest.raises(UnreadableImageError) as caught:
        cache.load(2)
    assert str(caught.value) == str(expected.value)
    np.testing.assert_array_equal(cache.load(3), load_image(data / "003.png"))
    for path in data.iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="None of the 6 images"):
        opened(data, tmp_path / "cache2")
    assert not (tmp_path / "cache2").exists()


def test_a_damaged_image_is_decoded_from_its_file(image_folder, tmp_path, capsys):
    data = image_folder(6)
    opened(data, tmp_path / "cache")
    with (tmp_path / "cache/pixels.bin").open("r+b") as file:
        file.seek(3 * 28 * 28 * 3 + 5)
        file.write(b"\x00\xff\x00\xff")
    cache = opened(data, tmp_path / "cache")
    capsys.readouterr()
    for index in range(6):
        np.testing.assert_array_equal(cache.load(index), load_image(cache.images.path(index)))
    assert capsys.readouterr().err.count("is damaged at") == 1


def cut_pixels(folder):
    with (folder / "pixels.bin").open("r+b") as file:
        file.truncate(100)


def change_index(folder):
    content = bytearray((folder / "index.npy").read_bytes())
    content[-1] ^= 1
    (folder / "index.npy").write_bytes(content)


def no_json(folder):
    (folder / "cache.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut_pixels, "is damaged: remove it"), (change_index, "is damaged: remove it"), (no_json, "is not valid JSON")],
)
def test_a_damaged_cache_is_refused(image_folder, tmp_path, damage, message):
    data = image_folder(4)
    opened(data, tmp_path / "cache")
    damage(tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        opened(data, tmp_path / "cache")


def test_a_cache_of_something_else_is_refused(image_folder, tmp_path):
    data, folder = image_folder(8), tmp_path / "cache"
    opened(data, folder)
    for changes, message in (({"limit": 4}, "other images"), ({"min_px": 9}, "another --decode-px")):
        with pytest.raises(UserError, match=f"was made from {message}.*: give another folder"):
            opened(data, folder, **changes)
    description = json.loads((folder / "cache.json").read_text())
    for name, value, message in (
        ("versions", {"pillow": "1"}, "other versions of Pillow or OpenCV"),
        ("schema", 0, "another version of midge"),
    ):
        (folder / "cache.json").write_text(json.dumps({**description, name: value}))
        with pytest.raises(UserError, match=f"was made from {message}: give another folder"):
            opened(data, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/diary.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no decode cache"):
        opened(data, tmp_path / "full")
    assert (tmp_path / "full/diary.txt").read_text() == "mine"


def test_too_little_room_is_said_before_anything_is_written(image_folder, tmp_path, monkeypatch):
    data = image_folder(4)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("midge.train.decode_cache.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.00 GB and 0\.00 GB are free there"):
        opened(data, tmp_path / "cache")
    assert left(tmp_path) == [".cache.lock"]


def test_a_full_disk_leaves_no_cache(image_folder, tmp_path):
    """The system's own limit on the size of a file stands for the disk's end: the write fails halfway."""
    data = image_folder(40)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        with pytest.raises(UserError, match=r"The disk is full: .* nothing of it is left"):
            opened(data, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert left(tmp_path) == [".cache.lock"]
    assert opened(data, tmp_path / "cache").load(39).shape == (28, 28, 3)


def test_what_a_killed_process_left_is_removed(image_folder, tmp_path):
    (tmp_path / ".cache.partial-abc").mkdir()
    (tmp_path / ".cache.partial-abc/pixels.bin").write_bytes(b"half")
    opened(image_folder(4), tmp_path / "cache")
    assert left(tmp_path) == [".cache.lock", "cache"]


def make(data, folder, results):
    cache = opened(data, folder)
    results.put([int(cache.load(index).sum()) for index in range(30)])


def test_several_processes_make_it_once(image_folder, tmp_path):
    data = image_folder(30)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=make, args=(data, tmp_path / "cache", results)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    images = list_images(data)
    assert sums == [[int(load_image(images.path(index)).sum()) for index in range(30)]] * 3
    assert left(tmp_path) == [".cache.lock", "cache"]


def test_a_killed_maker_leaves_the_way_free(image_folder, tmp_path):
    data = image_folder(30)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from midge.runtime.images import fingerprint, list_images\n"
        "from midge.train import decode_cache\n"
        "def die(*a, **k): os.kill(os.getpid(), 9)\n"
        "decode_cache.write_json = die\n"
        f"images = list_images(Path({str(data)!r}))\n"
        f"decode_cache.open_cache(Path({str(tmp_path / 'cache')!r}), images, fingerprint(images), None, 1)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert process.returncode == -9
    assert len(left(tmp_path)) == 2  # the lock and the half
    assert opened(data, tmp_path / "cache").load(0).shape == (28, 28, 3)
    assert left(tmp_path) == [".cache.lock", "cache"]


def test_images_in_shards(image_folder, tmp_path):
    data = image_folder(12)
    assert pack(PackConfig(data, tmp_path / "shards")) == 0
    images = list_images(tmp_path / "shards")
    cache = open_cache(tmp_path / "cache", images, fingerprint(images), None, workers=2)
    for index in range(12):
        np.testing.assert_array_equal(cache.load(index), images.load(index))
