from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from midge.runtime.engine_cache import EngineCache, default_folder
from midge.runtime.errors import UserError

FACTS = {"onnx_sha256": "a" * 64, "version": "10.3.0", "gpu": {"name": "Orin", "compute_capability": "8.7"}}
CONTENT = bytes(range(256)) * 8


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    made = EngineCache(tmp_path / "new" / "cache")
    made.store("engine", FACTS, CONTENT)
    return made


def test_what_was_stored_is_read_back_by_this_user_alone(cache: EngineCache) -> None:
    assert cache.load("engine", FACTS) == CONTENT
    assert EngineCache(cache.folder).load("engine", FACTS) == CONTENT
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in cache.folder.iterdir()] == [0o600]
    cache.store("engine", FACTS, b"")
    assert cache.load("engine", FACTS) == b""
    cache.remove("engine", FACTS)
    assert cache.load("engine", FACTS) is None
    assert not list(cache.folder.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"onnx_sha256": "b" * 64},
        {"version": "10.3.1"},
        {"gpu": {"name": "Orin", "compute_capability": "8.9"}},
        {"recipe": {"precision": "int8"}},
    ],
)
def test_each_fact_is_part_of_the_key(cache: EngineCache, changes: dict[str, Any]) -> None:
    assert cache.load("engine", {**FACTS, **changes}) is None
    assert cache.load("timing", FACTS) is None


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "a flipped bit":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "cut":
        path.write_bytes(content[:-1])
    elif how == "longer":
        path.write_bytes(content + b"x")
    elif how == "no head":
        path.write_bytes(content.partition(b"\n")[2])
    elif how == "other facts":
        path.write_bytes(content.replace(b"10.3.0", b"10.3.1"))
    elif how == "a link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to(path.with_name("elsewhere"))
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "writable by others":
        path.chmod(0o622)
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize(
    "how",
    [
        *("a flipped bit", "cut", "longer", "no head", "other facts"),
        *("a link", "a pipe", "writable by others", "empty"),
    ],
)
def test_what_cannot_be_trusted_is_not_read_and_can_be_made_again(
    cache: EngineCache, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cache.path("engine", FACTS)
    damage(path, how)
    assert cache.load("engine", FACTS) is None
    assert f"The cached '{path}' is made again" in capsys.readouterr().err.replace("\n", " ")
    cache.store("engine", FACTS, CONTENT)
    assert cache.load("engine", FACTS) == CONTENT
    assert not path.is_symlink()


def test_a_file_of_another_name_is_not_taken_for_this_one(cache: EngineCache) -> None:
    other = {**FACTS, "version": "11.0"}
    cache.path("engine", FACTS).rename(cache.path("engine", other))
    assert cache.load("engine", other) is None


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"Others may write to the cache '.*open', and engines run as programs do: chmod"
    ):
        EngineCache(tmp_path / "open")
    for name in ("link", "file"):
        with pytest.raises(UserError, match="is no folder, or a link to one"):
            EngineCache(tmp_path / name)


def test_a_failed_write_leaves_the_old_file(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        cache.store("engine", FACTS, b"new")
    assert cache.load("engine", FACTS) == CONTENT
    assert len(list(cache.folder.iterdir())) == 1


def test_where_engines_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "midge" / "tensorrt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "midge" / "tensorrt"
