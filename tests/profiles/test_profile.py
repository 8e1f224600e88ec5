"""The whole command on a real artifact: real child processes, the real ONNX Runtime."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from midge.__main__ import main
from midge.profiles import environment, rounds
from midge.profiles import profile as command
from midge.profiles.compare import load_records, summarize
from midge.profiles.latency import PROTOCOLS, Protocol
from midge.profiles.profile import choose_cells, why_not_here
from midge.profiles.record import load_record, predictions_path
from midge.profiles.rounds import INPUTS, Cell, find_faults, pick_images, write_inputs
from midge.runtime.artifact import load_artifact
from midge.runtime.cuda_device import why_no_gpu
from midge.runtime.errors import UserError
from midge.runtime.images import list_images, load_image
from midge.train.data_config import PackConfig
from midge.train.pack import pack

Json = dict[str, Any]

VARIANTS = ("onnx-fp32", "onnx-int8-u8")


@dataclass(frozen=True)
class Done:
    """What a run of the command left."""

    code: int
    out: Path
    output: str
    errors: str

    @property
    def records(self) -> dict[tuple[str, int], Json]:
        found = [load_record(path) for path in sorted(self.out.rglob("*.json"))]
        return {(record["variant"], record["threads"]): record for record in found}


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_it(*arguments: object, out: Path = tmp_path / "records") -> Done:
        capsys.readouterr()
        code = main(["profile", *map(str, arguments), "--out", str(out), "--protocol", "smoke"])
        captured = capsys.readouterr()
        return Done(code, out, captured.out, captured.err)

    return run_it


def test_the_records_of_a_run(run: Run, tiny_artifact: Path, colour_images: Path) -> None:
    done = run(tiny_artifact, "--data", colour_images, "--variants", *VARIANTS)
    assert done.code == 0, done.errors
    device = environment.describe_device()
    names = sorted(path.relative_to(done.out).as_posix() for path in done.out.rglob("*") if path.is_file())
    assert names == [
        f"{device['id']}/tiny/{variant}@onnxruntime-t1.{suffix}"
        for variant in VARIANTS
        for suffix in ("json", "predictions.npy")
    ]
    records = done.records
    fp32, int8 = (records[variant, 1] for variant in VARIANTS)
    artifact = load_artifact(tiny_artifact)
    for variant, record in zip(VARIANTS, (fp32, int8), strict=True):
        assert record["device"] == device
        assert record["size_bytes"] == artifact.variants[variant].size_bytes
        assert record["variant_sha256"] == artifact.variants[variant].sha256
        assert [len(part) for part in record["latency"]["samples_ms"]] == [8, 8]
        assert min(record["cold_start"].values()) > 0
        assert record["preprocess_ms"]["p50"] > 0 and record["memory"]["peak_rss_mib"] > 20
        assert record["protocol"]["inputs"] == "test images"
        assert record["energy"] is None and record["energy_reason"]
        assert not record["valid"] and record["invalid_reasons"] == ["the protocol smoke is too short for a comparison"]
        assert record["session"] == fp32["session"]
        accuracy = record["accuracy"]
        assert accuracy["n"] == 60 and 0.5 < accuracy["top1"] < 1
        assert accuracy["agreement_with_reference"] is None  # torch-fp32 was not measured
        path = done.out / device["id"] / "tiny" / f"{variant}@onnxruntime-t1.json"
        assert np.load(predictions_path(path)).shape == (60,)
    assert fp32["placement"]["int8_mac_share"] == 0.0 and int8["placement"]["int8_mac_share"] == 1.0
    assert fp32["parity"]["cosine_min"] > 0.999999 > int8["parity"]["cosine_min"] > 0.99
    assert fp32["accuracy"]["vs"] is None and int8["accuracy"]["vs"]["variant"] == "onnx-fp32"
    assert all(variant in done.output for variant in VARIANTS) and str(done.out) in done.output
    assert "too short for a comparison" in done.output
    summary = summarize(load_records(done.out))
    assert [row["variant"] for row in summary["rows"]] == list(VARIANTS)
    assert main(["compare", str(done.out)]) == 0


def test_without_images_there_is_no_accuracy_and_the_golden_pack_is_the_input(run: Run, tiny_artifact: Path) -> None:
    done = run(tiny_artifact, "--variants", "onnx-fp32", "--json")
    assert done.code == 0
    record = done.records["onnx-fp32", 1]
    assert record["accuracy"] == {"top1": None, "reason": "no test images were given (--data)"}
    assert record["preprocess_ms"] is None and record["protocol"]["inputs"] == "golden pack"
    assert not list(done.out.rglob("*.npy"))
    document = json.loads(done.output)
    assert [each["variant"] for each in document["records"]] == ["onnx-fp32"]
    assert load_record(Path(document["records"][0]["path"])) == record


def test_every_number_of_threads_is_measured(run: Run, tiny_artifact: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two cores are needed for two threads")
    done = run(tiny_artifact, "--variants", "onnx-fp32", "--threads", 1, 2)
    assert sorted(done.records) == [("onnx-fp32", 1), ("onnx-fp32", 2)]
    pinned = {threads: record["protocol"]["pinned_cpus"] for (_, threads), record in done.records.items()}
    assert [len(cpus) for cpus in pinned.values()] == [1, 2]


def test_several_artifacts_are_measured_in_one_session(
    run: Run, tiny_artifact: Path, make_artifact: Any, tmp_path: Path
) -> None:
    other = make_artifact(tmp_path / "other")
    done = run(tiny_artifact, other, "--variants", "onnx-fp32")
    records = [load_record(path) for path in done.out.rglob("*.json")]
    assert sorted(record["artifact"]["name"] for record in records) == ["other", "tiny"]
    assert len({record["session"] for record in records}) == 1
    twin = make_artifact(tmp_path / "elsewhere" / "tiny")
    assert run(tiny_artifact, twin, out=tmp_path / "twins").code == 2
    assert not (tmp_path / "twins").exists()


def test_records_are_not_overwritten_unless_told(run: Run, tiny_artifact: Path) -> None:
    first = run(tiny_artifact, "--variants", "onnx-fp32").records["onnx-fp32", 1]
    again = run(tiny_artifact, "--variants", *VARIANTS)
    assert again.code == 2 and "exists already" in again.errors and "--overwrite" in again.errors
    assert again.records == {("onnx-fp32", 1): first}
    assert run(tiny_artifact, "--variants", "onnx-int8-u8").code == 0  # beside it there is room
    replaced = run(tiny_artifact, "--variants", *VARIANTS, "--overwrite")
    assert replaced.code == 0 and len(replaced.records) == 2
    assert replaced.records["onnx-fp32", 1]["session"] != first["session"]


def test_a_lack_of_parity_makes_a_record_invalid_and_the_exit_code_1(
    run: Run, make_artifact: Any, tmp_path: Path
) -> None:
    done = run(make_artifact(tmp_path / "off", golden_error=0.5), "--variants", *VARIANTS)
    assert done.code == 1
    record = done.records["onnx-fp32", 1]
    assert "parity: the lowest cosine to the reference is" in record["invalid_reasons"][0]
    assert "below 0.9999" in done.output


def test_what_is_not_installed_is_skipped_by_name(
    run: Run, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    absent = {"torch", "openvino"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name))
    done = run(tiny_artifact)
    assert done.code == 0 and set(done.records) == {(variant, 1) for variant in VARIANTS}
    assert "Skipped torch-fp32: torch is not installed (pip install 'midge[train]')." in done.errors
    assert "Skipped openvino-fp32: openvino is not installed (pip install 'midge[openvino]')." in done.errors
    absent.add("onnxruntime")
    done = run(tiny_artifact, out=tmp_path / "none")
    assert done.code == 2 and "No variant can run here" in done.errors and not done.out.exists()


def test_a_model_that_its_runtime_refuses_is_one_line(run: Run, tiny_artifact: Path) -> None:
    done = run(tiny_artifact, "--variants", "onnx-fp32", "torch-fp32")
    assert done.code == 2 and not done.out.exists()
    assert done.errors.strip().splitlines()[-1].startswith("midge: error: The measurement of torch-fp32 of tiny")
    assert "Traceback" not in done.errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "onnx-int4"], "Unknown variant 'onnx-int4': choose one of onnx-fp32"),
        (["--threads", "1000"], "Cannot measure with 1000 threads"),
        (["--on", "pi5"], "Unknown device 'pi5'"),
        (["--data", "nowhere"], "No folder at 'nowhere'"),
    ],
)
def test_mistakes_are_found_before_anything_runs(
    run: Run, tiny_artifact: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "measure_all", lambda *_: pytest.fail("something was measured"))
    done = run(tiny_artifact, *arguments)
    assert done.code == 2 and message in done.errors and not done.out.exists()


def test_artifacts_that_cannot_be_measured(run: Run, make_artifact: Any, tmp_path: Path) -> None:
    broken = make_artifact(tmp_path / "broken")
    (broken / "golden.npz").write_bytes(b"x")
    assert "golden.npz" in run(broken).errors
    assert "it does not exist" in run(tmp_path / "absent").errors


def test_images_of_other_classes_are_refused(
    run: Run, tiny_artifact: Path, tmp_path: Path, colour_images: Path
) -> None:
    for source, name in (("red", "cat"), ("blue", "dog")):
        (tmp_path / "pets").mkdir(exist_ok=True)
        (tmp_path / "pets" / name).symlink_to(colour_images / source)
    done = run(tiny_artifact, "--data", tmp_path / "pets", "--variants", "onnx-fp32")
    assert done.code == 2 and "'cat', 'dog'" in done.errors and not done.out.exists()


def test_an_embedding_has_a_latency_and_no_accuracy(
    run: Run, make_artifact: Any, tmp_path: Path, colour_images: Path
) -> None:
    artifact = make_artifact(tmp_path / "embedding", kind="embedding", labels=())
    done = run(artifact, "--data", colour_images, "--variants", "onnx-fp32")
    record = done.records["onnx-fp32", 1]
    assert done.code == 0 and record["latency"]["p50_ms"] > 0
    assert "names no class" in record["accuracy"]["reason"] and record["preprocess_ms"]["p50"] > 0


def test_a_steady_measurement_of_a_short_protocol_is_valid(
    run: Run, tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROTOCOLS, "smoke", Protocol(2, 64, 0.2, warmup_min_s=0.2))
    monkeypatch.setattr("midge.profiles.latency.STEADY", 5.0)  # this machine may be busy with other things
    done = run(tiny_artifact, "--variants", "onnx-fp32")
    record = done.records["onnx-fp32", 1]
    assert done.code == 0 and record["valid"] and record["invalid_reasons"] == []
    assert record["latency"]["n"] >= 64 and sum(map(sum, record["latency"]["samples_ms"])) >= 200


def test_the_rounds_go_through_the_variants_by_turns(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = choose_cells([load_artifact(tiny_artifact)], VARIANTS, [1])
    jobs: list[Json] = []
    before = os.sched_getaffinity(0)

    class Recorded:
        def run(self, job: Json, what: str) -> Json:
            jobs.append(job)
            assert os.sched_getaffinity(0) == (before - set(job["cpus"]) or before)
            return {"samples_ms": [float(len(jobs))]}

    inputs = {cell.manifest_sha256: tmp_path / "x.npy" for cell in cells}
    rounds.measure(cells, "quick", inputs, [], Recorded())  # type: ignore[arg-type]
    assert os.sched_getaffinity(0) == before
    assert [job["variant"] for job in jobs] == [*VARIANTS, *reversed(VARIANTS)] * 2
    assert [job["checks"] for job in jobs] == [True] * 2 + [False] * 6
    assert [answer["samples_ms"] for answer in cells[0].answers] == [[1.0], [4.0], [5.0], [8.0]]


@pytest.mark.parametrize("samples", [None, [], "x"])
def test_an_answer_without_samples_is_refused(tiny_artifact: Path, samples: object) -> None:
    cell = choose_cells([load_artifact(tiny_artifact)], VARIANTS[:1], [1])[0]
    with pytest.raises(UserError, match=r"answer for onnx-fp32 of tiny \(1 thread\) holds no samples"):
        rounds.check_answer({"samples_ms": samples}, cell)


def test_the_input_are_readable_images_drawn_by_the_seed(
    tiny_artifact: Path, colour_images: Path, tmp_path: Path
) -> None:
    images = list_images(colour_images)
    picked = pick_images(images, 0, tmp_path)
    assert len(set(picked)) == INPUTS and picked == pick_images(images, 0, tmp_path) != pick_images(images, 1, tmp_path)
    artifact = load_artifact(tiny_artifact)
    write_inputs(tmp_path / "x.npy", artifact, picked)
    stored = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(stored[3], artifact.preprocess(load_image(picked[3])))
    write_inputs(tmp_path / "y.npy", artifact, [])
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.load(artifact.golden)["inputs"][:INPUTS])
    assert pick_images(None, 0, tmp_path) == []


def test_images_in_shards_give_the_same_input(tiny_artifact: Path, colour_images: Path, tmp_path: Path) -> None:
    assert pack(PackConfig(colour_images, tmp_path / "packed")) == 0
    artifact = load_artifact(tiny_artifact)
    for name, folder in (("files", colour_images), ("shards", tmp_path / "packed")):
        (tmp_path / name).mkdir()
        write_inputs(tmp_path / f"{name}.npy", artifact, pick_images(list_images(folder), 0, tmp_path / name))
    np.testing.assert_array_equal(np.load(tmp_path / "files.npy"), np.load(tmp_path / "shards.npy"))
    assert len(list((tmp_path / "shards").iterdir())) == INPUTS


def cell_with(tiny_artifact: Path, parity: Json, sensors: list[Json], variant: str = "onnx-fp32") -> Cell:
    rng = np.random.default_rng(0)
    answer = {
        "samples_ms": (2 + rng.gamma(2.0, 0.05, 1000)).tolist(),
        "sensors": sensors,
        "parity": {"cosine_min": 1.0, "cosine_mean": 1.0, "max_abs_error": 0.0, **parity},
    }
    return Cell(load_artifact(tiny_artifact), "0" * 64, variant, 1, [0], [answer] * 4)


def test_the_reasons_for_which_a_record_is_invalid(tiny_artifact: Path) -> None:
    quiet = {"clock_mhz": None, "temperature_c": None, "throttle_events": None, "throttled": None}
    hot = {**quiet, "throttled": True}
    assert find_faults(cell_with(tiny_artifact, {}, [quiet, quiet]), "quick", 0, 10) == []
    assert "throttled" in find_faults(cell_with(tiny_artifact, {}, [quiet, hot]), "quick", 0, 10)[0]
    limits = (("onnx-fp32", "min", 0.9999), ("onnx-fp16", "min", 0.999), ("onnx-int8-u8", "mean", 0.9))
    for variant, measure, least in limits:
        low, enough = ({f"cosine_{measure}": least + change} for change in (-1e-4, 1e-5))
        assert find_faults(cell_with(tiny_artifact, enough, [quiet, quiet], variant), "quick", 0, 10) == []
        assert (
            f"below {least:g}" in find_faults(cell_with(tiny_artifact, low, [quiet, quiet], variant), "quick", 0, 1)[0]
        )
    infinite = cell_with(tiny_artifact, {"cosine_min": -1.0, "max_abs_error": None}, [quiet, quiet])
    assert find_faults(infinite, "quick", 0, 10) == ["outputs that are not finite in the golden pack"]
    assert "3 of 10 test images" in find_faults(cell_with(tiny_artifact, {}, [quiet, quiet]), "quick", 3, 10)[0]


def test_every_variant_has_a_runtime_or_a_reason() -> None:
    assert why_not_here("onnx-fp32") is None
    assert why_not_here("tflite-fp16") == "this midge knows no runtime for it"
    if gpu := why_no_gpu():
        assert why_not_here("tensorrt-fp32") in {gpu, "tensorrt is not installed (pip install 'midge[tensorrt]')"}
