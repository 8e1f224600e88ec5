"""The data set of pretraining: item ``step`` is the whole batch of that step, as the executor of the views takes it.

Everything that decides about a batch is a function of (seed, step): the sampler of the loader is a plain ``range``,
a run resumes at any step, and there is no gap between epochs. The last, incomplete batch of an epoch is dropped.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..runtime.errors import UserError
from ..runtime.images import ImageList, UnreadableImageError
from .cpu_views import Chunk
from .decode_cache import DecodeCache
from .executors import EXECUTORS
from .jpeg import load
from .sampling import ViewSampler, epoch_order
from .views import ViewPolicy

CHUNK = 64
"""Images that are drawn for at once, and held decoded at once."""


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


class ViewDataset(Dataset[Any]):
    """Batches of views: item ``step * portions + portion``.

    Each is a :class:`~.cpu_views.CutBatch` or a :class:`~.device_views.PackedBatch`.

    Args:
        images: the data.
        policy: sizes and number of the views.
        sampler: draws the views' parameters.
        batch_size: images per step, over all processes and portions.
        seed: of the order.
        share: what this process takes of a step.
        executor: key of :data:`~.executors.EXECUTORS`.
        min_px: short side, px, that a large image keeps at least when it is decoded at a part of its size.

    Attributes:
        cache: of the decoded images; None decodes them each time.

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
        executor: str = "cpu",
        min_px: int | None = None,
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
        self.executor = executor
        self.min_px = min_px
        self.cache: DecodeCache | None = None
        self._order = (-1, np.empty(0, dtype=np.int64))  # the epoch last asked for, and its order
        self._unreadable: dict[int, UnreadableImageError] = {}

    def __getitem__(self, item: int) -> Any:
        """Read this process's images of a portion of a step."""
        step, portion = divmod(item, self.share.portions)
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, len(self.images)))
        first = place * self.batch_size + (portion * self.share.world_size + self.share.rank) * self.portion_size
        indices = self._order[1][first : first + self.portion_size]
        unreadable: list[UnreadableImageError] = []
        chunks = self._chunks(epoch, indices, unreadable)
        batch = EXECUTORS[self.executor].collect(chunks, len(indices), self.policy)
        return batch._replace(unreadable=unreadable)

    def _chunks(self, epoch: int, indices: np.ndarray, unreadable: list[UnreadableImageError]) -> Iterator[Chunk]:
        """The images of a batch and what is drawn for them, so many at a time."""
        for start in range(0, len(indices), CHUNK):
            chunk = indices[start : start + CHUNK]
            pixels = [self._read(int(index), unreadable) for index in chunk]
            yield pixels, self.sampler(epoch, chunk, *np.array([image.shape[:2] for image in pixels]).T)

    def _read(self, index: int, unreadable: list[UnreadableImageError]) -> np.ndarray:
        """The image at ``index``, or the next readable one after it: (H, W, 3) uint8."""
        for candidate in range(index, index + len(self.images)):
            candidate %= len(self.images)
            if candidate in self._unreadable:
                continue
            try:
                return self._decode(candidate)
            except UnreadableImageError as error:
                self._unreadable[candidate] = error
                unreadable.append(error)
        return np.zeros((1, 1, 3), dtype=np.uint8)  # all are unreadable: the main process stops when it counts them

    def _decode(self, index: int) -> np.ndarray:
        if self.cache is not None:
            return self.cache.load(index)
        return load(self.images, index, self.min_px)


def load_batches(
    dataset: ViewDataset, first_step: int, end_step: int, workers: int, pin_memory: bool
) -> Generator[Any, None, None]:
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
        collate_fn=as_it_is,  # the default one makes tensors of the arrays that are meant to stay on the host
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # the workers' seeds are not drawn from the generator that the training uses
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        # The workers end when the iterator goes. Kept by the traceback of an error, it would wait for them at exit, for
        # they ignore the signal that is to end them.
        del iterator


def as_it_is(batch: Any) -> Any:
    """The batch."""
    return batch


def ignore_stop_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach the whole process group, to the main process: it ends the step first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
