"""The list of studies: order, filters, search, pages, and text that is shown as text."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from review_browser import Browser
from score_archive import Archive

from ray_cxr.reporting.scores import read_scores
from ray_cxr.reporting.worklist import build_worklist
from ray_cxr.review.index import Query, Sample, read_index

Open = Callable[..., Browser]


def list_studies(browser: Browser, query: str = "") -> list[int]:
    """Return the numbers of the studies on a page of the list, in order."""
    answer = browser.get(f"/{query}")
    assert answer.status_code == 200, answer.text
    return [int(number) for number in dict.fromkeys(re.findall(r'href="/study/(\d+)', answer.text))]


def test_studies_are_listed_in_the_order_of_the_worklist(open_page: Open, archive: Archive) -> None:
    browser = open_page()
    assert list_studies(browser) == list(range(1, 25))
    worklist, index = build_worklist(read_scores(archive.root / "SCORES")), browser.review.index
    assert [sorted(rows) for rows in index.rows_of] == [sorted(rows) for rows in worklist.rows]
    np.testing.assert_array_equal(index.study_priority, worklist.priority)
    shown = re.findall(r"Priority</span> <b>([\d.]+)", browser.get("/").text)
    assert shown == [f"{value:.3f}" for value in worklist.priority if not np.isnan(value)]


def test_study_opens_on_its_flagged_image_and_names_flags_of_the_others(tmp_path: Path) -> None:
    from ray_cxr.review.server import open_review

    archive = Archive(tmp_path, patients=3)
    for finding in archive.diseases:
        archive.p[finding][:2] = [0.29, 0.01]
    archive.p["Hernia"][1] = 0.3
    browser = Browser(open_review(archive.scores(), "anna")).log_in()
    number = int(browser.review.index.study_of[0]) + 1
    opened = browser.get(f"/study/{number}").text
    assert 'data-row="1"' in opened
    assert "Image 2 of 2" in opened
    assert "Flag in" not in opened
    assert re.search(r"Flag in the other image: Hernia", browser.get(f"/study/{number}?image=0").text)
    blind = Browser(open_review(archive.root / "SCORES", "anna", is_blind=True)).log_in()
    for row in (0, 1):
        assert "Flag in" not in blind.get(f"/study/{blind.review.index.study_of[0] + 1}?image={row}").text


#: Query of the list, and which images a matching study must have one of.
FILTERS = [
    ("finding=Effusion&flag=yes", lambda a: a.ok & (a.p["Effusion"] >= a.threshold)),
    ("finding=Effusion&flag=no", lambda a: a.ok & (a.p["Effusion"] < a.threshold)),
    ("flag=no", lambda a: a.ok & np.all([a.p[f] < a.threshold for f in a.findings], axis=0)),
    ("finding=Effusion&label=yes", lambda a: a.y["Effusion"] == 1),
    ("code=missing", lambda a: ~a.ok & (np.arange(a.n) % 2 == 1)),
    ("code=any", lambda a: ~a.ok),
    ("quality=any", lambda a: np.zeros(a.n, bool)),
    ("split=val", lambda a: a.split == "val"),
    ("q=00000003_001", lambda a: np.array(["00000003_001" in name for name in a.ids])),
    ("q=S7", lambda a: np.array([study == "s7" for study in a.study])),
    ("finding=Nothing&flag=yes", lambda a: np.zeros(a.n, bool)),
    ("split=' OR 1=1", lambda a: np.zeros(a.n, bool)),
    ("q=.*", lambda a: np.zeros(a.n, bool)),
    ("unknown=1&page=x", lambda a: np.ones(a.n, bool)),
]


def test_filters_choose_the_studies_with_a_matching_image(open_page: Open, archive: Archive) -> None:
    browser = open_page(labels=str(archive.root / "labels.parquet"))
    index = browser.review.index
    for query, match in FILTERS:
        rows = match(archive)
        expected = [n for n in range(1, 25) if any(rows[row] for row in index.rows_of[n - 1])]
        assert list_studies(browser, f"?{query}") == expected, query


def test_reviewed_studies_are_found(open_page: Open) -> None:
    browser = open_page()
    index = browser.review.index
    study = next(rows for rows in index.rows_of if len(rows) == 2 and index.ok[rows].all())
    number = int(index.study_of[study[0]]) + 1
    states = []
    for row in study:
        browser.decide(row, finding=None, present=0)
        states.append([list_studies(browser, f"?reviewed={state}") for state in ("no", "partly", "yes")])
    others = [other for other in range(1, 25) if other != number]
    assert states == [[others, [number], []], [others, [], [number]]]


def test_studies_are_sorted_by_probability_and_by_id(open_page: Open, archive: Archive) -> None:
    browser = open_page()
    index = browser.review.index
    highest = [max(archive.p["Hernia"][rows]) if archive.ok[rows].all() else -1 for rows in index.rows_of]
    found = list_studies(browser, "?finding=Hernia&sort=probability")
    assert [highest[number - 1] for number in found] == sorted(highest, reverse=True)
    found = list_studies(browser, "?sort=id")
    firsts = [archive.ids[index.rows_of[number - 1][0]] for number in found]
    assert firsts == sorted(firsts)


def test_pages_hold_every_study_once(open_page: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_cxr.review.app.PAGE_SIZE", 7)
    browser = open_page()
    pages = [list_studies(browser, f"?page={page}") for page in (1, 2, 3, 4)]
    assert [number for page in pages for number in page] == list(range(1, 25))
    assert list_studies(browser, "?page=99") == pages[-1]
    assert list_studies(browser, "?page=0") == list_studies(browser, f"?page={'9' * 50}") == pages[0]


SCRIPT = "<script>alert('x')</script>\"'&"


def test_script_in_ids_and_queries_is_shown_as_text(tmp_path: Path) -> None:
    from ray_cxr.review.server import open_review

    archive = Archive(tmp_path, patients=3)
    archive.ids[0], archive.patient[0], archive.study[0] = f"{SCRIPT}.png", SCRIPT, SCRIPT
    browser = Browser(open_review(archive.scores(), SCRIPT)).log_in()
    browser.decide(0, finding="Effusion", present=1, note=SCRIPT)
    number = int(browser.review.index.study_of[0]) + 1
    for path in ("/", f"/study/{number}", "/?q=%3Cscript%3Ealert('x')%3C/script%3E%22'%26", f"/study/{SCRIPT}"):
        text = browser.get(path).text
        assert "<script>alert" not in text
        assert '"\'&"' not in text
    assert SCRIPT in html.unescape(browser.get("/").text)


def test_sample_is_random_blind_and_grows_with_its_size(open_page: Open, archive: Archive) -> None:
    scores = archive.root / "SCORES"

    def draw(size: int, seed: int = 0) -> set[str]:
        return set(read_index(scores, sample=Sample(size, seed)).ids.to_pylist())

    assert draw(5) < draw(9) < draw(100)
    assert draw(5) != draw(5, seed=1)
    # The failed patient's studies cannot be read.
    assert draw(100) == set(np.array(archive.ids)[archive.ok])
    browser = open_page(sample=Sample(5))
    assert browser.review.is_blind
    assert len(list_studies(browser)) == 5
    browser.decide(0, finding="Effusion", present=1)
    assert "seed 0" in browser.review.get_verdicts(0)["Effusion"].sample


def test_sample_does_not_prefer_flagged_studies(tmp_path: Path) -> None:
    archive = Archive(tmp_path, patients=60)
    index = read_index(archive.scores(), sample=Sample(60))
    whole = read_index(archive.root / "SCORES")
    rates = [np.mean(each.flags["Effusion"][each.ok]) for each in (index, whole)]
    assert abs(rates[0] - rates[1]) < 0.15


def test_other_images_of_the_patient(open_page: Open, archive: Archive) -> None:
    index = open_page().review.index
    assert index.find_patient(4) == [3, 5]
    assert index.select(Query(q=archive.ids[4]), np.zeros(36, bool), np.zeros(36, bool)).tolist() == [
        index.study_of[4] + 1
    ]
    assert isinstance(index.ids, pa.Array)
