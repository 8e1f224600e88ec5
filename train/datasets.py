"""The data set of pretraining: item ``step`` is the whole batch of that step, cut into uint8 views.

Everything that decides about a batch is a function of (seed, step): the sampler of the loader is a plain ``range``,
a run resumes at any step, and there is no gap between epochs. The last, incomplete batch of an epoch is dropped.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..runtime.errors import UserError
from ..runtime.images import ImageList, UnreadableImageError
from .crops import crop_view
from .sampling import ViewParameters, ViewSampler, epoch_order
from .views import ViewPolicy

CHUNK = 64
"""Images that are drawn for at once, and held decoded at once."""


class ViewBatch(NamedTuple):
    """The views of N images as they leave a worker, view by view.

    Attributes:
        global_views: (2 N, h, h, 3) uint8.
        local_views: (L N, l, l, 3) uint8.
        global_parameters: what to do to the 2 N views on the device.
        local_parameters: the same for the L N views.
        unreadable: images that were replaced by others, in the order met.
    """

    global_views: Tensor
    local_views: Tensor
    global_parameters: ViewParameters
    local_parameters: ViewParameters
    unreadable: list[UnreadableImageError]


class Share(NamedTuple):
    """Which part of each step's images one process takes, and in how many portions.

    The images of a step are dealt out portion by portion, and in a portion rank by rank, each a run of neighbours: so
    all ranks together see at each step what one process would.

    Attributes:
        rank: this process, from 0.
        world_size: number of processes.
        portions: forward and backward passes per step (gradient accumulation).
    """

    rank: int = 0
    world_size: int = 1
    portions: int = 1


ALONE = Share()


class ViewDataset(Dataset[ViewBatch]):
    """Batches of views: item ``step * portions + portion``.

    Args:
        images: the data.
        policy: sizes and number of the views.
        sampler: draws the views' parameters.
        batch_size: images per step, over all processes and portions.
        seed: of the order.
        share: what this process takes of a step.

    Raises:
        UserError: there are fewer images than a batch takes, or a batch cannot be shared out evenly.
    """

    def __init__(
        self,
        images: ImageList,
        policy: ViewPolicy,
        sampler: ViewSampler,
        batch_size: int,
        seed: int,
        share: Share = ALONE,
    ) -> None:
        if len(images) < batch_size:
            few = f"'{images.root}' gives {len(images)} image{'s'[: len(images) != 1]}, fewer than one batch"
            raise UserError(
                f"{few} of {batch_size}: lower --batch-size, or add images (thousands are needed to learn)."
            )
        parts = share.world_size * share.portions
        if batch_size % parts or batch_size // parts < 2:
            raise UserError(
                f"--batch-size is {batch_size}, for {share.world_size} processes with --accumulate {share.portions}: "
                f"give a multiple of {parts}, at least {2 * parts}."
            )
        self.images = images
        self.policy = policy
        self.sampler = sampler
        self.share = share
        self.portion_size = batch_size // parts
        self.batch_size = batch_size
        self.steps_per_epoch = len(images) // batch_size
        self.seed = seed
        self._order = (-1, np.empty(0, dtype=np.int64))  # the epoch last asked for, and its order
        self._unreadable: dict[int, UnreadableImageError] = {}

    def __getitem__(self, item: int) -> ViewBatch:
        """Read and cut this process's images of a portion of a step."""
        step, portion = divmod(item, self.share.portions)
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, len(self.images)))
        first = place * self.batch_size + (portion * self.share.world_size + self.share.rank) * self.portion_size
        indices = self._order[1][first : first + self.portion_size]
        num_local, sizes = self.policy.num_local, (self.policy.global_px, self.policy.local_px)
        global_views, local_views = (
            np.empty((views, len(indices), px, px, 3), dtype=np.uint8)
            for views, px in zip((2, num_local), sizes, strict=True)
        )
        chunks, unreadable = [], []
        for start in range(0, len(indices), CHUNK):
            chunk = slice(start, start + CHUNK)
            pixels = [self._read(int(index), unreadable) for index in indices[chunk]]
            parameters = self.sampler(epoch, indices[chunk], *np.array([image.shape[:2] for image in pixels]).T)
            cut_views(pixels, parameters, [*global_views[:, chunk], *local_views[:, chunk]])
            chunks.append(parameters)
        parameters = ViewParameters.join(chunks)
        return ViewBatch(
            torch.from_numpy(global_views).flatten(0, 1),
            torch.from_numpy(local_views).flatten(0, 1),
            parameters.take(slice(0, 2)),
            parameters.take(slice(2, None)),
            unreadable,
        )

    def _read(self, index: int, unreadable: list[UnreadableImageError]) -> np.ndarray:
        """The image at ``index``, or the next readable one after it: (H, W, 3) uint8."""
        for candidate in range(index, index + len(self.images)):
            candidate %= len(self.images)
            if candidate in self._unreadable:
                continue
            try:
                return self.images.load(candidate)
            except UnreadableImageError as error:
                self._unreadable[candidate] = error
                unreadable.append(error)
        return np.zeros((1, 1, 3), dtype=np.uint8)  # all are unreadable: the main process stops when it counts them


def cut_views(images: list[np.ndarray], parameters: ViewParameters, out: list[np.ndarray]) -> None:
    """Render V views of each of N images.

    Args:
        images: N of (H, W, 3) uint8.
        parameters: (V, N) of them.
        out: V of (N, px, px, 3) uint8, written to.
    """
    boxes = np.stack([parameters.top, parameters.left, parameters.height, parameters.width], axis=-1).tolist()
    flips = parameters.flip.tolist()
    for n, image in enumerate(images):
        for v, view in enumerate(out):
            top, left, height, width = boxes[v][n]
            crop_view(image, top, left, height, width, flips[v][n], view[n])


def load_batches(
    dataset: ViewDataset, first_step: int, end_step: int, workers: int, pin_memory: bool
) -> Iterator[ViewBatch]:
    """The batches of steps ``first_step`` to ``end_step - 1``, portion by portion, read ahead by worker processes.

    The processes live until the last step: to the loader, all epochs are one.

    Args:
        dataset: the batches by step.
        first_step: where to start.
        end_step: one behind the last.
        workers: number of processes; 0 reads in this one.
        pin_memory: put the pixels into page-locked memory, for a GPU.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,  # an item is a batch
        sampler=range(first_step * dataset.share.portions, end_step * dataset.share.portions),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # the workers' seeds are not drawn from the generator that the training uses
    )
    return iter(loader)


def ignore_stop_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach the whole process group, to the main process: it ends the step first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
