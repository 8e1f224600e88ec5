"""Run jobs in fresh processes on this machine, and leave none behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from ..runtime.errors import UserError
from ..runtime.printable import printable

Json = dict[str, Any]


class Children:
    """The agent's processes on this machine; leaving the context kills those that still run.

    Jobs may be run from several threads.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._closed = True
            left = list(self._running)
        for process in left:
            process.kill()
            process.wait()

    def run(self, job: Json, what: str) -> Json:
        """Run one job in a fresh process.

        Args:
            job: what :mod:`.agent` takes.
            what: what is measured, for errors, e.g. ``"onnx-fp32 (1 thread)"``.

        Returns:
            The result.

        Raises:
            UserError: the child could not do the job, or died.
        """
        process = self._start()
        try:
            answer, log = process.communicate(json.dumps({**job, "parent": os.getpid()}).encode())
        finally:
            with self._lock:
                process.kill()  # nothing where it has ended
                process.wait()
                self._running.discard(process)
        return read_answer(answer, log.decode(errors="replace"), process.returncode, what)

    def _start(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise UserError("The measurement was stopped.")
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.agent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which ends its children in order
            )
            self._running.add(process)
            return process


# Where to measure -> what runs the jobs there.
TRANSPORTS: dict[str, Callable[[], Children]] = {"local": Children}


def read_answer(answer: bytes, log: str, code: int, what: str) -> Json:
    """The result in a child's answer.

    Args:
        answer: its stdout.
        log: its stderr.
        code: its exit status; negative where a signal ended it.
        what: what was measured, for errors.

    Raises:
        UserError: it holds an error, or there is no answer.
    """
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "most often the memory did not suffice: free some" if -code == signal.SIGKILL else "its runtime crashed"
        raise UserError(f"The measurement of {what} was ended by {name}; {hint}, or leave it out with --variants.")
    try:
        value = json.loads(answer)
    except ValueError:
        value = None
    if isinstance(value, dict) and isinstance(value.get("result"), dict) and code == 0:
        return value["result"]
    if os.environ.get("MIDGE_TRACEBACK"):
        print(log, file=sys.stderr)
    if isinstance(value, dict) and isinstance(value.get("error"), str):
        reason = value["error"]
    else:
        lines = log.strip().splitlines()
        reason = f"its process ended with code {code} ({lines[-1][:300] if lines else 'it said nothing'})"
    raise UserError(f"The measurement of {what} failed: {printable(reason, None)}")
