"""Tar shards in the place of a folder: the same training, the same evaluation, and damage that is counted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import pytest
from torch.utils.data import Dataset

from midge.__main__ import main
from midge.runtime.errors import UserError
from midge.runtime.images import list_images
from midge.runtime.shard_index import INDEX_FILE
from midge.train.data_config import PackConfig
from midge.train.datasets import Share, load_batches
from midge.train.pack import pack
from midge.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(run):
    return (run / "backbone.safetensors").read_bytes()


@pytest.fixture
def packed(tmp_path):
    """Pack a folder: ``packed(folder)``."""

    def make(folder):
        out = tmp_path / "packed" / folder.name
        assert pack(PackConfig(folder, out)) == 0
        return out

    return make


def test_a_run_on_shards_ends_in_the_bytes_of_a_run_on_the_folder(image_folder, packed, tmp_path, tiny):
    folder = image_folder(28)
    for name, data, workers in (("folder", folder, 0), ("shards", packed(folder), 2)):
        assert pretrain(tiny(data, tmp_path / name, workers=workers)) == 0
    assert weights(tmp_path / "folder") == weights(tmp_path / "shards")


def test_a_run_that_was_started_on_the_folder_goes_on_with_the_shards(image_folder, packed, tmp_path, tiny):
    folder = image_folder(28)
    shards = packed(folder)
    config = tiny(folder, tmp_path / "moved", epochs=6.0)

    def stop():
        deadline = time.monotonic() + 60
        while not (config.out / "checkpoints" / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert pretrain(config) == 143
    thread.join()
    shutil.rmtree(folder)
    assert pretrain(dataclasses.replace(config, data=shards, resume=True)) == 0
    assert pretrain(tiny(shards, tmp_path / "whole", epochs=6.0)) == 0
    assert weights(tmp_path / "moved") == weights(tmp_path / "whole")


def test_knn_on_shards_is_knn_on_folders(labelled_folder, packed, run_folder, capsys):
    train, test = labelled_folder("train", each=20), labelled_folder("test", each=8, seed=1)
    results = []
    for data in (train, packed(train)):
        if data != train:
            packed(test)
        run = run_folder(data, name=f"run-{len(results)}")
        assert main(["knn", str(run), "--labels", "40", "--baselines", "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        results.append({key: value for key, value in result.items() if key not in {"run", "data", "test", "seconds"}})
    assert results[0] == results[1]


def test_a_shard_that_is_cut_is_trained_on_as_far_as_it_goes(image_folder, packed, tmp_path, capsys, tiny):
    shards = packed(image_folder(28))
    images = list_images(shards)
    assert images.shards is not None
    (shards / INDEX_FILE).unlink()
    os.truncate(shards / "shard-000000.tar", int(images.shards.offsets[26]) + 100)
    config = tiny(shards, tmp_path / "run", workers=1, max_unreadable=0.04)
    assert pretrain(config) == 0
    assert "026.png': its shard is cut off." in capsys.readouterr().err
    with pytest.raises(UserError, match=r"1 of 27 images are unreadable .*026.png': its shard is cut off") as error:
        pretrain(dataclasses.replace(config, out=tmp_path / "other", workers=0, max_unreadable=0.01))
    assert "\n" not in str(error.value)


class Pids(Dataset):
    share = Share()

    def __getitem__(self, step):
        return os.getpid()


def test_workers_live_as_long_as_the_run():
    """Its epochs are one pass of the loader, so that no worker is started again."""
    pids = list(load_batches(Pids(), 0, 60, workers=2, pin_memory=False))  # type: ignore[arg-type]
    assert len(pids) == 60 and len(set(pids)) == 2 and os.getpid() not in pids
