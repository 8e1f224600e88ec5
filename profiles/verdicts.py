"""Verdicts: each quantized variant against FP32 of the same artifact in the same runtime, threads and device.

Latency is paired by rounds, so both must come from the same run of ``midge profile``, whose rounds go through all
variants by turns; top-1 is paired by images. Invalid records take no part. What could not be compared is said in a
note, never passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .display import runtime_name, shown
from .statistics import MIN_ROUNDS, paired_latency

Json = dict[str, Any]

REFERENCES = {"coreml": "fp16"}
"""Target -> the precision that its variants are judged against, where it is not FP32: ML Programs have none."""


def reference_name(variant: str) -> str:
    """The variant that another is judged against: FP32 of the same target, e.g. ``onnx-fp32`` for ``onnx-int8-u8``."""
    target = variant.partition("-")[0]
    return f"{target}-{REFERENCES.get(target, 'fp32')}"


def find_reference(record: Json, records: Sequence[Json]) -> Json | None:
    """The FP32 record of the same export, runtime and its version, threads and device, or None."""

    def place(other: Json) -> tuple[Any, ...]:
        return (
            *(other["artifact"][key] for key in ("name", "manifest_sha256")),
            other["device"]["fingerprint"],
            *(other[key] for key in ("runtime", "runtime_version", "threads")),
        )

    wanted = reference_name(record["variant"])
    return next((other for other in records if other["variant"] == wanted and place(other) == place(record)), None)


def verdicts(records: Sequence[Json]) -> tuple[list[Json], list[str]]:
    """Judge every valid quantized record against its reference.

    Returns:
        The verdicts, latency before top-1 for each pair, and one sentence for each comparison that could not be made.
    """
    found: list[Json] = []
    notes: list[str] = []
    telling = [key for key in ("artifact", "device") if len({name_of(record, key) for record in records}) > 1]
    for record in records:
        wanted = reference_name(record["variant"])
        if record["variant"] == wanted:
            continue
        reference = find_reference(record, records)
        place = ", ".join([threads_text(record), *(name_of(record, key) for key in telling)])
        what = f"{record['variant']} ({place}) was not compared"
        if not record["valid"]:
            notes.append(f"{what}: its record is invalid.")
        elif reference is None:
            notes.append(f"{what}: there is no {wanted} of the same export, runtime version, device and threads.")
        elif not reference["valid"]:
            notes.append(f"{what}: the record of {wanted} is invalid.")
        else:
            for judge in (judge_latency, judge_top1):
                verdict, why_not = judge(record, reference, place)
                if verdict is not None:
                    found.append(verdict)
                elif why_not:
                    notes.append(f"{what} {why_not}.")
    return found, notes


def judge_latency(record: Json, reference: Json, place: str) -> tuple[Json | None, str]:
    """How many times as fast the variant is: ratio = reference time / its time, paired by rounds."""
    if not record["latency"] or not reference["latency"]:
        return None, "by latency: it was not measured for both"
    if record["protocol"] != reference["protocol"]:
        return None, "by latency: the two were measured by different protocols"
    if record["session"] != reference["session"]:
        return None, "by latency: the two were not measured in the same run, by turns"
    if len(record["latency"]["samples_ms"]) < MIN_ROUNDS:
        return None, f"by latency: fewer than {MIN_ROUNDS} rounds do not tell how much rounds differ"
    result = paired_latency(record["latency"]["samples_ms"], reference["latency"]["samples_ms"])
    low, high = result["ci95"]
    names = f"{record['variant']}", f"{reference['variant']}"
    facts = f"{runtime_name(record['runtime'])}, {place}; 95 % interval {times(low)} to {times(high)}"
    if result["verdict"] == "not distinguishable":
        text = f"{names[0]} and {names[1]} are about as fast: {times(result['ratio'])}× ({facts})."
    else:
        text = f"{names[0]} is {times(result['ratio'])}× as fast as {names[1]} ({facts})."
    return {**_pair(record, reference, "latency"), **result, "text": text}, ""


def judge_top1(record: Json, reference: Json, place: str) -> tuple[Json | None, str]:
    """How many points of top-1 are lost against the reference, paired by images."""
    accuracy, other = record["accuracy"], reference["accuracy"]
    if accuracy["top1"] is None or other["top1"] is None:
        return None, ""  # the row's own note says why there is no accuracy
    paired = accuracy.get("vs")
    if accuracy["data_fingerprint"] != other["data_fingerprint"]:
        return None, "by top-1: the two saw different images"
    if not paired or paired["variant"] != reference["variant"]:
        return None, "by top-1: the record does not pair it image by image"
    drop, (low, high), p = paired["top1_drop_points"], paired["ci95"], paired["mcnemar_p"]
    verdict = "not distinguishable" if low <= 0 <= high else "worse" if drop > 0 else "better"
    lost, won = paired["discordant"]
    verb, change, ends = ("loses", drop, (low, high)) if drop >= 0 else ("gains", -drop, (-high, -low))
    change_text = f"{verb} {change:.2f} points of top-1 against" if drop else "has the same top-1 as"
    text = (
        f"{record['variant']} {change_text} {reference['variant']} ({place}; "
        f"95 % interval {points(ends[0])} to {points(ends[1])}; {lost} of {accuracy['n']:,} images lost, {won} won)."
    )
    result = {"drop_points": drop, "ci95": [low, high], "mcnemar_p": p, "verdict": verdict, "text": text}
    return {**_pair(record, reference, "top1"), **result}, ""


def is_lossless(row: Json, found: Sequence[Json]) -> bool:
    """Whether a row is a reference, or was compared with it and not found to be worse."""
    if row["variant"] == reference_name(row["variant"]):
        return True
    return _verdicts_of(row, found).get("top1", {}).get("verdict", "worse") != "worse"


def headline(rows: Sequence[Json], found: Sequence[Json], knn: Json | None) -> list[str]:
    """The sentences that say what was found: the fastest valid variant at what price, and what pretraining brought."""
    usable = [row for row in rows if row["valid"] and row["p50_ms"] is not None]
    sentences = []
    if not rows:
        sentences.append("No row satisfies the condition.")
    elif not usable:
        sentences.append("No record here is valid: nothing can be concluded from them.")
    for device in dict.fromkeys(row["device"] for row in usable):
        here = [row for row in usable if row["device"] == device]
        place = f" on {device}" if len({row["device"] for row in usable}) > 1 else ""
        best = min(here, key=lambda row: row["p50_ms"])
        sentences.append(_tell(best, f"is the fastest variant{place}", here, found))
        lossless = [row for row in here if is_lossless(row, found)]
        if lossless and best not in lossless:
            best = min(lossless, key=lambda row: row["p50_ms"])
            sentences.append(_tell(best, f"is the fastest{place} without a measurable loss of top-1", here, found))
    if knn and knn.get("pretrained") is not None:
        others = {"pixels": "raw pixels", "random_init": "the random initialization"}
        against = " and ".join(
            f"{100 * knn[k]:.2f} % for {name}" for k, name in others.items() if knn.get(k) is not None
        )
        against = f", against {against}" if against else ""
        sentences.append(f"Pretrained features reach {100 * knn['pretrained']:.2f} % k-NN top-1{against}.")
    return sentences


def _verdicts_of(row: Json, found: Sequence[Json]) -> dict[str, Json]:
    """A row's verdicts by metric."""
    keys = ("artifact", "device", "runtime", "threads")
    return {v["metric"]: v for v in found if v["a"] == row["variant"] and all(v[key] == row[key] for key in keys)}


def _tell(best: Json, praise: str, rows: Sequence[Json], found: Sequence[Json]) -> str:
    """The sentence about a row that stands out."""
    mine = _verdicts_of(best, found)
    artifact = f" of {best['artifact']}" if len({row["artifact"] for row in rows}) > 1 else ""
    text = f"{best['variant']}{artifact} {praise}: p50 {shown(best['p50_ms'], 'ms')} ms"
    if latency := mine.get("latency"):
        low, high = latency["ci95"]
        if latency["verdict"] == "not distinguishable":
            text += ", not distinguishable from FP32 in the same runtime"
        else:
            text += f", {times(latency['ratio'])}× as fast as FP32 in the same runtime"
            text += f" (95 % interval {times(low)} to {times(high)})"
    if best["top1"] is None:
        return f"{text}; its accuracy was not measured."
    text += f", at {100 * best['top1']:.2f} % top-1"
    if top1 := mine.get("top1"):
        change = f"{abs(top1['drop_points']):.2f} points {'less' if top1['drop_points'] >= 0 else 'more'}"
        text += f", {change} than FP32" + (", not distinguishable" if top1["verdict"] == "not distinguishable" else "")
    return f"{text}."


def threads_text(record: Json) -> str:
    """``1 thread``, ``4 threads``."""
    return f"{record['threads']} thread{'s' if record['threads'] != 1 else ''}"


def name_of(record: Json, key: str) -> str:
    """The name of a record's artifact or device."""
    return record["artifact"]["name"] if key == "artifact" else record["device"]["id"]


def times(ratio: float) -> str:
    """A ratio with two decimals, or three where it is within 2 % of 1."""
    return f"{ratio:.{3 if abs(ratio - 1) < 0.02 else 2}f}"


def points(value: float) -> str:
    """Points with two decimals and a true minus sign, e.g. ``−0.05``."""
    return f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _pair(record: Json, reference: Json, metric: str) -> Json:
    return {
        "a": record["variant"],
        "b": reference["variant"],
        "metric": metric,
        "artifact": record["artifact"]["name"],
        "device": record["device"]["id"],
        "runtime": record["runtime"],
        "threads": record["threads"],
    }
