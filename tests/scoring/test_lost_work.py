"""Retry of ranges that were lost with a worker, and errors in workers. A stand-in replaces Ray Data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from ray_cxr import tasks as ray_tasks
from ray_cxr.data.ranges import Range
from ray_cxr.errors import ConfigError, RayCxrError
from ray_cxr.scoring.actors import ScoreActor
from ray_cxr.scoring.pool import run_tasks
from ray_cxr.scoring.ranges import ScoreTask, TaskResult

Row = dict[str, Any]


class Dataset:
    """Yields a row per task. Ranges of a lost actor are left out, or end the iteration."""

    def __init__(self, rows: list[Row], lost: Any = (), *, dies: bool = False, failed: Any = None) -> None:
        self._rows, self._lost, self._dies, self._failed = rows, lost, dies, failed

    def iter_rows(self) -> Iterator[Row]:
        if self._failed is not None:
            yield TaskResult(error=self._failed).to_row()
        for row in self._rows:
            if done := [index for index in row["indices"] if index not in self._lost]:
                yield TaskResult(done).to_row()
        if self._dies:
            raise ActorDiedError()


def make_tasks(*groups: list[int]) -> list[ScoreTask]:
    return [ScoreTask(tuple(Range(i, 10 * i, 10) for i in group), retry=False) for group in groups]


@pytest.mark.parametrize("dies", [False, True])
def test_only_lost_ranges_are_scheduled_again(dies: bool, caplog) -> None:
    rounds: list[list[Row]] = []

    def build_dataset(rows: list[Row]) -> Dataset:
        rounds.append(rows)
        return Dataset(rows, {2, 3, 5}, dies=dies) if len(rounds) == 1 else Dataset(rows)

    with caplog.at_level(logging.WARNING):
        # 5 has its file although no result reported it: its worker died between the two.
        tasks = make_tasks([0, 1], [2, 3], [4, 5])
        results = list(run_tasks(tasks, build_dataset, lambda index: index == 5))
    assert [index for result in results for index in result.done] == [0, 1, 4, 2, 3]
    assert [ScoreTask.from_row(row) for row in rounds[1]] == make_tasks([2, 3])
    assert len(rounds) == 2
    assert "2 files" in caplog.text


@pytest.mark.parametrize(
    ("behaviour", "error", "message", "expected_rounds"),
    [
        ({"lost": {1}, "dies": True}, RayCxrError, "1 output files", 1 + ray_tasks.MAX_IDLE_ROUNDS),
        ({"failed": ConfigError("no GPU there")}, ConfigError, "^no GPU there$", 1),
    ],
)
def test_run_ends_with_an_error(behaviour: Any, error: type[Exception], message: str, expected_rounds: int) -> None:
    rounds = []

    def build_dataset(rows: list[Row]) -> Dataset:
        rounds.append(rows)
        return Dataset(rows, **behaviour)

    with pytest.raises(error, match=message):
        list(run_tasks(make_tasks([0], [1]), build_dataset, lambda index: False))
    assert len(rounds) == expected_rounds


def test_foreign_error_is_reported_by_its_place_and_not_by_its_words(caplog) -> None:
    """The words of a foreign error can hold a patient's id; without a report it would look like a lost worker."""
    broken = ScoreActor(None, 1)  # type: ignore[arg-type]
    record = json.loads(broken({})["error"])
    assert record["type"] == "RayCxrError"
    assert "AttributeError in " in record["message"]

    with caplog.at_level(logging.ERROR):
        try:
            raise ValueError("patient " + "Mei" + "er")
        except ValueError as error:
            message = str(ray_tasks.sanitize_error(error, "score"))
    assert "ValueError in test_lost_work.py, line" in message
    assert "Meier" not in message + caplog.text
    own = ConfigError("in our own words")
    assert ray_tasks.sanitize_error(own, "score") is own
