"""Checkpoints: everything a run needs to go on as if it had never stopped, complete on disk or not there at all."""

from __future__ import annotations

import io
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.errors import UserError
from ..runtime.files import atomic_file, read_json, write_json
from ..runtime.progress import say
from .ranks import gather_over_ranks, rank, world_size

SCHEMA = 2


def capture(
    step: int,
    identity: str,
    method: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: dict[str, Any],
    device: torch.device | str = "cpu",
    knn_top1: float | None = None,
) -> dict[str, Any]:
    """The state of a run after ``step`` steps; all its processes call this together, and any of them may save it.

    The views need none: they are functions of the step, and so are the schedules and the queues' places. The generators
    are for what the networks draw (drop path); each process has its own.

    Args:
        step: number of steps done.
        identity: of the run, see :class:`~midge.train.run_folder.RunFolder`.
        method: networks, heads, centre, queues: all its parameters and buffers.
        optimizer: its momenta.
        precision: state of the loss scaling, empty where there is none.
        device: where the processes exchange tensors.
        knn_top1: k-NN accuracy at this step, 0..1, where it was measured.
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()

    def of_all_ranks(state: torch.Tensor) -> torch.Tensor:
        return gather_over_ranks(state[None].to(device)).cpu()  # (ranks, bytes) uint8

    return {
        "schema": SCHEMA,
        "identity": identity,
        "step": step,
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "precision": precision,
        "knn_top1": knn_top1,
        "rng": of_all_ranks(torch.get_rng_state()),
        "cuda_rng": of_all_ranks(torch.cuda.get_rng_state()) if cuda else None,
    }


def restore(state: dict[str, Any], method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the state of :func:`capture` back; ``state["step"]`` and ``state["precision"]`` are the caller's.

    A run may go on with another number of processes. All is as it was then but for the generators of processes that
    were not there before, which start anew, and statistics of batch normalization that a process has for itself.
    """
    method.load_state_dict(state["method"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    if rank() < len(state["rng"]):
        torch.set_rng_state(state["rng"][rank()])
    if state["cuda_rng"] is not None and torch.cuda.is_available() and rank() < len(state["cuda_rng"]):
        torch.cuda.set_rng_state(state["cuda_rng"][rank()])
    if len(state["rng"]) != world_size() and rank() == 0:
        say(
            f"The run was saved by {len(state['rng'])} processes and goes on with {world_size()}: images, schedules, "
            "weights and queues are the same; what the networks draw (drop path) and the batch statistics of each "
            "process are not."
        )


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; the one before stays whole until this one is complete and synced to disk.

    Raises:
        UserError: it could not be written, a full disk for example.
    """
    buffer = io.BytesIO()  # torch's own file writer turns a full disk into an abort
    torch.save(state, buffer)
    try:
        with atomic_file(path) as partial:
            partial.write_bytes(buffer.getbuffer())
    except OSError as error:
        kept = "the checkpoint before it is intact" if path.exists() else "there is none before it"
        raise UserError(
            f"Cannot write the checkpoint of step {state['step']}, '{path}': {error.strerror or error}; {kept}. "
            "Make room and continue with --resume."
        ) from error


def keep(path: Path, step: int, number: int) -> None:
    """Keep the last ``number`` checkpoints: beside ``last.pt`` the ones before it, as ``step-00000250.pt`` and so on.

    They are links where the file system has links, so the newest takes no space of its own.
    """
    link(path, path.with_name(f"step-{step:08}.pt"))
    numbered = sorted(path.parent.glob("step-*.pt"))
    for old in numbered[:-number]:
        old.unlink(missing_ok=True)


def keep_best(path: Path, step: int, knn_top1: float) -> None:
    """Keep this checkpoint as ``best.pt`` where its accuracy is above all before; ``best.json`` says which it is."""
    description = path.with_name("best.json")
    if description.exists():
        before = read_json(description, "description of the best checkpoint").get("knn_top1")
        if isinstance(before, float) and before >= knn_top1:
            return
    link(path, path.with_name("best.pt"))
    write_json(description, {"schema": SCHEMA, "step": step, "knn_top1": knn_top1})


def link(source: Path, target: Path) -> None:
    """Give a file a second name, at once; where the file system has no links it is copied."""
    with atomic_file(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def load(path: Path, identity: str) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, nothing in it can run.

    Args:
        path: the file.
        identity: of the run that goes on.

    Raises:
        UserError: it is damaged, or of another run.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"Cannot read the checkpoint '{path}' ({error.strerror or error}): make it readable.") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about a file that is then refused
            state = torch.load(path, map_location="cpu", weights_only=True)
        schema, found = state["schema"], state["identity"]
    except Exception as error:  # a damaged or hostile file may raise anything inside the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The checkpoint '{path}' is damaged ({reason}): remove its run and start again.") from None
    if schema != SCHEMA:
        raise UserError(
            f"The checkpoint '{path}' has the schema {schema!r}, this midge reads {SCHEMA}: go on with the midge that "
            "wrote it, or start a new run."
        )
    if found != identity:
        raise UserError(f"The checkpoint '{path}' is of another run than the config.json beside it: start a new run.")
    return state
