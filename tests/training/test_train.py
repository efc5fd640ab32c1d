"""`train` from outside: real Ray Train workers, a real bundle."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import Run
from sklearn.metrics import roc_auc_score

import ray_cxr
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.labels import FINDINGS
from ray_cxr.training import trainer

pytestmark = pytest.mark.ray
SETTINGS = ["backbone=TinyCNN", "weights=none", "size=64", "batch_size=16", "min_positives=2", "learning_rate=0.003"]


def with_settings(*more: str) -> list[str]:
    return [part for setting in (*SETTINGS, *more) for part in ("--set", setting)]


def test_leaves_a_bundle_that_says_where_it_comes_from(untouched: Run, prepared: Path) -> None:
    out = untouched.out
    assert "RANDOM weights" in untouched.said
    bundle = ray_cxr.load_bundle(out / "bundle")
    source = bundle.info["provenance"]
    assert bundle.findings == FINDINGS
    assert bundle.input_spec.size == 64
    assert source["initial_weights"] == "random"
    assert source["lineage"] == "known"
    assert source["split"]["kind"] == "patient"
    assert source["prepared_digest"] == PreparedSet(prepared, 64).manifest_digest
    assert 1 <= source["best_epoch"] < 8
    assert source["settings"]["epochs"] == 8
    low, high = source["age_range"]
    assert 0 <= low < high <= 120
    card = (out / "bundle" / "MODEL_CARD.md").read_text()
    assert "For research only" in card
    assert "Initial weights: random" in card


def test_validation_auroc_is_that_of_the_bundle_on_the_validation_images(untouched: Run, prepared: Path) -> None:
    """The number that was reported, computed again from the exported bundle by other code."""
    bundle = ray_cxr.load_bundle(untouched.out / "bundle")
    val = PreparedSet(prepared, 64).load("val")
    p = bundle.predict(np.asarray(val.images))[[f"p_{name}" for name in FINDINGS]].to_numpy()
    for j, name in enumerate(FINDINGS):
        row = bundle.info["provenance"]["validation"]["findings"][name]
        y = val.labels[:, j]
        assert (row["n"], row["positives"]) == (len(y), int(y.sum()))
        if 0 < y.sum() < len(y):
            assert row["auroc"] == pytest.approx(roc_auc_score(y, p[:, j]), abs=0.02)
        else:
            assert row["auroc"] is None


def test_the_bundle_says_who_was_in_the_images_and_how_good_it_is_for_whom(untouched: Run, manifest: Path) -> None:
    bundle = ray_cxr.load_bundle(untouched.out / "bundle")
    source = bundle.info["provenance"]
    split = pq.read_table(bundle.path / "split.parquet").to_pandas()
    table = pq.read_table(manifest).to_pandas().set_index("image_id").loc[split["image_id"]]
    for name in ("train", "val"):
        told, rows = source["demographics"][name], table[table["split"] == name]
        assert told["images"] == source["images"][name]["images"] == len(rows)
        assert told["sex"].get("F", 0) == (rows["sex"] == "F").sum()
        assert told["view"].get("PA", 0) == (rows["view"] == "PA").sum()
        assert told["age"]["median"] == pytest.approx(rows["age"].median())
    measured = source["evaluation"]
    assert measured["split"] == "val"
    for name in FINDINGS:
        row = source["validation"]["findings"][name]
        cell = measured["findings"][name]
        assert (cell["n"], cell["positives"]) == (row["n"], row["positives"])
        assert cell["auroc"] == (row["auroc"] if row["auroc"] is None else pytest.approx(row["auroc"], abs=1e-12))
        # The phantoms' validation images are too few to keep deciles of.
        assert source["score_quantiles"][name] is None
    assert measured["means"]["auroc"]["value"] == pytest.approx(source["validation"]["macro_auroc"], abs=1e-12)
    assert {group["attribute"] for group in measured["groups"]} == {"sex", "age_band", "view", "follow_up"}
    card = (bundle.path / "MODEL_CARD.md").read_text()
    for title in ("Intended use", "Who is in the images", "Subgroups (of validation: not a test)", "Calibration"):
        assert f"## {title}" in card
    assert "sex: F" in card


def test_a_run_may_be_named_by_a_relative_path(untouched: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train's Result.from_path takes such a path for an address; the README's commands name their runs so."""
    monkeypatch.chdir(untouched.out.parent)
    assert trainer.best_checkpoint(Path(untouched.out.name)) is not None


def test_split_names_what_trained_and_what_chose_it(untouched: Run, manifest: Path) -> None:
    split = pq.read_table(untouched.out / "bundle" / "split.parquet").to_pandas()
    table = pq.read_table(manifest).to_pandas().set_index("image_id")
    assert set(split["split"]) == {"train", "val"}
    assert (table.loc[split["image_id"], "split"].to_numpy() == split["split"].to_numpy()).all()
    assert (table.loc[split["image_id"], "patient_id"].to_numpy() == split["patient_id"].to_numpy()).all()


def test_stops_for_want_of_patience_and_keeps_the_curve_beyond_the_best_epoch(untouched: Run) -> None:
    rows = pd.read_csv(untouched.out / "metrics.csv")
    bundle = ray_cxr.load_bundle(untouched.out / "bundle")
    best = bundle.info["provenance"]["best_epoch"]
    assert rows["epoch"].tolist() == list(range(1, best + 2))
    assert len(rows) < 8, "the run never got worse: choose another learning rate"
    assert rows["val_auroc"].idxmax() + 1 == best
    assert bundle.info["provenance"]["validation"]["macro_auroc"] == pytest.approx(rows["val_auroc"].max(), abs=1e-12)
    assert [point["epoch"] for point in bundle.model_json()["curves"]] == rows["epoch"].tolist()


def test_tensorboards_log_and_the_curves_show_the_same_numbers(untouched: Run) -> None:
    from tensorflow.compat.v1.train import summary_iterator

    rows = pd.read_csv(untouched.out / "metrics.csv").set_index("epoch")
    logged: dict[tuple[str, int], float] = {}
    for file in (untouched.out / "tensorboard").glob("events*"):
        for event in summary_iterator(str(file)):
            logged |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    assert {step for _, step in logged} == set(rows.index)
    for name in ("loss", "val_loss", "val_auroc", "learning_rate"):
        for epoch, value in rows[name].items():
            assert logged[name, epoch] == pytest.approx(value, rel=1e-6)
    assert (untouched.out / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (untouched.out / "learning_curves.svg").read_text()


def test_the_bundle_has_the_points_by_other_rules_and_says_why_some_have_none(untouched: Run) -> None:
    info = ray_cxr.load_bundle(untouched.out / "bundle").info
    known = [name for name in FINDINGS if info["operating_points"][name]]
    assert known
    for name in FINDINGS:
        assert set(info["operating_alternatives"][name]) == {"sensitivity=0.9", "specificity=0.9"}
        if name in known:
            assert info["operating_points"][name]["rule"] == "youden"
            point = info["operating_alternatives"][name]["sensitivity=0.9"]
            assert point is None or point["sensitivity"] >= 0.9
        else:
            assert info["rule_notes"][name]


def test_same_command_again_does_nothing(untouched: Run, command) -> None:
    before = (untouched.out / "bundle" / "SHA256SUMS").stat().st_mtime_ns
    code, out, _ = command(*untouched.arguments)
    assert code == 0
    assert "finished already" in out
    assert (untouched.out / "bundle" / "SHA256SUMS").stat().st_mtime_ns == before


def test_another_setting_in_the_same_folder_is_refused(untouched: Run, command) -> None:
    code, _, err = command(*untouched.arguments, "--set", "learning_rate=0.05")
    assert (code, err.count("\n")) == (2, 1)
    assert "train.learning_rate 0.1 (now 0.05); name another --out" in err


def test_the_bundles_config_trains_again_unchanged(untouched: Run, prepared: Path, command) -> None:
    """`--config bundle/config.toml` is the same run: continuing it is doing nothing."""
    code, out, err = command(
        "train", prepared, "--out", untouched.out, "--config", untouched.out / "bundle" / "config.toml"
    )
    assert code == 0, err
    assert "finished already" in out


def test_weights_that_do_not_fit_are_one_line_and_no_restart(prepared: Path, tmp_path: Path, command) -> None:
    from conftest import make_tiny_bundle

    other = make_tiny_bundle(tmp_path / "other").path
    given = with_settings("epochs=1", "backbone=MobileNetV3Small", f"weights={other}")
    code, _, err = command("train", prepared, "--out", tmp_path / "run", *given)
    assert (code, err.count("\n")) == (2, 1)
    assert "is it for MobileNetV3Small" in err
    # Nothing was trained, so the folder is not bound to those settings.
    from ray_cxr.config import TrainSettings
    from ray_cxr.training import trainer

    assert not trainer.check(prepared, tmp_path / "run", TrainSettings(weights="none", size=64)).begun
    code, _, err = command("train", prepared, "--out", tmp_path / "run2", *with_settings(f"weights={tmp_path}/none.h5"))
    assert code == 2
    assert "no such file or bundle" in err


@pytest.fixture(scope="module")
def from_bundle(prepared: Path, tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One epoch of one worker that start from a bundle, in another precision than that of this device."""
    from ray_cxr.cli import main

    out = tmp_path_factory.mktemp("from_bundle") / "run"
    given = with_settings(
        *("epochs=1", f"weights={tiny_bundle.path}", "findings=15"),
        *("calibration=temperature", "operating_point=specificity=0.8", "precision=mixed_bfloat16", "frozen_epochs=1"),
    )
    arguments = ["train", str(prepared), "--out", str(out), *given]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(arguments) == 0
    return Run(out, arguments, said.getvalue())


def test_a_run_that_starts_from_a_bundle_carries_on_what_trained_that(from_bundle: Run, tiny_bundle) -> None:
    assert "started at random: logits of No_Finding" in from_bundle.said
    bundle = ray_cxr.load_bundle(from_bundle.out / "bundle")
    split = pq.read_table(bundle.path / "split.parquet").to_pandas().set_index("image_id")
    assert split.loc["00000099_000.png", "patient_id"] == "99"  # from the first bundle
    assert len(split) > 20
    assert bundle.info["provenance"]["initial_weights"] == f"the bundle {tiny_bundle.digest}"
    assert "mixed_bfloat16" in from_bundle.said
    assert bundle.info["provenance"]["precision"] == "mixed_bfloat16"
    assert {c["method"] for c in bundle.info["calibration"].values() if c} == {"temperature"}
    assert {p["rule"] for p in bundle.info["operating_points"].values() if p} == {"specificity=0.8"}
    assert "sensitivity=0.9" in bundle.info["operating_alternatives"]["Mass"]
    assert bundle.info["provenance"]["lineage"] == "unknown"  # the first bundle does not say that it knows


def test_a_run_cut_short_continues_without_training_again(from_bundle: Run, tmp_path: Path, command) -> None:
    """Without a bundle, as if the run had died just before it: no epoch is trained again."""
    out = tmp_path / "run"
    shutil.copytree(from_bundle.out, out, ignore=shutil.ignore_patterns("bundle"))
    # As if that had been on another device: the run goes on in the precision that it began in.
    for checkpoint in (out / "ray").glob("checkpoint_*/progress.json"):
        checkpoint.write_text(checkpoint.read_text().replace('"mixed_bfloat16"', '"float32"'))
    code, said, err = command(*from_bundle.arguments, "--out", out, "--set", "epochs=2")
    assert code == 0, err
    assert "continues after epoch 1" in said
    assert "epoch 1 of 2" not in said
    assert "epoch 2 of 2" in said
    assert "started at random" not in said
    assert ray_cxr.load_bundle(out / "bundle").info["provenance"]["precision"] == "float32"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (("workers=3", "batch_size=16"), "batch_size: 16 cannot be shared equally by 3 workers; use 18"),
        (("xla=true", "deterministic=true"), "XLA has no deterministic gradient of max pooling"),
        (("xla=true", "sync_batchnorm=true"), "statistics cannot be exchanged inside XLA"),
        (("rotation=90",), "rotation: Input should be less than or equal to 45"),
    ],
)
def test_settings_that_cannot_go_together_are_one_line(
    settings: tuple[str, ...], line: str, prepared: Path, tmp_path: Path, command
) -> None:
    code, _, err = command("train", prepared, "--out", tmp_path / "run", *with_settings(*settings))
    assert (code, err.count("\n")) == (2, 1)
    assert line in err
    assert not (tmp_path / "run").exists()


def test_a_cosine_cannot_be_given_more_epochs(prepared: Path, tmp_path: Path, command) -> None:
    """Its rates would have been others from the first step."""
    from ray_cxr.config import TrainSettings
    from ray_cxr.training import trainer

    out = tmp_path / "run"
    for schedule, allowed in (("cosine", False), ("plateau", True)):
        begun = TrainSettings(backbone="TinyCNN", weights="none", size=64, epochs=2, schedule=schedule)
        plan = trainer.check(prepared, out, begun)
        wanted = trainer.check(prepared, out, begun.replace(epochs=3)).wanted
        assert (wanted == plan.wanted) == allowed


def test_more_workers_than_processors_are_one_line(prepared: Path, tmp_path: Path, command) -> None:
    code, _, err = command("train", prepared, "--out", tmp_path / "run", "--workers", 4, *with_settings())
    assert (code, err.count("\n")) == (2, 1)
    assert "4 workers of 1 CPUs do not fit Ray's nodes, which have 2" in err


@pytest.mark.parametrize(
    ("nodes", "workers", "wanted", "expected"),
    [
        ([(2, 9)], 1, None, 2),
        ([(2, 9)], 2, None, 1),
        ([(2, 9), (1, 9)], 1, None, 2),  # not 3: no node has them
        ([(2, 9), (1, 9)], 3, None, 1),
        ([(16, 9), (8, 9)], 3, None, 8),
        ([(8, 4)], 4, None, 2),
        ([(8, 1), (8, 1)], 2, None, 8),  # one GPU each
        ([(8, 1)], 2, None, None),
        ([(2, 9)], 3, None, None),
        ([(4, 9), (4, 9)], 2, 3, 3),
        ([(4, 9)], 2, 3, None),
        ([], 1, None, None),
    ],
)
def test_workers_get_what_single_nodes_have(nodes, workers: int, wanted: int | None, expected: int | None) -> None:
    from ray_cxr.training.trainer import cpus_each

    assert cpus_each(nodes, workers, wanted) == expected


@pytest.mark.parametrize(
    ("nodes", "settings", "gpu", "runs", "expected"),
    [
        ([(2, 0)], {"workers": 2}, False, None, (1, 1)),  # the laptop: a run's own processes must hold no CPU
        ([(2, 0)], {}, False, None, (2, 1)),
        ([(2, 0)], {}, False, 2, (1, 2)),
        ([(8, 0)] * 4, {}, False, None, (8, 4)),
        ([(8, 0)] * 4, {"workers": 2}, False, None, (8, 2)),
        ([(8, 0)], {"cpus_per_worker": 3}, False, None, (3, 2)),
        ([(16, 8)], {}, True, None, (2, 8)),  # no GPU idles because one run took all CPUs
        ([(16, 8)], {}, True, 1, (16, 1)),
        ([(16, 8), (64, 0)], {"workers": 2}, True, None, (2, 4)),
        ([(4, 1)], {"gpus_per_worker": 0.2}, True, None, (1, 4)),
        ([(10, 1)], {"gpus_per_worker": 0.2}, True, None, (2, 5)),  # 1 // 0.2 is 4
        ([(2, 8)], {}, True, None, (1, 2)),  # GPUs without a CPU
    ],
)
def test_how_many_runs_fit_and_what_their_workers_get(
    nodes, settings: dict, gpu: bool, runs: int | None, expected: tuple[int, int], monkeypatch
) -> None:
    import ray

    from ray_cxr.config import TrainSettings
    from ray_cxr.training import trainer

    alive = [{"Alive": True, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}} for cpus, gpus in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 99, "GPU": 99}}])
    assert trainer.room(TrainSettings(**settings), use_gpu=gpu, runs=runs) == expected


def test_a_part_of_a_gpu_is_for_one_worker() -> None:
    """NCCL takes no two workers on one GPU."""
    from ray_cxr.config import TrainSettings, build
    from ray_cxr.errors import ConfigError

    assert TrainSettings(gpus_per_worker=0.5).gpus_per_worker == 0.5
    with pytest.raises(ConfigError, match="gpus_per_worker: NCCL takes one worker per GPU"):
        build(TrainSettings, {"gpus_per_worker": 0.5, "workers": 2})


def test_validation_images_that_trained_the_starting_bundle_are_refused(prepared: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    import pyarrow as pa

    from ray_cxr.errors import LeakError
    from ray_cxr.training import trainer

    val = PreparedSet(prepared, 64).usable("val")
    images, patients = val["image_id"].to_pylist(), val["patient_id"].to_pylist()

    def start(image: str, patient: str | None, split: str) -> SimpleNamespace:
        table = pa.table({"image_id": [image], "patient_id": pa.array([patient], pa.string()), "split": [split]})
        pq.write_table(table, tmp_path / "split.parquet")
        return SimpleNamespace(path=tmp_path)

    trainer._refuse_leak(start("other.png", None, "train"), val)
    trainer._refuse_leak(start(images[0], patients[0], "val"), val)
    with pytest.raises(LeakError, match=r"1 of \d+ validation images, or their patients, trained"):
        trainer._refuse_leak(start(images[0], None, "train"), val)
    with pytest.raises(LeakError, match=f"{patients.count(patients[0])} of"):
        trainer._refuse_leak(start("other.png", patients[0], "train"), val)


def test_a_validation_split_without_labels_is_refused(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    import pyarrow as pa

    from ray_cxr.config import TrainSettings
    from ray_cxr.errors import TableError
    from ray_cxr.training import trainer

    usable = PreparedSet.usable

    def unlabelled(self: PreparedSet, split: str) -> pa.Table:
        table = usable(self, split)
        i = table.schema.get_field_index("Mass")
        return table.set_column(i, "Mass", pa.nulls(len(table), pa.int8())) if split == "val" else table

    monkeypatch.setattr(PreparedSet, "usable", unlabelled)
    trainer.check(prepared, tmp_path, TrainSettings(size=64, findings=("Mass", "Edema")))
    with pytest.raises(TableError, match="no image of split 'val' is labelled for Mass"):
        trainer.check(prepared, tmp_path, TrainSettings(size=64, findings=("Mass",)))


def test_a_run_that_did_not_say_that_it_ended_makes_no_bundle(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    """Without this a lost reason for a failure, on slow shared storage, would make a bundle of half a run."""
    import contextlib
    import json
    from types import SimpleNamespace

    from ray_cxr.config import TrainSettings
    from ray_cxr.errors import RayCxrError
    from ray_cxr.training import trainer

    (tmp_path / "progress.json").write_text(json.dumps({"stopped": False, "scores": [0.5], "curves": [{}]}))
    checkpoint = SimpleNamespace(as_directory=lambda: contextlib.nullcontext(str(tmp_path)))
    monkeypatch.setattr(trainer, "_fit", lambda *args, **options: SimpleNamespace(checkpoint=checkpoint))
    settings = TrainSettings(backbone="TinyCNN", weights="none", size=64, epochs=3)
    with pytest.raises(RayCxrError, match="ended after 1 of 3 epochs and left no reason; run the command again"):
        trainer.train(prepared, tmp_path / "run", settings)


def test_no_gpu_is_said_at_once(prepared: Path, tmp_path: Path, command) -> None:
    code, _, err = command("train", prepared, "--out", tmp_path / "run", "--gpu", *with_settings("epochs=1"))
    assert (code, err.count("\n")) == (2, 1)
    assert "Ray has 0" in err
