"""`score` with everything in a bucket, and what a kill leaves there: run the command, read what the server holds."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.ray


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_CXR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows(bucket, prefix: str) -> pd.DataFrame:
    parts = [key for key in bucket.keys(f"{prefix}/scores/") if key.endswith(".parquet")]
    return pd.concat([pd.read_parquet(io.BytesIO(bucket.get(key))) for key in parts], ignore_index=True)


def names(bucket, prefix: str) -> set[str]:
    """Names of files; Arrow leaves objects of no bytes whose names end with a slash where it has deleted."""
    return {key.removeprefix(f"{prefix}/") for key in bucket.keys(f"{prefix}/") if not key.endswith("/")}


def arguments(model: object, out: str, *more: object) -> list[object]:
    given = ["score", "--model", model, "--out", out, "--set", "rows_per_file=8", "--set", "batch_size=8"]
    return [*given, "--max-error-rate", "1", *more]


def test_a_run_in_a_bucket_is_a_run_on_a_disk(
    ray_here, bucket, cache: Path, tiny_bundle, manifest: Path, tmp_path: Path, command, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bucket.upload(tiny_bundle.path, "run/bundle")
    bucket.put("m.parquet", manifest.read_bytes())
    code, _, err = command(*arguments(tiny_bundle.path, str(tmp_path / "disk"), "--manifest", manifest))
    assert code == 0, err
    there = arguments(bucket("run/bundle"), bucket("out"), "--manifest", bucket("m.parquet"))
    code, said, err = command(*there)
    assert code == 0, err
    on_disk = {str(path.relative_to(tmp_path / "disk")) for path in (tmp_path / "disk").rglob("*") if path.is_file()}
    assert names(bucket, "out") == on_disk
    expected = pd.concat(pd.read_parquet(part) for part in sorted((tmp_path / "disk" / "scores").iterdir()))
    pd.testing.assert_frame_equal(rows(bucket, "out"), expected.reset_index(drop=True))
    for name in ("split.parquet", "model.json"):
        assert bucket.get(f"out/{name}") == (tmp_path / "disk" / name).read_bytes()
    record = json.loads(bucket.get("out/run.json"))
    assert (record["rows"], record["model_digest"]) == (len(expected), tiny_bundle.digest)
    assert not list(tmp_path.glob("s3*"))

    # Once more: nothing to do, and nothing is written.
    before = {key: bucket.client.head_object(Bucket="chests", Key=key)["LastModified"] for key in bucket.keys("out/")}
    code, said, err = command(*there)
    assert (code, "nothing was left to do" in said) == (0, True), err
    after = {key: bucket.client.head_object(Bucket="chests", Key=key)["LastModified"] for key in bucket.keys("out/")}
    assert before == after

    # A file lost, and one of a kill's: the rest stays.
    bucket.client.delete_object(Bucket="chests", Key="out/scores/part-00001.parquet")
    bucket.client.delete_object(Bucket="chests", Key="out/_SUCCESS")
    code, said, err = command(*there)
    assert (code, "scored 8 images" in said) == (0, True), err
    pd.testing.assert_frame_equal(rows(bucket, "out"), expected.reset_index(drop=True))
    code, said, err = command(*there, "--retry-errors")
    assert (code, "scored 1 images" in said) == (0, True), err
    assert "_SUCCESS" in names(bucket, "out")

    # Another run is refused; --fresh begins one.
    other = arguments(bucket("run/bundle"), bucket("out"), "--manifest", bucket("m.parquet"), "--limit", "9")
    code, _, err = command(*other)
    assert (code, err.count("\n")) == (2, 1)
    assert "was begun with another rows" in err
    code, _, err = command(*other, "--fresh")
    assert code == 0, err
    assert len(rows(bucket, "out")) == 9
    bucket.put("mine/notes.txt", b"mine")
    code, _, err = command(*arguments(bucket("run/bundle"), bucket("mine"), "--manifest", manifest, "--fresh"))
    assert (code, "nothing in it is removed" in err) == (2, True)
    assert bucket.keys("mine") == ["mine/notes.txt"]

    # A file of another hand.
    part = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(bucket.get("out/scores/part-00000.parquet"))).slice(0, 5), part)
    bucket.put("out/scores/part-00000.parquet", part.getvalue())
    code, _, err = command(*other)
    assert (code, err.count("\n")) == (2, 1)
    assert "does not hold the rows it should" in err


def test_a_kill_in_the_midst_and_the_same_command_again(bucket, tiny_bundle, manifest: Path, tmp_path: Path) -> None:
    """The command and its workers end as they are; credentials and the store's address come from the environment."""
    bucket.upload(tiny_bundle.path, "killed/bundle")
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": bucket.endpoint,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing-secret",
        "AWS_REGION": "us-east-1",
        "RAY_CXR_CACHE": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "ray_cxr.cli"]
    command += map(str, arguments("s3://chests/killed/bundle", "s3://chests/killed/out", "--manifest", manifest))
    command += ["--set", "ray.num_cpus=1", "--set", "rows_per_file=2"]

    def parts() -> list[str]:
        return [name for name in names(bucket, "killed/out") if name.startswith("scores/")]

    with open(tmp_path / "log", "wb") as log:
        first = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 90
        while not parts() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    wanted = pq.read_table(manifest, columns=["image_id"])["image_id"].to_pylist()
    done = parts()
    assert 0 < len(done) < len(wanted) / 2, (tmp_path / "log").read_text()
    kept = {name: bucket.get(f"killed/out/{name}") for name in done}
    assert "_SUCCESS" not in names(bucket, "killed/out")
    second = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert rows(bucket, "killed/out")["image_id"].tolist() == wanted
    assert {name: bucket.get(f"killed/out/{name}") for name in done} == kept
    assert not list(tmp_path.glob("s3*"))


@pytest.mark.long
def test_scores_in_a_bucket_are_reported_as_those_on_a_disk(
    ray_here, bucket, cache: Path, tiny_bundle, manifest: Path, tmp_path: Path, command, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--manifest", manifest, "--heatmaps", "1", "--limit", "24"]
    code, _, err = command(*arguments(tiny_bundle.path, bucket("told/scores"), *given))
    assert code == 0, err
    for key in bucket.keys("told/scores/"):
        if not key.endswith("/"):
            copy = tmp_path / "copy" / key.removeprefix("told/scores/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(bucket.get(key))
    maps = [key for key in bucket.keys("told/scores/heatmaps/") if key.endswith(".png")]
    assert len(maps) == (rows(bucket, "told/scores")["status"] == "ok").sum()
    bucket.put("told/m.parquet", manifest.read_bytes())
    code, _, err = command("report", tmp_path / "copy", "--out", tmp_path / "report", "--labels", manifest)
    assert code == 0, err
    bucket.put("told/report/roc.png", b"of an older report")
    there = ["--labels", bucket("told/m.parquet")]
    code, said, err = command("report", bucket("told/scores"), "--out", bucket("told/report"), *there)
    assert code == 0, err
    assert "told/report/report.html" in said
    assert names(bucket, "told/report") == {path.name for path in (tmp_path / "report").iterdir()}
    assert bucket.get("told/report/metrics.json") == (tmp_path / "report" / "metrics.json").read_bytes()
    assert bucket.get("told/report/worklist.csv") == (tmp_path / "report" / "worklist.csv").read_bytes()
    page = bucket.get("told/report/report.html").decode()
    assert page.count("data:image/png") == (tmp_path / "report" / "report.html").read_text().count("data:image/png")
    code, _, err = command("report", bucket("told/scores"), "--out", bucket("told/scores/scores/report"))
    assert (code, "lies among the scores" in err) == (2, True)
    bucket.client.delete_object(Bucket="chests", Key="told/scores/_SUCCESS")
    code, _, err = command("report", bucket("told/scores"), "--out", bucket("told/report"))
    assert (code, "score did not finish" in err) == (2, True)
    assert not list(tmp_path.glob("s3*"))


def test_a_set_is_prepared_trained_on_and_continued_in_a_bucket(
    ray_here, bucket, cache: Path, manifest: Path, prepared: Path, tmp_path: Path, command, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bucket.put("train/m.parquet", manifest.read_bytes())
    prepare = ["prepare", bucket("train/m.parquet"), "--out", bucket("train/set"), "--size", "64"]
    prepare += ["--set", "rows_per_shard=16"]
    code, said, err = command(*prepare)
    assert code == 0, err
    shards = {name for name in names(bucket, "train/set") if name.endswith(".arrow")}
    assert shards == {f"64/{path.name}" for path in (prepared / "64").glob("*.arrow")}
    for name in shards:
        assert bucket.get(f"train/set/{name}") == (prepared / name).read_bytes()
    bucket.client.delete_object(Bucket="chests", Key=f"train/set/{min(shards)}")
    code, _, err = command("train", bucket("train/set"), "--out", bucket("train/run"))
    assert (code, f"{Path(min(shards)).name}" in err, "is missing; run" in err) == (2, True, True), err
    assert command(*prepare)[0] == 0
    assert bucket.get(f"train/set/{min(shards)}") == (prepared / min(shards)).read_bytes()

    train = ["train", bucket("train/set"), "--out", bucket("train/run")]
    for setting in ("backbone=TinyCNN", "weights=none", "batch_size=16", "min_positives=2", "schedule=constant"):
        train += ["--set", setting]
    code, _, err = command(*train, "--set", "epochs=1")
    assert code == 0, err
    there = names(bucket, "train/run")
    assert {"settings.json", "metrics.csv", "bundle/SHA256SUMS", "learning_curves.png"} <= there
    assert any(name.startswith("ray/checkpoint") and name.endswith("progress.json") for name in there)
    assert any(name.startswith("tensorboard/events") for name in there)

    # As a run that was killed before its bundle was whole: it goes on from its checkpoint.
    for name in ("SHA256SUMS", "curves.json"):
        bucket.client.delete_object(Bucket="chests", Key=f"train/run/bundle/{name}")
    code, said, err = command(*train, "--set", "epochs=2")
    assert code == 0, err
    assert "continues after epoch 1" in said
    assert [line.split(",")[0] for line in bucket.get("train/run/metrics.csv").decode().split()] == ["epoch", "1", "2"]
    code, said, err = command(*train, "--set", "epochs=2")
    assert (code, "is finished already" in said) == (0, True), err
    out = tmp_path / "scores"
    code, _, err = command(*arguments(bucket("train/run/bundle"), str(out), "--manifest", manifest, "--dry-run"))
    assert code == 0, err
    assert not list(tmp_path.glob("s3*"))
