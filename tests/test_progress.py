"""Progress: without a terminal a last line always and others now and then; the table of a search on a terminal."""

from __future__ import annotations

import io
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from ray_cxr import progress


def test_a_job_logs_where_it_starts_and_its_total(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress("prepare", 10, done=6) as work:
        assert capsys.readouterr().err.startswith("prepare: 6 of 10 images")
        work.advance(2, "1 errors")
        work.advance(2, "2 errors")
    (line,) = capsys.readouterr().err.splitlines()
    assert (line[:26], line[-9:]) == ("prepare: 10 of 10 images (", "2 errors)")


def test_a_long_job_logs_its_rate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    with progress.Progress("score", 10_000) as work:
        clock.now = progress.LINE_EVERY_S - 1
        work.advance(38)
        assert capsys.readouterr().err == ""
        clock.now = 20.0
        work.advance(2)
        assert capsys.readouterr().err == "score: 40 of 10,000 images (2.0 images/s, 1 h 23 min left)\n"


def test_items_that_were_finished_during_the_wait_have_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress("prepare", 540, waiting="starting the workers") as work:
        work.advance(256)
        work.advance(284)
    assert capsys.readouterr().err == "prepare: 540 of 540 images\n"


def test_failed_jobs_and_jobs_with_their_own_summary_log_no_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), progress.Progress("score", 10):
        raise RuntimeError
    with progress.Progress("train", 10, last_line=False) as work:
        work.advance(3)
    with progress.TrialTable(3, 1) as board:  # the events of a search have their own lines
        board.start_trial(1, "TinyCNN")
        board.end_epoch(1, 1, 3, 0.5)
        board.end_trial(1, "finished", 0.5)
    assert capsys.readouterr() == ("", "")


def test_a_log_names_a_stage_only_if_it_takes_long(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    with progress.Stage("checking the input"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.05)
    with progress.Stage("starting Ray", at_once=True) as stage:
        assert capsys.readouterr().err == "starting Ray …\n"
        with progress.silence_stderr():
            stage.update("starting Ray again")
            time.sleep(0.15)
    time.sleep(0.1)  # no line after the end


def test_work_that_waits_says_for_what(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "SILENT_S", 0.0)
    monkeypatch.setattr(progress, "_SHORT_S", 0.0)
    with progress.Progress("score", 10, waiting="loading the model") as work:
        time.sleep(0.05)
        assert capsys.readouterr().err == "score: loading the model …\n"
        clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
        monkeypatch.setattr(progress, "time", clock)
        work.advance(2)
        clock.now = 4.0
        work.advance(8)
    assert capsys.readouterr().err == "score: 10 of 10 images (2.0 images/s)\n"  # without the wait


def test_a_log_has_the_state_of_a_search_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(progress, "TRIALS_EVERY_S", 0.1)
    with progress.TrialTable(3, 0) as board:
        board.start_trial(0, "TinyCNN")
        board.end_trial(0, "failed", None)
        board.start_trial(1, "TinyCNN")
        board.end_epoch(1, 2, 4, 0.5)
        time.sleep(0.25)
    (line,) = capsys.readouterr().err.splitlines()  # not again while nothing changes
    assert line == "tune: 1 of 3 trials have ended; running: trial 1 (epoch 2 of 4)"


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_has_no_spinner_where_colours_are_forced(variable: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv(variable, "1")
    with progress.Stage("starting Ray", at_once=True), progress.Progress("score", 1) as work:
        work.advance(1)
    assert "\x1b" not in capsys.readouterr().err


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns and 40 lines, whatever this process runs in."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=80, height=40)
    monkeypatch.setattr(progress, "_open_console", lambda: console)
    monkeypatch.setattr(progress, "is_live", lambda: True)
    return written


def plain(screen: io.StringIO) -> str:
    """All that was drawn, without control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def last_table(screen: io.StringIO) -> tuple[str, list[list[str]]]:
    """The table as it was drawn last: its title and the cells of each row."""
    before, _, body = plain(screen).rpartition("┏")
    title = before[max(before.rfind(mark) for mark in "┘┓┛\r") + 1 :]
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in body.splitlines()]
    return " ".join(title.split()), [row for row in rows if row and row[0].isdecimal()]


def test_a_bar_of_large_numbers_fits_80_columns(screen: io.StringIO) -> None:
    work = progress.Progress("heat maps", 112_120, waiting="loading the model")
    with work, progress.Stage("starting Ray", at_once=True):
        work.advance(93_120, "1,234 errors")
        time.sleep(0.05)
    lines = [line.rstrip() for line in re.split("[\r\n]", plain(screen))]
    (last,) = {line for line in lines if "93,120" in line and "1,234 errors" in line and line.endswith("errors")}
    assert len(last) <= 80
    assert any("starting Ray …" in line for line in lines)


def test_trials_on_a_terminal_are_a_table(screen: io.StringIO) -> None:
    with progress.TrialTable(9, 2) as board:
        board.start_trial(2, "ResNet50")
        board.start_trial(3, "TinyCNN")
        board.end_epoch(2, 1, 10, 0.71234)
        board.start_trial(4, "TinyCNN")
        board.end_epoch(3, 4, 10, 0.5)
        board.end_trial(3, "stopped", 0.6)
        board.end_trial(4, "failed", None)
    title, (first, *others) = last_table(screen)
    assert (title[:13], title[-6:]) == ("4 of 9 trials", "0.7123")
    assert first[:2] + first[3:] == ["2", "ResNet50", "1 of 10", "0.7123"]
    assert others == [["3", "TinyCNN", "stopped", "4 of 10", "0.6000"], ["4", "TinyCNN", "failed", "", ""]]


def test_a_terminal_shows_the_latest_trials_each_once(screen: io.StringIO) -> None:
    with progress.TrialTable(100, 0) as board:
        board.start_trial(0, "TinyCNN")
        board.end_trial(0, "failed", None)
        for number in range(30):
            board.start_trial(number, "TinyCNN")
            board.end_epoch(number, 1, 2, number / 100)
        board.start_trial(29, "TinyCNN")  # starts again after its process was lost, and keeps its values
    title, rows = last_table(screen)
    assert title.startswith("1 of 100 trials")
    assert [int(row[0]) for row in rows] == list(range(10, 30))
    assert (rows[-1][0], rows[-1][3:]) == ("29", ["1 of 2", "0.2900"])


def test_a_failed_search_restores_the_cursor(screen: io.StringIO) -> None:
    with pytest.raises(RuntimeError), progress.TrialTable(1, 0):
        raise RuntimeError
    hidden, shown = screen.getvalue().rfind("\x1b[?25l"), screen.getvalue().rfind("\x1b[?25h")
    assert shown > hidden >= 0
