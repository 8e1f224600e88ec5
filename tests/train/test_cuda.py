"""What only a CUDA GPU shows: precision, scaling of gradients, views made there, steps that never wait for it."""

import dataclasses
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from midge.train.evaluation_config import KnnConfig
from midge.train.knn import knn
from midge.train.pretrain import pretrain
from midge.train.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

OWN = {
    "dino": {"koleo_weight": 0.1},
    "mocov2": {"queue_size": 16, "key_groups": 1, "head_batch_norm": False},  # the shuffle differs between devices
    "swav": {"queue_size": 16, "queue_start_epochs": 0.5},
}
"""What each method needs besides."""


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def on_gpu(image_folder, tmp_path, tiny):
    """Make a configuration for the GPU: ``on_gpu(name, method, **changes)``."""
    data = image_folder()

    def make(name, method, **changes):
        given = {"device": "cuda", "log_every_steps": 1, "method": method, **OWN[method], **changes}
        return tiny(data, tmp_path / name, **given)

    return make


@pytest.mark.parametrize("method", sorted(OWN))
def test_first_losses_are_those_of_the_cpu(on_gpu, method):
    losses = {}
    for device in ("cpu", "cuda"):
        config = on_gpu(device, method, device=device, view_executor="cpu")
        assert pretrain(config) == 0
        losses[device] = [line["loss"] for line in metrics(config.out)]
    # The network and the views of the first step are the same; convolutions there round to TF32's 10 bits.
    assert losses["cuda"][0] == pytest.approx(losses["cpu"][0], rel=2e-3)
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("method", sorted(OWN))
def test_half_precision_follows_the_full_one(on_gpu, method, precision):
    losses = {}
    for name in ("32-true", precision):
        config = on_gpu(name, method, precision=name)
        assert pretrain(config) == 0
        lines = metrics(config.out)
        losses[name] = [line["loss"] for line in lines]
        assert lines[-1]["gpu_memory_mib"] > 0
    assert np.isfinite(losses[precision]).all()
    rounding = 2**-8 / 0.1  # bfloat16's of a cosine, over the temperature
    assert losses[precision][0] == pytest.approx(losses["32-true"][0], rel=0.02, abs=rounding)


@pytest.mark.parametrize("method", sorted(OWN))
def test_no_step_waits_for_the_gpu(on_gpu, method, monkeypatch):
    """As many synchronizations in a run of 12 steps as in one of 6: none belongs to a step."""
    train = Trainer.train
    # The log and the checkpoints read what is on the GPU; here there are none but at the end.
    monkeypatch.setattr(Trainer, "is_due", lambda self, *every_steps: False)

    def counted(trainer, stop):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                signal = train(trainer, stop)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(
            Counter(
                f"{Path(warning.filename).name}:{warning.lineno}"
                for warning in caught
                if "called a synchronizing CUDA operation" in str(warning.message)
            )
        )
        return signal

    waits = []
    monkeypatch.setattr(Trainer, "train", counted)
    for epochs in (2.0, 4.0):
        assert pretrain(on_gpu(f"{epochs}", method, epochs=epochs, precision="bf16-mixed", workers=1)) == 0
    assert waits[0].total() > 0  # the checkpoint at the end
    assert waits[1] - waits[0] == Counter()


def test_resumed_run_goes_on_where_it_stopped(on_gpu, monkeypatch):
    whole = on_gpu("whole", "dino", drop_path=0.1, epochs=4.0)
    assert pretrain(whole) == 0
    stopped = on_gpu("stopped", "dino", drop_path=0.1, epochs=4.0)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "agreed_signal", lambda self, stop: 15)
        assert pretrain(stopped) == 143
    state = torch.load(stopped.out / "checkpoints/last.pt", weights_only=True)
    assert state["step"] == 1
    assert len(state["cuda_rng"]) == 1
    assert pretrain(dataclasses.replace(stopped, resume=True)) == 0
    losses = [[line["loss"] for line in metrics(run.out)] for run in (whole, stopped)]
    assert len(losses[0]) == len(losses[1]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # cuDNN's sums have no fixed order


def test_knn_is_that_of_the_cpu(labelled_folder, run_folder):
    train, test = labelled_folder("train"), labelled_folder("test", each=20, seed=1)
    found = []
    for device in ("cpu", "cuda"):
        run = run_folder(train, name=device)
        assert knn(KnnConfig(run, test=test, device=device, baselines=False)) == 0
        found.append(json.loads((run / "eval" / "knn.json").read_text())["pretrained"]["top1"])
    assert found[1] == pytest.approx(found[0], abs=0.05)
