"""What becomes of the work of a lost worker, and of an error in one. A stand-in replaces Ray Data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from ray_cxr import tasks as ray_tasks
from ray_cxr.errors import ConfigError, RayCxrError
from ray_cxr.scoring import engine, pipeline

Task = dict[str, Any]


class Dataset:
    """Gives a row per task. Ranges of a lost actor are left out, or end the iteration."""

    def __init__(self, tasks: list[Task], lost: Any = (), *, dies: bool = False, failed: Any = None) -> None:
        self._tasks, self._lost, self._dies, self._failed = tasks, lost, dies, failed

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        if self._failed is not None:
            yield {**engine.failure(self._failed), "done": []}
        for task in self._tasks:
            if done := [index for index in task["indices"] if index not in self._lost]:
                yield {**ray_tasks.SUCCESS, "done": done}
        if self._dies:
            raise ActorDiedError()


def make_tasks(*groups: list[int]) -> list[Task]:
    return [{"indices": g, "starts": [10 * i for i in g], "counts": [10] * len(g), "retry": False} for g in groups]


@pytest.mark.parametrize("dies", [False, True])
def test_only_lost_ranges_are_scheduled_again(dies: bool, caplog) -> None:
    rounds: list[list[Task]] = []

    def build_dataset(tasks: list[Task]) -> Dataset:
        rounds.append(tasks)
        return Dataset(tasks, {2, 3, 5}, dies=dies) if len(rounds) == 1 else Dataset(tasks)

    def find_pending(tasks: list[Task], done: set[int]) -> list[Task]:
        return pipeline._remaining(tasks, done, lambda task, index: index == 5)

    with caplog.at_level(logging.WARNING):
        # 5 has its file although no row reported it: its worker died between the two.
        rows = list(ray_tasks.run_with_retries(make_tasks([0, 1], [2, 3], [4, 5]), build_dataset, find_pending))
    assert [index for row in rows for index in row["done"]] == [0, 1, 4, 2, 3]
    assert rounds[1:] == [make_tasks([2, 3])]
    assert "2 files" in caplog.text
    assert find_pending(make_tasks([3, 4, 6], [5]), {4}) == make_tasks([3, 6])


@pytest.mark.parametrize(
    ("behaviour", "error", "message", "expected_rounds"),
    [
        ({"lost": {1}, "dies": True}, RayCxrError, "1 output files", 1 + ray_tasks.MAX_IDLE_ROUNDS),
        ({"failed": ConfigError("no GPU there")}, ConfigError, "^no GPU there$", 1),
    ],
)
def test_run_ends_with_an_error(behaviour: Any, error: type[Exception], message: str, expected_rounds: int) -> None:
    rounds = []

    def build_dataset(tasks: list[Task]) -> Dataset:
        rounds.append(tasks)
        return Dataset(tasks, **behaviour)

    def find_pending(tasks: list[Task], done: set[int]) -> list[Task]:
        return pipeline._remaining(tasks, done, lambda task, index: False)

    with pytest.raises(error, match=message):
        list(ray_tasks.run_with_retries(make_tasks([0], [1]), build_dataset, find_pending))
    assert len(rounds) == expected_rounds


def test_foreign_error_is_reported_by_its_place_and_not_by_its_words(caplog) -> None:
    """The words of a foreign error can hold a patient's id; without a report it would look like a lost worker."""
    broken = engine.ScoreActor.__new__(engine.ScoreActor)
    broken._failed = broken._job = None  # type: ignore[assignment]
    row = broken({"indices": [0]})
    record = json.loads(row["error"])
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
