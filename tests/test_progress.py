"""Progress without a terminal: a last line always, others only after a while. A search's table on one."""

from __future__ import annotations

import functools
import io
import re

import pytest
from rich.console import Console

from ray_cxr import progress


def test_a_short_job_says_one_line_with_all_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Work("score", 10) as work:
        for _ in range(5):
            work.advance(2, "1 errors")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("score: 10 of 10 images (")
    assert lines[0].endswith("1 errors)")


def test_a_continued_job_says_where_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Work("prepare", 10, done=6) as work:
        work.advance(4)
    assert capsys.readouterr().err.startswith("prepare: 6 of 10 images")


def test_a_long_job_says_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Work("score", 100) as work:
        now[0] = 20.0
        work.advance(40)
        line = capsys.readouterr().err
    assert line == "score: 40 of 100 images (2.0/s, 30 s left)\n"


def test_a_failed_job_does_not_say_it_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), progress.Work("score", 10):
        raise RuntimeError
    assert capsys.readouterr().err == ""


def test_work_whose_end_is_told_otherwise_says_nothing_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Work("train", 10, last_line=False) as work:
        work.advance(3)
    assert capsys.readouterr().err == ""


def test_lines_come_as_seldom_as_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Work("train", 100, line_every=60.0) as work:
        now[0] = 59.0
        work.advance(1)
        assert capsys.readouterr().err == ""
        now[0] = 61.0
        work.advance(1)
        assert capsys.readouterr().err.startswith("train: 2 of 100")


def test_trials_without_a_terminal_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Their events have lines of their own."""
    with progress.Trials(3, 1) as board:
        board.begin(1, "TinyCNN")
        board.epoch(1, 1, 3, 0.5)
        board.end(1, "finished", 0.5)
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns and 40 lines."""
    written = io.StringIO()
    made = functools.partial(Console, file=written, force_terminal=True, width=80, height=40)
    monkeypatch.setattr(progress, "Console", lambda **options: made())
    return written


def shown(screen: io.StringIO) -> list[list[str]]:
    """The table as it was drawn last: its title and then the cells of each row."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    before, _, body = text.rpartition("┏")
    title = before[max(before.rfind(mark) for mark in "┘┓┛\r") + 1 :]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in body.splitlines()]
    return [[" ".join(title.split())], *(row for row in rows if row and row[0].isdecimal())]


def test_trials_on_a_terminal_are_a_table(screen: io.StringIO) -> None:
    with progress.Trials(9, 2) as board:
        board.begin(2, "ResNet50")
        board.begin(3, "TinyCNN")
        board.epoch(2, 1, 10, 0.71234)
        board.begin(4, "TinyCNN")
        board.epoch(3, 4, 10, 0.5)
        board.end(3, "stopped", 0.6)
        board.end(4, "failed", None)
    (title,), *rows = shown(screen)
    assert title == "4 of 9 trials are over; best AUROC here 0.7123"
    assert rows == [
        ["2", "ResNet50", "trains", "1 of 10", "0.7123"],
        ["3", "TinyCNN", "stopped", "4 of 10", "0.6000"],
        ["4", "TinyCNN", "failed", "", ""],
    ]


def test_a_terminal_shows_the_latest_trials_and_one_that_comes_again_once(screen: io.StringIO) -> None:
    with progress.Trials(100, 0) as board:
        board.begin(0, "TinyCNN")
        board.end(0, "failed", None)
        for number in range(30):
            board.begin(number, "TinyCNN")
            board.epoch(number, 1, 2, number / 100)
        board.begin(29, "TinyCNN")
    (title,), *rows = shown(screen)
    assert title == "1 of 100 trials are over; best AUROC here 0.2900"
    assert [int(row[0]) for row in rows] == list(range(10, 30))
    # Its process was lost, or it waited for others; what it had it has.
    assert rows[-1] == ["29", "TinyCNN", "waits", "1 of 2", "0.2900"]


def test_a_search_that_fails_leaves_the_terminal_as_it_was(screen: io.StringIO) -> None:
    with pytest.raises(RuntimeError), progress.Trials(1, 0):
        raise RuntimeError
    assert shown(screen)[0] == ["0 of 1 trials are over; best AUROC here none yet"]
    hidden, back = screen.getvalue().rfind("\x1b[?25l"), screen.getvalue().rfind("\x1b[?25h")
    assert back > hidden >= 0, "the cursor is there again"
