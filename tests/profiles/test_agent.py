"""The agent in real processes, with the real ONNX Runtime."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from midge.profiles.agent import MAX_JOB_BYTES, import_runtime, placement_json, work
from midge.profiles.process import peak_rss_mib
from midge.runtime.backend import Placement
from midge.runtime.errors import UserError
from midge.runtime.files import sha256_file
from midge.runtime.golden import load_golden
from midge.runtime.preprocess import Preprocess

Json = dict[str, Any]

COMMAND = [sys.executable, "-m", "midge.profiles.agent"]
PLAN = {"min_runs": 20, "min_s": 0.0, "warmup_min_runs": 3, "warmup_min_s": 0.0, "warmup_max_s": 0.1}


def job_of(artifact: Path, inputs: Path, **changes: Any) -> Json:
    return {
        "schema": 1,
        "task": "latency",
        "artifact": str(artifact),
        "manifest_sha256": sha256_file(artifact / "manifest.json"),
        "variant": "onnx-int8-u8",
        "threads": 1,
        "cpus": [min(os.sched_getaffinity(0))],
        "inputs": str(inputs),
        "plan": PLAN,
        "images": [],
        "checks": True,
        **changes,
    }


@pytest.fixture
def inputs(tmp_path: Path, tiny_artifact: Path) -> Path:
    np.save(tmp_path / "inputs.npy", load_golden(tiny_artifact / "golden.npz", (1, 3, 16, 16), (1, 3)).inputs)
    return tmp_path / "inputs.npy"


def run_agent(job: object) -> subprocess.CompletedProcess[str]:
    text = job if isinstance(job, str) else json.dumps(job)
    return subprocess.run(COMMAND, input=text, capture_output=True, text=True, check=False)


def test_a_latency_job(tiny_artifact: Path, inputs: Path, colour_images: Path) -> None:
    images = [str(path) for path in sorted(colour_images.rglob("*.png"))[:4]]
    done = run_agent(job_of(tiny_artifact, inputs, images=images))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["result"]
    assert len(result["samples_ms"]) == 20 and min(result["samples_ms"]) > 0
    assert result["runtime_version"] == onnxruntime.__version__
    for key in ("import_ms", "load_ms", "first_inference_ms"):
        assert result[key] > 0
    assert result["import_ms"] > min(result["samples_ms"])
    assert result["warmup"]["runs"] >= 3
    assert 20 < result["peak_rss_mib"] < 500
    assert len(result["preprocess_ms"]) == 8 and min(result["preprocess_ms"]) > 0
    assert result["parity"]["n"] == 24 and 0.99 < result["parity"]["cosine_min"] < 1
    placement = result["placement"]
    assert placement["total_macs"] == 16 * 16 * 81 and placement["int8_mac_share"] == 1.0
    assert placement["ops"]["QLinearConv"] == 1 and placement["reason"] is None
    assert [set(reading) for reading in result["sensors"]] == [set(result["sensors"][0])] * 2


def test_an_accuracy_job_gives_what_the_runtime_gives(tiny_artifact: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    done = run_agent(job_of(tiny_artifact, tmp_path / "images.npy", task="accuracy", variant="onnx-fp32"))
    assert done.returncode == 0, done.stderr
    session: Any = onnxruntime.InferenceSession(tiny_artifact / "onnx-fp32" / "model.onnx")
    preprocess = Preprocess(16, 16)
    outputs = [session.run(None, {"image": preprocess(image)[None]})[0] for image in images]
    assert json.loads(done.stdout)["result"]["predictions"] == [int(np.argmax(each)) for each in outputs]


def test_what_a_runtime_prints_does_not_reach_the_answer(tiny_artifact: Path, inputs: Path) -> None:
    code = (
        "import os, sys\nfrom midge.profiles import agent\n"
        "task = agent.measure_latency\n"
        "def noisy(*args):\n    print('from Python', flush=True)\n    os.write(1, b'from native code\\n')\n"
        "    return task(*args)\n"
        "agent.TASKS['latency'] = noisy\nsys.exit(agent.main())"
    )
    job = json.dumps(job_of(tiny_artifact, inputs, checks=False))
    done = subprocess.run([sys.executable, "-c", code], input=job, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and json.loads(done.stdout)["result"]["samples_ms"]
    assert "from Python" in done.stderr and "from native code" in done.stderr


def test_it_is_pinned_and_imports_no_other_runtime(tiny_artifact: Path, inputs: Path) -> None:
    code = (
        "import os, sys\nfrom midge.profiles import agent\n"
        "result = agent.work(sys.stdin.buffer.read())\n"
        "print(sorted(os.sched_getaffinity(0)), [m for m in ('torch', 'openvino', 'rich', 'onnx') if m in sys.modules])"
    )
    job = job_of(tiny_artifact, inputs, checks=False)
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{job['cpus']} []"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "install a newer midge"),
        ({"task": "shell"}, "must be one of accuracy, latency"),
        ({"threads": 0}, "an integer in 1..1024"),
        ({"threads": "1"}, "an integer in 1..1024"),
        ({"cpus": [99_999]}, "integers in 0..65535"),
        ({"cpus": [65_000]}, "Cannot pin to the cores"),
        ({"cpus": []}, "a list of 1 integers"),
        ({"artifact": "/nowhere"}, "No artifact at '/nowhere'"),
        ({"artifact": 5}, "a string"),
        ({"manifest_sha256": "0" * 64}, "its manifest was changed"),
        ({"variant": "onnx-int4"}, "Unknown variant 'onnx-int4'"),
        ({"variant": "../x"}, "Unknown variant '../x'"),
        ({"inputs": "/etc/passwd"}, "cannot be read"),
        ({"inputs": "/nowhere.npy"}, "cannot be read"),
        ({"plan": {**PLAN, "min_runs": 10**12}}, "'min_runs'"),
        ({"plan": None}, "a JSON object"),
        ({"images": "x"}, "strings"),
        ({"images": ["/nowhere.png"]}, "Cannot read the image '/nowhere.png'"),
    ],
)
def test_hostile_jobs_are_one_line(
    tiny_artifact: Path, inputs: Path, changes: Json, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tiny_artifact, inputs, cpus=None) | changes
    with pytest.raises(UserError, match=message) as error:
        work(json.dumps(job).encode())
    assert "\n" not in str(error.value)


def test_what_is_no_job() -> None:
    for text in (b"", b"[]", b"{", b"null", b"\xff", b"[" * 10**5, b"{" * MAX_JOB_BYTES + b"{"):
        with pytest.raises(UserError):
            work(text)
    done = run_agent("nonsense")
    assert done.returncode == 2
    assert json.loads(done.stdout) == {"error": "The job is not valid JSON: give one JSON object on stdin."}


def test_inputs_of_another_form_are_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    arrays = {
        "float64": np.zeros((4, 3, 16, 16)),
        "small": np.zeros((4, 3, 8, 8), np.float32),
        "flat": np.zeros(4, np.float32),
        "empty": np.zeros((0, 3, 16, 16), np.float32),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(UserError, match=r"not float32 \(N, 3, 16, 16\)"):
            work(json.dumps(job_of(tiny_artifact, tmp_path / f"{name}.npy", cpus=None)).encode())
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        work(json.dumps(job_of(tiny_artifact, tmp_path / "pickled.npy", cpus=None)).encode())


def test_a_changed_file_is_refused_before_it_is_loaded(make_artifact: Any, tmp_path: Path, inputs: Path) -> None:
    artifact = make_artifact(tmp_path / "changed")
    model = artifact / "onnx-fp32" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    done = run_agent(job_of(artifact, inputs))
    assert done.returncode == 2 and "was changed" in json.loads(done.stdout)["error"]


def test_it_ends_with_its_parent(tiny_artifact: Path, inputs: Path) -> None:
    job = job_of(tiny_artifact, inputs, plan={**PLAN, "min_s": 600.0})
    code = (
        "import json, os, subprocess, sys, time\n"
        f"child = subprocess.Popen({COMMAND!r}, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)\n"
        f"child.stdin.write(json.dumps({job!r} | {{'parent': os.getpid()}}).encode())\nchild.stdin.close()\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    status = Path(f"/proc/{child}/status")
    wait_for(lambda: "onnxruntime" in Path(f"/proc/{child}/maps").read_text(), 20)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not status.exists() or "State:\tZ" in status.read_text(), 10)


def test_it_does_nothing_for_a_parent_that_has_ended(tiny_artifact: Path, inputs: Path) -> None:
    done = run_agent(job_of(tiny_artifact, inputs, parent=1))
    assert done.returncode == 2
    assert json.loads(done.stdout) == {"error": "The process that gave the job has ended."}


def wait_for(condition: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'midge\[openvino\]'"):
        import_runtime("openvino")


def test_memory_counts_what_was_touched() -> None:
    before = peak_rss_mib()
    assert before is not None
    block = np.ones(64 << 20, np.uint8)
    after = peak_rss_mib()
    assert after is not None and after >= before and after > block.nbytes / 2**20


class Told:
    """A backend that tells what it is told to."""

    input_shape = (1, 3, 16, 16)

    def __init__(self, placement: Placement | Exception) -> None:
        self.told = placement

    def placement(self) -> Placement:
        if isinstance(self.told, Exception):
            raise self.told
        return self.told


def test_a_share_that_is_not_known_has_a_reason() -> None:
    uncounted = placement_json(Told(Placement(5, 10, {"Einsum": 2, "Conv": 1}, {"Einsum": 2})))  # type: ignore[arg-type]
    assert uncounted["int8_mac_share"] is uncounted["int8_macs"] is uncounted["total_macs"] is None
    assert uncounted["ops"] == {"Einsum": 2, "Conv": 1} and "Einsum ×2" in uncounted["reason"]
    failed = placement_json(Told(RuntimeError("no\nprofile")))  # type: ignore[arg-type]
    assert failed["int8_mac_share"] is None and failed["reason"] == "the runtime did not tell (no profile)"
    assert "no convolution" in placement_json(Told(Placement(0, 0, {"Add": 1})))["reason"]  # type: ignore[arg-type]
