"""The study without its trials: what is refused before Ray starts, what binds a folder, what stands in the record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from ray_cxr.config import PrepareSettings, TrainSettings, TuneSettings
from ray_cxr.data import atomic, manifest, prepared
from ray_cxr.errors import ConfigError, InputError, OutputError, RayCxrError, TableError
from ray_cxr.labels import LABELS
from ray_cxr.tuning import study as studies
from ray_cxr.tuning.study import Plan

SIZE = 32
BASE = TrainSettings(backbone="TinyCNN", weights="none", epochs=4, batch_size=8)
SPACE: dict[str, Any] = {"dropout": {"low": 0.0, "high": 0.5}}
RATES: dict[str, Any] = {"learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}, "dropout": {"low": 0, "high": 0.5}}
TWO: dict[str, Any] = {"backbone": ["ResNet50", "DenseNet121"], "learning_rate": {"low": 1e-4, "high": 1e-2}}
#: Every column type, and parameters that only some trials have.
FULL: dict[str, Any] = {
    "backbone": ["ResNet50", "TinyCNN"],
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "batch_size": [8, 16],
    "ema": ["none", 0.99],
    "flip": [True, False],
    "schedule": ["constant", "plateau"],
    "when": {
        "backbone=ResNet50": {"dense": [[], [256], [512, 256]]},
        "schedule=plateau": {"plateau_patience": {"low": 1, "high": 4}},
    },
}


def prepare(out: Path, *, sizes: Sequence[int] = (SIZE,), labels: Mapping[str, list[int | None]] | None = None) -> Path:
    """Twelve blank radiographs, a patient each, prepared without Ray: their one shard a size is written by hand."""
    splits = ["train"] * 6 + ["val"] * 4 + ["test"] * 2
    n = len(splits)
    columns: dict[str, list[Any]] = {
        "image_id": [f"{i:08d}_000.png" for i in range(n)],
        "path": [f"/nowhere/{i}.png" for i in range(n)],
        "patient_id": [f"p{i}" for i in range(n)],
        "split": splits,
        **{name: [(i + j) % 3 // 2 for i in range(n)] for j, name in enumerate(LABELS)},
        **(labels or {}),
    }
    table = pa.table(
        [pa.array(columns.get(field.name, [None] * n), field.type) for field in manifest.SCHEMA], schema=manifest.SCHEMA
    )
    path = out.with_name(f"{out.name}.parquet")
    manifest.write_manifest(table, path)
    table, wanted = prepared.check(path, out, PrepareSettings(sizes=tuple(sizes)))
    prepared.begin(out, wanted)
    shutil.move(path, out / "manifest.parquet")
    for size in sizes:
        arrays = [table[name].combine_chunks() for name in manifest.SCHEMA.names]
        arrays.append(pa.array([bytes(size * size)] * n, pa.binary(size * size)))
        arrays += [pa.nulls(n, pa.string()), pa.nulls(n, pa.string())]
        (out / str(size)).mkdir()
        shard = pa.Table.from_arrays(arrays, schema=prepared.shard_schema(size))
        atomic.write_arrow(shard, out / str(size) / prepared.shard_name(0))
        atomic.write_json(out / str(size) / "counts.json", {"ok": n})
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("one") / "prepared")


@pytest.fixture(scope="module")
def both_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("two") / "prepared", sizes=(32, 48))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    yield
    optuna.logging.set_verbosity(before)


def plan_of(images: Path, out: Path, base: TrainSettings = BASE, **settings: Any) -> Plan:
    return Plan(images, out, base, TuneSettings(**{"space": SPACE, "known": False, **settings}))


def asked(plan: Plan, study: optuna.Study, count: int) -> list[optuna.Trial]:
    """The next so many trials, as a search begins them."""
    found = []
    for _ in range(count):
        trial = study.ask()
        plan.space.suggest(trial)
        found.append(trial)
    return found


def point(epoch: int, auroc: float | None, **more: float | None) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "loss": 1 / epoch,
        "val_loss": 0.7,
        "val_auroc": auroc,
        "val_calibration_error": 0.25 / epoch,
        "learning_rate": 1e-3,
        "seconds": 2.0,
        "val_seconds": 0.5,
        "images_per_second": 30.0,
        **more,
    }


def curve(plan: Plan, number: int, *aurocs: float | None, **more: float | None) -> None:
    """A trial's epochs, as its run writes them."""
    folder = plan.folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [point(epoch, auroc, **more) for epoch, auroc in enumerate(aurocs, 1)]
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)


def refusal(error: type[RayCxrError], *arguments: Any, **settings: Any) -> str:
    """The one line with which a plan is refused."""
    with pytest.raises(error) as caught:
        plan_of(*arguments, **settings)
    said = str(caught.value)
    assert said.splitlines() == [said]
    assert isinstance(caught.value, InputError), "exits with 2"
    return said


# What is refused before Ray starts


@pytest.mark.parametrize(
    ("settings", "base", "said"),
    [
        ({"grace_epochs": 5}, {}, "tune.grace_epochs: 5 is more than train.epochs=4; lower it"),
        ({"space": {"learning_rat": [0.1]}}, {}, "tune.space.learning_rat: unknown setting 'learning_rat'; did you"),
        ({"space": {"epochs": [1, 2]}}, {}, "tune.space.epochs: cannot be searched, because it is part of the budget"),
        ({"space": TWO, "sampler": "cmaes"}, {}, "tune.sampler: cmaes searches one backbone, and the space has Res"),
        (
            {"space": {"loss": ["bce", "focal"]}, "sampler": "cmaes"},
            {},
            "cmaes takes numbers only, and loss are choice",
        ),
        (
            {
                "space": {"loss": ["bce", "focal"], "when": {"loss=focal": {"focal_gamma": {"low": 1, "high": 2}}}},
                "sampler": "cmaes",
            },
            {},
            "tune.sampler: cmaes takes no conditional space, and tune.space has `when`; use tpe",
        ),
        (
            {"space": RATES, "sampler": "cmaes", "objectives": ("auroc", "calibration_error")},
            {},
            "tune.sampler: cmaes takes one objective; use tpe",
        ),
        (
            {"space": {"batch_size": [16, 30]}},
            {"workers": 4},
            "tune.space.batch_size.1: 30 cannot be shared equally by",
        ),
        ({}, {"workers": 3}, "batch_size: 8 cannot be shared equally by 3 workers; use 9"),
        ({}, {"size": 64}, "has no complete size 64, only 32"),
        ({}, {"weights": "nowhere.h5"}, "weights: nowhere.h5: no such file or bundle; or say imagenet, or none"),
        ({"space": {"weights": ["none", "lost.h5"]}}, {}, "weights: lost.h5: no such file or bundle"),
        ({"enqueue": ({"dropout": 0.6},)}, {}, "tune.enqueue[0]: dropout: 0.6 is not in the search space, which has 0"),
        ({"enqueue": ({"zoom": 0.1},)}, {}, "tune.enqueue[0]: zoom is not in the search space"),
        ({"storage": "my database"}, {}, "tune.storage: not an Optuna storage; write a database URL such as sqlite"),
        ({"storage": "postgresql://u:secret@host:five/db"}, {}, "tune.storage: not an Optuna storage"),
        ({"storage": "postgresql://u:se@cret@host/db"}, {}, "tune.storage: has two @; write that of the password as %"),
    ],
)
def test_refused_in_one_line_and_nothing_is_written(
    settings: dict[str, Any], base: dict[str, Any], said: str, images: Path, tmp_path: Path
) -> None:
    message = refusal(ConfigError, images, tmp_path / "study", BASE.replace(**base), **settings)
    assert said in message
    assert "cret" not in message
    assert not (tmp_path / "study").exists()


def test_a_folder_that_is_not_prepared_is_refused(tmp_path: Path) -> None:
    assert "not a prepared folder; make one with `ray-cxr prepare`" in refusal(
        ConfigError, tmp_path, tmp_path / "study"
    )
    assert "not a prepared folder" in refusal(ConfigError, tmp_path / "none", tmp_path / "study")


def test_several_prepared_sizes_are_searched_or_one_is_chosen(both_sizes: Path, tmp_path: Path) -> None:
    said = refusal(ConfigError, both_sizes, tmp_path / "study")
    assert "has sizes 32, 48; set train.size, or search them" in said
    assert plan_of(both_sizes, tmp_path / "study", BASE.replace(size=48)).wanted["sizes"] == [48]
    searched = plan_of(both_sizes, tmp_path / "study", space={**SPACE, "size": "prepared"})
    assert searched.wanted["sizes"] == [32, 48]


@pytest.mark.parametrize("label", [0, 1, None])
def test_a_validation_split_without_an_auroc_is_refused(label: int | None, tmp_path: Path) -> None:
    """The finding No_Finding alone, which is no finding, does not help."""
    one_sided = {name: [1, 0] * 3 + [label] * 4 + [0, 1] for name in LABELS if name != "No_Finding"}
    images = prepare(tmp_path / "prepared", labels=one_sided)
    said = refusal(TableError, images, tmp_path / "study")
    if label is not None:
        assert "no finding has both positives and negatives among the 4 images of split 'val'" in said
        refusal(TableError, images, tmp_path / "study", BASE.replace(findings=15))
    one_sided["Mass"][6] = 1 - (label or 0)
    one_sided["Mass"][7] = label or 0
    mixed = prepare(tmp_path / "mixed", labels=one_sided)
    plan_of(mixed, tmp_path / "study")
    refusal(TableError, mixed, tmp_path / "study", BASE.replace(findings=("Edema", "Effusion")))


def test_a_folder_of_something_else_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "is a file; name another --out" in refusal(OutputError, images, tmp_path / "file")
    for i, content in enumerate(('{"kind": "train", "format": 1}', "[]", "not JSON")):
        out = tmp_path / f"other{i}"
        out.mkdir()
        (out / "settings.json").write_text(content)
        assert "holds no search, or a damaged one; name another --out" in refusal(OutputError, images, out)


def test_resume_without_a_search_is_refused(images: Path, tmp_path: Path, command) -> None:
    out = tmp_path / "study"
    code, _, err = command("tune", images, "--out", out, "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert f"--resume: {out} holds no search; leave --resume out to begin one there" in err
    assert not out.exists()


# What binds a folder


def test_the_name_of_a_search_is_of_what_its_trials_are(images: Path, both_sizes: Path, tmp_path: Path) -> None:
    name = plan_of(images, tmp_path / "a").name
    again = plan_of(images, tmp_path / "b", space={"dropout": {"high": 0.5, "low": 0}})
    assert again.name == name
    free = {"trials": 99, "concurrent": 2, "ahead": 5, "max_failures": 7, "keep": "all", "storage": "sqlite:///x.db"}
    assert plan_of(images, tmp_path / "a", **free).name == name
    runs = {"workers": 2, "cpus_per_worker": 3, "max_failures": 9, "checkpoint_steps": 5}
    assert plan_of(images, tmp_path / "a", BASE.replace(**runs)).name == name
    others = [
        plan_of(images, tmp_path / "a", space={"dropout": {"low": 0.0, "high": 0.4}}),
        plan_of(images, tmp_path / "a", space={**SPACE, "zoom": [0.0, 0.1]}),
        plan_of(both_sizes, tmp_path / "a", BASE.replace(size=48)),
        plan_of(images, tmp_path / "a", BASE.replace(learning_rate=0.5)),
        plan_of(images, tmp_path / "a", BASE.replace(epochs=5)),
        plan_of(images, tmp_path / "a", BASE.replace(seed=1)),
        *(plan_of(images, tmp_path / "a", **{name: value}) for name, value in (
            ("sampler", "random"), ("startup_trials", 3), ("scheduler", "median"), ("grace_epochs", 2), ("seed", 1),
            ("reduction_factor", 2), ("objectives", ("auroc", "calibration_error")), ("enqueue", ({"dropout": 0.1},)),
        )),
    ]  # fmt: skip
    assert len({name, *(other.name for other in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("base", "settings", "named"),
    [
        ({"learning_rate": 0.5}, {}, "train.learning_rate 0.0001 (now 0.5)"),
        ({"epochs": 9}, {}, "train.epochs 4 (now 9)"),
        ({}, {"space": {"dropout": {"low": 0.0, "high": 0.4}}}, "space.dropout "),
        ({}, {"space": {**SPACE, "loss": ["bce", "focal"]}}, "space.loss None (now "),
        ({}, {"scheduler": "none"}, "tune.scheduler asha (now none)"),
        ({}, {"seed": 3}, "tune.seed 0 (now 3)"),
    ],
)
def test_another_setting_in_the_same_folder_is_named(
    base: dict[str, Any], settings: dict[str, Any], named: str, images: Path, tmp_path: Path
) -> None:
    plan_of(images, tmp_path).open()
    said = refusal(OutputError, images, tmp_path, BASE.replace(**base), **settings)
    assert f"{tmp_path}: was begun with another " in said
    assert named in said
    assert said.endswith("; name another --out")
    plan_of(images, tmp_path, trials=50, keep="all")  # what may change


def test_other_images_in_the_same_folder_are_named(images: Path, tmp_path: Path) -> None:
    plan_of(images, tmp_path / "study").open()
    other = prepare(tmp_path / "prepared", labels={"Hernia": [1] * 12})
    assert "was begun with another prepared " in refusal(OutputError, other, tmp_path / "study")


def test_the_same_search_of_another_folder_in_the_same_storage_is_refused(images: Path, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'all.db'}"
    first = plan_of(images, tmp_path / "a", storage=storage)
    asked(first, first.open(), 1)
    second = plan_of(images, tmp_path / "b", storage=storage)
    with pytest.raises(OutputError) as caught:
        second.open()
    said = str(caught.value)
    assert said.startswith(f"tune.storage: {storage} holds a search of the same data and space ({first.name})")
    assert "continue it there, or name another storage" in said
    assert len(plan_of(images, tmp_path / "a", storage=storage).open().trials) == 1
    other = plan_of(images, tmp_path / "b", space={"dropout": [0.1, 0.2]}, storage=storage)
    assert other.open().trials == []


def test_trials_that_another_storage_knows_of_are_not_begun_anew(images: Path, tmp_path: Path) -> None:
    """A storage may hold a password, so `--resume` does not know it."""
    storage = f"sqlite:///{tmp_path / 'all.db'}"
    first = plan_of(images, tmp_path / "a", storage=storage)
    asked(first, first.open(), 1)
    curve(first, 0, 0.6)
    for _ in range(2):
        with pytest.raises(
            OutputError, match=r"a: has trials that sqlite.* knows nothing of; continue with the storag"
        ):
            plan_of(images, tmp_path / "a").open()
    assert len(plan_of(images, tmp_path / "a", storage=storage).open().trials) == 1


@pytest.mark.parametrize(
    ("storage", "shown"),
    [
        ("postgresql://u:secret@host.invalid/db", "postgresql://u:***@host.invalid/db: "),
        ("mysql+pymysql://u:secret@host.invalid/db", "mysql+pymysql://u:***@host.invalid/db: "),
        ("postgresql+nothing://u:secret@host.invalid/db", "Can't load plugin"),
        (
            "sqlite:////nowhere/at/all.db",
            "sqlite:////nowhere/at/all.db: (sqlite3.OperationalError) unable to open data",
        ),
        ("sqlite:////tmp/x.db?password=secret", "sqlite:////tmp/x.db: "),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line_without_its_password(
    storage: str, shown: str, images: Path, tmp_path: Path
) -> None:
    """Whether for want of a driver or of a server."""
    plan = plan_of(images, tmp_path / "study", storage=storage)
    with pytest.raises(RayCxrError) as caught:
        plan.open()
    said = str(caught.value)
    assert said.splitlines() == [said]
    assert said.startswith("tune.storage: ")
    assert shown in said
    studies.write_begun(plan.out, plan.base, plan.settings)
    assert "secret" not in said + plan.storage_words()
    files = [path for path in plan.out.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"begun.json"}  # nothing binds the folder yet
    assert not any(b"secret" in path.read_bytes() for path in files)


def test_words_for_a_storage(images: Path, tmp_path: Path) -> None:
    shown = {
        "postgresql://u:p%40ss@host:5432/db?sslpassword=hidden": "postgresql://u:***@host:5432/db",
        "mysql+pymysql://u@host/db": "mysql+pymysql://u@host/db",
        None: f"sqlite:///{tmp_path / 'study.db'}",
    }
    for storage, words in shown.items():
        assert plan_of(images, tmp_path, storage=storage).storage_words() == words


# What the sampler is asked


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_study_that_goes_on_does_not_draw_the_same_again(sampler: str, images: Path, tmp_path: Path) -> None:
    lives = []
    for _ in range(3):
        plan = plan_of(images, tmp_path / "study", sampler=sampler)
        trials = asked(plan, study := plan.open(), 4)
        lives.append([trial.params["dropout"] for trial in trials])
        for trial in trials[:3]:
            study.tell(trial, 0.5)
    assert len({value for life in lives for value in life}) == 12
    # And yet the same search, begun elsewhere, draws as this one did.
    again = plan_of(images, tmp_path / "again", sampler=sampler)
    assert [trial.params["dropout"] for trial in asked(again, again.open(), 4)] == lives[0]
    other = plan_of(images, tmp_path / "other", sampler=sampler, seed=1)
    assert not {trial.params["dropout"] for trial in asked(other, other.open(), 4)} & set(lives[0])


SAMPLED = [("tpe", FULL), ("tpe", {}), ("random", FULL), ("cmaes", RATES)]


@pytest.mark.parametrize(("sampler", "space"), SAMPLED, ids=["tpe", "tpe, default space", "random", "cmaes"])
def test_samplers_say_nothing(
    sampler: str, space: dict[str, Any], images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Past their random beginning, with stopped and failed trials among those that they learn from."""
    plan = plan_of(images, tmp_path, space=space, sampler=sampler, startup_trials=3)
    study = plan.open()
    for i in range(12):
        (trial,) = asked(plan, study, 1)
        assert plan.settings_of(trial).epochs == 4
        if i % 5 == 4:
            study.tell(trial, state=TrialState.FAIL)
        elif i % 3 == 2:
            trial.report(0.5, 1)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, 0.9 - abs(np.log10(trial.params["learning_rate"]) + 3) / 10)
    assert capfd.readouterr() == ("", "")


def test_known_points_come_first_and_once(images: Path, tmp_path: Path) -> None:
    given = ({"backbone": "TinyCNN", "learning_rate": 1e-3, "batch_size": 8}, {"backbone": "ResNet50", "dense": [256]})
    settings = {"space": FULL, "enqueue": given, "known": True, "trials": 3}
    plan = plan_of(images, tmp_path, **settings)
    study = plan.open()
    first, second, third, fourth = asked(plan, study, 4)
    assert {name: first.params[name] for name in given[0]} == given[0]
    assert plan.settings_of(second).dense == (256,)
    assert (third.params["backbone"], third.params["learning_rate"]) == ("ResNet50", 1e-4)
    assert len(plan.points) == 3  # DenseNet121 is not searched
    assert "dense" in plan.points[2][1]  # [512] is no choice here, so the sampler chooses
    assert fourth.params["learning_rate"] not in (1e-3, 1e-4)
    study.tell(first, 0.7)
    again = plan_of(images, tmp_path, **settings)
    (fifth,) = asked(again, again.open(), 1)
    assert fifth.params["learning_rate"] not in (1e-3, 1e-4)


def test_points_that_a_kill_kept_from_the_queue_are_queued_later(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = tuple({"dropout": value} for value in (0.1, 0.2, 0.3))
    enqueue, calls = optuna.Study.enqueue_trial, []

    def killed(self: optuna.Study, *args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        enqueue(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "enqueue_trial", killed)
        with pytest.raises(KeyboardInterrupt):
            plan_of(images, tmp_path, enqueue=points).open()
    plan = plan_of(images, tmp_path, enqueue=points)
    assert [trial.params["dropout"] for trial in asked(plan, plan.open(), 3)] == [0.1, 0.2, 0.3]


def test_an_unfinished_trial_asked_again_has_the_same_values(images: Path, tmp_path: Path) -> None:
    plan = plan_of(images, tmp_path, space=FULL, sampler="random")
    before = [trial.params for trial in asked(plan, plan.open(), 5)]
    again = plan_of(images, tmp_path, space=FULL, sampler="random")
    study = again.open()
    for frozen in study.get_trials():
        trial = optuna.trial.Trial(study, frozen._trial_id)
        again.space.suggest(trial)
        assert trial.params == before[trial.number]


def test_weights_have_whole_paths_because_workers_stand_elsewhere(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.h5").write_bytes(b"")
    Path("v.h5").write_bytes(b"")
    plan = plan_of(images, Path("study"), BASE.replace(weights="w.h5"))
    (trial,) = asked(plan, plan.open(), 1)
    assert plan.settings_of(trial).weights == str(tmp_path / "w.h5")
    plan = plan_of(images, Path("other"), space={"weights": ["none", "v.h5"]}, enqueue=({"weights": "v.h5"},))
    (trial,) = asked(plan, plan.open(), 1)
    assert plan.settings_of(trial).weights == str(tmp_path / "v.h5")
    assert plan.base.weights == "none"


# The record


@pytest.fixture
def recorded(images: Path, tmp_path: Path) -> tuple[Plan, optuna.Study]:
    """A finished trial, a stopped, a failed, one that runs, and one that waits."""
    points = (
        {"backbone": "ResNet50", "learning_rate": 1e-3, "batch_size": 16, "ema": 0.99, "flip": True,
         "schedule": "constant", "dense": [512, 256]},
        {"backbone": "TinyCNN", "learning_rate": 2e-3, "batch_size": 8, "ema": "none", "flip": False,
         "schedule": "plateau", "plateau_patience": 3},
        {"backbone": "ResNet50", "learning_rate": 3e-3, "batch_size": 8, "ema": "none", "flip": False,
         "schedule": "constant", "dense": []},
        {"backbone": "TinyCNN", "learning_rate": 4e-3, "batch_size": 8, "ema": "none", "flip": False,
         "schedule": "constant"},
        {"backbone": "TinyCNN", "learning_rate": 5e-3},
    )  # fmt: skip
    plan = plan_of(images, tmp_path / "study", space=FULL, enqueue=points)
    study = plan.open()
    done, stopped, failed, running = asked(plan, study, 4)
    curve(plan, 0, 0.6, 0.8, 0.7)
    done.set_user_attr("images_per_second", 12.5)
    done.set_user_attr("starts", 3)
    study.tell(done, 0.8)
    curve(plan, 1, None, 0.55)
    stopped.report(0.55, 2)
    study.tell(stopped, state=TrialState.PRUNED)
    curve(plan, 2, 0.95)
    failed.set_user_attr("reason", "the loss is nan at epoch 2, step 7; lower the learning rate")
    study.tell(failed, state=TrialState.FAIL)
    running.set_user_attr("starts", 1)
    return plan, study


def test_a_row_for_each_trial_that_was_begun(recorded: tuple[Plan, optuna.Study]) -> None:
    rows = studies.record(*recorded).set_index("number")
    assert rows["state"].to_dict() == {0: "finished", 1: "stopped", 2: "failed", 3: "running"}
    assert rows["backbone"].tolist() == ["ResNet50", "TinyCNN", "ResNet50", "TinyCNN"]
    assert rows["epochs"].tolist() == [3, 2, 1, 0]
    assert rows["best_epoch"].tolist()[:3] == [2, 2, 1]
    assert rows["val_auroc"].tolist()[:3] == [0.8, 0.55, 0.95]
    assert rows["calibration_error"].tolist()[:3] == [0.125, 0.125, 0.25]
    assert rows["seconds"].tolist()[:3] == [7.5, 5.0, 2.5]
    assert rows.loc[3, ["best_epoch", "val_auroc", "seconds", "calibration_error"]].isna().all()
    assert rows["restarts"].tolist() == [2, 0, 0, 0]
    assert rows.loc[0, "images_per_second"] == 12.5
    assert rows["reason"].notna().tolist() == [False, False, True, False]
    assert rows.loc[2, "reason"] == "the loss is nan at epoch 2, step 7; lower the learning rate"
    assert rows.loc[0, "param_dense"] == (512, 256)
    assert rows.loc[2, "param_dense"] == ()
    assert rows.loc[1, "param_plateau_patience"] == 3
    assert isinstance(rows.loc[1, "param_plateau_patience"], int)  # though others have none
    assert rows["param_batch_size"].tolist() == [16, 8, 8, 8]
    assert rows.loc[1, "curve"][0] == point(1, None)
    assert rows["ended"].notna().tolist() == [True, True, True, False]
    assert (rows["started"] <= pd.Timestamp.now("UTC")).all()
    assert (pd.Timestamp.now("UTC") - rows["started"] < pd.Timedelta(minutes=10)).all()


KINDS = {
    "number": pa.int32(),
    "state": pa.string(),
    "reason": pa.string(),
    "backbone": pa.string(),
    "param_learning_rate": pa.float64(),
    "param_batch_size": pa.int64(),
    "param_ema": pa.float64(),
    "param_flip": pa.bool_(),
    "param_schedule": pa.string(),
    "param_dense": pa.string(),
    "param_plateau_patience": pa.int64(),
    "epochs": pa.int32(),
    "best_epoch": pa.int32(),
    "val_auroc": pa.float64(),
    "calibration_error": pa.float64(),
    "images_per_second": pa.float64(),
    "seconds": pa.float64(),
    "started": pa.timestamp("us", tz="UTC"),
    "ended": pa.timestamp("us", tz="UTC"),
    "restarts": pa.int32(),
}


def test_the_table_on_disk_has_the_same_columns_whatever_its_trials_have(
    recorded: tuple[Plan, optuna.Study], tmp_path: Path
) -> None:
    plan, study = recorded
    rows = studies.record(plan, study)
    for part in (rows, rows.iloc[3:], rows.iloc[:1]):
        atomic.write_parquet(studies.table(part), tmp_path / "trials.parquet")
        table = pq.read_table(tmp_path / "trials.parquet")
        kinds = {field.name: field.type for field in table.schema}
        epoch = kinds.pop("curve").value_type
        assert kinds == KINDS
        assert {field.name for field in epoch} == set(point(1, 0.5))
        assert table["number"].to_pylist() == part["number"].tolist()
    atomic.write_parquet(studies.table(rows), tmp_path / "trials.parquet")
    back = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert [json.loads(row["param_dense"]) if row["param_dense"] else None for row in back] == [
        [512, 256], None, [], None,
    ]  # fmt: skip
    assert [row["param_plateau_patience"] for row in back] == [None, 3, None, None]
    assert [row["param_ema"] for row in back] == [0.99, None, None, None]
    assert [row["param_flip"] for row in back] == [True, False, False, False]
    assert [row["curve"] for row in back] == rows["curve"].tolist()
    assert back[2]["reason"].startswith("the loss is nan")
    assert back[3]["val_auroc"] is None
    assert back[3]["ended"] is None
    assert back[0]["ended"] == rows["ended"].iloc[0]


def test_an_empty_study_has_an_empty_table(images: Path, tmp_path: Path) -> None:
    plan = plan_of(images, tmp_path, enqueue=({"dropout": 0.1},))
    study = plan.open()
    rows = studies.record(plan, study)
    assert len(rows) == 0
    assert studies.best_of(study, rows) is None
    table = studies.table(rows)
    assert len(table) == 0
    assert {field.name: field.type for field in table.schema if field.name != "curve"} == {
        name: kind for name, kind in KINDS.items() if not name.startswith("param_")
    }


def test_the_best_is_the_highest_that_did_not_fail(recorded: tuple[Plan, optuna.Study]) -> None:
    plan, study = recorded
    assert studies.best_of(study, studies.record(plan, study)) == 0  # not the failed one with 0.95
    curve(plan, 1, 0.7, 0.8)
    assert studies.best_of(study, studies.record(plan, study)) == 0  # of equals the first
    curve(plan, 1, 0.7, 0.81)
    assert studies.best_of(study, studies.record(plan, study)) == 1  # a stopped one may be the best
    curve(plan, 3, 0.9)
    assert studies.best_of(study, studies.record(plan, study)) == 3  # and one that Ctrl-C left
    for number in (0, 1, 3):
        curve(plan, number, None)
    assert studies.best_of(study, studies.record(plan, study)) is None


def test_a_curve_that_is_not_there(images: Path, tmp_path: Path) -> None:
    plan = plan_of(images, tmp_path)
    assert studies.curve_of(plan.folder(0)) == []
    plan.folder(0).mkdir(parents=True)
    (plan.folder(0) / "metrics.csv").write_text("")
    assert studies.curve_of(plan.folder(0)) == []
    curve(plan, 0, 0.5, None)
    assert [one["val_auroc"] for one in studies.curve_of(plan.folder(0))] == [0.5, None]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 100)), min_size=1, max_size=8))
def test_the_front_is_what_nothing_else_beats_in_everything(values: list[tuple[float, float]]) -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    for value in values:
        study.add_trial(optuna.trial.create_trial(values=list(value)))
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL))

    def beaten(one: tuple[float, float]) -> bool:
        return any(a >= one[0] and b <= one[1] and (a, b) != one for a, b in values)

    assert studies.pareto(study) == [i for i, one in enumerate(values) if not beaten(one)]


def test_one_objective_has_no_front() -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=0.5))
    assert studies.pareto(study) == []


def test_values_of_a_trial_in_the_order_of_its_objectives() -> None:
    names = ("auroc", "images_per_second", "calibration_error")
    report = {"best_val_auroc": 0.7, "val_auroc": 0.6, "images_per_second": 20, "calibration": 0.1}
    assert studies.objectives_of(report, names) == [0.7, 20.0, 0.1]
    assert studies.objectives_of(report, ("auroc",)) == [0.7]
    for lacking in (None, float("nan"), float("inf")):
        assert studies.objectives_of({**report, "calibration": lacking}, names) is None
    assert studies.objectives_of({"best_val_auroc": 0.7}, names) is None


def test_validation_probabilities_with_their_labels_and_patients(images: Path, tmp_path: Path) -> None:
    plan = plan_of(images, tmp_path, BASE.replace(findings=("Mass", "Edema")))
    assert studies.validation_of(plan, 0) is None
    val = prepared.PreparedSet(images).usable("val").to_pandas()
    ids, p = val["image_id"].to_numpy()[::-1], np.arange(8, dtype=np.float32).reshape(4, 2)
    plan.folder(0).mkdir(parents=True)
    np.savez(plan.folder(0) / "validation.npz", probabilities=p, image_ids=ids.astype(str))
    _, labels, probabilities, patients = studies.validation_of(plan, 0)  # type: ignore[misc]
    assert labels.dtype == np.int8
    assert (labels == val[["Mass", "Edema"]].to_numpy()[::-1]).all()
    assert (probabilities == p).all()
    assert patients.tolist() == val["patient_id"].tolist()[::-1]
    np.savez(plan.folder(0) / "validation.npz", probabilities=p, image_ids=np.array(["a", "b", "c", "d"]))
    assert studies.validation_of(plan, 0) is None


# Going on


def test_what_a_search_was_begun_with_and_what_is_said_again(images: Path, tmp_path: Path) -> None:
    plan = plan_of(images, tmp_path, trials=5, enqueue=({"dropout": 0.1},), storage="sqlite:///x.db", seed=4)
    assert not studies.begun(tmp_path)
    studies.write_begun(tmp_path, plan.base, plan.settings)
    assert studies.begun(tmp_path)
    base, settings = studies.resumed(tmp_path, [])
    assert (base, settings) == (plan.base, plan.settings.replace(storage=None))
    base, settings = studies.resumed(tmp_path, ["trials=9", "tune.keep=all", "train.cpus_per_worker=1"])
    assert (settings.trials, settings.keep, settings.seed, base.cpus_per_worker) == (9, "all", 4, 1)
    assert Plan(images, tmp_path, base, settings).name == plan.name
    with pytest.raises(ConfigError, match=r"unknown key 'tune\.trails'; did you mean 'trials'"):
        studies.resumed(tmp_path, ["trails=9"])
    for damaged in ("", "[]", '{"train": {}}', '{"train": 1, "tune": 2}'):
        (tmp_path / "begun.json").write_text(damaged)
        with pytest.raises(OutputError, match=r"begun\.json: is damaged; give the settings again in place of --resume"):
            studies.resumed(tmp_path, [])


def test_done_is_as_many_as_are_wanted_and_all_that_is_written_of_them(images: Path, tmp_path: Path) -> None:
    plan = plan_of(images, tmp_path, trials=4)
    assert not plan.done()
    (tmp_path / "bundle").mkdir()
    for summary, done in (
        ('{"trials_over": 3, "best_number": 1}', False),
        ('{"trials_over": 4, "best_number": null}', False),
        ('{"trials_over": 4}', False),
        ("[", False),
        ('{"trials_over": 4, "best_number": 0}', True),
    ):
        (tmp_path / studies.SUMMARY).write_text(summary)
        assert plan.done() == done
    assert plan_of(images, tmp_path, trials=3).done()
    assert not plan_of(images, tmp_path, trials=5).done()
    (tmp_path / "bundle").rmdir()
    assert not plan.done()
