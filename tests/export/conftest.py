from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from midge.export.config import ExportConfig
from midge.export.export import export_run
from midge.export.onnx_export import export_onnx
from midge.export.prepare import Prepared
from midge.export.ranges import RangeTable
from midge.runtime.artifact import Artifact, load_artifact
from midge.runtime.fields import Fields
from midge.runtime.golden import load_golden
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model, save_model

PX = 32
CLASSES = ("ant", "bee", "cat")
SPEC = ModelSpec("resnet18", {"channels": (8, 16, 24, 32)}, 0, 32, (), Preprocess(PX, PX), PX, {"method": "none"})


def draw_image(label: int, rng: np.random.Generator) -> np.ndarray:
    """A noisy image (28, 28, 3) uint8 whose class is where it is bright and in which colour."""
    image = rng.normal(110, 40, (28, 28, 3))
    image[label * 28 // 3 : (label + 1) * 28 // 3, :, label % 3] += 90
    return np.clip(image, 0, 255).astype(np.uint8)


def write_images(folder: Path, each: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            Image.fromarray(draw_image(label, rng)).save(folder / name / f"{index:03}.png")
    return folder


def train(spec: ModelSpec, steps: int = 40) -> Any:
    """The network of a spec after so many steps on the images above, so that its outputs mean something."""
    import torch
    from torch.nn import functional

    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = build_model(spec).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        labels = rng.integers(0, len(CLASSES), 32)
        batch = np.stack([spec.preprocess(draw_image(int(label), rng)) for label in labels])
        loss = functional.cross_entropy(model(torch.from_numpy(batch)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return model.eval()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (90 images) and test/ (30), of which the first of each class is in train/ too."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", 30, seed=1)
    write_images(folder / "test", 10, seed=2)
    for name in CLASSES:
        shutil.copy(folder / "test" / name / "000.png", folder / "train" / name / "copy.png")
    return folder


@pytest.fixture(scope="session")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a backbone and a trained classifier."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    spec = dataclasses.replace(SPEC, num_classes=len(CLASSES), labels=CLASSES)
    save_model(folder, "classifier", train(spec), spec)
    save_model(folder, "backbone", build_model(SPEC), SPEC)
    config = {"schema": 1, "config": {"data": str(images / "train")}, "data_fingerprint": "f" * 64, "git_commit": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def artifact_path(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole export of that run. Not to be written to."""
    out = tmp_path_factory.mktemp("artifacts") / "tiny"
    assert export_run(ExportConfig(run=run, out=out, calibration_images=40)) == 0
    return out


@pytest.fixture(scope="session")
def artifact(artifact_path: Path) -> Artifact:
    return load_artifact(artifact_path)


@pytest.fixture(scope="session")
def prepared(artifact: Artifact) -> Prepared:
    """The artifact's FP32 graph with its calibrated ranges, its weights as they were."""
    stored = json.loads((artifact.path / "calibration.json").read_text())
    table = RangeTable.from_json(Fields(stored["ranges"], "ranges"))
    graph = onnx.load(artifact.variants["onnx-fp32"].model)
    return Prepared(graph, table.choose("mse"), table.choose_symmetric("mse"))


@pytest.fixture(scope="session")
def inputs(artifact: Artifact) -> np.ndarray:
    """16 golden images, preprocessed."""
    return load_golden(artifact.golden, artifact.input_shape, artifact.output_shape).inputs[:16]


@pytest.fixture
def changed_artifact(artifact_path: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(artifact_path, tmp_path / "changed")
    return tmp_path / "changed"


@pytest.fixture(scope="session")
def vit() -> onnx.ModelProto:
    """The graph of a small transformer with ten outputs and weights that differ. Not to be written to."""
    import torch

    arguments = {"img_size": PX, "patch_size": 8, "depth": 2, "embed_dim": 48}
    spec = ModelSpec("vit_tiny_patch16_224", arguments, 10, 48, (), Preprocess(PX, PX), PX)
    model = build_model(spec)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # equal ones would be stored, and quantized, as one
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return export_onnx(model, PX, "logits")
