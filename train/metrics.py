"""What a run tells while it trains: metrics.jsonl, TensorBoard, the progress bar; and the watch on NaN and collapse."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from ..runtime.errors import UserError
from ..runtime.files import atomic_file
from ..runtime.progress import Bar, say
from .datasets import ViewDataset
from .method import Losses
from .ranks import mean_over_ranks, rank

Item = TypeVar("Item")


class MetricsLog:
    """Collects the losses of each step on the device, and brings them to the host once every few steps.

    What is logged is the mean over all processes; spread and rank of the features are of the first one's.

    Args:
        path: metrics.jsonl; lines of steps at or after ``step`` are dropped, for they will be run again.
        step: first step of this process.
        dataset: for the number of images per step and of steps per epoch.
        bar: shows loss and speed.
        board: takes a dictionary of numbers and the step, as Fabric's ``log_dict``.
        watch: on collapse.

    Attributes:
        last: the last line.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        dataset: ViewDataset,
        bar: Bar,
        board: Callable[[dict[str, float], int], None],
        watch: CollapseWatch,
    ) -> None:
        if rank() == 0:
            drop_lines_from(path, step)
        self.path = path
        self.dataset = dataset
        self.bar = bar
        self.board = board
        self.last: dict[str, float] = {}
        self.watch = watch
        self._portions: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._embeddings: Tensor | None = None
        self._since = time.perf_counter()
        self._waited_s = 0.0

    def waiting(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Pass the batches on, and count the time that each was waited for."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited_s += time.perf_counter() - start
            yield batch

    def add(self, losses: Losses) -> None:
        """Take in the losses of one portion of a step."""
        self._portions.append(torch.stack([losses.total.detach(), losses.global_pairs, losses.local_pairs]))
        self._embeddings = losses.embeddings

    def end_step(self) -> None:
        """Close a step: its portions count as one."""
        self._steps.append(torch.stack(self._portions).mean(dim=0))
        self._portions.clear()
        self.bar.advance()

    def flush(self, step: int, lr: float, **more: float) -> None:
        """Write a line about the steps since the last one, up to ``step``, if there are any.

        All processes of a run call this at the same steps; the first writes.

        Args:
            step: the last one.
            lr: its learning rate.
            more: further numbers of the line.

        Raises:
            UserError: a loss was not finite, or the features have collapsed and that is to end the run.
        """
        if not self._steps:
            return
        values = mean_over_ranks(torch.stack(self._steps)).cpu()  # (steps, 3): the one synchronization
        self._steps.clear()
        check_finite(values, step)
        now = time.perf_counter()
        elapsed_s, waited_s = now - self._since, self._waited_s
        self._since, self._waited_s = now, 0.0
        total, global_pairs, local_pairs = values.mean(dim=0).tolist()
        assert self._embeddings is not None
        self.last = {
            "step": step,
            "epoch": round((step + 1) / self.dataset.steps_per_epoch, 4),
            "loss": total,
            "loss_global": global_pairs,
            "loss_local": local_pairs,
            "lr": float(lr),
            "images_per_s": round(len(values) * self.dataset.batch_size / elapsed_s, 2),
            "data_wait_percent": round(100 * waited_s / elapsed_s, 2),
            "feature_std": feature_std(self._embeddings),
            "rankme": rankme(self._embeddings),
            **({"gpu_memory_mib": gpu_memory_mib()} if self._embeddings.is_cuda else {}),
            **more,
        }
        self.watch(step, self.last["feature_std"], self.last["rankme"])
        if rank() != 0:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.last) + "\n")
        self.board({name: value for name, value in self.last.items() if name != "step"}, step)
        knn = f", k-NN {more['knn_top1']:.1%}" if "knn_top1" in more else ""
        self.bar.advance(0, note=f"loss {total:.3f}, {self.last['images_per_s']:.0f} images/s{knn}")


class CollapseWatch:
    """Notices where the features of all images become the same, or fall into very few dimensions.

    One line below the limits may be chance: it takes ``PATIENCE`` lines in a row.

    Args:
        stop: end the run; otherwise it is said once.
        cause: what most likely brought it about, and what to do.
    """

    def __init__(self, stop: bool, cause: str) -> None:
        self.stop = stop
        self.cause = cause
        self._lines = 0

    def __call__(self, step: int, std: float, effective_rank: float) -> None:
        """Look at one line of the metrics.

        Raises:
            UserError: it has collapsed, and that is to end the run.
        """
        self._lines = self._lines + 1 if std < MIN_FEATURE_STD or effective_rank < MIN_RANKME else 0
        if self._lines < PATIENCE or (self._lines > PATIENCE and not self.stop):
            return
        message = (
            f"The features have collapsed by step {step}: their spread is {std:.3f} (1 is even) in "
            f"{effective_rank:.1f} effective dimensions. {self.cause}"
        )
        if self.stop:
            raise UserError(message)
        if rank() == 0:
            say(message)


MIN_FEATURE_STD = 0.02
MIN_RANKME = 1.5
PATIENCE = 3

COLLAPSE_CAUSES = {
    "dino": "Most likely the teacher's temperature is too high or the centre moves too slowly (all outputs alike), or "
    "the learning rate is too high: lower --teacher-temperature or --base-lr, or give a --koleo-weight of 0.05 to 0.1.",
    "mocov2": "Most likely the learning rate is too high, or the key network follows too fast: lower --base-lr, raise "
    "--teacher-momentum or --queue-size.",
    "swav": "Most likely the assignment is too smooth, or there are more prototypes than a batch and its queue can "
    "fill: lower --sinkhorn-epsilon, --head-outputs or --base-lr, or give a --queue-size.",
}


def gpu_memory_mib() -> float:
    """Most memory that tensors have taken on this GPU, MiB."""
    return round(torch.cuda.max_memory_allocated() / 2**20, 1)


def check_finite(values: Tensor, step: int) -> None:
    """Raise where the loss of one of the last ``len(values)`` steps up to ``step`` is not finite."""
    bad = (~values.isfinite().all(dim=1)).nonzero()
    if len(bad):
        first = step - len(values) + 1 + int(bad[0])
        raise UserError(
            f"The loss is not finite at step {first}: most likely the learning rate is too high, the warm-up too "
            "short, or 16 bits overflow. Lower --base-lr, lengthen --warmup-epochs or give --precision 32-true in "
            "a new run; the last checkpoint is of an earlier step."
        )


def feature_std(embeddings: Tensor) -> float:
    """Spread of the normalized embeddings over the images: 0 when all are equal, near 1 when all directions are used.

    Args:
        embeddings: (M, D).
    """
    directions = torch.nn.functional.normalize(embeddings.float(), dim=1)
    return float(directions.std(dim=0).mean()) * math.sqrt(directions.shape[1])


def rankme(embeddings: Tensor, max_rows: int = 512) -> float:
    """Effective rank of the embeddings (Garrido et al., ICML 2023): exp of the entropy of their singular values.

    It lies between 1 (all embeddings on a line: collapse) and min(M, D).

    Args:
        embeddings: (M, D); the first ``max_rows`` are used.
        max_rows: bounds the cost.
    """
    values = torch.linalg.svdvals(embeddings[:max_rows].float())
    shares = values / values.sum() + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def drop_lines_from(path: Path, step: int) -> None:
    """Drop the lines of steps from ``step`` on, and those that are damaged, as a last one that was not finished."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            logged = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if logged < step and line.endswith("\n"):
            kept.append(line)
    with atomic_file(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
