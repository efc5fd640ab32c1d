"""The page of a search from outside: a study and its table in, pictures and the page out."""

from __future__ import annotations

import datetime
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from PIL import Image

from ray_cxr.errors import OutputError
from ray_cxr.evaluation import comparison as comparing
from ray_cxr.reporting import html, plots
from ray_cxr.reporting import study as study_module
from ray_cxr.reporting.study import write_study

SPACE: dict[str, BaseDistribution] = {
    "backbone": CategoricalDistribution(["ResNet50", "DenseNet121"]),
    "learning_rate": FloatDistribution(1e-5, 1e-2, log=True),
    "dropout": FloatDistribution(0.0, 0.5),
    "optimizer": CategoricalDistribution(["adam", "adamw", "sgd"]),
    "momentum": FloatDistribution(0.8, 0.99),
    "weight_decay": FloatDistribution(1e-6, 1e-2, log=True),
    "dense": CategoricalDistribution(["[]", "[256]", "[512, 128]"]),
    "loss": CategoricalDistribution(["bce", "focal"]),
    "focal_gamma": FloatDistribution(0.5, 4.0),
    "warmup_epochs": IntDistribution(0, 2),
}
#: Parameters that only some trials have, and of which.
CONDITIONS = {
    "momentum": ("optimizer", "sgd"),
    "weight_decay": ("optimizer", "adamw"),
    "focal_gamma": ("loss", "focal"),
}
STATES = {
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
    "running": TrialState.RUNNING,
}
EPOCHS, GRACE = 8, 2
START = datetime.datetime(2026, 3, 1, 8, 0, 0)


class Search:
    """A made-up search: the study, its table and the facts.

    Of every ten trials, with all states on, six finish, two or three are stopped, one fails; the last one runs.
    """

    def __init__(
        self,
        states: Sequence[str],
        objectives: Sequence[str] = ("val_auroc",),
        space: Mapping[str, BaseDistribution] = SPACE,
        seed: int = 0,
    ) -> None:
        self.objectives = list(objectives)
        directions = ["maximize"] * len(objectives)
        self.study = optuna.create_study(directions=directions)
        rng = np.random.default_rng(seed)
        rows = []
        for number, state in enumerate(states):
            params = self._draw(rng, space)
            backbone = str(params.get("backbone", "DenseNet121"))
            row = self._row(number, state, backbone, params, rng)
            rows.append(row)
            self._add(number, state, row, params, space)
        self.table = (
            pd.DataFrame(rows, columns=self._columns(space)) if rows else pd.DataFrame(columns=self._columns(space))
        )
        finished = [row for row in rows if row["state"] == "finished"]
        best = max(finished, key=lambda row: row["val_auroc"], default=None)
        several = len(objectives) > 1
        self.facts: dict[str, Any] = {
            "title": "Search: which network for these radiographs",
            "prepared": "prepared images/nih",
            "study_name": "first",
            "storage": "journal.log",
            "objectives": self.objectives,
            "directions": directions,
            "trials_wanted": max(1, len(states)),
            "sampler": "TPESampler, 10 startup trials, seed 0",
            "scheduler": "ASHA: grace 2 epochs, reduction 3",
            "workers": 1,
            "concurrent": 2,
            "epochs_spent": sum(row["epochs"] for row in rows),
            "epochs_full": EPOCHS * len(rows),
            "seconds": 5400.0,
            "best_number": best["number"] if best and not several else None,
            "pareto": [trial.number for trial in self.study.best_trials] if several else [],
            "interrupted": False,
            "versions": {"ray-cxr": "0.1.0", "optuna": optuna.__version__},
        }

    @staticmethod
    def _columns(space: Mapping[str, BaseDistribution]) -> list[str]:
        fixed = ["number", "state", "reason", "backbone"]
        rest = [
            "epochs", "best_epoch", "val_auroc", "images_per_second", "calibration_error", "seconds", "started",
            "ended", "restarts", "curve",
        ]  # fmt: skip
        return [*fixed, *(f"param_{name}" for name in space), *rest]

    @staticmethod
    def _draw(rng: np.random.Generator, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        params: dict[str, Any] = {}
        for name, one in space.items():
            other, value = CONDITIONS.get(name, (None, None))
            if other is not None and params.get(other) != value:
                continue
            if isinstance(one, CategoricalDistribution):
                params[name] = one.choices[rng.integers(len(one.choices))]
            elif isinstance(one, IntDistribution):
                params[name] = int(rng.integers(one.low, one.high + 1))
            elif isinstance(one, FloatDistribution):
                u = float(rng.random())
                params[name] = (
                    float(10 ** (math.log10(one.low) + u * math.log10(one.high / one.low)))
                    if one.log
                    else one.low + u * (one.high - one.low)
                )
        return params

    @staticmethod
    def _row(
        number: int, state: str, backbone: str, params: Mapping[str, Any], rng: np.random.Generator
    ) -> dict[str, Any]:
        top = 0.80 if backbone == "DenseNet121" else 0.785
        top -= 0.03 * abs(math.log10(params.get("learning_rate", 1e-4)) + 3.5) + 0.01 * float(rng.random())
        epochs = {"finished": EPOCHS, "stopped": int(rng.choice([2, 2, 4])), "failed": 0, "running": 3}[state]
        curve = [
            {
                "epoch": e,
                "loss": 0.7 / e,
                "val_loss": 0.6 / e,
                "val_auroc": float(top - 0.2 * math.exp(-e / 2) + 0.004 * rng.normal()),
                "learning_rate": params.get("learning_rate"),
                "seconds": 30.0,
            }
            for e in range(1, epochs + 1)
        ]
        best = max(curve, key=lambda point: point["val_auroc"], default=None)
        begun = START + datetime.timedelta(minutes=7 * (number // 2), seconds=20 * (number % 2))
        return {
            "number": number,
            "state": state,
            "reason": "out of memory <script>alert('reason')</script>" if state == "failed" else None,
            "backbone": backbone,
            **{f"param_{name}": json.loads(v) if name == "dense" else v for name, v in params.items()},
            "epochs": epochs,
            "best_epoch": best["epoch"] if best else None,
            "val_auroc": best["val_auroc"] if best else None,
            "images_per_second": 900.0 if backbone == "ResNet50" else 600.0 + 10 * float(rng.random()),
            "calibration_error": 0.01 + 0.02 * float(rng.random()) if state == "finished" else None,
            "seconds": 50.0 * epochs or 4.0,
            "started": pd.Timestamp(begun, tz="UTC"),
            "ended": pd.Timestamp(begun, tz="UTC") + pd.Timedelta(seconds=50 * epochs)
            if state != "running"
            else pd.NaT,
            "restarts": int(number == 3),
            "curve": curve,
        }

    def _add(
        self,
        number: int,
        state: str,
        row: Mapping[str, Any],
        params: dict[str, Any],
        space: Mapping[str, BaseDistribution],
    ) -> None:
        several = len(self.objectives) > 1
        made = optuna.trial.create_trial(
            state=STATES[state],
            values=[row[name] for name in self.objectives] if state == "finished" else None,
            params=params,
            distributions={name: space[name] for name in params},
            user_attrs={"secret": "a user's own note"},
            intermediate_values={} if several else {p["epoch"]: p["val_auroc"] for p in row["curve"]},
        )
        made.datetime_start = row["started"].tz_localize(None).to_pydatetime()
        if state != "running":
            made.datetime_complete = row["ended"].tz_localize(None).to_pydatetime()
        self.study.add_trial(made)

    def comparison(self) -> dict[str, Any]:
        rows = self.table.to_dict("records")
        compared = comparing.compare_backbones(
            [
                comparing.TrialCurve(
                    row["number"],
                    row["backbone"],
                    row["state"],
                    tuple((point["epoch"], point["val_auroc"]) for point in row["curve"]),
                )
                for row in rows
            ],
            GRACE,
            n=500,
        )
        rng = np.random.default_rng(0)
        y = (rng.random((300, 2)) < 0.3).astype(np.int8)
        a, b = y + rng.normal(size=y.shape), 0.8 * y + rng.normal(size=y.shape)
        paired = comparing.paired_macro_auroc(y, a, b, np.arange(300) // 3, n_resamples=100) if compared.pair else None
        return comparing.comparison_record(compared, paired)


def mixed(count: int) -> list[str]:
    cycle = [
        "finished",
        "finished",
        "stopped",
        "finished",
        "failed",
        "finished",
        "stopped",
        "finished",
        "finished",
        "stopped",
    ]
    return [*(cycle[i % 10] for i in range(count - 1)), "running"]


class Page(HTMLParser):
    """What a browser would see: tags, addresses to load, texts, and the contents of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.urls: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    @property
    def figures(self) -> list[dict[str, Any]]:
        return [json.loads(script) for script in self.scripts if script.startswith("{")]


@pytest.fixture(autouse=True)
def light(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Most tests read text: for them pictures are not drawn and the plotting script is a word."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(plots, "encode", lambda figure: (b"png", b"svg"))
        monkeypatch.setattr(study_module.plotly.offline, "get_plotlyjs", lambda: "window.Plotly = {};")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def drawn() -> None:
    """For tests that look at the pictures and the whole page."""


def written(search: Search, out: Path, compared: bool = True) -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_study(out, search.study, search.table, search.facts, search.comparison() if compared else None)
    return Page((out / "report.html").read_text(encoding="utf-8"))


CHAPTERS = ("optimization", "importances", "parallel", "slice", "intermediate", "timeline")


def test_a_search_at_a_glance(tmp_path: Path) -> None:
    search = Search(mixed(40))
    page = written(search, tmp_path / "out")
    best = search.table.loc[search.facts["best_number"]]
    assert "40 of 40 trials: 24 finished, 11 stopped early, 4 failed, 1 still running." in page.text
    assert "Searched: backbone (DenseNet121, ResNet50), learning_rate, dropout, optimizer, momentum" in page.text
    assert f"Best: trial {best['number']} ({best['backbone']}), validation AUROC {best['val_auroc']:.3f}" in page.text
    assert (
        f"{search.facts['epochs_spent']} epochs were trained; all trials at full length would have cost 320"
        in page.text
    )
    assert "The highest validation AUROC is optimistic: it is the best of 36 trials" in page.text
    assert "The test split was not touched." in page.text
    verdict = search.comparison()["verdict"]
    for said in ("headline", "details", "noise"):
        assert verdict[said] in page.text
    assert {"summary", "cautions", "best", "backbones", "verdict", "plots", "trials", "further", "made"} <= set(
        page.ids
    )
    assert set(CHAPTERS) <= set(page.ids)
    assert "pareto" not in page.ids
    assert len(page.figures) == 1 + 1 + 1 + 2 + 1 + 1  # the settings one by one in two rows of four
    assert page.text.count("out of memory <script>") == 4
    assert "optuna-dashboard journal.log" in page.text
    assert "ray-cxr train 'prepared images/nih' --config best.toml --out RUN" in page.text


def test_backbone_table_holds_the_comparison(tmp_path: Path) -> None:
    search = Search(mixed(40))
    page = written(search, tmp_path / "out")
    compared = search.comparison()
    assert f"Best in {compared['budget']} epochs" in page.text
    for one in compared["backbones"]:
        assert f"{one['median']:.3f} ({one['lower']:.3f}–{one['upper']:.3f})" in page.text
        assert f"{one['best']:.3f} trial {one['best_trial']}" in page.text
    assert "Backbones were not compared." in written(search, tmp_path / "without", compared=False).text


def test_several_objectives(tmp_path: Path) -> None:
    search = Search(mixed(40), ("val_auroc", "images_per_second"))
    page = written(search, tmp_path / "out")
    count = len(search.facts["pareto"])
    assert f"{count} trials are on the Pareto front of validation AUROC and images per second" in page.text
    assert {"pareto", "front", *CHAPTERS} <= set(page.ids)
    assert "best" not in page.ids
    # Front, history and importances of each, parallel, two rows of settings for each, timeline.
    assert len(page.figures) == 1 + 2 + 2 + 1 + 4 + 1
    assert "Optuna takes no values while a trial trains when there are several objectives" in page.text
    assert "There is no best trial" not in page.text
    front = next(trace for figure in page.figures for trace in figure["data"] if trace.get("name") == "on the front")
    assert len(front["text"]) == count


@pytest.mark.parametrize("objectives", [3, 4])
def test_many_objectives(tmp_path: Path, objectives: int) -> None:
    names = ("val_auroc", "images_per_second", "calibration_error", "seconds")[:objectives]
    page = written(Search(mixed(20), names), tmp_path / "out")
    assert ("Optuna draws fronts of two or three objectives; here are 4." in page.text) == (objectives == 4)
    assert "maximize" in page.text


@pytest.mark.parametrize(
    ("states", "figures", "says"),
    [
        ([], 0, "No trial was started."),
        (["finished"], 3, "This plot needs two finished trials; there is one."),
        (["failed"] * 3, 1, "There is no best trial: none has finished with a validation AUROC."),
        (["running"], 2, "This plot needs a finished trial; there is none."),
        (["stopped", "stopped", "failed"], 2, "0 finished, 2 stopped early, 1 failed"),
        (["finished", "finished"], 7, "it is the best of 2 trials"),
    ],
)
@pytest.mark.parametrize("objectives", [("val_auroc",), ("val_auroc", "images_per_second")])
def test_a_search_without_much_to_show(
    tmp_path: Path, states: list[str], figures: int, says: str, objectives: tuple[str, ...]
) -> None:
    page = written(Search(states, objectives), tmp_path / "out")
    assert set(CHAPTERS) <= set(page.ids)
    assert says in page.text
    # A chapter is a title and then a plot or the sentence that stands for it.
    source = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    parts = source.partition('id="plots"')[2].partition('<div class="all">')[0].split("<h3 ")[1:]
    assert len(parts) == len(CHAPTERS) + (len(objectives) > 1)
    for part in parts:
        assert ('class="plot"' in part) != ('<p class="none">' in part), part[:100]
    if len(objectives) == 1:
        assert len(page.figures) == figures
    assert any("Plotly.newPlot" in script for script in page.scripts) == bool(page.figures)


def test_settings_that_never_varied_have_no_importance(tmp_path: Path) -> None:
    space: dict[str, BaseDistribution] = {"backbone": CategoricalDistribution(["DenseNet121"])}
    page = written(Search(mixed(12), space=space), tmp_path / "out")
    assert "Every finished trial has the same settings, so none can be seen to matter." in page.text
    page = written(Search(mixed(12), space={}), tmp_path / "none")
    assert page.text.count("No finished trial has a setting that was searched.") == 3


def test_parallel_coordinates_and_slices_are_capped(tmp_path: Path) -> None:
    page = written(Search(mixed(30)), tmp_path / "out")
    parallel = next(figure for figure in page.figures if "ticktext" in figure["layout"].get("xaxis", {}))
    assert len(parallel["layout"]["xaxis"]["ticktext"]) == 1 + 8
    assert page.text.count("Only the 8 most important of 10 settings are shown.") == 2
    for figure in page.figures:
        assert sum(name.startswith("xaxis") for name in figure["layout"]) <= 4
        assert "width" not in figure["layout"]


@pytest.mark.parametrize(("direction", "first"), [("maximize", "high"), ("minimize", "low")])
def test_importances_of_an_objective_follow_its_direction(direction: str, first: str) -> None:
    study = optuna.create_study(directions=["maximize", direction])
    rng = np.random.default_rng(0)
    unit = FloatDistribution(0.0, 1.0)
    for high, low in rng.random((200, 2)):
        # What sets the highest values apart is `high`, what sets the lowest apart is `low`.
        value = 10.0 * high if high > 0.85 else low
        made = optuna.trial.create_trial(
            values=[1.0, value], params={"high": high, "low": low}, distributions={"high": unit, "low": unit}
        )
        study.add_trial(made)
    with study_module._quiet():
        objective = study_module._objectives(study, ["a", "b"])[1]
        found = optuna.importance.get_param_importances(study, target=objective.loss)
    assert next(iter(found)) == first
    assert found[first] > 0.8


def test_text_from_a_search_is_escaped(tmp_path: Path) -> None:
    plain = written(Search(mixed(12)), tmp_path / "plain")
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    space = dict(SPACE)
    space["backbone"] = CategoricalDistribution(["DenseNet121", f"ResNet50{bad}"])
    space["loss"] = CategoricalDistribution(["bce", bad])
    search = Search(mixed(12), space=space)
    search.facts |= {name: f"{search.facts[name]}{bad}" for name in ("title", "prepared", "study_name", "storage")}
    search.facts |= {"sampler": bad, "scheduler": bad, "versions": {bad: bad}}
    search.table.loc[search.table["state"] == "failed", "reason"] = bad
    page = written(search, tmp_path / "hostile")
    assert bad in page.text
    assert sorted(set(page.tags)) == sorted(set(plain.tags))
    assert page.tags.count("script") == 2 + len(page.figures) + 1  # sorting, plotting twice over, the figures
    assert all(url.startswith("data:image/png;base64,") for url in page.urls)


@pytest.mark.usefixtures("drawn")
def test_page_holds_everything_and_fetches_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    page = written(Search(mixed(12), ("val_auroc", "images_per_second")), out)
    assert page.urls
    assert all(url.startswith("data:image/png;base64,") for url in page.urls)
    source = (out / "report.html").read_text(encoding="utf-8")
    assert source.count("plotly.js v") == 1
    assert "default-src 'none'" in source
    own = re.sub(r"<script>.*?</script>", "", source, flags=re.DOTALL)
    assert not re.search(r"@import|url\(|https?://", own)
    assert "showSendToCloud: false" in source
    for name in ("history", "backbones", "curves"):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.width > 400
            assert round(picture.info["dpi"][0]) == 150
        assert (out / f"{name}.svg").read_text().startswith("<?xml")


def test_pictures_of_an_older_page_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(Search(mixed(6)), out)
    assert {path.name for path in out.iterdir()} == {
        "report.html", *(f"{name}.{kind}" for name in ("history", "backbones", "curves") for kind in ("png", "svg"))
    }  # fmt: skip
    written(Search(["failed"]), out)
    assert {path.name for path in out.iterdir()} == {"report.html"}


def test_what_users_attach_stays_out_of_the_page_and_in_the_study(tmp_path: Path) -> None:
    search = Search(mixed(12))
    written(search, tmp_path / "out")
    assert "a user's own note" not in (tmp_path / "out" / "report.html").read_text(encoding="utf-8").replace(
        "&#39;", "'"
    )
    assert all(trial.user_attrs == {"secret": "a user's own note"} for trial in search.study.trials)


def test_trials_that_only_wait_do_no_harm(tmp_path: Path) -> None:
    search = Search(mixed(8))
    search.study.enqueue_trial({"learning_rate": 1e-3})
    page = written(search, tmp_path / "out")
    assert "waiting" in {trace.get("name") for figure in page.figures for trace in figure["data"]}


def test_a_plot_that_optuna_cannot_draw_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no <b>ink</b>\nleft")

    monkeypatch.setattr(optuna.visualization, "plot_slice", broken)
    page = written(Search(mixed(12)), tmp_path / "out")
    assert "Optuna could not draw this: RuntimeError: no <b>ink</b> left" in page.text
    assert len(page.figures) == 5


def test_optunas_log_is_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    search = Search([])
    optuna.logging.set_verbosity(optuna.logging.INFO)
    optuna.logging.enable_propagation()
    try:
        written(search, tmp_path / "out")
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
        assert not caplog.records
    finally:
        optuna.logging.disable_propagation()


def test_the_same_search_gives_the_same_page(tmp_path: Path) -> None:
    for name in ("one", "two"):
        written(Search(mixed(12)[:-1]), tmp_path / name)
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()


def test_an_interrupted_search_says_so(tmp_path: Path) -> None:
    search = Search(["finished"])
    search.facts |= {"interrupted": True, "storage": None, "best_number": None}
    page = written(search, tmp_path / "out")
    assert "The search was interrupted" in page.text
    assert "Nothing was kept to look at." in page.text


def test_commands_can_be_pasted(tmp_path: Path) -> None:
    search = Search(["finished"])
    search.facts |= {"storage": "postgresql://reader@host/db; rm x", "prepared": "$(rm y)"}
    page = written(search, tmp_path / "out")
    assert "optuna-dashboard 'postgresql://reader@host/db; rm x'" in page.text
    assert "put the password back" in page.text
    assert "ray-cxr train '$(rm y)' --config" in page.text


def test_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    search = Search([])
    with pytest.raises(OutputError, match="is a file"):
        write_study(tmp_path / "out", search.study, search.table, search.facts, None)


def test_missing_values_are_none() -> None:
    search = Search(["running", "failed"])
    one, other = study_module.read_trials(search.table.iloc[::-1])
    assert (one.number, one.calibration_error, one.reason) == (0, None, None)
    assert (other.val_auroc, other.best_epoch, other.curve) == (None, None, ())
    assert "backbone" not in one.params
    assert isinstance(one.params["dense"], list)
    assert ("momentum" in one.params) == (one.params["optimizer"] == "sgd")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"), (True, "true"), (np.float64(1.23456e-5), "1.235e-05"), (3, "3"), ([512, 128], "[512, 128]"),
        ([], "[]"), ("adam", "adam"), (0.1, "0.1"),
    ],
)  # fmt: skip
def test_settings_as_shown(value: Any, shown: str) -> None:
    assert html.setting(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (4.4, "4 s"),
        (600, "10 min"),
        (3_599, "1 h 00 min"),
        (11_100, "3 h 05 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_durations_as_shown(seconds: float | None, shown: str) -> None:
    assert html.duration(seconds) == shown


def test_a_searched_field_may_be_called_like_a_column(tmp_path: Path) -> None:
    space = {**SPACE, "epochs": IntDistribution(4, 8)}
    page = written(Search(["finished"] * 3, space=space), tmp_path / "out")
    assert "warmup_epochs, epochs." in page.text
