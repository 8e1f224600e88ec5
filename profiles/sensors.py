"""Clocks and temperatures around a measurement, and whether the device slowed itself down meanwhile (Linux).

They are read before and after the timed runs, never between two of them. Not every machine shows them: a virtual one
usually shows none, and then that is what the record says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]

ROOT = Path("/")
SLOWER = 0.9  # a clock that ends below this share of where it began has been lowered
PI_THROTTLED_NOW = 0b1110  # frequency capped, throttled, soft temperature limit; documented with vcgencmd get_throttled


def read_sensors(cpus: Iterable[int] | None, root: Path = ROOT) -> Json:
    """One reading.

    Args:
        cpus: the cores that a measurement is pinned to.
        root: where ``sys`` lies.

    Returns:
        ``clock_mhz`` (mean over the cores), ``temperature_c`` (of the hottest zone), ``throttle_events`` (counted since
        the start of the system) and ``throttled`` (a zone is at its passive trip point, or the firmware says so); each
        None where nothing is readable.
    """
    cpu_dir = root / "sys/devices/system/cpu"
    clocks = [_number(cpu_dir / f"cpu{cpu}/cpufreq/scaling_cur_freq") for cpu in cpus or ()]
    clocks = [clock / 1000 for clock in clocks if clock]
    counters = [
        _number(cpu_dir / f"cpu{cpu}/thermal_throttle/{name}_throttle_count")
        for cpu in cpus or ()
        for name in ("core", "package")
    ]
    counters = [count for count in counters if count is not None]
    zones = [_zone(zone) for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*"))]
    zones = [zone for zone in zones if zone is not None]
    states = [hot for _, hot in zones if hot is not None]
    firmware = _number(root / "sys/devices/platform/soc/soc:firmware/get_throttled", base=16)
    if firmware is not None:
        states.append(bool(firmware & PI_THROTTLED_NOW))
    return {
        "clock_mhz": sum(clocks) / len(clocks) if clocks else None,
        "temperature_c": max((celsius for celsius, _ in zones), default=None),
        "throttle_events": sum(counters) if counters else None,
        "throttled": any(states) if states else None,
    }


def trace(readings: Sequence[Json]) -> Json:
    """What a record says of all readings of a measurement.

    Args:
        readings: before and after the timed runs of each round.

    Returns:
        ``clock_mhz`` and ``temperature_c``, one value per reading, or None for both with a ``reason``.
    """
    values = {key: [reading[key] for reading in readings] for key in ("clock_mhz", "temperature_c")}
    known = {key: each if any(value is not None for value in each) else None for key, each in values.items()}
    missing = [name for key, name in (("clock_mhz", "clock"), ("temperature_c", "temperature")) if known[key] is None]
    return {**known, "reason": f"this system shows no {' and no '.join(missing)}" if missing else None}


def find_throttling(pairs: Sequence[tuple[Json, Json]]) -> str | None:
    """Why a measurement counts as throttled, or None.

    Args:
        pairs: the readings before and after the timed runs of each round.
    """
    for before, after in pairs:
        if before["throttled"] or after["throttled"]:
            return "throttled: the device was at its temperature limit"
        events = [reading["throttle_events"] for reading in (before, after)]
        if None not in events and events[1] > events[0]:
            return f"throttled: {events[1] - events[0]} throttling events were counted"
        clocks = [reading["clock_mhz"] for reading in (before, after)]
        if None not in clocks and clocks[1] < SLOWER * clocks[0]:
            return f"throttled: the clock fell from {clocks[0]:.0f} to {clocks[1]:.0f} MHz"
    return None


def _zone(zone: Path) -> tuple[float, bool | None] | None:
    """Temperature of a thermal zone, °C, and whether it is at its passive trip point, where it has one."""
    millidegrees = _number(zone / "temp")
    if millidegrees is None or not -40_000 <= millidegrees <= 200_000:
        return None
    trips = []
    for kind in sorted(zone.glob("trip_point_*_type")):
        if _text(kind) == "passive":
            limit = _number(zone / kind.name.replace("_type", "_temp"))
            trips += [limit] if limit and limit > 0 else []
    return millidegrees / 1000, millidegrees >= min(trips) if trips else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # absent, or present and refusing to be read
        return None


def _number(path: Path, base: int = 10) -> int | None:
    text = _text(path)
    pattern = r"(0x)?[0-9a-fA-F]+" if base == 16 else r"-?[0-9]+"
    return int(text, base) if text and re.fullmatch(pattern, text) else None
