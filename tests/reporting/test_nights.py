"""Reports over several nights: one table, and what each night held."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_archive import without_drawing

from ray_cxr import cli
from ray_cxr.evaluation.drift import score_quantiles
from ray_cxr.imaging import overlays
from ray_cxr.reporting.cases import HeatMapReader
from ray_cxr.reporting.nights import read_nights
from ray_cxr.reporting.report import write_report

FINDINGS = ("Mass", "Nodule")
THRESHOLD = 0.3
MODEL = {
    "digest": "d1" * 32,
    "findings": list(FINDINGS),
    "operating_points": {name: {"threshold": THRESHOLD, "rule": "youden", "n": 5000} for name in FINDINGS},
    "expected_flag_rates": dict.fromkeys(FINDINGS, 0.3),
    "provenance": {
        "score_quantiles": dict.fromkeys(FINDINGS, score_quantiles(np.linspace(0.0, 3 * THRESHOLD / 2.1, 5000)))
    },
}


def draw(n: int, share: float, seed: int) -> np.ndarray:
    """Return probabilities [n,F] of which this share is flagged for each finding."""
    even = (np.arange(n) + 0.5) / n
    p = np.column_stack([np.random.default_rng((seed, j)).permutation(even) for j in range(len(FINDINGS))])
    return np.asarray(p * THRESHOLD / (1.0 - share)).clip(0.0, 1.0)


def write_night(
    folder: Path,
    day: str | None,
    ids: list[str],
    p: np.ndarray,
    *,
    errors: dict[str, str] | None = None,
    weights: dict[str, float] | None = None,
    finished: bool = True,
    model: dict[str, Any] = MODEL,
    **columns: list[Any],
) -> str:
    """Write a SCORES folder; `errors` has the codes of images that failed."""
    codes = [(errors or {}).get(name) for name in ids]
    failed = np.array([code is not None for code in codes])
    written: dict[str, Any] = {
        "image_id": ids,
        "patient_id": ids,
        "study_id": pa.nulls(len(ids), pa.string()),
        "path": pa.nulls(len(ids), pa.string()),
        "status": np.where(failed, "error", "ok").tolist(),
        "error_code": pa.array(codes, pa.string()),
        "priority": pa.array(p.max(axis=1), pa.float32(), mask=failed),
        "abnormality": pa.array(p.max(axis=1), pa.float32(), mask=failed),
        **columns,
    }
    for j, finding in enumerate(FINDINGS):
        written[f"p_{finding}"] = written[f"c_{finding}"] = pa.array(p[:, j], pa.float32(), mask=failed)
        written[f"flag_{finding}"] = pa.array(p[:, j] >= THRESHOLD, pa.bool_(), mask=failed)
    (folder / "scores").mkdir(parents=True)
    pq.write_table(pa.table(written), folder / "scores" / "part-00000.parquet")
    ranking = {"probabilities": "calibrated", "weights": weights or dict.fromkeys(FINDINGS, 1.0), "left_out": []}
    run = {"rows": len(ids), "ranking": ranking, "finished": day and f"{day}T04:30:00+00:00"}
    for name, content in (("run.json", run), ("model.json", model), ("settings.json", {})):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    if finished:
        (folder / "_SUCCESS").touch()
    return str(folder)


def name_images(night: int, n: int) -> list[str]:
    return [f"{night}-{i:04d}.png" for i in range(n)]


def report(scores: list[str], out: Path, **options: Any) -> dict[str, Any]:
    with without_drawing():
        write_report(scores, out, **options)
    return dict(json.loads((out / "metrics.json").read_text(encoding="utf-8")))


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_of_an_image_in_several_nights_the_latest_row_with_a_score_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Image a is scored twice, b is repaired by the second night, c fails in it, d fails in both."""
    first, second = np.full((4, 2), 0.1), np.full((5, 2), 0.2)
    failed = {"b": "storage", "d": "corrupt"}
    old = write_night(tmp_path / "nights/x/scores-run", "2026-03-01", ["a", "b", "c", "d"], first, errors=failed)
    failed = {"c": "storage", "d": "truncated"}
    # The folder's name sorts first, but its scoring ended later.
    new = write_night(tmp_path / "nights/a/scores-run", "2026-03-02", [*"abcde"], second, errors=failed)
    table, nights = read_nights([new, old])
    assert [(night.night.name, len(night.table.ids), night.replaced) for night in nights] == [
        ("2026-03-01", 4, 3),
        ("2026-03-02", 5, 1),
    ]
    rows = {name: row for row, name in enumerate(table.ids)}
    assert len(table.ids) == len(rows) == 5
    assert [round(float(table.p["Mass"][rows[name]]), 3) for name in "abce"] == [0.2, 0.2, 0.1, 0.2]
    assert not table.ok[rows["d"]]
    assert table.codes[rows["d"]] == "truncated"
    Path(tmp_path, "nights/a/scores-report").mkdir()  # matches too, but is no folder of scores
    with without_drawing():
        pattern = f"{tmp_path}/nights/*/scores-r*"
        assert cli.main(["report", pattern, "--csv", "--out", str(tmp_path / "out")]) == 0
    assert "Last night, 2026-03-02 (5 images" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    counts, by_night = metrics["counts"], metrics["nights"]["by_night"]
    assert (counts["rows"], counts["by_code"], metrics["n_images"]) == (5, {"truncated": 1}, 4)
    assert [(one["images"], one["failed"]["by_code"], one["replaced"]) for one in by_night] == [
        (4, {"storage": 1, "corrupt": 1}, 3),
        (5, {"storage": 1, "truncated": 1}, 1),
    ]
    expected = {"a": "2026-03-02", "b": "2026-03-02", "c": "2026-03-01", "d": "2026-03-02", "e": "2026-03-02"}
    for name in ("worklist.csv", "scores.csv"):
        assert {line["image_id"]: line["night"] for line in read_csv(tmp_path / "out" / name)} == expected
    assert any("4 rows" in note for note in metrics["notes"])


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four nights of 1,000 images with equal shares of flags."""
    root = tmp_path_factory.mktemp("quiet")
    ids = [name_images(night, 1000) for night in range(4)]
    return [write_night(root / f"n{k}", f"2026-03-0{k + 1}", ids[k], draw(1000, 0.3, k)) for k in range(4)]


@pytest.mark.slow
def test_a_night_without_a_change_is_not_called_changed(quiet: list[str], tmp_path: Path) -> None:
    found = report(quiet, tmp_path / "out")["nights"]
    assert (found["changed"], found["compared_with_earlier"]) == ([], 3)
    assert [night["change"] for night in found["by_night"]] == ["not testable", "no change", "no change", "no change"]
    last = found["by_night"][-1]
    assert {row["verdict"] for row in last["expected"]["flags"].values()} == {"ok"}
    assert last["earlier_images"] == 3000
    for kind in ("flags", "scores"):
        assert {row["verdict"] for row in last["earlier"][kind].values()} == {"ok"}
    # Two flagged shares are compared, and four kinds are one question.
    alone = report(quiet[-1:], tmp_path / "alone")
    assert alone["nights"] is None
    for finding in FINDINGS:
        row = alone["drift"]["flags"][finding]
        assert last["expected"]["flags"][finding] == {name: row[name] for name in last["expected"]["flags"][finding]}
    table = pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()
    rates = [row for row in table if row["section"] == "nights" and row["metric"] == "flag rate"]
    assert [row["value"] for row in rates] == pytest.approx([0.3] * 8)


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_line_names_what_changed_last_night(quiet: list[str], tmp_path: Path, is_first: bool) -> None:
    ids = name_images(9, 1000)
    p, options = draw(1000, 0.3, 9), dict[str, Any]()
    if is_first:
        p[:, 1] = draw(1000, 0.5, 9)[:, 1]
        options["errors"] = dict.fromkeys(ids[:30], "storage")
        named = {"flagged share of Nodule 30% → 50%", "images not scored 0% → 3.0%"}
    else:
        p = np.where(p >= THRESHOLD, p, 0.29)  # the same flags, but scores near the threshold
        options["quality_flag"] = ["lateral"] * 60 + [None] * 940
        named = {"scores of Mass", "lateral 0% → 6.0%"}
    last = write_night(tmp_path / "last", "2026-03-05", ids, p, **options)
    metrics = report([*quiet, last], tmp_path / "out")
    found = metrics["nights"]
    assert found["changed"] == found["changed_over_nights"] == ["2026-03-05"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    summary = page[page.index('id="summary"') :]
    for name in named:
        assert name in found["words"]
        assert name in summary[: summary.index("</li>")]


def test_nights_have_a_name_each(tmp_path: Path) -> None:
    p = np.full((1, 2), 0.1)
    days = ["2026-03-01", "2026-03-01", "2026-03-02", None]
    folders = [write_night(tmp_path / f"n{k}", day, [f"{k}.png"], p) for k, day in enumerate(days)]
    run = json.loads((tmp_path / "n1" / "run.json").read_text(encoding="utf-8"))
    # A retry on another day does not move a night.
    run |= {"first_finished": "2026-03-01T23:10:00+00:00", "finished": "2026-03-09T00:00:00+00:00"}
    (tmp_path / "n1" / "run.json").write_text(json.dumps(run), encoding="utf-8")
    _, nights = read_nights(folders)
    assert [night.night.name for night in nights] == ["n3", "2026-03-01 04:30", "2026-03-01 23:10", "2026-03-02"]


def test_what_cannot_be_one_table_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = np.full((2, 2), 0.1)
    good = write_night(tmp_path / "good", "2026-03-01", ["a", "b"], p, content_digest=["0" * 64, "1" * 64])
    other = write_night(tmp_path / "other", "2026-03-02", ["c", "d"], p, model={**MODEL, "digest": "d2" * 32})
    running = write_night(tmp_path / "running", "2026-03-02", ["c", "d"], p, finished=False)
    changed = write_night(tmp_path / "changed", "2026-03-02", ["b", "c"], p + 0.5)
    person = write_night(tmp_path / "person", "2026-03-02", ["b", "c"], p, patient_id=["x", "y"])
    copied = write_night(tmp_path / "copied", "2026-03-02", ["b", "c"], p, content_digest=["2" * 64, "3" * 64])
    (tmp_path / "link").symlink_to(good)
    pq.write_table(pa.table({"image_id": ["z"], "p_Mass": [0.5]}), tmp_path / "table.parquet")
    for words, reason in (
        ([good, other], "model"),
        ([good, running], "did not finish"),
        ([good, good], "twice"),
        ([good, str(tmp_path / "link")], "same folder"),
        ([good, str(tmp_path / "table.parquet")], "only such folders"),
        ([str(tmp_path / "no*")], "matches nothing"),
        ([good, changed], "'b'"),
        ([good, person], "'b'"),
        ([good, copied], "'b'"),
    ):
        assert cli.main(["report", *words, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert reason in error
        assert not (tmp_path / "out").exists()
    inside = Path(good) / "scores" / "report"
    assert cli.main(["report", good, write_night(tmp_path / "n", None, ["e"], p[:1]), "--out", str(inside)]) == 2
    assert not inside.exists()


def test_heat_maps_come_from_the_night_of_the_row(tmp_path: Path) -> None:
    p = np.full((2, 2), 0.2)
    folders = [write_night(tmp_path / f"n{k}", f"2026-03-0{k + 1}", ["a", f"b{k}"], p) for k in range(3)]
    for k in (0, 1):
        (tmp_path / f"n{k}" / overlays.HEATMAPS).mkdir()
        line = dict.fromkeys(overlays.SCHEMA.names) | {"finding": "Mass", "rank": 1, "p": 0.2, "evidence": k + 1.0}
        line |= {"height": 1, "width": 1, "map": [k + 1.0], "picture_height": 9, "picture_width": 9}
        line |= {"top": 0.0, "left": 0.0, "bottom": 1.0, "right": 1.0}
        maps = pa.Table.from_pylist([line | {"image_id": name} for name in ("a", f"b{k}")], overlays.SCHEMA)
        pq.write_table(maps, tmp_path / f"n{k}" / overlays.HEATMAPS / "part-00000.parquet")
    table, _ = read_nights(folders[:2])
    found = HeatMapReader(table).read(["a", "b0", "b1", "unknown"])
    assert {key: heatmap.evidence for key, heatmap in found.items()} == {
        ("a", "Mass"): 2.0,
        ("b0", "Mass"): 1.0,
        ("b1", "Mass"): 2.0,
    }
    table, _ = read_nights(folders)  # the latest row of a has no map
    assert set(HeatMapReader(table).read(["a", "b1"])) == {("b1", "Mass")}


def test_nights_of_different_weights_are_ranked_by_those_of_the_latest(tmp_path: Path) -> None:
    p = np.array([[0.5, 0.1], [0.1, 0.4]])
    old = write_night(tmp_path / "old", "2026-03-01", ["a", "b"], p)
    new = write_night(tmp_path / "new", "2026-03-02", ["c", "d"], p / 2, weights={"Mass": 0.0, "Nodule": 1.0})
    table, _ = read_nights([old, new])
    assert dict(zip(table.ids, table.priority.round(6), strict=True)) == {"a": 0.1, "b": 0.4, "c": 0.05, "d": 0.2}
    metrics = report([old, new], tmp_path / "out")
    assert any("weights" in note for note in metrics["notes"])
    # Images with a flag come first.
    assert [line["image_id"] for line in read_csv(tmp_path / "out" / "worklist.csv")] == [*"badc"]
