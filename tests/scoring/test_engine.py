"""What is bounded and what is batched inside an actor; stand-ins replace the decoders and the model."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ray_cxr import telemetry
from ray_cxr.imaging.sandbox import DecodedImage, Failure
from ray_cxr.scoring import engine, heatmaps
from ray_cxr.scoring.engine import Work

SIZE = 4


def finished(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def make_work(rows: int) -> Work:
    paths = pa.table({"path": [f"{row}.png" for row in range(rows)]})
    return Work(0, paths, None, None, np.zeros((rows, 2), np.float32), flags=[None] * rows, left=rows)


def test_images_ahead_of_the_model_are_bounded() -> None:
    submitted: list[str] = []
    reading = engine.Reading.__new__(engine.Reading)
    reading._ahead, reading._turn = 5, threading.Lock()
    image = DecodedImage((np.zeros((SIZE, SIZE), np.uint8),), None)
    reading._pool = SimpleNamespace(submit=lambda _, path: submitted.append(path) or finished(image))  # type: ignore[assignment]
    waiting = [len(submitted) - count for count, _ in enumerate(reading.iter_images([make_work(12)]))]
    assert waiting == [5, 5, 5, 5, 5, 5, 5, 5, 4, 3, 2, 1]


def test_batches_are_full_but_for_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def submit(images: np.ndarray) -> Future[Any]:
        sizes.append(len(images))
        return finished(SimpleNamespace(probabilities=np.full((len(images), 2), 0.5), features=None))

    scoring = engine.Scoring.__new__(engine.Scoring)
    scoring._job, scoring._size, scoring._quality = SimpleNamespace(batch_size=4), SIZE, None  # type: ignore[assignment]
    scoring._runtime, scoring.first_at = SimpleNamespace(submit=submit), None  # type: ignore[assignment]
    monkeypatch.setattr(scoring, "_write", lambda work: (work.index, len(work.rows), len(work.failures)))
    images = [DecodedImage((np.zeros((SIZE, SIZE), np.uint8),), None) for _ in range(10)]
    found = [((0, row), image) for row, image in enumerate(images)]
    found.insert(3, ((0, 10), Failure("blank", "all pixels have one value", None)))  # takes no place in a batch
    work = make_work(11)
    assert list(scoring.score([work], iter(found))) == [(0, 11, 1)]
    assert sizes == [4, 4, 2]
    assert (work.probabilities[:10] == 0.5).all()


def test_written_heat_maps_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    counted: list[Any] = []
    monkeypatch.setattr(telemetry, "wrote", lambda *given: counted.append((*given[:3], list(given[3]))))
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "heatmaps").mkdir()
    drawing = heatmaps.Drawing.__new__(heatmaps.Drawing)
    drawing._job = SimpleNamespace(folder=tmp_path, settings_file=b"{}", run="r")  # type: ignore[assignment]
    drawing._asked = heatmaps.Asked(1, "gradcam", 128)
    rows = {row: [{"image_id": f"{row}", "error_code": "blank", "error": "one value"}] for row in range(2)}
    assert drawing._write(make_work(2), rows, "digest") == 0
    assert counted == [(telemetry.IMAGES_DRAWN, "heatmaps", 2, ["blank", "blank"])]
