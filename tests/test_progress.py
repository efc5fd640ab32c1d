"""Progress without a terminal: a last line always, others only after a while."""

from __future__ import annotations

import pytest

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
