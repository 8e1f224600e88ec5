"""``midge pretrain`` killed, stopped by signals and resumed: real processes, real signals, equal bytes."""

import dataclasses
import json
import os
import signal
import threading
import time

import pytest
import torch

from midge.runtime.errors import UserError
from midge.train.pretrain import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    return (run / "backbone.safetensors").read_bytes()


# 36 steps, most of which the kill leaves undone; the drop path draws from torch's generator.
LONG = {"epochs": 12.0, "drop_path": 0.1}


def kill_after_the_first_checkpoint(warm, config, tmp_path):
    """Run in another process and kill it, mid-step as it happens."""
    script = tmp_path / "run.py"
    script.write_text(
        "import pathlib, torch; torch.set_num_threads(1)\n"
        "from midge.train.config import PretrainConfig; from midge.train.pretrain import pretrain\n"
        f"from pathlib import PosixPath\npretrain({config!r})\n"
    )
    process = warm.start(script)
    try:
        wait_for(config.out / "checkpoints" / "last.pt")
        time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def wait_for(path, timeout_s=60.0):
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.005)


OWN = {
    "dino": {"koleo_weight": 0.1},
    "mocov2": {"queue_size": 20, "key_groups": 2},
    "swav": {"queue_size": 20, "queue_start_epochs": 0.5},
}
"""What each method needs besides; the queues are no multiples of the batch of 8."""


@pytest.mark.parametrize("method", sorted(OWN))
def test_killed_and_resumed_equals_uninterrupted(image_folder, tmp_path, capsys, method, tiny, warm):
    data, changes = image_folder(), {**LONG, "method": method, **OWN[method]}
    whole, killed = tiny(data, tmp_path / "whole", **changes), tiny(data, tmp_path / "killed", workers=1, **changes)
    kill_after_the_first_checkpoint(warm, killed, tmp_path)
    assert not (killed.out / "backbone.safetensors").exists()
    assert pretrain(dataclasses.replace(killed, resume=True)) == 0
    assert "Resumed after step" in capsys.readouterr().err
    assert pretrain(whole) == 0
    assert weights(whole.out) == weights(killed.out)
    steps = [line["step"] for line in metrics(killed.out)]
    assert steps == sorted(set(steps)) == [line["step"] for line in metrics(whole.out)]
    assert [line["loss"] for line in metrics(whole.out)] == [line["loss"] for line in metrics(killed.out)]
    states = [torch.load(run.out / "checkpoints/last.pt", weights_only=True) for run in (whole, killed)]
    assert all(torch.equal(value, states[1]["method"][name]) for name, value in states[0]["method"].items())
    assert torch.equal(states[0]["rng"], states[1]["rng"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(image_folder, tmp_path, capsys, number, code, tiny):
    config = tiny(image_folder(), tmp_path / "run", epochs=300.0, workers=1)

    def send():
        wait_for(config.out / "checkpoints" / "last.pt")
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    sender = threading.Thread(target=send)
    sender.start()
    assert pretrain(config) == code
    sender.join()
    assert signal.getsignal(number) is handler
    assert "with --resume goes on from there" in capsys.readouterr().err
    assert not (config.out / "backbone.json").exists()
    description = json.loads((config.out / "config.json").read_text())
    assert description["config"]["epochs"] == 300
    done = torch.load(config.out / "checkpoints/last.pt", weights_only=True)["step"]
    assert metrics(config.out)[-1]["step"] == done - 1


def test_finished_run_has_nothing_to_resume(image_folder, tmp_path, capsys, tiny):
    config = tiny(image_folder(), tmp_path / "run", epochs=1.0)
    assert pretrain(config) == 0
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    capsys.readouterr()
    assert pretrain(dataclasses.replace(config, resume=True, json=True)) == 0
    printed = capsys.readouterr()
    assert "is finished" in printed.err
    assert json.loads(printed.out)["epoch"] == 1
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before
    with pytest.raises(UserError, match="holds a run already"):
        pretrain(config)
    with pytest.raises(UserError, match=r"epochs 1\.0 there and 2\.0 now"):
        pretrain(dataclasses.replace(config, resume=True, epochs=2.0))


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"method": "mocov2", "queue_size": 16}, "method 'dino' there and 'mocov2' now"),
        ({"backbone": "resnet34"}, "backbone 'resnet18' there and 'resnet34' now"),
        ({"views": "baseline"}, "views 'lowcompute' there and 'baseline' now"),
    ],
)
def test_a_run_of_another_kind_is_not_resumed(image_folder, tmp_path, changes, differs, tiny):
    config = tiny(image_folder(), tmp_path / "run", epochs=0.4)
    assert pretrain(config) == 0
    with pytest.raises(UserError, match=differs):
        pretrain(dataclasses.replace(config, resume=True, **changes))


def test_killed_before_the_export(image_folder, tmp_path, tiny):
    config = tiny(image_folder(), tmp_path / "run", epochs=1.0, workers=1)
    assert pretrain(config) == 0
    expected = weights(config.out)
    (config.out / "backbone.json").unlink()
    (config.out / "backbone.safetensors").write_bytes(b"half")
    assert pretrain(dataclasses.replace(config, resume=True)) == 0
    assert weights(config.out) == expected


def test_device_executor_repeats_resumes_and_is_not_mixed_with_the_other(image_folder, tmp_path, tiny, warm):
    data = image_folder()
    for name, workers in (("a", 0), ("b", 1)):
        assert pretrain(tiny(data, tmp_path / name, epochs=1.0, workers=workers, view_executor="device")) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    killed = tiny(data, tmp_path / "killed", workers=1, view_executor="device", epochs=12.0)
    kill_after_the_first_checkpoint(warm, killed, tmp_path)
    with pytest.raises(UserError, match="view_executor 'device' there and 'cpu' now"):
        pretrain(dataclasses.replace(killed, resume=True, view_executor="cpu"))
    assert pretrain(dataclasses.replace(killed, resume=True)) == 0
    assert pretrain(tiny(data, tmp_path / "whole", view_executor="device", epochs=12.0)) == 0
    assert weights(killed.out) == weights(tmp_path / "whole")
