"""``midge watch`` as a user calls it: to a pipe, and in a terminal of its own (a pseudo-terminal)."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from midge.__main__ import main
from midge.train.watch import duration

CONFIG = {"method": "dino", "backbone": "resnet18", "views": "auto", "epochs": 2.0, "batch_size": 8}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has logged 4 of 20 steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"schema": 1, "num_images": 80, "config": CONFIG}))
    append(folder, *range(4))
    return folder


def append(run: Path, *steps: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            line = {"step": step, "epoch": (step + 1) / 10, "loss": 9.0 - step, "images_per_s": 1.0}
            file.write(json.dumps(line) + "\n")


def finish(run: Path) -> None:
    for name in ("backbone.safetensors", "backbone.json"):
        (run / name).write_text("{}")


def test_without_a_terminal_it_prints_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run)]) == 0
    text = capsys.readouterr().out
    assert "dino, resnet18, auto" in text
    assert "step 4 of 20, epoch 0.4 of 2, about 2 min left" in text  # 16 steps of 8 images at 1 image/s
    assert "loss 6" in text and "images/s 1" in text
    assert "\x1b" not in text


def test_a_finished_run_and_damaged_lines_are_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('damaged\n{"step": 4, "lo')
    assert main(["watch", str(run), "--once"]) == 0
    assert "finished, 1 line of metrics.jsonl cannot be read" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_is_silent_is_said_to_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    then = time.time() - 7200
    os.utime(run / "metrics.jsonl", (then, then))
    assert main(["watch", str(run)]) == 0
    assert "nothing new for 2 h 0 min" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "", '{"step": 0, "lo'])
def test_a_run_without_a_line(run: Path, capsys: pytest.CaptureFixture[str], content: str | None) -> None:
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    assert main(["watch", str(run)]) == 0
    assert "no step is logged yet" in capsys.readouterr().out
    assert main(["watch", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {}


def test_json_is_the_last_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": 3, "epoch": 0.4, "loss": 6.0, "images_per_s": 1.0}


@pytest.mark.parametrize("config", ["[]", '{"config": 3}', '{"config": {}}', '{"config": {"epochs": "x"}}'])
def test_a_configuration_that_says_little(run: Path, capsys: pytest.CaptureFixture[str], config: str) -> None:
    (run / "config.json").write_text(config)
    code = main(["watch", str(run)])
    said = capsys.readouterr()
    if config in ("[]", '{"config": 3}'):
        assert code == 2 and "is no configuration of a run" in said.err
    else:
        assert code == 0 and "step 4, epoch 0.4" in said.out


def test_control_characters_of_a_configuration_do_not_reach_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.json").write_text(json.dumps({"config": {"method": "\x1b[2Jdino"}}))
    assert main(["watch", str(run)]) == 0
    assert "?[2Jdino" in capsys.readouterr().out


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "absent")]) == 2
    assert "No run at" in capsys.readouterr().err
    assert main(["watch", str(tmp_path)]) == 2
    assert "No run configuration at" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--every-s", "0"]) == 2
    assert "--every-s is 0" in capsys.readouterr().err


def test_where_there_is_no_braille_there_is_a_table(run: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:replace"}
    command = [sys.executable, "-m", "midge", "watch", str(run)]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    text = done.stdout.decode("ascii")
    assert "loss" in text and "lowest" in text and "?" not in text


@pytest.fixture
def terminal(run: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """``midge watch`` in a pseudo-terminal of 100 x 30."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    command = [sys.executable, "-m", "midge", "watch", str(run), "--every-s", "0.2"]
    process = subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background has it ignored
    )
    os.close(follower)
    yield process, leader
    if process.poll() is None:
        process.kill()
    process.wait()
    os.close(leader)


def seen(leader: int, wanted: str, seconds: float = 60) -> str:
    """What the terminal has been sent, once ``wanted`` is in it."""
    text, end = "", time.monotonic() + seconds
    os.set_blocking(leader, False)
    while wanted not in text:
        assert time.monotonic() < end, text
        try:
            text += os.read(leader, 1 << 16).decode("utf-8", errors="replace")
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # Linux: the other end is closed
            assert wanted in text, text
    return text


def rest(leader: int) -> str:
    """What a terminal that is done has still to say."""
    text = b""
    with contextlib.suppress(OSError):  # nothing more, or on Linux the other end is closed
        while part := os.read(leader, 1 << 16):
            text += part
    return text.decode("utf-8", errors="replace")


def test_in_a_terminal_it_follows_the_run_to_its_end(run: Path, terminal: tuple[subprocess.Popen[bytes], int]) -> None:
    process, leader = terminal
    assert "\x1b[?1049h" in seen(leader, "step 4 of 20")  # a screen of its own
    append(run, *range(4, 20))
    seen(leader, "step 20 of 20")
    finish(run)
    text = seen(leader, "finished")
    assert "\x1b[?1049l" in text[: text.index("finished")]
    assert process.wait(60) == 0


def test_ctrl_c_leaves_the_last_picture(terminal: tuple[subprocess.Popen[bytes], int]) -> None:
    process, leader = terminal
    seen(leader, "step 4 of 20")
    process.send_signal(signal.SIGINT)
    text = seen(leader, "\x1b[?1049l")
    assert process.wait(60) == 0
    left = text.partition("\x1b[?1049l")[2] + rest(leader)
    assert "step 4 of 20" in left and "images/s" in left and "Traceback" not in left


@pytest.mark.parametrize(("seconds", "words"), [(5, "5 s"), (90, "2 min"), (3600, "1 h 0 min"), (200_000, "2 d 7 h")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_watching_needs_no_torch(run: Path) -> None:
    code = (
        "import sys\nfrom midge.__main__ import main\n"
        f"assert main(['watch', {str(run)!r}]) == 0\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
