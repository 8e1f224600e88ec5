"""Several processes of one run, on gloo: the same result as one, and an end with an error where one of them dies."""

import dataclasses
import json
import signal
import socket
import time

import pytest
import torch

from midge.runtime.torch_model import load_model
from midge.train.engine import launched_processes, lost_process
from midge.train.recipes import dino_vit, moco_vit, swav_vit

RECIPES = {"dino": dino_vit, "mocov2": moco_vit, "swav": swav_vit}

# A network without batch statistics, of which gloo has no synchronized form; no drop path, which each process draws for
# itself; LARS, since AdamW makes a full update of what rounding leaves where a gradient is zero (a key's bias); and a
# rate at which weights stay so small that float32 tells them apart by less than the bounds (at 4.8 a bias becomes 422).
TINY = {
    "fit_to_data": False,
    "backbone": "vit_tiny_patch16_224",
    "image_px": 32,
    "patch_px": 16,
    "drop_path": 0.0,
    "num_local": 2,
    "epochs": 1.0,
    "batch_size": 8,
    "head_hidden": 16,
    "head_bottleneck": 8,
    "head_outputs": 32,
    "head_batch_norm": False,
    "optimizer": "lars",
    "base_lr": 1.2,
    "weight_decay": 1e-6,
    "weight_decay_end": 1e-6,
    "warmup_epochs": 0.0,
    "freeze_last_layer_epochs": 0.3,
    "queue_start_epochs": 0.0,
    "teacher_momentum": 0.9,
    "workers": 0,
    "device": "cpu",
    "checkpoint_every_steps": 2,
    "log_every_steps": 1,
}
QUEUES = {"dino": 0, "mocov2": 24, "swav": 16}


def tiny(method, data, out, **changes):
    return RECIPES[method](data, out, **{**TINY, "queue_size": QUEUES[method], **changes})


def start(warm, config, tmp_path, processes):
    """Start the processes of a run as torchrun would, one by one, so that a test can end one of them."""
    script = tmp_path / f"run-{config.out.name}.py"
    script.write_text(
        "import sys, torch; torch.set_num_threads(1)\nfrom pathlib import PosixPath\n"
        "from midge.__main__ import main\nimport midge.__main__ as cli\n"
        "from midge.train.config import PretrainConfig\nfrom midge.train.pretrain import pretrain\n"
        f"config = {config!r}\n"
        "cli.dispatch = lambda argv: pretrain(config)\n"  # with main's handling of errors around it
        "sys.exit(main(['pretrain']))\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": "1",
    }
    return [warm.start(script, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]


def finish(processes, timeout_s=180):
    """Exit codes and what each said."""
    said = [process.communicate(timeout_s)[1] for process in processes]
    return [process.returncode for process in processes], said


def run(warm, config, tmp_path, processes):
    codes, said = finish(start(warm, config, tmp_path, processes))
    assert codes == [0] * processes, "\n".join(said)
    return said


def losses(config):
    return [json.loads(line)["loss"] for line in (config.out / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a, b, atol=1e-5):
    assert losses(a) == pytest.approx(losses(b), abs=atol)
    assert len(losses(a)) == 3
    one, two = (load_model(config.out, "backbone")[0].state_dict() for config in (a, b))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=atol, msg=name)
    states = [torch.load(config.out / "checkpoints/last.pt", weights_only=True)["method"] for config in (a, b)]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=10 * atol, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(RECIPES))
def test_two_processes_equal_one(image_folder, tmp_path, warm, method):
    data = image_folder(24)
    one, two = tiny(method, data, tmp_path / "one"), tiny(method, data, tmp_path / "two")
    run(warm, one, tmp_path, 1)
    said = run(warm, two, tmp_path, 2)
    assert_same_run(one, two)
    assert said[1].count("Pretraining") == 0  # one of them speaks


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "mocov2"])  # SwAV assigns a portion at a time
def test_portions_of_a_step_equal_the_step(image_folder, tmp_path, warm, method):
    data = image_folder(24)
    whole, portions = tiny(method, data, tmp_path / "whole"), tiny(method, data, tmp_path / "portions", accumulate=2)
    run(warm, whole, tmp_path, 1)
    run(warm, portions, tmp_path, 1)
    assert_same_run(whole, portions)


@pytest.mark.slow
def test_resuming_with_another_number_of_processes_says_what_is_not_the_same(image_folder, tmp_path, warm):
    data = image_folder(24)
    whole = tiny("swav", data, tmp_path / "whole")
    run(warm, whole, tmp_path, 1)
    # Back to the checkpoint in the middle: as if it had been stopped there.
    partial = tiny("swav", data, tmp_path / "partial", keep_checkpoints=3)
    run(warm, partial, tmp_path, 2)
    for name in ("backbone.json", "backbone.safetensors"):
        (partial.out / name).unlink()
    (partial.out / "checkpoints/step-00000002.pt").replace(partial.out / "checkpoints/last.pt")
    said = run(warm, dataclasses.replace(partial, resume=True), tmp_path, 1)
    assert "saved by 2 processes and goes on with 1" in said[0]
    assert_same_run(whole, partial)


@pytest.mark.slow
def test_when_a_process_dies_the_others_end_with_an_error(image_folder, tmp_path, warm):
    config = tiny("dino", image_folder(24), tmp_path / "run", epochs=500.0, rank_timeout_s=20.0)
    processes = start(warm, config, tmp_path, 2)
    end = time.monotonic() + 120
    while not (config.out / "checkpoints/last.pt").exists():
        assert time.monotonic() < end and processes[0].poll() is None, processes[0].communicate()[1]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, said = finish(processes, timeout_s=60)
    assert time.monotonic() - began < 40
    assert codes == [2, -signal.SIGKILL], said[0]
    assert "Another process of this run has ended" in said[0] and "--resume" in said[0]
    assert "Traceback" not in said[0]
    assert torch.load(config.out / "checkpoints/last.pt", weights_only=True)["step"] >= 2


@pytest.mark.slow
def test_a_signal_to_all_stops_all_at_the_same_step(image_folder, tmp_path, warm):
    config = tiny("mocov2", image_folder(24), tmp_path / "run", epochs=500.0)
    processes = start(warm, config, tmp_path, 2)
    end = time.monotonic() + 120
    while not (config.out / "checkpoints/last.pt").exists():
        assert time.monotonic() < end and processes[0].poll() is None, processes[0].communicate()[1]
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGTERM)  # one alone is enough
    codes, said = finish(processes)
    assert codes == [143, 143], said
    assert "goes on from there" in said[0]


@pytest.mark.slow
def test_a_mistake_ends_all_processes(image_folder, tmp_path, warm):
    config = tiny("dino", image_folder(24), tmp_path / "run")
    config.out.mkdir()
    (config.out / "mine.txt").write_text("mine")
    codes, said = finish(start(warm, config, tmp_path, 2))
    assert codes == [2, 2]
    assert all("exists already" in text for text in said)


def test_launched_processes():
    assert launched_processes({}) == (1, 1)
    elastic = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert launched_processes(elastic) == (4, 2)
    slurm = {"SLURM_NTASKS": "6", "SLURM_NNODES": "3", "SLURM_PROCID": "0"}
    assert launched_processes(slurm) == (2, 3)
    assert launched_processes({"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0"}) == (1, 1)


def test_other_errors_are_not_taken_for_a_lost_process():
    assert lost_process(RuntimeError("shapes cannot be multiplied")) is None
    assert "--resume" in str(lost_process(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234")))
