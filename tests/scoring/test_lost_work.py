"""What becomes of work that is lost with a worker, and of a fault in the code of one. Ray Data is a stand-in."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.exceptions import ActorDiedError

from ray_cxr.config import ScoreSettings
from ray_cxr.errors import ConfigError, OutputError, RayCxrError
from ray_cxr.scoring import engine, pipeline


class Dataset:
    """Gives a row per task; tasks of a lost actor are left out, as `max_errored_blocks` has it, or end it all."""

    def __init__(self, tasks: list[dict[str, Any]], lost: set[int], *, ends: bool = False) -> None:
        self.tasks, self.lost, self.ends = tasks, lost, ends

    def iter_rows(self) -> Any:
        for task in self.tasks:
            done = [index for index in task["indices"] if index not in self.lost]
            if done:
                yield {"failed": "", "message": "", "done": done}
        if self.ends:
            raise ActorDiedError()


def tasks(*groups: list[int], retry: bool = False) -> list[dict[str, Any]]:
    return [
        {"indices": group, "starts": [10 * i for i in group], "counts": [10] * len(group), "retry": retry}
        for group in groups
    ]


@pytest.mark.parametrize("ends", [False, True])
def test_what_is_lost_is_laid_out_again_and_nothing_else(ends: bool, caplog: pytest.LogCaptureFixture) -> None:
    laid: list[list[dict[str, Any]]] = []

    def lay_out(given: list[dict[str, Any]]) -> Dataset:
        laid.append(given)
        return Dataset(given, {2, 3, 5} if len(laid) == 1 else set(), ends=ends and len(laid) == 1)

    with caplog.at_level(logging.WARNING):
        # 5 has its file though no row said so: its worker died between the two.
        rows = list(pipeline._in_rounds(tasks([0, 1], [2, 3], [4, 5]), lay_out, lambda task, index: index == 5))
    assert [index for row in rows for index in row["done"]] == [0, 1, 4, 2, 3]
    assert laid[1] == tasks([2, 3])
    assert "2 files that they had in work are done again" in caplog.text


def test_a_part_of_a_task_takes_its_own_rows_with_it() -> None:
    (left,) = tasks([4, 5, 6])
    assert pipeline._without(left, {5}, lambda task, index: False) == {
        "indices": [4, 6], "starts": [40, 60], "counts": [10, 10], "retry": False,
    }  # fmt: skip
    assert pipeline._without(left, {4, 5, 6}, lambda task, index: False) is None


def test_workers_that_die_and_die_again_end_it_with_a_line() -> None:
    rounds = 0

    def lay_out(given: list[dict[str, Any]]) -> Dataset:
        nonlocal rounds
        rounds += 1
        return Dataset(given, {1}, ends=True)

    with pytest.raises(RayCxrError, match=r"died again and again, with 1 files to write.*the same command continues"):
        list(pipeline._in_rounds(tasks([0], [1]), lay_out, lambda task, index: False))
    assert rounds == 1 + pipeline.MAX_IDLE_ROUNDS


def test_an_error_of_ours_in_a_row_is_raised_as_it_is_and_at_once() -> None:
    class Refusing(Dataset):
        def iter_rows(self) -> Any:
            yield {**engine.failure(ConfigError("no GPU there")), "done": []}

    rounds = []
    with pytest.raises(ConfigError, match="no GPU there"):
        list(
            pipeline._in_rounds(tasks([0]), lambda given: rounds.append(1) or Refusing(given, set()), lambda *_: False)
        )
    assert len(rounds) == 1


def test_a_fault_in_the_code_is_told_by_its_place_and_not_by_its_words(caplog: pytest.LogCaptureFixture) -> None:
    """A foreign error's words can hold a patient's id; swallowed it would look like a lost worker."""

    class Broken(engine.ScoreActor):
        def __init__(self) -> None:
            self._failed = None
            self._job = None  # type: ignore[assignment]

    row = Broken()({"indices": [0]})
    assert row["failed"] == "RayCxrError"
    assert "scoring failed with AttributeError in " in row["message"]

    def fail() -> None:
        raise ValueError("patient " + "Mei" + "er")

    with caplog.at_level(logging.ERROR):
        try:
            fail()
        except ValueError as error:
            said = str(engine.told(error))
    assert "ValueError in test_lost_work.py, line" in said
    assert "Meier" not in said + caplog.text
    mine = ConfigError("in our own words")
    assert engine.told(mine) is mine


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_that_is_refused_is_left_as_it_was(
    fresh: bool, tiny_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is an earlier run removed, nor does one begin that the corrected command would not agree with."""
    out = tmp_path / "scores"
    pq.write_table(pa.table({"image_id": ["1.png"], "path": [str(tmp_path / "1.png")]}), tmp_path / "m.parquet")
    if fresh:
        (out / "scores").mkdir(parents=True)
        (out / "settings.json").write_text('{"kind": "score"}')
        (out / "scores" / "part-00000.parquet").write_text("earlier")
    before = sorted(out.rglob("*"))

    def refuse(*_: Any, **__: Any) -> None:
        raise OutputError("a node does not see it")

    monkeypatch.setattr(pipeline, "_plan", lambda *_, **__: pipeline.ActorPlan(1, 1, False))
    monkeypatch.setattr(pipeline.cluster, "require_shared", refuse)
    with pytest.raises(OutputError, match="a node does not see it"):
        pipeline.score(tiny_bundle.path, out, ScoreSettings(), manifest=str(tmp_path / "m.parquet"), fresh=fresh)
    assert sorted(out.rglob("*")) == before
