"""``midge data pack``: the shards are the folder, for midge and for webdataset alike."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest

from midge.runtime.errors import UserError
from midge.runtime.images import content_hash, fingerprint, list_images
from midge.runtime.shard_index import INDEX_FILE
from midge.train.data_check import check
from midge.train.data_config import CheckConfig, PackConfig
from midge.train.pack import member_name, pack

leaves_files_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset does


@pytest.fixture
def packed(labelled_folder, tmp_path):
    """A labelled folder and its shards."""
    folder = labelled_folder(each=200, px=40)
    assert pack(PackConfig(folder, tmp_path / "packed", shard_mib=1)) == 0
    return folder, tmp_path / "packed"


def test_shards_are_the_folder_to_all_who_use_it(packed):
    folder, out = packed
    files, shards = list_images(folder), list_images(out)
    assert shards.shards is not None and len(shards.shards.shards) == 4
    assert (shards.paths, shards.classes) == (files.paths, files.classes)
    assert shards.labels is not None and files.labels is not None
    assert np.array_equal(shards.labels, files.labels)
    assert fingerprint(shards) == fingerprint(files)
    for index in range(0, 600, 7):
        assert np.array_equal(shards.load(index), files.load(index))
        assert shards.size_bytes(index) == files.size_bytes(index)
        assert content_hash(shards.source(index)) == content_hash(files.source(index))
    assert fingerprint(list_images(out, limit=50, seed=3)) == fingerprint(list_images(folder, limit=50, seed=3))


def test_without_its_index_it_is_indexed_to_the_same(packed):
    _, out = packed
    before = list_images(out)
    (out / INDEX_FILE).unlink()
    after = list_images(out)
    assert (after.paths, after.classes, fingerprint(after)) == (before.paths, before.classes, fingerprint(before))


def test_equal_images_give_equal_bytes(packed, tmp_path):
    folder, out = packed
    for path in folder.rglob("*.png"):
        path.touch()
    assert pack(PackConfig(folder, tmp_path / "again", shard_mib=1)) == 0
    for path in out.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@leaves_files_open
def test_webdataset_reads_each_image_with_its_label_once(packed):
    webdataset = pytest.importorskip("webdataset")
    folder, out = packed
    files = list_images(folder)
    seen = {}
    urls = sorted(str(path) for path in out.glob("*.tar"))
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        seen[f"{sample['__key__']}.png"] = (sample["png"], int(sample["cls"]))
    assert files.labels is not None
    assert seen == {path: ((folder / path).read_bytes(), int(files.labels[i])) for i, path in enumerate(files.paths)}


def test_shards_that_webdataset_wrote(image_folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    files = list_images(image_folder(20))
    (tmp_path / "wds").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "wds" / "s-%03d.tar"), maxcount=8, verbose=0) as writer:
        for index, path in enumerate(files.paths):
            data = (files.root / path).read_bytes()
            writer.write({"__key__": path[:-4], "png": data, "cls": index % 3, "json": {"i": index}})
    shards = list_images(tmp_path / "wds")
    assert shards.paths == files.paths
    assert shards.labels is not None and shards.labels.tolist() == [i % 3 for i in range(20)]
    assert shards.classes == ("0", "1", "2")
    for index in range(20):
        assert np.array_equal(shards.load(index), files.load(index))


@leaves_files_open
def test_names_that_webdataset_would_misread(image_folder, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder = image_folder(6)
    for old, new in (("000", "a.b.c"), ("001", "same"), ("002", "ünï"), ("003", "x" * 130)):
        (folder / f"{old}.png").rename(folder / f"{new}.png")
    (folder / "same.jpg").write_bytes((folder / "same.png").read_bytes())
    assert pack(PackConfig(folder, tmp_path / "packed")) == 0
    shards = list_images(tmp_path / "packed")
    assert shards.paths == (
        "004.png",
        "005.png",
        "a_b_c-000000002.png",
        "same.jpg",
        "same-000000004.png",
        f"{'x' * 130}.png",
        "ünï.png",
    )
    for index, path in enumerate(list_images(folder).paths):
        assert shards.source(index) == (folder / path).read_bytes()
    urls = [str(tmp_path / "packed" / "shard-000000.tar")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sum(key in sample for key in ("png", "jpg")) for sample in samples] == [1] * 7


@pytest.mark.parametrize(
    ("path", "last_key", "expected"),
    [
        ("a/1.png", "a/0", "a/1.png"),
        ("a.b/1.png", "a.b/0", "a.b/1.png"),
        ("a/1.png", "a/1", "a/1-000000007.png"),
        ("a/1.x.PNG", "", "a/1_x-000000007.PNG"),
    ],
)
def test_member_name(path, last_key, expected):
    assert member_name(path, 7, last_key) == expected


def test_what_cannot_be_read_is_left_out_and_said(image_folder, tmp_path, capsys):
    folder = image_folder(3)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(1 << 30)  # a hole
    assert pack(PackConfig(folder, tmp_path / "out", json=True)) == 1
    captured = capsys.readouterr()
    assert "gone.png': No such file or directory" in captured.err
    assert "huge.png': it has 1073741824 bytes, more than" in captured.err
    result = json.loads(captured.out)
    assert (result["images"], result["left_out"], result["shards"], result["classes"]) == (3, 2, 1, 0)
    assert result["bytes"] == (tmp_path / "out" / "shard-000000.tar").stat().st_size


def test_nothing_is_left_where_it_fails(image_folder, tmp_path):
    folder = image_folder(2)
    for path in folder.iterdir():
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nothing to pack"):
        pack(PackConfig(folder, tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    with pytest.raises(UserError, match="exists already"):
        pack(PackConfig(folder, folder))
    with pytest.raises(UserError, match="--shard-mib is 0"):
        pack(PackConfig(folder, tmp_path / "out", shard_mib=0))


def test_shards_are_packed_again(packed, tmp_path):
    folder, out = packed
    assert pack(PackConfig(out, tmp_path / "one")) == 0
    again = list_images(tmp_path / "one")
    assert again.shards is not None and len(again.shards.shards) == 1
    assert fingerprint(again) == fingerprint(list_images(folder))


def test_check_finds_a_shard_whose_bytes_have_changed(packed, capsys):
    _, out = packed
    assert check(CheckConfig(out)) == 0
    path = out / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        label = archive.getmembers()[1]
    content[label.offset_data + 100] ^= 1  # in the padding behind the label: no image notices
    path.write_bytes(content)
    capsys.readouterr()
    assert check(CheckConfig(out, json=True)) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["unreadable"], report["changed_shards"]) == ([], ["shard-000001.tar"])
    assert check(CheckConfig(out)) == 1
    assert "shard-000001.tar" in capsys.readouterr().out
