from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from midge.profiles.compare import compare, load_records, select, summarize, write_summary
from midge.profiles.compare_config import CompareConfig
from midge.profiles.table import print_table
from midge.profiles.where import parse_where
from midge.runtime.errors import UserError

Json = dict[str, Any]
MakeRecords = Callable[..., list[Json]]
WriteRecords = Callable[[Path, Sequence[Json]], Path]

CONTRACT_ROW = {
    *("variant", "runtime", "threads", "top1", "n", "top1_ci95", "p50_ms", "p90_ms", "p50_ci95"),
    *("int8_mac_share", "peak_rss_mib", "size_bytes", "valid"),
}


def row_of(summary: Json, variant: str) -> Json:
    return next(row for row in summary["rows"] if row["variant"] == variant)


def test_the_summary_has_the_agreed_fields(make_records: MakeRecords) -> None:
    knn = {"pixels": 0.80, "random_init": 0.77, "pretrained": 0.84}
    summary = summarize(make_records(), knn)
    assert summary["schema"] == 1 and summary["knn"] == knn
    assert len(summary["rows"]) == 6
    for row in summary["rows"]:
        assert set(row) >= CONTRACT_ROW
        assert 0 <= row["top1"] <= 1 and row["top1_ci95"][0] < row["top1"] < row["top1_ci95"][1]
    for verdict in summary["verdicts"]:
        assert {"a", "b", "metric", "ci95", "verdict", "text"} <= set(verdict)
        assert ("ratio" if verdict["metric"] == "latency" else "drop_points") in verdict
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_knn_may_come_as_the_document_of_the_command(make_records: MakeRecords) -> None:
    accuracies = {name: {"top1": 0.8, "n": 500, "correct": 400} for name in ("pixels", "random_init", "pretrained")}
    summary = summarize(make_records(), {"schema": 1, "k": 20, **accuracies})
    assert summary["knn"] == {"pixels": 0.8, "random_init": 0.8, "pretrained": 0.8}
    assert summary["knn_n"] == 500
    assert summarize(make_records())["knn"] is None


def test_invalid_records_are_shown_but_never_win(make_records: MakeRecords) -> None:
    records = make_records()
    invalid = next(record for record in records if record["variant"] == "openvino-int8")
    invalid.update(valid=False, invalid_reasons=["throttled"])
    summary = summarize(records)
    row = row_of(summary, "openvino-int8")
    assert not row["valid"] and not row["pareto"] and row["invalid_reasons"] == ["throttled"]
    assert row["p50_ms"] == min(each["p50_ms"] for each in summary["rows"])
    assert all("openvino-int8" not in (v["a"], v["b"]) for v in summary["verdicts"])
    assert summary["headline"][0].startswith("onnx-int8-u8 is the fastest variant")
    assert any("openvino-int8 (1 thread) was not compared: its record is invalid" in n for n in summary["notes"])
    assert select(summary, "p50_ms < 9", parse_where("p50_ms < 9"))["where"] == {
        "condition": "p50_ms < 9",
        "matched": 5,
        "of": 6,
    }


def test_the_pareto_mark_stays_with_what_nothing_beats(make_records: MakeRecords) -> None:
    summary = summarize(make_records())
    marked = {row["variant"] for row in summary["rows"] if row["pareto"]}
    assert marked == {"openvino-int8", "onnx-int8-u8", "openvino-fp32"}
    best = summarize(make_records("openvino-fp32", "onnx-fp32", "torch-fp32"))  # equal top-1: the fastest alone
    assert [row["variant"] for row in best["rows"] if row["pareto"]] == ["openvino-fp32"]


def test_no_accuracy_is_no_verdict_and_no_crash(make_records: MakeRecords) -> None:
    records = make_records()
    for record in records:
        record["accuracy"] = {"top1": None, "reason": "the images have no labels"}
    summary = summarize(records)
    assert {v["metric"] for v in summary["verdicts"]} == {"latency"}
    assert all(row["top1"] is None and row["top1_drop_points"] is None for row in summary["rows"])
    assert summary["notes"][0].endswith("the images have no labels.")
    assert "its accuracy was not measured" in summary["headline"][0]
    assert not any(row["pareto"] for row in summary["rows"])
    assert "–" in printed(summary)


def test_records_are_loaded_in_order_and_whole(
    tmp_path: Path, make_records: MakeRecords, write_records: WriteRecords
) -> None:
    records = make_records()
    loaded = load_records(write_records(tmp_path, list(reversed(records))))
    assert [record["variant"] for record in loaded] == [
        "torch-fp32",
        "onnx-fp32",
        "onnx-int8-s8",
        "onnx-int8-u8",
        "openvino-fp32",
        "openvino-int8",
    ]
    assert sorted(map(json.dumps, loaded)) == sorted(map(json.dumps, records))


def test_folders_that_cannot_be_compared_are_one_line(
    tmp_path: Path, make_records: MakeRecords, write_records: WriteRecords
) -> None:
    with pytest.raises(UserError, match="it does not exist"):
        load_records(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="it is a file"):
        load_records(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no record .*midge profile"):
        load_records(tmp_path / "empty")
    write_records(tmp_path / "twice" / "a", make_records("onnx-fp32"))
    write_records(tmp_path / "twice" / "b", make_records("onnx-fp32"))
    with pytest.raises(UserError, match="record the same measurement: keep one of them"):
        load_records(tmp_path / "twice")
    damaged = write_records(tmp_path / "damaged", make_records("onnx-fp32"))
    next(damaged.rglob("*.json")).write_text('{"schema": 1}')
    with pytest.raises(UserError) as error:
        load_records(damaged)
    assert "\n" not in str(error.value)


def printed(summary: Json, width: int = 100) -> str:
    stream = io.StringIO()
    print_table(summary, Console(file=stream, width=width, highlight=False))
    return stream.getvalue()


def test_the_table_is_narrow_and_plain(make_records: MakeRecords) -> None:
    records = make_records()
    records[3].update(valid=False, invalid_reasons=["throttled"])
    summary = summarize(records)
    text = printed(summary, width=300)
    body = [
        line for line in text.splitlines() if line.startswith(("torch-", "onnx-", "openvino-")) and "PyT" not in line
    ]
    rows = [line for line in body if " is the fastest " not in line and " was not " not in line]
    assert len(rows) == 5 and max(map(len, rows)) <= 100
    assert all(line.isprintable() for line in text.splitlines())
    assert "onnx-int8-s8 !" in text and "! onnx-int8-s8 is invalid: throttled." in text
    assert f"{100 * row_of(summary, 'onnx-fp32')['top1']:.2f}" in text
    for verdict in summary["verdicts"]:
        assert verdict["text"] in text
    for record in records[:3]:
        record.update(valid=False, invalid_reasons=["too short"])
    assert "! torch-fp32, onnx-fp32, onnx-int8-u8 are invalid: too short.\n" in printed(summarize(records), width=300)
    assert max(map(len, printed(summary).splitlines())) <= 100


def test_names_of_records_cannot_steer_the_terminal(make_records: MakeRecords) -> None:
    records = make_records("onnx-fp32", artifact="[red]x[/red]\x1b[2J\x07")
    text = printed(summarize(records))
    assert "[red]x[/red]?[2J?" in text and "\x1b" not in text


def config(folder: Path, **options: Any) -> CompareConfig:
    return CompareConfig(records=folder, **options)


def test_the_command_prints_and_writes(
    tmp_path: Path, make_records: MakeRecords, write_records: WriteRecords, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_records(tmp_path / "records", make_records())
    page, file = tmp_path / "out" / "report.html", tmp_path / "out" / "summary.json"
    assert compare(config(folder, html=page, summary=file)) == 0
    assert "onnx-int8-u8 is 1." in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert compare(config(folder, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text(encoding="utf-8"))


def test_a_condition_selects_rows_and_says_by_the_exit_code_whether_any_is_left(
    tmp_path: Path, make_records: MakeRecords, write_records: WriteRecords, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_records(tmp_path, make_records())
    assert compare(config(folder, where="p50_ms <= 0.5 and top1_drop <= 0.5", json=True)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in summary["rows"]] == ["onnx-int8-u8"]
    assert {v["a"] for v in summary["verdicts"]} == {"onnx-int8-u8"}
    assert summary["headline"][0].startswith("onnx-int8-u8 is the fastest variant")
    assert compare(config(folder, where="top1 > 0.99")) == 1
    assert "0 of 6 rows satisfy: top1 > 0.99" in capsys.readouterr().out
    with pytest.raises(UserError, match="Unknown measure 'speed'"):
        compare(config(folder, where="speed > 1"))


def test_the_command_refuses_mixed_devices(
    tmp_path: Path, make_records: MakeRecords, write_records: WriteRecords, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_records(tmp_path, make_records() + make_records(device="raspberry-pi-5"))
    with pytest.raises(UserError, match="--allow-mixed-devices"):
        compare(config(folder))
    assert capsys.readouterr().out == ""
    assert compare(config(folder, allow_mixed_devices=True)) == 0
    assert "quickstart on raspberry-pi-5" in capsys.readouterr().out


def test_a_summary_replaces_an_older_one(tmp_path: Path, make_records: MakeRecords) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    summary = summarize(make_records())
    write_summary(path, summary)
    assert json.loads(path.read_text(encoding="utf-8")) == summary
    assert [each.name for each in tmp_path.iterdir()] == ["summary.json"]
