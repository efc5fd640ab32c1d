"""What a run tells Prometheus: true numbers at a node's port; and page and dashboard name all there is and no more."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ray_cxr import telemetry
from ray_cxr.errors import ERROR_CODES
from ray_cxr.telemetry import METRICS, Metric

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
BOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/ray_cxr.json").read_text(encoding="utf-8"))
BY_NAME = {metric.name: metric for metric in METRICS}
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
NAME = re.compile(r"\bray_cxr_\w+")
#: What Ray puts on every metric, as seen at its port.
RAYS_TAGS = {"NodeAddress", "SessionName", "WorkerId", "Component", "Version"}


# --- the list


def test_names_are_unique_and_as_prometheus_wants_them() -> None:
    assert len(BY_NAME) == len(METRICS) >= 16
    for metric in METRICS:
        assert re.fullmatch(r"ray_cxr_[a-z]+(_[a-z]+)*", metric.name)
        # Ray adds `_total` to a counter that lacks it, and must find nothing to add.
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert ("_seconds" in metric.name) == (metric.unit == "seconds")


def test_tags_are_few_and_of_nobody() -> None:
    assert {tag for metric in METRICS for tag in metric.tags} == {"command", "code", "run"}


def test_page_has_every_metric_as_it_is() -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `ray_")
    ]
    listed = {name.strip("`"): tuple(rest) for name, *rest in rows}
    assert len(rows) == len(listed)
    assert listed.keys() == BY_NAME.keys()
    for name, (kind, unit, tags, meaning, where) in listed.items():
        metric = BY_NAME[name]
        assert (kind, unit, meaning) == (metric.kind, metric.unit, metric.meaning)
        assert tuple(filter(None, tags.split(", "))) == metric.tags
        assert where
    assert set(NAME.findall(PAGE)) == BY_NAME.keys()


def test_panels_that_the_page_sends_to_are_rays_own() -> None:
    import ray.dashboard.modules.metrics.dashboards as dashboards

    code = "".join(file.read_text(encoding="utf-8") for file in Path(dashboards.__path__[0]).glob("*_panels.py"))
    titles = set(re.findall(r'title="([^"]+)"', code))
    named = set(re.findall(r"\*\*([^*]+)\*\*", PAGE))
    assert len(named) > 20
    assert named <= titles


# --- the dashboard


def test_dashboard_is_whole() -> None:
    assert BOARD["title"]
    assert BOARD["uid"]
    identifiers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    titles = [panel["title"] for panel in PANELS]
    assert all(titles)
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        where = panel["gridPos"]
        assert where["x"] + where["w"] <= 24
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])


def test_panels_do_not_overlap() -> None:
    taken: Counter[tuple[int, int]] = Counter()
    for panel in BOARD["panels"]:
        x, y, w, h = (panel["gridPos"][key] for key in "xywh")
        taken.update((i, j) for i in range(x, x + w) for j in range(y, y + h))
    assert max(taken.values()) == 1


def test_dashboard_shows_every_metric_and_no_other() -> None:
    expressions = [target["expr"] for panel in PANELS for target in panel["targets"]]
    assert {name for one in expressions for name in NAME.findall(one)} == BY_NAME.keys()
    queries = [one["definition"] for one in BOARD["templating"]["list"] if one["type"] == "query"]
    assert {name for one in queries for name in NAME.findall(one)} <= BY_NAME.keys()


def test_expressions_ask_what_a_metric_can_tell() -> None:
    """A gauge has no rate; tags and variables are those that there are; every series is summed over processes."""
    variables = {one["name"] for one in BOARD["templating"]["list"]} | {"__rate_interval"}
    for panel in PANELS:
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")
            assert set(re.findall(r"\$(\w+)", expression)) <= variables
            selected = re.findall(r"(rate\()?(ray_cxr_\w+)\{([^}]*)\}", expression)
            assert [name for _, name, _ in selected] == NAME.findall(expression)
            assert len(re.findall(r"\b(?:sum|max)(?: by \([\w, ]+\))? ?\(", expression)) == len(selected)
            for rate, name, labels in selected:
                assert not rate or BY_NAME[name].kind == "counter"
                known = RAYS_TAGS | set(BY_NAME[name].tags)
                assert set(re.findall(r"(\w+)=", labels)) <= known
                by = {tag for one in re.findall(r"by \(([^)]*)\)", expression) for tag in one.split(", ")}
                assert by <= known
                assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= by


# --- recording


class Instrument:
    """In place of Ray's: keeps what it was given."""

    def __init__(self, given: list[tuple[Metric, float, dict[str, str]]], metric: Metric) -> None:
        self._given, self._metric = given, metric

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # as Ray demands
        self._given.append((self._metric, value, tags))

    set = inc


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Metric, float, dict[str, str]]]:
    """What reaches Ray, in place of it."""
    found: list[tuple[Metric, float, dict[str, str]]] = []
    telemetry.flush()
    monkeypatch.setattr(telemetry, "_ray_runs", lambda: True)
    monkeypatch.setattr(telemetry, "_instrument", lambda metric: Instrument(found, metric))
    return found


def totals(given: list[tuple[Metric, float, dict[str, str]]]) -> dict[tuple[str, ...], float]:
    sums: dict[tuple[str, ...], float] = defaultdict(float)
    for metric, value, tags in given:
        assert tuple(tags) == metric.tags
        sums[metric.name, *tags.values()] += value
    return dict(sums)


def test_nothing_is_lost_between_threads(given: list[tuple[Metric, float, dict[str, str]]]) -> None:
    def work(command: str) -> None:
        for _ in range(2000):
            telemetry.decoded(command, 0.25)

    threads = [threading.Thread(target=work, args=(command,)) for command in ("score", "score", "heatmaps", "prepare")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    telemetry.flush()
    decoded = {"score": 4000, "heatmaps": 2000, "prepare": 2000}
    assert totals(given) == {
        **{(telemetry.IMAGES_DECODED.name, command): n for command, n in decoded.items()},
        **{(telemetry.DECODE_SECONDS.name, command): n / 4 for command, n in decoded.items()},
    }
    # Gathered: Ray is given sums and not single pictures.
    assert len(given) < 100


def test_a_written_file_is_told_at_once(given: list[tuple[Metric, float, dict[str, str]]]) -> None:
    telemetry.wrote(telemetry.IMAGES_SCORED, "score", 5, ["missing", "blank", "missing"])
    assert totals(given) == {
        (telemetry.IMAGES_SCORED.name,): 5,
        (telemetry.IMAGE_ERRORS.name, "score", "missing"): 2,
        (telemetry.IMAGE_ERRORS.name, "score", "blank"): 1,
    }


def test_what_is_undefined_is_not_told(given: list[tuple[Metric, float, dict[str, str]]]) -> None:
    telemetry.show(telemetry.VAL_AUROC, None, "run")
    telemetry.count(telemetry.TRAIN_WAIT_SECONDS, 0.0, "run")
    telemetry.flush()
    assert given == []


def test_without_ray_nothing_is_made_and_nothing_kept(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(telemetry, "_ray_runs", lambda: False)
    monkeypatch.setattr(telemetry, "_instrument", lambda metric: pytest.fail(f"{metric.name} was made"))
    telemetry.wrote(telemetry.IMAGES_SCORED, "score", 5, ["missing"])
    telemetry.show(telemetry.VAL_AUROC, 0.8, "run")
    telemetry.flush()
    assert not telemetry._gathered
    assert capfd.readouterr() == ("", "")


def test_decode_seconds_are_those_of_the_file(phantoms: Any, tmp_path: Path) -> None:
    """At most the time that passed, and without the start of the child process."""
    from ray_cxr.config import InputSpec
    from ray_cxr.data.sandbox import Decoder

    first, second = sorted(phantoms.images.rglob("*.png"))[:2]
    with Decoder([InputSpec(size=64)]) as decoder:
        for source in (str(first), str(second), str(tmp_path / "none.png")):
            begun = time.monotonic()
            decoder.load(source)
            assert 0 < decoder.seconds < time.monotonic() - begun
        decoder.load(None)
        assert decoder.seconds == 0


def test_prepare_tells_every_row(
    manifest: Path, given: list[tuple[Metric, float, dict[str, str]]], tmp_path: Path
) -> None:
    """A task as Ray runs it, in this process."""
    from ray_cxr.config import PrepareSettings
    from ray_cxr.data import archives, prepared

    settings, out = PrepareSettings(sizes=(32, 64), rows_per_shard=1000), tmp_path / "set"
    table, wanted = prepared.check(manifest, out, settings)
    (unit,) = archives.units(table["path"], settings.rows_per_shard)
    prepared.begin(out, wanted)
    prepared.freeze(table, out / "manifest.parquet", [unit])
    for size in settings.sizes:
        (out / str(size)).mkdir()
    task = prepared._task(unit, [set[str]() for _ in settings.sizes])
    assert task is not None
    prepared._prepare(task, str(out), settings)
    prepared._decoder.cache_clear()
    counts = prepared._count(out, 64, unit.ranges)
    told = totals(given)
    assert told.pop((telemetry.DECODE_SECONDS.name, "prepare")) > 0
    assert told == {
        (telemetry.IMAGES_PREPARED.name,): len(table),
        (telemetry.IMAGES_DECODED.name, "prepare"): len(table) - table["path"].null_count,
        **{(telemetry.IMAGE_ERRORS.name, "prepare", code): n for code, n in counts.items() if code != "ok"},
    }
    assert counts.total() > counts["ok"]


def test_training_tells_every_step_and_epoch(given: list[tuple[Metric, float, dict[str, str]]], tmp_path: Path) -> None:
    """Twenty images in batches of eight are three steps, the last of four images; their seconds are the clock's."""
    from types import SimpleNamespace

    from ray_cxr.config import TrainSettings
    from ray_cxr.training import worker

    out = tmp_path / "patients" / "run7"
    out.mkdir(parents=True)
    loop: Any = SimpleNamespace(settings=TrainSettings(batch_size=8), train=range(20), random_layers=[])
    progress: Any = SimpleNamespace(epochs_done=0, losses=[], curves=[])  # as in a run that begins, without TensorFlow
    watch = worker._Watch(out, loop, {}, "float32", progress)
    begun = time.monotonic()
    watch.began()
    for step in (1, 2, 3):
        time.sleep(0.01)
        watch.step(0, step, 0.5)
    passed = time.monotonic() - begun
    watch.tell({"epoch": 1, "loss": 0.5, "val_loss": 0.6, "val_auroc": None, "wait_seconds": 0.25})
    told = totals(given)
    seconds = told.pop((telemetry.TRAIN_STEP_SECONDS.name, "run7"))
    assert 0.03 <= seconds <= passed
    assert told == {
        (telemetry.IMAGES_TRAINED.name, "run7"): 20,
        (telemetry.TRAIN_STEPS.name, "run7"): 3,
        (telemetry.TRAIN_WAIT_SECONDS.name, "run7"): 0.25,
        (telemetry.TRAIN_EPOCH.name, "run7"): 1,
        (telemetry.TRAIN_LOSS.name, "run7"): 0.5,
        (telemetry.VAL_LOSS.name, "run7"): 0.6,
    }


# --- at the port


def at_the_port() -> dict[str, list[tuple[dict[str, str], float]]]:
    """Samples of our metrics by name, from the port of the one node there is."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
    for name, tags, value in re.findall(r"^(ray_cxr_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        found[name].append((dict(re.findall(r'(\w+)="([^"]*)"', tags)), float(value)))
    return found


@pytest.mark.ray
@pytest.mark.long
def test_port_shows_what_score_has_done(
    ray_here: None, tiny_bundle: Any, manifest: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "scores"
    # Actors of tests before this one; one process is one actor's, and is gone with it.
    before = {tags["WorkerId"] for tags, _ in at_the_port()[telemetry.IMAGES_SCORED.name]}
    code, _, said = command(
        *("score", "--model", tiny_bundle.path, "--manifest", manifest, "--out", out),
        *("--set", "rows_per_file=16", "--set", "batch_size=4"),
    )
    assert code == 0
    assert "metric" not in said.lower()
    files = [pd.read_parquet(part) for part in sorted((out / "scores").glob("*.parquet"))]
    rows = pd.concat(files)
    errors = Counter(rows["error_code"].dropna())
    assert errors
    assert set(errors) <= set(ERROR_CODES)

    def mine(name: str, **wanted: str) -> float:
        return sum(
            value
            for tags, value in found[name]
            if tags["WorkerId"] in workers and all(tags[tag] == text for tag, text in wanted.items())
        )

    deadline = time.monotonic() + 120  # Ray exports every 10 s, and as an actor ends
    while True:
        found = at_the_port()
        workers = {tags["WorkerId"] for tags, _ in found[telemetry.IMAGES_SCORED.name]} - before
        if mine(telemetry.IMAGES_SCORED.name) >= len(rows) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert mine(telemetry.IMAGES_SCORED.name) == len(rows)
    by_code = {name: mine(telemetry.IMAGE_ERRORS.name, command="score", code=name) for name in ERROR_CODES}
    assert {name: n for name, n in by_code.items() if n} == errors
    assert mine(telemetry.IMAGES_DECODED.name, command="score") >= rows["path"].notna().sum()
    assert mine(telemetry.DECODE_SECONDS.name, command="score") > 0
    batches = sum(-(-int((table["status"] == "ok").sum()) // 4) for table in files)
    assert mine(telemetry.BATCHES_INFERRED.name, command="score") == batches
    assert mine(telemetry.INFER_SECONDS.name, command="score") > 0
    # As listed, and with no tag of anybody's.
    for name, samples in found.items():
        for tags, _ in samples:
            known = RAYS_TAGS | set(BY_NAME[name].tags) | {tag for tag in tags if tag.startswith("otel_")}
            assert set(tags) <= known
    identifiers = {*rows["image_id"], *rows["patient_id"].dropna()}
    assert not identifiers & {text for samples in found.values() for tags, _ in samples for text in tags.values()}
