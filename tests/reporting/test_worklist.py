"""The worklist of small score tables, with literal priorities and orders; and tables of older versions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_cxr.reporting.scores import Scores, read_scores
from ray_cxr.reporting.worklist import build_worklist, is_doubtful
from ray_cxr.reporting.worklist_page import explain_first


def read(folder: Path, run: dict[str, Any] | None = None, **columns: list[Any]) -> Scores:
    """Read a table of images a, b, c, ...; with `run`, the content of run.json, it is one of `ray-cxr score`."""
    n = len(next(iter(columns.values())))
    table = pa.table({"image_id": [*"abcdefgh"[:n]], **columns})
    if run is None:
        pq.write_table(table, folder / "other.parquet")
        return read_scores(folder / "other.parquet")
    (folder / "scores").mkdir()
    for name, content in (("run.json", run), ("model.json", {}), ("settings.json", {}), ("_SUCCESS", "")):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    pq.write_table(table, folder / "scores" / "part-00000.parquet")
    return read_scores(folder)


def shown(table: Scores, *columns: str) -> list[tuple[str, ...]]:
    lines = csv.DictReader(build_worklist(table).to_csv().splitlines())
    return [tuple(line[name] for name in columns) for line in lines]


def test_a_study_has_the_highest_probability_of_each_finding(tmp_path: Path) -> None:
    """1 - (1 - 0.5)(1 - 0.2) = 0.6 from two images, of which one has an error next to them."""
    table = read(
        tmp_path,
        study_id=["s", "s", "s", None, "t"],
        status=["ok", "ok", "error", "ok", "error"],
        error_code=[None, None, "corrupt", None, "missing"],
        p_Mass=[0.5, 0.1, None, 0.55, None],
        p_Nodule=[0.1, 0.2, None, 0.0, None],
        p_No_Finding=[0.9, 0.9, None, 0.9, None],
    )
    columns = ("priority", "abnormality", "top_finding", "image_id", "n_images", "errors")
    assert shown(table, *columns) == [
        ("0.6", "0.6", "Mass", "a", "3", "corrupt"),
        ("", "", "", "e", "1", "missing"),
        ("0.55", "0.55", "Mass", "d", "1", ""),
    ]
    assert shown(table, "p_Mass", "p_Nodule") == [("0.5", "0.2"), ("", ""), ("0.55", "0.0")]
    np.testing.assert_allclose(table.priority, [0.55, 0.28, np.nan, 0.55, np.nan], atol=1e-12)
    assert "1 - product of (1 - p)" in " ".join(table.ranking.notes)


def test_weights_of_run_json_order_studies(tmp_path: Path) -> None:
    """Weight 2: 1 - 0.5^2 * 0.8 = 0.8. Stored columns are the images' values."""
    run = {"ranking": {"weights": {"Mass": 2.0, "Nodule": 1.0}}}
    c = {"c_Mass": [0.5, 0.0], "c_Nodule": [0.2, 0.7]}
    raw = {f"p{name[1:]}": [0.5, 0.5] for name in c}
    stored = {"top_finding": ["Mass", "Nodule"], "abnormality": [0.6, 0.7], "priority": [0.8, 0.7]}
    table = read(tmp_path, run, study_id=["s", "t"], **raw, **c, **stored)
    columns = ("study_id", "priority", "abnormality", "top_finding")
    assert shown(table, *columns) == [("s", "0.8", "0.6", "Mass"), ("t", "0.7", "0.7", "Nodule")]
    assert table.ranking.notes == ()


def test_large_weights_do_not_make_studies_equal(tmp_path: Path) -> None:
    """All priorities are 1 in float64: (1 - 0.98)^10 is 1e-17."""
    run = {"ranking": {"weights": {"Mass": 10.0}}}
    c = {"c_Mass": [0.98, 0.99, 0.995, 0.985], "priority": [1.0] * 4, "abnormality": [0.98, 0.99, 0.995, 0.985]}
    table = read(tmp_path, run, study_id=["s", "t", "t", "u"], p_Mass=[0.5] * 4, top_finding=["Mass"] * 4, **c)
    assert shown(table, "image_id", "priority") == [("c", "1.0"), ("d", "1.0"), ("a", "1.0")]


def test_rows_with_a_flag_come_first_also_of_a_finding_without_calibration(tmp_path: Path) -> None:
    """Of a to e only c has no flag, and e only one of Hernia, whose place among the flags is that of its priority."""
    flags = {"flag_Mass": [True, True, False, True, False], "flag_Hernia": [False, False, False, False, True]}
    c = {"c_Mass": [0.5, 0.9, 0.95, 0.1, 0.3], "c_Hernia": pa.nulls(5, pa.float32())}
    table = read(tmp_path, p_Mass=[0.5] * 5, p_Hernia=[0.9] * 5, **c, **flags)
    assert [line["image_id"] for line in build_worklist(table).lines] == [*"baedc"]
    assert shown(table, "image_id", "flagged_unranked", "priority")[2] == ("e", "Hernia", "0.3")
    assert "Hernia" in table.ranking.notes[0]


def test_a_probability_of_1_is_the_first_of_its_part(tmp_path: Path) -> None:
    table = read(tmp_path, p_Mass=[0.4, 1.0, None], status=["ok", "ok", "error"], error_code=[None, None, "corrupt"])
    assert shown(table, "image_id", "priority") == [("c", ""), ("b", "1.0"), ("a", "0.4")]


def test_uncalibrated_tables_say_so(tmp_path: Path) -> None:
    run = {"ranking": {"weights": {"Mass": 1.0}}}
    table = read(tmp_path, run, p_Mass=[0.4], c_Mass=[None], abnormality=[0.4], priority=[0.4], top_finding=["Mass"])
    assert "uncalibrated" in table.ranking.notes[0]
    assert shown(table, "priority") == [("0.4",)]


def test_tables_of_an_older_version_keep_their_priority(tmp_path: Path) -> None:
    """Their abnormality is computed from calibrated probabilities; a study has the highest priority of its images."""
    stored = {"top_finding": ["Mass", "Nodule"], "priority": [0.3, 0.4]}
    c = {"c_Mass": [0.5, 0.1], "c_Nodule": [0.1, 0.2]}
    raw = {f"p{name[1:]}": [0.9, 0.9] for name in c}
    table = read(tmp_path, {"rows": 2}, study_id=["s", "s"], **raw, **c, **stored)
    np.testing.assert_allclose(table.abnormality, [0.55, 0.28])
    assert shown(table, "priority", "abnormality", "top_finding") == [("0.4", "0.6", "Nodule")]
    assert "older version" in table.ranking.notes[0]


def test_rows_without_any_probability_are_last(tmp_path: Path) -> None:
    table = read(tmp_path, p_Mass=[None, 0.1, 0.2], p_Nodule=[None, None, 0.2])
    assert shown(table, "image_id", "priority") == [("c", "0.36"), ("b", "0.1"), ("a", "")]
    assert table.top_findings.tolist() == [None, "Mass", "Mass"]


def test_a_table_of_no_finding_alone_has_no_notes_on_the_order(tmp_path: Path) -> None:
    table = read(tmp_path, p_No_Finding=[0.1, 0.2])
    assert table.ranking.notes == ()


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\t=1"])
def test_cells_are_safe_for_spreadsheets(tmp_path: Path, text: str) -> None:
    table = read(tmp_path, study_id=[text], p_Mass=[1e-9])
    content = build_worklist(table).to_csv()
    assert f"'{text}" in content
    assert content.splitlines()[1].startswith("1e-09,1e-09,")


def test_the_first_row_says_why_it_is_first(tmp_path: Path) -> None:
    """Image b has the flag, a the higher probability; then both have a flag; then none."""
    for name, flags, parts in (
        ("one", [False, True], ["only row with a flag (Mass)"]),
        ("two", [True, True], ["highest priority", "the 2 rows with a flag"]),
        ("none", [False, False], ["highest priority", "all 2 rows"]),
    ):
        (tmp_path / name).mkdir()
        table = read(tmp_path / name, p_Mass=[0.1, 0.2], p_Nodule=[0.6, 0.3], flag_Mass=flags)
        reason = explain_first(build_worklist(table))
        assert all(part in reason for part in parts), reason
    (tmp_path / "single").mkdir()
    assert explain_first(build_worklist(read(tmp_path / "single", p_Mass=[0.1]))) == ""


def test_what_needs_a_look_stands_before_what_does_not(tmp_path: Path) -> None:
    """Flags first, then a quality flag (d) and an image without a score (c, e), then the others by priority."""
    run = {"operating_points": {"Mass": {"threshold": 0.6}}}
    table = read(
        tmp_path,
        run,
        study_id=["s", "t", "u", "v", "u2", "w"],
        status=["ok", "ok", "error", "ok", "error", "ok"],
        error_code=[None, None, "corrupt", None, "missing", None],
        quality_flag=[None, None, None, "lateral", None, None],
        p_Mass=[0.5, 0.3, None, 0.1, None, 0.7],
        flag_Mass=[0, 0, None, 0, None, 1],
    )
    worklist = build_worklist(table)
    assert [line["image_id"] for line in worklist.lines] == ["f", "d", "c", "e", "a", "b"]
    assert [is_doubtful(line) for line in worklist.lines] == [False, True, True, True, False, False]
    other = tmp_path / "other"
    other.mkdir()
    scores = {"p_Mass": [0.5, 0.1], "flag_Mass": [0, 0], "quality_flag": [None, "lateral"], "status": ["ok", "ok"]}
    unflagged = build_worklist(read(other, run, study_id=["s", "t"], **scores))
    assert [line["image_id"] for line in unflagged.lines] == ["b", "a"]
    assert "1 row with a quality flag" in explain_first(unflagged)
