from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from midge.runtime.errors import UserError
from midge.runtime.images import (
    UnreadableBudget,
    UnreadableImageError,
    content_hash,
    fingerprint,
    list_images,
    load_image,
)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def test_image_folder_layout_gives_labels(tmp_path: Path) -> None:
    images = list_images(touch(tmp_path, "b/2.png", "a/x/1.JPG", "b/1.png", "a/0.webp", "a/notes.txt"))
    assert images.paths == ("a/0.webp", "a/x/1.JPG", "b/1.png", "b/2.png")
    assert images.classes == ("a", "b")
    assert images.labels is not None
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.path(1) == tmp_path / "a/x/1.JPG"
    assert len(images) == 4


@pytest.mark.parametrize("names", [["1.png", "a/2.png", "b/3.png"], ["a/1.png", "a/b/2.png"], ["1.png"]])
def test_other_layouts_have_no_labels(tmp_path: Path, names: list[str]) -> None:
    images = list_images(touch(tmp_path, *names))
    assert images.paths == tuple(sorted(names))
    assert images.labels is None
    assert images.classes == ()


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    images = list_images(touch(tmp_path, "a/1.png", "b/1.png", "a/._1.png", ".cache/1.png"))
    assert images.paths == ("a/1.png", "b/1.png")


def test_every_extension_is_found(tmp_path: Path) -> None:
    extensions = ["jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif", "ppm"]
    assert len(list_images(touch(tmp_path, *(f"x.{extension}" for extension in extensions)))) == len(extensions)


def test_links_are_followed_without_loops(tmp_path: Path) -> None:
    root = touch(tmp_path / "root", "a/1.png", "b/1.png")
    touch(tmp_path / "elsewhere", "1.png")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    (root / "a/loop").symlink_to(root)
    (tmp_path / "elsewhere/back").symlink_to(root)
    assert {path.count("/") for path in list_images(root).paths} <= {1, 2, 3}
    assert "c/1.png" in list_images(root).paths


def test_dangling_links_are_listed_and_pipes_are_not(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    images = list_images(tmp_path)
    assert images.paths == ("gone.png",)
    assert len(fingerprint(images)) == 64
    with pytest.raises(UnreadableImageError, match="No such file"):
        load_image(images.path(0))


def test_limit_is_a_seeded_subset(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{i}.png" for i in range(50)))
    first = list_images(tmp_path, limit=10, seed=1)
    assert len(first) == 10
    assert first.paths == tuple(sorted(first.paths))
    assert first.paths == list_images(tmp_path, limit=10, seed=1).paths
    assert first.paths != list_images(tmp_path, limit=10, seed=2).paths
    assert len(list_images(tmp_path, limit=1000)) == 50


def test_limit_keeps_each_class_in_proportion(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(f"a/{i}.png" for i in range(60)),
        *(f"b/{i}.png" for i in range(30)),
        *(f"c/{i}.png" for i in range(10)),
    )
    for seed in range(5):
        images = list_images(tmp_path, limit=10, seed=seed)
        assert images.labels is not None
        assert np.bincount(images.labels).tolist() == [6, 3, 1]
        assert images.classes == ("a", "b", "c")
    images = list_images(tmp_path, limit=15, seed=0)
    assert images.labels is not None
    counts = np.bincount(images.labels)
    assert counts.sum() == 15
    assert counts[0] == 9
    assert [path[0] for path in images.paths] == [images.classes[label] for label in images.labels]


def test_take_keeps_the_order_given(tmp_path: Path) -> None:
    images = list_images(touch(tmp_path, "a/1.png", "b/2.png", "b/3.png")).take(np.array([2, 0]))
    assert images.paths == ("b/3.png", "a/1.png")
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "is an empty folder: put images into it"),
        (["a/x.txt", "y.txt", "README"], r"holds 3 files but no image \(2 × \.txt, 1 × no extension\): images end in"),
        (["train/a/1.png", "test/a/1.png"], "holds the splits test, train: name one of them"),
        (["Train/1.png"], "holds the splits Train: name one of them"),
        (["train/1.png", "val/1.png", "labels/x.csv"], "holds the splits train, val"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        list_images(touch(tmp_path, *names))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_folder_file_and_limit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No folder at '.*nowhere'"):
        list_images(tmp_path / "nowhere")
    touch(tmp_path, "x.png")
    with pytest.raises(UserError, match="is a file: give the folder"):
        list_images(tmp_path / "x.png")
    with pytest.raises(UserError, match="must be at least 1"):
        list_images(tmp_path, limit=0)


def test_a_class_that_is_named_like_a_split_is_a_class(tmp_path: Path) -> None:
    assert list_images(touch(tmp_path, "train/1.png", "bus/1.png")).classes == ("bus", "train")


def test_listing_many_files_is_fast(tmp_path: Path) -> None:
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        for i in range(300):
            (tmp_path / f"{label}/{i}.png").touch()
    started = time.perf_counter()
    assert len(list_images(tmp_path)) == 3000
    assert time.perf_counter() - started < 1.0  # about 0.01 s; a stat of each file would not show, a decode would


def test_fingerprint_covers_paths_labels_sizes_and_sampled_content(tmp_path: Path) -> None:
    def of(name: str, *files: tuple[str, bytes]) -> str:
        for path, data in files:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(data)
        return fingerprint(list_images(tmp_path / name))

    base = of("base", ("a/1.png", b"xx"), ("b/1.png", b"yy"))
    assert len(base) == 64
    assert of("moved", ("a/1.png", b"xx"), ("b/1.png", b"yy")) == base
    others = [
        of("renamed", ("a/2.png", b"xx"), ("b/1.png", b"yy")),
        of("class", ("a/1.png", b"xx"), ("c/1.png", b"yy")),
        of("size", ("a/1.png", b"xxx"), ("b/1.png", b"yy")),
        of("content", ("a/1.png", b"xz"), ("b/1.png", b"yy")),
        of("fewer", ("a/1.png", b"xx")),
    ]
    assert len({base, *others}) == 6
    images = list_images(tmp_path / "base")
    assert fingerprint(images.take([1])) != base


def test_content_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert content_hash(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_budget_names_each_image_once_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    budget = UnreadableBudget(max_share=0.1, total=20)
    for name in ("a.png", "a.png", "b.png"):
        budget.skip(UnreadableImageError(Path(name), "it is cut"))
    assert len(budget.paths) == 2
    assert capsys.readouterr().err.splitlines() == ["Skipped 'a.png': it is cut.", "Skipped 'b.png': it is cut."]
    with pytest.raises(
        UserError, match=r"3 of 20 images are unreadable \(15.0%, allowed 10.0%\), the last one 'c.png'"
    ):
        budget.skip(UnreadableImageError(Path("c.png"), "it is cut"))


def test_listed_images_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "x.png")
    assert load_image(list_images(tmp_path).path(0)).shape == (2, 3, 3)
