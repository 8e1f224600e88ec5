"""Fine-tune a whole classifier, from the linear probe: SGD with Nesterov momentum, cosine, flips and shifted crops."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.images import ImageList, UnreadableBudget
from ..runtime.preprocess import Preprocess
from ..runtime.progress import Bar
from .evaluation_config import LinearConfig
from .features import image_batches
from .small_maps import use_small_map_products

MAX_SHIFT = 1 / 8  # of the image's side: 4 px at 32 px, as is usual for CIFAR


def finetune(
    model: nn.Module,
    images: ImageList,
    preprocess: Preprocess,
    config: LinearConfig,
    device: torch.device,
    budget: UnreadableBudget,
) -> None:
    """Train all weights in place; batch normalization in train mode, no weight decay, the last epoch is taken.

    Args:
        model: (N, 3, S, S) float32 -> (N, K) logits; left in eval mode.
        images: labelled images.
        preprocess: from an image to the network's input.
        config: epochs, learning rate, batch size, seed.
        device: where to compute.
        budget: counts the unreadable images.
    """
    batch_size = min(config.finetune_batch_size, len(images))
    steps_per_epoch = len(images) // batch_size
    total = steps_per_epoch * config.finetune_epochs
    peak_lr = config.finetune_lr * batch_size / 256
    generator = torch.Generator().manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    use_small_map_products(model)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=peak_lr, momentum=0.9, nesterov=True)
    step = 0
    with Bar("Fine-tuning", total) as bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # for a network with dropout
        for _ in range(config.finetune_epochs):
            order = rng.permutation(len(images))[: steps_per_epoch * batch_size]
            shuffled = images.take(order)
            assert shuffled.labels is not None
            labels = torch.from_numpy(shuffled.labels)
            for kept, batch in image_batches(shuffled, preprocess, batch_size, config.workers, budget):
                for group in optimizer.param_groups:
                    group["lr"] = cosine(peak_lr, step, total)
                step += 1
                if len(kept) < 2:  # no batch statistics from one image
                    continue
                batch = augment(batch, generator, config.flip).to(device, memory_format=torch.channels_last)
                loss = functional.cross_entropy(model(batch), labels[kept].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.advance(note=f"loss {loss.item():.3f}" if step % 10 == 0 else None)
    model.eval()


def cosine(peak_lr: float, step: int, total: int) -> float:
    """From ``peak_lr`` at step 0 to 0 at step ``total``, along half a cosine."""
    return peak_lr * (1 + math.cos(math.pi * step / total)) / 2


def augment(batch: Tensor, generator: torch.Generator, mirror: bool) -> Tensor:
    """Shift each image by up to an eighth of its side, the border reflected, and mirror it with probability 1/2.

    Args:
        batch: (N, 3, S, S) float32, on the CPU.
        generator: of the draws.
        mirror: whether images may be mirrored.

    Returns:
        (N, 3, S, S) float32.
    """
    number, _, side, _ = batch.shape
    pad = int(side * MAX_SHIFT)
    padded = functional.pad(batch, (pad, pad, pad, pad), mode="reflect")
    top, left = torch.randint(0, 2 * pad + 1, (2, number), generator=generator)
    span = torch.arange(side)
    rows = top[:, None] + span  # (N, S)
    columns = left[:, None] + span
    if mirror:
        mirrored = torch.rand(number, generator=generator) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    image = torch.arange(number)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
