from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from midge.profiles.child import Children, read_answer
from midge.runtime.errors import UserError


@pytest.mark.parametrize(
    ("answer", "log", "code", "message"),
    [
        (b'{"error": "no such variant"}', "", 2, "The measurement of x failed: no such variant"),
        (b'{"error": "two\\nlines\\u001b[2J"}', "", 2, r"failed: two\?lines\?\[2J"),
        (b"", "Traceback\nImportError: no numpy\n", 1, r"ended with code 1 \(ImportError: no numpy\)"),
        (b"", "", 3, r"ended with code 3 \(it said nothing\)"),
        (b"[1]", "", 0, "ended with code 0"),
        (b'{"result": 5}', "", 0, "ended with code 0"),
        (b'{"result": {}}', "", 1, "ended with code 1"),
        (b"", "", -signal.SIGKILL, "x was ended by SIGKILL; most often the memory did not suffice"),
        (b'{"result": {}}', "", -signal.SIGSEGV, "ended by SIGSEGV; its runtime crashed"),
        (b"", "", -60, "ended by signal 60|ended by SIGRT"),
    ],
)
def test_every_bad_end_is_one_line(answer: bytes, log: str, code: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_answer(answer, log, code, "x")
    assert str(error.value).isprintable()


def test_a_good_answer() -> None:
    assert read_answer(b'{"result": {"a": 1}}\n', "noise", 0, "x") == {"a": 1}


def test_a_job_that_cannot_be_done_names_what_was_measured() -> None:
    with Children() as children, pytest.raises(UserError, match="The measurement of onnx-fp32 failed: The job has no"):
        children.run({"schema": 1}, "onnx-fp32")


def test_leaving_ends_what_still_runs_and_lets_nothing_start() -> None:
    caught: list[BaseException] = []
    children = Children()

    def run() -> None:
        try:
            children.run({}, "x")
        except UserError as error:
            caught.append(error)

    with children:
        process = children._start()
        assert process.poll() is None
    assert process.wait(timeout=10) == -signal.SIGKILL
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "was stopped" in str(caught[0])


@pytest.fixture
def running(tiny_artifact: Path, colour_images: Path, tmp_path: Path) -> Iterator[tuple[Any, Callable[[], list[int]]]]:
    """``midge profile`` at work in its rounds, and a function that lists its child processes."""
    (tmp_path / "tmp").mkdir()
    command = ["profile", tiny_artifact, "--data", colour_images, "--out", tmp_path / "records"]
    process = subprocess.Popen(
        [sys.executable, "-m", "midge", *map(str, command), "--protocol", "rigorous", "--variants", "onnx-fp32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        # A shell's background jobs ignore Ctrl-C, and so would this one, were the tests run in such a job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def children() -> list[int]:
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        return [int(child) for child in path.read_text().split()]

    deadline = time.monotonic() + 30
    while not (measures_latency(tmp_path / "tmp") and children()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    yield process, children
    process.kill()
    process.communicate()


def measures_latency(folder: Path) -> bool:
    """Whether the input of the latency has been written (that of the accuracy has another name)."""
    return any(folder.rglob("0.npy"))


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "State:\tZ" in status.read_text()


def test_a_killed_child_is_one_line_and_leaves_nothing(running: Any, tmp_path: Path) -> None:
    process, children = running
    os.kill(children()[0], signal.SIGKILL)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and output == ""
    lines = [line for line in errors.splitlines() if line.startswith("midge: error: ")]
    assert len(lines) == 1 and "Traceback" not in errors
    assert "onnx-fp32 of tiny (1 thread) was ended by SIGKILL" in lines[0] and "memory" in lines[0]
    assert not (tmp_path / "records").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_child_and_no_record(running: Any, tmp_path: Path, number: int) -> None:
    process, children = running
    pids = children()
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and output == ""
    assert errors.strip().splitlines()[-1] == "midge: interrupted."
    wait_for(lambda: all(gone(pid) for pid in pids), 10)
    assert not (tmp_path / "records").exists()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_agent_answers_on_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "midge.profiles.agent"], input="{}", capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "no field 'schema'" in json.loads(done.stdout)["error"]
