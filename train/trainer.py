"""A run of pretraining: the loop, its checkpoints, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

from ..runtime import torch_model
from ..runtime.images import UnreadableBudget
from ..runtime.preprocess import Preprocess
from ..runtime.progress import Bar, say
from . import checkpoint
from .backbones import Backbone, feature_dim, has_batch_norm
from .config import PretrainConfig
from .datasets import ViewDataset, load_batches
from .executors import EXECUTORS, rendered
from .interruption import StopRequest
from .methods import METHODS, Plan
from .metrics import COLLAPSE_CAUSES, CollapseWatch, MetricsLog
from .online_knn import online_knn
from .optim import build_optimizer, prepare_step
from .ranks import max_over_ranks, world_size
from .run_folder import RunFolder
from .schedules import cosine, warmup_cosine
from .views import PUBLISHED_PX

PUBLISHED_RESIZE_PX = 256  # short side before the centre crop of 224 px, in evaluation


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
        several, can_sync = fabric.world_size > 1, fabric.device.type == "cuda"
        plan = Plan(config, backbone, dataset.policy, dataset.steps_per_epoch, self.steps, sync=several and can_sync)
        self.method: Any = METHODS[config.method](plan)
        apart = several and not can_sync and not config.freeze_batch_norm and has_batch_norm(self.method)
        if apart and fabric.is_global_zero:
            say("Batch normalization sees the images of one process at a time here; on CUDA GPUs it sees all.")
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
        with self.logging() as log, closing(self.batches()) as batches:
            ready = rendered(log.waiting(batches), self.render, fabric.device)
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

    def batches(self) -> Generator[Any, None, None]:
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
            self.step, self.folder.identity, self.method, self.optimizer, precision, self.fabric.device, knn_top1
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
            if state.get("knn_top1") is not None:  # the run may have been killed before this was noted
                checkpoint.keep_best(self.folder.checkpoint, self.step, state["knn_top1"])
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
