"""The configuration of ``midge pretrain``: one flat dataclass, whose defaults are the paper's CNN recipe (no torch)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError, check_ranges, unknown_name
from ..runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD

# Here, so that a slip is told before torch is imported; what the names stand for is in the modules that need torch.
NAMES: dict[str, tuple[str, ...]] = {
    "method": ("dino", "mocov2", "swav"),
    "optimizer": ("lars", "adamw"),
    "device": ("auto", "cpu", "cuda", "mps"),
    "precision": ("32-true", "bf16-mixed", "16-mixed"),
}
"""Field -> the names that it can have."""


@dataclass(frozen=True)
class PretrainConfig:
    """Self-supervised pretraining of a backbone on a folder of images; labels are not used."""

    # Where from and where to.
    data: Path
    """Folder of images, of any nesting, or of tar shards."""
    out: Path
    """Run folder to write: config.json, metrics.jsonl, checkpoints, backbone.safetensors."""
    resume: bool = False
    """Continue the run in OUT from its last checkpoint where it has one; start it where it has none."""
    limit: int | None = None
    """Use a seeded random subset of so many images; default all."""
    seed: int = 0
    """Seed of the subset, the initialization and the views."""

    # What.
    recipe: str = "dino-cnn"
    """Settings to start from, see midge recipes; default by --method and --backbone. Other flags change single ones."""
    fit_to_data: bool = True
    """Fit the recipe's batch, learning rate, durations, outputs, queue and averages to fewer images than ImageNet's, by
    the rules that midge recipes --help names; values other than the recipe's stay. What changes is said at the start.
    """
    method: str = "dino"
    """Self-supervised method: dino, swav or mocov2."""
    backbone: str = "resnet18"
    """Any timm network by name; CNN or ViT."""
    channels: tuple[int, ...] | None = None
    """Channels of a ResNet's stages, e.g. 32 64 128 256; default the network's own."""
    patch_px: int | None = None
    """Side of a ViT's patches, px; default the network's own."""
    drop_path: float = 0.0
    """Probability of dropping a residual branch in the student, 0..1; the paper has 0.1 for a ViT."""
    views: str = "lowcompute"
    """View policy: lowcompute, baseline, or auto (lowcompute with the local size that suits the images' sizes)."""
    image_px: int = 224
    """Side of the global views and of the network's input, px; the local views follow by the view policy."""
    local_px: int | None = None
    """Side of the local views, px; default by the view policy."""
    num_local: int | None = None
    """Number of local views; default by the view policy."""
    global_area: tuple[float, float] | None = None
    """Range of the share of the image's area that a global view shows, 0..1; default by the view policy."""
    local_area: tuple[float, float] | None = None
    """The same for a local view."""
    jitter_strength: float | None = None
    """Strength s of the colour jitter, as SimCLR counts it: brightness, contrast and saturation change by up to 0.8 s,
    the hue by up to 0.2 s turns; default the method's own (SwAV's has 1)."""
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
    """Images per step, each with all its views, over all processes and accumulated portions."""
    accumulate: int = 1
    """Portions of a step, one after the other: the memory of one, the gradient of all. Batch normalization, SwAV's
    assignment (beside its queue) and KoLeo see a portion at a time; centre, queues and averages move once a step, as
    without."""
    workers: int = 2
    """Processes that decode images and make views; 0 does it in the main process."""
    view_executor: str = "auto"
    """Where the views are made: cpu (the workers), device (from decoded images), auto (device on a GPU, else cpu)."""
    decode_px: int | None = None
    """Large images are decoded at 1/2, 1/4 or 1/8 of their size, their short side at least so many px; default 384 for
    views up to 224 px, in proportion above. 0 decodes all at full size."""
    decode_cache: Path | None = None
    """Keep the decoded images in this folder, uncompressed, for data that is read hundreds of times."""
    device: str = "auto"
    """Torch device: cpu, cuda or mps; auto takes a GPU where there is one."""
    precision: str = "32-true"
    """Arithmetic: 32-true, bf16-mixed or 16-mixed."""
    compile: bool = False
    """Compile the backbone with torch.compile: a minute or more at the start, faster steps after it."""
    rank_timeout_s: float = 600.0
    """With several processes: how long one waits for another before it ends with an error."""

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

    # Method: what the three share, then what is one's own.
    head_hidden: int = 2048
    """Width of the head's hidden layers."""
    head_bottleneck: int = 256
    """Dimension of the normalized embedding that the head gives; DINO's last layer and SwAV's prototypes follow it."""
    head_outputs: int = 4096
    """Outputs of DINO's last layer; number of SwAV's prototypes. MoCo v2 has neither."""
    head_batch_norm: bool = True
    """Batch normalization in the head: yes for a CNN, no for a ViT and for MoCo v2."""
    temperature: float = 0.1
    """Temperature of the trained network's softmax: DINO's student, SwAV's prediction, MoCo v2's queries."""
    teacher_momentum: float = 0.996
    """Share of the old weights in the moving average at the start: DINO's teacher, MoCo v2's key network."""
    teacher_momentum_end: float = 1.0
    """The same at the end, reached along a cosine."""
    freeze_last_layer_epochs: float = 1.0
    """DINO's last layer, or SwAV's prototypes, are not trained for so long."""
    queue_size: int = 0
    """Embeddings kept of earlier images: MoCo v2's keys; SwAV's, of each global view. 0 is none, which SwAV allows."""
    koleo_weight: float = 0.0
    """Weight of the KoLeo term, which spreads the trained network's embeddings of a batch; the three methods have none,
    DINOv2 has 0.1."""
    freeze_batch_norm: bool = False
    """Keep the backbone's batch normalization at its initial statistics, 0 and 1; for runs of some thousand steps."""

    # DINO.
    fixed_magnitude: bool = True
    """Keep the last layer's rows at length 1 (CNN); otherwise their length is learned (ViT)."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's softmax after its warm-up."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher's softmax at the start of its warm-up."""
    teacher_temperature_warmup_epochs: float = 50.0
    """Length of the linear warm-up of the teacher's temperature; cut at the run's end."""
    center_momentum: float = 0.9
    """Share of the old centre in the moving average of the teacher's outputs."""

    # SwAV.
    sinkhorn_epsilon: float = 0.05
    """Smoothness of the assignment to prototypes; the smaller, the harder it is."""
    sinkhorn_iterations: int = 3
    """Iterations of Sinkhorn and Knopp's."""
    queue_start_epochs: float = 15.0
    """SwAV's queue is filled from here on, and used once it is full."""

    # MoCo v2.
    key_groups: int = 8
    """Groups over all processes in which keys are normalized after a shuffle (ShuffleBN); at least one on each."""

    # Bookkeeping.
    checkpoint_every_steps: int = 250
    """Steps between checkpoints; there is one at the end of each epoch too."""
    keep_checkpoints: int = 1
    """Checkpoints to keep: the last so many, and besides the one of the best k-NN accuracy where that is measured."""
    knn_every_epochs: float | None = None
    """Measure k-NN accuracy within the training images so often; 0 never. Default each epoch where there are labels."""
    knn_images: int = 2000
    """Training images for that: a seeded subset, of which four fifths are the bank and one fifth is judged."""
    stop_on_collapse: bool = False
    """End the run where the features collapse, instead of a warning."""
    log_every_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    max_unreadable: float = 0.01
    """Largest share of unreadable images that are skipped, 0..1; above it the run stops."""
    json: bool = False
    """Print one JSON document at the end instead of text."""

    def check(self) -> None:
        """Refuse values that no run can have; views and backbone are checked where they are looked up.

        Raises:
            UserError: a value is out of range, or there is no such name.
        """
        check_ranges(self, RANGES)
        for field, names in NAMES.items():
            if getattr(self, field) not in names:
                raise unknown_name(field, getattr(self, field), names)
        if not self.epochs > 0:
            raise UserError(f"--epochs is {self.epochs:g}: give a value above 0.")
        if self.resize_px is not None and self.resize_px < self.image_px:
            raise UserError(f"--resize-px is {self.resize_px}: give at least --image-px, {self.image_px}.")
        if self.blur_px is not None and not 0 < self.blur_px[0] <= self.blur_px[1]:
            raise UserError(f"--blur-px is {self.blur_px}: give a positive range, the smaller value first.")
        check_areas(self.global_area, self.local_area)
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


def check_areas(global_area: tuple[float, float] | None, local_area: tuple[float, float] | None) -> None:
    """Refuse ranges of areas that are none.

    Raises:
        UserError: names the flag and what is allowed.
    """
    for flag, area in (("--global-area", global_area), ("--local-area", local_area)):
        if area is not None and not 0 < area[0] <= area[1] <= 1:
            raise UserError(f"{flag} is {area}: give a range of shares, above 0 and up to 1, the smaller first.")


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
    "jitter_strength": (0, 1.25),
    "resize_px": (8, 4096),
    "epochs": (0, 1e6),
    "batch_size": (2, 2**20),
    "accumulate": (1, 2**16),
    "rank_timeout_s": (1, 1e6),
    "keep_checkpoints": (1, 1000),
    "knn_every_epochs": (0, 1e6),
    "knn_images": (10, 10**7),
    "workers": (0, 256),
    "decode_px": (0, 2**16),
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
    "temperature": (1e-3, 100),
    "teacher_temperature": (1e-3, 100),
    "teacher_temperature_start": (1e-3, 100),
    "teacher_temperature_warmup_epochs": (0, 1e6),
    "center_momentum": (0, 1),
    "teacher_momentum": (0, 1),
    "teacher_momentum_end": (0, 1),
    "freeze_last_layer_epochs": (0, 1e6),
    "koleo_weight": (0, 1e3),
    "queue_size": (0, 2**24),
    "sinkhorn_epsilon": (1e-3, 10),
    "sinkhorn_iterations": (1, 100),
    "queue_start_epochs": (0, 1e6),
    "key_groups": (1, 2**16),
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
        "decode_cache",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "knn_every_epochs",
        "knn_images",
        "stop_on_collapse",
        "compile",
        "rank_timeout_s",
        "log_every_steps",
        "max_unreadable",
        "json",
    }
)
"""Fields that do not change what a run computes (of the data the fingerprint is compared), so a resumed run may."""
