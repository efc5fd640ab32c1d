"""Bounds, batches and errors in actors, and retries of lost ranges; stand-ins for Ray Data, decoders and the model."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError

from ray_cxr import tasks, telemetry
from ray_cxr.data.partition import Range
from ray_cxr.errors import ConfigError, RayCxrError
from ray_cxr.imaging.sandbox import DecodedImage, Failure
from ray_cxr.scoring import actors, heatmaps, reader
from ray_cxr.scoring.pool import run_tasks
from ray_cxr.scoring.ranges import RangeState, RowLocation, ScoreTask, TaskResult, fill_ranges
from ray_cxr.tasks import Task

SIZE = 4
IMAGE = DecodedImage((np.zeros((SIZE, SIZE), np.uint8),), None)


def finished(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def make_state(rows: int, index: int = 0) -> RangeState:
    ids = [str(row) for row in range(rows)]
    return RangeState(
        index, pa.table({"image_id": ids, "path": ids, "p_Mass": [0.5] * rows, "flag_Mass": [True] * rows})
    )


def test_images_ahead_of_the_model_are_bounded() -> None:
    submitted: list[str] = []
    images = reader.ImageReader.__new__(reader.ImageReader)
    images._ahead, images._turn, images._fetcher = 5, threading.Lock(), None
    images._pool = SimpleNamespace(submit=lambda _, path: submitted.append(path) or finished(IMAGE))  # type: ignore[assignment]
    waiting = [len(submitted) - count for count, _ in enumerate(images.iter_images([make_state(12)]))]
    assert waiting == [5, 5, 5, 5, 5, 5, 5, 5, 4, 3, 2, 1]


def test_ranges_are_flushed_with_their_last_row() -> None:
    """Also those without rows, and those whose last outcome is a failure; their tables are freed."""

    class Pairs:
        """Completes images two by two."""

        def __init__(self) -> None:
            self.held: list[RowLocation] = []

        def add(self, location: RowLocation, image: DecodedImage) -> list[RowLocation]:
            self.held.append(location)
            return self.finish() if len(self.held) == 2 else []

        def finish(self) -> list[RowLocation]:
            done, self.held = self.held, []
            return done

        def flush(self, part: int) -> tuple[int, int]:
            return part, len(states[part].failures)

    states = [make_state(2), make_state(0), make_state(2), make_state(1)]
    failure = Failure("blank", "all pixels have one value", {"view": "AP"})
    outcomes = [((0, 0), IMAGE), ((2, 1), failure), ((0, 1), IMAGE), ((3, 0), failure), ((2, 0), IMAGE)]
    located = ((RowLocation(*position), outcome) for position, outcome in outcomes)
    assert list(fill_ranges(states, located, Pairs())) == [(1, 0), (0, 0), (3, 1), (2, 1)]
    assert states[2].failures == {1: ("blank", "all pixels have one value")}
    assert states[2].tags == {1: {"view": "AP"}}
    assert [len(state.rows) for state in states] == [0, 0, 0, 0]


def test_batches_are_full_but_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def submit(images: np.ndarray) -> Future[Any]:
        sizes.append(len(images))
        return finished(SimpleNamespace(probabilities=np.full((len(images), 2), 0.5), features=None, spread=None))

    job = SimpleNamespace(batch_size=4, spec=SimpleNamespace(size=SIZE), features=False)
    rules, runtime = SimpleNamespace(findings=("Mass", "Edema")), SimpleNamespace(submit=submit, has_spread=False)
    actor: Any = SimpleNamespace(job=job, rules=rules, runtime=runtime, quality=None, feature_count=0, first_at=0.0)
    states = [make_state(11)]
    writer = actors.ScoreWriter(actor, states)
    monkeypatch.setattr(writer, "flush", lambda part: (part, len(states[part].failures)))
    outcomes: list[Any] = [(RowLocation(0, row), IMAGE) for row in range(10)]
    outcomes.insert(3, (RowLocation(0, 10), Failure("blank", "all pixels have one value", None)))
    assert list(fill_ranges(states, outcomes, writer)) == [(0, 1)]
    assert sizes == [4, 4, 2]  # the failure takes no place in a batch
    assert (writer._probabilities[0][:10] == 0.5).all()


def test_written_heat_maps_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counted: list[Any] = []
    monkeypatch.setattr(telemetry, "add_written", lambda *given: counted.append((*given[:3], list(given[3]))))
    (tmp_path / "heatmaps").mkdir()
    job = SimpleNamespace(folder=tmp_path, check_run=lambda: None, run_digest="r")
    model: Any = SimpleNamespace(job=job, request=heatmaps.HeatMapRequest(1, "gradcam", 128), findings=("Mass",))
    state = make_state(2, index=3)
    state.failures = dict.fromkeys(range(2), ("blank", "one value"))
    assert heatmaps.HeatMapWriter(model, [state]).flush(0) == (3, 0)
    assert counted == [(telemetry.IMAGES_DRAWN, "heatmaps", 2, ["blank", "blank"])]


@pytest.mark.parametrize("foreign", [False, True])
def test_removing_maps_keeps_only_files_of_users(tmp_path: Path, foreign: bool) -> None:
    folder = tmp_path / "heatmaps"
    folder.mkdir()
    overlays = ("00003-1.Mass.jpg", "00003-1.Mass.png", ".1.Mass.jpg.2-cd.part")
    for name in (*overlays, "part-00003.parquet", ".part-00003.parquet.1-ab.part", ".part-00003.progress.part"):
        (folder / name).touch()
    if foreign:
        (folder / "notes.txt").touch()
    heatmaps.remove_maps(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == (["heatmaps", "notes.txt"] if foreign else [])


class Dataset:
    """Yields a row per task. Ranges of a lost actor are left out, or end the iteration."""

    def __init__(self, rows: list[Task], lost: Any = (), *, dies: bool = False, failed: Any = None) -> None:
        self._rows, self._lost, self._dies, self._failed = rows, lost, dies, failed

    def iter_rows(self) -> Iterator[Task]:
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
    rounds: list[list[Task]] = []

    def build_dataset(rows: list[Task]) -> Dataset:
        rounds.append(rows)
        return Dataset(rows, {2, 3, 5}, dies=dies) if len(rounds) == 1 else Dataset(rows)

    with caplog.at_level(logging.WARNING):
        # 5 has its file although no result reported it: its worker died between the two.
        given = make_tasks([0, 1], [2, 3], [4, 5])
        results = list(run_tasks(given, build_dataset, lambda index: index == 5))
    assert [index for result in results for index in result.done] == [0, 1, 4, 2, 3]
    assert [ScoreTask.from_row(row) for row in rounds[1]] == make_tasks([2, 3])
    assert len(rounds) == 2
    assert "2 files" in caplog.text


@pytest.mark.parametrize(
    ("behaviour", "error", "message", "expected_rounds"),
    [
        ({"lost": {1}, "dies": True}, RayCxrError, "1 output files", 1 + tasks.MAX_IDLE_ROUNDS),
        ({"failed": ConfigError("no GPU there")}, ConfigError, "^no GPU there$", 1),
    ],
)
def test_run_ends_with_an_error(behaviour: Any, error: type[Exception], message: str, expected_rounds: int) -> None:
    rounds = []

    def build_dataset(rows: list[Task]) -> Dataset:
        rounds.append(rows)
        return Dataset(rows, **behaviour)

    with pytest.raises(error, match=message):
        list(run_tasks(make_tasks([0], [1]), build_dataset, lambda index: False))
    assert len(rounds) == expected_rounds


def test_foreign_error_is_reported_by_its_place_and_not_by_its_words(caplog) -> None:
    """The words of a foreign error can hold a patient's id; without a report it would look like a lost worker."""
    broken = actors.ScoreActor(None, 1)  # type: ignore[arg-type]
    record = json.loads(broken({})["error"])
    assert record["type"] == "RayCxrError"
    assert "AttributeError in " in record["message"]

    with caplog.at_level(logging.ERROR):
        try:
            raise ValueError("patient " + "Mei" + "er")
        except ValueError as error:
            message = str(tasks.sanitize_error(error, "score"))
    assert "ValueError in test_actors.py, line" in message
    assert "Meier" not in message + caplog.text
    own = ConfigError("in our own words")
    assert tasks.sanitize_error(own, "score") is own
