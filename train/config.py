"""The configuration of ``midge pretrain``: one flat dataclass, whose defaults are the paper's CNN recipe (no torch)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError, check_ranges
from ..runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class PretrainConfig:
    """Self-supervised pretraining of a backbone on a folder of images; labels are not used."""

    # Where from and where to.
    data: Path
    """Folder of images, of any nesting."""
    out: Path
    """Run folder to write: config.json, metrics.jsonl, checkpoints, backbone.safetensors."""
    resume: bool = False
    """Continue the run in OUT from its last checkpoint where it has one; start it where it has none."""
    limit: int | None = None
    """Use a seeded random subset of so many images; default all."""
    seed: int = 0
    """Seed of the subset, the initialization and the views."""

    # What.
    method: str = "dino"
    """Self-supervised method: dino."""
    backbone: str = "resnet18"
    """Any timm network by name; CNN or ViT."""
    channels: tuple[int, ...] | None = None
    """Channels of a ResNet's stages, e.g. 32 64 128 256; default the network's own."""
    patch_px: int | None = None
    """Side of a ViT's patches, px; default the network's own."""
    drop_path: float = 0.0
    """Probability of dropping a residual branch in the student, 0..1; the paper has 0.1 for a ViT."""
    views: str = "lowcompute"
    """View policy: lowcompute or baseline."""
    image_px: int = 224
    """Side of the global views and of the network's input, px; the local views follow in proportion."""
    local_px: int | None = None
    """Side of the local views, px; default by the view policy."""
    num_local: int | None = None
    """Number of local views; default by the view policy."""
    global_area: tuple[float, float] | None = None
    """Range of the share of the image's area that a global view shows, 0..1; default by the view policy."""
    local_area: tuple[float, float] | None = None
    """The same for a local view."""
    blur_px: tuple[float, float] | None = None
    """Range of the blur's standard deviation, px; default 0.1 to 2 at 224 px, in proportion at other sizes."""
    resize_px: int | None = None
    """Short side of an evaluated image before its centre crop to the input, px; default 256/224 of the input."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of the channels in 0..1, subtracted from the input."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of the channels in 0..1, by which the input is divided."""
    export_weights: str = "student"
    """Network that becomes backbone.safetensors: student (the paper's linear probe) or teacher."""

    # How long, and on what.
    epochs: float = 200.0
    """Passes over the images."""
    batch_size: int = 1024
    """Images per step, each with all its views."""
    workers: int = 2
    """Processes that decode images and cut views; 0 does it in the main process."""
    device: str = "auto"
    """Torch device: cpu, cuda or mps; auto takes a GPU where there is one."""
    precision: str = "32-true"
    """Arithmetic: 32-true, bf16-mixed or 16-mixed."""

    # Optimizer.
    optimizer: str = "lars"
    """Optimizer: lars (CNN) or adamw (ViT)."""
    base_lr: float = 0.48
    """Peak learning rate at a batch of 256; it is scaled by batch size / 256."""
    min_lr: float = 0.0048
    """Learning rate at the end of the cosine; not scaled."""
    warmup_lr: float = 0.0
    """Learning rate at the start of the warm-up; not scaled."""
    warmup_epochs: float = 10.0
    """Length of the linear warm-up; the cosine follows."""
    weight_decay: float = 1e-6
    """Weight decay at the start."""
    weight_decay_end: float = 1e-6
    """Weight decay at the end, reached along a cosine."""
    momentum: float = 0.9
    """Momentum of LARS."""
    trust_coefficient: float = 1e-3
    """LARS's eta: length of an update relative to the length of the weights."""

    # DINO.
    head_hidden: int = 2048
    """Width of the head's two hidden layers."""
    head_bottleneck: int = 256
    """Dimension of the normalized embedding before the last layer."""
    head_outputs: int = 4096
    """Outputs of the last layer."""
    head_batch_norm: bool = True
    """Batch normalization in the head: yes for a CNN, no for a ViT."""
    fixed_magnitude: bool = True
    """Keep the last layer's rows at length 1 (CNN); otherwise their length is learned (ViT)."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's softmax after its warm-up."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher's softmax at the start of its warm-up."""
    teacher_temperature_warmup_epochs: float = 50.0
    """Length of the linear warm-up of the teacher's temperature; cut at the run's end."""
    center_momentum: float = 0.9
    """Share of the old centre in the moving average of the teacher's outputs."""
    teacher_momentum: float = 0.996
    """Share of the old teacher in the moving average of the student at the start."""
    teacher_momentum_end: float = 1.0
    """The same at the end, reached along a cosine."""
    freeze_last_layer_epochs: float = 1.0
    """The last layer is not trained for so long."""
    koleo_weight: float = 0.0
    """Weight of the KoLeo term, which spreads the student's embeddings of a batch; DINO has none, DINOv2 has 0.1."""
    freeze_batch_norm: bool = False
    """Keep the backbone's batch normalization at its initial statistics, 0 and 1; for runs of some thousand steps."""

    # Bookkeeping.
    checkpoint_every_steps: int = 250
    """Steps between checkpoints; there is one at the end of each epoch too."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    max_unreadable: float = 0.01
    """Largest share of unreadable images that are skipped, 0..1; above it the run stops."""
    json: bool = False
    """Print one JSON document at the end instead of text."""

    def check(self) -> None:
        """Refuse values that no run can have; names are checked where they are looked up.

        Raises:
            UserError: a value is out of range.
        """
        check_ranges(self, RANGES)
        if not self.epochs > 0:
            raise UserError(f"--epochs is {self.epochs:g}: give a value above 0.")
        if self.resize_px is not None and self.resize_px < self.image_px:
            raise UserError(f"--resize-px is {self.resize_px}: give at least --image-px, {self.image_px}.")
        if self.blur_px is not None and not 0 < self.blur_px[0] <= self.blur_px[1]:
            raise UserError(f"--blur-px is {self.blur_px}: give a positive range, the smaller value first.")
        for name in ("global_area", "local_area"):
            area = getattr(self, name)
            if area is not None and not 0 < area[0] <= area[1] <= 1:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} is {area}: give a range of shares, above 0 and up to 1, the smaller first.")
        if not all(value > 0 for value in self.std):
            raise UserError(f"--std is {self.std}: every value must be above 0.")
        if self.channels is not None and not all(MIN_CHANNELS <= value <= 2**16 for value in self.channels):
            raise UserError(
                f"--channels is {self.channels}: give a number of channels from {MIN_CHANNELS} to 65536 for each stage."
            )
        if self.export_weights not in ("student", "teacher"):
            raise UserError(f"--export-weights is {self.export_weights!r}: choose student or teacher.")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; paths are absolute, so that a later stage finds the data from anywhere."""
        values = dataclasses.asdict(self)
        return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in values.items()}


MIN_CHANNELS = 8
"""With fewer, oneDNN 3.12 writes past its buffers in the backward pass of a ResNet's 1x1 shortcuts (its issue 6035)."""

# Inclusive. The upper ends are where nothing sensible lies beyond; they catch a slip of a decimal point.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "patch_px": (1, 256),
    "drop_path": (0, 0.9),
    "image_px": (8, 4096),
    "local_px": (4, 4096),
    "num_local": (1, 64),
    "resize_px": (8, 4096),
    "epochs": (0, 1e6),
    "batch_size": (2, 2**20),
    "workers": (0, 256),
    "base_lr": (0, 1e3),
    "min_lr": (0, 1e3),
    "warmup_lr": (0, 1e3),
    "warmup_epochs": (0, 1e6),
    "weight_decay": (0, 10),
    "weight_decay_end": (0, 10),
    "momentum": (0, 1),
    "trust_coefficient": (1e-9, 1),
    "head_hidden": (1, 2**20),
    "head_bottleneck": (1, 2**20),
    "head_outputs": (2, 2**20),
    "student_temperature": (1e-3, 100),
    "teacher_temperature": (1e-3, 100),
    "teacher_temperature_start": (1e-3, 100),
    "teacher_temperature_warmup_epochs": (0, 1e6),
    "center_momentum": (0, 1),
    "teacher_momentum": (0, 1),
    "teacher_momentum_end": (0, 1),
    "freeze_last_layer_epochs": (0, 1e6),
    "koleo_weight": (0, 1e3),
    "checkpoint_every_steps": (1, 2**40),
    "log_every_steps": (1, 2**40),
    "max_unreadable": (0, 0.5),
}

OPERATIONAL_FIELDS = frozenset(
    {
        "data",
        "out",
        "resume",
        "workers",
        "device",
        "checkpoint_every_steps",
        "log_every_steps",
        "max_unreadable",
        "json",
    }
)
"""Fields that do not change what a run computes (of the data the fingerprint is compared), so a resumed run may."""
