"""Image sets in the hub's format: the real loading code, on local folders of parquet files and of images."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from midge.runtime.errors import UserError
from midge.runtime.images import list_images
from midge.train.data_config import FetchConfig
from midge.train.fetch import fetch
from midge.train.fetch_hub import HUB_DATASETS, class_folders

datasets = pytest.importorskip("datasets")

NAMES = ["tench, Tinca tinca", "crane, bird", "great white shark, white shark", "crane, machine"]


def encoded(value: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (10, 8), (value, 30, 60)).save(buffer, kind)
    return buffer.getvalue()


def use(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setitem(
        HUB_DATASETS, "imagenet-1k", dataclasses.replace(HUB_DATASETS["imagenet-1k"], repository=str(repository))
    )


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[bytes, int]]]:
    """A repository with the files of the real one: images as bytes, classes by number, a test split without labels."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {
        "train": [(encoded(i, "png" if i % 3 == 0 else "jpeg"), i * 7 % 4) for i in range(30)],
        "validation": [(encoded(100 + i, "jpeg"), i % 4) for i in range(8)],
        "test": [(encoded(200, "jpeg"), -1)],
    }
    (tmp_path / "repository" / "data").mkdir(parents=True)
    for split, pairs in rows.items():
        for part in range(2):
            columns = {
                "image": [{"bytes": data, "path": None} for data, _ in pairs[part::2]],
                "label": [label for _, label in pairs[part::2]],
            }
            if columns["label"]:
                table = datasets.Dataset.from_dict(columns, features=features)
                table.to_parquet(tmp_path / "repository" / "data" / f"{split}-{part:05}-of-00002.parquet")
    use(monkeypatch, tmp_path / "repository")
    return rows


def test_each_image_is_in_the_shards_as_it_was(
    parquet: dict[str, list[tuple[bytes, int]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(FetchConfig("imagenet-1k", tmp_path / "out", json=True)) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["fetched"], result["counts"]) == (True, {"train": 30, "validation": 8})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["SOURCE.json", "train", "validation"]
    for split in ("train", "validation"):
        images = list_images(tmp_path / "out" / split)
        assert images.classes == ("0-tench", "1-crane", "2-great-white-shark", "3-crane")
        assert images.labels is not None
        expected = parquet[split][0::2] + parquet[split][1::2]
        assert [(images.source(i), int(images.labels[i])) for i in range(len(images))] == expected
        kinds = {bytes(expected[i][0][:2]): path[-4:] for i, path in enumerate(images.paths)}
        assert kinds[b"\xff\xd8"] == ".jpg" and kinds.get(b"\x89P", ".png") == ".png"
    assert fetch(FetchConfig("imagenet-1k", tmp_path / "out")) == 0
    assert "already complete" in capsys.readouterr().out
    (tmp_path / "out" / "validation" / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="is missing"):
        fetch(FetchConfig("imagenet-1k", tmp_path / "out"))


def test_a_repository_of_image_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation"):
        for number, name in enumerate(("bee", "ant")):
            (tmp_path / "folder" / split / name).mkdir(parents=True)
            for i in range(3):
                path = tmp_path / "folder" / split / name / f"{i}.jpg"
                path.write_bytes(encoded(10 * number + i, "jpeg"))
    use(monkeypatch, tmp_path / "folder")
    assert fetch(FetchConfig("imagenet-1k", tmp_path / "out")) == 0
    images = list_images(tmp_path / "out" / "train")
    assert images.classes == ("0-ant", "1-bee")
    files = {path.read_bytes(): path.parent.name for path in (tmp_path / "folder" / "train").rglob("*.jpg")}
    assert images.labels is not None
    assert {images.source(i): images.classes[images.labels[i]][2:] for i in range(6)} == files


def test_other_columns_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "repository" / f"{split}.parquet")
    use(monkeypatch, tmp_path / "repository")
    with pytest.raises(UserError, match=r"has no column 'image' of images and .*: its columns are text"):
        fetch(FetchConfig("imagenet-1k", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_damaged_repository_is_one_line_and_leaves_nothing(
    parquet: dict[str, list[tuple[bytes, int]]], tmp_path: Path
) -> None:
    path = tmp_path / "repository" / "data" / "validation-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="imagenet-1k cannot be had from the Hugging Face hub") as error:
        fetch(FetchConfig("imagenet-1k", tmp_path / "out"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "'hf auth login'"),
        ("sys.modules['datasets'] = None; ", "pip install 'midge[hub]'"),
    ],
)
def test_without_access_or_the_package_one_line_says_what_to_do(tmp_path: Path, code: str, message: str) -> None:
    run = f"import sys; {code}from midge.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", run, "data", "fetch", "imagenet-1k", "--out", str(tmp_path / "out")],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if "error" in line][-1].endswith(f"{message}.")
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_class_folders_sort_by_number_and_differ() -> None:
    folders = class_folders([f"Thing № {i}, other" for i in range(11)] + ["Thing", "Thing"])
    assert folders[:2] == ["00-thing-0", "01-thing-1"] and folders[11:] == ["11-thing", "12-thing"]
    assert sorted(folders) == folders
    assert len(np.unique(folders)) == 13
