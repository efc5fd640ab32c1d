"""The demo's steps without running them; the README's tests run them."""

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


@pytest.fixture(autouse=True)
def few_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PATIENTS", 4)


def record_steps(out: Path, *, tune: bool, failing: str = "") -> list[list[str]]:
    steps: list[list[str]] = []

    def command(arguments: Sequence[str]) -> int:
        steps.append(list(arguments))
        if arguments[0] == "report":
            (out / "report").mkdir()
            (out / "report" / "metrics.json").write_text(json.dumps({"macro": {"auroc": 0.5}}), encoding="utf-8")
        return int(arguments[0] == failing)

    demo.run_demo(out, command, lambda line: None, tune=tune)
    return steps


def test_demo_runs_each_command_in_order_until_one_fails(tmp_path: Path) -> None:
    steps = record_steps(tmp_path, tune=False)
    assert [step[0] for step in steps] == ["manifest", "prepare", "train", "score", "report"]
    with pytest.raises(RayCxrError, match="`tune`"):
        record_steps(tmp_path / "failing", tune=True, failing="tune")


def test_demo_trains_with_the_settings_that_its_search_found(tmp_path: Path) -> None:
    steps = record_steps(tmp_path, tune=True)
    assert [step[0] for step in steps] == ["manifest", "prepare", "tune", "train", "score", "report"]
    _, _, tune, train, *_ = ({name: step[step.index(name) + 1] for name in step if name[:2] == "--"} for step in steps)
    assert train["--config"] == str(Path(tune["--out"]) / "best.toml")
    search = build(Config, tomllib.loads(Path(tune["--config"]).read_text(encoding="utf-8")))
    space = Space.read(search.tune.space, search.train, [demo.SIZE])
    assert "learning_rate" in space.fields
    for point in search.tune.enqueue:
        space.point(point, "enqueue")
