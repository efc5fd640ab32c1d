"""`score` from archives and DICOM folders, and with decoding apart from the model. Without Ray, save for one test."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from score_folders import arguments, assert_done, assert_refused, make_job, read_rows, write_archive

sys.path.insert(0, str(Path(__file__).parents[1] / "imaging"))
from test_dicom import file_of

from ray_cxr.data.partition import Range
from ray_cxr.scoring import pipeline
from ray_cxr.scoring.actors import ModelActor, decode_task
from ray_cxr.scoring.ranges import ScoreTask

pytestmark = pytest.mark.slow
P = "^p_"


@pytest.fixture(scope="module")
def members(phantoms) -> list[tuple[str, bytes]]:
    """Names and contents of twenty images and an empty file."""
    files = sorted(Path(phantoms.images).rglob("*.png"))
    whole = [path for path in files if path.stat().st_size > 3000][:20]
    empty = next(path for path in Path(phantoms.images).rglob("*") if path.is_file() and path.stat().st_size == 0)
    return [(path.name, path.read_bytes()) for path in (*whole, empty)]


@pytest.mark.usefixtures("without_ray")
def test_archives_give_the_rows_of_their_files(tiny_bundle, members, tmp_path: Path, command) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    plain.mkdir()
    packed.mkdir()
    for name, data in members:
        (plain / name).write_bytes(data)
    write_archive(packed / "images_001.tar.gz", [(f"images/{name}", data) for name, data in members[:11]])
    write_archive(packed / "images_002.tar.gz", [(f"images/{name}", data) for name, data in reversed(members[11:])])
    (packed / "readme.txt").write_text("hello")
    small_files = ["--set", "rows_per_file=8"]
    tables = []
    for folder in (plain, packed):
        out = folder.with_suffix(".out")
        said = assert_done(command(*arguments(tiny_bundle, folder, out, *small_files)))
        assert ("1 .txt" in said) == (folder == packed), "files that are no images are counted"
        tables.append(read_rows(out).set_index("image_id").sort_index())
    one, two = tables
    assert two["path"].str.contains(r"images_00[12]\.tar\.gz::images/").all()
    pd.testing.assert_frame_equal(one.drop(columns="path"), two.drop(columns="path"), rtol=0, atol=1e-5)
    assert two["error_code"].dropna().tolist() == ["empty"]
    # No file has rows of both archives: 11 rows of the first make two files, 10 of the second two more.
    parts = sorted((out / "scores").glob("*.parquet"))
    assert [len(pd.read_parquet(part)) for part in parts] == [8, 3, 8, 2]

    # A lost file of the second archive is scored again, although the first archive is gone.
    parts[3].unlink()
    (out / "_SUCCESS").unlink()
    (packed / "images_001.tar.gz").rename(tmp_path / "away")
    assert "scored 2 images" in assert_done(command(*arguments(tiny_bundle, packed, out, *small_files)))
    pd.testing.assert_frame_equal(read_rows(out).set_index("image_id").sort_index(), two, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("without_ray")
def test_damaged_and_missing_archives_are_errors_of_their_rows(tiny_bundle, members, tmp_path: Path, command) -> None:
    noise = np.random.default_rng(0).bytes(200_000)  # does not compress, so that the cut is in it
    write_archive(tmp_path / "cut.tar.gz", [*members[:3], ("noise.png", noise), *members[3:6]])
    whole = (tmp_path / "cut.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    write_archive(tmp_path / "good.tar.gz", members[:6])
    paths = [f"{tmp_path}/cut.tar.gz::{name}" for name, _ in members[:6]]
    paths += [f"{tmp_path}/good.tar.gz::{members[0][0]}", f"{tmp_path}/good.tar.gz::none.png"]
    paths += [f"{tmp_path}/gone.tar.gz::a.png", str(tmp_path / "gone.png"), None]
    table = pd.DataFrame({"image_id": [f"{i}.png" for i in range(len(paths))], "path": paths})
    table.to_parquet(tmp_path / "m.parquet")
    given = arguments(tiny_bundle, tmp_path / "m.parquet", tmp_path / "out", "--max-error-rate", "1")
    assert_done(command(*given))
    found = read_rows(tmp_path / "out").set_index("image_id").loc[table["image_id"]]
    expected = ["ok"] * 3 + ["truncated"] * 3 + ["ok"] + ["missing"] * 4
    assert found["error_code"].fillna("ok").tolist() == expected
    assert found["error"].dropna().str.len().min() > 5


def write_dicom(path: Path, patient: str, **fields: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    path.write_bytes(file_of(pixels, PatientID=patient, StudyInstanceUID=f"1.2.{len(patient)}", **fields))


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("decode", ["inside", "apart"])
def test_dicom_headers_fill_ids_which_a_key_hides(tiny_bundle, tmp_path: Path, command, decode: str) -> None:
    folder, key, short, plain, hidden = (tmp_path / name for name in ("dicom", "key", "short", "plain", "hidden"))
    write_dicom(folder / "a" / "1.dcm", "Doe^Jane", PatientAge="058Y", PatientSex="M", ViewPosition="AP")
    write_dicom(folder / "b" / "1.dcm", "Roe", PatientOrientation=["R", "F"], BurnedInAnnotation="YES")
    write_dicom(folder / "b" / "IM0001", "Roe")  # no suffix
    write_dicom(folder / "b" / "ct.dcm", "Roe", Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    key.write_text("a secret of more than sixteen bytes")
    short.write_text("secret")
    more = ["--set", f"decode={decode}"]
    for out, options in ((plain, more), (hidden, [*more, "--set", f"pseudonym_key={key}"])):
        assert_done(command(*arguments(tiny_bundle, folder, out, *options)))
    one, two = (read_rows(out).set_index("image_id") for out in (plain, hidden))
    patients = {"a/1.dcm": "Doe^Jane", "b/1.dcm": "Roe", "b/IM0001": "Roe", "b/ct.dcm": "Roe"}
    assert one["patient_id"].to_dict() == patients
    assert one["error_code"].dropna().to_dict() == {"b/ct.dcm": "not_a_radiograph"}
    assert one.loc["a/1.dcm", ["sex", "view", "age"]].tolist() == ["M", "AP", 58]
    assert one["quality_flag"].dropna().to_dict() == {"b/1.dcm": "reoriented"}
    for column in ("patient_id", "study_id"):
        assert two[column].str.fullmatch("[0-9a-f]{32}").all()
        assert two[column].nunique() == one[column].nunique() == 2
    assert two.loc["b/1.dcm", "patient_id"] == two.loc["b/IM0001", "patient_id"]
    for file in hidden.rglob("*.*"):
        assert b"more than sixteen" not in file.read_bytes()
    pd.testing.assert_frame_equal(one.filter(regex=P), two.filter(regex=P), rtol=0, atol=1e-6)
    if decode == "inside":
        assert_refused(command(*arguments(tiny_bundle, folder, hidden)), "pseudonyms")
        for bad in (short, tmp_path / "none"):
            given = arguments(tiny_bundle, folder, tmp_path / "x", "--set", f"pseudonym_key={bad}")
            assert_refused(command(*given), f"pseudonym_key {bad}")


@pytest.mark.ray
def test_error_in_an_actor_is_one_line(shared_ray, tiny_bundle, manifest: Path, tmp_path, command, monkeypatch) -> None:
    """The constructor of an actor finds no bundle: it is removed once the checks of the command are done."""
    bundle = shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    run = pipeline.run_tasks
    monkeypatch.setattr(pipeline, "run_tasks", lambda *given: shutil.move(bundle, tmp_path / "moved") and run(*given))
    outcome = command(*arguments(bundle, manifest, tmp_path / "out"))
    assert_refused(outcome, str(bundle), "no such file or folder")


def test_repeated_task_keeps_rows_and_images_together(without_ray, tiny_bundle, manifest, tmp_path, command) -> None:
    """A restarted actor gets its task again. By then its own first write has changed which rows are errors."""
    table = pd.read_parquet(manifest)
    table = table[table["path"].notna()].head(5).reset_index(drop=True)
    for row, path in enumerate(table["path"]):
        table.loc[row, "path"] = f"{tmp_path}/{row}.png"
        shutil.copy(path, tmp_path / (f"{row}.away" if row in (1, 2, 3) else f"{row}.png"))
    table.to_parquet(tmp_path / "m.parquet")
    out = tmp_path / "out"
    assert_done(command(*arguments(tiny_bundle, tmp_path / "m.parquet", out, "--max-error-rate", "1")))
    for row in (1, 2):  # two of three come back
        shutil.move(tmp_path / f"{row}.away", table.loc[row, "path"])
    job = make_job(tiny_bundle, out, rows_per_file=16)
    (decoded,) = decode_task(ScoreTask((Range(0, 0, len(table)),), retry=True).to_row(), job)
    actor = ModelActor(job, 1)
    good = [0, 1, 2, 4]
    expected = tiny_bundle.predict(table.loc[good, "path"].tolist(), precision="fp32").filter(regex=P)
    for _ in range(2):
        assert actor(decoded)["done"] == [0]
        found = read_rows(out)
        assert found["image_id"].tolist() == table["image_id"].tolist()
        assert found["error_code"].dropna().to_dict() == {3: "missing"}
        got = found.loc[good, expected.columns].to_numpy(float)
        np.testing.assert_allclose(got, expected.to_numpy(), rtol=0, atol=1e-5)
    # A run that `--fresh` replaced writes nothing more.
    before = (out / "scores" / "part-00000.parquet").read_bytes()
    (out / "settings.json").write_text('{"kind": "score", "removing": true}', encoding="utf-8")
    stopped = actor(decoded)
    assert stopped["error"]
    assert not len(stopped["done"])
    assert (out / "scores" / "part-00000.parquet").read_bytes() == before
