"""Somebody else's Keras files, made here by Keras itself in each of its formats."""

from __future__ import annotations

import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from ray_cxr.errors import ConfigError, OutputError
from ray_cxr.labels import FINDINGS, LABELS
from ray_cxr.models import classifier, importing
from ray_cxr.models.architecture import Architecture

SIZE = 64
BACKBONE = "MobileNetV3Small"
#: The order of a well-known training script, unlike ours; outputs must keep their own order.
ORDER = (
    "Atelectasis,Cardiomegaly,Effusion,Infiltrate,Mass,Nodule,Pneumonia,Pneumothorax,Consolidation,Edema,Emphysema,"
    "Fibrosis,Pleural Thickening,Hernia"
)


def somebodys(outputs: int = 14, *, nested: bool = False, backbone: str = BACKBONE) -> keras.Model:
    """A model as such projects build it: a stock backbone with global average pooling and one dense layer."""
    keras.utils.set_random_seed(3)
    make = getattr(keras.applications, backbone)
    if nested:
        base = make(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3), pooling="avg")
        inputs = keras.Input((SIZE, SIZE, 3))
        features = base(inputs)
    else:
        base = make(include_top=False, weights=None, input_shape=(SIZE, SIZE, 3), pooling="avg")
        inputs, features = base.input, base.output
    output = keras.layers.Dense(outputs, activation="sigmoid", name="predictions")(features)
    model = keras.Model(inputs, output)
    # Statistics that are not those of a fresh layer, so that a swap of gamma and variance would show.
    rng = np.random.default_rng(0)
    for layer in [*model.layers, *(base.layers if nested else [])]:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([w + rng.uniform(0.1, 0.5, w.shape).astype(np.float32) for w in layer.get_weights()])
    return model


def tiny(outputs: tuple[str, ...] = FINDINGS) -> keras.Model:
    """A quick net whose layers have names that ours have, for what does not depend on the backbone."""
    return classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=outputs))


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "nested"), [(".h5", True), (".keras", False), (".weights.h5", True)])
def test_imported_model_computes_what_the_original_did(tmp_path: Path, suffix: str, nested: bool) -> None:
    model = somebodys(nested=nested)
    path = tmp_path / f"theirs{suffix}"
    model.save_weights(path) if suffix == ".weights.h5" else model.save(path)
    bundle = importing.import_weights(
        path, tmp_path / "bundle", backbone=BACKBONE, findings=importing.parse_findings(ORDER), size=SIZE
    )
    gray = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)
    rgb = np.repeat(gray[..., None], 3, axis=-1).astype(np.float32)
    theirs = np.asarray(model(keras.applications.mobilenet_v3.preprocess_input(rgb)))
    frame = bundle.predict(gray, precision="fp32")
    names = [name.replace("Infiltrate", "Infiltration").replace(" ", "_") for name in ORDER.split(",")]
    assert bundle.findings == tuple(names)
    np.testing.assert_allclose(frame[[f"p_{n}" for n in names]].to_numpy(), theirs, rtol=1e-4, atol=1e-6)
    assert np.ptp(theirs) > 0
    assert frame[[f"c_{n}" for n in names] + [f"flag_{n}" for n in names]].isna().all(axis=None)


def legacy_h5(model: keras.Model, path: Path, *, whole: bool, slashes: bool = False, nested: bool = False) -> None:
    """The HDF5 layout of Keras 1 and 2: layer_names, weight_names, one group a layer (or one for the backbone)."""

    def old(name: str) -> str:
        return name.replace("tiny_", "tiny/", 1) if slashes else name

    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if whole else file
        backbone = [layer for layer in model.layers if layer.name.startswith("tiny_")]
        rest = [layer for layer in model.layers if layer not in backbone]
        groups = [("densenet121", backbone), *((layer.name, [layer]) for layer in rest)]
        if not nested:
            groups = [(old(layer.name), [layer]) for layer in model.layers]
        group.attrs["layer_names"] = [name.encode() for name, _ in groups]
        for name, layers in groups:
            one = group.create_group(name)
            # Trainable variables come first in such a group, moving statistics last.
            weights = [(layer, w) for layer in layers for w in layer.trainable_weights]
            weights += [(layer, w) for layer in layers for w in layer.non_trainable_weights]
            names = [f"{old(layer.name)}/{weight.name}:0" for layer, weight in weights]
            one.attrs["weight_names"] = [text.encode() for text in names]
            for text, (_, weight) in zip(names, weights, strict=True):
                one.create_dataset(text, data=np.asarray(weight))


@pytest.mark.parametrize("slashes", [False, True], ids=["conv1_conv", "conv1/conv"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "weights"])
def test_files_of_keras_2_are_read(tmp_path: Path, whole: bool, nested: bool, slashes: bool) -> None:
    model = tiny()
    rng = np.random.default_rng(0)
    for layer in model.layers:  # no two variables alike, so that a swap would show
        layer.set_weights([w + rng.uniform(0.1, 0.5, w.shape).astype(np.float32) for w in layer.get_weights()])
    legacy_h5(model, tmp_path / "old.h5", whole=whole, slashes=slashes, nested=nested)
    bundle = importing.import_weights(
        tmp_path / "old.h5", tmp_path / "bundle", backbone="TinyCNN", findings=FINDINGS, size=SIZE
    )
    gray = np.random.default_rng(1).integers(0, 256, (1, SIZE, SIZE), dtype=np.uint8)
    theirs = np.asarray(model(gray[..., None]))
    np.testing.assert_allclose(
        bundle.predict(gray, precision="fp32")[[f"p_{n}" for n in FINDINGS]].to_numpy(), theirs, rtol=1e-4, atol=1e-6
    )


def test_fifteen_outputs(tmp_path: Path) -> None:
    tiny(LABELS).save(tmp_path / "m.keras")
    bundle = importing.import_weights(
        tmp_path / "m.keras",
        tmp_path / "bundle",
        backbone="TinyCNN",
        findings=importing.parse_findings("15"),
        size=SIZE,
    )
    assert bundle.findings[-1] == "No_Finding"


def test_wrong_number_of_findings_is_refused(tmp_path: Path) -> None:
    tiny(LABELS).save(tmp_path / "m.keras")
    with pytest.raises(ConfigError, match="15 columns, but 14 findings"):
        importing.import_weights(tmp_path / "m.keras", tmp_path / "b", backbone="TinyCNN", findings=FINDINGS, size=SIZE)


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    tiny().save_weights(tmp_path / "m.weights.h5")
    with pytest.raises(ConfigError, match="another backbone"):
        importing.import_weights(
            tmp_path / "m.weights.h5", tmp_path / "b", backbone="ResNet50V2", findings=FINDINGS, size=SIZE
        )


@pytest.mark.parametrize("content", [b"", b"not hdf5 at all", b"PK\x05\x06" + bytes(18)])
def test_not_a_weights_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.h5").write_bytes(content)
    with pytest.raises(ConfigError):
        importing.import_weights(tmp_path / "m.h5", tmp_path / "b", backbone="TinyCNN", findings=FINDINGS, size=SIZE)


def test_existing_bundle_is_not_touched(tmp_path: Path) -> None:
    tiny().save_weights(tmp_path / "m.weights.h5")
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputError):
        importing.import_weights(
            tmp_path / "m.weights.h5", tmp_path / "b", backbone="TinyCNN", findings=FINDINGS, size=SIZE
        )


def test_code_in_a_keras_file_never_runs(tmp_path: Path) -> None:
    """A Lambda layer is code; only the numbers of the file are read, so it is neither run nor needed."""
    model = tiny()
    ran = tmp_path / "ran"
    x = keras.layers.Lambda(lambda t: t, name="payload")(model.output)
    keras.Model(model.input, x).save(tmp_path / "evil.keras")
    target = tmp_path / "payload.keras"
    with zipfile.ZipFile(tmp_path / "evil.keras") as source, zipfile.ZipFile(target, "w") as sink:
        for item in source.infolist():
            data = source.read(item)
            if item.filename == "config.json":
                data = (
                    b'{"module": "os", "class_name": "system", "config": {"command": "touch %s"}}' % str(ran).encode()
                )
            sink.writestr(item, data)
    importing.import_weights(target, tmp_path / "b", backbone="TinyCNN", findings=FINDINGS, size=SIZE)
    assert not ran.exists()


def test_findings_text() -> None:
    assert importing.parse_findings("14") == FINDINGS
    assert importing.parse_findings("Effusion, Mass") == ("Effusion", "Mass")
    for bad in ("13", "Effusion,Effusion", "Fracture", ","):
        with pytest.raises(ConfigError):
            importing.parse_findings(bad)
