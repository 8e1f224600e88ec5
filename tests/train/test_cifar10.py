"""CIFAR-10 in the publisher's own format: archives of pickles as Python 2 wrote them, from a server on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from midge.runtime.errors import UserError
from midge.runtime.images import list_images
from midge.train.cifar10 import CIFAR10, CifarDataset
from midge.train.data_config import FetchConfig
from midge.train.fetch import DATASETS, fetch

datasets = pytest.importorskip("torchvision.datasets")

PER_BATCH = 20


PicklerInPython: Any = vars(pickle)["_Pickler"]  # the one in C cannot be told to write another type of string


class Python2Pickler(PicklerInPython):
    """Writes what Python 2 and its numpy wrote: byte strings, and the names of that time."""

    dispatch: ClassVar[dict[Any, Any]] = dict(PicklerInPython.dispatch)

    def save_text(self, text: str | bytes) -> None:
        data = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)

    dispatch[str] = dispatch[bytes] = save_text

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        if isinstance(value, np.ndarray):
            state = (1, value.shape, value.dtype, False, value.tobytes())
            return Reconstruct(), (np.ndarray, (0,), "b"), state
        return NotImplemented

    def save_global(self, value: Any, name: str | None = None) -> None:
        if isinstance(value, Reconstruct):
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n")
        else:
            super().save_global(value, name)

    def save(self, value: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(value, Reconstruct):
            self.save_global(value)
        else:
            super().save(value, *arguments, **options)


class Reconstruct:
    """Stands for the function by which numpy rebuilds an array."""

    def __call__(self) -> None: ...


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve) -> tuple[Path, np.ndarray, np.ndarray]:
    """The served archive of 5 + 1 small batches, its images (120, 32, 32, 3) and labels; torchvision expects it."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6 * PER_BATCH, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, 6 * PER_BATCH)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {"batches.meta": python2_pickle({"label_names": list(CIFAR10.classes), "num_vis": 3072})}
    for number, name in enumerate(names):
        part = slice(number * PER_BATCH, (number + 1) * PER_BATCH)
        batch = {"data": images[part].reshape(PER_BATCH, -1), "labels": labels[part].tolist(), "batch_label": name}
        files[name] = python2_pickle(batch)
    (tmp_path / "served").mkdir()
    archive = tmp_path / "served" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [[names[5], md5[names[5]]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5["batches.meta"]})
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    small = dataclasses.replace(
        CIFAR10,
        sha256={archive.name: hashlib.sha256(archive.read_bytes()).hexdigest()},
        counts={"train": 5 * PER_BATCH, "test": PER_BATCH},
    )
    monkeypatch.setitem(DATASETS, "cifar10", small)
    monkeypatch.setattr(datasets.CIFAR10, "url", serve(archive.parent).address + archive.name)
    return archive, images.transpose(0, 2, 3, 1), labels


def test_images_are_lossless_in_their_class_folders(
    cifar: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, images, labels = cifar
    assert fetch(FetchConfig("cifar10", tmp_path / "out")) == 0
    assert "100 train, 20 test images" in capsys.readouterr().out
    for split, first, count in (("train", 0, 100), ("test", 100, 20)):
        assert len(list_images(tmp_path / "out" / split)) == count
        for index in range(count):
            label = CIFAR10.classes[labels[first + index]]
            with Image.open(tmp_path / "out" / split / label / f"{index:05}.png") as image:
                np.testing.assert_array_equal(np.asarray(image), images[first + index])
    assert fetch(FetchConfig("cifar10", tmp_path / "out")) == 0
    assert "already complete" in capsys.readouterr().out


def test_an_archive_of_another_content_is_not_opened(
    cifar: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if MD5 had been forged: the pickle in it would write a file."""
    archive, _, _ = cifar
    trap = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    data = pickle.dumps(Trap())
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", hashlib.md5(data).hexdigest()]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [])
    with pytest.raises(UserError, match=r"'cifar-10-python.tar.gz' has the SHA-256 [0-9a-f]{64}, not "):
        fetch(FetchConfig("cifar10", tmp_path / "out"))
    assert not trap.exists() and not (tmp_path / "out").exists()


def test_a_damaged_archive_is_one_line(cifar: tuple[Path, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    archive, _, _ = cifar
    archive.write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"The download of CIFAR10 failed \(.*\): try again with a network") as error:
        fetch(FetchConfig("cifar10", tmp_path / "out"))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    with pytest.raises(UserError, match=r"The download of CIFAR10 failed .*: try again with a network"):
        fetch(FetchConfig("cifar10", tmp_path / "out"))


def test_the_known_archive_is_the_one_that_torchvision_downloads() -> None:
    assert isinstance(DATASETS["cifar10"], CifarDataset)
    assert CIFAR10.sha256.keys() == {datasets.CIFAR10.filename}
    assert CIFAR10.counts == {"train": 50_000, "test": 10_000}
