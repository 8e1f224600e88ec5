"""``midge pretrain``: from a folder of images to ``backbone.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..runtime import torch_model
from ..runtime.errors import require, unknown_name
from ..runtime.images import ImageList, UnreadableBudget, fingerprint, list_images
from ..runtime.preprocess import Preprocess
from ..runtime.progress import Bar, say
from .config import PretrainConfig
from .interruption import StopRequest
from .magnification import resolve_local_px
from .run_folder import RunFolder, open_run
from .sampling import ViewSampler
from .schedules import cosine, warmup_cosine
from .small_data import fit_to_data
from .views import AUGMENTATIONS, PUBLISHED_PX, blur_range_px, min_decode_px, view_policy

try:
    import torch
    from lightning.fabric import Fabric
    from lightning.fabric.loggers.tensorboard import TensorBoardLogger

    from . import checkpoint
    from .backbones import Backbone, feature_dim, find_backbone
    from .datasets import ALONE, Share, ViewDataset, load_batches
    from .decode_cache import open_cache
    from .engine import build_fabric, lost_process, on_first_rank
    from .executors import EXECUTORS, choose_executor, rendered
    from .methods import METHODS, Plan
    from .metrics import COLLAPSE_CAUSES, CollapseWatch, MetricsLog
    from .online_knn import online_knn
    from .optim import OPTIMIZERS, build_optimizer, prepare_step
    from .ranks import max_over_ranks, world_size
except ModuleNotFoundError as error:
    require((error.name or "torch").partition(".")[0], "train")
    raise

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
    changed = {}
    if config.fit_to_data:
        config, changed = fit_to_data(config, len(images))
    backbone = find_backbone(config.backbone, config.image_px, config.channels, config.patch_px)
    given = config
    config = on_first_rank(fabric, lambda: resolve_local_px(given, images, backbone.family, backbone.patch_px))
    dataset = build_dataset(config, images, backbone, Share(fabric.global_rank, fabric.world_size, config.accumulate))
    folder = on_first_rank(fabric, lambda: open_run(config, fingerprint(images), len(images)))
    if folder.finished:
        if fabric.is_global_zero:
            say(f"The run in '{config.out}' is finished: there is nothing to resume.")
            report(config, folder)
        return 0
    if changed and fabric.is_global_zero:
        values = ", ".join(f"{field} {value:g}" for field, value in changed.items())
        say(f"Fitted {config.recipe} to {len(images)} images: {values}. --no-fit-to-data keeps the recipe's.")
    if config.decode_cache:
        dataset.cache = open_cache(config.decode_cache, images, fingerprint(images), dataset.min_px, config.workers)
    trainer = Trainer(config, folder, fabric, backbone, dataset)
    try:
        with StopRequest() as stop:
            signal = trainer.train(stop)
    except RuntimeError as error:
        if fabric.world_size > 1 and (lost := lost_process(error)) is not None:
            raise lost from error
        raise
    if fabric.is_global_zero:
        if trainer.step < trainer.steps:
            done = f"Stopped after step {trainer.step} of {trainer.steps}"
            say(f"{done}; the same command with --resume goes on from there.")
        else:
            trainer.export()
            report(config, folder)
    return 128 + signal if trainer.step < trainer.steps else 0


def report(config: PretrainConfig, folder: RunFolder) -> None:
    """Say on stdout what a finished run gave."""
    last = folder.last_metrics()
    if config.json:
        print(json.dumps({"run": str(folder.path), "backbone": str(folder.backbone), **last}))
    else:
        loss = f" (loss {last['loss']:.3f} at epoch {last['epoch']:g})" if last else ""
        print(f"Pretrained backbone{loss}: {folder.backbone}")


def build_dataset(config: PretrainConfig, images: ImageList, backbone: Backbone, share: Share = ALONE) -> ViewDataset:
    """The batches of views by step, of which this process takes its share."""
    given = {name: getattr(config, name) for name in ("local_px", "num_local", "global_area", "local_area")}
    policy = view_policy(config.views, backbone.family, config.image_px, backbone.patch_px, **given)
    backbone.check_views((policy.global_px, policy.local_px))
    blur_px = config.blur_px or blur_range_px(config.image_px)
    sampler = ViewSampler(policy, AUGMENTATIONS[config.method], blur_px, config.seed)
    executor = choose_executor(config.view_executor, config.device)
    min_px = min_decode_px(config.image_px) if config.decode_px is None else config.decode_px or None
    return ViewDataset(images, policy, sampler, config.batch_size, config.seed, share, executor, min_px)


def preprocess_of(config: PretrainConfig) -> Preprocess:
    """From an image to the network's input, in evaluation."""
    resize_px = config.resize_px or round(config.image_px * PUBLISHED_RESIZE_PX / PUBLISHED_PX)
    return Preprocess(resize_px, config.image_px, mean=config.mean, std=config.std)


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
        plan = Plan(config, backbone, dataset.policy, dataset.steps_per_epoch, self.steps, sync=fabric.world_size > 1)
        self.method: Any = METHODS[config.method](plan)
        self.method.to(memory_format=torch.channels_last)
        if fabric.global_rank:  # the same start everywhere; from here on each process draws for itself
            torch.manual_seed(config.seed + (fabric.global_rank << 32))
        optimizer = build_optimizer(config.optimizer, self.method, config.momentum, config.trust_coefficient)
        self.network, self.optimizer = fabric.setup(self.method, optimizer)
        self.network.mark_forward_method("loss")
        renderer, max_blur_px = EXECUTORS[dataset.executor].renderer, dataset.sampler.blur_px[1]
        self.render = renderer(dataset.policy, config.mean, config.std, max_blur_px, fabric.device)
        self.preprocess = preprocess_of(config)
        self.knn = online_knn(config, dataset.images, self.preprocess, fabric.device)
        if folder.checkpoint.exists():
            self.restore()

    def train(self, stop: StopRequest) -> int:
        """Run the steps that are left, until the end or a stop request; a step is done whole or not at all.

        Returns:
            The signal that was followed, or 0.
        """
        fabric, method, network, optimizer = self.fabric, self.method, self.network, self.optimizer
        portions, signal = self.config.accumulate, 0
        lr, weight_decay = self.schedules()
        unreadable = UnreadableBudget(self.config.max_unreadable, len(self.dataset.images))
        with self.logging() as log:
            ready = rendered(log.waiting(self.batches()), self.render, fabric.device)
            for item, batch in enumerate(ready, self.step * portions):
                step, portion = divmod(item, portions)
                for error in batch.unreadable:
                    unreadable.skip(error)
                more_to_come = portion + 1 < portions
                with fabric.no_backward_sync(network, enabled=more_to_come and fabric.world_size > 1):
                    with fabric.autocast():
                        losses = network.loss(batch.views, step)
                    fabric.backward(losses.total / portions)
                log.add(losses)
                if more_to_come:
                    continue
                prepare_step(optimizer, lr[step], weight_decay[step], method.frozen(step))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                method.after_step(step)
                log.end_step()
                self.step = step + 1
                signal = self.agreed_signal(stop)
                last = self.step == self.steps or signal != 0
                judged = self.judge() if self.is_due(self.knn_every_steps) else {}
                keep = bool(judged) or last or self.is_due(*self.checkpoint_every_steps)
                if keep or self.is_due(self.config.log_every_steps):
                    log.flush(step, lr[step], **judged)
                if keep:
                    self.save(**judged)
                if last:
                    break
        return signal

    def batches(self) -> Iterator[Any]:
        """What is left to read."""
        pin = self.fabric.device.type == "cuda"
        return load_batches(self.dataset, self.step, self.steps, self.config.workers, pin)

    @contextmanager
    def logging(self) -> Iterator[MetricsLog]:
        """The log of the steps that are left; the first process keeps it."""
        config, first = self.config, self.fabric.is_global_zero
        watch = CollapseWatch(config.stop_on_collapse, COLLAPSE_CAUSES[config.method])
        board = TensorBoardLogger(self.folder.path, name="", version="tensorboard", purge_step=self.step)
        with Bar("Pretraining", self.steps, quiet=not first) as bar:
            bar.advance(self.step)
            yield MetricsLog(self.folder.metrics, self.step, self.dataset, bar, board.log_metrics, watch)
        if first:
            board.finalize("success")

    def is_due(self, *every_steps: int) -> bool:
        """Whether the steps done are a multiple of one of these; 0 is never due."""
        return any(every and self.step % every == 0 for every in every_steps)

    @property
    def checkpoint_every_steps(self) -> tuple[int, int]:
        """Steps between checkpoints: as asked for, and at the end of each epoch."""
        return self.config.checkpoint_every_steps, self.dataset.steps_per_epoch

    @property
    def knn_every_steps(self) -> int:
        """Steps between judgements by k-NN, or 0."""
        if self.knn is None:
            return 0
        every_epochs = 1.0 if self.config.knn_every_epochs is None else self.config.knn_every_epochs
        return max(1, round(every_epochs * self.dataset.steps_per_epoch))

    def judge(self) -> dict[str, float]:
        """The k-NN accuracy so far, which the first process measures for all."""
        assert self.knn is not None
        top1 = self.knn(self.method.backbone) if self.fabric.is_global_zero else 0.0
        self.method.train()
        return {"knn_top1": self.fabric.broadcast(top1)}

    def agreed_signal(self, stop: StopRequest) -> int:
        """The signal that asks all processes to stop, or 0. Several look it up together, once every few steps."""
        if world_size() == 1:
            return stop.signal or 0
        if not self.is_due(self.config.log_every_steps):
            return 0
        return int(max_over_ranks(torch.tensor(stop.signal or 0, device=self.fabric.device)))

    def schedules(self) -> tuple[np.ndarray, np.ndarray]:
        """Learning rate and weight decay by step, (steps,) each; the peak lr is scaled by batch size / 256."""
        config = self.config
        peak_lr = config.base_lr * config.batch_size / 256
        warmup_steps = round(config.warmup_epochs * self.dataset.steps_per_epoch)
        lr = warmup_cosine(config.warmup_lr, peak_lr, config.min_lr, warmup_steps, self.steps)
        return lr, cosine(config.weight_decay, config.weight_decay_end, self.steps)

    def save(self, knn_top1: float | None = None) -> None:
        """Write the checkpoint of the steps done."""
        config, path = self.config, self.folder.checkpoint
        precision = self.fabric.strategy.precision.state_dict()
        state = checkpoint.capture(
            self.step, self.folder.identity, self.method, self.optimizer, precision, self.fabric.device
        )
        if not self.fabric.is_global_zero:
            return
        checkpoint.save(path, state)
        if config.keep_checkpoints > 1:
            checkpoint.keep(path, self.step, config.keep_checkpoints)
        if knn_top1 is not None:
            checkpoint.keep_best(path, self.step, knn_top1)

    def restore(self) -> None:
        """Go back to the last checkpoint."""
        state = checkpoint.load(self.folder.checkpoint, self.folder.identity)
        checkpoint.restore(state, self.method, self.optimizer)
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step = state["step"]
        if self.fabric.is_global_zero:
            say(f"Resumed after step {self.step} of {self.steps}.")

    def export(self) -> None:
        """Write ``backbone.safetensors`` and ``backbone.json``; equal runs give equal bytes."""
        config, policy = self.config, self.dataset.policy
        network = self.method.backbone
        spec = torch_model.ModelSpec(
            timm_name=self.backbone.name,
            timm_args=self.backbone.args,
            num_classes=0,
            feature_dim=feature_dim(network),
            labels=(),
            preprocess=self.preprocess,
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
