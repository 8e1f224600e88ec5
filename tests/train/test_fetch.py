"""``midge data fetch``: real files of the Debian package where installed; damaged and hostile files; the download."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import http.server
import json
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from midge.runtime.errors import UserError
from midge.train.data_config import FetchConfig
from midge.train.fashion_mnist import FASHION_MNIST as FASHION
from midge.train.fashion_mnist import IdxDataset, IdxFile, read_idx
from midge.train.fetch import DATASETS, fetch, write_splits

debian = pytest.mark.skipif(not FASHION.debian_folder.is_dir(), reason=f"{FASHION.debian_package} is not installed")


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


def write_idx(path: Path, array: np.ndarray, compress_level: int = 9) -> IdxFile:
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content, compress_level))
    return IdxFile(path.name, len(content), hashlib.sha256(content).hexdigest(), array.shape)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> IdxDataset:
    """An image set of 30 + 10 images with real IDX files, known as ``small``."""
    folder = tmp_path / "package"
    folder.mkdir()
    rng = np.random.default_rng(0)
    splits = {}
    for split, count in (("train", 30), ("test", 10)):
        images = write_idx(folder / f"{split}-images.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        labels = write_idx(folder / f"{split}-labels.gz", (np.arange(count) % 10).astype(np.uint8))
        splits[split] = (images, labels)
    dataset = dataclasses.replace(FASHION, debian_folder=folder, splits=splits)
    monkeypatch.setitem(DATASETS, "small", dataset)
    return dataset


@debian
def test_debian_files_have_the_known_content():
    arrays = FASHION.read_folder(FASHION.debian_folder)
    assert FASHION.counts == {"train": 60_000, "test": 10_000}
    for split, count in FASHION.counts.items():
        images, labels = arrays[split]
        assert images.shape == (count, 28, 28)
        assert np.bincount(labels).tolist() == [count // 10] * 10
    # The first training image is an ankle boot, the second a T-shirt: as in the publisher's own preview.
    assert [FASHION.classes[label] for label in arrays["train"][1][:3]] == ["ankle-boot", "tshirt", "tshirt"]


@debian
def test_written_images_are_lossless_and_named_by_their_index(tmp_path: Path):
    images, labels = FASHION.read_folder(FASHION.debian_folder)["test"]
    # more than a block, so that several processes write
    write_splits(tmp_path, {"test": (images[:1500], labels[:1500])}, FASHION.classes)
    paths = sorted(tmp_path.rglob("*.png"), key=lambda path: path.name)
    assert [path.stem for path in paths] == [f"{index:05d}" for index in range(1500)]
    assert [path.parent.name for path in paths] == [FASHION.classes[label] for label in labels[:1500]]
    for path, expected in zip(paths[::100], images[:1500:100], strict=True):
        with Image.open(path) as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), expected)


def test_fetch_writes_once_and_says_so(small: IdxDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert fetch(FetchConfig("small", out, json=True)) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["fetched"] is True
    assert first["counts"] == {"train": 30, "test": 10}
    assert sorted(path.name for path in out.iterdir()) == ["SOURCE.json", "test", "train"]
    source = json.loads((out / "SOURCE.json").read_text())
    assert source["licence"] == "MIT"
    assert source["sha256"] == small.sha256
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    assert fetch(FetchConfig("small", out)) == 0
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    next((out / "train").rglob("*.png")).unlink()
    with pytest.raises(UserError, match=r"29 of the 30 train images .* remove it and fetch it again"):
        fetch(FetchConfig("small", out))


def test_foreign_folder_is_refused_and_left_alone(small: IdxDataset, tmp_path: Path):
    out = tmp_path / "photos"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        fetch(FetchConfig("small", out))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_unknown_set_names_the_known_ones():
    with pytest.raises(UserError, match=r"Unknown image set 'mnist': choose one of .*fashion-mnist"):
        fetch(FetchConfig("mnist"))


def test_truncated_gzip_is_damaged(tmp_path: Path):
    path = tmp_path / "a.gz"
    known = write_idx(path, np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8))
    np.testing.assert_array_equal(read_idx(path, known).shape, (9, 28, 28))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        read_idx(path, known)
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 255]) + whole[101:])
    with pytest.raises(UserError, match=r"is damaged|SHA-256"):
        read_idx(path, known)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(UserError, match="is damaged"):
        read_idx(path, known)
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        read_idx(path, known)


def test_the_compression_may_differ_but_not_the_content(tmp_path: Path):
    array = np.arange(784, dtype=np.uint8).reshape(1, 28, 28)
    known = write_idx(tmp_path / "a.gz", array, compress_level=9)
    write_idx(tmp_path / "a.gz", array, compress_level=0)
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz", known), array)
    write_idx(tmp_path / "a.gz", array[:, ::-1])
    with pytest.raises(UserError, match=rf"SHA-256 [0-9a-f]{{64}}, not {known.sha256}"):
        read_idx(tmp_path / "a.gz", known)


def test_decompression_bomb_is_not_unpacked(tmp_path: Path):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="more than the 1000 bytes"):
            read_idx(path, IdxFile(path.name, 1000, "0" * 64, (984,)))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_failed_fetch_leaves_nothing(small: IdxDataset, tmp_path: Path):
    (small.debian_folder / "test-labels.gz").write_bytes(b"")
    with pytest.raises(UserError):
        fetch(FetchConfig("small", tmp_path / "new" / "out"))
    assert not (tmp_path / "new").exists()


def test_download_without_a_network_names_both_ways(
    small: IdxDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])  # nothing listens there
    absent = dataclasses.replace(small, debian_folder=tmp_path / "absent")
    monkeypatch.setitem(DATASETS, "small", absent)
    with pytest.raises(UserError, match=r"apt-get install dataset-fashion-mnist.*network") as error:
        fetch(FetchConfig("small", tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out == ""


def test_download_gives_the_same_files(small: IdxDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """torchvision's own downloader, from a server on this machine."""
    datasets = pytest.importorskip("torchvision.datasets")
    handler = functools.partial(QuietHandler, directory=str(small.debian_folder))
    names = [file.name for files in small.splits.values() for file in files]
    standard = [  # torchvision reads the standard names once it has them
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ]
    for name, new in zip(names, standard, strict=True):
        (small.debian_folder / name).rename(small.debian_folder / new)
    resources = [(n, hashlib.md5((small.debian_folder / n).read_bytes()).hexdigest()) for n in standard]
    files = [dataclasses.replace(f, name=n) for f, n in zip(sum(small.splits.values(), ()), standard, strict=True)]
    splits = {"train": (files[0], files[1]), "test": (files[2], files[3])}
    absent = dataclasses.replace(small, debian_folder=tmp_path / "absent", splits=splits)
    monkeypatch.setitem(DATASETS, "small", absent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"])
        monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
        try:
            assert fetch(FetchConfig("small", tmp_path / "out")) == 0
        finally:
            server.shutdown()
    assert len(list((tmp_path / "out").rglob("*.png"))) == 40
    assert json.loads((tmp_path / "out" / "SOURCE.json").read_text())["source"] == "torchvision.datasets.FashionMNIST"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass
