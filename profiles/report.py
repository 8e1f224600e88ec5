"""The report page: one HTML file with everything in it, drawn as SVG by the template, so that it needs no script.

Accuracies come as fractions and are shown in %, latencies in ms, sizes in MB (10^6 bytes), memory in MiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..runtime.page import render_page, write_page
from ..runtime.proportions import wilson_interval
from .chart import scatter
from .display import RUNTIME_NAMES, method_paragraphs, runtime_name, shown

Json = dict[str, Any]
Label = Callable[[Json], str]

# SVG paths around the origin: form tells the precision, colour the runtime, so that neither is needed alone.
SHAPES = {
    "fp32": "M-6.2,0A6.2,6.2 0 1 0 6.2,0A6.2,6.2 0 1 0 -6.2,0Z",
    "fp16": "M-5.6,-5.6H5.6V5.6H-5.6Z",
    "int8": "M0,-8L8,0L0,8L-8,0Z",
}
PRECISION_NAMES = {"fp32": "FP32", "fp16": "FP16", "int8": "INT8"}
KNN_NAMES = {"pixels": "Raw pixels", "random_init": "Random initialization", "pretrained": "Pretrained"}
SYMBOLS = {"good": "▲", "bad": "▼", "open": "≈"}
TONES = {"faster": "good", "better": "good", "slower": "bad", "worse": "bad"}


def write_report(
    path: Path, records: Sequence[Json], summary: Json, title: str, facts: Mapping[str, object] | None = None
) -> None:
    """Write the page, atomically.

    Args:
        path: the HTML file.
        records: the records that the summary was made from.
        summary: what :func:`compare.summarize` returned.
        title: the page's title.
        facts: more to tell about the data and the training, name -> value, shown as text.
    """
    write_page(path, render_report(records, summary, title, facts or {}))


def render_report(records: Sequence[Json], summary: Json, title: str, facts: Mapping[str, object]) -> str:
    """The page as text; see :func:`write_report`."""
    filters = {
        "shown": shown,
        "shape": lambda variant: SHAPES[_precision(variant)],
        "precision_name": PRECISION_NAMES.__getitem__,
        "runtime_class": lambda runtime: runtime if runtime in RUNTIME_NAMES else "other",
        "runtime_name": runtime_name,
        "describe": _describe,
        "tied": lambda text: text.replace(" %", "\u00a0%").replace(" ms", "\u00a0ms"),
    }
    template = Path(__file__).with_name("report.html.jinja")
    return render_page(template, filters=filters, **_context(records, summary, title, facts))


def _context(records: Sequence[Json], summary: Json, title: str, facts: Mapping[str, object]) -> Json:
    rows = summary["rows"]
    label = partial(row_label, rows=rows)
    wide_label, narrow_label = (_fitting_label(rows, label, *limits) for limits in ((12, 32), (8, 18)))
    kept = [record for record in records if any(_same(record, row) for row in rows)] or list(records)
    return {
        "title": title,
        "subtitle": _subtitle(rows, kept),
        "summary": summary,
        "wide": scatter(rows, wide_label, 1040, 470),
        "narrow": scatter(rows, narrow_label, 370, 400),
        "numbered": "" if narrow_label is label else "narrow-only" if wide_label is label else "always",
        "runtimes": sorted({row["runtime"] for row in rows if row["p50_ms"] is not None}),
        "precisions": sorted({_precision(row["variant"]) for row in rows}),
        "many_artifacts": len({row["artifact"] for row in rows}) > 1,
        "many_devices": len({row["device"] for row in rows}) > 1,
        "verdicts": _verdict_strips(summary["verdicts"]),
        "bars": _knn_bars(summary["knn"] or {}, summary["knn_n"]),
        "knn_n": summary["knn_n"],
        "details": [_detail(record, row, label(row)) for row in rows for record in kept if _same(record, row)],
        "method": method_paragraphs(kept),
        "provenance": _provenance(kept, facts),
    }


def row_label(row: Json, rows: Sequence[Json]) -> str:
    """A row's name among the others: its variant and whatever else is needed to tell it from them."""
    parts = [row["variant"]]
    if len({other["threads"] for other in rows}) > 1:
        parts.append(f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}")
    parts += [row[key] for key in ("artifact", "device") if len({other[key] for other in rows}) > 1]
    return " · ".join(parts)


def _fitting_label(rows: Sequence[Json], label: Label, max_rows: int, max_length: int) -> Label:
    """``label`` where the chart has room for the names, else the rows' numbers, which the table repeats."""
    if len(rows) <= max_rows and all(len(label(row)) <= max_length for row in rows):
        return label
    return lambda row: str(next(i for i, other in enumerate(rows, start=1) if other is row))


def _precision(variant: str) -> str:
    return next((name for name in ("int8", "fp16") if f"-{name}" in variant), "fp32")


def _describe(row: Json) -> str:
    accuracy = "no accuracy" if row["top1"] is None else f"top-1 {shown(row['top1'], 'percent')} %"
    return f"p50 {shown(row['p50_ms'], 'ms')} ms, {accuracy}{'' if row['valid'] else ', invalid'}"


def _same(record: Json, row: Json) -> bool:
    return (record["artifact"]["name"], record["device"]["id"]) == (row["artifact"], row["device"]) and all(
        record[key] == row[key] for key in ("variant", "runtime", "threads")
    )


def _subtitle(rows: Sequence[Json], records: Sequence[Json]) -> str:
    devices = dict.fromkeys(f"{r['device']['id']} ({r['device']['cpu_model']})" for r in records)
    days = sorted({record["created_utc"][:10] for record in records})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else ""
    return f"{len(rows)} measured variant{'s' if len(rows) != 1 else ''} on {', '.join(devices)} · {when}"


def _detail(record: Json, row: Json, label: str) -> Json:
    cold, parity = record["cold_start"] or {}, record["parity"] or {}
    ops = (record["placement"] or {}).get("ops") or {}
    return {
        "row": row,
        "label": label,
        **{key: cold.get(key) for key in ("import_ms", "load_ms", "first_inference_ms")},
        "preprocess_ms": (record["preprocess_ms"] or {}).get("p50"),
        **{key: parity.get(key) for key in ("cosine_min", "max_abs_error", "top1_agreement")},
        "ops": ", ".join(f"{name} ×{count}" for name, count in sorted(ops.items(), key=lambda item: -item[1])) or "–",
    }


def _knn_bars(knn: Mapping[str, Any], n: int | None) -> list[Json]:
    bars = []
    for key, name in KNN_NAMES.items():
        if (value := knn.get(key)) is not None:
            ci = wilson_interval(round(value * n), n) if n else None
            bars.append({"name": name, "value": value, "at": 100 * value, "ci": ci, "main": key == "pretrained"})
    return bars


def _verdict_strips(verdicts: Sequence[Json]) -> list[tuple[Json, Json]]:
    """Each verdict with the strip that draws it: positions in % of its width, better to the right.

    Ratios stand on a logarithmic scale around 1, top-1 changes (points, minus the drop) around 0; one scale per metric.
    """
    spans: dict[str, float] = {}
    values: list[tuple[float, float, float] | None] = []
    for verdict in verdicts:
        at, ci = (verdict.get(key) for key in ("ratio" if verdict["metric"] == "latency" else "drop_points", "ci95"))
        if at is None or ci is None:
            values.append(None)
            continue
        low, at, high = (math.log(v) if verdict["metric"] == "latency" else -v for v in (ci[0], at, ci[1]))
        values.append((min(low, high), at, max(low, high)))
        reach = max(abs(low), abs(high), 0.05 if verdict["metric"] == "latency" else 0.5)
        spans[verdict["metric"]] = max(spans.get(verdict["metric"], 0.0), reach)
    strips = []
    for verdict, value in zip(verdicts, values, strict=True):
        tone = TONES.get(verdict["verdict"], "open")
        strip: Json = {"tone": tone, "symbol": SYMBOLS[tone], "low": None}
        if value is not None:
            low, at, high = (50 + 48 * v / spans[verdict["metric"]] for v in value)
            worse, better = ("slower", "faster") if verdict["metric"] == "latency" else ("lower", "higher")
            strip |= {"low": low, "at": at, "high": high, "worse": worse, "better": better}
            strip["alt"] = f"The interval between {worse} (left) and {better} (right): {verdict['text']}"
        strips.append((verdict, strip))
    return strips


def _provenance(records: Sequence[Json], facts: Mapping[str, object]) -> list[tuple[str, list[tuple[str, str]]]]:
    sections = []
    for device in {record["device"]["fingerprint"]: record["device"] for record in records}.values():
        pairs = [
            (name.replace("_", " ").capitalize(), _text(value))
            for name, value in device.items()
            if name != "id" and value
        ]
        sections.append((f"Device {device['id']}", [(_capitals(name), value) for name, value in pairs]))
    software = {(runtime_name(r["runtime"]), str(r["runtime_version"])) for r in records}
    software |= {("midge", str(record["midge"])) for record in records}
    sections.append(("Software", sorted(software)))
    data = [(name, _text(value)) for name, value in facts.items()]
    for record in records:
        accuracy = record["accuracy"]
        if accuracy["top1"] is not None:
            data += [
                ("Test images", f"{accuracy['n']:,}"),
                ("Fingerprint of the test images", accuracy["data_fingerprint"][:16]),
            ]
        data.append(
            (f"Artifact {record['artifact']['name']}", f"manifest {record['artifact']['manifest_sha256'][:16]}")
        )
    sections.append(("Data and artifacts", list(dict.fromkeys(data))))
    return sections


def _capitals(name: str) -> str:
    """A field's name as a reader writes it."""
    for plain, written in {"Cpu": "CPU", "Isa": "ISA", "Smt": "SMT", " mib": ", MiB"}.items():
        name = name.replace(plain, written)
    return name


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, str) and len(value) == 64:
        return value[:16]
    return "–" if value is None else str(value)
