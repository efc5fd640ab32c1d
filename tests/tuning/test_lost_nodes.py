"""`tune` on a cluster whose nodes are lost while trials train: each trial is counted once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from nodes import Nodes, cluster, wait_until
from studies import load_study, read_rows

import ray_cxr

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]
TRIALS, EPOCHS = 3, 120
#: Trials of half a minute, one per node, each with a checkpoint per epoch.
TRAIN = {"weights": "none", "size": 64, "batch_size": 1, "min_positives": 2, "epochs": EPOCHS, "cpus_per_worker": 2}
SETTINGS = {
    **{f"train.{key}": value for key, value in {**TRAIN, "max_failures": 0}.items()},
    "scheduler": "none",
    "known": "false",
    "concurrent": 2,
    "keep": "all",
    "space": '{backbone=["TinyCNN"],learning_rate={low=1e-3,high=1e-2,log=true}}',
}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with cluster(tmp_path / "logs") as made:
        made.add_node("a", cpus=2)
        made.add_node("b", cpus=2)
        yield made


def start(nodes: Nodes, prepared: Path, out: Path, **changes: object) -> Path:
    """Start a search, and wait until two trials have trained two epochs each."""
    given = [part for key, value in {**SETTINGS, **changes}.items() for part in ("--set", f"{key}={value}")]
    # Not as a job: on one machine, the node that joins would replace the job's copy of this folder.
    log = nodes.start(["tune", prepared, "--out", out, "--trials", TRIALS, *given], name="search")

    def trains() -> bool:
        return len(re.findall(r"^tune: trial \d, epoch 2 of", log.read_text(), flags=re.MULTILINE)) == 2

    wait_until(lambda: trains() or nodes.has_ended(log), 300, log.read_text)
    assert not nodes.has_ended(log), log.read_text()
    return log


def finish(nodes: Nodes, log: Path, out: Path) -> tuple[pd.DataFrame, str]:
    """Wait for the end of a search; check that all its records agree, and return its table and its output."""
    code, printed = nodes.wait_for_job(log, 500)
    print(printed)
    assert code == 0, printed
    rows = read_rows(out)
    assert rows.index.tolist() == list(range(TRIALS))
    assert [trial.number for trial in load_study(out).trials if trial.state.is_finished()] == list(range(TRIALS))
    for number, row in rows.iterrows():
        assert [epoch["epoch"] for epoch in row["curve"]] == list(range(1, row["epochs"] + 1)), number
        ends = re.findall(rf"^tune: trial {number} (?:is|failed)", printed, flags=re.MULTILINE)
        assert len(ends) == 1, printed
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["trials_over"], summary["epochs_spent"]) == (TRIALS, rows["epochs"].sum())
    best = rows.loc[rows["state"] == "finished", "val_auroc"].idxmax()
    assert summary["best_number"] == best
    assert ray_cxr.load_bundle(out / "bundle").info["provenance"]["tuned"]["trial"] == best
    return rows, printed


def test_trials_of_a_lost_node_continue_from_their_checkpoints(nodes: Nodes, prepared: Path, tmp_path: Path) -> None:
    """Later another node joins, and trials use it."""
    out = tmp_path / "study"
    log = start(nodes, prepared, out, max_failures=3)
    nodes.kill("b")
    wait_until(lambda: " is lost, " in log.read_text() or nodes.has_ended(log), 120, log.read_text)
    time.sleep(5)
    nodes.add_node("c", cpus=2)
    both = {"a", "c"}
    wait_until(lambda: nodes.find_nodes("RayTrainWorker") >= both or nodes.has_ended(log), 300, log.read_text)
    assert not nodes.has_ended(log), log.read_text()
    rows, printed = finish(nodes, log, out)
    assert rows["state"].tolist() == ["finished"] * TRIALS
    assert rows["epochs"].tolist() == [EPOCHS] * TRIALS
    assert rows["restarts"].sum() >= 1
    assert re.search(r"trial \d continues after epoch [1-9]", printed)


def test_a_trial_that_may_not_restart_fails_once_with_its_reason(nodes: Nodes, prepared: Path, tmp_path: Path) -> None:
    """The others continue on the node that is left."""
    out = tmp_path / "study"
    log = start(nodes, prepared, out, max_failures=0)
    nodes.kill("b")
    rows, _ = finish(nodes, log, out)
    failed = rows[rows["state"] == "failed"]
    assert 1 <= len(failed) <= 2
    assert failed["reason"].str.contains("lost").all(), failed["reason"].tolist()
    assert rows.loc[rows["state"] != "failed", "epochs"].tolist() == [EPOCHS] * (TRIALS - len(failed))
