from __future__ import annotations

import json
from pathlib import Path

import pytest

from midge.train import metrics_file
from midge.train.metrics_file import Metrics, read_metrics


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_series_are_what_is_numeric_sparse_and_unknown_ones_too(tmp_path: Path) -> None:
    path = write(
        tmp_path / "metrics.jsonl",
        {"step": 9, "epoch": 0.5, "loss": 5.5, "note": "text", "flag": True, "list": [1]},
        {"step": 19, "epoch": 1.0, "loss": 5, "knn_top1": 0.25, "loss_of_mine": 1e300},
    )
    metrics = read_metrics(path)
    assert metrics.series == {
        "loss": ([9, 19], [5.5, 5.0]),
        "knn_top1": ([19], [0.25]),
        "loss_of_mine": ([19], [1e300]),
    }
    assert (metrics.epoch, metrics.last["step"], metrics.damaged) == (1.0, 19, 0)


def test_a_line_that_is_being_written_is_left_for_later(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 1.0}, '{"step": 2, "loss": 0.')
    assert read_metrics(path).last == {"step": 1, "loss": 1.0}
    assert read_metrics(path).damaged == 0


@pytest.mark.parametrize("content", [None, "", "\n", '{"step": 1'])
def test_nothing_logged_yet(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    assert read_metrics(path) == Metrics()


def test_damaged_lines_are_counted_and_passed_over(tmp_path: Path) -> None:
    damaged = ["null\n", "[1]\n", "no json\n", '{"step": "1"}\n', '{"step": -1}\n', '{"loss": 1}\n', "[" * 9999 + "\n"]
    path = write(tmp_path / "metrics.jsonl", *damaged, {"step": 3, "loss": float("nan"), "lr": 1, "huge": 10**400})
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n")
    metrics = read_metrics(path)
    assert metrics.damaged == len(damaged) + 1
    assert metrics.series == {"lr": ([3], [1.0])}


def test_of_a_step_logged_twice_the_later_line_holds(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", *({"step": step, "loss": step + i} for i, step in enumerate((1, 5, 2, 5))))
    assert read_metrics(path).series["loss"] == ([1, 2, 5], [1.0, 4.0, 8.0])


def test_of_a_long_file_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "metrics.jsonl", *({"step": step, "loss": 1.5} for step in range(100)))
    monkeypatch.setattr(metrics_file, "MAX_BYTES", 1000)
    metrics = read_metrics(path)
    steps = metrics.series["loss"][0]
    assert steps == list(range(steps[0], 100)) and 20 < len(steps) < 60
    assert metrics.damaged == 0
