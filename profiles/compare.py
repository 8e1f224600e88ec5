"""``midge compare``: the records of a folder as rows, verdicts of INT8 against FP32, a table and a report page.

Records of different devices, or accuracies on different test images, are compared only where that was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.errors import UserError
from ..runtime.files import write_json
from .compare_config import CompareConfig
from .display import RUNTIME_NAMES
from .record import load_record
from .table import print_table
from .verdicts import find_reference, headline, verdicts
from .where import Condition, parse_where

Json = dict[str, Any]

SCHEMA = 1
KNN_NAMES = ("pixels", "random_init", "pretrained")
LATENCY_FIELDS = ("p50_ms", "p90_ms", "p95_ms", "p99_ms", "mean_ms", "p50_ci95")


def compare(config: CompareConfig) -> int:
    """Run the command. Returns 0, or 1 where no row satisfies ``--where``.

    Raises:
        UserError: the folder, a record or the condition cannot be used, or the records may not be compared.
    """
    condition = parse_where(config.where) if config.where is not None else None
    records = load_records(config.records)
    refuse_mixed(records, config.allow_mixed_devices, config.allow_mixed_data)
    summary = summarize(records)
    if condition is not None and config.where is not None:
        summary = select(summary, config.where, condition)
    if config.summary:
        write_summary(config.summary, summary)
    if config.html:
        from .report import write_report

        write_report(config.html, records, summary, report_title(records))
    if config.json:
        print(json.dumps(summary, allow_nan=False))
    else:
        print_table(summary)
    return 0 if summary["rows"] else 1


def load_records(folder: Path) -> list[Json]:
    """Read and check every record below a folder, sorted by artifact, device, runtime, variant and threads.

    Raises:
        UserError: there is none, one is damaged, or two describe the same measurement.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"No records at '{folder}': it {found}. Give the folder that 'midge profile' wrote.")
    records: dict[tuple[Any, ...], tuple[Path, Json]] = {}
    for path in sorted(folder.rglob("*@*.json")):
        record = load_record(path)
        key = (*_order(record), record["device"]["fingerprint"])
        if key in records:
            raise UserError(f"'{records[key][0]}' and '{path}' record the same measurement: keep one of them.")
        records[key] = (path, record)
    if not records:
        raise UserError(
            f"The folder '{folder}' holds no record (*@*.json): run 'midge profile ARTIFACT --out {folder}'."
        )
    return [records[key][1] for key in sorted(records)]


def _order(record: Json) -> tuple[Any, ...]:
    runtimes = [*RUNTIME_NAMES, record["runtime"]]
    place = runtimes.index(record["runtime"])
    return (
        record["artifact"]["name"],
        record["device"]["id"],
        place,
        record["runtime"],
        record["variant"],
        record["threads"],
    )


def refuse_mixed(records: Sequence[Json], allow_devices: bool, allow_data: bool) -> None:
    """Refuse to put side by side what was measured on different devices or different test images.

    Raises:
        UserError: names what differs and the flag that allows it.
    """
    devices = {record["device"]["fingerprint"]: record["device"]["id"] for record in records}
    if len(devices) > 1 and not allow_devices:
        names = ", ".join(f"{name} ({mark[:8]})" for mark, name in sorted(devices.items(), key=lambda item: item[1]))
        raise UserError(
            f"The records come from {len(devices)} devices, or from states of one that differ ({names}), and their "
            "latencies are not comparable: give the folder of one device, or pass --allow-mixed-devices."
        )
    data = {mark: record["artifact"]["name"] for record in records if (mark := data_mark(record))}
    if len(data) > 1 and not allow_data:
        names = ", ".join(f"{name} ({mark[:8]})" for mark, name in sorted(data.items()))
        raise UserError(
            f"The accuracies were counted on {len(data)} different sets of test images ({names}): profile with the "
            "same --data, or pass --allow-mixed-data."
        )


def data_mark(record: Json) -> str | None:
    """The fingerprint of the images that the record's accuracy was counted on; None without an accuracy."""
    return None if record["accuracy"]["top1"] is None else record["accuracy"]["data_fingerprint"]


def summarize(records: Sequence[Json], knn: Mapping[str, Any] | None = None) -> Json:
    """The summary: rows, verdicts, and what the k-NN of pretraining gave.

    Args:
        records: checked records, as :func:`load_records` returns them.
        knn: accuracies of ``pixels``, ``random_init`` and ``pretrained``, each a fraction 0..1 or an object with
            ``top1`` and ``n`` (as in a run's ``eval/knn.json``); None where there was no such evaluation.

    Returns:
        A JSON object: ``schema``, ``knn`` (fractions, or None), ``knn_n`` (queries, or None), ``rows``, ``verdicts``,
        ``notes`` (what could not be compared), ``headline`` (sentences), ``where`` (None: see :func:`select`).
    """
    rows = [_row(record, find_reference(record, records)) for record in records]
    _mark_pareto(rows, records)
    found, notes = verdicts(records)
    accuracies, n = _knn(knn)
    return {
        "schema": SCHEMA,
        "knn": accuracies,
        "knn_n": n,
        "rows": rows,
        "verdicts": found,
        "notes": [*_row_notes(rows), *notes],
        "headline": headline(rows, found, accuracies),
        "where": None,
    }


def _row(record: Json, reference: Json | None) -> Json:
    accuracy, latency = record["accuracy"], record["latency"] or {}
    top1 = accuracy["top1"]
    row = {
        "artifact": record["artifact"]["name"],
        "device": record["device"]["id"],
        "variant": record["variant"],
        "runtime": record["runtime"],
        "threads": record["threads"],
        "top1": top1,
        "n": accuracy.get("n"),
        "top1_ci95": accuracy.get("top1_ci95"),
        "top1_reason": accuracy.get("reason"),
        "top1_drop_points": None,
        **{name: latency.get(name) for name in LATENCY_FIELDS},
        "int8_mac_share": (record["placement"] or {}).get("int8_mac_share"),
        "peak_rss_mib": (record["memory"] or {}).get("peak_rss_mib"),
        "size_bytes": record["size_bytes"],
        "valid": record["valid"],
        "invalid_reasons": list(record["invalid_reasons"]),
        "pareto": False,
    }
    if reference is not None and top1 is not None and data_mark(reference) == data_mark(record):
        row["top1_drop_points"] = 100 * (reference["accuracy"]["top1"] - top1)
    return row


def _mark_pareto(rows: Sequence[Json], records: Sequence[Json]) -> None:
    """Mark the valid rows that no other valid row of the same device and images beats in p50 and top-1."""
    groups: dict[tuple[Any, ...], list[Json]] = {}
    for row, record in zip(rows, records, strict=True):
        if row["valid"] and row["top1"] is not None and row["p50_ms"] is not None:
            groups.setdefault((record["device"]["fingerprint"], data_mark(record)), []).append(row)
    for group in groups.values():
        for row in group:
            row["pareto"] = not any(_dominates(other, row) for other in group)


def _dominates(other: Json, row: Json) -> bool:
    no_worse = other["p50_ms"] <= row["p50_ms"] and other["top1"] >= row["top1"]
    return no_worse and (other["p50_ms"], other["top1"]) != (row["p50_ms"], row["top1"])


def _row_notes(rows: Sequence[Json]) -> list[str]:
    """Why an accuracy is missing, once for each reason."""
    missing: dict[str, list[str]] = {}
    for row in rows:
        if row["top1"] is None:
            missing.setdefault(row["top1_reason"] or "no reason recorded", []).append(row["variant"])
    return [f"No accuracy of {', '.join(dict.fromkeys(names))}: {reason}." for reason, names in missing.items()]


def _knn(knn: Mapping[str, Any] | None) -> tuple[Json | None, int | None]:
    if knn is None:
        return None, None
    values = {name: knn.get(name) for name in KNN_NAMES}
    counts = {value.get("n") for value in values.values() if isinstance(value, Mapping)}
    accuracies = {name: value["top1"] if isinstance(value, Mapping) else value for name, value in values.items()}
    return accuracies, counts.pop() if len(counts) == 1 else None


def select(summary: Json, text: str, condition: Condition) -> Json:
    """The summary of the valid rows that satisfy a condition, with the verdicts about them."""
    rows = [row for row in summary["rows"] if row["valid"] and condition(row)]
    keys = ("artifact", "device", "runtime", "threads")
    names = {(row["variant"], *(row[key] for key in keys)) for row in rows}
    found = [v for v in summary["verdicts"] if (v["a"], *(v[key] for key in keys)) in names]
    return {
        **summary,
        "rows": rows,
        "verdicts": found,
        "headline": headline(rows, found, summary["knn"]),
        "where": {"condition": text, "matched": len(rows), "of": len(summary["rows"])},
    }


def write_summary(path: Path, summary: Json) -> None:
    """Write the summary as JSON, atomically."""
    write_json(path, summary)


def report_title(records: Sequence[Json]) -> str:
    """The page's title where none is given: the artifacts' names."""
    return ", ".join(dict.fromkeys(record["artifact"]["name"] for record in records))
