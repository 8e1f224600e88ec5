from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from midge.profiles.sensors import find_throttling, read_sensors, trace


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def reading(**values: Any) -> dict[str, Any]:
    return {"clock_mhz": None, "temperature_c": None, "throttle_events": None, "throttled": None, **values}


def test_what_the_system_shows_is_read(tmp_path: Path) -> None:
    zone = "sys/class/thermal/thermal_zone"
    root = tree(
        tmp_path,
        {
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
            "sys/devices/system/cpu/cpu2/cpufreq/scaling_cur_freq": "1800000\n",
            "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "3\n",
            "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": "4\n",
            f"{zone}0/temp": "51000\n",
            f"{zone}0/trip_point_0_type": "critical\n",
            f"{zone}0/trip_point_0_temp": "40000\n",
            f"{zone}1/temp": "63500\n",
            f"{zone}1/trip_point_1_type": "passive\n",
            f"{zone}1/trip_point_1_temp": "85000\n",
            f"{zone}2/temp": "-274000\n",
            f"{zone}3/temp": "no number\n",
        },
    )
    found = read_sensors([1, 2], root)
    assert found == {"clock_mhz": 2100.0, "temperature_c": 63.5, "throttle_events": 7, "throttled": False}
    (root / f"{zone}1/temp").write_text("85000")
    assert read_sensors([1, 2], root)["throttled"] is True


@pytest.mark.parametrize(("flags", "throttled"), [("0x50000", False), ("50005", True), ("e0008", True), ("0", False)])
def test_a_raspberry_pi_says_so_itself(tmp_path: Path, flags: str, throttled: bool) -> None:
    root = tree(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": flags + "\n"})
    assert read_sensors(None, root)["throttled"] is throttled


def test_nothing_readable_is_null_with_a_reason(tmp_path: Path) -> None:
    assert read_sensors([0], tmp_path) == reading()
    assert trace([reading(), reading()]) == {
        "clock_mhz": None,
        "temperature_c": None,
        "reason": "this system shows no clock and no temperature",
    }
    assert trace([reading(temperature_c=50.0), reading()]) == {
        "clock_mhz": None,
        "temperature_c": [50.0, None],
        "reason": "this system shows no clock",
    }


def test_throttling_is_told_from_a_steady_run() -> None:
    cool = reading(clock_mhz=2000.0, throttle_events=5, throttled=False)
    assert find_throttling([(cool, {**cool, "clock_mhz": 1900.0})] * 4) is None
    assert find_throttling([(reading(), reading())]) is None
    for change, message in {
        "clock_mhz": (1700.0, "the clock fell from 2000 to 1700 MHz"),
        "throttle_events": (7, "2 throttling events"),
        "throttled": (True, "at its temperature limit"),
    }.items():
        value, text = message
        assert text in (find_throttling([(cool, cool), (cool, {**cool, change: value})]) or "")
