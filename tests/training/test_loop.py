"""The training loop of one worker, against plain computations; `test_workers.py` has several workers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.callbacks import LambdaCallback
from workers import SIZE, make, train, weights

from ray_cxr.config import TrainSettings
from ray_cxr.errors import RayCxrError
from ray_cxr.labels import FINDINGS
from ray_cxr.models import backbones, classifier
from ray_cxr.models.architecture import Architecture
from ray_cxr.training import loop
from ray_cxr.training.loop import TrainState
from ray_cxr.training.optimizer import FlatOptimizer

KERNEL = "model tiny_conv0/kernel"
SGD, ADAMW, FOCAL, ASYMMETRIC = {"optimizer": "sgd"}, {"optimizer": "adamw"}, {"loss": "focal"}, {"loss": "asymmetric"}
#: Changes of the settings that must change the weights after two steps, and what they are compared with.
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"learning_rate": 0.01}, {}),
    (SGD, {}),
    (SGD | {"momentum": 0.0}, SGD),
    (SGD | {"clip_norm": 1e-3}, SGD),
    (ADAMW | {"weight_decay": 0.5}, ADAMW | {"weight_decay": 0.0}),
    ({"warmup_epochs": 2.0}, {}),
    ({"schedule": "cosine", "epochs": 1}, {}),
    ({"flip": True}, {}),
    ({"contrast": 0.5}, {}),
    ({"shear": 10.0}, {}),
    ({"crop": 0.5}, {}),
    ({"erase": 0.3}, {}),
    ({"intensity": 2}, {}),
    ({"intensity": 2, "intensity_strength": 1.0}, {"intensity": 2}),
    ({"mixup": 0.5}, {}),
    ({"accumulate": 2}, {}),
    ({"layer_decay": 0.5}, {}),
    ({"dropout": 0.5}, {}),
    ({"seed": 7}, {}),
    ({"loss": "bce"}, {"loss": "weighted_bce"}),
    ({"balance": "findings"}, {}),
    (FOCAL, {"loss": "bce"}),
    (FOCAL | {"focal_gamma": 4.0}, FOCAL),
    (ASYMMETRIC | {"asymmetric_margin": 0.3}, ASYMMETRIC),
    ({"label_smoothing": 0.2}, {}),
    ({"sync_batchnorm": True}, {}),  # another formula of the variance, so other last bits
    ({"policy": "mixed_bfloat16"}, {}),
]


@pytest.fixture
def eager() -> Iterator[None]:
    """Run without graphs: to trace one takes longer than a few steps of so small a model."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@functools.cache
def weights_after(**changes: Any) -> dict[str, np.ndarray]:
    """Return the weights after an epoch of two steps; each combination of changes is trained once."""
    item = make(16, 4, **changes)
    train(item, 1)
    return weights(item)


def rate(item: loop.Loop) -> float:
    return float(np.asarray(item.optimizer.keras.learning_rate))


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], start: str = "") -> None:
    for name, value in expected.items():
        if name.startswith(start):
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "compared"), OPTIONS, ids=lambda changes: ",".join(changes) or "default")
def test_every_option_reaches_the_weights(changes: dict, compared: dict, eager) -> None:
    """Class weights that are computed and never used are the classic bug of this field."""
    one, other = weights_after(**changes), weights_after(**compared)
    assert np.abs(one[KERNEL].astype(np.float64) - other[KERNEL]).max() > 1e-9
    assert all(np.isfinite(value).all() for value in one.values())


@pytest.mark.slow
def test_xla_takes_the_same_steps(monkeypatch) -> None:
    options, function = [], tf.function
    monkeypatch.setattr(tf, "function", lambda *functions, **kw: options.append(kw) or function(*functions, **kw))
    plain, compiled = (make(8, 4, **SGD, learning_rate=0.05, xla=xla) for xla in (False, True))
    for item in (plain, compiled):
        train(item, 1)
    assert options.count({"jit_compile": True, "autograph": False}) == 1  # the others are of Keras
    for name, value in weights(compiled).items():
        np.testing.assert_allclose(value, weights(plain)[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_the_flat_optimizer_takes_the_steps_of_keras(eager) -> None:
    """The same settings through a stock optimizer over the single weights give the same bits."""
    options = ADAMW | {"weight_decay": 0.1, "learning_rate": 0.01}
    item = make(16, 4, **options)
    stock = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    stock.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    flat = item.optimizer
    stock.build(flat.weights)
    flat.flatten = list
    flat.apply = lambda gradients: stock.apply(list(gradients), flat.weights)
    train(item, 1)
    assert_equal(weights_after(**options), weights(item), "model ")


@pytest.mark.long
@pytest.mark.parametrize("backbone", backbones.BACKBONES)
def test_adamw_decays_kernels_and_no_vectors(backbone: str) -> None:
    """Without gradients, a step does nothing but decay."""
    model = classifier.build(Architecture(backbone=backbone, size=32, findings=FINDINGS))
    settings = TrainSettings(optimizer="adamw", weight_decay=0.5, learning_rate=0.01)
    flat = FlatOptimizer(settings, model.trainable_weights, [1.0] * len(model.trainable_weights))
    before = [np.asarray(weight) for weight in flat.weights]
    flat.apply(flat.list_zeros())
    for weight, old in zip(flat.weights, before, strict=True):
        if weight.name in ("kernel", "depthwise_kernel"):
            np.testing.assert_allclose(weight, old * (1 - 0.01 * 0.5), rtol=1e-5, err_msg=weight.path)
        else:
            np.testing.assert_array_equal(weight, old, err_msg=weight.path)


def test_every_label_counts_once_and_nulls_and_padding_never(monkeypatch) -> None:
    item, steps = make(11, 4), []  # a batch of 8 and one of 3, padded with 5
    monkeypatch.setattr(item, "_train_step", lambda *inputs: steps.append([np.asarray(x) for x in inputs[1:4]]) or 0.5)
    train(item, 1)
    known = item.train.labels[:, :14] >= 0
    assert [len(weight) for _, weight, _ in steps] == [8, 8]
    assert (steps[1][1][3:] == 0).all(), "padding must have no weight"
    assert sum(weight.sum() for _, weight, _ in steps) == known.sum() < known.size
    assert [denominator for *_, denominator in steps] == [weight.sum() for _, weight, _ in steps]
    positives = sum((labels * weight).sum() for labels, weight, _ in steps)
    assert positives == (item.train.labels[:, :14] == 1).sum()


def test_accumulated_batches_are_one_large_batch(eager) -> None:
    """With a frozen BatchNorm, which sees single batches, the step is that of a batch of their total size."""
    options = SGD | {"frozen_epochs": 1, "dense": (8,), "shift": 0.1, "mixup": 0.5, "learning_rate": 0.1}
    items = [make(29, 4, batch_size=size, accumulate=count, **options) for size, count in ((16, 1), (4, 4))]
    for item in items:
        assert item.steps_per_epoch == 2
        train(item, 1)
    one, other = map(weights, items)
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_batches_without_images_do_not_run(eager) -> None:
    """Only so many batches as hold the last images change BatchNorm's statistics."""
    one, other = (make(7, 4, batch_size=4, accumulate=count) for count in (2, 5))
    for item in (one, other):
        train(item, 1)
    assert_equal(weights(other), weights(one))


@pytest.mark.slow
@pytest.mark.parametrize("options", [SGD, ADAMW | {"weight_decay": 0.5}], ids=["sgd", "adamw"])
def test_layer_decay_is_a_rate_for_each_stage(options: dict[str, Any], eager) -> None:
    options = options | {"learning_rate": 0.1}
    start, steps = weights(make(8, 4, **options)), []
    for decay in (1.0, 0.5):
        item = make(8, 4, layer_decay=decay, **options)
        train(item, 1)
        steps.append({name: value - start[name] for name, value in weights(item).items() if name.startswith("model ")})
    for depth, name in enumerate(("logits/kernel", *(f"tiny_conv{i}/kernel" for i in (3, 2, 1, 0)))):
        plain, decayed = (step[f"model {name}"] for step in steps)
        np.testing.assert_allclose(decayed, plain * 0.5**depth, rtol=1e-3, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_learns_and_validates_every_image_once() -> None:
    item = make(64, 13, learning_rate=0.01, findings=("Mass", "Effusion"))
    assert item.findings == ("Effusion", "Mass")
    assert item.columns == [loop.LABELS.index(name) for name in item.findings]
    train(item, 6)
    probabilities, result = item.validate()
    assert probabilities.shape == (13, 2)
    assert result["findings"]["Effusion"]["auroc"] == 1.0


#: Everything that has a state or is drawn at random: both stages, dropout, EMA, a schedule, augmentation.
STAGES: dict[str, Any] = {"warmup_epochs": 1, "schedule": "plateau", "epochs": 4, "frozen_epochs": 1}
EVERYTHING = STAGES | {"dropout": 0.4, "dense": (8,), "ema": 0.8, "shift": 0.1, "rotation": 5.0, "n_train": 29}
EVERYTHING |= {"batch_size": 4, "accumulate": 2, "mixup": 0.4, "layer_decay": 0.7}


@functools.cache
def train_uninterrupted(policy: str) -> tuple[dict[str, np.ndarray], TrainState]:
    item = make(policy=policy, **EVERYTHING)
    progress = train(item, 2)
    return weights(item), progress


@pytest.mark.slow
@pytest.mark.parametrize(
    ("done", "steps", "policy"), [(0, 2, "float32"), (1, 0, "float32"), (1, 2, "float32"), (1, 2, "mixed_float16")]
)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(done: int, steps: int, policy: str, tmp_path) -> None:
    """The second part knows only the checkpoint: during an epoch, between the stages, and with a loss scale."""
    first = make(policy=policy, checkpoint_steps=2, **EVERYTHING)
    progress = train(first, done)

    if steps:
        with pytest.raises(KeyboardInterrupt):
            first.run_epoch(progress, on_checkpoint=Mock(side_effect=KeyboardInterrupt))
    assert len(progress.losses) == steps
    first.save(tmp_path)
    second = make(policy=policy, **EVERYTHING)
    second.restore(tmp_path, progress)
    expected, end = train_uninterrupted(policy)
    assert train(second, 2 - done, progress) == end
    assert_equal(weights(second), expected)


def test_a_frozen_backbone_keeps_every_bit_and_learns_later(eager) -> None:
    item = make(8, 4, frozen_epochs=1, frozen_learning_rate=0.5, dense=(8,), optimizer="sgd")
    start = weights(item)
    progress = train(item, 1)
    assert_equal(weights(item), start, "model tiny_")
    assert rate(item) == 0.5
    assert np.abs(weights(item)["model head_dense0/kernel"] - start["model head_dense0/kernel"]).max() > 1e-5
    train(item, 1, progress)
    assert np.abs(weights(item)[KERNEL] - start[KERNEL]).max() > 1e-7
    assert rate(item) == pytest.approx(1e-4)


def test_ema_is_the_recursion_over_the_weights_of_every_step(eager) -> None:
    # With a callback, every step is finished before the next one.
    item = make(ema=0.5, optimizer="sgd", learning_rate=0.1, callbacks=[LambdaCallback()])
    start, seen = weights(item)[KERNEL], []
    with item.optimizer.use_average():  # without a step there is no average
        np.testing.assert_array_equal(weights(item)[KERNEL], start)
    item.run_epoch(TrainState(), on_step=lambda step, loss: seen.append(weights(item)[KERNEL]))
    expected = seen[0]
    for value in seen[1:]:
        expected = 0.5 * expected + 0.5 * value
    with item.optimizer.use_average():
        np.testing.assert_allclose(weights(item)[KERNEL], expected, rtol=1e-5)
    np.testing.assert_array_equal(weights(item)[KERNEL], seen[-1])
    assert np.abs(expected - seen[-1]).max() > 1e-5


def test_an_epoch_counts_its_steps_and_images(monkeypatch) -> None:
    item = make(29, 4)
    monkeypatch.setattr(item, "_train_step", lambda *_: 0.5)
    assert item.steps_per_epoch == 4
    assert item.run_epoch(TrainState()).images == 29
    assert item.run_epoch(TrainState(losses=[0.5] * 3)).images == 5, "a resumed epoch has its last batch left"
    assert [make(n, 4, steps_per_epoch=2).steps_per_epoch for n in (29, 5)] == [2, 1]


def test_stock_callbacks_run_and_take_effect(tmp_path, eager) -> None:
    batches: list[int] = []
    record = LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch if logs["loss"] > 0 else -1))
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    fall = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", patience=1, factor=0.1)
    stop = keras.callbacks.EarlyStopping(monitor="val_auroc", mode="max", patience=1)
    item = make(16, 4, callbacks=[record, fall, stop, log], learning_rate=0.01)
    item.callbacks.on_train_begin()
    progress = TrainState()
    for epoch, (loss, auroc) in enumerate([(0.5, 0.6), (0.6, 0.7), (0.7, 0.65)]):
        item.start_epoch(progress)
        train(item, 1, progress)
        assert not item.is_stop_requested()
        item.callbacks.on_epoch_end(epoch, {"val_loss": loss, "val_auroc": auroc})
    assert batches == [0, 1] * 3
    assert rate(item) == pytest.approx(1e-4, rel=1e-5), "the rate falls after the second and the third epoch"
    assert item.is_stop_requested()
    item.callbacks.on_train_end()
    assert (tmp_path / "log.csv").read_text(encoding="utf-8").count("\n") == 4


def test_a_callback_sets_the_learning_rate_from_the_first_epoch_and_after_a_resume(tmp_path, eager) -> None:
    def start() -> loop.Loop:
        scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: [0.5, 0.25, 0.2, 0.1][epoch])
        return make(8, 4, callbacks=[scheduler], optimizer="sgd", frozen_epochs=2, frozen_learning_rate=0.01, epochs=4)

    item, progress, seen = start(), TrainState(), []
    for _ in range(3):
        item.start_epoch(progress)
        train(item, 1, progress)
        seen.append(rate(item))
    assert seen == pytest.approx([0.5, 0.25, 0.2])
    item.save(tmp_path)
    resumed = start()
    resumed.restore(tmp_path, progress)
    train(resumed, 1, progress)  # without `start_epoch`, and so without the callback
    assert rate(resumed) == pytest.approx(0.2)


def test_a_callback_may_set_weights_between_epochs(eager) -> None:
    item = make(8, 4, learning_rate=1e-6)
    progress = train(item, 1)
    kernel = item.model.get_layer("logits").kernel
    kernel.assign(np.full(kernel.shape, 3.0, np.float32))
    train(item, 1, progress)
    np.testing.assert_allclose(np.asarray(kernel), 3.0, atol=1e-3)


@pytest.mark.parametrize(
    ("hook", "batch", "value", "message"),
    [
        ("on_train_batch_begin", 0, np.nan, "the loss is nan at epoch 1, step 1"),
        # The loss shows only the weights before a step: the last step can spoil them unseen.
        ("on_train_batch_end", 1, np.inf, "weights of logits/kernel are not finite at epoch 1, step 2"),
    ],
)
def test_numbers_that_are_not_finite_end_the_run_with_step_and_images(hook, batch, value, message: str, eager) -> None:
    def spoil(number: int, logs: object) -> None:
        kernel = item.model.get_layer("logits").kernel
        if number == batch:
            kernel.assign(np.full(kernel.shape, value, np.float32))

    item = make(16, 4, callbacks=[LambdaCallback(**{hook: spoil})], optimizer="sgd")
    with pytest.raises(RayCxrError, match=message) as caught:
        item.run_epoch(TrainState())
    assert str(caught.value).count("_000.png") == 8
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_mixed_precision_is_validated_as_it_is_exported(tmp_path) -> None:
    """Computed in half precision, kept and validated in float32, as a bundle built from the weights alone is."""
    item = make(policy="mixed_bfloat16", learning_rate=0.01)
    assert [item.model.get_layer(name).compute_dtype for name in ("tiny_conv1", "logits")] == ["bfloat16", "float32"]
    assert {variable.dtype for variable in item.model.trainable_variables} == {"float32"}
    assert keras.config.dtype_policy().name == "float32", "the policy must not stay behind"
    train(item, 1)
    probabilities, _ = item.validate()
    item.model.save_weights(str(tmp_path / "w.weights.h5"))
    plain = classifier.build(Architecture.of(item.settings, SIZE))
    plain.load_weights(str(tmp_path / "w.weights.h5"))
    images = item.val.images.pixels[..., None]
    np.testing.assert_allclose(np.asarray(plain(images, training=False)), probabilities, atol=1e-6)


def test_selection_uses_the_macro_auroc_without_no_finding_and_else_the_loss() -> None:
    values, p = np.array([[1], [1]], dtype=np.int8), np.float32([[0.9], [0.8]])
    result = loop.evaluate(values, p, ("Effusion",))
    assert result == {"findings": {"Effusion": {"n": 2, "positives": 2, "auroc": None}}, "macro_auroc": None}
    assert loop.compute_cross_entropy(p, values) == pytest.approx(-np.log(0.9 * 0.8) / 2, rel=1e-6)
    assert loop.compute_cross_entropy(p, -values) is None
    values, p = np.array([[1, 0], [0, 1]], dtype=np.int8), np.float32([[0.9, 0.9], [0.1, 0.1]])
    result = loop.evaluate(values, p, ("Effusion", "No_Finding"))
    assert (result["findings"]["No_Finding"]["auroc"], result["macro_auroc"]) == (0.0, 1.0)
    scores = [loop.compute_selection_score(*case) for case in ((0.5, 0.7), (None, 0.7), (None, None))]
    assert scores == [0.5, -0.7, -np.inf]
