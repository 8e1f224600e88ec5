"""``midge pretrain``: from a folder of images to ``backbone.safetensors``."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np

from ..runtime import torch_model
from ..runtime.errors import UserError, require, unknown_name
from ..runtime.images import ImageList, UnreadableBudget, fingerprint, list_images
from ..runtime.preprocess import Preprocess
from ..runtime.progress import Bar, say
from .config import PretrainConfig
from .interruption import StopRequest
from .run_folder import RunFolder, open_run
from .sampling import ViewSampler
from .schedules import cosine, warmup_cosine
from .views import AUGMENTATIONS, PUBLISHED_PX, blur_range_px, view_policy

try:
    import torch
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger

    from . import checkpoint
    from .backbones import Backbone, feature_dim, find_backbone
    from .datasets import ViewDataset, load_batches
    from .methods import METHODS
    from .metrics import MetricsLog
    from .optim import OPTIMIZERS, build_optimizer, prepare_step
    from .photometric import Photometric
except ModuleNotFoundError as error:
    require((error.name or "torch").partition(".")[0], "train")
    raise

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
DEVICES = ("auto", "cpu", "cuda", "mps")
PUBLISHED_RESIZE_PX = 256  # short side before the centre crop of 224 px, in evaluation


def pretrain(config: PretrainConfig) -> int:
    """Pretrain a backbone, or go on with it.

    Args:
        config: of the run.

    Returns:
        The exit code: 0, or 128 + the signal that stopped the run, which can then be resumed.

    Raises:
        UserError: something given cannot work; what lies in the run folder is whole.
    """
    config.check()
    for kind, name, table in (("method", config.method, METHODS), ("optimizer", config.optimizer, OPTIMIZERS)):
        if name not in table:
            raise unknown_name(kind, name, table)
    fabric = build_fabric(config)
    images = list_images(config.data, config.limit, config.seed)
    backbone = find_backbone(config.backbone, config.image_px, config.channels, config.patch_px)
    dataset = build_dataset(config, images, backbone)
    folder = open_run(config, fingerprint(images), len(images))
    if folder.finished:
        say(f"The run in '{config.out}' is finished: there is nothing to resume.")
        report(config, folder)
        return 0
    trainer = Trainer(config, folder, fabric, backbone, dataset)
    with StopRequest() as stop:
        trainer.train(stop)
    if trainer.step < trainer.steps:
        say(f"Stopped after step {trainer.step} of {trainer.steps}; the same command with --resume goes on from there.")
        return 128 + (stop.signal or 0)
    trainer.export()
    report(config, folder)
    return 0


def report(config: PretrainConfig, folder: RunFolder) -> None:
    """Say on stdout what a finished run gave."""
    last = folder.last_metrics()
    if config.json:
        print(json.dumps({"run": str(folder.path), "backbone": str(folder.backbone), **last}))
    else:
        loss = f" (loss {last['loss']:.3f} at epoch {last['epoch']:g})" if last else ""
        print(f"Pretrained backbone{loss}: {folder.backbone}")


def build_fabric(config: PretrainConfig) -> Fabric:
    """The engine: device and precision."""
    if config.device not in DEVICES:
        raise unknown_name("device", config.device, DEVICES)
    if config.precision not in PRECISIONS:
        raise unknown_name("precision", config.precision, PRECISIONS)
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = {"auto": True, "cpu": True, **gpus}
    if not available[config.device]:
        usable = ", ".join(name for name in DEVICES if available[name])
        raise UserError(f"--device {config.device}: torch finds no such device here; choose one of {usable}.")
    if config.precision == "16-mixed" and (config.device == "cpu" or not any(gpus.values())):
        raise UserError("--precision 16-mixed needs a GPU: choose bf16-mixed or 32-true.")
    fabric = Fabric(accelerator=config.device, devices=1, precision=config.precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def build_dataset(config: PretrainConfig, images: ImageList, backbone: Backbone) -> ViewDataset:
    """The batches of views by step."""
    policy = view_policy(config.views, backbone.family, config.image_px, backbone.patch_px)
    given = {name: getattr(config, name) for name in ("local_px", "num_local", "global_area", "local_area")}
    policy = replace(policy, **{name: value for name, value in given.items() if value is not None})
    if policy.local_px % backbone.patch_px:
        raise UserError(f"--local-px is {policy.local_px}: give a multiple of the patch, {backbone.patch_px} px.")
    blur_px = config.blur_px or blur_range_px(config.image_px)
    sampler = ViewSampler(policy, AUGMENTATIONS[config.method], blur_px, config.seed)
    return ViewDataset(images, policy, sampler, config.batch_size, config.seed)


class Trainer:
    """A run: its parts, the loop, and what it leaves behind.

    Args:
        config: of the run.
        folder: where it lives; a checkpoint there is gone on from.
        fabric: device, precision, log.
        backbone: what is trained.
        dataset: batches by step.

    Attributes:
        step: number of steps done.
        steps: number of steps of the whole run.
    """

    def __init__(
        self, config: PretrainConfig, folder: RunFolder, fabric: Fabric, backbone: Backbone, dataset: ViewDataset
    ) -> None:
        self.config, self.folder, self.fabric, self.backbone, self.dataset = config, folder, fabric, backbone, dataset
        self.steps = max(1, round(config.epochs * dataset.steps_per_epoch))
        self.step = 0
        torch.manual_seed(config.seed)
        build = METHODS[config.method]
        self.method: Any = build(config, backbone, dataset.policy, dataset.steps_per_epoch, self.steps)
        self.method.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(config.optimizer, self.method, config.momentum, config.trust_coefficient)
        self.network, self.optimizer = fabric.setup(self.method, optimizer)
        self.network.mark_forward_method("loss")
        self.photometric = Photometric(config.mean, config.std, dataset.sampler.blur_px[1], fabric.device)
        if folder.checkpoint.exists():
            self.restore()

    def train(self, stop: StopRequest) -> None:
        """Run the steps that are left, until the end or a stop request; a step is done whole or not at all."""
        config, fabric, dataset = self.config, self.fabric, self.dataset
        method, network, optimizer = self.method, self.network, self.optimizer
        lr, weight_decay = self.schedules()
        unreadable = UnreadableBudget(config.max_unreadable, len(dataset.images))
        batches = load_batches(dataset, self.step, self.steps, config.workers, fabric.device.type == "cuda")
        board = TensorBoardLogger(self.folder.path, name="", version="tensorboard", purge_step=self.step)
        with Bar("Pretraining", self.steps) as bar:
            bar.advance(self.step)
            log = MetricsLog(self.folder.metrics, self.step, dataset, config.log_every_steps, bar, board.log_metrics)
            for step, batch in enumerate(log.waiting(batches), self.step):
                for error in batch.unreadable:
                    unreadable.skip(error)
                views = self.photometric.views(batch)
                with fabric.autocast():
                    losses = network.loss(views, step)
                fabric.backward(losses.total)
                prepare_step(optimizer, lr[step], weight_decay[step], method.frozen(step))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                method.after_step(step)
                log.after_step(step, losses, lr[step])
                self.step = step + 1
                last = self.step == self.steps or stop.signal is not None
                if last or self.step % config.checkpoint_every_steps == 0 or self.step % dataset.steps_per_epoch == 0:
                    log.flush(step, losses, lr[step])
                    self.save()
                if last:
                    break
        board.finalize("success")

    def schedules(self) -> tuple[np.ndarray, np.ndarray]:
        """Learning rate and weight decay by step, (steps,) each; the peak lr is scaled by batch size / 256."""
        config = self.config
        peak_lr = config.base_lr * config.batch_size / 256
        warmup_steps = round(config.warmup_epochs * self.dataset.steps_per_epoch)
        lr = warmup_cosine(config.warmup_lr, peak_lr, config.min_lr, warmup_steps, self.steps)
        return lr, cosine(config.weight_decay, config.weight_decay_end, self.steps)

    def save(self) -> None:
        """Write the checkpoint of the steps done."""
        precision = self.fabric.strategy.precision.state_dict()
        state = checkpoint.capture(self.step, self.folder.identity, self.method, self.optimizer, precision)
        checkpoint.save(self.folder.checkpoint, state)

    def restore(self) -> None:
        """Go back to the last checkpoint."""
        state = checkpoint.load(self.folder.checkpoint, self.folder.identity)
        checkpoint.restore(state, self.method, self.optimizer)
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step = state["step"]
        say(f"Resumed after step {self.step} of {self.steps}.")

    def export(self) -> None:
        """Write ``backbone.safetensors`` and ``backbone.json``; equal runs give equal bytes."""
        config, policy = self.config, self.dataset.policy
        network = self.method.backbone
        resize_px = config.resize_px or round(config.image_px * PUBLISHED_RESIZE_PX / PUBLISHED_PX)
        spec = torch_model.ModelSpec(
            timm_name=self.backbone.name,
            timm_args=self.backbone.args,
            num_classes=0,
            feature_dim=feature_dim(network),
            labels=(),
            preprocess=Preprocess(resize_px, config.image_px, mean=config.mean, std=config.std),
            input_px=config.image_px,
            trained={
                "method": config.method,
                "views": config.views,
                "local_px": policy.local_px,
                "num_local": policy.num_local,
                "global_area": list(policy.global_area),
                "local_area": list(policy.local_area),
                "weights": config.export_weights,
                "seed": config.seed,
                "epochs": config.epochs,
                "steps": self.steps,
                "batch_size": config.batch_size,
                "num_images": len(self.dataset.images),
                "run": self.folder.identity,
            },
        )
        torch_model.save_model(self.folder.path, "backbone", network, spec)
