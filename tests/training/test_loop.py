"""The training loop of one worker, against plain computations; `test_workers.py` has several."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from workers import SIZE, make, split, train, weights

from ray_cxr.config import TrainSettings
from ray_cxr.errors import ConfigError, RayCxrError
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.models import classifier
from ray_cxr.models.architecture import Architecture
from ray_cxr.training import loop
from ray_cxr.training.distributed import Replicas
from ray_cxr.training.loop import Progress

KERNEL = "model tiny_conv0/kernel"
#: Options whose effect on the weights is looked at after one epoch, and what they are compared with.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learning_rate": ({"learning_rate": 0.01}, {}),
    "optimizer sgd": ({"optimizer": "sgd"}, {}),
    "momentum": ({"optimizer": "sgd", "momentum": 0.0}, {"optimizer": "sgd"}),
    "weight_decay": ({"optimizer": "adamw", "weight_decay": 0.5}, {"optimizer": "adamw", "weight_decay": 0.0}),
    "warmup_epochs": ({"warmup_epochs": 2.0}, {}),
    "cosine": ({"schedule": "cosine", "epochs": 1}, {}),
    "clip_norm": ({"clip_norm": 1e-3, "optimizer": "sgd"}, {"optimizer": "sgd"}),
    "flip": ({"flip": True}, {}),
    "shift": ({"shift": 0.2}, {}),
    "rotation": ({"rotation": 20.0}, {}),
    "zoom": ({"zoom": 0.3}, {}),
    "contrast": ({"contrast": 0.5}, {}),
    "dropout": ({"dropout": 0.5}, {}),
    "batch_size": ({"batch_size": 4}, {}),
    "pooling": ({"pooling": "max"}, {}),
    "seed": ({"seed": 7}, {}),
    "bce": ({"loss": "bce"}, {"loss": "weighted_bce"}),
    "focal": ({"loss": "focal"}, {"loss": "bce"}),
    "focal_gamma": ({"loss": "focal", "focal_gamma": 4.0}, {"loss": "focal"}),
    "asymmetric": ({"loss": "asymmetric"}, {"loss": "bce"}),
    "asymmetric_gamma_positive": ({"loss": "asymmetric", "asymmetric_gamma_positive": 2.0}, {"loss": "asymmetric"}),
    "asymmetric_gamma_negative": ({"loss": "asymmetric", "asymmetric_gamma_negative": 2.0}, {"loss": "asymmetric"}),
    "asymmetric_margin": ({"loss": "asymmetric", "asymmetric_margin": 0.3}, {"loss": "asymmetric"}),
    "label_smoothing": ({"label_smoothing": 0.2}, {}),
    "sync_batchnorm": ({"sync_batchnorm": True}, {}),  # another formula for the variance, so other last bits
    "mixed precision": ({"policy": "mixed_bfloat16"}, {}),
}


@pytest.fixture(scope="module")
def trained() -> Any:
    """Weights after one epoch by the changes that were made; each is trained once."""
    known: dict[str, dict[str, np.ndarray]] = {}

    def after(changes: dict[str, Any]) -> dict[str, np.ndarray]:
        if repr(changes) not in known:
            item = make(**changes)
            train(item, 1)
            known[repr(changes)] = weights(item)
        return known[repr(changes)]

    return after


def test_the_same_settings_give_the_same_bits(trained) -> None:
    """Else the comparisons below would show nothing."""
    again = make()
    train(again, 1)
    for name, value in weights(again).items():
        np.testing.assert_array_equal(value, trained({})[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_reaches_the_weights(option: str, trained) -> None:
    """Class weights that are computed and never used are this field's classic fault."""
    changes, compared = OPTIONS[option]
    one, other = trained(changes), trained(compared)
    assert np.abs(one[KERNEL].astype(np.float64) - other[KERNEL]).max() > 1e-9
    assert all(np.isfinite(value).all() for value in one.values())


def test_a_new_setting_is_not_forgotten_here() -> None:
    """It goes into OPTIONS, or among those that other tests are for."""
    here = {word for changes, _ in OPTIONS.values() for word in changes} - {"policy"}
    elsewhere = {
        "backbone", "findings", "weights", "dense", "size",  # test_classifier, test_backbones, test_train
        "epochs", "patience", "frozen_epochs", "frozen_learning_rate", "ema", "steps_per_epoch",  # below
        "plateau_patience", "plateau_factor",  # test_schedule
        "precision", "deterministic", "workers", "cpus_per_worker", "max_failures", "checkpoint_steps",  # test_train
        "gpus_per_worker",  # test_train
        "calibration", "operating_point", "min_positives",  # test_train
        "xla",  # below, and test_workers
    }  # fmt: skip
    assert set(TrainSettings.model_fields) == here | elsewhere


@pytest.mark.slow
def test_xla_takes_the_same_steps(trained) -> None:
    options = {"optimizer": "sgd", "learning_rate": 0.05}
    compiled = make(xla=True, **options)
    train(compiled, 1)
    plain = trained(options)
    for name, value in weights(compiled).items():
        np.testing.assert_allclose(value, plain[name], rtol=1e-3, atol=1e-4, err_msg=name)
    assert np.abs(weights(compiled)[KERNEL] - plain[KERNEL]).max() > 0, "xla changed nothing at all"


def test_the_flat_optimizer_takes_the_steps_of_keras_own(trained) -> None:
    """The same settings through a stock optimizer over the single weights, without ours: bit for bit."""
    options = {"optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 0.01}
    item = make(**options)
    stock = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    stock.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    flat = item.optimizer
    stock.build(flat.weights)
    flat.flatten = list
    flat.apply = lambda gradients: stock.apply(list(gradients), flat.weights)
    train(item, 1)
    expected, found = weights(item), trained(options)
    for name in expected:
        if name.startswith("model "):
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def recorded(item: loop.Loop) -> list[tuple[np.ndarray, np.ndarray, float]]:
    """What each step of an epoch is given: labels, weights, denominator."""
    steps: list[tuple[np.ndarray, np.ndarray, float]] = []
    step = item._train_step

    def spy(images, labels, weight, denominator, draws, seeds):
        steps.append((np.asarray(labels), np.asarray(weight), float(denominator)))
        return step(images, labels, weight, denominator, draws, seeds)

    item._train_step = spy
    train(item, 1)
    return steps


def test_every_label_counts_once_and_nulls_and_padding_never() -> None:
    item = make(n_train=11)  # a batch of 8 and one of 3, padded with 5
    steps = recorded(item)
    known = item.train.labels[:, :14] >= 0
    assert [weight[:, 0].shape for _, weight, _ in steps] == [(8,), (8,)]
    assert (steps[1][1][3:] == 0).all(), "padding must have no weight"
    assert sum(weight.sum() for _, weight, _ in steps) == known.sum() < known.size
    assert [denominator for *_, denominator in steps] == [weight.sum() for _, weight, _ in steps]
    positives = sum((labels * weight).sum() for labels, weight, _ in steps)
    assert positives == (item.train.labels[:, :14] == 1).sum()


def test_learns_and_validates_every_image_once() -> None:
    item = make(n_train=64, n_val=13, learning_rate=0.01, findings=("Effusion",), optimizer="adam")
    train(item, 6)
    probabilities, result = item.validate()
    assert probabilities.shape == (13, 1)
    assert result["findings"]["Effusion"]["auroc"] == 1.0
    assert result["macro_auroc"] == 1.0


#: All that has a state, or draws at random: both stages, dropout, EMA, a schedule, augmentation.
EVERYTHING = {
    "n_train": 29,
    "warmup_epochs": 1,
    "schedule": "plateau",
    "epochs": 4,
    "dropout": 0.4,
    "dense": (8,),
    "ema": 0.8,
    "shift": 0.1,
    "rotation": 5.0,
    "frozen_epochs": 1,
}


@pytest.fixture(scope="module")
def straight() -> tuple[dict[str, np.ndarray], Progress]:
    """A run of two epochs without a stop."""
    item = make(**EVERYTHING)
    progress = train(item, 2)
    return weights(item), progress


@pytest.mark.parametrize("done", [0, 1])
def test_a_run_continued_in_mid_epoch_has_the_bits_of_an_uninterrupted_one(done: int, tmp_path, straight) -> None:
    """What follows the stop knows the checkpoint alone."""
    continue_from_a_stop(done, tmp_path, *straight)


@pytest.mark.slow
def test_a_run_continued_in_half_precision_has_the_same_bits(tmp_path) -> None:
    """The loss scale and its counter are part of the state."""
    item = make(policy="mixed_float16", **EVERYTHING)
    progress = train(item, 2)
    continue_from_a_stop(1, tmp_path, weights(item), progress, policy="mixed_float16")


class Killed(Exception):
    pass


def continue_from_a_stop(done: int, folder, expected: dict[str, np.ndarray], end: Progress, **changes: str) -> None:
    first = make(checkpoint_steps=2, **EVERYTHING, **changes)
    before = train(first, done)

    def checkpoint() -> None:
        first.save(folder)
        raise Killed

    with pytest.raises(Killed):
        first.run_epoch(before, on_checkpoint=checkpoint)
    assert len(before.losses) == 2
    second = make(**EVERYTHING, **changes)
    second.restore(folder, before)
    assert train(second, 2 - done, before) == end
    for name, value in expected.items():
        np.testing.assert_array_equal(value, weights(second)[name], err_msg=name)


def test_a_run_continued_between_the_stages_has_the_same_bits(tmp_path, straight) -> None:
    first = make(**EVERYTHING)
    progress = train(first, 1)
    first.save(tmp_path)
    second = make(**EVERYTHING)
    second.restore(tmp_path, progress)
    train(second, 1, progress)
    for name, value in straight[0].items():
        np.testing.assert_array_equal(value, weights(second)[name], err_msg=name)


def test_a_frozen_backbone_keeps_every_bit_and_its_statistics_and_is_freed_later() -> None:
    item = make(frozen_epochs=1, frozen_learning_rate=0.5, dense=(8,), optimizer="sgd")
    start = weights(item)
    progress = train(item, 1)
    frozen = weights(item)
    assert float(np.asarray(item.optimizer.keras.learning_rate)) == 0.5
    for name, value in start.items():
        if name.startswith("model tiny_"):
            np.testing.assert_array_equal(frozen[name], value, err_msg=name)
    assert np.abs(frozen["model head_dense0/kernel"] - start["model head_dense0/kernel"]).max() > 1e-3
    train(item, 1, progress)
    assert np.abs(weights(item)[KERNEL] - start[KERNEL]).max() > 1e-7
    assert float(np.asarray(item.optimizer.keras.learning_rate)) == pytest.approx(1e-4)


def test_ema_is_the_average_that_it_says() -> None:
    """Against the recursion written out, over the raw weights of every step."""
    # With a callback, every step is settled before the next.
    item = make(ema=0.5, optimizer="sgd", learning_rate=0.1, callbacks=[keras.callbacks.Callback()])
    seen = []

    def look(step: int, loss: float) -> None:
        seen.append(np.asarray(item.model.get_layer("tiny_conv0").kernel))

    item.run_epoch(Progress(), on_step=look)
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.5 * expected + 0.5 * value
    raw = np.asarray(item.model.get_layer("tiny_conv0").kernel)
    with item.optimizer.averaged():
        np.testing.assert_allclose(np.asarray(item.model.get_layer("tiny_conv0").kernel), expected, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(item.model.get_layer("tiny_conv0").kernel), raw)
    assert np.abs(expected - raw).max() > 1e-5


def test_steps_per_epoch_cuts_an_epoch_short() -> None:
    assert len(recorded(make(n_train=29, steps_per_epoch=2))) == 2
    assert make(n_train=5, steps_per_epoch=2).steps_per_epoch == 1


class Seen(keras.callbacks.Callback):
    """What a callback gets to see."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, float]] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        assert logs
        self.batches.append((batch, logs["loss"]))


def test_stock_callbacks_run_and_what_they_do_counts(tmp_path) -> None:
    seen = Seen()
    fall = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", patience=1, factor=0.1)
    stop = keras.callbacks.EarlyStopping(monitor="val_auroc", mode="max", patience=1)
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    item = make(callbacks=[seen, fall, stop, log], learning_rate=0.01)
    item.callbacks.on_train_begin()
    progress = Progress()
    for epoch, (loss, auroc) in enumerate([(0.5, 0.6), (0.6, 0.7), (0.7, 0.65)]):
        item.begin_epoch(progress)
        item.run_epoch(progress)
        assert not item.stop_wanted()
        item.callbacks.on_epoch_end(epoch, {"val_loss": loss, "val_auroc": auroc})
        progress.epochs_done, progress.losses = epoch + 1, []
    assert [batch for batch, _ in seen.batches] == [0, 1, 2] * 3
    # The second epoch began after no fall, the third after one; the end of the third made another.
    assert float(np.asarray(item.optimizer.keras.learning_rate)) == pytest.approx(1e-4, rel=1e-5)
    assert item.stop_wanted()
    item.callbacks.on_train_end()
    assert (tmp_path / "log.csv").read_text().count("\n") == 4


def test_a_callback_that_sets_the_learning_rate_is_heard_from_the_first_epoch_and_after_a_restart(tmp_path) -> None:
    wanted = [0.5, 0.25, 0.2, 0.1]

    def begun() -> loop.Loop:
        return make(
            callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: wanted[epoch])],
            optimizer="sgd",
            frozen_epochs=2,
            frozen_learning_rate=0.01,
            epochs=4,
            n_train=8,
        )

    def rate(item: loop.Loop) -> float:
        return float(np.asarray(item.optimizer.keras.learning_rate))

    item, progress, seen = begun(), Progress(), []
    for _ in range(3):
        item.begin_epoch(progress)
        train(item, 1, progress)
        seen.append(rate(item))
    assert seen == pytest.approx(wanted[:3])
    item.save(tmp_path)
    again = begun()
    again.restore(tmp_path, progress)
    assert rate(again) == pytest.approx(0.2)
    train(again, 1, progress)  # without the callback's own word
    assert rate(again) == pytest.approx(0.2)


def test_a_callback_may_set_weights_between_epochs() -> None:
    item = make(learning_rate=1e-6)
    progress = train(item, 1)
    kernel = item.model.get_layer("logits").kernel
    kernel.assign(np.full(kernel.shape, 3.0, np.float32))
    train(item, 1, progress)
    np.testing.assert_allclose(np.asarray(kernel), 3.0, atol=1e-3)


def test_a_loss_that_is_not_finite_names_step_and_every_image() -> None:
    item = make(learning_rate=10.0, optimizer="sgd")
    kernel = item.model.get_layer("logits").kernel
    kernel.assign(np.full(kernel.shape, np.nan, np.float32))
    with pytest.raises(RayCxrError, match="the loss is nan at epoch 1, step 1; lower the learning rate") as caught:
        item.run_epoch(Progress())
    assert str(caught.value).count("_000.png") == 8
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_end_the_run_before_they_are_kept() -> None:
    """A loss shows only what it was computed from: the last step can spoil the weights unseen."""

    class Spoil(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            if batch == 2:
                kernel = self.model.get_layer("logits").kernel
                kernel.assign(np.full(kernel.shape, np.inf, np.float32))

    item = make(callbacks=[Spoil()])
    with pytest.raises(RayCxrError, match="weights of logits/kernel are not finite at epoch 1, step 3"):
        item.run_epoch(Progress())


def test_what_is_measured_is_the_network_that_is_exported(tmp_path) -> None:
    """Trained in half precision, validated in whole: as a bundle, built again from the weights alone, would."""
    item = make(policy="mixed_bfloat16", learning_rate=0.01)
    train(item, 1)
    probabilities, _ = item.validate()
    item.model.save_weights(str(tmp_path / "w.weights.h5"))
    plain = classifier.build(Architecture.of(item.settings, SIZE))
    plain.load_weights(str(tmp_path / "w.weights.h5"))
    images = np.asarray(item.val.images)[..., None]
    np.testing.assert_allclose(np.asarray(plain(images, training=False)), probabilities, atol=1e-6)


def test_an_average_of_no_steps_is_the_weights_themselves() -> None:
    item = make(ema=0.9)
    start = weights(item)[KERNEL]
    with item.optimizer.averaged():
        np.testing.assert_array_equal(weights(item)[KERNEL], start)


def test_images_are_counted_without_padding_and_from_where_a_restart_took_up() -> None:
    item = make(n_train=29)
    assert item.run_epoch(Progress()).images == 29
    assert item.run_epoch(Progress(losses=[0.5] * 3)).images == 5


def test_mixed_precision_computes_in_half_and_keeps_weights_whole() -> None:
    item = make(policy="mixed_bfloat16")
    assert item.model.get_layer("tiny_conv1").compute_dtype == "bfloat16"
    assert all(v.dtype == "float32" for v in item.model.trainable_variables)
    assert item.model.get_layer("logits").compute_dtype == "float32"
    assert keras.config.dtype_policy().name == "float32", "the policy must not stay behind"
    assert isinstance(make(policy="mixed_float16").optimizer.keras, keras.optimizers.LossScaleOptimizer)


def test_selection_falls_back_to_the_loss_where_no_auroc_is_defined() -> None:
    values = np.array([[1], [1]], dtype=np.int8)
    p = np.float32([[0.9], [0.8]])
    result = loop.evaluate(values, p, ("Effusion",))
    assert result["findings"]["Effusion"] == {"n": 2, "positives": 2, "auroc": None}
    assert result["macro_auroc"] is None
    assert loop.selection(result, p, values) == pytest.approx(np.log(0.9 * 0.8) / 2, rel=1e-6)
    assert loop.selection({"macro_auroc": 0.5}, p, values) == 0.5


def test_macro_never_counts_no_finding() -> None:
    values = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=np.int8)
    p = np.float32([[0.9, 0.9], [0.1, 0.1], [0.8, 0.8], [0.2, 0.2]])
    result = loop.evaluate(values, p, ("Effusion", "No_Finding"))
    assert result["findings"]["No_Finding"]["auroc"] == 0.0
    assert result["macro_auroc"] == 1.0


def test_a_batch_that_workers_cannot_share_is_refused() -> None:
    replicas = Replicas()
    replicas.count = 3
    settings = TrainSettings(backbone="TinyCNN", weights="none", batch_size=8)
    with pytest.raises(ConfigError, match="use 9"):
        loop.Loop(replicas, settings, Architecture.of(settings, SIZE), split(8), split(4), weights="none")


def test_findings_of_the_loop_are_the_models_outputs_in_order() -> None:
    item = make(findings=("Mass", "Effusion"))
    assert item.findings == ("Effusion", "Mass")
    assert item.model.output.shape == (None, 2)
    assert [LABELS[c] for c in item.columns] == ["Effusion", "Mass"]
    assert FINDINGS[4] == "Effusion"
