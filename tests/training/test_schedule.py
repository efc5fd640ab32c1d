"""Learning rate, stages and patience as functions of the progress of a run."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_cxr.config import TrainSettings
from ray_cxr.training import schedule


def rates(steps: int = 10, **changes: object) -> list[float]:
    settings = TrainSettings(learning_rate=0.1, **changes)
    positions = itertools.product(range(settings.epochs), range(steps))
    return [schedule.compute_learning_rate(settings, steps, epoch, step, ()) for epoch, step in positions]


def test_rate_is_constant_after_a_warm_up_that_is_never_zero() -> None:
    assert set(rates(epochs=3)) == {0.1}
    np.testing.assert_allclose(rates(epochs=1, warmup_epochs=0.5), [0.02, 0.04, 0.06, 0.08, *[0.1] * 6])


def test_cosine_is_that_of_keras_and_ends_near_zero() -> None:
    found = rates(epochs=5, schedule="cosine", warmup_epochs=1)
    stock = keras.optimizers.schedules.CosineDecay(0.1, 40)
    np.testing.assert_allclose(found[10:], [float(stock(i)) for i in range(40)], rtol=1e-5, atol=1e-8)
    assert 0 < found[-1] < 0.001


def test_frozen_epochs_have_their_own_rate_and_the_schedule_starts_after_them() -> None:
    stages = {"epochs": 4, "frozen_epochs": 1, "warmup_epochs": 1, "schedule": "cosine"}
    found = rates(frozen_learning_rate=0.7, **stages)
    assert set(found[:10]) == {0.7}
    np.testing.assert_allclose(found[10:21], [*np.arange(1, 11) / 100, 0.1])
    assert set(rates(**stages)[:10]) == {0.1}


@pytest.mark.slow
@given(st.lists(st.floats(0, 1), max_size=30), st.integers(1, 4))
def test_plateau_falls_where_the_callback_of_keras_falls(scores: list[float], patience: int) -> None:
    settings = TrainSettings(schedule="plateau", plateau_patience=patience, plateau_factor=0.5, epochs=31)
    stock = keras.callbacks.ReduceLROnPlateau("score", factor=0.5, patience=patience, mode="max", min_delta=0.0)
    optimizer = keras.optimizers.SGD(1.0)
    stock.set_model(SimpleNamespace(optimizer=optimizer))
    stock.on_train_begin()
    for epoch, score in enumerate(scores):
        stock.on_epoch_end(epoch, {"score": score})
    expected = float(np.asarray(optimizer.learning_rate))
    found = schedule.compute_learning_rate(settings, 10, len(scores), 0, scores) / settings.learning_rate
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("patience", "frozen", "scores", "ends"),
    [
        (2, 0, [], False),
        (2, 0, [0.5, 0.4], False),
        (2, 0, [0.5, 0.4, 0.4], True),
        (2, 0, [0.5, 0.4, 0.6], False),
        (2, 0, [0.5, 0.7, 0.7, 0.6], True),  # the first of equal epochs is the best
        (None, 0, [0.5] * 100, False),
        (2, 3, [0.5, 0.4, 0.4, 0.4], False),  # frozen epochs do not count
        (2, 3, [0.5, 0.4, 0.4, 0.4, 0.4], True),
    ],
)
def test_patience_counts_the_epochs_since_the_best(patience, frozen: int, scores: list[float], ends: bool) -> None:
    settings = TrainSettings(patience=patience, frozen_epochs=frozen, epochs=101)
    assert schedule.has_ended(settings, scores, stopped=False) == ends
    assert schedule.has_ended(settings, scores, stopped=True)
    assert schedule.has_ended(settings.replace(epochs=max(1, len(scores))), scores, stopped=False) == bool(scores)
