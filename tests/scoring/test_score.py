"""`score` from outside: run the command, read the Parquet."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_cxr.config import ScoreSettings
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.data.sandbox import Picture
from ray_cxr.errors import ConfigError
from ray_cxr.models import predictions
from ray_cxr.scoring.engine import Job, Reading, Work
from ray_cxr.scoring.pipeline import actor_plan


def rows(scores: Path) -> pd.DataFrame:
    return pd.concat([pd.read_parquet(part) for part in sorted((scores / "scores").glob("*.parquet"))])


@pytest.mark.parametrize(
    ("nodes", "wanted", "files", "plan"),
    [
        ([1.0], None, 100, (1, 1)),
        ([2.0], None, 100, (1, 2)),
        ([16.0], None, 100, (4, 4)),
        ([16.0], None, 2, (2, 4)),
        ([0.0, 16.0], None, 100, (4, 4)),
        ([4.0, 2.0], None, 100, (3, 2)),
        ([8.0], 3, 100, (2, 3)),
    ],
)
def test_actors_fit_the_nodes(nodes: list[float], wanted: int | None, files: int, plan: tuple[int, int]) -> None:
    assert actor_plan(nodes, wanted, files) == plan
    assert plan[0] * plan[1] <= sum(nodes)


@pytest.mark.parametrize(("nodes", "wanted"), [([0.0], None), ([2.0, 2.0], 4)])
def test_what_does_not_fit_is_refused(nodes: list[float], wanted: int | None) -> None:
    with pytest.raises(ConfigError):
        actor_plan(nodes, wanted, 10)


@pytest.fixture(scope="module")
def scores(ray_here, tiny_bundle, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ray_cxr.cli import main

    out = tmp_path_factory.mktemp("scores") / "out"
    assert main(arguments(tiny_bundle, manifest, out)) == 0
    return out


def arguments(bundle, manifest: Path, out: Path, *more: str) -> list[str]:
    given = ["score", "--model", str(bundle.path), "--manifest", str(manifest), "--out", str(out)]
    return [*given, "--set", "rows_per_file=16", "--set", "batch_size=8", *more]


def job_of(bundle, out: Path, **settings) -> Job:
    return Job(
        bundle=str(bundle.path),
        out=str(out),
        digest=bundle.digest,
        precision="fp32",
        settings=ScoreSettings(batch_size=8, **settings),
        spec=bundle.input_spec,
        use_gpu=False,
        batch_size=8,
        key=None,
        settings_file=b"",
    )


def work_of(rows: pa.Table) -> Work:
    return Work(0, rows, None, None, np.zeros((len(rows), 0), np.float32), left=len(rows))


@pytest.mark.ray
def test_one_row_per_manifest_row_with_the_contracts_columns(scores: Path, manifest: Path, tiny_bundle) -> None:
    table, wanted = rows(scores), pd.read_parquet(manifest)
    assert table["image_id"].tolist() == wanted["image_id"].tolist()
    part = pq.read_table(scores / "scores" / "part-00000.parquet")
    assert part.schema.equals(predictions.schema(tiny_bundle.findings))
    assert len(part) == 16
    assert (scores / "_SUCCESS").exists()
    assert set(table.loc[table["status"] == "ok", "model_digest"]) == {tiny_bundle.digest}


@pytest.mark.ray
def test_broken_files_are_rows_with_a_code_and_no_model_column(scores: Path) -> None:
    bad = rows(scores).query("status == 'error'")
    assert sorted(bad["error_code"]) == ["blank", "corrupt", "empty", "missing", "not_an_image", "truncated"]
    model = [c for c in bad if c[:2] in ("p_", "c_") or c.startswith("flag_")]
    assert bad[[*model, "top_finding", "priority", "quality_flag", "model_digest"]].isna().all(axis=None)
    assert bad["error"].str.len().min() > 5


@pytest.mark.ray
def test_pixels_and_probabilities_are_those_of_training_and_of_predict(
    scores: Path, prepared: Path, tiny_bundle
) -> None:
    """Parity: score, predict on the path, and predict on the prepared pixels agree bit for bit."""
    table = rows(scores).set_index("image_id")
    data = PreparedSet(prepared, 64).load("test")
    columns = [f"p_{name}" for name in tiny_bundle.findings]
    from_prepared = tiny_bundle.predict(np.asarray(data.images), batch_size=8)[columns].to_numpy()
    from_paths = tiny_bundle.predict(table.loc[data.image_ids, "path"].tolist(), batch_size=8)[columns].to_numpy()
    np.testing.assert_array_equal(from_prepared, from_paths)
    # The tensors that a scoring actor feeds its network, without the actor.
    reading = Reading(job_of(tiny_bundle, scores), 2)
    works = [work_of(pq.read_table(scores / "input.parquet"))]
    fed_by_id = {
        works[w].rows["image_id"][i].as_py(): found.images[0]
        for (w, i), found in reading.pictures(works)
        if isinstance(found, Picture)
    }
    fed = np.stack([fed_by_id[name] for name in data.image_ids])
    assert fed.dtype == np.uint8
    np.testing.assert_array_equal(fed, data.images)
    np.testing.assert_allclose(table.loc[data.image_ids, columns].to_numpy(), from_paths, rtol=0, atol=1e-6)


@pytest.mark.ray
def test_run_json_and_the_bundles_files_stand_beside(scores: Path, manifest: Path, tiny_bundle) -> None:
    run = json.loads((scores / "run.json").read_text())
    n = len(pd.read_parquet(manifest))
    assert (run["rows"], run["ok"], run["errors"]) == (n, n - 6, 6)
    assert run["by_code"]["truncated"] == 1
    assert run["model_digest"] == tiny_bundle.digest
    assert run["last_run"]["rows_scored"] == n
    assert run["last_run"]["images_per_second"] > 0
    assert run["split"]["kind"] == "patient"
    assert {"ray", "keras", "tensorflow", "ray-cxr"} <= set(run["versions"])
    model = json.loads((scores / "model.json").read_text())
    assert model["findings"] == list(tiny_bundle.findings)
    assert model["operating_points"]["Cardiomegaly"]["threshold"] == 0.5
    assert (scores / "split.parquet").read_bytes() == (tiny_bundle.path / "split.parquet").read_bytes()


@pytest.mark.ray
def test_rerun_when_done_does_nothing(scores: Path, manifest: Path, tiny_bundle, command) -> None:
    before = {path: path.stat().st_mtime_ns for path in scores.rglob("*") if path.is_file()}
    code, out, _ = command(*arguments(tiny_bundle, manifest, scores))
    assert code == 0
    assert "nothing was left to do" in out
    assert {path: path.stat().st_mtime_ns for path in scores.rglob("*") if path.is_file()} == before


@pytest.mark.ray
def test_another_model_manifest_or_setting_is_refused(
    scores: Path, manifest: Path, tiny_bundle, tmp_path: Path, command
) -> None:
    from conftest import make_tiny_bundle

    other = make_tiny_bundle(tmp_path / "other", seed=1)
    short = tmp_path / "short.parquet"
    pq.write_table(pq.read_table(manifest).slice(0, 20), short)
    for bad, word in (
        (arguments(other, manifest, scores), "model_digest"),
        (arguments(tiny_bundle, short, scores), "input_digest"),
        (arguments(tiny_bundle, manifest, scores, "--set", "rows_per_file=8"), "rows_per_file 16 (now 8)"),
        (arguments(tiny_bundle, manifest, scores, "--limit", "5"), "(now 5)"),
    ):
        code, _, err = command(*bad)
        assert (code, err.count("\n")) == (2, 1)
        assert word in err
        assert "--fresh" in err


@pytest.mark.ray
def test_continues_with_what_is_absent_and_keeps_the_rest(
    scores: Path, manifest: Path, tiny_bundle, tmp_path: Path, command
) -> None:
    out = tmp_path / "again"
    shutil.copytree(scores, out)
    whole = rows(out)
    kept = out / "scores" / "part-00000.parquet"
    before = kept.stat().st_mtime_ns
    (out / "scores" / "part-00002.parquet").unlink()
    (out / "_SUCCESS").unlink()
    code, said, err = command(*arguments(tiny_bundle, manifest, out))
    assert code == 0, err
    assert "scored 16 images" in said
    assert kept.stat().st_mtime_ns == before
    pd.testing.assert_frame_equal(rows(out), whole)
    assert (out / "_SUCCESS").exists()


@pytest.mark.ray
def test_a_part_of_another_hand_is_noticed(scores: Path, manifest: Path, tiny_bundle, tmp_path: Path, command) -> None:
    out = tmp_path / "swapped"
    shutil.copytree(scores, out)
    shutil.copy(out / "scores" / "part-00001.parquet", out / "scores" / "part-00002.parquet")
    code, _, err = command(*arguments(tiny_bundle, manifest, out))
    assert code == 2
    assert "part-00002.parquet: does not hold the rows it should" in err


@pytest.mark.ray
def test_retry_errors_reads_again_only_what_may_have_passed(
    ray_here, manifest: Path, tiny_bundle, tmp_path: Path, command
) -> None:
    """A file in the middle of a part is away at first and back for the retry; one that is broken is not read again."""
    table = pq.read_table(manifest).slice(0, 12).to_pandas()
    (tmp_path / "pictures").mkdir()
    for row, path in enumerate(table["path"]):
        table.loc[row, "path"] = str(tmp_path / "pictures" / Path(path).name)
        shutil.copy(path, table.loc[row, "path"])
    Path(table.loc[3, "path"]).write_text("not a picture")
    away = Path(table.loc[5, "path"])
    away.rename(tmp_path / "away")
    table.to_parquet(tmp_path / "m.parquet")
    given = arguments(tiny_bundle, tmp_path / "m.parquet", tmp_path / "out")
    code, _, err = command(*given)
    assert code == 0, err
    before = rows(tmp_path / "out")
    assert before["error_code"].dropna().to_dict() == {3: "not_an_image", 5: "missing"}

    (tmp_path / "away").rename(away)
    shutil.copy(table.loc[0, "path"], table.loc[3, "path"])  # mended too, but its code is none that may pass
    code, said, err = command(*given, "--retry-errors")
    assert code == 0, err
    assert "scored 1 images" in said
    after = rows(tmp_path / "out")
    assert after["image_id"].tolist() == table["image_id"].tolist()
    assert after["error_code"].dropna().to_dict() == {3: "not_an_image"}
    pd.testing.assert_frame_equal(after.drop(index=5), before.drop(index=5))
    p = [f"p_{name}" for name in tiny_bundle.findings]
    expected = tiny_bundle.predict([away], batch_size=8)[p].to_numpy()[0]
    np.testing.assert_allclose(after.loc[5, p].to_numpy(dtype=np.float64), expected, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["by_code"] == {"not_an_image": 1}


@pytest.mark.ray
def test_fresh_removes_nothing_before_all_is_known_to_be_right(
    scores: Path, manifest: Path, tiny_bundle, tmp_path: Path, command
) -> None:
    out = tmp_path / "kept"
    shutil.copytree(scores, out)
    before = sorted(path for path in out.rglob("*"))
    for bad in (["--gpu"], ["--set", "cpus_per_actor=64"], ["--manifest", str(tmp_path / "none.parquet")]):
        code, _, err = command(*arguments(tiny_bundle, manifest, out, "--fresh", *bad))
        assert (code, err.count("\n")) == (2, 1), err
        assert sorted(path for path in out.rglob("*")) == before


def test_fresh_touches_nobody_elses_folder(manifest: Path, tiny_bundle, tmp_path: Path, command) -> None:
    mine = tmp_path / "mine"
    (mine / "scores").mkdir(parents=True)
    (mine / "scores" / "bach.pdf").write_text("music")
    (mine / "settings.json").write_text('{"kind": "prepare"}')
    (tmp_path / "file").write_text("x")
    for out in (mine, tmp_path / "file"):
        for more in ([], ["--dry-run"]):
            code, _, err = command(*arguments(tiny_bundle, manifest, out, "--fresh", *more))
            assert (code, err.count("\n")) == (2, 1), err
            assert "another --out" in err
    assert (mine / "scores" / "bach.pdf").read_text() == "music"
    assert (mine / "settings.json").exists()


@pytest.mark.ray
def test_an_interrupted_fresh_cannot_pass_off_the_old_rows_as_the_new_models(
    scores: Path, manifest: Path, tiny_bundle, tmp_path: Path, command
) -> None:
    from conftest import make_tiny_bundle

    other = make_tiny_bundle(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    shutil.copytree(scores, out)
    (out / "_SUCCESS").unlink()  # as a kill right after the first removal leaves it
    code, _, err = command(*arguments(other, manifest, out))
    assert code == 2
    assert "model_digest" in err
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**settings, "model_digest": other.digest}))
    code, _, err = command(*arguments(other, manifest, out))
    assert code == 2
    assert "does not hold the rows it should" in err


@pytest.mark.ray
def test_a_folder_of_six_kinds_gives_one_row_each_and_its_listing_is_frozen(
    ray_here, tiny_bundle, tmp_path: Path, command
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "good.png")
    Image.fromarray(picture.astype(np.uint16) * 257).save(folder / "sixteen.png")
    (folder / "truncated.png").write_bytes((folder / "good.png").read_bytes()[:-2000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    write_ct(folder / "ct.dcm")
    given = ["score", "--model", str(tiny_bundle.path), "--images", str(folder), "--out", str(tmp_path / "out")]
    code, _, err = command(*given, "--max-error-rate", "0.9")
    assert code == 0, err
    table = rows(tmp_path / "out").set_index("image_id")
    assert table["error_code"].where(table["error_code"].notna(), "ok").to_dict() == {
        "good.png": "ok",
        "sixteen.png": "ok",
        "truncated.png": "truncated",
        "empty.png": "empty",
        "text.png": "not_an_image",
        "ct.dcm": "not_a_radiograph",
    }
    p = [c for c in table if c.startswith("p_")]
    np.testing.assert_array_equal(table.loc["good.png", p], table.loc["sixteen.png", p])

    Image.fromarray(picture).save(folder / "late.png")
    code, said, _ = command(*given, "--max-error-rate", "0.9")
    assert code == 0
    assert "nothing was left to do" in said
    assert "late.png" not in rows(tmp_path / "out")["image_id"].tolist()

    code, _, err = command(*given)  # the default allows half
    assert code == 3
    assert "4 of 6 images failed" in err
    assert err.count("\n") == 1

    code, _, err = command(*given, "--limit", "3")
    assert (code, err.count("\n")) == (2, 1)
    assert "rows 6 (now 3)" in err
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(folder / "good.png", tmp_path / "elsewhere")
    for elsewhere in (tmp_path / "elsewhere", tmp_path / "nowhere"):
        code, _, err = command(*given[:3], "--images", elsewhere, *given[5:])
        assert (code, err.count("\n")) == (2, 1)

    code, said, _ = command(*given, "--fresh", "--dry-run")
    assert code == 0
    assert "7 rows, 7 of them to score; nothing was written" in said
    code, _, err = command(*given, "--fresh", "--max-error-rate", "0.9")
    assert code == 0, err
    assert len(rows(tmp_path / "out")) == 7


def write_ct(path: Path) -> None:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.PatientName, ds.PatientID = "CT", "Doe^Jane", "SECRET-1"
    ds.Rows = ds.Columns = 64
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit = 15
    ds.PixelData = np.arange(64 * 64, dtype=np.uint16).tobytes()
    ds.save_as(path, enforce_file_format=True)


@pytest.mark.ray
def test_limit_takes_the_first_rows(ray_here, manifest: Path, tiny_bundle, tmp_path: Path, command) -> None:
    code, _, err = command(*arguments(tiny_bundle, manifest, tmp_path / "out", "--limit", "5"))
    assert code == 0, err
    assert rows(tmp_path / "out")["image_id"].tolist() == pd.read_parquet(manifest)["image_id"].tolist()[:5]


@pytest.mark.ray
@pytest.mark.parametrize("cpus", [1, pytest.param(16, marks=pytest.mark.long)])
def test_works_where_ray_has_other_numbers_of_cpus(cpus: int, manifest: Path, tiny_bundle, tmp_path: Path) -> None:
    """Its own process with its own Ray: two actors that take every CPU hang a pipeline that reads with tasks."""
    given = arguments(tiny_bundle, manifest, tmp_path / "out", "--limit", "32", "--set", f"ray.num_cpus={cpus}")
    done = subprocess.run(
        [sys.executable, "-m", "ray_cxr.cli", *given], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "out")) == 32
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["actors"], run["cpus_per_actor"]) == ((1, 1) if cpus == 1 else (2, 4))
    assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_gpu_that_is_not_there_is_said(ray_here, manifest: Path, tiny_bundle, tmp_path: Path, command) -> None:
    code, _, err = command(*arguments(tiny_bundle, manifest, tmp_path / "out", "--gpu"))
    assert (code, err.count("\n")) == (2, 1)
    assert "Ray has no GPU" in err
