"""Where the views are made: all in the workers (cpu), or from decoded images on the device (device)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime.decode import UnreadableImageError
from ..runtime.errors import unknown_name
from .cpu_views import Chunk, Normalizer, cut_batch
from .device_views import DeviceViews, pack_batch
from .method import Views
from .views import ViewPolicy


class Executor(NamedTuple):
    """The two halves of an executor.

    Attributes:
        collect: chunks, number of images, policy -> batch, in a worker.
        renderer: policy, mean, std, largest blur in px, device -> (batch on the device -> views), in the main process.
    """

    collect: Callable[[Iterable[Chunk], int, ViewPolicy], Any]
    renderer: Callable[[ViewPolicy, Sequence[float], Sequence[float], float, torch.device], Callable[[Any], Views]]


EXECUTORS = {
    "cpu": Executor(cut_batch, lambda policy, mean, std, max_blur_px, device: Normalizer(mean, std, device)),
    "device": Executor(pack_batch, DeviceViews),
}


def choose_executor(name: str, device: str) -> str:
    """Resolve ``auto``: the device where it is a GPU, else the workers, whose kernels are ten times as fast on a CPU.

    Args:
        name: ``"auto"`` or a key of :data:`EXECUTORS`.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.

    Raises:
        UserError: no such executor.
    """
    if name == "auto":
        gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
        return "device" if device in ("cuda", "mps") or (device == "auto" and gpu) else "cpu"
    if name not in EXECUTORS:
        raise unknown_name("view executor", name, ["auto", *EXECUTORS])
    return name


class Rendered(NamedTuple):
    """A batch that is ready for the network.

    Attributes:
        views: on the device.
        unreadable: images that were replaced by others.
    """

    views: Views
    unreadable: Sequence[UnreadableImageError]


def rendered(batches: Iterable[Any], render: Callable[[Any], Views], device: torch.device) -> Iterator[Rendered]:
    """Bring the batches to the device and render them, in order.

    On CUDA a batch is copied on a stream of its own. The loop's kernels are queued ahead of the device, so the copy of
    the next batch runs beside the step before it; only its rendering stands in line with the steps.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None
    for batch in batches:
        with torch.cuda.stream(copies):  # of None it does nothing
            copied = map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
        if copies is not None:
            loop = torch.cuda.current_stream(device)
            loop.wait_stream(copies)
            map_tensors(copied, lambda tensor, loop=loop: tensor.record_stream(loop))  # no reuse before the rendering
        yield Rendered(render(copied), batch.unreadable)


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same batch with ``function`` applied to its tensors, those of nested named tuples too."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    return value
