"""How a latency is measured: the protocols, the timed loop of the child process, and what becomes of its samples.

* One inference at a time, batch 1 (MLPerf's single-stream): a preprocessed float32 image in, the outputs as a numpy
  array out. Decoding, resizing and normalizing are not part of it. The clock is ``time.perf_counter_ns``.
* Every round of every variant runs in a fresh process, pinned to as many cores as it has threads. The rounds go through
  all variants by turns, every other round in reverse, so that what the machine does meanwhile meets all of them.
  The process that starts them keeps off their cores where there are others.
* Each process first warms up: at least so many runs and so many seconds, and on until two successive quarters of the
  latest runs have medians within 5 % of each other, but not longer than a limit.
* Then runs are timed until both a number and a sum of their times are reached. All samples are kept, in order.
* Percentiles are of all rounds together, by linear interpolation; intervals are those of :mod:`.statistics`.
* A measurement is not steady where, in the median round, the second half of the samples is more than 5 % slower or
  faster than the first.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..runtime.fields import Fields
from .record import number
from .statistics import Samples, describe, p50_interval

Json = dict[str, Any]
Run = Callable[[int], object]
Clock = Callable[[], int]

STEADY = 0.05
CHECK_EVERY_S = 0.25
BATCH = 1
TIMER = "perf_counter_ns"


@dataclass(frozen=True)
class Protocol:
    """How long to measure a variant.

    Attributes:
        rounds: processes of each variant; the numbers of runs and seconds below that are of a round are so marked.
        min_runs: timed runs over all rounds.
        min_s: time of the timed runs over all rounds, s.
        warmup_min_runs: runs before the first timed one, in each round.
        warmup_min_s: seconds before the first timed run, in each round.
        warmup_max_s: seconds after which a round stops waiting for a steady state.
        too_short: whether the records are invalid for that reason alone.
    """

    rounds: int
    min_runs: int
    min_s: float
    warmup_min_runs: int = 10
    warmup_min_s: float = 1.0
    warmup_max_s: float = 5.0
    too_short: bool = False


PROTOCOLS = {
    "smoke": Protocol(2, 16, 0.0, warmup_min_runs=2, warmup_min_s=0.0, warmup_max_s=0.2, too_short=True),
    "quick": Protocol(4, 64, 6.0),
    "standard": Protocol(5, 200, 10.0),
    "rigorous": Protocol(6, 1024, 60.0, warmup_max_s=20.0),
}


@dataclass(frozen=True)
class Round:
    """What the child process of one round has to do: the protocol, divided by its rounds.

    Attributes:
        min_runs: timed runs.
        min_s: time of the timed runs, s.
        warmup_min_runs: untimed runs.
        warmup_min_s: their time, s.
        warmup_max_s: the time after which they end in any case, s.
    """

    min_runs: int
    min_s: float
    warmup_min_runs: int
    warmup_min_s: float
    warmup_max_s: float

    def to_json(self) -> Json:
        """All fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Fields) -> Round:
        """Read what :meth:`to_json` wrote; it may be hostile.

        Raises:
            UserError: a field is missing or out of range.
        """
        return cls(
            min_runs=fields.integer("min_runs", 1, 10**9),
            min_s=number(fields, "min_s", 0, 1e6),
            warmup_min_runs=fields.integer("warmup_min_runs", 0, 10**9),
            warmup_min_s=number(fields, "warmup_min_s", 0, 1e6),
            warmup_max_s=number(fields, "warmup_max_s", 0, 1e6),
        )


def round_of(protocol: Protocol) -> Round:
    """The share of one round."""
    return Round(
        min_runs=math.ceil(protocol.min_runs / protocol.rounds),
        min_s=protocol.min_s / protocol.rounds,
        warmup_min_runs=protocol.warmup_min_runs,
        warmup_min_s=protocol.warmup_min_s,
        warmup_max_s=protocol.warmup_max_s,
    )


def protocol_json(name: str, pinned_cpus: Sequence[int] | None, inputs: str) -> Json:
    """The protocol as it stands in a record; ``inputs`` says what the inferences were about."""
    protocol = asdict(PROTOCOLS[name])
    del protocol["too_short"]
    cpus = list(pinned_cpus) if pinned_cpus else None
    return {"name": name, **protocol, "batch": BATCH, "inputs": inputs, "pinned_cpus": cpus}


def warm_up(run: Run, plan: Round, clock: Clock = time.perf_counter_ns) -> Json:
    """Run without timing until the latencies are steady.

    Args:
        run: one inference on the input of the given index.
        plan: its ``warmup_*`` fields say how long.
        clock: nanoseconds.

    Returns:
        ``runs``, ``seconds``, and ``steady``: false where the limit ended it.
    """
    samples: list[int] = []
    begin = checked = clock()
    while True:
        start = clock()
        run(len(samples))
        end = clock()
        samples.append(end - start)
        seconds = (end - begin) / 1e9
        if len(samples) < plan.warmup_min_runs or seconds < plan.warmup_min_s:
            continue
        late = seconds >= plan.warmup_max_s
        if late or len(samples) < 8 or (end - checked) / 1e9 >= CHECK_EVERY_S:
            checked = end
            steady = is_steady(samples)
            if steady or late:
                return {"runs": len(samples), "seconds": seconds, "steady": steady}


def is_steady(samples: Sequence[float]) -> bool:
    """Whether the last quarter of the samples is, in the median, within 5 % of the quarter before it."""
    quarter = len(samples) // 4
    if quarter < 1:
        return True
    before, last = np.median(samples[-2 * quarter : -quarter]), np.median(samples[-quarter:])
    return bool(abs(last - before) <= STEADY * before)


def time_runs(run: Run, plan: Round, clock: Clock = time.perf_counter_ns) -> list[float]:
    """Time runs until there are ``min_runs`` of them that took ``min_s`` together.

    Args:
        run: one inference on the input of the given index.
        plan: how long.
        clock: nanoseconds.

    Returns:
        Every sample in order, ms.
    """
    samples: list[int] = []
    total, enough = 0, plan.min_s * 1e9
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be the harness's own time
    try:
        while len(samples) < plan.min_runs or total < enough:
            start = clock()
            run(len(samples))
            taken = clock() - start
            samples.append(taken)
            total += taken
    finally:
        if collecting:
            gc.enable()
    return [max(sample, 1) / 1e6 for sample in samples]


def latency_json(samples: Samples) -> Json:
    """The latency as it stands in a record; ``trend`` is that of :func:`trend`."""
    interval = p50_interval(samples)
    return {
        **describe(samples),
        "p50_ci95": list(interval) if interval else None,
        "trend": trend(samples),
        "timer": TIMER,
        "samples_ms": [list(part) for part in samples],
    }


def trend(samples: Samples) -> float:
    """How much slower (positive) or faster the second half of a round is than its first, in the median round."""
    halves = [(part[: len(part) // 2], part[len(part) // 2 :]) for part in samples if len(part) > 1]
    ratios = [np.median(second) / np.median(first) for first, second in halves]
    return float(np.median(ratios)) - 1 if ratios else 0.0


def latency_faults(samples: Samples, name: str) -> list[str]:
    """Why samples make a record invalid: too few of them, or no steady state.

    Args:
        samples: rounds of latencies, ms.
        name: of the protocol.
    """
    protocol = PROTOCOLS[name]
    if protocol.too_short:
        return []
    num_runs, seconds = sum(map(len, samples)), sum(map(sum, samples)) / 1e3
    faults = []
    if len(samples) < protocol.rounds or num_runs < protocol.min_runs or seconds < protocol.min_s * (1 - 1e-6):
        wanted = f"{protocol.min_runs} runs and {protocol.min_s:g} s in {protocol.rounds} rounds"
        faults.append(f"too few runs: {num_runs} in {len(samples)} rounds and {seconds:.1f} s, not {wanted}")
    if abs(change := trend(samples)) > STEADY:
        pace = "slower" if change > 0 else "faster"
        faults.append(f"not steady: within a round the runs became {abs(change):.0%} {pace}")
    return faults
