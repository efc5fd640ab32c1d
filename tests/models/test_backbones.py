"""Every backbone is flat and normalises exactly as keras.applications requires."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from ray_cxr.config import TrainSettings
from ray_cxr.errors import ConfigError
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.models import backbones, classifier, torch_weights
from ray_cxr.models.architecture import Architecture

APPLICATIONS = {
    "ResNet50": keras.applications.resnet50,
    "ResNet50V2": keras.applications.resnet_v2,
    "DenseNet121": keras.applications.densenet,
    "DenseNet169": keras.applications.densenet,
    "DenseNet201": keras.applications.densenet,
    "EfficientNetV2B0": keras.applications.efficientnet_v2,
    "EfficientNetV2S": keras.applications.efficientnet_v2,
    "ConvNeXtTiny": keras.applications.convnext,
    "MobileNetV3Small": keras.applications.mobilenet_v3,
}
#: Backbones that keras.applications normalises itself, and whether ours keep it.
INSIDE = {"EfficientNetV2B0": True, "EfficientNetV2S": False, "ConvNeXtTiny": False, "MobileNetV3Small": True}
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


@pytest.mark.parametrize("backbone", [name for name in APPLICATIONS if INSIDE.get(name, True)])
def test_normalisation_equals_preprocess_input(backbone: str) -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    info = backbones.BACKBONES[backbone]
    ours = np.asarray(backbones.GrayToInput(info.scale, info.offset)(gray))
    theirs = APPLICATIONS[backbone].preprocess_input(np.repeat(gray, 3, axis=-1).astype(np.float32))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1.0, np.abs(theirs).max() / 10))


NEW = ("DenseNet201", "EfficientNetV2S", "ConvNeXtTiny")
LARGE = [pytest.param(name, marks=pytest.mark.long) for name in ("ResNet50", "DenseNet121", "EfficientNetV2B0", *NEW)]


def flatten(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers with weights, also of nested models."""
    layers = [inner for layer in model.layers for inner in getattr(layer, "layers", [layer])]
    return [layer for layer in layers if layer.weights]


def describe_weights(layer: keras.layers.Layer) -> list[Any]:
    """Return what a file of weights names: class of the layer, names and shapes of its weights."""
    return [type(layer).__name__, *((re.sub(r"_\d+$", "", v.name), tuple(v.shape)) for v in layer.weights)]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["MobileNetV3Small", *LARGE])
def test_features_equal_the_stock_model_on_preprocessed_rgb(backbone: str) -> None:
    keras.utils.set_random_seed(0)  # some random weights of ResNet50 saturate the outputs
    model = classifier.build(architecture(backbone))
    assert not [layer.name for layer in model.layers if isinstance(layer, keras.Model)]
    for layer in model.layers:
        if layer.name.endswith("layer_scale"):  # of ConvNeXt: 1e-6 would hide its blocks
            layer.set_weights([np.ones_like(value) for value in layer.get_weights()])
    stock = getattr(keras.applications, backbone)(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3))
    for layer in flatten(stock):
        ours = model.get_layer(re.sub("(?<=normalization)_.*", "", layer.name))
        assert describe_weights(ours) == describe_weights(layer), "files of weights would not fit"
        layer.set_weights(ours.get_weights())
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
        return SimpleNamespace(output=input_tensor, layers=[])

    for name in APPLICATIONS:
        monkeypatch.setattr(keras.applications, name, construct)
        assert classifier.build(architecture(name)).output.shape == (None, 14)
        options = {"include_preprocessing": INSIDE[name]} if name in INSIDE else {}
        assert calls.pop() == {"include_top": False, "weights": None, **options}


#: Stages below the head, from the first convolution on.
STAGES = {"ResNet50": 5, "ResNet50V1.5": 5, "ResNet50V2": 5, "TinyCNN": 4, "ConvNeXtTiny": 4}


@pytest.mark.long
@pytest.mark.parametrize("backbone", backbones.BACKBONES)
def test_stages_are_those_of_the_architecture(backbone: str) -> None:
    """Also at the smallest size, where the last feature map is one pixel, as after squeezing."""
    model = classifier.build(architecture(backbone, size=32, dense=(4,)))
    depths = classifier.compute_depths(model)
    found = [depths[layer.name] for layer in model.layers if layer.weights]
    assert (found[0], found[-2:], depths["pool"]) == (STAGES.get(backbone, 5), [0, 0], 1)
    assert found == sorted(found, reverse=True)
    assert set(found) == set(range(found[0] + 1))
    if backbone.startswith("DenseNet"):
        converted = [ours for _, ours, _ in torch_weights._list_densenet(backbone)]
        assert sorted(converted) == sorted(x.name for x in model.layers if x.weights and not classifier.is_head(x))


@pytest.mark.long
@pytest.mark.parametrize("backbone", NEW)
def test_imagenet_weights_of_keras_applications_are_loaded(backbone: str, tmp_path: Path, monkeypatch) -> None:
    """Keras finds a file in the format of its downloads, which another model of the class has written."""
    keras.utils.clear_session()  # names of layers are numbered in a process
    keras.utils.set_random_seed(1)
    stock = getattr(keras.applications, backbone)(include_top=False, weights=None)
    with h5py.File(tmp_path / "notop.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, stock)
    monkeypatch.setattr(keras.src.utils.file_utils, "get_file", lambda *_, **__: str(tmp_path / "notop.h5"))
    model = classifier.build(architecture(backbone), weights="imagenet")
    for layer in flatten(stock):
        ours = model.get_layer(re.sub("(?<=normalization)_.*", "", layer.name))
        for one, other in zip(ours.get_weights(), layer.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)
    # As in any run that starts from a file of the same backbone.
    other = classifier.build(architecture(backbone))
    assert classifier.initialize_weights(other, architecture(backbone), tmp_path / "notop.h5")[0].startswith("logits")
    pool, dense = keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(14, activation="sigmoid")
    keras.Model(stock.input, dense(pool(stock.output))).save(tmp_path / "m.keras")
    imported = classifier.build(architecture(backbone))
    classifier.load_third_party_weights(imported, tmp_path / "m.keras", 14, range(14))
    for one, *copies in zip(
        model.get_weights()[:-2], other.get_weights()[:-2], imported.get_weights()[:-2], strict=True
    ):
        for copied in copies:
            np.testing.assert_array_equal(one, copied)


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
