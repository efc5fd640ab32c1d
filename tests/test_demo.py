"""The demo's steps, as far as they can be looked at without running them; the README's tests run them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from ray_cxr import demo
from ray_cxr.config import Config, build
from ray_cxr.errors import RayCxrError
from ray_cxr.tuning.space import Space


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PATIENTS", 8)


def recorded(out: Path, *, tune: bool, fails: str = "") -> list[list[str]]:
    steps: list[list[str]] = []

    def command(arguments: Sequence[str]) -> int:
        steps.append(list(arguments))
        if arguments[0] == "report":
            (out / "report").mkdir()
            (out / "report" / "metrics.json").write_text(json.dumps({"macro": {"auroc": 0.5}}))
        return int(arguments[0] == fails)

    demo.run(out, command, lambda line: None, tune=tune)
    return steps


def test_the_steps_with_and_without_a_search(few: None, tmp_path: Path) -> None:
    plain, searched = recorded(tmp_path / "a", tune=False), recorded(tmp_path / "b", tune=True)
    assert [step[0] for step in plain] == ["manifest", "prepare", "train", "score", "report"]
    assert [step[0] for step in searched] == ["manifest", "prepare", "tune", "train", "score", "report"]
    # What the search finds is what is trained.
    study = Path(searched[2][searched[2].index("--out") + 1])
    assert searched[3][searched[3].index("--config") + 1] == str(study / "best.toml")


def test_the_demos_search_is_one(few: None, tmp_path: Path) -> None:
    step = recorded(tmp_path, tune=True)[2]
    whole = build(Config, tomllib.loads(Path(step[step.index("--config") + 1]).read_text()))
    space = Space.read(whole.tune.space, whole.train, [demo.SIZE])
    assert "learning_rate" in space.fields
    for point in whole.tune.enqueue:
        space.point(point, "enqueue")


def test_a_step_that_fails_ends_the_demo(few: None, tmp_path: Path) -> None:
    with pytest.raises(RayCxrError, match="the step `tune` ended with 1"):
        recorded(tmp_path, tune=True, fails="tune")
