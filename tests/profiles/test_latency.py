from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Callable, Iterator
from itertools import chain, repeat

import numpy as np
import pytest

from midge.profiles.latency import (
    PROTOCOLS,
    Round,
    is_steady,
    latency_faults,
    latency_json,
    protocol_json,
    round_of,
    time_runs,
    trend,
    warm_up,
)
from midge.runtime.errors import UserError
from midge.runtime.fields import Fields

PLAN = Round(min_runs=20, min_s=0.1, warmup_min_runs=10, warmup_min_s=1.0, warmup_max_s=5.0)


class Machine:
    """A clock that moves only while something runs, by the given milliseconds, run by run."""

    def __init__(self, latencies_ms: Iterator[float]) -> None:
        self.now = 1_000_000
        self.latencies_ms = latencies_ms
        self.indices: list[int] = []

    def clock(self) -> int:
        return self.now

    def run(self, index: int) -> None:
        self.indices.append(index)
        self.now += round(next(self.latencies_ms) * 1e6)


def test_the_protocols_are_those_that_were_promised() -> None:
    for name, runs, seconds in (("quick", 64, 6.0), ("standard", 200, 10.0), ("rigorous", 1024, 60.0)):
        protocol, plan = PROTOCOLS[name], round_of(PROTOCOLS[name])
        assert (protocol.min_runs, protocol.min_s) == (runs, seconds)
        assert protocol.rounds >= 4 and not protocol.too_short
        assert plan.min_runs * protocol.rounds >= runs and plan.min_s * protocol.rounds >= seconds
        assert plan.warmup_min_runs >= 10 and plan.warmup_min_s >= 1
    assert PROTOCOLS["smoke"].too_short
    assert protocol_json("quick", [1], "x")["pinned_cpus"] == [1]


def test_warm_up_waits_for_runs_and_for_seconds() -> None:
    slow = Machine(repeat(300.0))
    assert warm_up(slow.run, PLAN, slow.clock) == {"runs": 10, "seconds": 3.0, "steady": True}
    quick = Machine(repeat(1.0))
    assert warm_up(quick.run, PLAN, quick.clock) == {"runs": 1000, "seconds": 1.0, "steady": True}
    assert quick.indices == list(range(1000))


def test_warm_up_goes_on_while_the_latency_falls_and_gives_up_at_the_limit() -> None:
    falling = Machine(chain((5.0 * 0.998**i for i in range(1000)), repeat(5.0 * 0.998**1000)))
    result = warm_up(falling.run, PLAN, falling.clock)
    assert result["steady"] and 1.2 < result["seconds"] < 5
    never = Machine(3.0 * 1.002**i for i in range(10_000))
    result = warm_up(never.run, PLAN, never.clock)
    assert not result["steady"] and result["seconds"] == pytest.approx(5.0, abs=0.1)


def test_steadiness_looks_at_the_last_two_quarters() -> None:
    assert is_steady([9, 9, 9, 9, 1, 1, 1.04, 1.04])
    assert not is_steady([1, 1, 1, 1, 1, 1, 1.06, 1.06])
    assert not is_steady([1, 1, 1, 1, 1.06, 1.06, 1, 1])
    assert is_steady([1.0, 5.0, 9.0])


def test_runs_are_timed_until_both_limits_are_reached() -> None:
    slow = Machine(repeat(50.0))
    assert time_runs(slow.run, PLAN, slow.clock) == [50.0] * 20
    quick = Machine(repeat(0.5))
    assert time_runs(quick.run, PLAN, quick.clock) == [0.5] * 200
    uneven = Machine(chain([0.25, 80.0], repeat(1.0)))
    assert time_runs(uneven.run, PLAN, uneven.clock)[:3] == [0.25, 80.0, 1.0]  # none dropped, in order


def test_the_collector_is_off_while_runs_are_timed_and_on_again_after_an_error() -> None:
    states: list[bool] = []
    time_runs(lambda index: states.append(gc.isenabled()), dataclasses.replace(PLAN, min_s=0.0))
    assert states == [False] * 20 and gc.isenabled()

    def fail(index: int) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        time_runs(fail, PLAN)
    assert gc.isenabled()


def test_a_clock_too_coarse_gives_no_zero() -> None:
    still = Machine(repeat(0.0))
    assert min(time_runs(still.run, dataclasses.replace(PLAN, min_s=0.0), still.clock)) > 0


def test_the_plan_of_a_round_is_checked() -> None:
    assert Round.from_json(Fields(PLAN.to_json(), "job")) == PLAN
    for key, value in (("min_runs", 0), ("min_s", float("nan")), ("warmup_max_s", "5"), ("warmup_min_runs", True)):
        with pytest.raises(UserError, match=key):
            Round.from_json(Fields({**PLAN.to_json(), key: value}, "job"))


def samples(changes: Callable[[int, np.ndarray], np.ndarray], num_rounds: int = 4) -> list[list[float]]:
    rng = np.random.default_rng(0)
    rounds = [1500 / 500 * (1 + rng.gamma(2.0, 0.02, 600)) for _ in range(num_rounds)]
    return [changes(index, part).tolist() for index, part in enumerate(rounds)]


def test_a_trend_within_the_rounds_makes_a_record_invalid_and_one_between_them_does_not() -> None:
    steady = samples(lambda index, part: part)
    assert latency_faults(steady, "quick") == [] and abs(trend(steady)) < 0.02
    drifting = samples(lambda index, part: part * (1 + 0.2 * index))
    assert latency_faults(drifting, "quick") == []
    one_bad = samples(lambda index, part: part * np.linspace(1, 2, 600) if index == 2 else part)
    assert latency_faults(one_bad, "quick") == []
    heating = samples(lambda index, part: part * np.linspace(1, 1.3, 600))
    assert re.search("became 1[34]% slower", latency_faults(heating, "quick")[0])
    warming = samples(lambda index, part: part * np.linspace(1.3, 1, 600))
    assert "faster" in latency_faults(warming, "quick")[0]


def test_too_few_runs_make_a_record_invalid() -> None:
    steady = samples(lambda index, part: part)
    for few in (steady[:3], [part[:10] for part in steady], [part[:200] for part in steady]):
        assert "too few runs" in latency_faults(few, "quick")[0]
    assert latency_faults([part[:10] for part in steady], "smoke") == []


def test_the_latency_of_a_record() -> None:
    steady = samples(lambda index, part: part)
    found = latency_json(steady)
    assert found["samples_ms"] == steady and found["n"] == 2400 and found["timer"] == "perf_counter_ns"
    assert found["p50_ci95"][0] < found["p50_ms"] < found["p50_ci95"][1]
    assert latency_json(steady[:2])["p50_ci95"] is None
