"""``midge profile``: one record for each variant and number of threads, measured by turns in fresh processes.

Accuracy first, then the rounds of the latency; the records are written when all of it is there, each atomically, so an
interrupted run leaves none. The latency's protocol stands in :mod:`.latency`.
"""

from __future__ import annotations

import json
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import __version__
from ..runtime import coreml_backend
from ..runtime.artifact import RUNTIMES, Artifact, load_artifact, variant_runtime
from ..runtime.backend import PACKAGES, missing_packages, why_not_on_this_machine
from ..runtime.errors import UserError, unknown_name
from ..runtime.files import sha256_file
from ..runtime.images import ImageList, list_images
from ..runtime.progress import say
from .accuracy import Predictions, accuracy_json, predict_all, why_no_accuracy
from .child import TRANSPORTS, Children
from .config import ProfileConfig
from .display import runtime_name, shown
from .environment import choose_cpus, describe_device
from .latency import PROTOCOLS
from .record import SCHEMA, record_path, refuse_existing_records, write_record
from .rounds import Cell, find_faults, measure, measured_json, pick_images, write_inputs
from .table import WIDTH, plain

Json = dict[str, Any]


def profile(config: ProfileConfig) -> int:
    """Run the command.

    Returns:
        0, or 1 where a record is invalid because of what was measured.

    Raises:
        UserError: an artifact, the images or a value of the configuration is not usable, or a measurement failed.
    """
    config.check()
    artifacts = load_artifacts(config.artifacts)
    images = None if config.data is None else list_images(config.data, config.limit, config.seed)
    device = describe_device()
    cells = choose_cells(artifacts, config.variants, config.threads)
    paths = [
        record_path(config.out, device["id"], cell.artifact.name, cell.variant, cell.runtime, cell.threads)
        for cell in cells
    ]
    refuse_existing_records(paths, config.overwrite)
    with stopped_by_sigterm(), TRANSPORTS[config.on]() as children:
        predictions = {
            artifact.name: count_accuracy(artifact, cells, images, children, config) for artifact in artifacts
        }
        measure_all(cells, images, children, config)
    session = {
        "created_utc": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "midge": __version__,
        "session": secrets.token_hex(8),
    }
    records, faulty = [], False
    for cell, path in zip(cells, paths, strict=True):
        counted = predictions[cell.artifact.name]
        record, faults = build_record(cell, device, counted, config.protocol)
        faulty = faulty or bool(faults)
        records.append({**record, **session})
        write_record(path, records[-1], None if isinstance(counted, str) else counted.classes[cell.variant])
    print_records(records, paths, config)
    return int(faulty)


def load_artifacts(paths: Sequence[Path]) -> list[Artifact]:
    """Read and check the artifacts.

    Raises:
        UserError: one is damaged, takes several images at a time, or has the name of another.
    """
    artifacts = [load_artifact(path) for path in paths]
    for index, artifact in enumerate(artifacts):
        if artifact.input_shape[0] != 1:
            batch = artifact.input_shape[0]
            raise UserError(f"The artifact '{artifact.path}' takes {batch} images at a time: only 1 can be measured.")
        if twin := next((other for other in artifacts[:index] if other.name == artifact.name), None):
            raise UserError(
                f"The artifacts '{twin.path}' and '{artifact.path}' are both named '{artifact.name}': "
                "profile them into different folders."
            )
    return artifacts


def choose_cells(artifacts: Sequence[Artifact], variants: Sequence[str] | None, threads: Sequence[int]) -> list[Cell]:
    """What is measured: every chosen variant of every artifact that can run here, with every number of threads.

    Raises:
        UserError: a variant is in no artifact, none can run here, or there are fewer cores than threads.
    """
    known = {name for artifact in artifacts for name in artifact.variants}
    for name in variants or ():
        if name not in known:
            raise unknown_name("variant", name, known)
    chosen = [(a, name) for a in artifacts for name in a.variants if variants is None or name in variants]
    reasons = {name: reason for _, name in chosen if (reason := why_not_here(name))}
    for name, reason in reasons.items():
        say(f"Skipped {name}: {reason}.")
    if len(reasons) == len({name for _, name in chosen}):
        raise UserError(f"No variant can run here: {'; '.join(dict.fromkeys(reasons.values()))}.")
    cpus = {number: choose_cpus(number) for number in dict.fromkeys(threads)}
    marks = {artifact.name: sha256_file(artifact.path / "manifest.json") for artifact in artifacts}
    return [
        Cell(artifact, marks[artifact.name], name, number, cpus[number])
        for number in cpus
        for artifact, name in chosen
        if name not in reasons
    ]


def why_not_here(variant: str) -> str | None:
    """The reason for which a variant's runtime cannot be used, naming the extra that brings it; None where it can."""
    if variant.partition("-")[0] not in RUNTIMES:
        return "this midge knows no runtime for it"
    runtime = variant_runtime(variant)
    if runtime == "coreml" and not coreml_backend.NATIVE:
        return "Core ML runs on macOS only, and the reference interpreter's time is not its"
    missing = missing_packages(runtime)
    if missing:
        return f"{missing[0]} is not installed (pip install 'midge[{PACKAGES[runtime][1]}]')"
    return why_not_on_this_machine(runtime)


def count_accuracy(
    artifact: Artifact, cells: Sequence[Cell], images: ImageList | None, children: Children, config: ProfileConfig
) -> Predictions | str:
    """What the artifact's variants make of the images, or the reason for which that is not known."""
    if reason := why_no_accuracy(artifact, images):
        if images is not None:
            say(f"No accuracy of {artifact.name}: {reason}.")
        return reason
    assert images is not None
    variants = list(dict.fromkeys(cell.variant for cell in cells if cell.artifact is artifact))
    return predict_all(artifact, variants, images, children, config.max_unreadable)


def measure_all(cells: Sequence[Cell], images: ImageList | None, children: Children, config: ProfileConfig) -> None:
    """Run the rounds of all cells, with real images as input where there are some."""
    with tempfile.TemporaryDirectory(prefix="midge-") as folder:
        sample = pick_images(images, config.seed, Path(folder))
        inputs: dict[str, Path] = {}
        for cell in cells:
            if cell.manifest_sha256 not in inputs:
                inputs[cell.manifest_sha256] = Path(folder) / f"{len(inputs)}.npy"
                write_inputs(inputs[cell.manifest_sha256], cell.artifact, sample)
        measure(cells, config.protocol, inputs, sample, children)


def build_record(cell: Cell, device: Json, counted: Predictions | str, protocol: str) -> tuple[Json, list[str]]:
    """The record of a cell without time and session, and the measured reasons for which it is invalid."""
    if isinstance(counted, str):
        accuracy: Json = {"top1": None, "reason": counted}
        faults = find_faults(cell, protocol, 0, 0)
    else:
        accuracy = accuracy_json(counted, cell.variant)
        faults = find_faults(cell, protocol, accuracy["not_finite"], accuracy["n"])
    short = [f"the protocol {protocol} is too short for a comparison"] if PROTOCOLS[protocol].too_short else []
    variant = cell.artifact.variants[cell.variant]
    return {
        "schema": SCHEMA,
        "artifact": {
            "name": cell.artifact.name,
            "manifest_sha256": cell.manifest_sha256,
            "kind": cell.artifact.kind,
        },
        "variant": cell.variant,
        "variant_sha256": variant.sha256,
        "runtime": cell.runtime,
        "threads": cell.threads,
        "device": device,
        "accuracy": accuracy,
        **measured_json(cell, protocol),
        "size_bytes": variant.size_bytes,
        "energy": None,
        "energy_reason": "this midge reads no power sensor",
        "valid": not faults and not short,
        "invalid_reasons": [*faults, *short],
    }, faults


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the work like Ctrl-C, so that no child and no temporary file is left."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_records(records: Sequence[Json], paths: Sequence[Path], config: ProfileConfig) -> None:
    """Print what was measured and where it is: a table, or with ``--json`` one document."""
    if config.json:
        listed = [{"path": str(path), **_short(record)} for record, path in zip(records, paths, strict=True)]
        print(json.dumps({"schema": SCHEMA, "records": listed}, allow_nan=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("variant", overflow="fold", min_width=13)
    table.add_column("runtime", overflow="fold")
    for name in ("thr", "top-1 %", "p50 ms", "95 % int.", "p90 ms", "INT8\nMACs %", "valid"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        short = _short(record)
        interval = record["latency"]["p50_ci95"]
        table.add_row(
            plain(record["variant"]),
            runtime_name(record["runtime"]),
            str(record["threads"]),
            shown(short["top1"], "percent"),
            shown(short["p50_ms"], "ms"),
            f"{shown(interval[0], 'ms')}–{shown(interval[1], 'ms')}" if interval else "–",
            shown(record["latency"]["p90_ms"], "ms"),
            shown(record["placement"]["int8_mac_share"], "share"),
            "yes" if record["valid"] else "no",
        )
    console.print(table)
    for reason in dict.fromkeys(reason for record in records for reason in record["invalid_reasons"]):
        names = ", ".join(dict.fromkeys(r["variant"] for r in records if reason in r["invalid_reasons"]))
        console.print(plain(f"Not valid: {names}: {reason}."), soft_wrap=True)
    for folder in dict.fromkeys(path.parent for path in paths):
        console.print(plain(f"Records: {folder}"), soft_wrap=True)


def _short(record: Json) -> Json:
    """The figures of a record that a glance asks for."""
    return {
        "artifact": record["artifact"]["name"],
        **{key: record[key] for key in ("variant", "runtime", "threads")},
        "top1": record["accuracy"]["top1"],
        "p50_ms": record["latency"]["p50_ms"],
        **{key: record[key] for key in ("valid", "invalid_reasons")},
    }
