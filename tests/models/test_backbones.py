"""Every backbone is flat, and normalises exactly as keras.applications says it must."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from ray_cxr.config import TrainSettings
from ray_cxr.errors import ConfigError
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.models import backbones, classifier
from ray_cxr.models.architecture import Architecture

APPLICATIONS = {
    "ResNet50": keras.applications.resnet50,
    "ResNet50V2": keras.applications.resnet_v2,
    "DenseNet121": keras.applications.densenet,
    "DenseNet169": keras.applications.densenet,
    "EfficientNetV2B0": keras.applications.efficientnet_v2,
    "MobileNetV3Small": keras.applications.mobilenet_v3,
}
SIZE = 64


def build(backbone: str, **more: object) -> keras.Model:
    return classifier.build(Architecture(backbone=backbone, size=SIZE, findings=FINDINGS, **more))


def test_the_list_is_what_the_settings_offer() -> None:
    assert list(backbones.BACKBONES) == list(TrainSettings.model_fields["backbone"].annotation.__args__)


@pytest.mark.parametrize("backbone", APPLICATIONS)
def test_normalisation_equals_preprocess_input(backbone: str) -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    info = backbones.BACKBONES[backbone]
    ours = np.asarray(backbones.GrayToInput(info.scale, info.offset)(gray))
    theirs = APPLICATIONS[backbone].preprocess_input(np.repeat(gray, 3, axis=-1).astype(np.float32))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1.0, np.abs(theirs).max() / 10))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["ResNet50", "DenseNet121", "EfficientNetV2B0", "MobileNetV3Small"])
def test_features_equal_the_stock_network_on_preprocessed_rgb(backbone: str) -> None:
    """The whole way: our flat graph on gray uint8 against keras.applications on its own preprocess_input."""
    model = build(backbone)
    stock = getattr(keras.applications, backbone)(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    ours_by_name = {layer.name: layer for layer in model.layers if layer.weights}
    for layer in stock.layers:
        if layer.weights:
            layer.set_weights(ours_by_name[layer.name].get_weights())
    gray = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 1), dtype=np.uint8)
    features = keras.Model(model.input, model.get_layer("pool").input)
    rgb = np.repeat(gray, 3, axis=-1).astype(np.float32)
    theirs = np.asarray(stock(APPLICATIONS[backbone].preprocess_input(rgb)))
    ours = np.asarray(features(gray))
    assert np.ptp(theirs) > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("backbone", ["ResNet50V2", "DenseNet169", "TinyCNN"])
def test_is_flat_and_gives_one_probability_per_finding(backbone: str) -> None:
    model = build(backbone)
    assert not [layer.name for layer in model.layers if isinstance(layer, keras.Model)]
    out = np.asarray(model(np.zeros((2, SIZE, SIZE, 1), np.uint8)))
    assert out.shape == (2, 14)
    assert out.dtype == np.float32
    assert ((out > 0) & (out < 1)).all()


def test_head_is_as_asked() -> None:
    model = classifier.build(
        Architecture(backbone="TinyCNN", size=SIZE, findings=LABELS, pooling="avgmax", dense=(32, 8), dropout=0.25)
    )
    names = [layer.name for layer in model.layers]
    assert {"head_dropout0", "head_dense0", "head_dropout1", "head_dense1", "head_dropout"} <= set(names)
    assert model.get_layer("head_dense0").kernel.shape == (2 * 96, 32)
    assert model.get_layer("head_dense1").kernel.shape == (32, 8)
    assert model.get_layer("head_dropout").rate == 0.25
    assert model.output.shape == (None, 15)


def test_unknown_weights_of_our_own_net_are_refused() -> None:
    with pytest.raises(ConfigError, match="TinyCNN has no 'imagenet' weights"):
        classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=FINDINGS), weights="imagenet")


def test_imagenet_is_asked_of_keras_and_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: object, weights: str | None, **__: object) -> None:
        asked.append(weights)
        raise Exception("URL fetch failure on https://example.invalid/w.h5: -- no network\nmore")

    monkeypatch.setattr(keras.applications, "DenseNet121", refuse)
    with pytest.raises(ConfigError) as caught:
        classifier.build(Architecture(backbone="DenseNet121", size=SIZE, findings=FINDINGS), weights="imagenet")
    assert asked == ["imagenet"]
    assert "weights=none" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_start_from_a_file_takes_the_backbone_and_says_what_stayed_random(tmp_path) -> None:
    source = build("TinyCNN")
    path = tmp_path / "source.weights.h5"
    source.save_weights(str(path))
    architecture = Architecture(backbone="TinyCNN", size=SIZE, findings=FINDINGS)
    model = classifier.build(architecture)
    fresh = model.get_layer("logits").get_weights()[0]
    # A file does not say what its outputs are: none is taken, although the shapes agree.
    assert classifier.initialise(model, architecture, path) == [f"logits of {name}" for name in FINDINGS]
    np.testing.assert_array_equal(model.get_layer("logits").get_weights()[0], fresh)
    for name in ("tiny_conv0", "tiny_bn3"):
        for a, b in zip(model.get_layer(name).get_weights(), source.get_layer(name).get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_outputs_of_known_order_are_taken_by_name(tmp_path) -> None:
    """A bundle's outputs in another order, and another choice of them: each finding gets its own column."""
    order = tuple(reversed(FINDINGS))
    source = classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=order))
    path = tmp_path / "source.weights.h5"
    source.save_weights(str(path))
    architecture = Architecture(backbone="TinyCNN", size=SIZE, findings=LABELS)
    model = classifier.build(architecture)
    assert classifier.initialise(model, architecture, path, order) == ["logits of No_Finding"]
    ours, theirs = (item.get_layer("logits").get_weights() for item in (model, source))
    for j, name in enumerate(FINDINGS):
        np.testing.assert_array_equal(ours[0][:, j], theirs[0][:, order.index(name)])
        assert ours[1][j] == theirs[1][order.index(name)]


def test_start_from_a_file_of_another_backbone_is_refused(tmp_path) -> None:
    path = tmp_path / "source.weights.h5"
    build("TinyCNN").save_weights(str(path))
    architecture = Architecture(backbone="MobileNetV3Small", size=SIZE, findings=FINDINGS)
    with pytest.raises(ConfigError, match="is it for MobileNetV3Small"):
        classifier.initialise(classifier.build(architecture), architecture, path)
