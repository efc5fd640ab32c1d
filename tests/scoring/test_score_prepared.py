"""`score --prepared`: the rows of the files, without decoding them. Without Ray."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from score_folders import arguments, assert_done, assert_refused, modification_times, read_rows, write_archive
from test_sources import write_dicom

from ray_cxr.config import ScoreSettings
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.imaging.sandbox import Decoder
from ray_cxr.scoring import pipeline
from ray_cxr.scoring.pool import plan_scoring

pytestmark = pytest.mark.usefixtures("without_ray")


def rewrite(shard: Path, *, paths: str) -> None:
    """Write a shard as an earlier version did, without the details of headers, of files with this suffix."""
    with pa.memory_map(str(shard)) as source:
        table = pa.ipc.open_file(source).read_all()
    names = [f"{i}{paths}" for i in range(len(table))]
    column = table.schema.get_field_index("path")
    table = table.set_column(column, "path", pa.array(names)).replace_schema_metadata(None).combine_chunks()
    shard.unlink()
    with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def given(bundle: object, prepared: Path, out: Path, *more: object) -> list[str]:
    """Arguments of `score --prepared`."""
    listed = arguments(bundle, "x.parquet", out, *more)
    place = listed.index("--manifest")
    return [*listed[:place], "--prepared", str(prepared), *listed[place + 2 :]]


def test_rows_equal_those_of_the_files(tiny_bundle, prepared, scores, tmp_path: Path, command, monkeypatch) -> None:
    monkeypatch.setattr(Decoder, "load", lambda *_: pytest.fail("an image is decoded"))
    out = tmp_path / "out"
    assert_done(command(*given(tiny_bundle, prepared, out, "--set", "rows_per_file=10")))
    found, expected = (read_rows(folder).set_index("image_id").sort_index() for folder in (out, scores))
    # The bytes of the files are not read.
    assert found.pop("content_digest").isna().all()
    assert expected.pop("content_digest").notna().any()
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert found["error_code"].notna().any()
    before = modification_times(out)
    assert "already complete" in assert_done(command(*given(tiny_bundle, prepared, out, "--set", "rows_per_file=10")))
    assert modification_times(out) == before
    # A lost file is scored again.
    (out / "scores/part-00001.parquet").unlink()
    (out / "_SUCCESS").unlink()
    assert "scored 10 images" in assert_done(command(*given(tiny_bundle, prepared, out, "--set", "rows_per_file=10")))
    again = read_rows(out).set_index("image_id").sort_index().drop(columns="content_digest")
    pd.testing.assert_frame_equal(again, expected, check_exact=True)


@pytest.mark.slow
def test_archives_and_headers_give_the_same_rows(tiny_bundle, phantoms, tmp_path: Path, command) -> None:
    folder = tmp_path / "images"
    write_dicom(folder / "1.dcm", "Doe^Jane", PatientAge="058Y", PatientSex="M", ViewPosition="AP")
    write_dicom(folder / "2.dcm", "Roe", PatientOrientation=["R", "F"], BurnedInAnnotation="YES")
    write_dicom(folder / "3.dcm", "Roe", Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    files = [path for path in sorted(Path(phantoms.images).rglob("*.png")) if path.stat().st_size > 3000][:9]
    # The order of the archive is not that of the manifest.
    write_archive(folder / "a.tar.gz", [(path.name, path.read_bytes()) for path in reversed(files)])
    paths = [folder / "1.dcm", *(f"{folder}/a.tar.gz::{path.name}" for path in files), folder / "2.dcm"]
    paths += [folder / "3.dcm", f"{folder}/a.tar.gz::none.png", None]
    rows = {"image_id": [f"{i}.png" for i in range(len(paths))], "path": [path and str(path) for path in paths]}
    manifest = tmp_path / "m.parquet"
    pd.DataFrame({**rows, "patient_id": "p1"}).to_parquet(manifest)
    assert_done(command("prepare", manifest, "--out", tmp_path / "set", "--size", 64, "--set", "rows_per_shard=4"))
    two = [*map(str, (tmp_path / "files", tmp_path / "again"))]
    assert_done(command(*arguments(tiny_bundle, manifest, two[0])))
    assert_done(command(*given(tiny_bundle, tmp_path / "set", Path(two[1]))))
    expected, found = (read_rows(Path(out)).set_index("image_id").sort_index() for out in two)
    assert {"reoriented"} == set(expected["quality_flag"].dropna()) & {"reoriented"}
    # A prepared set keeps no ids of headers, and no digests.
    for name in ("study_id", "sop_instance_uid", "content_digest"):
        assert expected.pop(name).notna().any()
        assert found.pop(name).isna().all()
    pd.testing.assert_frame_equal(found, expected, check_exact=True, check_like=True)
    for shard in (tmp_path / "set/64").glob("*.arrow"):
        assert b"Doe" not in shard.read_bytes()


@pytest.mark.slow
def test_what_does_not_fit_is_refused(tiny_bundle, manifest, prepared, tmp_path: Path, command) -> None:
    out = tmp_path / "out"
    padded = tmp_path / "padded"
    assert_done(command("prepare", manifest, "--out", padded, "--size", 64, "--set", "aspect=pad"))
    assert_refused(command(*given(tiny_bundle, padded, out)), "pad")
    assert_done(command("prepare", manifest, "--out", tmp_path / "large", "--size", 96))
    assert_refused(command(*given(tiny_bundle, tmp_path / "large", out)), "no complete size 64")
    assert_refused(command(*given(tiny_bundle, tmp_path, out)), "prepared folder")
    assert_refused(command(*given(tiny_bundle, prepared, out, "--heatmaps", "1")), "--heatmaps")
    old = shutil.copytree(prepared, tmp_path / "old")
    for shard in (old / "64").glob("*.arrow"):
        rewrite(shard, paths=".png")
    assert "nothing was written" in assert_done(command(*given(tiny_bundle, old, out, "--dry-run")))
    rewrite(min((old / "64").glob("*.arrow")), paths=".dcm")
    assert_refused(command(*given(tiny_bundle, old, out)), "earlier version")
    assert_refused(command(*given(tiny_bundle, prepared, out, "--retry-errors")), "--retry-errors")
    said = assert_done(command(*given(tiny_bundle, prepared, out, "--features", "--dry-run")))
    assert "features" in said
    assert not out.exists()
    assert_done(command(*given(tiny_bundle, prepared, out)))
    # A run from files is another run.
    assert_refused(command(*arguments(tiny_bundle, manifest, out)), str(out))


def test_set_that_changed_during_a_run_is_noticed(tiny_bundle, prepared, tmp_path: Path, command, monkeypatch) -> None:
    changed = shutil.copytree(prepared, tmp_path / "set")
    run = pipeline.run_tasks

    def swap(*arguments):
        one, two = (changed / "64" / name for name in PreparedSet(changed, 64).shard_names[:2])
        one.rename(tmp_path / "one")
        two.rename(one)
        (tmp_path / "one").rename(two)
        return run(*arguments)

    monkeypatch.setattr(pipeline, "run_tasks", swap)
    code, _, err = command(*given(tiny_bundle, changed, tmp_path / "out"))
    assert code != 0
    assert "other rows" in err
    assert not list((tmp_path / "out").glob("_SUCCESS"))


def test_actors_of_a_gpu_read_prepared_images_themselves(monkeypatch) -> None:
    nodes = {"CPU": [4.0], "GPU": [2.0]}
    monkeypatch.setattr("ray_cxr.scoring.pool._list_resource", nodes.__getitem__)
    settings = ScoreSettings()
    assert plan_scoring(settings, 10, use_gpu=True).decode_apart
    pool = plan_scoring(settings, 10, use_gpu=True, decodes=False)
    assert (pool.actors, pool.gpus, pool.decode_apart) == (2, 1, False)
