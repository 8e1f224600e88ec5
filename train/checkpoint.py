"""Checkpoints: everything a run needs to go on as if it had never stopped, complete on disk or not there at all."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.errors import UserError
from ..runtime.files import atomic_file

SCHEMA = 1


def capture(
    step: int, identity: str, method: nn.Module, optimizer: torch.optim.Optimizer, precision: dict[str, Any]
) -> dict[str, Any]:
    """The state of a run after ``step`` steps.

    The views need none: they are functions of the step. The generators are for what the networks draw (drop path).

    Args:
        step: number of steps done.
        identity: of the run, see :class:`~midge.train.run_folder.RunFolder`.
        method: networks, heads, centre, queues: all its parameters and buffers.
        optimizer: its momenta.
        precision: state of the loss scaling, empty where there is none.
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "schema": SCHEMA,
        "identity": identity,
        "step": step,
        "method": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "precision": precision,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if cuda else None,
    }


def restore(state: dict[str, Any], method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the state of :func:`capture` back; ``state["step"]`` and ``state["precision"]`` are the caller's."""
    method.load_state_dict(state["method"], strict=True)
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])


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


def load(path: Path, identity: str) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain values only, nothing in it can run.

    Args:
        path: the file.
        identity: of the run that goes on.

    Raises:
        UserError: it is damaged, or of another run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about a file that is then refused
            state = torch.load(path, map_location="cpu", weights_only=True)
        schema, found = state["schema"], state["identity"]
    except Exception as error:  # a damaged or hostile file may raise anything inside the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The checkpoint '{path}' is damaged ({reason}): remove its run and start again.") from None
    if schema != SCHEMA or found != identity:
        raise UserError(f"The checkpoint '{path}' is of another run than the config.json beside it: start a new run.")
    return state
