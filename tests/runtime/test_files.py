from __future__ import annotations

import json
from pathlib import Path

import pytest

from midge.runtime.errors import UserError, require, unknown_name
from midge.runtime.files import (
    atomic_file,
    atomic_folder,
    check_replaceable,
    read_json,
    refuse_existing,
    sha256_file,
    write_json,
)


def test_atomic_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "deep/x.txt"
    with pytest.raises(RuntimeError), atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    for text in ("first", "second"):
        with atomic_file(path) as partial:
            partial.write_text(text)
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_atomic_folder_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), atomic_folder(path) as partial:
        (partial / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(path) as partial:
        (partial / "a").write_text("whole")
        assert not path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UserError, match="exists already: name a new folder with --out"), atomic_folder(path):
        pytest.fail("the folder was taken")


def test_a_folder_is_written_through_a_link_and_to_where_we_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
    with atomic_folder(tmp_path / "link") as partial:
        (partial / "a").write_text("whole")
    assert (tmp_path / "disk" / "empty" / "a").read_text() == "whole"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_folder(Path()) as partial:
        (partial / "a").write_text("whole")
    assert (tmp_path / "here" / "a").read_text() == "whole"


def test_a_mounted_volume_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path.resolve())
    with pytest.raises(UserError, match="is a mounted volume, which cannot be replaced: name a folder in it"):
        check_replaceable(tmp_path)


def test_refuse_existing_takes_a_free_or_empty_place(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "new")
    refuse_existing(tmp_path)
    (tmp_path / "x").write_text("")
    for taken in (tmp_path, tmp_path / "x"):
        with pytest.raises(UserError, match="exists already"):
            refuse_existing(taken)


def test_json_round_trip_and_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, None, "é"]})
    assert read_json(path, "record") == {"a": [1, None, "é"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["a"][0] == 1


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b"1" * 5000])
def test_hostile_json_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"The record '.*x\.json' is not valid JSON") as caught:
        read_json(path, "record")
    assert "\n" not in str(caught.value)


def test_missing_and_large_json(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No record at"):
        read_json(tmp_path / "none.json", "record")
    (tmp_path / "x.json").write_text("[1, 2, 3]")
    with pytest.raises(UserError, match="has 9 bytes: more than the 8 that are read"):
        read_json(tmp_path / "x.json", "record", max_bytes=8)


def test_sha256_of_a_file_larger_than_a_block(tmp_path: Path) -> None:
    import hashlib

    data = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_unknown_name_lists_what_is_allowed() -> None:
    assert str(unknown_name("backbone", "x", ["b", "a"])) == "Unknown backbone 'x': choose one of a, b."


def test_require_names_the_extra_and_lets_other_failures_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert require("json", "train") is json
    with pytest.raises(UserError, match=r"'no_such_package' is not installed .*'midge\[report\]'"):
        require("no_such_package.inner", "report")
    (tmp_path / "broken_package.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        require("broken_package", "train")
