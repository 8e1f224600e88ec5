"""Progress on long work: a bar in a terminal, a plain log line now and then elsewhere. All of it goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)

Item = TypeVar("Item")

LOG_EVERY_S = 10.0


class Bar:
    """A progress display that is also a context manager.

    In a terminal it is a rich bar. Elsewhere it prints at most one line every 10 s, and one at the end when the work
    took longer than 2 s, so that a log stays short.

    Args:
        description: what is being done.
        total: number of steps, where it is known.
        quiet: show nothing: of several processes one speaks.
    """

    def __init__(self, description: str, total: int | None = None, quiet: bool = False) -> None:
        self.description = description
        self.quiet = quiet
        self.total = total
        self.done = 0
        self.note = ""
        self._started = self._logged = time.monotonic()
        self._done_logged = -1
        self._rich: Progress | None = None
        if console.is_terminal and not quiet:
            self._rich = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=console,
                transient=False,
            )
            self._task = self._rich.add_task(description, total=total, note="")

    def __enter__(self) -> Bar:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._rich:
            self._rich.stop()
        elif time.monotonic() - self._started > 2 and self._done_logged != self.done:
            self._log()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Count ``steps`` more; ``note`` (loss, images/s, …) is shown behind the bar."""
        self.done += steps
        if note is not None:
            self.note = note
        if self._rich:
            self._rich.update(self._task, advance=steps, note=self.note)
        elif time.monotonic() - self._logged > LOG_EVERY_S:
            self._log()

    def _log(self) -> None:
        if self.quiet:
            return
        self._logged = time.monotonic()
        self._done_logged = self.done
        of = f"/{self.total}" if self.total is not None else ""
        seconds = self._logged - self._started
        line = f"{self.description}: {self.done}{of} in {seconds:.0f} s {self.note}"
        print(line.rstrip(), file=sys.stderr, flush=True)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate over ``items`` with a :class:`Bar`."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Bar(description, total) as bar:
        for item in items:
            yield item
            bar.advance()


def say(message: str) -> None:
    """One line for the person who watches, on stderr."""
    console.print(message, markup=False, soft_wrap=True)
