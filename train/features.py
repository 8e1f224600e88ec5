"""Features of images: decode, preprocess and encode in batches, with the same preprocessing as on the device.

Images are decoded in threads while the network computes: Pillow and torch both work without Python's lock, and threads
start at once, where worker processes on a busy machine took several times as long for a set of 10,000 small images.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..runtime.errors import UserError, unknown_name
from ..runtime.images import ImageList, UnreadableBudget, UnreadableImageError
from ..runtime.preprocess import Preprocess
from ..runtime.progress import Bar

Encoder = Callable[[Tensor], Tensor]
"""(N, 3, S, S) float32, preprocessed -> (N, D)."""

MAX_PIXEL_PX = 64  # larger images are averaged down to this for the pixel baseline: 10,000 take 0.5 GB


def find_device(name: str) -> torch.device:
    """The torch device of a ``--device`` flag.

    Raises:
        UserError: unknown, or not on this machine.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(device for device in ("cuda", "mps", "cpu") if available[device])
    if name not in available:
        raise unknown_name("device", name, ["auto", *available])
    if not available[name]:
        usable = ", ".join(["auto", *(device for device, there in available.items() if there)])
        raise UserError(f"--device {name}: torch finds no such device here; choose one of {usable}.")
    return torch.device(name)


def image_batches(
    images: ImageList, preprocess: Preprocess, batch_size: int, workers: int, budget: UnreadableBudget
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Decode and preprocess images, in order, ahead of their use.

    Args:
        images: the images.
        preprocess: from an image to the network's input.
        batch_size: images per batch.
        workers: threads that decode.
        budget: counts the unreadable images, which are left out.

    Yields:
        Indices of the readable images of a batch, (B,) int64, and the images, (B, 3, S, S) float32. B >= 1.
    """

    def read(indices: range) -> tuple[list[int], list[np.ndarray], list[UnreadableImageError]]:
        kept, pixels, errors = [], [], []
        for index in indices:
            try:
                pixels.append(preprocess(images.load(index)))
                kept.append(index)
            except UnreadableImageError as error:
                errors.append(error)
        return kept, pixels, errors

    blocks = (range(i, min(i + batch_size, len(images))) for i in range(0, len(images), batch_size))
    pending: deque[Future[tuple[list[int], list[np.ndarray], list[UnreadableImageError]]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        while True:
            while len(pending) < workers + 2 and (block := next(blocks, None)) is not None:
                pending.append(pool.submit(read, block))
            if not pending:
                return
            kept, pixels, errors = pending.popleft().result()
            for error in errors:
                budget.skip(error)
            if kept:
                yield np.array(kept, dtype=np.int64), torch.from_numpy(np.stack(pixels))


def encode(
    encoders: Mapping[str, Encoder],
    images: ImageList,
    preprocess: Preprocess,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 2,
    budget: UnreadableBudget | None = None,
    description: str = "Extracting features",
    quiet: bool = False,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features of all readable images by several encoders at once: each image is decoded only once.

    Args:
        encoders: by name; networks must be on ``device`` and in eval mode.
        images: the images.
        preprocess: from an image to the network's input.
        batch_size: images per forward pass.
        device: where the encoders are.
        workers: threads that decode.
        budget: counts the unreadable images; default 1 % are put up with.
        description: of the progress bar.
        quiet: no progress bar.

    Returns:
        name -> (N, D) float32, and (N,) int64 indices of the images that could be read.

    Raises:
        UserError: too many images are unreadable.
    """
    budget = budget or UnreadableBudget(0.01, len(images))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in encoders}
    indices = []
    with Bar(description, len(images), quiet) as bar, torch.inference_mode():
        for kept, batch in image_batches(images, preprocess, batch_size, workers, budget):
            batch = batch.to(device, memory_format=torch.channels_last)
            for name, encoder in encoders.items():
                parts[name].append(encoder(batch).float().cpu().numpy())
            indices.append(kept)
            bar.advance(len(kept))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}, np.concatenate(indices)


def extract_features(
    model: nn.Module,
    images: ImageList,
    preprocess: Preprocess,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 2,
    budget: UnreadableBudget | None = None,
    description: str = "Extracting features",
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of one network for all readable images; it is moved to ``device`` and run in eval mode.

    Returns:
        (N, D) float32, and (N,) int64 indices of the images that could be read.
    """
    encoders = {"model": place(model, device)}
    features, kept = encode(encoders, images, preprocess, batch_size, device, workers, budget, description)
    return features["model"], kept


def place(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A network in eval mode on a device, laid out channels-last: on a CPU that is twice as fast."""
    return model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def pixel_encoder(preprocess: Preprocess) -> Encoder:
    """Raw pixels as features: values in 0..1 of the same resize and crop, averaged down where above 64 px.

    Returns:
        (N, 3, S, S) float32, preprocessed -> (N, 3 * P * P) float32 in 0..1, with P = min(S, 64).
    """
    mean = torch.tensor(preprocess.mean)[:, None, None]
    std = torch.tensor(preprocess.std)[:, None, None]

    def encoder(batch: Tensor) -> Tensor:
        pixels = batch * std.to(batch.device) + mean.to(batch.device)
        if pixels.shape[-1] > MAX_PIXEL_PX:
            pixels = functional.adaptive_avg_pool2d(pixels, MAX_PIXEL_PX)
        return pixels.flatten(1)

    return encoder


def pixels(images: ImageList, preprocess: Preprocess, workers: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Raw pixels of all readable images, see :func:`pixel_encoder`, and the indices of these images."""
    features, kept = encode({"pixels": pixel_encoder(preprocess)}, images, preprocess, workers=workers)
    return features["pixels"], kept


def estimate_batch_statistics(
    model: nn.Module,
    images: ImageList,
    preprocess: Preprocess,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 2,
    budget: UnreadableBudget | None = None,
    max_images: int = 2048,
    seed: int = 0,
) -> nn.Module:
    """Set the running statistics of batch normalization to their plain average over batches of images, in place.

    A random initialization has the running statistics 0 and 1, which are wrong for every layer behind the first: judged
    with them, it would be a straw man. A network without batch normalization is left as it is.

    Args:
        model: the network; moved to ``device`` and left in eval mode.
        images: the images; up to ``max_images`` of them, drawn at random, so that the classes are mixed in a batch.
        preprocess: from an image to the network's input.
        batch_size: images per batch; a last, smaller batch is not used.
        device: where to compute.
        workers: threads that decode.
        budget: counts the unreadable images; default 1 % are put up with.
        max_images: how many images to use.
        seed: of the draw.

    Returns:
        The same network.

    Raises:
        UserError: there are fewer than two images, or too many are unreadable.
    """
    place(model, device)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    layers = [layer for layer in layers if layer.track_running_stats]
    if not layers:
        return model
    if len(images) < 2:
        raise UserError(f"Batch statistics need two images or more: '{images.root}' gives {len(images)}.")
    order = np.random.default_rng(seed).permutation(len(images))[:max_images]
    chosen, batch_size = images.take(order), min(batch_size, len(order))
    budget = budget or UnreadableBudget(0.01, len(images))
    with averaging(layers), Bar("Estimating batch statistics", len(chosen)) as bar, torch.inference_mode():
        for kept, batch in image_batches(chosen, preprocess, batch_size, workers, budget):
            bar.advance(len(kept))
            if 2 * len(kept) > batch_size:
                model(batch.to(device, memory_format=torch.channels_last))
    return model


@contextlib.contextmanager
def averaging(layers: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Let batch normalization layers average the statistics of all batches within the block, with equal weight."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
