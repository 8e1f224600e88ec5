"""A pretrained backbone as a folder of the Hugging Face hub's kind, and its use from there.

    python examples/hub_folder.py runs/mine --out hub/mine [--image photo.jpg]

Writes config.json and model.safetensors as timm's own tools do, so that `timm.create_model("local-dir:hub/mine",
pretrained=True)` loads it, `transformers.AutoModel.from_pretrained("hub/mine")` too, and `huggingface-cli upload NAME
hub/mine` publishes it. Then it is loaded from there, and its features are compared with the run's: about 5 s.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import save_for_hf

from midge.runtime.files import atomic_folder
from midge.runtime.images import load_image
from midge.runtime.torch_model import load_model


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of midge pretrain")
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist")
    parser.add_argument("--image", type=Path, help="an image to embed; default a grey one")
    given = parser.parse_args()

    backbone, spec = load_model(given.run, "backbone")
    prepared = spec.preprocess
    data_config = {
        "input_size": (3, prepared.crop_px, prepared.crop_px),
        "interpolation": prepared.interpolation,
        "mean": prepared.mean,
        "std": prepared.std,
        "crop_pct": prepared.crop_px / prepared.resize_px,
    }
    own = {"tag": "midge", "license": None, "origin_url": None, "paper_ids": "arXiv:2210.02808"}  # not timm's weights
    with atomic_folder(given.out) as folder:
        save_for_hf(
            backbone,
            str(folder),
            model_args=dict(spec.timm_args),
            model_config={"pretrained_cfg": own},
            data_config=data_config,
            safe_serialization=True,
        )

    # From here on as anyone would who has the folder and timm, but not midge.
    model = timm.create_model(f"local-dir:{given.out}", pretrained=True).eval()
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    grey = np.full((prepared.crop_px, prepared.crop_px, 3), 128, np.uint8)
    pixels = load_image(given.image) if given.image else grey  # (H, W, 3) uint8
    with torch.inference_mode():
        features = model(transform(Image.fromarray(pixels))[None])  # (1, feature_dim)
        expected = backbone(torch.from_numpy(prepared(pixels))[None])
    cosine = torch.nn.functional.cosine_similarity(features, expected).item()
    print(f"{given.out}: {spec.timm_name}, {features.shape[1]} features; cosine to the run's own: {cosine:.6f}")


if __name__ == "__main__":
    main()
