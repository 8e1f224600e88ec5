from __future__ import annotations

import pytest

from midge.runtime import progress


def test_short_work_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_long_work_logs_plain_lines_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Bar("epoch 1", total=4) as bar:
        for _ in range(4):
            now[0] += 6
            bar.advance(note="loss 1.0")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["epoch 1: 2/4 in 12 s loss 1.0", "epoch 1: 4/4 in 24 s loss 1.0"]


def test_say_writes_one_line_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    progress.say("[bold] is not markup, " + "and long lines are not wrapped " * 10)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("[bold] is not markup")
    assert err.count("\n") == 1
