"""Metrics: their values at a node's port, and the page and the dashboard that show all of them and no others."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from conftest import score_arguments

from ray_cxr import telemetry
from ray_cxr.telemetry import METRICS, Metric

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
BOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/ray_cxr.json").read_text(encoding="utf-8"))
BY_NAME = {metric.name: metric for metric in METRICS}
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
NAME = re.compile(r"\bray_cxr_\w+")
#: Tags that Ray puts on every metric.
RAYS_TAGS = {"NodeAddress", "SessionName", "WorkerId", "Component", "Version"}
#: What reaches Ray: a metric, a value and tags.
Given = list[tuple[Metric, float, dict[str, str]]]


# --- names, page and dashboard


def test_names_follow_prometheus_and_tags_identify_nobody() -> None:
    for metric in METRICS:
        assert re.fullmatch(r"ray_cxr_[a-z]+(_[a-z]+)*", metric.name)
        # Ray adds `_total` to a counter that lacks it, and must find nothing to add.
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert ("_seconds" in metric.name) == (metric.unit == "seconds")
    assert len(BY_NAME) == len(METRICS)
    assert {tag for metric in METRICS for tag in metric.tags} == {"command", "code", "run"}


def test_page_and_dashboard_have_every_metric_and_no_other() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `ray_")]
    assert sorted([cell.strip(" `") for cell in row[:4]] for row in rows) == sorted(
        [metric.name, metric.kind, metric.unit, ", ".join(metric.tags)] for metric in METRICS
    )
    assert set(NAME.findall(PAGE)) == BY_NAME.keys()
    expressions = [target["expr"] for panel in PANELS for target in panel["targets"]]
    assert set(NAME.findall(" ".join(expressions))) == BY_NAME.keys()
    queries = [variable["definition"] for variable in BOARD["templating"]["list"] if variable["type"] == "query"]
    assert set(NAME.findall(" ".join(queries))) <= BY_NAME.keys()


def test_dashboard_expressions_fit_their_metrics() -> None:
    """Only counters have a rate; tags and variables exist; every series is summed over processes."""
    variables = {variable["name"] for variable in BOARD["templating"]["list"]} | {"__rate_interval"}
    for target in (target for panel in PANELS for target in panel["targets"]):
        expression = target["expr"]
        assert set(re.findall(r"\$(\w+)", expression)) <= variables
        selected = re.findall(r"(rate\()?(ray_cxr_\w+)\{([^}]*)\}", expression)
        assert [name for _, name, _ in selected] == NAME.findall(expression)
        assert len(re.findall(r"\b(?:sum|max)(?: by \([\w, ]+\))? ?\(", expression)) == len(selected)
        by = {tag for tags in re.findall(r"by \(([^)]*)\)", expression) for tag in tags.split(", ")}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= by
        for rate, name, labels in selected:
            assert not rate or BY_NAME[name].kind == "counter"
            assert by | set(re.findall(r"(\w+)=", labels)) <= RAYS_TAGS | set(BY_NAME[name].tags)


# --- recording


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Given:
    found: Given = []

    def instrument(metric: Metric) -> SimpleNamespace:
        def record(value: float, tags: dict[str, str]) -> None:
            assert value > 0  # as Ray demands
            found.append((metric, value, tags))

        return SimpleNamespace(inc=record, set=record)

    telemetry.flush()
    monkeypatch.setattr(telemetry, "_is_ray_running", lambda: True)
    monkeypatch.setattr(telemetry, "_instrument", instrument)
    return found


def totals(given: Given) -> dict[tuple[str, ...], float]:
    sums: dict[tuple[str, ...], float] = defaultdict(float)
    for metric, value, tags in given:
        assert tuple(tags) == metric.tags
        sums[metric.name, *tags.values()] += value
    return dict(sums)


def count_errors(command: str, codes: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    return {(telemetry.IMAGE_ERRORS.name, command, code): n for code, n in codes.items() if code != "ok"}


def test_counts_of_all_threads_arrive(given: Given) -> None:
    def work(command: str) -> None:
        for _ in range(2000):
            telemetry.add_decode(command, 0.25)

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, ("score", "score", "heatmaps", "prepare")))
    telemetry.flush()
    sums = totals(given)
    for command, n in {"score": 4000, "heatmaps": 2000, "prepare": 2000}.items():
        assert sums.pop((telemetry.IMAGES_DECODED.name, command)) == n
        assert sums.pop((telemetry.DECODE_SECONDS.name, command)) == n / 4
    assert not sums
    assert len(given) < 100, "Ray is given sums, not single images"


def test_files_are_counted_at_once_and_undefined_values_never(given: Given) -> None:
    telemetry.add_written(telemetry.IMAGES_SCORED, "score", 5, ["missing", "blank", "missing"])
    expected = {(telemetry.IMAGES_SCORED.name,): 5, **count_errors("score", {"missing": 2, "blank": 1})}
    assert totals(given) == expected
    telemetry.set_gauge(telemetry.VAL_AUROC, None, "run")
    telemetry.add(telemetry.TRAIN_WAIT_SECONDS, 0.0, "run")
    telemetry.flush()
    assert totals(given) == expected


def test_nothing_is_recorded_without_ray(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(telemetry, "_is_ray_running", lambda: False)
    monkeypatch.setattr(telemetry, "_instrument", lambda metric: pytest.fail(f"{metric.name} was made"))
    telemetry.add_written(telemetry.IMAGES_SCORED, "score", 5, ["missing"])
    telemetry.set_gauge(telemetry.VAL_AUROC, 0.8, "run")
    telemetry.flush()
    assert not telemetry._counts
    assert capfd.readouterr() == ("", "")


def test_decode_seconds_leave_out_the_start_of_the_child(phantoms: Any, tmp_path: Path) -> None:
    from ray_cxr.config import InputSpec
    from ray_cxr.imaging.sandbox import Decoder

    image = next(phantoms.images.rglob("*.png"))
    with Decoder([InputSpec(size=64)]) as decoder:
        for source in (str(image), str(tmp_path / "none.png")):
            started = time.monotonic()
            decoder.load(source)
            assert 0 < decoder.seconds < time.monotonic() - started
        decoder.load(None)
        assert decoder.seconds == 0


def test_prepare_counts_every_row(without_ray: None, manifest: Path, given: Given, tmp_path: Path) -> None:
    from ray_cxr.config import PrepareSettings
    from ray_cxr.data import prepared

    settings = PrepareSettings(sizes=(32, 64), rows_per_shard=1000)
    counts = prepared.prepare(manifest, tmp_path / "set", settings)[64].codes
    prepared._get_decoder.cache_clear()
    sums = totals(given)
    assert sums.pop((telemetry.DECODE_SECONDS.name, "prepare")) > 0
    assert sums == {
        (telemetry.IMAGES_PREPARED.name,): counts.total(),
        (telemetry.IMAGES_DECODED.name, "prepare"): pd.read_parquet(manifest)["path"].notna().sum(),
        **count_errors("prepare", counts),
    }
    assert counts.total() == len(pd.read_parquet(manifest)) > counts["ok"]


@pytest.mark.slow
def test_score_counts_every_row(
    without_ray: None, tiny_bundle: Any, manifest: Path, given: Given, tmp_path: Path, command: Any
) -> None:
    code, _, err = command(*score_arguments(tiny_bundle.path, manifest, tmp_path / "out"))
    assert code == 0, err
    rows = pd.concat([pd.read_parquet(part) for part in sorted((tmp_path / "out" / "scores").glob("*.parquet"))])
    sums = totals(given)
    for metric in (telemetry.DECODE_SECONDS, telemetry.INFER_SECONDS, telemetry.BATCHES_INFERRED):
        assert sums.pop((metric.name, "score")) > 0
    assert sums == {
        (telemetry.IMAGES_SCORED.name,): len(rows),
        (telemetry.IMAGES_DECODED.name, "score"): rows["path"].notna().sum(),
        **count_errors("score", rows["error_code"].value_counts()),
    }


def test_training_counts_every_step_and_epoch(given: Given, tmp_path: Path) -> None:
    """Twenty images in batches of eight are three steps, the last of four images; their seconds are measured."""
    from ray_cxr.config import TrainSettings
    from ray_cxr.training import worker

    out = tmp_path / "patients" / "run7"
    out.mkdir(parents=True)
    loop: Any = SimpleNamespace(settings=TrainSettings(batch_size=8), train=range(20), random_layers=[])
    loop.replicas = SimpleNamespace(count=2)
    state: Any = SimpleNamespace(epochs_done=0, losses=[], curves=[], policy="float32")
    recorder = worker.RunRecorder(out, loop, {}, state)
    started = time.monotonic()
    recorder.start_epoch()
    for step in (1, 2, 3):
        time.sleep(0.01)
        recorder.record_step(0, step, 0.5)
    passed = time.monotonic() - started
    recorder.send_metrics({"epoch": 1, "loss": 0.5, "val_loss": 0.6, "val_auroc": None, "wait_seconds": 0.25})
    sums = totals(given)
    seconds = sums.pop((telemetry.TRAIN_STEP_SECONDS.name, "run7"))
    assert 0.03 <= seconds <= passed
    expected = {
        telemetry.IMAGES_TRAINED: 20,
        telemetry.TRAIN_STEPS: 3,
        telemetry.TRAIN_WAIT_SECONDS: 0.25,
        telemetry.TRAIN_EPOCH: 1,
        telemetry.TRAIN_LOSS: 0.5,
        telemetry.VAL_LOSS: 0.6,
    }
    assert sums == {(metric.name, "run7"): value for metric, value in expected.items()}


# --- at the port


def at_the_port() -> list[tuple[str, dict[str, str], float]]:
    """Samples of our metrics (name, tags, value) from the port of the only node."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=60) as answer:
        text = answer.read().decode()
    samples = re.findall(r"^(ray_cxr_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    return [(name, dict(re.findall(r'(\w+)="([^"]*)"', tags)), float(value)) for name, tags, value in samples]


@pytest.mark.ray
@pytest.mark.long
def test_port_shows_the_counts_of_score(
    shared_ray: None, tiny_bundle: Any, manifest: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "scores"
    earlier = {tags["WorkerId"] for _, tags, _ in at_the_port()}
    code, _, err = command(*score_arguments(tiny_bundle.path, manifest, out, "--set", "batch_size=4"))
    assert code == 0
    assert "metric" not in err.lower()
    files = [pd.read_parquet(part) for part in sorted((out / "scores").glob("*.parquet"))]
    rows = pd.concat(files)
    errors = Counter(rows["error_code"].dropna())
    assert errors
    sums: dict[tuple[str, str], float] = defaultdict(float)
    deadline = time.monotonic() + 120  # Ray exports every 10 s, and as an actor ends
    while sums[telemetry.IMAGES_SCORED.name, ""] < len(rows) and time.monotonic() < deadline:
        time.sleep(0.5)
        sums.clear()
        samples = [sample for sample in at_the_port() if sample[1]["WorkerId"] not in earlier]
        for name, tags, value in samples:
            assert tags.get("command", "score") == "score"
            sums[name, tags.get("code", "")] += value
    assert sums[telemetry.IMAGES_SCORED.name, ""] == len(rows)
    assert {code: n for (name, code), n in sums.items() if name == telemetry.IMAGE_ERRORS.name} == errors
    assert sums[telemetry.IMAGES_DECODED.name, ""] >= rows["path"].notna().sum()
    assert sums[telemetry.DECODE_SECONDS.name, ""] > 0
    assert sums[telemetry.BATCHES_INFERRED.name, ""] == sum(-(-(table["status"] == "ok").sum() // 4) for table in files)
    assert sums[telemetry.INFER_SECONDS.name, ""] > 0
    identifiers = {*rows["image_id"], *rows["patient_id"].dropna()}
    for name, tags, _ in samples:
        known = RAYS_TAGS | set(BY_NAME[name].tags)
        assert all(tag in known or tag.startswith("otel_") for tag in tags)
        assert not identifiers & set(tags.values())
