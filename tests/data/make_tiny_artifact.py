"""Make tests/data/tiny-artifact again: ``python tests/data/make_tiny_artifact.py`` (about half a minute on two cores).

A ResNet18 of 4 to 16 channels learns to tell shapes that this script draws, 16 px wide, and is exported as any run is.
Of the artifact only the two variants that the base install can run are kept.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from midge.export.config import ExportConfig
from midge.export.export import export_run
from midge.runtime.artifact import load_artifact, write_manifest
from midge.runtime.preprocess import Preprocess
from midge.runtime.torch_model import ModelSpec, build_model, save_model

OUT = Path(__file__).parent / "tiny-artifact"
VARIANTS = ("onnx-fp32", "onnx-int8-u8")
SHAPES = ("cross", "disc", "square")
PX = 16
STEPS = 300
SPEC = ModelSpec(
    timm_name="resnet18",
    timm_args={"channels": (4, 8, 8, 16)},
    num_classes=len(SHAPES),
    feature_dim=16,
    labels=SHAPES,
    preprocess=Preprocess(PX, PX),
    input_px=PX,
    trained={"method": "supervised", "images": "shapes drawn by make_tiny_artifact.py"},
)


def draw_shape(label: int, rng: np.random.Generator) -> np.ndarray:
    """One shape of random size, place and colours, with noise: (PX, PX, 3) uint8."""
    dark, bright = rng.integers(0, 110, 3), rng.integers(140, 256, 3)
    ground, ink = (dark, bright) if rng.random() < 0.5 else (bright, dark)
    image = Image.new("RGB", (PX, PX), tuple(int(value) for value in ground))
    half = int(rng.integers(3, 6))
    x, y = (int(rng.integers(half, PX - half)) for _ in range(2))
    box, fill = (x - half, y - half, x + half, y + half), tuple(int(value) for value in ink)
    draw = ImageDraw.Draw(image)
    if SHAPES[label] == "disc":
        draw.ellipse(box, fill)
    elif SHAPES[label] == "square":
        draw.rectangle(box, fill)
    else:
        draw.line((x - half, y, x + half, y), fill, 2)
        draw.line((x, y - half, x, y + half), fill, 2)
    return np.clip(np.asarray(image) + rng.normal(0, 8, (PX, PX, 3)), 0, 255).astype(np.uint8)


def train() -> Any:
    """The network after some hundred steps; the drawing never ends, so it never sees an image twice."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = build_model(SPEC).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        labels = rng.integers(0, len(SHAPES), 64)
        batch = np.stack([SPEC.preprocess(draw_shape(int(label), rng)) for label in labels])
        loss = functional.cross_entropy(model(torch.from_numpy(batch)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}")
    return model.eval()


def write_images(folder: Path, each: int, seed: int) -> None:
    """Draw a folder of images in ImageFolder layout."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(SHAPES):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            Image.fromarray(draw_shape(label, rng)).save(folder / name / f"{index:03}.png")


def keep_some(whole: Path, out: Path) -> None:
    """Copy an artifact with two of its variants."""
    artifact = load_artifact(whole)
    out.mkdir()
    for name in (*VARIANTS, "golden.npz", "calibration.json"):
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, out / name)
    write_manifest(
        out,
        name=artifact.name,
        kind=artifact.kind,
        input_shape=artifact.input_shape,
        outputs=artifact.outputs,
        preprocess=artifact.preprocess,
        labels=artifact.labels,
        models={name: artifact.manifest["variants"][name]["model"] for name in VARIANTS},
        notes={name: artifact.variants[name].note for name in VARIANTS},
        origin=artifact.manifest["origin"],
        tools=artifact.manifest["tools"],
    )


def main() -> None:
    """Draw, train, export, keep."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_images(folder / "train", each=40, seed=1)
        write_images(folder / "test", each=10, seed=2)
        run = folder / "tiny-run"
        save_model(run, "classifier", train(), SPEC)
        (run / "config.json").write_text(json.dumps({"schema": 1, "config": {"data": "drawn"}}))
        config = ExportConfig(
            run, out=folder / "tiny-artifact", targets=("onnx",), data=folder / "train", calibration_images=96
        )
        export_run(config)
        shutil.rmtree(OUT, ignore_errors=True)
        keep_some(config.out, OUT)


if __name__ == "__main__":
    main()
