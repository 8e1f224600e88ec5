"""The engine: devices, precision, and the processes of one run, started by torchrun or by SLURM."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy

from ..runtime.errors import UserError
from .config import NAMES, PretrainConfig

Result = TypeVar("Result")


def build_fabric(config: PretrainConfig) -> Fabric:
    """The engine of this process, joined with those of the other processes of the run.

    Raises:
        UserError: no such device or precision here.
    """
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = {"auto": True, "cpu": True, **gpus}
    if not available[config.device]:
        usable = ", ".join(name for name in NAMES["device"] if available[name])
        raise UserError(f"--device {config.device}: torch finds no such device here; choose one of {usable}.")
    if config.precision == "16-mixed" and (config.device == "cpu" or not any(gpus.values())):
        raise UserError("--precision 16-mixed needs a GPU: choose bf16-mixed or 32-true.")
    processes, nodes = launched_processes(os.environ)
    strategy: Any = "auto"
    if processes * nodes > 1:
        # Buffers are not broadcast at each forward pass: SyncBN keeps statistics alike, the methods their own state.
        strategy = DDPStrategy(
            timeout=timedelta(seconds=config.rank_timeout_s), broadcast_buffers=False, gradient_as_bucket_view=True
        )
    # Fabric repeats the chosen precision, and asks CUDA's users to give up precision in products: no news, no advice.
    for package in ("fabric", "pytorch"):  # the one that was imported last logs for both
        logging.getLogger(f"lightning.{package}.utilities.rank_zero").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=config.device,
        devices=processes,
        num_nodes=nodes,
        strategy=strategy,
        precision=config.precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


def launched_processes(environment: os._Environ[str] | dict[str, str]) -> tuple[int, int]:
    """Processes per node and nodes of this run, as torchrun or SLURM tells; (1, 1) where neither started it."""
    if "TORCHELASTIC_RUN_ID" in environment:
        processes, world = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
        return processes, world // processes
    # An interactive SLURM shell has these too, but it is one task.
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        nodes = int(environment["SLURM_NNODES"])
        return int(environment["SLURM_NTASKS"]) // nodes, nodes
    return 1, 1


def on_first_rank(fabric: Fabric, function: Callable[[], Result]) -> Result:
    """Call a function in the first process alone and give its result, or its error, to all.

    Args:
        fabric: the engine.
        function: without arguments; its result can be pickled.

    Raises:
        UserError: what the function raised, in every process: none waits for one that has ended.
    """
    outcome: tuple[Result | None, str | None] = (None, None)
    if fabric.is_global_zero:
        try:
            outcome = function(), None
        except UserError as error:
            outcome = None, str(error)
        except OSError as error:
            if fabric.world_size == 1:
                raise
            outcome = None, f"'{error.filename}': {error.strerror}."
    result, message = fabric.broadcast(outcome) if fabric.world_size > 1 else outcome
    if message is not None:
        raise UserError(message)
    return result  # type: ignore[return-value]


def lost_process(error: RuntimeError) -> UserError | None:
    """The error to show where another process of the run has gone, or None where ``error`` is something else."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset", "Timed out", "timed out", "Broken pipe", "NCCL", "gloo")
    if not any(sign in text for sign in signs):
        return None
    return UserError(
        f"Another process of this run has ended or does not answer ({text.splitlines()[0][:200]}): look at what it "
        "said; the run goes on from its last checkpoint with --resume."
    )
