"""`score` from outside: run the command in this process without Ray, read the Parquet files."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_bundle
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from score_folders import arguments, assert_done, assert_refused, make_job, modification_times, read_rows

from ray_cxr import environment
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import ConfigError, OutputError, RayCxrError
from ray_cxr.imaging.sandbox import DecodedImage
from ray_cxr.models import predictions
from ray_cxr.models.runtime import Usage
from ray_cxr.scoring import pipeline, plan
from ray_cxr.scoring.inputs import group_rows
from ray_cxr.scoring.plan import ScoreReport
from ray_cxr.scoring.pool import ActorPlan, fit_actors
from ray_cxr.scoring.ranges import RangeState, TaskResult
from ray_cxr.scoring.reader import ImageReader
from ray_cxr.storage import atomic, run_folder


@pytest.mark.parametrize(
    ("nodes", "wanted", "files", "expected"),
    [
        ([1.0], None, 100, (1, 1)),
        ([16.0], None, 100, (4, 4)),
        ([16.0], None, 2, (2, 4)),
        ([0.0, 4.0, 2.0], None, 100, (3, 2)),
        ([8.0], 3, 100, (2, 3)),
        ([0.0], None, 10, None),
        ([2.0, 2.0], 4, 10, None),
    ],
)
def test_actors_fit_the_nodes(nodes: list[float], wanted: int | None, files: int, expected: Any) -> None:
    with pytest.raises(ConfigError) if expected is None else contextlib.nullcontext():
        assert fit_actors(nodes, wanted, files) == expected


@given(st.integers(0, 10**9), st.integers(1, 1_000_000))
def test_footer_of_the_frozen_input_stays_small(rows: int, rows_per_file: int) -> None:
    """Every task reads the footer; with groups of a fixed size it would grow with the number of rows."""
    group = group_rows(rows, rows_per_file)
    assert group % rows_per_file == 0, "a range never straddles two groups"
    assert group >= min(8192, max(rows, 1)), "groups are not too small"
    assert -(-rows // group) <= 1001


def test_stages_of_start_up_add_up() -> None:
    times = {"command": 100.0, "checks": 101.0, "Ray": 104.0, "plan": 104.5}
    stages = pipeline._split_start_up(TaskResult(created_at=106.0, ready_at=110.0, first_at=112.5), times)
    names = ["all", "checks", "Ray", "plan", "actor", "network", "first pictures"]
    assert list(stages.items()) == list(zip(names, [12.5, 1.0, 3.0, 0.5, 1.5, 4.0, 2.5], strict=True))


@pytest.mark.parametrize(
    ("pool", "usage", "expected"),
    [
        (
            ActorPlan(1, 0, gpus=1, decode_apart=True),
            Usage(100, 62, 1),
            r"model waited for images 62%.*CPUs.*--prepared",
        ),
        (ActorPlan(1, 0, gpus=1), Usage(100, 62, 1), r"model waited for images 62%(?!.*--prepared)"),
        (ActorPlan(1, 0, gpus=1, decode_apart=True), Usage(100, 5, 80), r"images waited.* 80%.*jit_compile.*more GPUs"),
        (ActorPlan(1, 1, decode_apart=True), Usage(100, 5, 80), r"images waited.* 80%.*decode=inside"),
        (ActorPlan(1, 0, gpus=1, decode_apart=True), Usage(100, 5, 9), None),
        (ActorPlan(1, 0, gpus=1, decode_apart=True), Usage(1, 0.9, 0), None),
        (ActorPlan(2, 4), Usage(100, 62, 1), None),
    ],
)
def test_summary_names_waits_that_the_user_can_shorten(pool: ActorPlan, usage: Usage, expected: str | None) -> None:
    report = ScoreReport(rows=1, pool=pool, usage=usage)
    line = report.describe_waits(jit_compile=False)
    assert line is None if expected is None else re.search(expected, str(line))
    assert "jit_compile" not in str(report.describe_waits(jit_compile=True)), "it is on already"


def test_rows_and_run_json_follow_the_manifest(scores: Path, manifest: Path, tiny_bundle) -> None:
    table = read_rows(scores)
    assert table["image_id"].tolist() == pd.read_parquet(manifest)["image_id"].tolist()
    part = pq.read_table(scores / "scores" / "part-00000.parquet")
    assert part.schema.equals(predictions.schema(tiny_bundle.findings))
    assert len(part) == 16
    assert set(table.loc[table["status"] == "ok", "model_digest"]) == {tiny_bundle.digest}
    bad = table.query("status == 'error'")
    assert sorted(bad["error_code"]) == ["blank", "corrupt", "empty", "missing", "not_an_image", "truncated"]
    of_model = [name for name in bad if name.startswith(("p_", "c_", "flag_"))]
    assert (
        bad[[*of_model, "top_finding", "abnormality", "priority", "quality_flag", "model_digest"]].isna().all(axis=None)
    )
    assert bad["error"].str.len().min() > 5

    run, model = (json.loads((scores / name).read_text(encoding="utf-8")) for name in ("run.json", "model.json"))
    n = len(table)
    assert [run[key] for key in ("rows", "ok", "errors", "model_digest")] == [n, n - 6, 6, tiny_bundle.digest]
    assert run["by_code"] == dict.fromkeys(bad["error_code"], 1)
    assert (run["precision"], run["split"]["kind"]) == ("fp32", "patient")
    assert run["last_run"]["rows_scored"] == n
    assert run["last_run"]["images_per_second"] > 0
    assert list(run["last_run"]["waits"]) == ["model_waited_for_images", "images_waited_for_model"]
    assert all(0 <= share <= 1 for share in run["last_run"]["waits"].values())
    assert 0 < run["last_run"]["seconds"] < time.monotonic()  # of this run, not of the machine
    ranked = tiny_bundle.rules.ranked
    assert run["ranking"] == {
        "probabilities": "calibrated",
        "weights": dict.fromkeys(ranked.names, 1.0),
        "left_out": list(ranked.left_out),
    }
    assert model["findings"] == list(tiny_bundle.findings)
    assert model["operating_points"]["Cardiomegaly"]["threshold"] == 0.5
    assert (scores / "split.parquet").read_bytes() == (tiny_bundle.path / "split.parquet").read_bytes()


@pytest.mark.slow
def test_score_predict_and_the_prepared_set_agree(scores: Path, prepared: Path, tiny_bundle) -> None:
    """`score` feeds its model the pixels that training reads, and gives the probabilities of `predict`."""
    table = read_rows(scores).set_index("image_id")
    data = PreparedSet(prepared, 64).load("test")
    rows = pq.read_table(scores / "input.parquet")
    fed = {
        rows["image_id"][row].as_py(): outcome.images[0]
        for (_, row), outcome in ImageReader(make_job(tiny_bundle, scores), 1).iter_images([RangeState(0, rows)])
        if isinstance(outcome, DecodedImage)
    }
    np.testing.assert_array_equal(np.stack([fed[name] for name in data.image_ids]), data.images)
    expected = tiny_bundle.predict(np.asarray(data.images), batch_size=8, precision="fp32").filter(regex="^p_")
    found = table.loc[data.image_ids, expected.columns]
    np.testing.assert_allclose(found.to_numpy(), expected.to_numpy(), rtol=0, atol=1e-5)


@pytest.fixture
def copy(scores: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    return shutil.copytree(scores, tmp_path / "copy")


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory):
    return make_tiny_bundle(tmp_path_factory.mktemp("other") / "bundle", seed=1)


@pytest.fixture
def ray_must_not_start(monkeypatch) -> None:
    monkeypatch.setattr("ray_cxr.session.start_ray", Mock(side_effect=AssertionError("Ray is started")))


@pytest.mark.usefixtures("ray_must_not_start")
def test_finished_run_is_left_alone(scores: Path, manifest: Path, tiny_bundle, command, monkeypatch) -> None:
    before = modification_times(scores)
    assert "already complete" in assert_done(command(*arguments(tiny_bundle, manifest, scores)))
    # The run was made in fp32: `auto` keeps that on a machine where it would choose bf16.
    choose = {"auto": "bf16", "fp32": "fp32"}
    monkeypatch.setattr(plan, "choose_precision", lambda _, wanted, gpu: choose[wanted])
    assert_done(command(*arguments(tiny_bundle, manifest, scores, "--precision", "auto")))
    assert modification_times(scores) == before


@pytest.mark.usefixtures("ray_must_not_start")
def test_success_is_written_last(copy: Path, manifest: Path, tiny_bundle, command, monkeypatch) -> None:
    """A run that dies between its last row and _SUCCESS is finished without Ray, and no row is written again."""

    def fail_at_success(path: Path, text: str, write_text=atomic.write_text) -> None:
        if path.name == "_SUCCESS":
            raise RayCxrError("stands for a kill")
        write_text(path, text)

    before = modification_times(copy / "scores")
    for name in ("_SUCCESS", "run.json", "model.json", "split.parquet"):
        (copy / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.atomic, "write_text", fail_at_success)
        assert command(*arguments(tiny_bundle, manifest, copy))[0] != 0
    assert {"run.json", "model.json", "split.parquet"} <= {path.name for path in copy.iterdir()}
    assert not (copy / "_SUCCESS").exists()
    assert_done(command(*arguments(tiny_bundle, manifest, copy)))
    assert (copy / "_SUCCESS").exists()
    assert modification_times(copy / "scores") == before


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_resume_scores_what_is_missing(copy: Path, scores: Path, manifest: Path, tiny_bundle, command) -> None:
    verdicts = copy / "reviews" / "session.jsonl"
    verdicts.parent.mkdir()
    verdicts.write_text("readers' work")
    lost = copy / "scores" / "part-00001.parquet"
    lost.unlink()
    (copy / "scores" / ".part-00001.parquet.1-ab.part").write_text("half a file, left by a killed worker")
    (copy / "_SUCCESS").unlink()
    kept = modification_times(copy / "scores", "part-*")
    assert "scored 16 images" in assert_done(command(*arguments(tiny_bundle, manifest, copy)))
    assert modification_times(copy / "scores").keys() == {*kept, lost}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    pd.testing.assert_frame_equal(read_rows(copy), read_rows(scores), rtol=0, atol=1e-6)
    assert (copy / "_SUCCESS").exists()
    assert verdicts.read_text() == "readers' work"


@pytest.mark.usefixtures("ray_must_not_start")
def test_other_model_manifest_or_setting_is_refused(
    scores: Path, manifest: Path, tiny_bundle, other_bundle, tmp_path: Path, command, monkeypatch
) -> None:
    monkeypatch.setattr(plan, "choose_precision", lambda _, wanted, gpu: wanted)  # on any CPU
    short = tmp_path / "short.parquet"
    pq.write_table(pq.read_table(manifest).slice(0, 20), short)
    for bad, word in (
        (arguments(other_bundle, manifest, scores), "model_digest"),
        (arguments(tiny_bundle, short, scores), "input_digest"),
        (arguments(tiny_bundle, manifest, scores, "--set", "rows_per_file=8"), "rows_per_file 16 (now 8)"),
        (arguments(tiny_bundle, manifest, scores, "--set", "max_pixels=90000000"), "max_pixels"),
        (arguments(tiny_bundle, manifest, scores, "--limit", 5), "(now 5)"),
        (arguments(tiny_bundle, manifest, scores, "--set", "weights={Cardiomegaly=3}"), "Cardiomegaly 1.0 (now 3.0)"),
        (arguments(tiny_bundle, manifest, scores, "--precision", "bf16"), "precision fp32 (now bf16)"),
    ):
        assert_refused(command(*bad), word, "--fresh")


@pytest.mark.usefixtures("ray_must_not_start")
def test_folder_of_an_older_version(copy: Path, manifest: Path, tiny_bundle, command) -> None:
    """A finished folder is left alone; where rows or maps are missing, one line says what to do."""
    settings = json.loads((copy / "settings.json").read_text(encoding="utf-8")) | {"format": 2}
    del settings["weights"]
    (copy / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    run = run_folder.digest_settings(copy)
    for part in (copy / "scores").glob("*.parquet"):
        table = pq.read_table(part).drop_columns("abnormality")
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"ray_cxr.run": run}), part)
    before = modification_times(copy)
    again = arguments(tiny_bundle, manifest, copy)
    assert "already complete" in assert_done(command(*again))
    assert_refused(command(*again, "--heatmaps", "1"), "format 2, now 3", "recalibrate still read it", "--fresh")
    assert_refused(command(*again, "--set", "weights={Effusion=3}"), "format 2, now 3", "--fresh")
    assert modification_times(copy) == before
    (copy / "_SUCCESS").unlink()
    assert_refused(command(*again), "format 2, now 3", "finish it with that version", "--fresh", "another --out")


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_weights_change_the_priority_alone(manifest: Path, scores: Path, tiny_bundle, tmp_path: Path, command) -> None:
    out = tmp_path / "out"
    more = ("--limit", "20", "--set", "weights={Cardiomegaly=3}")
    assert_done(command(*arguments(tiny_bundle, manifest, out, *more)))
    found, plain = read_rows(out), read_rows(scores)[:20]
    c = found[[f"c_{name}" for name in tiny_bundle.rules.ranked.names]].to_numpy()
    weights = [3 if name == "Cardiomegaly" else 1 for name in tiny_bundle.rules.ranked.names]
    np.testing.assert_allclose(found["priority"], 1 - np.prod((1 - c) ** weights, axis=1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(plain["priority"], 1 - np.prod(1 - c, axis=1), rtol=0, atol=1e-5)
    others = [name for name in found if name.startswith(("p_", "c_", "top_", "abn"))]
    pd.testing.assert_frame_equal(found[others], plain[others], rtol=0, atol=1e-6)
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["ranking"]["weights"]["Cardiomegaly"] == run["settings"]["weights"]["Cardiomegaly"] == 3


@pytest.mark.usefixtures("ray_must_not_start")
def test_wrong_weights_are_one_line(manifest: Path, tiny_bundle, tmp_path: Path, command) -> None:
    config = tmp_path / "a.toml"
    for text, *words in (
        ("Pnuemothorax = 3", "'Pnuemothorax' is not a finding", "Pneumothorax"),
        ("No_Finding = 1", "'No_Finding' is not a finding"),
        ("Effusion = -1", "weights.Effusion", "greater than or equal to 0"),
        ("Effusion = 11", "weights.Effusion", "less than or equal to 10"),
        ('Effusion = "high"', "weights.Effusion"),
        ("Pleural_Thickening = 1\n'Pleural Thickening' = 1", "named twice"),
    ):
        config.write_text(f"[score.weights]\n{text}\n", encoding="utf-8")
        more = ("--config", config)
        assert_refused(command(*arguments(tiny_bundle, manifest, tmp_path / "out", *more)), *words)
    zeros = ",".join(f"{name}=0" for name in tiny_bundle.rules.ranked.names)
    more = ("--set", f"weights={{{zeros}}}")
    assert_refused(command(*arguments(tiny_bundle, manifest, tmp_path / "out", *more)), "weight 0")


@pytest.mark.usefixtures("ray_must_not_start")
def test_file_of_another_run_is_refused(copy: Path, manifest: Path, tiny_bundle, command) -> None:
    first, second, third = (copy / "scores" / f"part-0000{i}.parquet" for i in (0, 1, 9))
    whole, own = second.read_bytes(), pq.read_table(second)
    index, other = own.column_names.index("model_digest"), pa.array(["other"] * len(own))
    for table in (
        pq.read_table(first),
        own.slice(0, 5),
        own.set_column(index, "model_digest", other),
        own.replace_schema_metadata({b"ray_cxr.run": b"other"}),
    ):
        pq.write_table(table, second)
        assert_refused(command(*arguments(tiny_bundle, manifest, copy)), second.name, "remove it")
    second.write_text("x")
    assert_refused(command(*arguments(tiny_bundle, manifest, copy)), second.name, "remove it")
    second.write_bytes(whole)
    shutil.copy(first, third)
    assert_refused(command(*arguments(tiny_bundle, manifest, copy)), third.name, "remove it")


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize("decode", ["inside", "apart"])
def test_retry_errors_reads_what_may_have_recovered(decode: str, manifest, tiny_bundle, tmp_path, command) -> None:
    """A file in the middle of a part is away at first and back for the retry; a broken one is not read again."""
    table = pd.read_parquet(manifest).head(12)
    (tmp_path / "images").mkdir()
    for row, path in enumerate(table["path"]):
        table.loc[row, "path"] = shutil.copy(path, tmp_path / "images")
    Path(table.loc[3, "path"]).write_text("not an image")
    away = Path(table.loc[5, "path"])
    away.rename(tmp_path / "away")
    table.to_parquet(tmp_path / "m.parquet")
    out = tmp_path / "out"
    given = arguments(tiny_bundle, tmp_path / "m.parquet", out, "--set", f"decode={decode}")
    assert_done(command(*given))
    before = read_rows(out)
    assert before["error_code"].dropna().to_dict() == {3: "not_an_image", 5: "missing"}

    (tmp_path / "away").rename(away)
    shutil.copy(table.loc[0, "path"], table.loc[3, "path"])  # fixed too, but its code is final
    assert "12 rows, 1 of them to score" in assert_done(command(*given, "--retry-errors", "--dry-run"))
    assert "scored 1 images" in assert_done(command(*given, "--retry-errors"))
    after = read_rows(out)
    assert after["image_id"].tolist() == table["image_id"].tolist()
    assert after["error_code"].dropna().to_dict() == {3: "not_an_image"}
    pd.testing.assert_frame_equal(after.drop(index=5), before.drop(index=5))
    expected = tiny_bundle.predict([away], batch_size=8, precision="fp32").filter(regex="^p_").iloc[0]
    np.testing.assert_allclose(after.loc[5, expected.index].astype(float), expected, rtol=0, atol=1e-5)
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["by_code"] == {"not_an_image": 1}


@pytest.mark.usefixtures("without_ray")
def test_refused_run_changes_nothing(copy, manifest, tiny_bundle, tmp_path: Path, command, monkeypatch) -> None:
    before = modification_times(copy)
    with monkeypatch.context() as patch:
        patch.setattr(environment, "count_gpus", lambda: 0)
        patch.setattr("ray.is_initialized", lambda: False)  # earlier tests may have started one
        refused = command(*arguments(tiny_bundle, manifest, copy, "--fresh", "--gpu"))
    assert_refused(refused, "--gpu: this machine has no GPU")
    for bad, word in (
        (["--gpu", "--set", "decode=inside"], "decode=inside"),
        (["--set", "jit_compile=true"], "jit_compile"),
        (["--set", "cpus_per_actor=64"], "cpus_per_actor=64"),
    ):
        assert_refused(command(*arguments(tiny_bundle, manifest, copy, "--fresh", *bad)), word)
    missing = tmp_path / "none.parquet"
    assert_refused(command(*arguments(tiny_bundle, missing, copy, "--fresh")), "none.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.cluster, "require_shared", Mock(side_effect=OutputError("not shared")))
        for folder, more in ((copy, ["--fresh"]), (tmp_path / "new", ["--precision", "auto"])):
            assert_refused(command(*arguments(tiny_bundle, manifest, folder, *more)), "not shared")
    assert not (tmp_path / "new").exists()
    assert modification_times(copy) == before
    (tmp_path / "mine" / "scores").mkdir(parents=True)
    (tmp_path / "mine" / "scores" / "part-00000.parquet").write_text("of another program")
    (tmp_path / "mine" / "settings.json").write_text('{"kind": "prepare"}')
    (tmp_path / "file").write_text("x")
    before = modification_times(tmp_path)
    for name in ("mine", "file"):
        for more in ([], ["--dry-run"]):
            given = arguments(tiny_bundle, manifest, tmp_path / name, "--fresh", *more)
            assert_refused(command(*given), name, "another --out")
    assert modification_times(tmp_path) == before


@pytest.mark.usefixtures("ray_must_not_start")
def test_interrupted_fresh_mixes_no_models(copy, manifest, tiny_bundle, other_bundle, command, monkeypatch) -> None:
    """A kill at any moment of the removal leaves a folder that no run continues."""
    (copy / "_SUCCESS").unlink()
    assert_refused(command(*arguments(other_bundle, manifest, copy)), "model_digest")
    settings = json.loads((copy / "settings.json").read_text(encoding="utf-8"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.remote, "remove_files", lambda paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline._remove_run(copy)
    for bundle in (tiny_bundle, other_bundle):
        assert_refused(command(*arguments(bundle, manifest, copy)), "--fresh")
    (copy / "settings.json").write_text(json.dumps({**settings, "model_digest": other_bundle.digest}))
    assert_refused(command(*arguments(other_bundle, manifest, copy)), "part-00000.parquet")


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_folder_gives_a_row_per_file_and_its_listing_is_frozen(tiny_bundle, tmp_path: Path, command) -> None:
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    image = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    Image.fromarray(image).save(folder / "good.png")
    Image.fromarray(image.astype(np.uint16) * 257).save(folder / "sixteen.png")
    (folder / "truncated.png").write_bytes((folder / "good.png").read_bytes()[:-2000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    given = arguments(tiny_bundle, folder, out)
    assert_done(command(*given, "--max-error-rate", "0.9"))
    table = read_rows(out).set_index("image_id")
    codes = {"empty.png": "empty", "text.png": "not_an_image", "truncated.png": "truncated"}
    assert table["error_code"].dropna().to_dict() == codes
    p = table.filter(regex="^p_").astype(float)
    np.testing.assert_allclose(p.loc["good.png"], p.loc["sixteen.png"], rtol=0, atol=1e-6)

    Image.fromarray(image).save(folder / "late.png")
    assert "already complete" in assert_done(command(*given, "--max-error-rate", "0.6"))  # exactly that
    code, _, err = command(*given)  # the default allows half
    assert (code, err.count("\n"), "3 of 5 images failed" in err) == (3, 1, True)
    assert_refused(command(*given, "--limit", 3), "rows 5 (now 3)")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(folder / "good.png", tmp_path / "elsewhere")
    assert_refused(command(*arguments(tiny_bundle, tmp_path / "elsewhere", out)), "images")
    assert_refused(command(*arguments(tiny_bundle, tmp_path / "nowhere", out)), "nowhere")

    assert "6 rows, 6 of them to score" in assert_done(command(*given, "--fresh", "--dry-run"))
    verdicts = out / "reviews" / "session.jsonl"
    verdicts.parent.mkdir()
    verdicts.write_text("readers' work")
    assert_done(command(*given, "--fresh", "--limit", 3))
    assert verdicts.read_text() == "readers' work"
    assert read_rows(out)["image_id"].tolist() == ["empty.png", "good.png", "late.png"]
    assert len(pq.read_table(out / "input.parquet")) == 6, "the listing is frozen, also beyond the limit"


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_copies_of_each_image_are_averaged(manifest: Path, scores: Path, tiny_bundle, tmp_path: Path, command) -> None:
    out = tmp_path / "averaged"
    given = arguments(tiny_bundle, manifest, out, "--set", "tta=3")
    assert_done(command(*given))
    averaged, plain = read_rows(out), read_rows(scores)
    ok = averaged["status"] == "ok"
    names = [f"p_spread_{name}" for name in tiny_bundle.findings]
    assert (averaged.loc[ok, names].to_numpy() > 0).any()
    assert averaged.loc[~ok, names].isna().all(axis=None)
    p = [f"p_{name}" for name in tiny_bundle.findings]
    difference = np.abs(averaged.loc[ok, p].to_numpy() - plain.loc[ok, p].to_numpy())
    assert 0 < difference.max() < 0.5
    for other, folder, part in (((), out, "tta 3 (now 1)"), (("--set", "tta=3"), scores, "tta 1 (now 3)")):
        assert_refused(command(*arguments(tiny_bundle, manifest, folder, *other)), part)
