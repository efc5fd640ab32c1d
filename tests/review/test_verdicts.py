"""Verdicts: what is recorded, what survives, and what a blind reader can learn before deciding."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from review_browser import Browser, find_rows
from score_archive import FEW, Archive

from ray_cxr.errors import InputError
from ray_cxr.review.server import open_review
from ray_cxr.review.verdicts import read_verdicts

Open = Callable[..., Browser]


def read_lines(archive: Archive) -> list[dict[str, Any]]:
    """Return all records, in the order of files and lines."""
    files = sorted((archive.root / "SCORES" / "reviews").glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def test_verdict_is_recorded_with_what_was_visible(open_page: Open, archive: Archive) -> None:
    browser = open_page(labels=str(archive.root / "labels.parquet"))
    row = find_rows(browser.review, "Effusion", 1)[0]
    shown = browser.decide(row, finding="Effusion", verdict="disagree", note="<script>é", heatmap=True, labels=True)
    assert shown["verdicts"] == {"Effusion": {"verdict": "disagree", "present": 0, "note": "<script>é"}}
    [record] = read_lines(archive)
    expected = {"reader": "anna", "image_id": archive.ids[row], "study_id": archive.study[row], "finding": "Effusion"}
    expected |= {"verdict": "disagree", "present": 0, "flag": 1, "model_digest": "d1" * 32, "note": "<script>é"}
    expected |= {"blind": False, "heatmap": True, "labels": True, "sample": None}
    assert expected.items() <= record.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", record["time"])


@pytest.mark.parametrize(
    ("flag", "verdict", "present"), [(1, "agree", 1), (0, "agree", 0), (0, "disagree", 1), (1, "unsure", None)]
)
def test_label_follows_from_the_verdict_and_the_flag(
    flag: int, verdict: str, present: int | None, open_page: Open
) -> None:
    browser = open_page()
    row = find_rows(browser.review, "Effusion", flag)[0]
    assert browser.decide(row, finding="Effusion", verdict=verdict)["verdicts"]["Effusion"]["present"] == present
    if present is not None:
        assert browser.decide(row, finding="Effusion", present=present)["verdicts"]["Effusion"]["verdict"] == verdict


def test_finding_without_a_flag_takes_a_label_but_no_agreement(open_page: Open, archive: Archive) -> None:
    browser = open_page()
    browser.review.index.flags["Effusion"][:] = -1
    assert browser.send("/verdicts", {"row": 0, "finding": "Effusion", "verdict": "agree"}).status_code == 400
    browser.decide(0, finding="Effusion", present=1)
    [record] = read_lines(archive)
    assert (record["verdict"], record["present"], record["flag"]) == (None, 1, None)


#: Bodies that are no verdict.
WRONG: list[Any] = [
    [],
    {"finding": "Effusion", "present": 1},
    {"row": 36, "finding": "Effusion", "present": 1},
    {"row": -1, "finding": "Effusion", "present": 1},
    {"row": True, "finding": "Effusion", "present": 1},
    {"row": "0", "finding": "Effusion", "present": 1},
    {"row": 35, "finding": "Effusion", "present": 1},  # an image that could not be read
    {"row": 0, "finding": "../x", "present": 1},
    {"row": 0, "finding": "No_Finding", "present": 1},
    {"row": 0, "finding": ["Effusion"], "present": 1},
    {"row": 0, "finding": "Effusion"},
    {"row": 0, "finding": "Effusion", "present": 2},
    {"row": 0, "finding": "Effusion", "present": True},
    {"row": 0, "finding": "Effusion", "present": 1, "verdict": "agree"},
    {"row": 0, "finding": "Effusion", "verdict": "undone"},
    {"row": 0, "finding": "Effusion", "present": 1, "note": 5},
    {"row": 0, "finding": "Effusion", "present": 1, "note": "x" * 2001},
    {"row": 0, "finding": "Effusion", "present": 1, "heatmap": 1},
]


def test_body_that_is_no_verdict_is_refused(open_page: Open, archive: Archive) -> None:
    browser = open_page()
    for body in WRONG:
        answer = browser.send("/verdicts", body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]
    headers = {"Origin": "http://127.0.0.1:8000", "Content-Type": "application/json"}
    for text in (b"{", b"\xff", b"[" * 60_000):
        assert browser.request("POST", "/verdicts", content=text, headers=headers).status_code == 400
    assert read_lines(archive) == []


def test_undo_appends_and_restores_the_verdict_before(open_page: Open, archive: Archive) -> None:
    browser = open_page()
    browser.decide(0, finding="Effusion", present=1, note="first")
    browser.decide(0, finding="Effusion", present=0)
    browser.decide(0, finding=None, present=0)
    undone = [browser.send("/undo", {}).json()["verdicts"] for _ in range(3)]
    assert [{name: verdict["present"] for name, verdict in shown.items()} for shown in undone] == [
        {"Effusion": 0},
        {"Effusion": 1},
        {},
    ]
    assert undone[1]["Effusion"]["note"] == "first"
    assert browser.send("/undo", {}).status_code == 409
    written = [(record["finding"], record["verdict"] == "undone", record["present"]) for record in read_lines(archive)]
    rest = [name for name in FEW if name != "Effusion"]
    assert written == [
        *[("Effusion", False, 1), ("Effusion", False, 0)],
        *[(name, False, 0) for name in rest],
        *[(name, True, None) for name in rest],
        *[("Effusion", False, 1), ("Effusion", True, None)],
    ]


def test_later_session_continues_and_readers_do_not_see_each_other(open_page: Open, archive: Archive) -> None:
    first, other = open_page(), open_page(reader="bert")
    for browser in (first, other):
        browser.decide(3, finding=None, present=0)
    other.decide(4, finding="Effusion", present=1)
    files = {path: path.read_bytes() for path in (archive.root / "SCORES" / "reviews").iterdir()}
    assert len(files) == 2
    again = open_page()
    assert np.flatnonzero(again.review.reviewed).tolist() == [3]
    assert np.flatnonzero(again.review.decided).tolist() == [3]
    # Undo is for this session's decisions.
    assert again.send("/undo", {}).status_code == 409
    again.decide(5, finding="Effusion", present=1)
    assert {path: path.read_bytes() for path in files} == files


def test_record_is_on_the_disk_before_the_answer(
    open_page: Open, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = open_page()
    synced: list[bytes] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(browser.review.path.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    browser.decide(0, finding="Effusion", present=1)
    assert synced[-1] == browser.review.path.read_bytes() != b""
    # A kill during the next write leaves half a line, which was never accepted.
    with open(browser.review.path, "ab") as stream:
        stream.write(b'{"session": "x", "rea')
    assert [verdict.finding for verdict in read_verdicts(archive.root / "SCORES")] == ["Effusion"]
    assert np.flatnonzero(open_page().review.reviewed).tolist() == [0]


def test_full_disk_refuses_the_verdict_and_keeps_the_others(
    open_page: Open, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = open_page()
    browser.decide(0, finding="Effusion", present=1)
    real = os.write

    def write(descriptor: int, data: Any) -> int:
        if len(data) > 20:
            return real(descriptor, bytes(data[:20]))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        answer = browser.send("/verdicts", {"row": 1, "finding": "Effusion", "present": 1})
    assert answer.status_code == 507
    assert np.flatnonzero(browser.review.reviewed).tolist() == [0]
    browser.decide(2, finding="Effusion", present=0)
    assert [record["image_id"] for record in read_lines(archive)] == [archive.ids[0], archive.ids[2]]


def test_damaged_line_is_one_error(open_page: Open, archive: Archive) -> None:
    browser = open_page()
    browser.decide(0, finding="Effusion", present=1)
    path = browser.review.path
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(InputError, match=r"jsonl, line 1: not a verdict"):
        open_review(archive.root / "SCORES", "anna")


def collect(browser: Browser, rows: list[int]) -> dict[str, tuple[int, bytes]]:
    """Return status and content of every page that can depend on these images."""
    numbers = range(1, len(browser.review.index) + 1)
    queries = ["", "finding=Effusion&flag=yes", "finding=Effusion&sort=probability", "quality=any", "sort=id"]
    paths = [f"/?{query}" for query in queries] + [f"/study/{number}" for number in numbers]
    paths += [f"/{kind}/{rows[0]}" for kind in ("image", "thumb")]
    paths += [f"/heatmap/{row}/{finding}" for row in rows for finding in FEW]
    found = {path: browser.get(path) for path in paths}
    return {path: (answer.status_code, answer.content) for path, answer in found.items()}


@pytest.mark.slow
def test_blind_reader_learns_nothing_of_the_model_before_deciding(tmp_path: Path) -> None:
    """Two models with other predictions of the same images give the same answers, byte for byte."""
    folders = []
    for name in ("one", "two"):
        archive = Archive(tmp_path / name, patients=4)
        if name == "two":
            archive.p = {finding: 1 - values for finding, values in archive.p.items()}
        archive.paths = [str(tmp_path / "one" / "images" / image) for image in archive.ids]
        folders.append(Path(archive.scores()))
    one, two = (Browser(open_review(folder, "anna", is_blind=True)).log_in() for folder in folders)
    rows = list(range(12))
    assert (one.review.index.flags["Effusion"] != two.review.index.flags["Effusion"]).any()
    assert collect(one, rows) == collect(two, rows)
    # Some verdicts on an image do not reveal its other findings, and nothing reveals other images.
    body = {"row": 0, "finding": "Effusion", "present": 1}
    for browser in (one, two):
        assert browser.send("/verdicts", {**body, "present": None, "verdict": "agree"}).status_code == 400
        shown = browser.decide(**body)
        assert (shown["hidden"], shown["decided"], shown["verdicts"]["Effusion"]["verdict"]) == (True, False, None)
    assert collect(one, rows) == collect(two, rows)
    for browser in (one, two):
        shown = browser.decide(0, finding=None, present=0)
        assert (shown["hidden"], shown["decided"]) == (False, True)
    assert one.review.get_verdicts(0)["Effusion"].verdict != two.review.get_verdicts(0)["Effusion"].verdict
    first, second = collect(one, rows), collect(two, rows)
    number = one.review.index.study_of[0] + 1
    differing = {path for path in first if first[path] != second[path]}
    assert {path for path in differing if path.startswith("/study/")} <= {f"/study/{number}"}
    assert all(path.startswith(("/?", f"/study/{number}", "/heatmap/0/")) for path in differing)


def test_verdicts_after_the_model_was_shown_are_not_blind(open_page: Open, archive: Archive) -> None:
    browser = open_page(is_blind=True)
    browser.decide(0, finding=None, present=0)
    browser.send("/undo", {})
    browser.decide(0, finding="Effusion", present=1)
    assert [record["blind"] for record in read_lines(archive)] == [True] * 3 + [False] * 4
    # Nor are those of a reader who saw the image in an open session.
    open_page(reader="bert").decide(7, finding="Effusion", present=1)
    again = open_page(reader="bert", is_blind=True)
    assert not again.review.is_hidden(7)
    assert again.review.is_hidden(6)
