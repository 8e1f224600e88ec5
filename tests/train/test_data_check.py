"""``midge data check`` on images of all kinds, and on what is no image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from midge.runtime.errors import UserError
from midge.train.data_check import check
from midge.train.data_config import CheckConfig

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Readable images of every mode, 40 x 30 px, in two classes."""
    cats, dogs = tmp_path / "cat", tmp_path / "dog"
    cats.mkdir()
    dogs.mkdir()
    Image.fromarray(noise(30, 40, 3)).save(cats / "rgb.jpg")
    Image.fromarray(noise(30, 40, 4)).save(cats / "rgba.png")
    Image.fromarray(noise(30, 40)).save(cats / "grey.png")
    Image.fromarray(noise(30, 40).astype(np.uint16) * 257).save(dogs / "deep.png")
    Image.fromarray(noise(30, 40, 4)).convert("CMYK").save(dogs / "cmyk.jpg")
    return tmp_path


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict]:
    code = check(CheckConfig(folder, json=True))
    return code, json.loads(capsys.readouterr().out)


def test_readable_images_of_every_mode(folder: Path, capsys: pytest.CaptureFixture[str]):
    code, report = run(folder, capsys)
    assert code == 0
    assert report["unreadable"] == []
    assert report["readable"] == report["images"] == 5
    assert report["modes"] == {"RGB": 1, "L": 1, "RGBA": 1, "I;16": 1, "CMYK": 1}
    assert report["sizes"] == {"40 × 30": 5}
    assert report["classes"] == {"cat": 3, "dog": 2}
    assert report["duplicates"] == []


def test_unreadable_images_are_named_with_their_reasons(folder: Path, capsys: pytest.CaptureFixture[str]):
    whole = (folder / "cat" / "rgb.jpg").read_bytes()
    (folder / "cat" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "dog" / "text.png").write_text("no image")
    (folder / "dog" / "empty.png").write_bytes(b"")
    (folder / "dog" / "twin.jpg").write_bytes(whole)
    code, report = run(folder, capsys)
    assert code == 1
    assert [entry["path"] for entry in report["unreadable"]] == ["cat/truncated.jpg", "dog/empty.png", "dog/text.png"]
    truncated, empty, text = (entry["reason"] for entry in report["unreadable"])
    assert "truncated" in truncated
    assert "empty" in empty
    assert "no image" in text
    assert report["readable"] == 6
    assert report["duplicates"] == [{"path": "dog/twin.jpg", "same_as": "cat/rgb.jpg"}]

    assert check(CheckConfig(folder)) == 1
    printed = capsys.readouterr().out
    assert "6 of 9 images" in printed
    assert "dog/text.png" in printed


def test_folder_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.fromarray(noise(8, 8)).save(tmp_path / "[one].png")  # a name that is also rich markup
    Image.fromarray(noise(8, 9)).save(tmp_path / "two.png")
    code, report = run(tmp_path, capsys)
    assert code == 0
    assert report["classes"] == {}
    assert report["sizes"] == {"8 × 8": 1, "9 × 8": 1}
    assert check(CheckConfig(tmp_path)) == 0
    assert "no labels" in capsys.readouterr().out


def test_long_lists_are_cut_in_print_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for index in range(30):
        (tmp_path / f"{index:02d}.png").write_text("text")
    code, report = run(tmp_path, capsys)
    assert code == 1
    assert len(report["unreadable"]) == 30
    assert check(CheckConfig(tmp_path)) == 1
    printed = capsys.readouterr().out
    assert "19.png" in printed
    assert "20.png" not in printed
    assert "10 more" in printed


def test_folder_of_text_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="no image"):
        check(CheckConfig(tmp_path))


def test_missing_folder(tmp_path: Path):
    with pytest.raises(UserError, match="absent"):
        check(CheckConfig(tmp_path / "absent"))
