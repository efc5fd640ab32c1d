"""Learning rate, stages and patience as functions of where a run stands."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_cxr.config import TrainSettings
from ray_cxr.training import schedule


def rates(settings: TrainSettings, steps: int = 10, scores: tuple[float, ...] = ()) -> list[float]:
    return [
        schedule.learning_rate(settings, steps, epoch, step, scores[:epoch])
        for epoch in range(settings.epochs)
        for step in range(steps)
    ]


def test_constant_is_constant() -> None:
    assert set(rates(TrainSettings(epochs=3, learning_rate=0.1))) == {0.1}


def test_warm_up_rises_to_the_full_rate_and_never_is_zero() -> None:
    found = rates(TrainSettings(epochs=3, learning_rate=0.1, warmup_epochs=0.5))
    np.testing.assert_allclose(found[:6], [0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_cosine_is_that_of_keras_and_ends_near_zero() -> None:
    found = rates(TrainSettings(epochs=5, learning_rate=0.1, schedule="cosine", warmup_epochs=1))
    stock = keras.optimizers.schedules.CosineDecay(0.1, 40)
    np.testing.assert_allclose(found[10:], [float(stock(i)) for i in range(40)], rtol=1e-5, atol=1e-8)
    assert 0 < found[-1] < 0.001


def test_frozen_epochs_have_a_rate_of_their_own_and_the_schedule_begins_after_them() -> None:
    settings = TrainSettings(
        epochs=4, learning_rate=0.1, frozen_epochs=1, frozen_learning_rate=0.7, warmup_epochs=1, schedule="cosine"
    )
    found = rates(settings)
    assert set(found[:10]) == {0.7}
    np.testing.assert_allclose(found[10:20], np.arange(1, 11) / 100)
    assert found[20] == 0.1
    assert set(rates(settings.replace(frozen_learning_rate=None))[:10]) == {0.1}


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(1, 4))
def test_plateau_falls_where_keras_own_callback_falls(scores: list[float], patience: int) -> None:
    settings = TrainSettings(schedule="plateau", plateau_patience=patience, plateau_factor=0.5, epochs=31)
    stock = keras.callbacks.ReduceLROnPlateau("score", factor=0.5, patience=patience, mode="max", min_delta=0.0)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1.0))
    stock.set_model(model)
    stock.on_train_begin()
    for epoch, score in enumerate(scores):
        stock.on_epoch_end(epoch, {"score": score})
    expected = float(np.asarray(model.optimizer.learning_rate))
    found = schedule.learning_rate(settings, 10, len(scores), 0, scores) / settings.learning_rate
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_best_epoch_is_the_first_of_the_highest() -> None:
    assert schedule.best_epoch([]) is None
    assert schedule.best_epoch([0.5, 0.7, 0.7, 0.6]) == 2


def test_patience_counts_epochs_since_the_best_and_not_the_frozen_ones() -> None:
    settings = TrainSettings(patience=2)
    assert not schedule.out_of_patience(settings, [])
    assert not schedule.out_of_patience(settings, [0.5, 0.4])
    assert schedule.out_of_patience(settings, [0.5, 0.4, 0.4])
    assert not schedule.out_of_patience(settings, [0.5, 0.4, 0.6])
    assert not schedule.out_of_patience(TrainSettings(), [0.5] * 100)
    frozen = TrainSettings(patience=2, frozen_epochs=3)
    assert not schedule.out_of_patience(frozen, [0.5, 0.4, 0.4, 0.4])
    assert schedule.out_of_patience(frozen, [0.5, 0.4, 0.4, 0.4, 0.4])
