"""Which networks build for TensorRT, in which precision, with which messages: by TensorRT-RTX, without a GPU.

    python examples/tensorrt_builds.py --out examples/tensorrt_builds.json

It needs the extras train, export and tensorrt, and takes about five minutes on one core. Weights are random (seed 0),
ranges are measured on random images: what is asked is whether a parser and a builder of NVIDIA's take the graphs. It
says nothing about accuracy, and nothing about speed: TensorRT-RTX times nothing while it builds. Exit code 1 where a
variant is refused or draws a warning. What it printed lies beside it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from midge.export.fold import fold_batch_norm
from midge.export.half_precision import float16_graph
from midge.export.onnx_export import export_onnx, save_onnx
from midge.export.prepare import prepare
from midge.export.tensorrt_export import CHECKER, check_build, save_tensorrt
from midge.runtime.errors import require
from midge.runtime.files import write_json
from midge.runtime.progress import say

BACKBONES = ("resnet18", "resnet34", "mobilenetv2_100", "vit_tiny_patch16_224")
PATCH_PX = {32: 8}
NUM_CLASSES = 1000


@dataclass(frozen=True)
class Config:
    """Build networks for TensorRT, without a GPU."""

    out: Path
    """JSON file to write."""
    backbones: tuple[str, ...] = BACKBONES
    """timm networks."""
    image_px: tuple[int, ...] = (32, 224)
    """Input sizes, px; a ViT has patches of 8 px at 32, else its own."""


def build_network(name: str, px: int) -> Any:
    """A network with random weights, in eval mode."""
    import timm
    import torch

    torch.manual_seed(0)
    args: dict[str, Any] = {"img_size": px, "patch_size": PATCH_PX.get(px, 16)} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=NUM_CLASSES, **args).eval()


def build_all(name: str, px: int, folder: Path) -> list[dict[str, Any]]:
    """The verdicts of all precisions of a network."""
    path = folder / "model.onnx"
    graph = export_onnx(fold_batch_norm(build_network(name, px), px), px, "logits")
    save_onnx(graph, path)
    images = np.random.default_rng(0).normal(size=(4, 3, px, px)).astype(np.float32)
    graphs = {
        "fp32": lambda: graph,
        "fp16": lambda: float16_graph(path),
        "int8": lambda: prepare(graph, images, "mse")[0].quantize("onnx-int8-s8"),
    }
    rows = []
    for precision, make in graphs.items():
        model = folder / precision / "model.onnx"
        save_tensorrt(make(), model, precision)
        verdict = check_build(model)
        rows.append(
            {
                "backbone": name,
                "image_px": px,
                "variant": f"tensorrt-{precision}",
                "builds": verdict.builds,
                "messages": list(verdict.messages),
                "onnx_bytes": model.stat().st_size,
                "engine_bytes": verdict.engine_bytes,
                "seconds": verdict.seconds,
            }
        )
        say(f"{name} {px} px {precision}: {'builds' if verdict.ok else verdict.messages} in {verdict.seconds:.1f} s")
    return rows


def main() -> int:
    """Build, print a table, write the JSON."""
    config = tyro.cli(Config, description=__doc__)
    rows: list[dict[str, Any]] = []
    for px in config.image_px:
        for name in config.backbones:
            with tempfile.TemporaryDirectory() as folder:
                rows += build_all(name, px, Path(folder))
    version = require(CHECKER, "tensorrt").__version__
    command = "python examples/tensorrt_builds.py --out examples/tensorrt_builds.json"
    write_json(config.out, {"schema": 1, "command": command, "checker": f"{CHECKER} {version}", "builds": rows})
    print(json.dumps({"built": sum(row["builds"] for row in rows), "of": len(rows), "out": str(config.out)}))
    return int(any(row["messages"] or not row["builds"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
