"""Every backbone is flat and normalises exactly as keras.applications requires."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def architecture(backbone: str = "TinyCNN", **more: Any) -> Architecture:
    return Architecture(**{"backbone": backbone, "size": SIZE, "findings": FINDINGS, **more})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[keras.Model, Path]:
    """A TinyCNN whose outputs are in reverse order, and its weights file."""
    model = classifier.build(architecture(findings=tuple(reversed(FINDINGS))))
    path = tmp_path_factory.mktemp("weights") / "source.weights.h5"
    model.save_weights(str(path))
    return model, path


@pytest.mark.parametrize("backbone", APPLICATIONS)
def test_normalisation_equals_preprocess_input(backbone: str) -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    info = backbones.BACKBONES[backbone]
    ours = np.asarray(backbones.GrayToInput(info.scale, info.offset)(gray))
    theirs = APPLICATIONS[backbone].preprocess_input(np.repeat(gray, 3, axis=-1).astype(np.float32))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1.0, np.abs(theirs).max() / 10))


LARGE = [pytest.param(name, marks=pytest.mark.long) for name in ("ResNet50", "DenseNet121", "EfficientNetV2B0")]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["MobileNetV3Small", *LARGE])
def test_features_equal_the_stock_model_on_preprocessed_rgb(backbone: str) -> None:
    model = classifier.build(architecture(backbone))
    assert not [layer.name for layer in model.layers if isinstance(layer, keras.Model)]
    stock = getattr(keras.applications, backbone)(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    for layer in stock.layers:
        if layer.weights:
            layer.set_weights(model.get_layer(layer.name).get_weights())
    gray = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 1), dtype=np.uint8)
    ours, out = keras.Model(model.input, [model.get_layer("pool").input, model.output])(gray)
    rgb = np.repeat(gray, 3, axis=-1).astype(np.float32)
    theirs = np.asarray(stock(APPLICATIONS[backbone].preprocess_input(rgb)))
    assert np.ptp(theirs) > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    assert (out.shape, out.dtype) == ((2, 14), np.float32)
    assert ((np.asarray(out) > 0) & (np.asarray(out) < 1)).all()


def test_all_backbones_are_offered_and_constructed_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(backbones.BACKBONES) == list(TrainSettings.model_fields["backbone"].annotation.__args__)
    calls: list[dict[str, Any]] = []

    def construct(*, input_tensor: Any, **given: Any) -> SimpleNamespace:
        calls.append(given)
        return SimpleNamespace(output=input_tensor)

    for name in APPLICATIONS:
        monkeypatch.setattr(keras.applications, name, construct)
        assert classifier.build(architecture(name)).output.shape == (None, 14)
        options = {"include_preprocessing": True} if name in ("EfficientNetV2B0", "MobileNetV3Small") else {}
        assert calls.pop() == {"include_top": False, "weights": None, **options}


def test_head_follows_the_architecture() -> None:
    model = classifier.build(architecture(findings=LABELS, pooling="avgmax", dense=(32, 8), dropout=0.25))
    assert {"head_dropout0", "head_dropout1"} <= {layer.name for layer in model.layers}
    assert model.get_layer("head_dense0").kernel.shape == (2 * 96, 32)
    assert model.get_layer("head_dense1").kernel.shape == (32, 8)
    assert model.get_layer("head_dropout").rate == 0.25
    assert model.output.shape == (None, 15)


def test_unavailable_imagenet_weights_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TinyCNN has no 'imagenet' weights"):
        classifier.build(architecture(), weights="imagenet")

    def refuse(*_: object, weights: str, **__: object) -> None:
        raise Exception(f"URL fetch failure on https://example.invalid/{weights}.h5: -- no network\nmore")

    monkeypatch.setenv("HOME", str(tmp_path))  # Keras keeps its downloads there
    monkeypatch.setattr(keras.applications, "DenseNet121", refuse)
    with pytest.raises(ConfigError, match=r"^[^\n]*DenseNet121[^\n]*weights=none[^\n]*$"):
        classifier.build(architecture("DenseNet121"), weights="imagenet")


def test_weights_of_a_file_initialize_the_backbone_and_known_outputs(source: tuple[keras.Model, Path]) -> None:
    theirs, path = source
    model = classifier.build(architecture())
    fresh = model.get_layer("logits").get_weights()[0]
    # A file does not name its outputs, so none is copied although the shapes agree.
    assert classifier.initialize_weights(model, architecture(), path) == [f"logits of {name}" for name in FINDINGS]
    np.testing.assert_array_equal(model.get_layer("logits").get_weights()[0], fresh)
    for name in ("tiny_conv0", "tiny_bn3"):
        for a, b in zip(model.get_layer(name).get_weights(), theirs.get_layer(name).get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    # Outputs of known order are copied by name.
    model = classifier.build(architecture(findings=LABELS))
    known = tuple(reversed(FINDINGS))
    assert classifier.initialize_weights(model, architecture(findings=LABELS), path, known) == ["logits of No_Finding"]
    for ours, other in zip(*(part.get_layer("logits").get_weights() for part in (model, theirs)), strict=True):
        order = [known.index(name) for name in FINDINGS]
        np.testing.assert_array_equal(ours[..., : len(order)], other[..., order])


def test_weights_of_another_backbone_are_refused(source: tuple[keras.Model, Path]) -> None:
    _, path = source
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="conv1"), keras.layers.Dense(2)])
    with pytest.raises(ConfigError, match=r"'conv1'.*another backbone"):
        classifier.initialize_weights(other, architecture("MobileNetV3Small"), path)
