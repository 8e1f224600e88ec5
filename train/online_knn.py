"""k-NN accuracy while a run trains: does it learn, and which checkpoint was the best?

The images are training images whose labels training does not see: a bank, and others that are judged. Images of a test
set have no part in it, so that choosing a checkpoint by this number does not spoil the judgement at the end.
"""

from __future__ import annotations

import torch
from torch import nn

from ..runtime.errors import UserError
from ..runtime.images import ImageList
from ..runtime.preprocess import Preprocess
from .config import PretrainConfig
from .features import encode
from .knn import knn_accuracy
from .labelled import stratified_split

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
        self._bank, self._judged = stratified_split(images.labels, JUDGED_SHARE, seed)

    def __call__(self, backbone: nn.Module) -> float:
        """Top-1 accuracy, 0..1. The network is run in eval mode and left in it."""
        backbone.eval()
        features, kept = encode({"backbone": backbone}, self.images, self.preprocess, device=self.device, quiet=True)
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
    if images.labels is None:
        if config.knn_every_epochs is None:
            return None
        raise UserError(
            f"--knn-every-epochs is {config.knn_every_epochs:g}, but '{images.root}' has no labels: lay its images out "
            "as <class>/<image>, or leave the flag out."
        )
    if len(images) > config.knn_images:
        _, chosen = stratified_split(images.labels, config.knn_images / len(images), config.seed)
        images = images.take(chosen)
    return OnlineKnn(images, preprocess, device, config.seed)
