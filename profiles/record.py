"""Records on disk: what was measured of one variant with one number of threads on one device, as one JSON file.

    OUT/<device>/<artifact>/<variant>@<runtime>-t<threads>.json
    OUT/<device>/<artifact>/<variant>@<runtime>-t<threads>.predictions.npy    (n,) int64, -1 for an output not finite

A record may come from elsewhere. Every field that is compared or shown is checked as it is read: its type, its range,
and whether the figures are those of the raw samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.artifact import KINDS, NAME, variant_runtime
from ..runtime.errors import UserError
from ..runtime.fields import Fields
from ..runtime.files import atomic_file, read_json
from ..runtime.manifest import VARIANT_NAME
from .statistics import describe, mcnemar_p, p50_interval, paired_difference_interval

Json = dict[str, Any]

SCHEMA = 1
MAX_THREADS = 1024
MAX_ROUNDS = 1000
MAX_MS = 1e9
MAX_COUNT = 2**53
MAX_KEYS = 256
MAX_TEXT = 1000


def record_path(out: Path, device: str, artifact: str, variant: str, runtime: str, threads: int) -> Path:
    """Where a record lies below ``out``."""
    return Path(out) / device / artifact / f"{variant}@{runtime}-t{threads}.json"


def predictions_path(path: Path) -> Path:
    """Where the predictions of a record lie, beside it."""
    return path.with_suffix(".predictions.npy")


def refuse_existing_records(paths: Iterable[Path], overwrite: bool) -> None:
    """Refuse to measure what is recorded already; other records may lie in the same folder.

    Raises:
        UserError: one of the paths is taken and ``overwrite`` is false.
    """
    taken = [path for path in paths if path.exists()]
    if taken and not overwrite:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise UserError(
            f"The record '{taken[0]}'{more} exists already: name another folder with --out, or pass --overwrite."
        )


def write_record(path: Path, record: Json, predictions: np.ndarray | None) -> None:
    """Write a record, and (n,) int64 predictions beside it, each atomically; a reader never meets half of one."""
    beside = predictions_path(path)
    if predictions is None:
        beside.unlink(missing_ok=True)
    else:
        with atomic_file(beside) as partial, partial.open("wb") as file:
            np.save(file, np.asarray(predictions, np.int64), allow_pickle=False)
    with atomic_file(path) as partial:
        partial.write_text(_to_text(record), encoding="utf-8")


def _to_text(record: Json) -> str:
    """Indented JSON in which each round of samples is one line, for the sake of whoever opens it."""
    latency = record["latency"]
    if not latency:
        return json.dumps(record, indent=2, allow_nan=False) + "\n"
    rounds = [json.dumps(part, allow_nan=False) for part in latency["samples_ms"]]
    marks = [f"@round {index}@" for index in range(len(rounds))]
    text = json.dumps({**record, "latency": {**latency, "samples_ms": marks}}, indent=2, allow_nan=False)
    for mark, line in zip(marks, rounds, strict=True):
        text = text.replace(f'"{mark}"', line)
    return text + "\n"


def load_record(path: Path) -> Json:
    """Read and check a record.

    Raises:
        UserError: it is missing, no record, of a later schema, or a field of it is wrong.
    """
    shown = str(path) if str(path).isprintable() else repr(str(path))
    fields = Fields(read_json(path, "record"), f"record '{shown}'")
    fields.schema(SCHEMA)
    artifact = fields.fields("artifact")
    name(artifact, "name", NAME)
    artifact.sha256("manifest_sha256")
    artifact.choice("kind", KINDS)
    variant = name(fields, "variant", VARIANT_NAME)
    fields.choice("runtime", [variant_runtime(variant)])
    fields.sha256("variant_sha256")
    label(fields, "runtime_version")
    fields.integer("threads", 1, MAX_THREADS)
    _check_device(fields.fields("device"))
    rounds = _check_protocol(fields.fields("protocol"))
    _check_accuracy(fields.fields("accuracy"), variant)
    _check_latency(fields, rounds)
    _check_costs(fields)
    _check_validity(fields)
    for key in ("created_utc", "midge", "session"):
        label(fields, key)
    return fields.value


def name(fields: Fields, key: str, pattern: Any) -> str:
    """A string that matches a pattern as a whole, with at most 100 characters."""
    value = fields.text(key, 100)
    if not pattern.fullmatch(value):
        raise fields.wrong(key, value, f"a name that matches {pattern.pattern}")
    return value


def label(fields: Fields, key: str) -> str:
    """A string that can be shown on one line."""
    value = fields.text(key, MAX_TEXT)
    if not value.isprintable():
        raise fields.wrong(key, value, "text without control characters")
    return value


def is_null(fields: Fields, key: str) -> bool:
    """Whether a field, which must be there, is null."""
    if key not in fields.value:
        raise fields.wrong(key, None, "there, if only as null")
    return fields.value[key] is None


def number(fields: Fields, key: str, low: float, high: float) -> float:
    """A finite number in ``low..high``."""
    value = fields.value.get(key)
    if not isinstance(value, (int, float)) or type(value) is bool or not low <= value <= high:  # NaN is in no range
        raise fields.wrong(key, value, f"a number in {low:g}..{high:g}")
    return value


def optional_number(fields: Fields, key: str, low: float, high: float) -> float | None:
    """A finite number in ``low..high``, or None."""
    return None if is_null(fields, key) else number(fields, key, low, high)


def interval(fields: Fields, key: str, low: float, high: float) -> tuple[float, float]:
    """Two finite numbers in order, in ``low..high``."""
    ends = fields.numbers(key, 2)
    if not low <= ends[0] <= ends[1] <= high:
        raise fields.wrong(key, list(ends), f"two numbers in order, in {low:g}..{high:g}")
    return ends[0], ends[1]


def _check_device(fields: Fields) -> None:
    name(fields, "id", NAME)
    fields.sha256("fingerprint")
    if not is_null(fields, "cpu_model"):
        label(fields, "cpu_model")
    _check_facts(fields)


def _check_facts(fields: Fields) -> None:
    """Names with plain values or lists of them, as they are shown one by one."""
    if len(fields.value) > MAX_KEYS:
        raise UserError(f"The {fields.what} has {len(fields.value)} fields: at most {MAX_KEYS} are allowed.")
    for key, value in fields.value.items():
        values = value if isinstance(value, list) else [value]
        if not key.isprintable() or len(key) > 100 or len(values) > MAX_KEYS or not all(map(_is_plain, values)):
            raise fields.wrong(
                key if key.isprintable() else repr(key),
                value,
                "a short text, a number, true, false, null, or a list of them",
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT and value.isprintable()
    return value is None or type(value) is bool or (type(value) in {int, float} and abs(value) <= MAX_COUNT)  # type: ignore[operator]


def _check_protocol(fields: Fields) -> int:
    label(fields, "name")
    fields.integer("batch", 1, 1024)
    for key in ("min_runs", "warmup_min_runs"):
        fields.integer(key, 0, MAX_COUNT)
    for key in ("min_s", "warmup_min_s"):
        number(fields, key, 0, MAX_MS)
    _check_facts(fields)
    return fields.integer("rounds", 1, MAX_ROUNDS)


def _check_accuracy(fields: Fields, variant: str) -> None:
    if is_null(fields, "top1"):
        label(fields, "reason")
        return
    top1, n = number(fields, "top1", 0, 1), fields.integer("n", 1, MAX_COUNT)
    correct = fields.integer("correct", 0, n)
    if abs(top1 - correct / n) > 1e-9:
        raise fields.wrong("top1", top1, f"correct / n, which is {correct / n:.6g}")
    low, high = interval(fields, "top1_ci95", 0, 1)
    if not low <= top1 <= high:
        raise fields.wrong("top1_ci95", [low, high], f"an interval around top1, {top1:.6g}")
    fields.sha256("data_fingerprint")
    if fields.value.get("agreement_with_reference") is not None:
        agreement = fields.fields("agreement_with_reference")
        name(agreement, "variant", VARIANT_NAME)
        number(agreement, "share", 0, 1)
        agreement.integer("n", 1, MAX_COUNT)
    if fields.value.get("vs") is not None:
        _check_pairing(fields.fields("vs"), variant, correct, n)


def _check_pairing(fields: Fields, variant: str, correct: int, n: int) -> None:
    if name(fields, "variant", VARIANT_NAME) == variant:
        raise fields.wrong("variant", variant, "another variant than the record's own")
    drop = number(fields, "top1_drop_points", -100, 100)
    lost, won = fields.integers("discordant", 0, n, [2])
    if abs(drop - 100 * (lost - won) / n) > 1e-6:
        raise fields.wrong("top1_drop_points", drop, f"100 (lost - won) / n, which is {100 * (lost - won) / n:.6g}")
    both = correct - won
    neither = n - both - lost - won
    if both < 0 or neither < 0:
        raise fields.wrong("discordant", [lost, won], f"what {correct} of {n} correct images allow")
    ends = [100 * end for end in paired_difference_interval(both, lost, won, neither)]
    _check_computed(fields, "ci95", interval(fields, "ci95", -100, 100), ends)
    _check_computed(fields, "mcnemar_p", [number(fields, "mcnemar_p", 0, 1)], [mcnemar_p(lost, won)])


def _check_computed(fields: Fields, key: str, given: Sequence[float], expected: Sequence[float]) -> None:
    """Refuse figures that do not follow from the measurements beside them."""
    if not all(math.isclose(*pair, rel_tol=1e-6, abs_tol=1e-9) for pair in zip(given, expected, strict=True)):
        raise fields.wrong(
            key, list(given), f"what the measurements give, {[float(f'{value:.6g}') for value in expected]}"
        )


def _check_latency(fields: Fields, rounds: int) -> None:
    if is_null(fields, "latency"):
        return
    latency = fields.fields("latency")
    samples = latency.value.get("samples_ms")
    if not isinstance(samples, list) or len(samples) != rounds or not all(map(_are_latencies, samples)):
        raise latency.wrong("samples_ms", samples, f"{rounds} lists, none empty, of numbers above 0, in ms")
    for key, value in describe(samples).items():
        given = number(latency, key, 0, MAX_COUNT)
        if not math.isclose(given, value, rel_tol=1e-6, abs_tol=1e-9):
            raise latency.wrong(key, given, f"that of the samples, {value:.6g}")
    if not is_null(latency, "p50_ci95"):
        if (expected := p50_interval(samples)) is None:
            raise latency.wrong("p50_ci95", latency.value["p50_ci95"], "null for so few rounds")
        _check_computed(latency, "p50_ci95", interval(latency, "p50_ci95", 0, MAX_MS), expected)
    label(latency, "timer")


def _are_latencies(values: object) -> bool:
    if not isinstance(values, list) or not values:
        return False
    return all(type(value) in {int, float} and 0 < value <= MAX_MS for value in values)


def _check_costs(fields: Fields) -> None:
    """Everything but latency and accuracy: each is an object, or null where it was not measured."""
    limits = {
        "parity": {
            "cosine_min": (-1, 1),
            "cosine_mean": (-1, 1),
            "max_abs_error": (0, 1e300),
            "top1_agreement": (0, 1),
        },
        "cold_start": dict.fromkeys(("import_ms", "load_ms", "first_inference_ms"), (0, MAX_MS)),
        "preprocess_ms": {"p50": (0, MAX_MS)},
        "memory": {"peak_rss_mib": (0, MAX_COUNT)},
        "placement": {"int8_mac_share": (0, 1), "int8_macs": (0, MAX_COUNT), "total_macs": (0, MAX_COUNT)},
    }
    for key, ranges in limits.items():
        if not is_null(fields, key):
            part = fields.fields(key)
            for each, (low, high) in ranges.items():
                optional_number(part, each, low, high)
    fields.integer("size_bytes", 0, MAX_COUNT)
    if not is_null(fields, "parity"):
        fields.fields("parity").integer("n", 1, MAX_COUNT)
    if not is_null(fields, "placement"):
        ops = fields.fields("placement").fields("ops")
        if len(ops.value) > 10_000 or not all(key.isprintable() and len(key) <= 200 for key in ops.value):
            raise ops.wrong("ops", list(ops.value), "at most 10000 short names")
        for key in ops.value:
            ops.integer(key, 0, MAX_COUNT)


def _check_validity(fields: Fields) -> None:
    reasons = fields.texts("invalid_reasons")
    if len(reasons) > MAX_KEYS or not all(len(reason) <= MAX_TEXT and reason.isprintable() for reason in reasons):
        raise fields.wrong("invalid_reasons", list(reasons), f"at most {MAX_KEYS} short texts")
    valid = fields.value.get("valid")
    if type(valid) is not bool or valid == bool(reasons):
        raise fields.wrong("valid", valid, "true without invalid_reasons, false with some")
