"""Searches in a real PostgreSQL: several commands at a time, a restart of the server, and a killed command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import optuna
import pandas as pd
import postgres
import pytest
from nodes import wait_until
from postgres import PASSWORD, Postgres
from studies import get_refusal, read_rows
from test_search import fake_trial, plan_of, run_search

from ray_cxr.errors import RayCxrError
from ray_cxr.storage.run_folder import read_settings

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not postgres.is_installed(), reason="PostgreSQL is not installed; run scripts/services postgres as root"
    ),
]
#: Opens the same searches at the same times as other processes do, and prints what each attempt says.
OPEN = """
import sys, time
from pathlib import Path
from ray_cxr.config import TrainSettings, TuneSettings
from ray_cxr.tuning.plan import StudyPlan

prepared, out, start, *addresses = sys.argv[1:]
base = TrainSettings(backbone="TinyCNN", weights="none", size=64)
space = {"dropout": {"low": 0.0, "high": 0.5}}
for number, address in enumerate(addresses):
    settings = TuneSettings(space=space, known=False, storage=address)
    plan = StudyPlan(prepared, Path(out) / str(number), base, settings)
    time.sleep(max(0, float(start) + 4 * number - time.time()))
    try:
        plan.open_study().ask()
        print("opened", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""
#: Trials of half a minute, so that other commands start while the first one runs.
SEARCH = """
train = { weights = "none", size = 64, epochs = 120, batch_size = 1, min_positives = 2, cpus_per_worker = 1 }
[tune]
trials = 2
known = false
scheduler = "none"
concurrent = 1
ahead = 0
enqueue = [{ learning_rate = 0.003 }, { learning_rate = 0.002 }]
[tune.space]
backbone = ["TinyCNN"]
learning_rate = { low = 1e-4, high = 1e-2, log = true }
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    with postgres.run_postgres() as running:
        yield running


def test_of_commands_that_start_together_one_owns_the_search(server: Postgres, prepared: Path, tmp_path: Path) -> None:
    """Each time in an empty database, whose tables all of them make."""
    addresses = [server.create_database(f"together{number}") for number in range(4)]
    given = [str(prepared), str(time.time() + 25), *addresses]
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, given[0], str(tmp_path / name), *given[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in ("a", "b", "c")
    ]  # fmt: skip
    lines = [command.communicate()[0].splitlines() for command in commands]
    for number, (address, said) in enumerate(zip(addresses, zip(*lines, strict=True), strict=True)):
        assert sorted(line.split()[0] for line in said) == ["OutputError", "OutputError", "opened"], said
        assert all("started from another folder" in line for line in said if line != "opened")
        (study,) = optuna.get_all_study_summaries(address)
        assert study.n_trials == 1
        owner = tmp_path / "abc"[said.index("opened")] / str(number)
        assert study.user_attrs["folder"] == read_settings(owner)["id"]


def test_refusals_do_not_show_the_password(server: Postgres, prepared: Path, tmp_path: Path) -> None:
    wrong = server.url("studies", password="not-the-password")
    missing = server.url("missing")
    for storage, words in ((wrong, "check the password"), (missing, '"missing" does not exist; create it')):
        message = get_refusal(RayCxrError, plan_of(prepared, tmp_path / "study", [0.1], storage=storage).open_study)
        assert words in message
        assert PASSWORD not in message
        assert "not-the-password" not in message


def test_a_search_survives_a_restart_of_the_server(server: Postgres, prepared: Path, tmp_path: Path) -> None:
    storage, restarted = server.create_database("restart"), list[threading.Timer]()

    def act(number: int, epoch: int, has_note: object) -> None:
        if (number, epoch) in ((0, 1), (1, 2), (2, 3)):
            server.stop()
            restarted.append(threading.Timer(2, server.start))
            restarted[-1].start()

    plan = plan_of(prepared, tmp_path / "study", [0.1, 0.2, 0.3], storage=storage, scheduler="none")
    run_search(plan, fake_trial(act), "in process", finish=False)
    assert len(restarted) == 3
    restarted[-1].join()
    assert read_rows(plan.out)["state"].tolist() == ["finished"] * 3
    assert [trial.state.name for trial in plan.open_study().trials] == ["COMPLETE"] * 3


@pytest.mark.ray
def test_a_killed_search_continues_while_others_share_the_database(
    server: Postgres, prepared: Path, tmp_path: Path
) -> None:
    """The result is that of a search in the study's own file, and nothing contains the password."""
    address, rays = server.create_database("killed"), tmp_path / "rays"
    rays.mkdir()
    (tmp_path / "search.toml").write_text(SEARCH)
    # The address in a file: a command line is visible to all users of a machine.
    (tmp_path / "shared.toml").write_text(SEARCH.replace("[tune]\n", f'[tune]\nstorage = "{address}"\n'))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    outputs = []

    def start(out: str, *more: object, settings: str = "shared.toml") -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / f"log{len(outputs)}"
        outputs.append(log)
        program = ["tune", prepared, "--out", tmp_path / out, "--config", tmp_path / settings, *more]
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray_cxr.cli", *map(str, program)],
                start_new_session=True, stdout=stream, stderr=stream, env=environment,
            )  # fmt: skip
        return process, log

    def finish(process: subprocess.Popen[bytes], log: Path) -> int:
        wait_until(lambda: process.poll() is not None, 400, log.read_text)
        return int(process.wait())

    first, log = start("a")
    wait_until(lambda: "trial 0, epoch 2 of" in log.read_text() or first.poll() is not None, 300, log.read_text)
    assert first.poll() is None, log.read_text()
    # Meanwhile: the same folder, the same search from another folder, and another search.
    refused = [start("a"), start("b")]
    other = start("c", "--set", "train.epochs=2", "--set", "tune.grace_epochs=1")
    assert [finish(*command) for command in refused] == [2, 2]
    assert "is writing here; wait for it" in refused[0][1].read_text()
    assert "holds the same search" in refused[1][1].read_text()
    wait_until(lambda: "trial 0 starts" in other[1].read_text() or other[0].poll() is not None, 300, other[1].read_text)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert finish(*other) == 0, other[1].read_text()
    resumed = start("a", "--resume")
    assert finish(*resumed) == 0, resumed[1].read_text()
    (continued,) = re.findall(r"trial (\d) continues from its checkpoint", resumed[1].read_text())
    alone = start("alone", settings="search.toml")
    assert finish(*alone) == 0, alone[1].read_text()

    expected, got = read_rows(tmp_path / "alone"), read_rows(tmp_path / "a")
    same = ["state", "backbone", "param_learning_rate", "epochs", "best_epoch", "val_auroc", "calibration_error"]
    pd.testing.assert_frame_equal(got[same], expected[same])
    assert got["restarts"].tolist() == [int(str(number) == continued) for number in range(2)]
    studies = {study.study_name: study for study in optuna.get_all_study_summaries(address)}
    names = [json.loads((tmp_path / out / "summary.json").read_text())["study_name"] for out in ("a", "c")]
    assert Counter(names) == Counter(list(studies))
    for name, out in zip(names, ("a", "c"), strict=True):
        trials = optuna.load_study(study_name=name, storage=address).trials
        assert [trial.number for trial in trials] == [0, 1]
        assert [trial.value for trial in trials] == read_rows(tmp_path / out)["val_auroc"].tolist()
    written = [*outputs, *(path for out in "abc" for path in (tmp_path / out).rglob("*") if path.is_file())]
    assert not [path for path in written if PASSWORD.encode() in path.read_bytes()]
