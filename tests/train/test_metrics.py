import json
from typing import Any

import numpy as np
import pytest
import torch

from midge.runtime.errors import UserError
from midge.runtime.progress import Bar
from midge.train.method import Losses
from midge.train.metrics import CollapseWatch, MetricsLog, drop_lines_from, feature_std, rankme

pytestmark = pytest.mark.usefixtures("one_thread")


class Batches:
    """What a log asks of a data set."""

    steps_per_epoch = 8
    batch_size = 4


def losses(total, spread=1.0):
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(8, 5, generator=generator) * spread
    return Losses(torch.tensor(total, requires_grad=True), torch.tensor(total + 1), torch.tensor(total - 1), embeddings)


def make_log(path, step=0):
    board = []
    data: Any = Batches()
    watch = CollapseWatch(stop=False, cause="Try again.")
    bar = Bar("test", 10)
    log = MetricsLog(path, step, data, bar, lambda values, at: board.append((at, values)), watch)
    return log, board


def take(log, step, total, lr, every_steps=2):
    log.add(losses(total))
    log.end_step()
    if (step + 1) % every_steps == 0:
        log.flush(step, lr)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_means_over_their_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log, board = make_log(path)
    for step, _ in enumerate(log.waiting(range(5))):
        take(log, step, float(step), lr=np.float64(step / 10))
    log.flush(4, 0.4)
    lines = read(path)
    assert [line["step"] for line in lines] == [1, 3, 4]
    assert [line["loss"] for line in lines] == [0.5, 2.5, 4.0]
    assert [line["loss_global"] for line in lines] == [1.5, 3.5, 5.0]
    assert [line["loss_local"] for line in lines] == [-0.5, 1.5, 3.0]
    assert [line["lr"] for line in lines] == [0.1, 0.3, 0.4]
    assert [line["epoch"] for line in lines] == [0.25, 0.5, 0.625]
    assert all(line["images_per_s"] > 0 and 0 <= line["data_wait_percent"] <= 100 for line in lines)
    assert [at for at, _ in board] == [1, 3, 4]
    assert log.last == lines[-1]
    log.flush(4, 0.4)
    assert len(read(path)) == 3  # no step since then


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_its_step(tmp_path, value):
    log, _ = make_log(tmp_path / "metrics.jsonl", step=10)
    for step, total in enumerate([3.0, 3.0, value, value], 10):
        take(log, step, total, 0.1, every_steps=5)
    with pytest.raises(UserError, match=r"not finite at step 12: .*--base-lr"):
        take(log, 14, value, 0.1, every_steps=5)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_portions_of_a_step_count_once(tmp_path):
    log, _ = make_log(tmp_path / "metrics.jsonl")
    for total in (1.0, 2.0, 6.0):
        log.add(losses(total))
    log.end_step()
    take(log, 1, 5.0, 0.1)
    assert read(tmp_path / "metrics.jsonl")[0]["loss"] == 4  # of 3 and 5


def test_more_numbers_stand_in_the_line(tmp_path):
    log, board = make_log(tmp_path / "metrics.jsonl")
    log.add(losses(1.0))
    log.end_step()
    log.flush(0, 0.1, knn_top1=0.5)
    assert read(tmp_path / "metrics.jsonl")[0]["knn_top1"] == board[0][1]["knn_top1"] == 0.5


def test_collapse_is_said_once_or_ends_the_run(capsys):
    said = CollapseWatch(stop=False, cause="Lower it.")
    for step in range(6):
        said(step, 0.001, 40.0)
    told = capsys.readouterr().err
    assert told.count("collapsed by step 2") == told.count("collapsed") == 1
    assert "Lower it." in told
    ended = CollapseWatch(stop=True, cause="Lower it.")
    for step in range(2):
        ended(step, 0.9, 1.2)
    ended(2, 0.9, 30.0)  # a good line between: it starts anew
    for step in range(3, 5):
        ended(step, 0.9, 1.2)
    with pytest.raises(UserError, match=r"collapsed by step 5: .* 1\.2 effective dimensions"):
        ended(5, 0.9, 1.2)


def test_lines_from_the_resumed_step_on_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 5}\n{"st')
    drop_lines_from(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    drop_lines_from(path, 0)
    assert path.read_text() == ""


def test_a_damaged_line_takes_no_good_one_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\0\n{"step": 3}\n{"step": 5}\n')
    drop_lines_from(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_that_was_not_finished_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 3}')
    drop_lines_from(path, 9)
    assert path.read_text() == '{"step": 1}\n'


def test_feature_std_tells_collapse_from_spread():
    generator = torch.Generator().manual_seed(0)
    assert feature_std(torch.ones(16, 8)) == 0
    assert feature_std(torch.randn(4096, 64, generator=generator)) == pytest.approx(1, abs=0.01)
    assert 0 < feature_std(torch.ones(64, 8) + 0.1 * torch.randn(64, 8, generator=generator)) < 0.2


def test_rankme_is_the_number_of_equal_directions():
    assert rankme(torch.ones(16, 8)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(8).repeat(4, 1)) == pytest.approx(8, abs=1e-3)
    assert rankme(torch.eye(8)[:3].repeat(4, 1)) == pytest.approx(3, abs=1e-3)
    singular = np.array([5.0, 2.0, 1.0])
    shares = singular / singular.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert rankme(torch.diag(torch.tensor(singular))) == pytest.approx(expected, rel=1e-4)
