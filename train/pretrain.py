"""``midge pretrain``: from a folder of images to ``backbone.safetensors``."""

from __future__ import annotations

import json

from ..runtime.errors import require
from ..runtime.images import ImageList, fingerprint, list_images
from ..runtime.progress import say
from .config import PretrainConfig
from .interruption import StopRequest
from .magnification import resolve_local_px
from .run_folder import RunFolder, open_run
from .sampling import ViewSampler
from .small_data import fit_to_data
from .views import augmentations, blur_range_px, min_decode_px, view_policy

try:
    from .backbones import Backbone, find_backbone
    from .datasets import ALONE, Share, ViewDataset
    from .decode_cache import open_cache
    from .engine import build_fabric, lost_process, on_first_rank
    from .executors import choose_executor
    from .trainer import Trainer
except ModuleNotFoundError as error:
    require((error.name or "torch").partition(".")[0], "train")
    raise


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
    fabric = build_fabric(config)
    images = list_images(config.data, config.limit, config.seed)
    changed = {}
    if config.fit_to_data:
        config, changed = fit_to_data(config, len(images))
    backbone = find_backbone(config.backbone, config.image_px, config.channels, config.patch_px)
    given = config
    config = on_first_rank(fabric, lambda: resolve_local_px(given, images, backbone.family, backbone.patch_px))
    dataset = build_dataset(config, images, backbone, Share(fabric.global_rank, fabric.world_size, config.accumulate))
    data_fingerprint = fingerprint(images)
    folder = on_first_rank(fabric, lambda: open_run(config, data_fingerprint, len(images)))
    if folder.finished:
        if fabric.is_global_zero:
            say(f"The run in '{config.out}' is finished: there is nothing to resume.")
            report(config, folder)
        return 0
    if changed and fabric.is_global_zero:
        values = ", ".join(f"{field} {value:g}" for field, value in changed.items())
        say(f"Fitted {config.recipe} to {len(images)} images: {values}. --no-fit-to-data keeps the recipe's.")
    if config.decode_cache:
        dataset.cache = open_cache(config.decode_cache, images, data_fingerprint, dataset.min_px, config.workers)
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
    sampler = ViewSampler(policy, augmentations(config.method, config.jitter_strength), blur_px, config.seed)
    executor = choose_executor(config.view_executor, config.device)
    min_px = min_decode_px(config.image_px) if config.decode_px is None else config.decode_px or None
    return ViewDataset(images, policy, sampler, config.batch_size, config.seed, share, executor, min_px)
