"""Classifiers on CIFAR-10 from labels alone, to judge quantization by: its loss shows only in networks that learned.

    python examples/cifar10_classifiers.py --data data/cifar10 --out bench/cifar10 --backbone resnet18

writes a run folder that `midge export` takes. AdamW, cosine, flips and shifted crops; 32 px images, a ViT with patches
of 8 px, 17 tokens. The networks of int8_accuracy.json had --epochs 25 --lr 0.003 --batch-size 256 --device cuda
(MobileNetV2), --limit 20000 --epochs 10 (ResNet18), the same with 7 (ResNet34), and --limit 6400 --epochs 8 (ViT-Ti).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional

from midge.runtime.files import write_json
from midge.runtime.images import ImageList, list_images
from midge.runtime.preprocess import Preprocess
from midge.runtime.progress import Bar, say
from midge.runtime.torch_model import ModelSpec, save_model
from midge.train.backbones import feature_dim, find_backbone
from midge.train.features import extract_features, pixels
from midge.train.finetune import augment, cosine
from midge.train.small_maps import use_small_map_products

PX = 32
VIT_PATCH_PX = 8


def train(model: nn.Module, images: np.ndarray, labels: np.ndarray, given: argparse.Namespace) -> None:
    """Train all weights in place; the last epoch is taken."""
    device = torch.device(given.device)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=given.lr)
    generator = torch.Generator().manual_seed(given.seed)
    steps_per_epoch = len(images) // given.batch_size
    total, warmup, step = steps_per_epoch * given.epochs, steps_per_epoch, 0
    with Bar("Training", total) as bar:
        for _ in range(given.epochs):
            order = torch.randperm(len(images), generator=generator)[: steps_per_epoch * given.batch_size]
            for kept in order.view(steps_per_epoch, -1).numpy():
                lr = (
                    given.lr
                    * min(1.0, (step + 1) / warmup)
                    * cosine(1.0, max(0, step - warmup), max(1, total - warmup))
                )
                for group in optimizer.param_groups:
                    group["lr"] = lr
                batch = augment(torch.from_numpy(images[kept]), generator, mirror=True)
                batch = batch.to(device, memory_format=torch.channels_last)
                target = torch.from_numpy(labels[kept]).to(device)
                loss = functional.cross_entropy(model(batch), target, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
                bar.advance(note=f"loss {loss.item():.3f}" if step % 10 == 0 else None)
    model.to("cpu").eval()


def top1(model: nn.Module, images: ImageList, preprocess: Preprocess) -> float:
    """Share of the images whose class the network names, 0..1."""
    logits, kept = extract_features(model, images, preprocess, 256, "cpu", 1)
    assert images.labels is not None
    return float((logits.argmax(axis=1) == images.labels[kept]).mean())


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as midge data fetch cifar10 writes it")
    parser.add_argument("--out", type=Path, required=True, help="one run folder for each backbone goes here")
    parser.add_argument("--backbone", default="resnet18", help="name of timm")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--limit", type=int, default=None, help="so many training images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="to train on: cpu, cuda or mps")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    preprocess = Preprocess(PX, PX, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # values in 0..1, as pixels() gives them
    train_images = list_images(given.data / "train", given.limit, given.seed)
    test_images = list_images(given.data / "test")
    is_vit = given.backbone.startswith("vit_")
    backbone = find_backbone(given.backbone, PX, patch_px=VIT_PATCH_PX if is_vit else None)
    model: Any = timm.create_model(given.backbone, num_classes=len(train_images.classes), **backbone.args)
    inputs, kept = pixels(train_images, preprocess, workers=1)
    assert train_images.labels is not None
    use_small_map_products(model)
    train(model, inputs.reshape(-1, 3, PX, PX), train_images.labels[kept], given)
    accuracy = top1(model, test_images, preprocess)
    trained = {"method": "labels", "epochs": given.epochs, "lr": given.lr, "seed": given.seed, "images": len(kept)}
    spec = ModelSpec(
        timm_name=given.backbone,
        timm_args=backbone.args,
        num_classes=len(train_images.classes),
        feature_dim=feature_dim(model),
        labels=tuple(train_images.classes),
        preprocess=preprocess,
        input_px=PX,
        trained=trained,
    )
    run = given.out / given.backbone
    save_model(run, "classifier", model, spec)
    write_json(run / "config.json", {"schema": 1, "config": {"data": str(given.data / "train")}})
    say(f"{given.backbone}: top-1 {accuracy:.2%} on {len(test_images)} test images, in '{run}'.")


if __name__ == "__main__":
    main()
