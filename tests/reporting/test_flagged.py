"""What needs a look: counts of flags, the first rows of the worklist with images, and scores.csv."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from score_archive import Archive, Report, add_heatmaps, report, without_drawing

from ray_cxr import cli
from ray_cxr.imaging.overlays import WHOLE, HeatMap
from ray_cxr.labels import FINDINGS
from ray_cxr.reporting import worklist_page
from ray_cxr.reporting.scores import read_scores
from ray_cxr.reporting.worklist import build_worklist

NAMES = ("Cardiomegaly", "Effusion", "Hernia")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Hernia has no operating point."""
    return Archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def scores(archive: Archive) -> str:
    return archive.scores(
        operating_points={key: {"threshold": archive.threshold} for key in NAMES[:2]} | {"Hernia": None}
    )


@pytest.fixture(scope="module")
def screened(archive: Archive, scores: str, tmp_path_factory: pytest.TempPathFactory) -> Report:
    for file in Path(scores, "scores").glob("*.parquet"):
        table = pq.read_table(file)
        if "flag_Hernia" in table.column_names:
            pq.write_table(table.drop_columns(["flag_Hernia"]), file)
    return report(archive, tmp_path_factory.mktemp("screened") / "out", scores=scores, images=True)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def images_of(page: str) -> list[Image.Image]:
    """Return the images of the worklist."""
    found = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def expect(archive: Archive, rows: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    flagged = rows & np.any([archive.p[f] >= archive.threshold for f in names], axis=0)
    studies = {(archive.patient[i], archive.study[i]) for i in np.flatnonzero(flagged) if archive.study[i]}
    patients = {archive.patient[i] for i in np.flatnonzero(flagged)}
    return {"images": flagged.sum(), "n": rows.sum(), "studies": len(studies), "patients": len(patients)}


def test_flagged_images_studies_and_patients_are_counted_by_finding(archive: Archive, screened: Report) -> None:
    found = screened.metrics["flagged"]
    assert (found["images"], found["studies"], found["patients"]) == (180, 59, 59)
    for entry, names in ((found["any_finding"], NAMES[:2]), *((found["findings"][f], (f,)) for f in NAMES[:2])):
        expected = expect(archive, archive.ok, names)
        assert {key: entry[key] for key in expected} == expected
        assert entry["share"] == pytest.approx(expected["images"] / expected["n"])
    assert found["failed"] == {"images": 3, "by_code": {"missing": 2, "corrupt": 1}}
    doubtful = np.arange(archive.n) == 50
    flagged = np.any([archive.p[f] >= archive.threshold for f in NAMES[:2]], axis=0)
    assert found["need_look"] == (~archive.ok | doubtful | flagged).sum()
    assert found["quality_flags"]["also_flagged"] == (doubtful & flagged).sum()
    quality = found["quality_flags"]
    assert (quality["images"], quality["by_flag"]) == (1, {"lateral": 1})
    (doubtful,) = quality["first_images"]["lateral"]
    assert doubtful in screened.page, "a reader must find the image"


def test_a_finding_without_operating_point_is_named_and_has_no_count(screened: Report) -> None:
    found = screened.metrics["flagged"]
    assert found["without_flags"] == ["Hernia"]
    assert "Hernia" not in found["findings"]
    section = screened.page.partition('id="needs-look"')[2].partition("<h2")[0]
    assert "Hernia" in section


def test_unknown_studies_and_patients_are_unknown(archive: Archive, tmp_path: Path) -> None:
    table = pq.read_table(f"{archive.scores()}/scores").drop_columns(["patient_id", "study_id", "quality_flag"])
    pq.write_table(table, tmp_path / "other.parquet")
    found = report(archive, tmp_path / "out", scores=str(tmp_path / "other.parquet")).metrics["flagged"]
    assert found["any_finding"]["images"] > 0
    for entry in (found, found["any_finding"], *found["findings"].values()):
        assert (entry["studies"], entry["patients"]) == (None, None)


def test_scores_without_flags_flag_nothing_and_say_so(archive: Archive, tmp_path: Path) -> None:
    table = pq.read_table(f"{archive.scores()}/scores", columns=["image_id", "p_Effusion", "p_Mass"][:2])
    pq.write_table(table, tmp_path / "other.parquet")
    written = report(archive, tmp_path / "out", scores=str(tmp_path / "other.parquet"), images=True)
    found = written.metrics["flagged"]
    assert (found["any_finding"], found["findings"], found["without_flags"]) == (None, {}, ["Effusion"])
    assert not images_of(written.page)


@pytest.mark.parametrize("labelled", [False, True])
def test_images_that_all_failed_are_the_reason_not_the_operating_points(
    tmp_path: Path, labelled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Archive(tmp_path, patients=4)
    other.ok[:] = False
    scores, out = other.scores(), tmp_path / "out"
    with without_drawing():
        assert cli.main(["report", scores, "--out", str(out), *(["--manifest", other.labels()] * labelled)]) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["flagged"]["any_finding"] is None
    assert metrics["flagged"]["reason"] == metrics["alerts"]["reason"] == "no image was scored"
    printed = capsys.readouterr().out
    for text in (printed, *((out / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))):
        assert "no image was scored" in text
        assert not re.findall("(?:no|with|without an) operating points?", text)


def test_images_without_study_are_counted_beside_the_studies(screened: Report) -> None:
    """Two of three images of a patient have a study; the first line, the table and the summary say so."""
    facts = re.search(r'id="facts">(.*?)</p>', screened.page)
    assert facts is not None
    assert "59 studies (59 images without a study id)" in facts[1]
    table = (screened.out / "report.md").read_text(encoding="utf-8").partition("| any finding |")[2].partition("\n")[0]
    found = screened.metrics["flagged"]["any_finding"]
    assert f"{found['studies']} and {found['images_without_study']} images without" in table


@pytest.mark.slow
def test_what_failed_counts_the_images_of_the_report(archive: Archive, tmp_path: Path) -> None:
    """One image of the table has a quality flag, in the test split; the three failed ones are in it too."""
    page = report(archive, tmp_path / "out", labels=archive.labels(), split="train").page
    assert 'id="failed"' not in page
    page = report(archive, tmp_path / "out", labels=archive.labels(), split="test").page
    section = page.partition('id="failed"')[2].partition("<h2")[0]
    assert section.count("of 135 images") == 2


def test_a_report_on_a_split_holds_the_images_of_that_split(archive: Archive, tmp_path: Path) -> None:
    out, labels = tmp_path / "out", archive.labels()
    with without_drawing():
        status = cli.main(
            ["report", archive.scores(), "--labels", labels, "--split", "test", "--out", str(out), "--csv"]
        )
    assert status == 0
    listed = np.flatnonzero(archive.split == "test")
    worklist, rows = read_csv(out / "worklist.csv"), read_csv(out / "scores.csv")
    assert sum(int(line["n_images"]) for line in worklist) == len(listed)
    assert {line["patient_id"] for line in worklist} == {archive.patient[i] for i in listed}
    study = next(line for line in worklist if line["study_id"] == "s20")
    assert np.float32(study["p_Effusion"]) == archive.p["Effusion"][60:62].max()
    assert np.float32(study["c_Effusion"]) == (archive.p["Effusion"][60:62] * 0.9).max()
    assert [line["image_id"] for line in rows] == [archive.ids[i] for i in listed]
    first, failed = rows[0], rows[-1]
    i = listed[0]
    assert np.float32(first["p_Effusion"]) == archive.p["Effusion"][i]
    assert first["flag_Effusion"] == str(int(archive.p["Effusion"][i] >= archive.threshold))
    assert first["label_Effusion"] == str(archive.y["Effusion"][i])
    for row in rows:
        flagged = {name for name in FINDINGS if row.get(f"flag_{name}") == "1"}
        assert set(filter(None, row["flagged"].split("|"))) == flagged
    assert (first["status"], failed["status"], failed["error_code"]) == ("ok", "error", "missing")
    assert (failed["p_Effusion"], failed["c_Effusion"], failed["flag_Effusion"]) == ("", "", "")
    assert failed["label_Effusion"] == str(archive.y["Effusion"][listed[-1]])
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["flagged"]
    assert (metrics["images"], metrics["any_finding"]["n"]) == (len(listed), len(listed) - 3)


def test_scores_csv_is_safe_for_spreadsheets_and_goes_with_an_older_report(tmp_path: Path) -> None:
    other = Archive(tmp_path, patients=4)
    other.patient = ["007", "=1+1", *other.patient[2:]]
    scores = other.scores()
    written = report(other, tmp_path / "out", scores=scores, csv=True)
    assert [line["patient_id"] for line in read_csv(written.out / "scores.csv")][:2] == ["007", "'=1+1"]
    report(other, tmp_path / "out", scores=scores)
    assert not (tmp_path / "out" / "scores.csv").exists()


def test_first_rows_show_their_radiographs_or_why_not(archive: Archive, screened: Report) -> None:
    """One image in four exists as a file."""
    first = [line["image_id"] for line in screened.worklist()[:10]]
    existing = [name for name in first if Path(archive.root / "images" / name).exists()]
    shown = images_of(screened.page)
    assert len(shown) == len(existing)
    assert all(max(image.size) <= 320 for image in shown)
    section = screened.page.partition('id="worklist"')[2].partition("<h2")[0]
    assert f"{10 - len(existing)} of 10 radiographs were scored, but cannot be read" in section


@pytest.mark.slow
def test_the_first_rows_show_the_heat_map_of_their_first_finding(archive: Archive, tmp_path: Path) -> None:
    """Only images with a file can have one; a damaged file of maps costs the maps, not the report."""
    other = Archive(tmp_path, patients=4)
    scores = Path(other.scores())
    (scores / "heatmaps").mkdir()
    rows = [
        {"image_id": name, "finding": finding, "rank": 1, "p": 0.5, "evidence": 4.0, "height": 2, "width": 2}
        | {"map": [0.0, 1.0, 1.0, 2.0], "top": 0.0, "left": 0.0, "bottom": 1.0, "right": 1.0}
        | {"picture_height": 48, "picture_width": 40, "overlay": "none.png"}
        for name in other.ids
        for finding in other.diseases
    ]
    from ray_cxr.imaging.overlays import SCHEMA

    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), scores / "heatmaps" / "part-00000.parquet")
    written = report(other, tmp_path / "out", scores=str(scores), images=True)
    existing = sum(Path(other.root / "images" / row["image_id"]).exists() for row in written.worklist()[:10])
    coloured = [
        image for image in images_of(written.page) if np.ptp(np.asarray(image.convert("RGB")), axis=2).max() > 20
    ]
    assert len(coloured) == existing > 0
    (scores / "heatmaps" / "part-00000.parquet").write_bytes(b"damaged")
    options: dict[str, Any]
    for options in ({}, {"labels": other.labels(), "split": "train"}):
        again = report(other, tmp_path / "again", scores=str(scores), images=True, cases=True, **options)
        assert len(images_of(again.page.partition('id="worklist"')[2].partition("<h2")[0])) == existing
        assert any("part-00000.parquet: damaged" in note for note in again.metrics["notes"])
        assert 'id="heatmaps"' not in again.page


def test_a_card_of_two_images_names_the_image_of_a_finding_and_maps_only_its_own_flags(tmp_path: Path) -> None:
    """The first image of the study is flagged for Cardiomegaly without a map, the second for Effusion with one."""
    other = Archive(tmp_path, patients=4)
    for p in other.p.values():
        p[:] = 0.05
    other.p["Cardiomegaly"][0], other.p["Effusion"][1] = 0.99, 0.97
    table = read_scores(other.scores())
    cells = np.ones((2, 2), np.float32)
    maps = {
        (other.ids[i], "Effusion"): HeatMap(other.ids[i], "Effusion", 1, 0.5, cells, WHOLE, (48, 40), None)
        for i in (0, 1)
    }
    reader = SimpleNamespace(read=lambda ids: maps)
    row = worklist_page.list_rows(table, build_worklist(table), reader)[0]
    assert row.line["image_id"] == other.ids[0]
    assert [(found.finding, found.image_id) for found in row.findings if found.flagged] == [
        ("Cardiomegaly", None),
        ("Effusion", other.ids[1]),
    ]
    assert row.heatmap is None
    assert "Cardiomegaly" in row.no_heatmap


def test_empty_heat_maps_of_flags_are_counted_alike_on_page_and_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All maps of Effusion are empty but those of the first two flagged images; other findings have none."""
    other, out = Archive(tmp_path, patients=20), tmp_path / "out"
    scores = other.scores()
    add_heatmaps(scores, other, np.flatnonzero(other.ok), set())
    flagged = np.flatnonzero(other.ok & (other.p["Effusion"] >= other.threshold))
    part = Path(scores, "heatmaps", "part-00000.parquet")
    table = pq.read_table(part)
    kept = np.isin(table["image_id"].to_pylist(), [other.ids[i] for i in flagged[:2]])
    table = table.set_column(4, "evidence", pa.array(kept.astype(np.float32)))
    pq.write_table(table, part)
    with without_drawing():
        assert cli.main(["report", scores, "--out", str(out)]) == 0
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["heatmaps"] == {"flagged": len(flagged), "empty": len(flagged) - 2, "method": None}
    (warning,) = [one for one in metrics["warnings"] if one["kind"] == "empty_heatmaps"]
    assert warning["text"].startswith(f"{len(flagged) - 2} of {len(flagged)} ")
    assert warning["text"] in (out / "report.html").read_text(encoding="utf-8")
    assert warning["text"] in " ".join(capsys.readouterr().out.split())


def test_images_with_a_quality_flag_are_shown(tmp_path: Path) -> None:
    other = Archive(tmp_path, patients=20)
    Image.open(other.paths[48]).save(other.paths[50])
    section = report(other, tmp_path / "out", images=True).page.partition('id="failed"')[2].partition("<h2")[0]
    assert len(images_of(section)) == 1
    assert other.ids[50] in section
