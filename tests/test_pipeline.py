"""The whole path through the command line, on a few real images: every stage's result is there and they agree."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midge.pipeline import RECIPES, Paths, RunConfig, open_state, run, state_json
from midge.runtime.artifact import load_artifact
from midge.runtime.cpu_features import adds_in_16_bits
from midge.runtime.errors import UserError
from midge.runtime.files import write_json
from midge.runtime.images import list_images

VARIANTS = ["torch-fp32", "onnx-fp32", "onnx-int8-u8", "onnx-int8-s8", "openvino-fp32", "openvino-int8"]
ROW_FIELDS = {
    *("variant", "runtime", "threads", "top1", "n", "top1_ci95", "p50_ms", "p90_ms", "p50_ci95"),
    *("int8_mac_share", "peak_rss_mib", "size_bytes", "valid"),
}
README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
TINY = ["--epochs", "2", "--batch-size", "32", "--labels", "100", "--test-limit", "60", "--protocol", "smoke"]


Midge = Callable[..., "subprocess.CompletedProcess[str]"]


def readme_command(data: Path, out: Path) -> list[str]:
    """The README's `midge run`, into other folders."""
    (command,) = re.findall(r"^midge (run .*)$", README, flags=re.MULTILINE)
    words = shlex.split(command)
    for flag, folder in (("--data", data), ("--out", out)):
        words[words.index(flag) + 1] = str(folder)
    return words


@dataclass
class Finished:
    """A finished quickstart, its command, and what that printed."""

    out: Path
    data: Path
    command: list[str]
    code: int
    stdout: str

    def json(self, *parts: str) -> Any:
        return json.loads(self.out.joinpath(*parts).read_text())


@pytest.fixture(scope="module")
def finished(once: Callable[[str, Callable[[Path], None]], Path], small_fashion: Path, warm: Any) -> Finished:
    def command(folder: Path) -> list[str]:
        return [*readme_command(small_fashion, folder / "demo"), *TINY]

    def make(folder: Path) -> None:
        done = warm.midge(*command(folder))
        # 1: a threshold was missed, as INT8 of a network that has hardly been trained may
        assert done.returncode in (0, 1), done.stdout + done.stderr
        (folder / "printed.json").write_text(json.dumps({"code": done.returncode, "stdout": done.stdout}))

    folder = once("quickstart", make)
    printed = json.loads((folder / "printed.json").read_text())
    return Finished(folder / "demo", small_fashion, command(folder), **printed)


@pytest.mark.slow
def test_the_summary_has_what_it_promises(finished: Finished) -> None:
    summary = finished.json("summary.json")
    assert summary["schema"] == 1
    assert set(summary["knn"]) == {"pixels", "random_init", "pretrained"}
    assert all(0 < value <= 1 for value in summary["knn"].values())
    assert sorted(row["variant"] for row in summary["rows"]) == sorted(VARIANTS)
    for row in summary["rows"]:
        assert row.keys() >= ROW_FIELDS
        assert row["n"] == 60 and 0 <= row["top1_ci95"][0] <= row["top1"] <= row["top1_ci95"][1] <= 1
        assert 0 < row["p50_ms"] <= row["p90_ms"]
        assert row["size_bytes"] > 0 and row["peak_rss_mib"] > 10
    share = {row["variant"]: row["int8_mac_share"] for row in summary["rows"]}
    assert share["torch-fp32"] == share["onnx-fp32"] == share["openvino-fp32"] == 0
    assert share["onnx-int8-u8"] >= 0.95
    assert share["openvino-int8"] == 0 if adds_in_16_bits() else share["openvino-int8"] > 0.5


@pytest.mark.slow
def test_every_runtime_agrees_with_torch(finished: Finished) -> None:
    records = {path.name.partition("@")[0]: json.loads(path.read_text()) for path in finished.out.rglob("*@*.json")}
    assert sorted(records) == sorted(VARIANTS)
    predictions = {path.name.partition("@")[0]: np.load(path) for path in finished.out.rglob("*.predictions.npy")}
    for variant in ("onnx-fp32", "openvino-fp32"):
        assert records[variant]["parity"]["cosine_min"] >= 0.9999
        assert (predictions[variant] == predictions["torch-fp32"]).mean() >= 0.999


@pytest.mark.slow
def test_the_classifier_is_the_one_that_was_trained(finished: Finished) -> None:
    linear = finished.json("run", "eval", "linear.json")
    torch_row = next(row for row in finished.json("summary.json")["rows"] if row["variant"] == "torch-fp32")
    assert linear["n"] == torch_row["n"] == 60
    assert abs(linear["correct"] - 60 * torch_row["top1"]) < 1.5  # batches in training, single images on the device
    assert load_artifact(finished.out / "artifact").labels == list_images(finished.data / "test").classes


@pytest.mark.slow
def test_no_calibration_image_is_a_test_image(finished: Finished) -> None:
    calibration = finished.json("artifact", "calibration.json")
    text = json.dumps(calibration)
    hashes = set(re.findall(r"\b[0-9a-f]{64}\b", text))
    test = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (finished.data / "test").rglob("*.png")}
    train = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (finished.data / "train").rglob("*.png")}
    assert len(hashes & train) >= 32
    assert not hashes & test


@pytest.mark.slow
def test_the_report_opens_offline(finished: Finished) -> None:
    page = (finished.out / "report.html").read_text()
    assert all(variant in page for variant in VARIANTS)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", page)


@pytest.mark.slow
def test_the_table_is_printed_and_resuming_prints_it_again(finished: Finished, midge: Midge) -> None:
    assert all(variant in finished.stdout for variant in VARIANTS)
    before = {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}
    again = midge(*finished.command, "--resume")
    assert again.returncode == finished.code, again.stderr
    assert again.stdout.splitlines()[-20:] == finished.stdout.splitlines()[-20:]
    assert before == {path: path.stat().st_mtime_ns for path in finished.out.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("removed", ["summary.json", "report.html"])
def test_a_removed_result_is_made_again(finished: Finished, midge: Midge, tmp_path: Path, removed: str) -> None:
    out = shutil.copytree(finished.out, tmp_path / "demo")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent != out}
    (out / removed).unlink()
    command = [str(out) if word == str(finished.out) else word for word in finished.command]
    again = midge(*command, "--resume", "--json")
    assert (again.returncode, json.loads(again.stdout)) == (finished.code, finished.json("summary.json"))
    assert json.loads((out / "summary.json").read_text()) == finished.json("summary.json")
    assert (out / "report.html").stat().st_size > 10_000
    assert before == {path: path.stat().st_mtime_ns for path in before}  # no other stage was taken again


@pytest.mark.slow
def test_json_prints_nothing_but_the_summary(finished: Finished, midge: Midge) -> None:
    done = midge(*finished.command, "--resume", "--json")
    assert json.loads(done.stdout) == finished.json("summary.json")


@pytest.mark.slow
def test_other_settings_do_not_resume(finished: Finished, midge: Midge) -> None:
    done = midge(*finished.command, "--resume", "--seed", "1")
    assert done.returncode == 2
    assert "--seed 0, not 1" in done.stderr and "Traceback" not in done.stderr


def config(tmp_path: Path, **changes: Any) -> RunConfig:
    return RunConfig("quickstart", **{"out": tmp_path / "out", "data": tmp_path / "data", **changes})


def make_data(folder: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (folder / split / name).mkdir(parents=True)
            Image.new("L", (28, 28)).save(folder / split / name / "0.png")


def test_stages_run_in_order_and_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path / "data")
    calls: list[str] = []
    codes = {"first": 0, "second": 1, "third": 0}

    def stages(config: RunConfig, paths: Paths) -> dict[str, Any]:
        return {name: lambda name=name, code=code: calls.append(name) or code for name, code in codes.items()}

    monkeypatch.setitem(RECIPES, "quickstart", stages)
    monkeypatch.setattr("midge.pipeline.print_result", lambda *_: None)
    assert run(config(tmp_path)) == 1
    assert run(config(tmp_path, resume=True)) == 1
    assert calls == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "quik"}, "Unknown protocol 'quik'"),
        ({"labels": 0}, "--labels is 0"),
        ({"test_limit": 0}, "--limit is 0"),
        ({"epochs": -1.0}, "--epochs is -1"),
    ],
)
def test_a_value_of_a_later_stage_is_refused_before_the_first(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    make_data(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        run(config(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_a_stage_that_fails_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path / "data")
    calls: list[str] = []
    full_disk = True

    def second() -> int:
        calls.append("second")
        if full_disk:
            raise OSError(28, "No space left on device")
        return 0

    monkeypatch.setitem(
        RECIPES, "quickstart", lambda *_: {"first": lambda: calls.append("first") or 0, "second": second}
    )
    monkeypatch.setattr("midge.pipeline.print_result", lambda *_: None)
    with pytest.raises(OSError, match="No space"):
        run(config(tmp_path))
    full_disk = False
    assert run(config(tmp_path, resume=True)) == 0
    assert calls == ["first", "second", "second"]


def test_a_stopped_pretraining_stops_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_data(tmp_path / "data")
    monkeypatch.setitem(RECIPES, "quickstart", lambda *_: {"pretrain": lambda: 130, "knn": lambda: pytest.fail("ran")})
    assert run(config(tmp_path)) == 130
    assert open_state(config(tmp_path, resume=True), Paths(tmp_path / "out")) == {}


def test_a_taken_folder_is_refused(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(config(tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_run_that_exists_is_refused_without_resume(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    write_json(tmp_path / "out" / "pipeline.json", state_json(config(tmp_path), {}))
    with pytest.raises(UserError, match="go on with --resume"):
        run(config(tmp_path))


@pytest.mark.parametrize(
    "state", ["[]", "{", '{"schema": 2}', '{"schema": 1, "config": {}, "stages": {}}', '{"schema": 1, "config": 3}']
)
def test_a_damaged_state_is_one_line(tmp_path: Path, state: str) -> None:
    make_data(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pipeline.json").write_text(state)
    with pytest.raises(UserError):
        run(config(tmp_path, resume=True))


def test_data_without_a_split_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="midge data fetch fashion-mnist"):
        run(config(tmp_path))
    assert not (tmp_path / "out").exists()


def test_data_without_labels(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    (tmp_path / "data" / "test" / "ant" / "0.png").unlink()
    with pytest.raises(UserError, match="has no labels"):
        run(config(tmp_path))


def test_a_missing_package_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else real(name))
    with pytest.raises(UserError, match=r"'openvino' \(openvino\): pip install 'midge\[all\]'"):
        run(config(tmp_path))
    assert not (tmp_path / "out").exists()
