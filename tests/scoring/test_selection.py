"""`score --skip-scored` and `score.select`: which images are scored, and the counts of the others. Without Ray."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from dicomweb_server import DicomwebServer
from score_folders import arguments, assert_done, assert_refused, modification_times, read_rows, write_archive
from test_pacs import make_instance

sys.path.insert(0, str(Path(__file__).parents[1] / "imaging"))
from test_dicom import file_of

from ray_cxr.config import ScoreSettings
from ray_cxr.scoring import pipeline
from ray_cxr.scoring.plan import ScoreRequest, plan_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_ray")]


def write_dicom(path: Path, uid: str, study: str = "1.2.3", seed: int = 0, **fields: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64), dtype=np.uint8)
    path.write_bytes(file_of(pixels, SOPInstanceUID=uid, StudyInstanceUID=study, PatientID="P", **fields))
    return path


@pytest.fixture(scope="module")
def pngs(phantoms) -> list[Path]:
    files = sorted(Path(phantoms.images).rglob("*.png"))
    return [path for path in files if path.stat().st_size > 3000][:6]


def test_two_nights(tiny_bundle, pngs, tmp_path: Path, command, caplog) -> None:
    """The second night scores what is new, what failed for a while, and files whose UID says nothing."""
    images, nights = tmp_path / "images", tmp_path / "nights"
    images.mkdir()
    for i in range(3):
        shutil.copy(pngs[i], images / f"{i}.png")
    write_dicom(images / "a.dcm", "1.2.1")
    write_dicom(images / "same1.dcm", "1.2.9", seed=1)  # a faulty anonymiser gave them one UID
    write_dicom(images / "same2.dcm", "1.2.9", seed=2)
    (images / "bad.png").write_bytes(b"no image")
    (images / "gone.png").symlink_to(tmp_path / "later.png")
    one, two, three = nights / "1", nights / "2", nights / "3"
    assert_done(command(*arguments(tiny_bundle, images, one)))
    (nights / "0").mkdir()
    (nights / "0" / "input.parquet").touch()  # killed before it started
    (nights / "report").mkdir()
    (nights / "report" / "metrics.parquet").touch()
    (nights / "labels.parquet").touch()
    named = arguments(tiny_bundle, images, two, "--skip-scored", one, nights / "report")
    assert_refused(command(*named), "report")

    os.rename(images / "0.png", images / "renamed.png")
    write_dicom(images / "a.dcm", "1.2.1", ImageComments="changed by the archive")
    write_dicom(images / "same3.dcm", "1.2.9", seed=3)
    write_dicom(images / "other.dcm", "1.2.1", study="1.9", seed=4)  # the UID of another study's image
    shutil.copy(pngs[3], tmp_path / "later.png")
    write_archive(images / "more.tar.gz", [("x.png", pngs[1].read_bytes()), ("y.png", pngs[4].read_bytes())])
    given = arguments(tiny_bundle, images, two, "--skip-scored", nights / "*")
    said = assert_done(command(*given))
    assert "labels.parquet, report" in caplog.text
    assert "left out: 7 scored before (1 by SOP Instance UID, 6 by digest)" in said
    assert sorted(read_rows(two)["image_id"]) == ["gone.png", "other.dcm", "same3.dcm", "y.png"]
    run = json.loads((two / "run.json").read_text(encoding="utf-8"))["selection"]
    assert (run["listed"], run["by_digest"], run["failed_before"]) == (12, 6, {"not_an_image": 1})
    assert run["skip_scored"] == [str(one)]

    # Nothing is new: no folder, and the nightly job does not fail.
    said = assert_done(command(*arguments(tiny_bundle, images, three, "--skip-scored", one, two)))
    assert "nothing to score" in said
    assert not three.exists()
    before = modification_times(nights)
    assert "already complete" in assert_done(command(*given))
    assert modification_times(nights) == before


@pytest.mark.long
def test_a_killed_night_continues_with_its_own_images(tiny_bundle, pngs, tmp_path: Path, command, monkeypatch) -> None:
    images, nights = tmp_path / "images", tmp_path / "nights"
    images.mkdir()
    for i in range(2):
        shutil.copy(pngs[i], images / f"{i}.png")
    assert_done(command(*arguments(tiny_bundle, images, nights / "1")))
    for i in range(2, 5):
        shutil.copy(pngs[i], images / f"{i}.png")
    given = arguments(tiny_bundle, images, nights / "2", "--skip-scored", nights / "*", "--set", "rows_per_file=2")
    run = pipeline.run_tasks

    def die(tasks, *rest):
        yield from run(tasks[:1], *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_tasks", die)
        assert command(*given)[0] == 128 + signal.SIGINT
    assert len(read_rows(nights / "2")) == 2
    # Another night may not guess which of its rows there will be.
    other = arguments(tiny_bundle, images, nights / "3", "--skip-scored", nights / "*")
    assert_refused(command(*other), str(nights / "2"), "did not finish")
    assert_done(command(*arguments(tiny_bundle, images, nights / "4")))  # has all images
    assert "left out: 2 scored before" in assert_done(command(*given))
    assert read_rows(nights / "2")["image_id"].tolist() == ["2.png", "3.png", "4.png"]
    plain = [word for word in given if word not in ("--skip-scored", str(nights / "*"))]
    assert_refused(command(*plain), "skip_scored")


def test_earlier_scores_must_fit(tiny_bundle, scores: Path, manifest: Path, pngs, tmp_path: Path, command) -> None:
    key, other, old = (tmp_path / name for name in ("key", "other", "old"))
    key.write_text("a secret of more than sixteen bytes")

    def refuse(folder: Path | str, *words: str, more: tuple[str, ...] = ()) -> None:
        given = arguments(tiny_bundle, manifest, tmp_path / "out", "--skip-scored", folder, *more)
        assert_refused(command(*given), "--skip-scored", *words)
        assert not (tmp_path / "out").exists()

    refuse(tmp_path / "none", "no such file or folder")
    refuse(tmp_path / "none" / "*", "matches no folder")
    refuse(tiny_bundle.path, "is a bundle")
    refuse(scores, "tta", more=("--set", "tta=2"))
    refuse(scores, "pseudonyms", more=("--set", f"pseudonym_key={key}"))
    for folder, change in ((other, {"model_digest": "0" * 64}), (old, {})):
        shutil.copytree(scores, folder)
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        (folder / "settings.json").write_text(json.dumps({**settings, **change}), encoding="utf-8")
    refuse(other, "model")
    for part in old.glob("scores/*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns(["content_digest"]), part)
    refuse(old, "earlier version")


@pytest.mark.long
def test_pseudonyms_are_compared_with_the_same_key(tiny_bundle, pngs, tmp_path: Path, command) -> None:
    images, key = tmp_path / "images", tmp_path / "key"
    key.write_text("a secret of more than sixteen bytes")
    write_dicom(images / "a.dcm", "1.2.1")
    shutil.copy(pngs[0], images / "b.png")
    more = ("--set", f"pseudonym_key={key}")
    assert_done(command(*arguments(tiny_bundle, images, tmp_path / "1", *more)))
    write_dicom(images / "c.dcm", "1.2.2", seed=1)
    said = assert_done(command(*arguments(tiny_bundle, images, tmp_path / "2", *more, "--skip-scored", tmp_path / "1")))
    assert "(1 by SOP Instance UID, 1 by digest)" in said
    assert read_rows(tmp_path / "2")["image_id"].tolist() == ["c.dcm"]


def select(bundle, out: Path, **source: str) -> tuple[list[str], dict]:
    plan = plan_run(ScoreRequest(bundle.path, out, ScoreSettings(select="frontal"), **source))
    assert plan.rows.selection is not None
    return plan.rows.ids.to_pylist(), vars(plan.rows.selection)


def test_one_frontal_image_of_each_study(tiny_bundle, pngs, tmp_path: Path, command) -> None:
    images = tmp_path / "images"
    studies = {
        "1.1": ["LL", "AP", "PA", "PA"],
        "1.2": ["LL", "", "AP"],
        "1.3": ["LL", "", ""],  # neither is known to be frontal
        "1.4": ["LL", "RLO"],
        "1.5": ["LLD", ""],  # the one of unknown view can be the better one
    }
    for study, views in studies.items():
        for i, view in enumerate(views):
            write_dicom(images / f"{study[-1]}{i}.dcm", f"{study}.{i + 1}", study, ViewPosition=view)
    ids, found = select(tiny_bundle, tmp_path / "out", images=str(images))
    assert ids == ["12.dcm", "22.dcm", "31.dcm", "32.dcm", "50.dcm", "51.dcm"]
    assert found["not_selected"] == {
        "lateral": 4,
        "another frontal image of the study": 2,
        "unknown view, next to a frontal image": 1,
        "oblique": 1,
    }
    assert (found["unknown_view"], found["studies_without_frontal"]) == ((3, 2), 1)
    # The choice does not depend on the order of the rows.
    table = pd.DataFrame({"image_id": [f"{i}.dcm" for i in range(3)], "view": ["AP", "L", None], "study_id": "7"})
    table["path"] = [str(images / "00.dcm"), str(images / "01.dcm"), str(images / "12.dcm")]
    table.iloc[::-1].to_parquet(tmp_path / "m.parquet")
    assert select(tiny_bundle, tmp_path / "out", manifest=str(tmp_path / "m.parquet"))[0] == ["2.dcm"], "PA by header"
    table["view"] = "PA"
    table.iloc[::-1].to_parquet(tmp_path / "m.parquet")
    assert select(tiny_bundle, tmp_path / "out", manifest=str(tmp_path / "m.parquet"))[0] == ["0.dcm"]
    for name in ("1.png", "2.png"):
        shutil.copy(pngs[0], images / name)
    for path in images.glob("*.dcm"):
        path.unlink()
    given = arguments(tiny_bundle, images, tmp_path / "out", "--set", "select=frontal")
    assert_refused(command(*given), "score.select=frontal", "no image has a study")


@pytest.mark.long
def test_selected_images_are_scored_and_resumed(tiny_bundle, tmp_path: Path, command) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    write_dicom(images / "a.dcm", "1.2.1", ViewPosition="PA")
    write_dicom(images / "b.dcm", "1.2.2", ViewPosition="LL")
    given = arguments(tiny_bundle, images, out, "--set", "select=frontal")
    assert "left out by score.select=frontal: 1 of 2 images" in assert_done(command(*given, "--dry-run"))
    assert not out.exists()
    assert "left out by score.select=frontal: 1 of 2 images (lateral 1)" in assert_done(command(*given))
    assert read_rows(out)["image_id"].tolist() == ["a.dcm"]
    (out / "scores" / "part-00000.parquet").unlink()
    (out / "_SUCCESS").unlink()
    (images / "b.dcm").unlink()
    assert "left out by score.select=frontal: 1 of 2 images" in assert_done(command(*given))
    assert_refused(command(*arguments(tiny_bundle, images, out)), "select frontal")


@pytest.mark.long
@pytest.mark.parametrize("hide", [False, True])
def test_nights_of_a_pacs_fetch_only_what_is_new(tiny_bundle, tmp_path: Path, command, hide: bool) -> None:
    key, nights = tmp_path / "key", tmp_path / "nights"
    key.write_text("a secret of more than sixteen bytes")
    options = ["--set", "select=frontal", "--set", "pacs.per_second=1000", "--set", "pacs.attempts=1"]
    options += ["--set", f"pseudonym_key={key}"] if hide else []
    with DicomwebServer() as pacs:

        def score(name: str, *more: object) -> set[str]:
            """Return the instances that a night fetched."""
            before = len(pacs.requests)
            search = f"{pacs.address}?StudyDate=20260105"
            assert_done(command(*arguments(tiny_bundle, search, nights / name, *options, *more)))
            paths = [request.path for request in pacs.requests[before:]]
            return {path.rpartition("/instances/")[2] for path in paths if "/instances/" in path}

        for number in range(4):  # the odd ones are lateral
            pacs.add(make_instance(number))
        pacs.fail(500, times=1, where="/instances/1.2.1.1.2")
        assert score("1") == {"1.2.0.1.0", "1.2.1.1.2"}
        pacs.add(make_instance(4))
        assert score("2", "--skip-scored", nights / "1") == {"1.2.1.1.2", "1.2.2.1.4"}
        assert score("3", "--skip-scored", nights / "*") == set()
    rows = read_rows(nights / "2")
    assert (rows["status"] == "ok").all()
    assert ("1.2.2.1.4" in rows["sop_instance_uid"].tolist()) != hide
    run = json.loads((nights / "2" / "run.json").read_text(encoding="utf-8"))["selection"]
    assert (run["listed"], run["not_selected"], run["by_uid"], run["retried"]) == (5, {"lateral": 2}, 1, 1)
