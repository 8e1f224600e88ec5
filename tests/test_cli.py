"""The command line as a newcomer meets it: help, exit codes, one-line errors, no traceback."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from midge.__main__ import COMMANDS, describe_os_error, find_command, load, main
from midge.runtime.errors import UserError

Midge = Callable[..., "subprocess.CompletedProcess[str]"]


def assert_one_line_error(done: subprocess.CompletedProcess[str], *mentions: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("midge: error: ")]
    assert len(errors) == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1] == errors[0]
    assert "Traceback" not in done.stderr
    for mention in mentions:
        assert mention in errors[0], errors[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Sixteen small unlabelled images."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


def test_no_arguments_print_the_help_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: midge" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_config_with_help_for_each_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([*name.split(), "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    config = load(COMMANDS[name].config)
    assert config.__dataclass_params__.frozen
    for field in config.__dataclass_fields__:
        assert field.replace("_", "-") in text.lower() or field.upper() in text, field


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_function(name: str) -> None:
    assert callable(load(COMMANDS[name].function))


@pytest.mark.parametrize(("given", "near"), [("pretran", "'pretrain'"), ("data fetsh", "'data fetch'")])
def test_a_mistyped_command_names_the_near_one(given: str, near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {near}"):
        find_command(given.split())


def test_a_group_without_its_command_lists_the_group() -> None:
    with pytest.raises(UserError, match="choose one of data fetch, data check"):
        find_command(["data"])


def test_an_error_of_the_system_is_one_line() -> None:
    text = describe_os_error(OSError(28, "No space left on device", "runs/x"))
    assert text == "'runs/x': No space left on device: free some space and run it again."


def test_unknown_recipe(tmp_path: Path, midge: Midge) -> None:
    assert_one_line_error(midge("run", "slowstart", "--out", tmp_path / "x"), "slowstart", "quickstart")


def test_missing_data(tmp_path: Path, midge: Midge) -> None:
    done = midge("pretrain", "--data", tmp_path / "absent", "--out", tmp_path / "run")
    assert_one_line_error(done, "absent")
    assert not (tmp_path / "run").exists()


def test_folder_of_text_files(tmp_path: Path, midge: Midge) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("not an image")
    assert_one_line_error(midge("pretrain", "--data", tmp_path / "notes", "--out", tmp_path / "run"), "notes")
    assert not (tmp_path / "run").exists()


def test_empty_folder(tmp_path: Path, midge: Midge) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line_error(midge("pretrain", "--data", tmp_path / "empty", "--out", tmp_path / "run"), "empty")


@pytest.mark.parametrize(
    ("flag", "value", "mention"),
    [("--method", "byol3", "dino"), ("--backbone", "resnet1", "resnet18"), ("--views", "huge", "lowcompute")],
)
def test_unknown_names_list_what_is_allowed(
    images: Path, tmp_path: Path, flag: str, value: str, mention: str, midge: Midge
) -> None:
    done = midge("pretrain", "--data", images, "--out", tmp_path / "run", "--batch-size", 8, flag, value)
    assert_one_line_error(done, value, mention)
    assert not (tmp_path / "run").exists()


def test_batch_larger_than_the_data(images: Path, tmp_path: Path, midge: Midge) -> None:
    done = midge("pretrain", "--data", images, "--out", tmp_path / "run", "--batch-size", 64)
    assert_one_line_error(done, "16", "64")


def test_one_image(images: Path, tmp_path: Path, midge: Midge) -> None:
    (tmp_path / "one").mkdir()
    (images / "00.png").rename(tmp_path / "one" / "00.png")
    assert_one_line_error(midge("pretrain", "--data", tmp_path / "one", "--out", tmp_path / "run"), "1 image")


def test_unwritable_folder(images: Path, midge: Midge) -> None:
    # /proc refuses new folders to everyone, root included
    done = midge("pretrain", "--data", images, "--out", "/proc/midge-run", "--batch-size", 8)
    assert_one_line_error(done, "/proc")


def test_run_folder_that_is_taken(images: Path, tmp_path: Path, midge: Midge) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("mine")
    done = midge("pretrain", "--data", images, "--out", tmp_path / "run", "--batch-size", 8)
    assert_one_line_error(done, "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["something"]


@pytest.mark.parametrize("command", ["verify", "profile"])
def test_missing_artifact(tmp_path: Path, command: str, midge: Midge) -> None:
    out = ["--out", tmp_path / "records"] if command == "profile" else []
    assert_one_line_error(midge(command, tmp_path / "absent", *out), "absent")


def test_unknown_target(tmp_path: Path, midge: Midge) -> None:
    done = midge("export", tmp_path, "--targets", "ort8", "--out", tmp_path / "artifact")
    assert_one_line_error(done, "ort8", "onnx", "openvino")
