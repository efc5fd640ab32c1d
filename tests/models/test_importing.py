"""Import of weights files that Keras writes in each of its formats."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from test_bundle import run_python

from ray_cxr.errors import ConfigError, OutputError
from ray_cxr.labels import FINDINGS
from ray_cxr.models import classifier, importing
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import Bundle
from ray_cxr.storage import run_folder

SIZE = 64
#: The order of a well-known training script, unlike ours; outputs must keep their own order.
ORDER = (
    "Atelectasis,Cardiomegaly,Effusion,Infiltrate,Mass,Nodule,Pneumonia,Pneumothorax,Consolidation,Edema,Emphysema,"
    "Fibrosis,Pleural Thickening,Hernia"
)


def change_weights(layers: Iterable[keras.layers.Layer]) -> None:
    """Make all variables different, so that swapped ones, e.g. gamma and variance, are noticed."""
    rng = np.random.default_rng(0)
    for layer in layers:
        if layer.weights:
            layer.set_weights([w + rng.uniform(0.1, 0.5, w.shape).astype(np.float32) for w in layer.get_weights()])


@pytest.fixture(scope="module", params=[False, True], ids=["flat", "nested"])
def stock(request: pytest.FixtureRequest) -> keras.Model:
    """Build the usual third-party model: a stock backbone, global average pooling and one dense layer."""
    keras.utils.set_random_seed(3)
    options = {"include_top": False, "weights": None, "pooling": "avg"}
    base = keras.applications.MobileNetV3Small(input_shape=(SIZE, SIZE, 3), **options)
    inputs = keras.Input((SIZE, SIZE, 3)) if request.param else base.input
    features = base(inputs) if request.param else base.output
    model = keras.Model(inputs, keras.layers.Dense(14, activation="sigmoid", name="predictions")(features))
    change_weights(layer for layer in base.layers if isinstance(layer, keras.layers.BatchNormalization))
    return model


@pytest.fixture(scope="module")
def tiny() -> keras.Model:
    """Build a small model with our layer names, for tests that do not depend on the backbone."""
    model = classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=FINDINGS))
    change_weights(model.layers)
    return model


def load(path: Path, out: Path, findings: tuple[str, ...] = FINDINGS, backbone: str = "TinyCNN") -> Bundle:
    options = importing.ImportOptions(outputs=findings, size=SIZE)
    return importing.import_weights(path, out, backbone=backbone, options=options)


def assert_imported(path: Path, theirs: keras.Model) -> None:
    """Import into a TinyCNN as `import_weights` does, without writing a bundle, and compare all weights."""
    ours = classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=FINDINGS))
    classifier.load_third_party_weights(ours, path, len(FINDINGS), range(len(FINDINGS)))
    for one, other in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_imported_model_equals_the_original(stock: keras.Model, tmp_path: Path) -> None:
    stock.save(tmp_path / "m.keras")
    findings = importing.parse_findings(ORDER)
    assert findings == tuple(ORDER.replace("Infiltrate", "Infiltration").replace(" ", "_").split(","))
    bundle = load(tmp_path / "m.keras", tmp_path / "bundle", findings, "MobileNetV3Small")
    gray = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE), dtype=np.uint8)
    rgb = np.repeat(gray[..., None], 3, axis=-1).astype(np.float32)
    theirs = np.asarray(stock(keras.applications.mobilenet_v3.preprocess_input(rgb)))
    frame = bundle.predict(gray, precision="fp32")
    assert bundle.findings == findings
    np.testing.assert_allclose(frame[[f"p_{n}" for n in findings]].to_numpy(), theirs, rtol=1e-4, atol=1e-5)
    assert np.ptp(theirs) > 0
    assert frame[[f"c_{n}" for n in findings] + [f"flag_{n}" for n in findings]].isna().all(axis=None)
    # The other formats of Keras 3 and whole-model HDF5 hold the same numbers.
    expected = classifier.stored_arrays(tmp_path / "m.keras")
    for name in ("m.h5", "m.weights.h5"):
        stock.save_weights(tmp_path / name) if "weights" in name else stock.save(tmp_path / name)
        found = classifier.stored_arrays(tmp_path / name)
        assert {key for key, arrays in found.items() if arrays} == set(expected)
        for key, arrays in expected.items():
            for one, other in zip(found[key], arrays, strict=True):
                np.testing.assert_array_equal(one, other)


def legacy_h5(model: keras.Model, path: Path, *, whole: bool, slashes: bool = False, nested: bool = False) -> None:
    """Write the HDF5 layout of Keras 1 and 2: one group per layer, or one for the whole backbone."""

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
            layer_group = group.create_group(name)
            # Trainable variables come first in the group, moving statistics last.
            weights = [(layer, w) for layer in layers for w in layer.trainable_weights]
            weights += [(layer, w) for layer in layers for w in layer.non_trainable_weights]
            named = {f"{old(layer.name)}/{weight.name}:0": weight for layer, weight in weights}
            layer_group.attrs["weight_names"] = [text.encode() for text in named]
            for text, weight in named.items():
                layer_group.create_dataset(text, data=np.asarray(weight))


@pytest.mark.parametrize("slashes", [False, True], ids=["conv1_conv", "conv1/conv"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "weights"])
def test_files_of_keras_2_are_read(tiny: keras.Model, tmp_path: Path, whole: bool, nested: bool, slashes: bool) -> None:
    legacy_h5(tiny, tmp_path / "old.h5", whole=whole, slashes=slashes, nested=nested)
    assert_imported(tmp_path / "old.h5", tiny)


def test_file_that_does_not_fit_is_refused(tiny: keras.Model, tmp_path: Path) -> None:
    path, out = tmp_path / "m.weights.h5", tmp_path / "b"
    tiny.save_weights(path)
    with pytest.raises(ConfigError, match="14 columns, but 15 findings"):
        load(path, out, importing.parse_findings("15"))
    for more, reason in (({"dense": (8,)}, "head_dense0.*another backbone"), ({"pooling": "avgmax"}, "192 features")):
        other = classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=FINDINGS, **more))
        with pytest.raises(ConfigError, match=reason):
            classifier.load_third_party_weights(other, path, len(FINDINGS), range(len(FINDINGS)))
    with pytest.raises(ConfigError, match=r"nowhere\.h5"):
        load(tmp_path / "nowhere.h5", out)
    for content in (b"", b"not hdf5 at all", b"PK\x05\x06" + bytes(18)):
        (tmp_path / "m.h5").write_bytes(content)
        with pytest.raises(ConfigError, match=r"m\.h5"):
            load(tmp_path / "m.h5", out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(OutputError, match=str(out)):
        load(path, out)
    assert list(out.iterdir()) == []


def test_code_in_a_keras_file_never_runs(tiny: keras.Model, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    payload = json.dumps({"module": "os", "class_name": "system", "config": {"command": f"touch {ran}"}})
    x = keras.layers.Lambda(lambda t: t, name="payload")(tiny.output)
    keras.Model(tiny.input, x).save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as source, zipfile.ZipFile(tmp_path / "evil.keras", "w") as sink:
        for name in source.namelist():
            sink.writestr(name, payload if name == "config.json" else source.read(name))
    assert_imported(tmp_path / "evil.keras", tiny)
    assert not ran.exists()


@pytest.mark.long
def test_import_and_predict_work_with_the_instructions_of_an_older_cpu(tmp_path: Path) -> None:
    """OpenVINO can report bf16 and lack a kernel for it."""
    model = classifier.build(Architecture(backbone="TinyCNN", size=SIZE, findings=FINDINGS))
    model.save_weights(tmp_path / "m.weights.h5")
    code = (
        "import sys, numpy as np, ray_cxr\n"
        "from ray_cxr.cli import main\n"
        "source, out = sys.argv[1:]\n"
        "given = ['--backbone', 'TinyCNN', '--findings', '14', '--size', '64', '--out', out]\n"
        "assert main(['import-weights', source, *given]) == 0\n"
        "p = ray_cxr.load_bundle(out).predict(np.zeros((2, 64, 64), 'uint8')).filter(regex='^p_').to_numpy()\n"
        "assert p.shape == (2, 14) and (0 < p).all() and (p < 1).all(), p\n"
    )
    run_python("-c", code, tmp_path / "m.weights.h5", tmp_path / "b", ONEDNN_MAX_CPU_ISA="AVX2")


def test_an_existing_or_locked_bundle_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    weights, out = tmp_path / "m.h5", tmp_path / "b"
    weights.write_bytes(b"no weights")
    with (
        run_folder.lock_bundle(out, "import-weights"),
        pytest.raises(OutputError, match=rf"{out}: `ray-cxr import-weights` \(process \d+ on .*\) is writing here"),
    ):
        load(weights, out)
    out.mkdir()
    with pytest.raises(OutputError, match=f"{out}: exists already"):
        load(weights, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "m.h5"]
