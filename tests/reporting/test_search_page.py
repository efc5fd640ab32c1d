"""The page of a search from outside: a study and its table in, figures and the page out."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from pages import Page
from PIL import Image
from score_archive import without_drawing

from ray_cxr.errors import OutputError
from ray_cxr.evaluation import backbones, paired
from ray_cxr.evaluation.confirmation import Confirmation, ConfirmedPair
from ray_cxr.reporting import html, optuna_plots, plots, search_page
from ray_cxr.reporting.search_page import write_search_page

UNIT = FloatDistribution(0.0, 1.0)
Space = Mapping[str, BaseDistribution]
SPACE: Space = {
    "backbone": CategoricalDistribution(["ResNet50", "DenseNet121"]),
    "learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
    "optimizer": CategoricalDistribution(["adam", "sgd"]),
    "momentum": FloatDistribution(0.8, 0.99),  # only with sgd
    "dense": CategoricalDistribution(["[]", "[256]", "[512, 128]"]),
    "warmup_epochs": IntDistribution(0, 2),
    **dict.fromkeys(("dropout", "mixup", "shift", "zoom"), UNIT),
}
STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
STATES |= {"failed": TrialState.FAIL, "running": TrialState.RUNNING}
EPOCHS = 8
TWO = ("val_auroc", "images_per_second")
CHAPTERS = {"optimization", "importances", "parallel", "slice", "intermediate", "timeline"}


def mixed(count: int) -> list[str]:
    """States of a search: of ten trials six finish, three are stopped and one fails; the last one runs."""
    half = ["finished", "finished", "stopped", "finished", "failed"]
    cycle = [*half, "finished", "stopped", "finished", "finished", "stopped"]
    return [*(cycle[i % 10] for i in range(count - 1)), "running"]


class Search:
    """A made-up search: the study, its table and the facts."""

    def __init__(self, states: Sequence[str], objectives: Sequence[str] = ("val_auroc",), space: Space = SPACE) -> None:
        rng, source = np.random.default_rng(0), optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
        several, directions = len(objectives) > 1, ["maximize"] * len(objectives)
        self.study = optuna.create_study(directions=directions)
        rows = []
        for number, state in enumerate(states):
            params = source.ask(dict(space)).params
            if params.get("optimizer") == "adam":
                del params["momentum"]
            row = self._row(number, state, params, space, rng)
            rows.append(row)
            trial = optuna.trial.create_trial(
                state=STATES[state],
                values=[row[name] for name in objectives] if state == "finished" else None,
                params=params,
                distributions={name: space[name] for name in params},
                user_attrs={"secret": "a private note"},
                intermediate_values={} if several else {p["epoch"]: p["val_auroc"] for p in row["curve"]},
            )
            trial.datetime_start = row["started"].tz_localize(None).to_pydatetime()
            if state != "running":
                trial.datetime_complete = row["ended"].tz_localize(None).to_pydatetime()
            self.study.add_trial(trial)
        self.table = pd.DataFrame(rows, columns=list(self._row(0, "failed", {}, space, rng)))
        finished = [row for row in rows if row["state"] == "finished"]
        best = max(finished, key=lambda row: row["val_auroc"], default=None)
        self.facts: dict[str, Any] = {
            "title": "Search: which network for these radiographs",
            "prepared": "prepared images/nih",
            "study_name": "first",
            "storage": "journal.log",
            "sampler": "TPESampler, 10 startup trials, seed 0",
            "scheduler": "ASHA: grace 2 epochs, reduction 3",
            "workers": 1,
            "concurrent": 2,
            "seconds": 5400.0,
            "interrupted": False,
            "versions": {"ray-cxr": "0.1.0", "optuna": optuna.__version__},
            "objectives": list(objectives),
            "directions": directions,
            "trials_wanted": max(1, len(states)),
            "epochs_spent": sum(row["epochs"] for row in rows),
            "epochs_full": EPOCHS * len(rows),
            "best_number": best["number"] if best and not several else None,
            "pareto": [trial.number for trial in self.study.best_trials] if several else [],
        }

    @staticmethod
    def _row(number: int, state: str, params: Mapping[str, Any], space: Space, rng: Any) -> dict[str, Any]:
        backbone = str(params.get("backbone", "DenseNet121"))
        top = (0.80 if backbone == "DenseNet121" else 0.785) - 0.01 * float(rng.random())
        top -= 0.03 * abs(math.log10(params.get("learning_rate", 1e-4)) + 3.5)
        epochs = {"finished": EPOCHS, "stopped": int(rng.choice([2, 2, 4])), "failed": 0, "running": 3}[state]
        values = [float(top - 0.2 * math.exp(-e / 2) + 0.004 * rng.normal()) for e in range(1, epochs + 1)]
        started = pd.Timestamp(datetime.datetime(2026, 3, 1, 8, 7 * (number // 2) % 60), tz="UTC")
        return {
            "number": number,
            "state": state,
            "reason": "out of memory <script>alert('reason')</script>" if state == "failed" else None,
            "backbone": backbone,
            **{f"param_{name}": params.get(name) for name in space if name != "backbone"},
            **({"param_dense": json.loads(params.get("dense", "null"))} if "dense" in space else {}),
            "epochs": epochs,
            "best_epoch": int(np.argmax(values)) + 1 if values else None,
            "val_auroc": max(values, default=None),
            "images_per_second": 900.0 if backbone == "ResNet50" else 600.0 + 10 * float(rng.random()),
            "calibration_error": 0.01 + 0.02 * float(rng.random()) if state == "finished" else None,
            "seconds": 50.0 * epochs or 4.0,
            "started": started,
            "ended": pd.NaT if state == "running" else started + pd.Timedelta(seconds=50 * epochs),
            "restarts": int(number == 3),
            "curve": [{"epoch": e, "val_auroc": value} for e, value in enumerate(values, 1)],
        }

    def comparison(self, confirmation: Confirmation | None = None) -> dict[str, Any]:
        curves = []
        for row in self.table.itertuples():
            curve = tuple((point["epoch"], point["val_auroc"]) for point in row.curve)
            curves.append(backbones.TrialCurve(row.number, row.backbone, row.state, curve))
        compared = backbones.compare_backbones(curves, 2, n=200)
        y, noise = np.tile([[0, 1], [1, 0]], (50, 1)), np.random.default_rng(0).normal(size=(2, 100, 2))
        difference = paired.paired_macro_auroc(y, y + noise[0], noise[1], np.arange(100), n_resamples=50)
        return backbones.comparison_record(compared, difference if compared.pair else None, confirmation)


def write_page(
    search: Search,
    out: Path,
    *,
    compare: bool = True,
    with_figures: bool = False,
    confirmation: Confirmation | None = None,
) -> Page:
    level = optuna.logging.get_verbosity()
    with contextlib.nullcontext() if with_figures else without_drawing(), warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = search.comparison(confirmation) if compare else None
        write_search_page(out, search.study, search.table, search.facts, comparison)
    assert optuna.logging.get_verbosity() == level
    return Page((out / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, Page]:
    search = Search(mixed(40))
    return search, write_page(search, tmp_path_factory.mktemp("forty") / "out")


def test_page_sums_up_the_search(forty: tuple[Search, Page]) -> None:
    search, page = forty
    best = search.table.loc[search.facts["best_number"]]
    for words in (
        "40 of 40 trials: 24 finished, 11 stopped early, 4 failed, 1 waiting to continue.",
        f"Best: trial {best['number']} ({best['backbone']}), validation AUROC {best['val_auroc']:.3f}",
        f"{search.facts['epochs_spent']} epochs were trained; all trials at full length would have cost 320",
        "it is the best of 36 trials",
        f"ray-cxr train '{Path.cwd()}/prepared images/nih' --config ",
    ):
        assert words in page.text
    assert page.text.count("out of memory <script>") == 4
    assert page.text.count("Only the 8 most important of 10 settings are shown.") == 2
    assert page.ids >= {"best", *CHAPTERS}
    assert "pareto" not in page.ids
    assert all(trial.user_attrs == {"secret": "a private note"} for trial in search.study.trials)
    assert "a private note" not in page.source, "notes that users attach stay out of the page"


def test_page_shows_the_comparison_of_backbones(forty: tuple[Search, Page], tmp_path: Path) -> None:
    search, page = forty
    compared = search.comparison()
    assert compared["verdict"]["headline"] in page.text
    for backbone in compared["backbones"]:
        assert f"{backbone['median']:.3f} ({backbone['lower']:.3f}–{backbone['upper']:.3f})" in page.text
        assert f"{backbone['best']:.3f} trial {backbone['best_trial']}" in page.text
    assert "confirmation" not in page.ids
    assert "Backbones were not compared." in write_page(Search(["finished"]), tmp_path / "out", compare=False).text


def test_page_shows_the_confirming_pairs(tmp_path: Path) -> None:
    pairs = [ConfirmedPair(n, n + 1, 0.80 + n / 100, 0.79, True) for n in range(6)]
    pairs.append(ConfirmedPair(6, 7, None, 0.79, True, "DenseNet121: the loss is nan"))
    search = Search(mixed(20))
    page = write_page(search, tmp_path / "out", confirmation=Confirmation.of("DenseNet121", "ResNet50", pairs))
    assert "confirmation" in page.ids
    for words in ("0.8200.7900.030", "DenseNet121: the loss is nan", "6 pairs of new trainings", "+0.010 to +0.060"):
        assert words in page.text


@pytest.mark.slow
@pytest.mark.parametrize("objectives", [2, 3, 4])
def test_page_of_several_objectives_shows_the_front(tmp_path: Path, objectives: int) -> None:
    search = Search(mixed(20), (*TWO, "calibration_error", "seconds")[:objectives])
    page = write_page(search, tmp_path / "out")
    assert page.ids >= {"pareto", "front", *CHAPTERS}
    assert "best" not in page.ids
    assert f"{len(search.facts['pareto'])} trials are on the Pareto front of validation AUROC" in page.text
    fronts = [len(trace["text"]) for trace in page.traces() if trace.get("name") == "on the front"]
    assert fronts == ([] if objectives == 4 else [len(search.facts["pareto"])])
    assert ("here are 4." in page.text) == (objectives == 4)
    assert any(trace["type"] == "scatter3d" for trace in page.traces()) == (objectives == 3)


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ([], "No trial was started."),
        (["finished"], "This plot needs two finished trials; there is one."),
        (["running"], "This plot needs a finished trial; there is none."),
        (["stopped", "stopped", "failed"], "0 finished, 2 stopped early, 1 failed"),
        (["finished", "finished"], "it is the best of 2 trials"),
    ],
)
@pytest.mark.parametrize("objectives", [("val_auroc",), TWO])
def test_page_of_a_small_search(tmp_path: Path, states: list[str], words: str, objectives: tuple[str, ...]) -> None:
    page = write_page(Search(states, objectives), tmp_path / "out")
    assert page.ids >= CHAPTERS
    assert words in page.text
    assert any("Plotly.react" in script for script in page.scripts) == bool(page.figures) == bool(states)


@pytest.mark.slow
def test_settings_that_never_varied_have_no_importance(tmp_path: Path) -> None:
    space: dict[str, BaseDistribution] = {"backbone": CategoricalDistribution(["DenseNet121"])}
    page = write_page(Search(mixed(6), space=space), tmp_path / "out")
    assert "Every finished trial has the same settings" in page.text
    page = write_page(Search(mixed(6), space={}), tmp_path / "none")
    assert page.text.count("No finished trial has a setting that was searched.") == 3


@pytest.mark.parametrize(("direction", "first"), [("maximize", "high"), ("minimize", "low")])
def test_importances_follow_the_direction_of_the_objective(direction: str, first: str) -> None:
    study = optuna.create_study(directions=["maximize", direction])
    for high, low in np.random.default_rng(0).random((200, 2)):
        # `high` decides on the highest values, `low` on the lowest.
        value = 10.0 * high if high > 0.85 else low
        params = {"high": high, "low": low}
        trial = optuna.trial.create_trial(values=[1.0, value], params=params, distributions=dict.fromkeys(params, UNIT))
        study.add_trial(trial)
    with optuna_plots.silence_optuna():
        objective = optuna_plots.list_objectives(study, ["a", "b"])[1]
        found = optuna.importance.get_param_importances(study, target=objective.loss)
    assert next(iter(found)) == first
    assert found[first] > 0.8


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    plain = write_page(Search(mixed(6)), tmp_path / "plain")
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    choices = {"backbone": ["DenseNet121", f"ResNet50{bad}"], "dense": ["[]", f'["{bad}"]']}
    search = Search(mixed(6), space={**SPACE, **{name: CategoricalDistribution(c) for name, c in choices.items()}})
    search.facts |= {name: f"{search.facts[name]}{bad}" for name in ("title", "prepared", "study_name", "storage")}
    search.facts |= {"sampler": bad, "scheduler": bad, "versions": {bad: bad}}
    search.table.loc[search.table["state"] == "failed", "reason"] = bad
    page = write_page(search, tmp_path / "hostile")
    assert bad in page.text
    assert set(page.tags) == set(plain.tags)
    assert page.tags.count("script") - len(page.figures) == plain.tags.count("script") - len(plain.figures)
    assert all(url.startswith("#") for url in page.urls)


@pytest.mark.slow
def test_page_holds_its_figures_and_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 50)
    out = tmp_path / "out"
    page = write_page(Search(mixed(6), TWO), out, with_figures=True)
    assert page.urls
    assert all(url.startswith("#") for url in page.urls)
    for words in ("plotly.js v", "default-src 'none'", "showSendToCloud: false"):
        assert page.source.count(words) == 1
    own = re.sub(r"<script>.*?</script>", "", page.source, flags=re.DOTALL)
    assert not re.search(r"@import|url\((?!#)|https?://", own)
    for name in ("history", "backbones", "curves"):
        with Image.open(out / f"{name}.png") as image:
            assert image.width > 130
        assert (out / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_a_new_page_replaces_the_figures_of_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    search = Search(mixed(6))
    search.study.enqueue_trial({"learning_rate": 1e-3})  # waiting trials do no harm
    page = write_page(search, out)
    assert {"waiting to start", "waiting to continue"} <= {trace.get("name") for trace in page.traces()}
    names = {f"{name}.{kind}" for name in ("history", "backbones", "curves") for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {"report.html", *names}
    write_page(Search(["failed"]), out)
    assert {path.name for path in out.iterdir()} == {"report.html"}


def test_a_plot_that_optuna_cannot_draw_becomes_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no <b>ink</b>\nleft")

    monkeypatch.setattr(optuna.visualization, "plot_slice", fail)
    page = write_page(Search(mixed(6)), tmp_path / "out")
    assert "Optuna could not draw this: RuntimeError: no <b>ink</b> left" in page.text
    assert page.figures


@pytest.mark.slow
def test_the_same_search_gives_the_same_page(tmp_path: Path) -> None:
    states = mixed(6)[:-1]  # a running trial is drawn up to now
    assert len({write_page(Search(states), tmp_path / "out").source for _ in range(2)}) == 1


def test_page_names_the_next_commands(tmp_path: Path) -> None:
    search = Search(["finished"])
    search.facts |= {"storage": "postgresql://reader@host/db; rm x", "prepared": "$(rm y)"}
    page = write_page(search, tmp_path / "out")
    assert "optuna-dashboard 'postgresql://reader@host/db; rm x'" in page.text
    assert (
        f"ray-cxr train '{Path.cwd()}/$(rm y)' --config {tmp_path}/out/best.toml --out {tmp_path}/out-best" in page.text
    )
    assert "--resume" not in page.text
    search.facts |= {"interrupted": True, "storage": None, "best_number": None}
    page = write_page(search, tmp_path / "out")
    assert "interrupted" in page.text
    assert f"ray-cxr tune '{Path.cwd()}/$(rm y)' --out {tmp_path}/out --resume" in page.text
    assert "optuna-dashboard" not in page.text


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(OutputError, match=r"--out .*out: is a file"):
        write_page(Search([]), tmp_path / "out")


@pytest.mark.parametrize("objectives", [("val_auroc",), TWO])
def test_history_axis_has_the_range_of_the_values(tmp_path: Path, objectives: tuple[str, ...]) -> None:
    page = write_page(Search(["finished", "failed", "running"], objectives), tmp_path / "out")
    first = page.figures[1 if len(objectives) > 1 else 0]
    value = first["data"][0]["y"][0]
    low, high = first["layout"]["yaxis"]["range"]
    assert 0.9 * value < low < value < high < 1.1 * value


def test_trials_without_an_end_wait_and_are_drawn_as_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 50)
    search = Search(["finished", "running", "running"])
    search.table.loc[2, "val_auroc"] = None
    write_page(search, tmp_path / "out", with_figures=True)
    history = (tmp_path / "out/history.svg").read_text(encoding="utf-8")
    assert ">waiting<" in history
    assert ">failed<" not in history
    rows = search_page.read_trials(search.table)
    assert [row.state for row in rows] == ["finished", "waiting", "waiting"]


def test_missing_values_are_none_and_a_dash_in_the_page() -> None:
    running, failed = search_page.read_trials(Search(["running", "failed"]).table.iloc[::-1])
    assert (running.number, running.calibration_error, running.reason) == (0, None, None)
    assert (failed.val_auroc, failed.best_epoch, failed.curve) == (None, None, ())
    shown = [html.format_setting(value) for value in (None, True, 1.23456e-5, [512, 128])]
    assert shown == [html.format_duration(None), "true", "1.235e-05", "[512, 128]"]
    assert ("momentum" in running.params) == (running.params["optimizer"] == "sgd")


def test_a_searched_field_may_be_named_like_a_column(tmp_path: Path) -> None:
    page = write_page(Search(["finished"] * 3, space={**SPACE, "epochs": IntDistribution(4, 8)}), tmp_path / "out")
    assert ", zoom, epochs." in page.text


@pytest.mark.slow
def test_plots_show_categorical_values_without_pythons_quotes(tmp_path: Path) -> None:
    write_page(Search(mixed(20)), tmp_path / "out", with_figures=True)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    plots = re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)
    traces = [trace for plot in plots for trace in json.loads(plot)["data"]]
    shown = {x for trace in traces for x in trace.get("x") or () if isinstance(x, str)}
    assert {"adam", "sgd"} <= shown
    assert not any(x.startswith("'") for x in shown)
