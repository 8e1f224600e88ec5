"""Folders of tar shards: any origin, the same images as a folder, and everything that can be wrong with them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from midge.runtime.errors import UserError
from midge.runtime.images import ImageList, UnreadableImageError, fingerprint, list_images
from midge.runtime.shard_index import INDEX_FILE, SCHEMA, read_index
from midge.runtime.shards import MAX_IMAGE_BYTES


def png(value: int, px: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (px, px), (value, 0, 255 - value)).save(buffer, "png")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1.7e9, "someone"
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of other make: names that repeat, numbers as labels, metadata."""
    folder = tmp_path / "shards"
    for number in range(2):
        members: dict[str, bytes] = {}
        for i in range(3):
            members[f"{i:04}.png"] = png(100 * number + i)
            members[f"{i:04}.cls"] = b"%d\n" % (i % 2 * 10)
            members[f"{i:04}.json"] = b"{}"
        write_tar(folder / f"x-{number:03}.tar", members)
    return folder


def reasons(images: ImageList) -> dict[str, str]:
    found = {}
    for index in range(len(images)):
        try:
            images.load(index)
        except UnreadableImageError as error:
            assert error.path == images.path(index)
            found[images.paths[index]] = error.reason
    return found


def test_shards_without_an_index_are_indexed_once(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = list_images(shards)
    assert "Indexed 6 images" in capsys.readouterr().err
    assert first.paths[3] == "x-001.tar/0000.png"
    assert first.path(3) == shards / "x-001.tar/0000.png"
    assert first.classes == ("0", "10")
    assert first.labels is not None and first.labels.tolist() == [0, 1, 0, 0, 1, 0]
    assert [int(first.load(i)[0, 0, 0]) for i in range(6)] == [0, 1, 2, 100, 101, 102]
    again = list_images(shards)
    assert capsys.readouterr().err == ""
    assert (again.paths, again.classes, fingerprint(again)) == (first.paths, first.classes, fingerprint(first))


def test_take_and_limit_are_those_of_any_list(shards: Path) -> None:
    images = list_images(shards)
    chosen = images.take([4, 0])
    assert [int(chosen.load(i)[0, 0, 0]) for i in range(2)] == [101, 0]
    assert chosen.path(0) == images.path(4)
    limited = list_images(shards, limit=3, seed=1)
    assert limited.labels is not None and np.bincount(limited.labels).tolist() == [2, 1]
    assert [limited.source(i) for i in range(3)] == [images.source(images.paths.index(path)) for path in limited.paths]


def test_a_folder_that_cannot_be_written_is_indexed_each_time(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("midge.runtime.shard_scan.write_index", refuse)  # root may write everywhere
    assert len(list_images(shards)) == 6
    assert "is not kept (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("members", "classes", "labels"),
    [
        ({"a/1.png": b"", "b/1.png": b""}, ("a", "b"), [0, 1]),
        ({"b/1.png": b"", "b/1.cls": b"0", "a/1.png": b"", "a/1.cls": b"1"}, ("a", "b"), [1, 0]),
        ({"p/1.png": b"", "p/1.cls": b"cat", "p/2.png": b"", "p/2.cls": b"ant"}, ("ant", "cat"), [1, 0]),
        ({"p/1.png": b"", "p/1.cls": b"7", "q/2.png": b"", "q/2.cls": b"7"}, ("p", "q"), [0, 1]),
        ({"p/1.png": b"", "p/1.cls": b"7", "q/2.png": b""}, ("p", "q"), [0, 1]),
        ({"1.png": b"", "1.cls": b"10", "2.png": b"", "2.cls": b"9"}, ("9", "10"), [1, 0]),
        ({"1.png": b"", "a/2.png": b""}, (), None),
        ({"train/1.png": b"", "test/2.png": b""}, (), None),
        ({"./a/1.png": b"", "./b/1.png": b"", "b/._1.png": b"", ".x/1.png": b""}, ("a", "b"), [0, 1]),
        ({"1.left.png": b"", "1.right.png": b"", "1.cls": b"3", "2.png": b"", "2.cls": b"1"}, ("1", "3"), [1, 1, 0]),
        ({"1.png": b"", "1.cls": b"3" * 300, "2.png": b"", "2.cls": b"1"}, (), None),
    ],
)
def test_labels(tmp_path: Path, members: dict[str, bytes], classes: tuple[str, ...], labels: list[int] | None) -> None:
    write_tar(tmp_path / "x.tar", members)
    images = list_images(tmp_path)
    assert images.classes == classes
    assert (None if images.labels is None else images.labels.tolist()) == labels


def test_a_refused_member_is_counted_and_costs_no_label(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a/1.png": png(1), "../2.png": png(2), "b/3.png": png(3)})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("b/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    images = list_images(tmp_path)
    assert images.classes == ("a", "b")
    assert reasons(images) == {
        "../2.png": "its path leads out of the shard's folder",
        "b/link.png": "it is a link or no plain file",
    }
    assert len(fingerprint(images)) == 64
    assert reasons(list_images(tmp_path)) == reasons(images)


def test_a_huge_member_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("b.png")
    info.size = MAX_IMAGE_BYTES + 1
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(write_tar(tmp_path / "y", {"a.png": png(1)}).read_bytes()[:1024] + info.tobuf())
        file.truncate(1 << 30)  # a hole
    assert reasons(list_images(tmp_path)) == {
        "b.png": f"it has {MAX_IMAGE_BYTES + 1} bytes, more than the {MAX_IMAGE_BYTES} that are read"
    }


def test_a_shard_that_is_cut_gives_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {f"{i}.png": png(i, px=64) for i in range(5)}
    path = write_tar(tmp_path / "x.tar", members)
    whole = list_images(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    assert whole.shards is not None
    os.truncate(path, int(whole.shards.offsets[3]) + 20)
    cut = list_images(tmp_path)
    assert "has no end mark: it may be cut off, after 4 images" in capsys.readouterr().err
    assert cut.paths == tuple(members)[:4]
    assert reasons(cut) == {"3.png": "its shard is cut off"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 3000), r"'x-001.tar' has 3000 bytes, \d+ when it was indexed: put it back"),
        (lambda path: path.unlink(), r"x-001.tar' is missing: put it back, or remove '.*index.jsonl'"),
        (lambda path: path.with_name("x-000.tar").rename(path), r"x-000.tar' is missing"),
        (lambda path: write_tar(path.with_name("y.tar"), {}), r"y.tar' is not in the index of the shards: remove"),
    ],
)
def test_shards_that_are_not_those_of_the_index(shards: Path, change: Callable[[Path], object], message: str) -> None:
    list_images(shards)
    change(shards / "x-001.tar")
    with pytest.raises(UserError, match=message) as error:
        list_images(shards)
    assert "\n" not in str(error.value)
    (shards / INDEX_FILE).unlink()
    if (shards / "x-001.tar").exists() and (shards / "x-001.tar").stat().st_size != 3000:
        assert len(list_images(shards)) >= 3


def test_a_shard_that_changes_under_a_reader_makes_its_images_unreadable(shards: Path) -> None:
    images = list_images(shards)
    path = shards / "x-001.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert set(reasons(images).values()) == {
        f"its shard 'x-001.tar' has {len(content) // 2} bytes, {len(content)} when it was indexed"
    }
    swapped = write_tar(shards / "x-001.tar", {f"{i:04}.png": png(i) for i in (1, 0, 2)}).read_bytes()
    path.write_bytes(swapped + bytes(len(content) - len(swapped)))
    assert reasons(images)["x-001.tar/0000.png"] == "its shard has changed since it was indexed"
    path.unlink()
    assert reasons(images)["x-001.tar/0002.png"] == "its shard cannot be read (No such file or directory)"


def rewrite(folder: Path, change: Callable[[list[dict]], object]) -> None:
    lines = [json.loads(line) for line in (folder / INDEX_FILE).read_text().splitlines()]
    change(lines)
    (folder / INDEX_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_an_index_of_a_later_schema(shards: Path) -> None:
    list_images(shards)
    rewrite(shards, lambda lines: lines[0].update(schema=SCHEMA + 1))
    with pytest.raises(UserError, match=f"has the schema {SCHEMA + 1}, this midge reads up to {SCHEMA}: update midge"):
        list_images(shards)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[0].update(kind="records"),
        lambda lines: lines[0].update(images=7),
        lambda lines: lines[0].update(shards=3),
        lambda lines: lines[0].update(shards=1),
        lambda lines: lines[0].update(shards=True),
        lambda lines: lines[0].update(classes=["0"]),
        lambda lines: lines[0].pop("classes"),
        lambda lines: lines[1].update(file="../x-000.tar"),
        lambda lines: lines[1].update(file="/etc/x.tar"),
        lambda lines: lines[1].update(file="x-001.tar"),
        lambda lines: lines[1].update(url="pipe:touch x"),
        lambda lines: lines[1].update(url="file:///etc/passwd"),
        lambda lines: lines[1].update(sha256="0"),
        lambda lines: lines[1]["offsets"].__setitem__(0, -512),
        lambda lines: lines[1]["offsets"].__setitem__(0, 1 << 70),
        lambda lines: lines[1]["sizes"].__setitem__(0, -9),
        lambda lines: lines[1]["sizes"].__setitem__(0, 1.5),
        lambda lines: lines[1]["labels"].__setitem__(0, 2),
        lambda lines: lines[1]["paths"].pop(),
        lambda lines: lines[1]["paths"].__setitem__(0, None),
        lambda lines: lines.append({}),
        lambda lines: lines.clear(),
    ],
)
def test_a_damaged_index_is_one_line(shards: Path, change: Callable[[list[dict]], object]) -> None:
    list_images(shards)
    rewrite(shards, change)
    with pytest.raises(
        UserError, match=r"index of shards '.*' is damaged .*remove it, and the shards are indexed again"
    ):
        list_images(shards)


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6), st.booleans())
def test_any_damage_to_an_index(tmp_path_factory: pytest.TempPathFactory, place: int, junk: bytes, cut: bool) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzzed-index"
    if not (folder / "whole").exists():
        write_tar(folder / "x.tar", {"a/1.png": png(1), "b/2.png": png(2)})
        list_images(folder)
        (folder / INDEX_FILE).rename(folder / "whole")
    content = bytearray((folder / "whole").read_bytes())
    place %= len(content)
    content[place : place + len(junk)] = junk
    (folder / INDEX_FILE).write_bytes(content[: place + len(junk)] if cut else content)
    try:
        paths, labels, _, _ = read_index(folder)
    except UserError as error:
        assert str(error).count("\n") == 0
    else:
        assert len(paths) == 2 and (labels is None or len(labels) == 2)


def test_shards_without_an_image(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.txt": b"1"})
    with pytest.raises(UserError, match="hold no image"):
        list_images(tmp_path)


def test_images_beside_a_tar_stay_a_folder_of_images(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.png": png(1)})
    (tmp_path / "b.png").write_bytes(png(2))
    assert list_images(tmp_path).paths == ("b.png",)


@pytest.mark.parametrize("address", ["http://127.0.0.1/x-{000..001}.tar", "pipe:cat x.tar"])
def test_an_address_is_no_folder(address: str) -> None:
    with pytest.raises(UserError, match="is an address: fetch its shards once with 'midge data fetch"):
        list_images(Path(address))
