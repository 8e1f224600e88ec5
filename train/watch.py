"""``midge watch``: the curves of a run in the terminal, from its metrics.jsonl (no torch)."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..runtime.errors import UserError
from ..runtime.files import read_json
from ..runtime.printable import printable
from .curves import panels, table
from .metrics_file import Metrics, read_metrics
from .run_folder import RunFolder
from .watch_config import WatchConfig

WIDTH = 100  # where there is no terminal
QUIET_S = 120.0  # without a new line for so long a run may have ended


@dataclass(frozen=True)
class Plan:
    """What a run set out to do, from its config.json; None where that does not say.

    Attributes:
        name: method and backbone.
        epochs: their number.
        batch_size: images per step.
        steps: their number.
    """

    name: str = ""
    epochs: float | None = None
    batch_size: int | None = None
    steps: int | None = None


def watch(config: WatchConfig) -> int:
    """Show a run's curves, again and again until it ends.

    Returns:
        The exit code, 0.

    Raises:
        UserError: there is no such run.
    """
    config.check()
    folder = RunFolder(config.run, "")
    plan = read_plan(config.run)
    if config.json:
        print(json.dumps(read_metrics(folder.metrics).last))
        return 0
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    if not config.once and console.is_terminal and not folder.finished:
        with contextlib.suppress(KeyboardInterrupt):
            watch_live(console, folder, plan, config.every_s)
    console.print(picture(console, folder, plan, None))
    return 0


def watch_live(console: Console, folder: RunFolder, plan: Plan, every_s: float) -> None:
    """Redraw on a screen of its own until the run has finished."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not folder.finished:
            live.update(picture(console, folder, plan, console.height), refresh=True)
            time.sleep(every_s)


def read_plan(run: Path) -> Plan:
    """Read what a run set out to do.

    Raises:
        UserError: the folder is no run.
    """
    if not run.is_dir():
        raise UserError(f"No run at '{run}': give the folder that 'midge pretrain --out' named.")
    description = read_json(run / "config.json", "run configuration")
    config = description.get("config") if isinstance(description, dict) else None
    if not isinstance(config, dict):
        raise UserError(f"'{run / 'config.json'}' is no configuration of a run: give a folder of 'midge pretrain'.")
    epochs, batch_size, images = config.get("epochs"), config.get("batch_size"), description.get("num_images")
    named = (printable(config[key]) for key in ("method", "backbone", "views") if isinstance(config.get(key), str))
    name = ", ".join(named)
    if not (isinstance(epochs, (int, float)) and isinstance(batch_size, int) and isinstance(images, int)):
        return Plan(name)
    if not (0 < epochs <= 1e9 and 0 < batch_size <= images):
        return Plan(name)
    return Plan(name, epochs, batch_size, max(1, round(epochs * (images // batch_size))))


def picture(console: Console, folder: RunFolder, plan: Plan, height: int | None) -> RenderableType:
    """What there is to see now.

    Args:
        console: where it will be shown.
        folder: of the run.
        plan: of the run.
        height: lines that it may take, or None.
    """
    metrics = read_metrics(folder.metrics)
    head = Text("\n".join(headings(folder, plan, metrics)))
    head.stylize("bold", 0, len(str(folder.path)))
    if not metrics.series:
        return head
    if not console.encoding.startswith("utf"):
        return Group(head, table(metrics.series))
    lines = len(head.wrap(console, console.width))
    return Group(head, panels(metrics.series, console.width, None if height is None else height - lines))


def headings(folder: RunFolder, plan: Plan, metrics: Metrics) -> list[str]:
    """Which run it is, and how far it has come."""
    first = f"{folder.path}  {plan.name}"
    if not metrics.last:
        state = "no steps were logged" if folder.finished else "no step is logged yet"
        return [first, state]
    step = metrics.last["step"] + 1
    progress = [f"step {step:,}" + (f" of {plan.steps:,}" if plan.steps else "")]
    if metrics.epoch is not None:
        progress.append(f"epoch {metrics.epoch:g}" + (f" of {plan.epochs:g}" if plan.epochs else ""))
    if folder.finished:
        progress.append("finished")
    else:
        progress += _pace(folder, plan, metrics, step)
    if metrics.damaged:
        progress.append(f"{metrics.damaged} line{'s'[: metrics.damaged != 1]} of metrics.jsonl cannot be read")
    return [first, ", ".join(progress)]


def _pace(folder: RunFolder, plan: Plan, metrics: Metrics, step: int) -> list[str]:
    """How long a run that goes on will take, or that it may have stopped."""
    try:
        quiet_s = time.time() - folder.metrics.stat().st_mtime
    except FileNotFoundError:
        quiet_s = 0.0
    if quiet_s > QUIET_S:
        return [f"nothing new for {duration(quiet_s)}"]
    speed = metrics.series.get("images_per_s", ([], []))[1]
    if not (plan.steps and plan.batch_size and speed and speed[-1] > 0):
        return []
    return [f"about {duration((plan.steps - step) * plan.batch_size / speed[-1])} left"] if plan.steps > step else []


def duration(seconds: float) -> str:
    """Seconds in words of two units at most."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
