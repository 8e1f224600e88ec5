from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from midge.profiles.compare import summarize
from midge.profiles.record import (
    load_record,
    predictions_path,
    record_path,
    refuse_existing_records,
    write_record,
)
from midge.profiles.report import render_report
from midge.profiles.statistics import describe
from midge.profiles.table import print_table
from midge.runtime.errors import UserError

Json = dict[str, Any]
MakeRecords = Callable[..., list[Json]]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path, make_records: MakeRecords) -> None:
    for record in make_records():
        path = record_path(tmp_path, "xeon", "quickstart", record["variant"], record["runtime"], record["threads"])
        assert path.relative_to(tmp_path).as_posix() == (
            f"xeon/quickstart/{record['variant']}@{record['runtime']}-t1.json"
        )
        predictions = np.array([3, 1, -1])
        write_record(path, record, predictions)
        assert load_record(path) == record
        stored = np.load(predictions_path(path), allow_pickle=False)
        assert stored.dtype == np.int64 and stored.tolist() == [3, 1, -1]
        assert len(path.read_text(encoding="utf-8").splitlines()) < 140
    assert len(list(tmp_path.rglob("*"))) == 2 + 2 * 6


def test_a_record_without_predictions_removes_the_older_ones(tmp_path: Path, make_records: MakeRecords) -> None:
    record, path = make_records("onnx-fp32")[0], tmp_path / "a@b-t1.json"
    write_record(path, record, np.array([1]))
    write_record(path, {**record, "latency": None}, None)
    assert [each.name for each in tmp_path.iterdir()] == ["a@b-t1.json"]
    assert load_record(path)["latency"] is None


def test_what_cannot_be_written_leaves_the_older_record(tmp_path: Path, make_records: MakeRecords) -> None:
    record, path = make_records("onnx-fp32")[0], tmp_path / "a@b-t1.json"
    write_record(path, record, None)
    for damage in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_record(path, {**record, "size_bytes": damage}, None)
    assert load_record(path) == record
    assert [each.name for each in tmp_path.iterdir()] == ["a@b-t1.json"]


def test_existing_records_are_refused_until_told(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.json" for name in "abc"]
    refuse_existing_records(paths, overwrite=False)
    paths[1].write_text("{}")
    with pytest.raises(UserError, match=r"b\.json' exists already: .*--overwrite"):
        refuse_existing_records(paths, overwrite=False)
    paths[2].write_text("{}")
    with pytest.raises(UserError, match="and 1 more exists already"):
        refuse_existing_records(paths, overwrite=False)
    refuse_existing_records(paths, overwrite=True)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("schema",), 2, "reads up to 1: install a newer midge"),
        (("artifact", "name"), "../../x", "'name': '../../x'"),
        (("artifact", "name"), "a\x1b[2J", r"a\\x1b"),
        (("variant",), "ONNX", "must be a name"),
        (("variant",), "tflite-fp16", "Unknown target 'tflite'"),
        (("runtime",), "torch", "must be one of onnxruntime"),
        (("threads",), True, "an integer in 1..1024"),
        (("device", "fingerprint"), "x", "64 lower-case hexadecimal"),
        (("device", "note"), "two\nlines", "'note': 'two"),
        (("device", "\x1b[2J"), {}, r"'\\x1b\[2J'"),
        (("protocol", "rounds"), 3, "samples_ms"),
        (("protocol", "min_s"), "6", "a number in 0"),
        (("accuracy", "top1"), 0.99, "correct / n, which is 0.8715"),
        (("accuracy", "top1"), None, "no field 'reason'"),
        (("accuracy", "correct"), 2001, "an integer in 0..2000"),
        (("accuracy", "top1_ci95"), [0.9, 0.95], "an interval around top1"),
        (("accuracy", "top1_ci95"), [0.95, 0.85], "two numbers in order"),
        (("accuracy", "vs", "top1_drop_points"), -4.0, r"100 \(lost - won\) / n"),
        (("accuracy", "vs", "variant"), "onnx-int8-u8", "another variant than the record's own"),
        (("accuracy", "vs", "mcnemar_p"), float("nan"), "a number in 0..1"),
        (("accuracy", "vs", "mcnemar_p"), 1e-9, "what the measurements give"),
        (("accuracy", "vs", "ci95"), [-5.0, -4.9], "what the measurements give"),
        (("accuracy", "vs", "discordant"), [1003, 1000], "what 1743 of 2000 correct images allow"),
        (("accuracy", "agreement_with_reference", "share"), 1.1, "a number in 0..1"),
        (("latency", "p50_ms"), 0.1, "that of the samples, 0.4"),
        (("latency", "n"), 255, "that of the samples, 256"),
        (("latency", "samples_ms"), [[]] * 4, "4 lists, none empty"),
        (("latency", "samples_ms"), [[1.0, 0]] * 4, "above 0"),
        (("latency", "samples_ms"), [[True]] * 4, "above 0"),
        (("latency", "samples_ms"), [[10**400]] * 4, "above 0"),
        (("latency", "p50_ci95"), [2, 1], "two numbers in order"),
        (("latency", "p50_ci95"), [1e-4, 2e-4], "what the measurements give"),
        (("placement", "int8_mac_share"), 1.5, "a number in 0..1"),
        (("placement", "ops"), {"a\x07": 1}, "short names"),
        (("placement", "ops"), {"Conv": -1}, "an integer in 0"),
        (("parity", "n"), 0, "an integer in 1"),
        (("size_bytes",), 1.5, "an integer in 0"),
        (("valid",), False, "true without invalid_reasons"),
        (("invalid_reasons",), ["throttled"], "true without invalid_reasons"),
        (("created_utc",), "x\u2028y", "without control characters"),
        (("midge",), None, "a string"),
    ],
)
def test_wrong_fields_are_one_line(
    tmp_path: Path, make_records: MakeRecords, keys: tuple[str, ...], value: object, message: str
) -> None:
    record = make_records("onnx-int8-u8")[0]
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path = tmp_path / "x@y.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        load_record(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "NaN", '{"schema": 1}', '"\\ud800"', "1" * 5000, "[" * 10**5])
def test_what_is_no_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x@y.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError):
        load_record(path)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**53, 2**63, 10**400, -1, 0])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\x1b[2J", "\n", "\ud800", "x" * 5000, "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        found += [(value, key), *places_of(inner)]
    return found


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_records_are_refused_or_can_be_compared(
    tmp_path: Path, make_records: MakeRecords, data: st.DataObject
) -> None:
    record = copy.deepcopy(make_records("onnx-int8-u8")[0])
    samples = [part[:3] for part in record["latency"]["samples_ms"]]
    record["latency"] |= {"samples_ms": samples, **describe(samples)}
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places_of(record)))
        if data.draw(st.booleans()) and isinstance(container, dict):
            container.pop(key, None)
        elif isinstance(container, dict) or key < len(container):
            container[key] = data.draw(junk)
    path = tmp_path / "x@y.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    try:
        loaded = load_record(path)
    except UserError as error:
        assert str(error).isprintable()
    else:
        summary = summarize([loaded, *make_records("onnx-fp32")])
        json.dumps(summary, allow_nan=False)
        print_table(summary, Console(file=io.StringIO(), width=100))
        render_report([loaded, *make_records("onnx-fp32")], summary, "title", {}).encode()
