"""k-NN accuracy while a run trains: does it learn, and which checkpoint was the best?

The images are training images whose labels training does not see: a bank, and others that are judged. Images of a test
set have no part in it, so that choosing a checkpoint by this number does not spoil the judgement at the end.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..runtime.errors import UserError
from ..runtime.images import ImageList, UnreadableBudget, draw_subset
from ..runtime.preprocess import Preprocess
from .config import PretrainConfig
from .features import encode
from .knn import knn_accuracy

JUDGED_SHARE = 0.2


class OnlineKnn:
    """Judges a backbone by some labelled training images.

    Args:
        images: with labels.
        preprocess: from an image to the network's input.
        device: where the network is.
        seed: of the split into bank and judged images.
    """

    def __init__(self, images: ImageList, preprocess: Preprocess, device: torch.device, seed: int) -> None:
        assert images.labels is not None
        self.images, self.preprocess, self.device = images, preprocess, device
        order = np.random.default_rng(seed).permutation(len(images))
        self._judged, self._bank = np.split(order, [max(1, round(JUDGED_SHARE * len(images)))])

    def __call__(self, backbone: nn.Module) -> float:
        """Top-1 accuracy, 0..1. The network is run in eval mode and left in it."""
        backbone.eval()
        everything = UnreadableBudget(1.0, len(self.images))  # training counts unreadable images, and stops for them
        encoders = {"backbone": backbone}
        features, kept = encode(
            encoders, self.images, self.preprocess, device=self.device, budget=everything, quiet=True
        )
        assert self.images.labels is not None
        rows = {int(index): row for row, index in enumerate(kept)}
        bank, judged = ([rows[int(i)] for i in part if int(i) in rows] for part in (self._bank, self._judged))
        values, labels = features["backbone"], self.images.labels[kept]
        return knn_accuracy(values[bank], labels[bank], values[judged], labels[judged], device=self.device)["top1"]


def online_knn(
    config: PretrainConfig, images: ImageList, preprocess: Preprocess, device: torch.device
) -> OnlineKnn | None:
    """The judge of a run, or None where there is nothing to judge by.

    Raises:
        UserError: k-NN is asked for and the images have no labels.
    """
    if config.knn_every_epochs == 0:
        return None
    images = draw_subset(images, config.knn_images, config.seed)
    if images.labels is None or np.bincount(images.labels).max() < 2:  # folders of one image each are no classes
        if config.knn_every_epochs is None:
            return None
        lacks = "has no labels" if images.labels is None else f"has no two of {len(images)} images in one class"
        raise UserError(
            f"--knn-every-epochs is {config.knn_every_epochs:g}, but '{images.root}' {lacks}: lay its images out as "
            "<class>/<image>, or leave the flag out."
        )
    return OnlineKnn(images, preprocess, device, config.seed)
