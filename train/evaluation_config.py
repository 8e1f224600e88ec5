"""The configurations of ``midge knn`` and ``midge linear`` (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..runtime.errors import check_ranges

# Inclusive, by field; where one is not a field of a command it does not hold for it.
RANGES: dict[str, tuple[float, float]] = {
    "labels": (1, 10**9),
    "limit": (1, 10**9),
    "k": (1, 10**6),
    "temperature": (1e-6, 1e6),
    "finetune_epochs": (0, 10_000),
    "finetune_lr": (0, 1e3),
    "finetune_batch_size": (2, 2**20),
    "seed": (0, 2**63 - 1),
    "workers": (1, 256),
    "batch_size": (1, 2**20),
    "max_unreadable": (0, 0.5),
}


@dataclass(frozen=True)
class KnnConfig:
    """k-NN accuracy of a run's frozen features: weighted votes of the nearest labelled training images."""

    run: Positional[Path]
    """Run folder, as midge pretrain wrote it."""

    data: Path | None = None
    """Labelled training images, ImageFolder layout; default those the run was trained on."""

    test: Path | None = None
    """Labelled test images; default the folder test, validation or val beside the training images."""

    labels: int = 10_000
    """Number of labelled training images in the bank: a seeded random subset, each class in proportion."""

    limit: int | None = None
    """Take a seeded random subset of so many test images; default all."""

    baselines: bool = False
    """Also measure raw pixels and the random initialization of the same network."""

    k: int = 20
    """Number of neighbours that vote."""

    temperature: float = 0.07
    """A neighbour of cosine similarity s votes with weight exp(s / temperature)."""

    seed: int = 0
    """Seed of the subsets and of the random initialization."""

    device: str = "auto"
    """Torch device, e.g. cpu or cuda; auto takes a GPU where there is one."""

    workers: int = 2
    """Threads that decode images."""

    batch_size: int = 256
    """Images per forward pass."""

    max_unreadable: float = 0.01
    """Largest share of unreadable images that are skipped, 0..1; above it the command stops."""

    json: bool = False
    """Print one JSON document instead of a table."""

    def check(self) -> None:
        """Refuse values that are out of range."""
        check_ranges(self, RANGES)


@dataclass(frozen=True)
class LinearConfig:
    """Train a classifier on a run's frozen features, and with --finetune-epochs the whole network after it."""

    run: Positional[Path]
    """Run folder, as midge pretrain wrote it."""

    data: Path | None = None
    """Labelled training images, ImageFolder layout; default those the run was trained on."""

    test: Path | None = None
    """Labelled test images; default the folder test, validation or val beside the training images."""

    labels: int = 10_000
    """Number of labelled training images: a seeded random subset, each class in proportion."""

    limit: int | None = None
    """Take a seeded random subset of so many test images; default all."""

    flip: bool = False
    """Also train on mirrored images; for images whose left and right mean nothing."""

    finetune_epochs: int = 0
    """Epochs of training of the whole network, from the linear classifier; 0 keeps the backbone as it is."""

    finetune_lr: float = 0.03
    """Peak learning rate of that training at a batch of 256; it is scaled with the batch size."""

    finetune_batch_size: int = 128
    """Images per step of that training."""

    seed: int = 0
    """Seed of the subsets and of the training."""

    device: str = "auto"
    """Torch device, e.g. cpu or cuda; auto takes a GPU where there is one."""

    workers: int = 2
    """Threads that decode images."""

    batch_size: int = 256
    """Images per forward pass."""

    max_unreadable: float = 0.01
    """Largest share of unreadable images that are skipped, 0..1; above it the command stops."""

    json: bool = False
    """Print one JSON document instead of a table."""

    def check(self) -> None:
        """Refuse values that are out of range."""
        check_ranges(self, RANGES)
