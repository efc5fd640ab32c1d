"""The files in jobs/: `train` and `tune` accept their settings, each of which has an effect; their commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_readme import parse

from ray_cxr import config
from ray_cxr.training.planning import plan_training
from ray_cxr.tuning.plan import StudyPlan

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "jobs").glob("*.toml"))
#: Prepared for the tests.
SIZE = 64


def list_commands(path: Path) -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^# +(ray(?:-cxr)? .*)", path.read_text("utf-8"), re.MULTILINE)]


def test_all_files_are_found() -> None:
    assert {"cluster.toml", "laptop.toml", "nih.toml", "nih-tune.toml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_settings_are_accepted(path: Path, prepared: Path, tmp_path: Path) -> None:
    loaded = config.load(path)
    train = loaded.train.replace(size=SIZE)
    assert train.list_unused() == []
    assert plan_training(prepared, tmp_path / "run", train).settings.backbone == loaded.train.backbone
    if loaded.tune != config.TuneSettings():
        plan = StudyPlan(prepared, tmp_path / "study", train, loaded.tune)
        study = plan.open_study()
        for _ in range(8):
            trial = study.ask()
            plan.space.suggest(trial)
            assert plan.build_settings(trial).list_unused() == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_are_valid_and_use_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = list_commands(path)
    for words in commands:
        parse(words)
    assert any(f"jobs/{path.name}" in words for words in commands)
