"""What a process does about itself: end with its parent, keep to or off some cores, tell its peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..runtime.errors import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent ends, however that happens; stop where it has ended already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise UserError("The process that gave the job has ended.")


def pin(cpus: tuple[int, ...]) -> None:
    """Keep this process on the given cores, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            raise UserError(f"Cannot pin to the cores {list(cpus)}: {error.strerror}.") from None


@contextlib.contextmanager
def keep_off(cpus: Iterable[int]) -> Iterator[None]:
    """Keep this process off the cores on which others are measured, where it can go elsewhere and be moved at all."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before.difference(cpus) or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def peak_rss_mib() -> float | None:
    """The largest resident memory of this process so far, MiB."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    if sys.platform == "darwin":
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes there
    return None
