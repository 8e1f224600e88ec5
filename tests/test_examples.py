"""The examples that run in seconds, as their heads say; and the README's lines for plain timm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model, load_model, save_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's backbone with other weights than a new network has."""
    spec = ModelSpec("resnet18", {"channels": (8, 8, 8, 16)}, 0, 16, (), Preprocess(36, 32), 32, {"method": "none"})
    torch.manual_seed(7)
    save_model(tmp_path / "runs" / "mine", "backbone", build_model(spec), spec)
    return tmp_path / "runs" / "mine"


def test_hub_folder_gives_the_same_features_without_midge(run: Path, tmp_path: Path, warm: Any) -> None:
    image = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(image)
    command = [ROOT / "examples/hub_folder.py", run, "--out", tmp_path / "hub", "--image", image]
    done = warm.python(*command)
    assert done.returncode == 0, done.stderr
    cosine = re.search(r"cosine to the run's own: ([\d.]+)", done.stdout)
    assert cosine is not None and float(cosine[1]) > 0.9999
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors"}


def test_the_readmes_three_lines_load_a_backbone_with_plain_timm(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S) if "safetensors" in block)
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) == 3 and "midge" not in code
    monkeypatch.chdir(run.parent.parent)
    names: dict[str, object] = {}
    exec(code, names)
    loaded = names["backbone"]
    assert isinstance(loaded, torch.nn.Module)
    expected, _ = load_model(run, "backbone")
    batch = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.eval()(batch), expected(batch))


def test_tensorrt_builds(tmp_path: Path, warm: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "builds.json"
    command = [ROOT / "examples/tensorrt_builds.py", "--out", out]
    done = warm.python(*command, "--backbones", "resnet10t", "--image-px", "32")
    assert done.returncode == 0, done.stderr
    built = json.loads(out.read_text())
    stored = json.loads((ROOT / "examples" / "tensorrt_builds.json").read_text())
    assert len(stored["builds"]) == 24
    for rows in (built["builds"], stored["builds"]):
        assert {row["variant"] for row in rows} == {"tensorrt-fp32", "tensorrt-fp16", "tensorrt-int8"}
        assert all(row["builds"] and row["messages"] == [] for row in rows)


@pytest.fixture
def judged(tmp_path: Path) -> tuple[Path, list[object]]:
    """The run of a classifier of dark and light images, and the options that name 12 of either part."""
    labels = ("dark", "light")
    spec = ModelSpec("resnet18", {"channels": (8, 8, 8, 16)}, 2, 16, labels, Preprocess(32, 32), 32, {"method": "none"})
    torch.manual_seed(7)
    save_model(tmp_path / "run", "classifier", build_model(spec), spec)
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label, name in enumerate(labels):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(6):
                pixels = rng.integers(100 * label, 150 + 100 * label, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path / "run", ["--calibration-data", tmp_path / "train", "--test-data", tmp_path / "test"]


def test_int8_accuracy_judges_each_step(judged: tuple[Path, list[object]], tmp_path: Path, warm: Any) -> None:
    run, folders = judged
    command = [ROOT / "examples/int8_accuracy.py", run, *folders]
    choice = ["--variants", "plain", "equalize+round+bias", "--json", tmp_path / "out.json"]
    done = warm.python(*command, *choice)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    ours = [(runtime, steps) for runtime in ("onnx", "openvino") for steps in ("fp32", "plain", "equalize+round+bias")]
    assert [(result["runtime"], result["steps"]) for result in results] == ours
    for result in results:
        assert result["accuracy"]["n"] == result["parity"]["n"] == 12
        assert result["parity"]["cosine_min"] > 0.99
        assert (result["vs_fp32"]["top1_drop_points"] == 0) or result["steps"] != "fp32"


def test_coreml_accuracy_judges_every_image(judged: tuple[Path, list[object]], tmp_path: Path, warm: Any) -> None:
    pytest.importorskip("coremltools")
    run, folders = judged
    command = [ROOT / "examples/coreml_accuracy.py", run, *folders, "--workers", "1"]
    done = warm.python(*command, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["variant"] for result in results] == ["torch-fp32", "coreml-int8"]
    for result in results:
        assert result["accuracy"]["n"] == result["parity"]["n"] == 12
        assert result["parity"]["cosine_min"] > 0.99
    assert results[0]["vs_fp32"]["top1_drop_points"] == 0


def test_ssl_cifar10_judges_a_method_and_does_nothing_twice(small_fashion: Path, tmp_path: Path, warm: Any) -> None:
    command = [ROOT / "examples/ssl_cifar10.py", "--data", small_fashion, "--out", tmp_path / "runs"]
    size = ["--channels", "8", "8", "8", "16", "--epochs", "1", "--images", "80", "--limit", "40", "--seeds", "3"]
    command += [*size, "--methods", "moco", "--json", tmp_path / "out.json"]
    for trains in (True, False):
        done = warm.python(*command)
        assert done.returncode == 0, done.stderr
        assert ("moco, seed 3" in done.stderr) == trains
        (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
        assert (result["method"], result["seed"], result["settings"]["epochs"]) == ("moco", 3, 1)
        assert {result["knn"][kind]["n"] for kind in ("pixels", "random_init", "pretrained")} == {40}
