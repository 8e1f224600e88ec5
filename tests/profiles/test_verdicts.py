from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from midge.profiles.compare import refuse_mixed, summarize
from midge.profiles.verdicts import reference_name
from midge.runtime.errors import UserError

Json = dict[str, Any]
MakeRecords = Callable[..., list[Json]]


def verdict_of(summary: Json, variant: str, metric: str) -> Json:
    found = [v for v in summary["verdicts"] if (v["a"], v["metric"]) == (variant, metric)]
    assert len(found) == 1
    return found[0]


def scale_latency(record: Json, factor: float) -> None:
    latency = record["latency"]
    latency["samples_ms"] = [[factor * value for value in part] for part in latency["samples_ms"]]
    for name in ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms", "min_ms"):
        latency[name] *= factor
    latency["p50_ci95"] = [factor * end for end in latency["p50_ci95"]]


def test_verdicts_point_in_the_direction_of_the_difference(make_records: MakeRecords) -> None:
    summary = summarize(make_records())
    faster = verdict_of(summary, "onnx-int8-u8", "latency")
    assert (faster["b"], faster["verdict"]) == ("onnx-fp32", "faster")
    assert faster["ratio"] == pytest.approx(0.624 / 0.391, rel=0.03)
    assert 1 < faster["ci95"][0] <= faster["ratio"] <= faster["ci95"][1]
    assert f"{faster['ratio']:.2f}× as fast as onnx-fp32" in faster["text"]
    assert verdict_of(summary, "onnx-int8-s8", "latency")["verdict"] == "not distinguishable"
    same = verdict_of(summary, "onnx-int8-u8", "top1")
    assert same["verdict"] == "not distinguishable"
    assert same["drop_points"] == pytest.approx(0.15)
    worse = verdict_of(summary, "openvino-int8", "top1")
    assert (worse["b"], worse["verdict"]) == ("openvino-fp32", "worse")
    assert worse["drop_points"] == pytest.approx(2.3)
    assert 0 < worse["ci95"][0] < 2.3 < worse["ci95"][1]
    assert "loses 2.30 points" in worse["text"]
    assert {v["a"] for v in summary["verdicts"]} == {"onnx-int8-u8", "onnx-int8-s8", "openvino-int8"}


def test_the_headline_names_the_price_of_the_fastest_and_the_fastest_without_one(make_records: MakeRecords) -> None:
    first, second = summarize(make_records())["headline"]
    assert first.startswith("openvino-int8 is the fastest variant: p50 0.3")
    assert first.endswith("at 85.00 % top-1, 2.30 points less than FP32.")
    assert second.startswith("onnx-int8-u8 is the fastest without a measurable loss of top-1: p50 0.4")
    assert second.endswith("0.15 points less than FP32, not distinguishable.")


def test_a_slower_variant_is_called_slower(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8")
    scale_latency(records[1], 2.5)
    slower = verdict_of(summarize(records), "onnx-int8-u8", "latency")
    assert slower["verdict"] == "slower"
    assert slower["ratio"] == pytest.approx(0.624 / 0.391 / 2.5, rel=0.03)
    assert slower["ci95"][1] < 1


def test_the_pairing_sees_through_a_drift_that_the_plain_intervals_do_not(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8")
    scale_latency(records[1], 1.5)  # 6 % faster than FP32, while the rounds differ by 15 %
    summary = summarize(records)
    fp32, int8 = summary["rows"]
    assert fp32["p50_ci95"][0] < int8["p50_ci95"][1]
    assert verdict_of(summary, "onnx-int8-u8", "latency")["verdict"] == "faster"


def test_rows_keep_threads_apart_when_they_look_for_their_reference(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8") + make_records("onnx-int8-u8", threads=2)
    summary = summarize(records)
    assert [v["threads"] for v in summary["verdicts"]] == [1, 1]
    assert [row["top1_drop_points"] is None for row in summary["rows"]] == [False, False, True]
    assert any("onnx-int8-u8 (2 threads) was not compared: there is no onnx-fp32" in n for n in summary["notes"])


def test_records_of_another_export_are_no_reference(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8")
    records[0]["artifact"]["manifest_sha256"] = "0" * 64
    summary = summarize(records)
    assert summary["verdicts"] == []
    assert "there is no onnx-fp32 of the same export" in summary["notes"][0]


def test_an_invalid_reference_judges_nothing(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8")
    records[0].update(valid=False, invalid_reasons=["throttled"])
    summary = summarize(records)
    assert summary["verdicts"] == []
    assert "the record of onnx-fp32 is invalid" in summary["notes"][0]
    records[1].update(valid=False, invalid_reasons=["throttled"])
    assert "nothing can be concluded" in summarize(records)["headline"][0]


def test_what_was_never_compared_is_not_called_lossless(make_records: MakeRecords) -> None:
    records = [record for record in make_records() if record["variant"] != "openvino-fp32"]
    int8 = next(record for record in records if record["variant"] == "openvino-int8")
    int8["accuracy"] |= {"top1": 0.3, "correct": 600}
    fastest, lossless = summarize(records)["headline"]
    assert fastest.startswith("openvino-int8 is the fastest variant")
    assert "without a measurable loss" in lossless and not lossless.startswith("openvino-int8")


def test_core_ml_is_judged_against_its_half_precision() -> None:
    assert reference_name("coreml-int8") == reference_name("coreml-fp16") == "coreml-fp16"
    assert reference_name("onnx-int8-u8") == "onnx-fp32"


def test_different_protocols_are_not_paired(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8")
    records[1]["protocol"]["rounds"] = 3
    summary = summarize(records)
    assert [v["metric"] for v in summary["verdicts"]] == ["top1"]
    assert "measured by different protocols" in summary["notes"][0]


def test_only_rounds_that_went_by_turns_are_paired(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8")
    records[1]["session"] = "another run"
    summary = summarize(records)
    assert [v["metric"] for v in summary["verdicts"]] == ["top1"]
    assert "not measured in the same run" in summary["notes"][0]
    records = make_records("onnx-fp32", "onnx-int8-u8")
    for record in records:
        record["latency"]["samples_ms"] = record["latency"]["samples_ms"][:2]
    assert "fewer than 3 rounds do not tell" in summarize(records)["notes"][0]


def test_another_version_of_the_runtime_is_no_reference(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8")
    records[1]["runtime_version"] = "1.20.0"
    summary = summarize(records)
    assert summary["verdicts"] == [] and "runtime version" in summary["notes"][0]


def test_devices_are_mixed_only_where_told(make_records: MakeRecords) -> None:
    records = make_records() + make_records(device="raspberry-pi-5")
    with pytest.raises(UserError, match=r"2 devices.*raspberry-pi-5.*xeon-8370c.*--allow-mixed-devices") as error:
        refuse_mixed(records, allow_devices=False, allow_data=False)
    assert "\n" not in str(error.value)
    refuse_mixed(records, allow_devices=True, allow_data=False)
    for record in records[6:]:
        scale_latency(record, 3.0)
    summary = summarize(records)
    marks = [(row["device"], row["variant"]) for row in summary["rows"] if row["pareto"]]
    assert len(marks) == 6 and len({device for device, _ in marks}) == 2
    assert len(summary["verdicts"]) == 12
    assert len([s for s in summary["headline"] if "is the fastest variant on" in s]) == 2


def test_the_same_device_in_another_state_is_another_device(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", "onnx-int8-u8")
    records[1]["device"]["fingerprint"] = "1" * 64
    with pytest.raises(UserError, match="states of one that differ"):
        refuse_mixed(records, allow_devices=False, allow_data=False)
    assert summarize(records)["verdicts"] == []


def test_accuracies_on_different_images_are_mixed_only_where_told(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32") + make_records("onnx-int8-u8", artifact="other")
    records[1]["accuracy"]["data_fingerprint"] = "2" * 64
    with pytest.raises(UserError, match=r"2 different sets of test images.*--allow-mixed-data"):
        refuse_mixed(records, allow_devices=False, allow_data=False)
    refuse_mixed(records, allow_devices=False, allow_data=True)
    records[1]["accuracy"] = {"top1": None, "reason": "no labels"}
    refuse_mixed(records, allow_devices=False, allow_data=False)
