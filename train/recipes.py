"""Known good configurations, each a function: a base and what differs from it (no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import PretrainConfig


def dino_cnn(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """DINO for a CNN with the low-compute views: Tan et al. (ICLR 2023), section 4; ImageNet-1k, 200 epochs."""
    return dataclasses.replace(PretrainConfig(data=data, out=out), **changes)


def dino_vit(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """The same for a ViT-Ti/16: AdamW, a head without batch normalization, and ten local views."""
    vit: dict[str, Any] = {
        "backbone": "vit_tiny_patch16_224",
        "drop_path": 0.1,
        "optimizer": "adamw",
        "base_lr": 5e-4,
        "min_lr": 1e-5,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "head_outputs": 65536,
        "head_batch_norm": False,
        "fixed_magnitude": False,
        "teacher_temperature_warmup_epochs": 30.0,
    }
    return dino_cnn(data, out, **{**vit, **changes})


def quickstart(data: Path, out: Path, **changes: Any) -> PretrainConfig:
    """DINO sized for minutes on a laptop's CPU: small images, a narrow ResNet18, a small head, short warm-ups."""
    small: dict[str, Any] = {
        "channels": (32, 64, 128, 256),
        "image_px": 32,
        "resize_px": 32,
        "epochs": 2.0,
        "batch_size": 128,
        "base_lr": 0.48,
        "warmup_epochs": 0.25,
        "head_hidden": 512,
        "head_bottleneck": 128,
        "head_outputs": 1024,
        "teacher_temperature": 0.04,
        "teacher_temperature_warmup_epochs": 0.0,
        "teacher_momentum": 0.99,
        "freeze_last_layer_epochs": 0.1,
    }
    return dino_cnn(data, out, **{**small, **changes})


RECIPES: dict[str, Callable[..., PretrainConfig]] = {
    "dino-cnn": dino_cnn,
    "dino-vit": dino_vit,
    "quickstart": quickstart,
}
