"""`score`, `prepare`, `train` and `report` with their folders in a bucket: run the command, read what S3 holds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from score_folders import arguments, assert_done, assert_refused, read_rows

from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import OutputError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch):
    """Use an empty cache; an address taken for a local path would leave a folder `s3:` here."""
    monkeypatch.setenv("RAY_CXR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.glob("s3*"))


def rows_in(bucket, prefix: str) -> pd.DataFrame:
    parts = [key for key in bucket.keys(f"{prefix}/scores/") if key.endswith(".parquet")]
    return pd.concat([pd.read_parquet(io.BytesIO(bucket.get(key))) for key in parts], ignore_index=True)


def names_in(bucket, prefix: str) -> set[str]:
    """Names of files. Where Arrow has deleted, it leaves empty objects whose names end with a slash."""
    return {key.removeprefix(f"{prefix}/") for key in bucket.keys(f"{prefix}/") if not key.endswith("/")}


def names_on_disk(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.ray
def test_ray_scores_into_a_bucket_as_onto_a_disk(shared_ray, bucket, tiny_bundle, manifest, scores, command) -> None:
    """Decoding is apart here: this is also the run that sends images through Ray."""
    bucket.upload(tiny_bundle.path, "run/bundle")
    bucket.put("m.parquet", manifest.read_bytes())
    given = arguments(bucket("run/bundle"), bucket("m.parquet"), bucket("out"), "--set", "decode=apart")
    assert_done(command(*given))
    assert names_in(bucket, "out") == names_on_disk(scores)
    pd.testing.assert_frame_equal(rows_in(bucket, "out"), read_rows(scores), rtol=0, atol=1e-5)
    for name in ("split.parquet", "model.json", "settings.json"):
        assert bucket.get(f"out/{name}") == (scores / name).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_resume_refusals_and_fresh_in_a_bucket(bucket, tiny_bundle, manifest: Path, scores: Path, command) -> None:
    bucket.upload(scores, "done")
    given = arguments(tiny_bundle, manifest, bucket("done"))

    def modified() -> list[object]:
        listed = bucket.client.list_objects_v2(Bucket="chests", Prefix="done/")["Contents"]
        return [(entry["Key"], entry["LastModified"]) for entry in listed]

    before = modified()
    assert "already complete" in assert_done(command(*given))
    assert modified() == before

    for name in ("scores/part-00001.parquet", "_SUCCESS"):
        bucket.client.delete_object(Bucket="chests", Key=f"done/{name}")
    # One more row has an error that may have passed.
    assert "scored 17 images" in assert_done(command(*given, "--retry-errors"))
    pd.testing.assert_frame_equal(rows_in(bucket, "done"), read_rows(scores), rtol=0, atol=1e-5)
    assert names_in(bucket, "done") == names_on_disk(scores)

    assert_refused(command(*given, "--limit", 9), "(now 9)")
    assert_done(command(*given, "--limit", 9, "--fresh"))
    assert len(rows_in(bucket, "done")) == 9
    bucket.put("mine/notes.txt", b"mine")
    assert_refused(command(*arguments(tiny_bundle, manifest, bucket("mine"), "--fresh")), "mine", "another --out")
    assert bucket.keys("mine") == ["mine/notes.txt"]
    part = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(bucket.get("done/scores/part-00000.parquet"))).slice(0, 5), part)
    bucket.put("done/scores/part-00000.parquet", part.getvalue())
    assert_refused(command(*given, "--limit", 9), "part-00000.parquet", "remove it")


@pytest.mark.long
@pytest.mark.usefixtures("without_ray")
def test_report_of_scores_in_a_bucket(
    bucket, tiny_bundle, manifest: Path, tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")  # metrics.json states when it was written
    given = arguments(tiny_bundle, manifest, bucket("far/scores"), "--heatmaps", 1, "--limit", 24)
    assert_done(command(*given, "--max-error-rate", 1))
    for name in names_in(bucket, "far/scores"):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(bucket.get(f"far/scores/{name}"))
    assert_done(command("report", tmp_path / "copy", "--out", tmp_path / "report", "--labels", manifest))
    bucket.put("far/m.parquet", manifest.read_bytes())
    bucket.put("far/report/roc.png", b"of an older report")
    report = ["report", bucket("far/scores"), "--out"]
    assert "far/report/report.html" in assert_done(
        command(*report, bucket("far/report"), "--labels", bucket("far/m.parquet"))
    )
    assert names_in(bucket, "far/report") == names_on_disk(tmp_path / "report")
    for name in ("metrics.json", "worklist.csv"):
        assert bucket.get(f"far/report/{name}") == (tmp_path / "report" / name).read_bytes()
    assert_refused(command(*report, bucket("far/scores/scores/report")), "far/scores/scores/report")
    bucket.client.delete_object(Bucket="chests", Key="far/scores/_SUCCESS")
    assert_refused(command(*report, bucket("far/report")), "did not finish")


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_set_is_prepared_and_read_in_a_bucket(bucket, manifest: Path, prepared: Path, command) -> None:
    bucket.put("set/m.parquet", manifest.read_bytes())
    address = bucket("set/out")
    given = ["prepare", bucket("set/m.parquet"), "--out", address, "--size", "64", "--set", "rows_per_shard=16"]
    assert_done(command(*given))
    shards = sorted(name for name in names_in(bucket, "set/out") if name.endswith(".arrow"))
    assert shards == sorted(f"64/{path.name}" for path in (prepared / "64").glob("*.arrow"))

    bucket.client.delete_object(Bucket="chests", Key=f"set/out/{shards[0]}")
    with pytest.raises(OutputError, match=Path(shards[0]).name):
        PreparedSet(address, 64).load("train")
    assert_done(command(*given))
    for name in shards:
        assert bucket.get(f"set/out/{name}") == (prepared / name).read_bytes()
    read, expected = (np.asarray(PreparedSet(path, 64).load("val").images) for path in (address, prepared))
    np.testing.assert_array_equal(read, expected)


@pytest.mark.ray
@pytest.mark.long
def test_training_in_a_bucket_continues(shared_ray, bucket, manifest: Path, prepared: Path, tmp_path, command) -> None:
    bucket.upload(prepared, "train/set")
    train = ["train", bucket("train/set"), "--out", bucket("train/run")]
    for setting in ("size=64", "backbone=TinyCNN", "weights=none", "batch_size=16", "min_positives=2"):
        train += ["--set", setting]
    assert_done(command(*train, "--set", "epochs=1"))
    names = names_in(bucket, "train/run")
    assert {"settings.json", "metrics.csv", "bundle/SHA256SUMS", "learning_curves.png"} <= names
    assert any(name.startswith("ray/checkpoint") and name.endswith("progress.json") for name in names)
    assert any(name.startswith("tensorboard/events") for name in names)

    # As after a kill before the bundle was complete: training resumes from its checkpoint.
    for name in ("SHA256SUMS", "curves.json"):
        bucket.client.delete_object(Bucket="chests", Key=f"train/run/bundle/{name}")
    assert "continues in epoch 2 after step 0" in assert_done(command(*train, "--set", "epochs=2"))
    assert [line.split(",")[0] for line in bucket.get("train/run/metrics.csv").decode().split()] == ["epoch", "1", "2"]
    assert "is finished already" in assert_done(command(*train, "--set", "epochs=2"))
    assert_done(command(*arguments(bucket("train/run/bundle"), manifest, tmp_path / "scores", "--dry-run")))
