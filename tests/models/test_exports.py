"""The exported files of a bundle: graph, golden images, quality statistics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import keras
import numpy as np
import pytest
from conftest import make_tiny_bundle
from test_bundle import reseal, writable_copy

from ray_cxr import load_bundle
from ray_cxr.errors import BundleError
from ray_cxr.evaluation import quality
from ray_cxr.imaging.phantom_anatomy import sample_anatomy
from ray_cxr.imaging.phantom_findings import draw_phantom
from ray_cxr.labels import FINDINGS
from ray_cxr.models import bundle as bundles
from ray_cxr.models import classifier, exports, runtime

pytestmark = pytest.mark.slow
SIZE = 64


def drawn(first: int, end: int) -> np.ndarray:
    """Draw radiographs of synthetic patients, uint8 [end - first,64,64]."""
    patients = range(first + 1, end + 1)
    return np.stack([draw_phantom(sample_anatomy(7, patient, 0, size=SIZE)) for patient in patients])


def write(out: Path, weights: Any = None, images: Any = None, **changes: Any) -> bundles.Bundle:
    """Write a bundle with two findings; without `weights`, all have the same random ones."""
    return make_tiny_bundle(out, weights, images, seed=4, findings=FINDINGS[:2], **changes)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return drawn(0, 110)


@pytest.fixture(scope="module")
def bundle(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> bundles.Bundle:
    """Write a bundle with 60 training and 30 validation images, as `train` does."""
    return write(tmp_path_factory.mktemp("exports") / "b", images=exports.SampleImages(images[:60], images[60:90]))


@pytest.fixture(scope="module")
def model(bundle: bundles.Bundle) -> keras.Model:
    return bundle.model()


@pytest.fixture(scope="module")
def fp32(bundle: bundles.Bundle) -> runtime.Runtime:
    return bundle.open_runtime("fp32", batch_size=16, threads=1)


def refuse_graphs(monkeypatch: pytest.MonkeyPatch, *refused: str) -> None:
    """Make OpenVINO fail for graphs in these precisions on a CPU with bf16; the error contains the graph's path."""
    opened = runtime.OpenVinoRuntime

    def open_graph(graph: Path, precision: str, *more: int) -> runtime.OpenVinoRuntime:
        if precision in refused:
            raise BundleError(f"{graph}: OpenVINO cannot run it: no such op")
        return opened(graph, precision, *more)

    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(runtime, "OpenVinoRuntime", open_graph)


def test_golden_images_are_drawn_and_the_file_holds_the_answers_of_keras(bundle, model: keras.Model) -> None:
    images = exports.golden_images(bundle.input_spec)
    assert (images.dtype, images.shape) == (np.uint8, (exports.GOLDEN_IMAGES, SIZE, SIZE))
    assert images.std(axis=(1, 2)).min() > 20
    assert len({image.tobytes() for image in images}) == len(images)
    with np.load(bundle.path / runtime.GOLDEN, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["images"], images)
        expected = model.predict(images[..., None], verbose=0)
        np.testing.assert_allclose(arrays["fp32"], expected, rtol=0, atol=1e-5)


def test_two_exports_of_the_same_weights_are_the_same_bytes(bundle: bundles.Bundle, images, tmp_path: Path) -> None:
    for _ in range(2):  # layer names that Keras numbers must not reach the graph
        classifier.build(bundle.architecture)
    sample = exports.SampleImages(images[:60], images[60:90])
    again = write(tmp_path / "b", bundle.path / bundles.WEIGHTS, sample)
    assert again.digest == bundle.digest


@pytest.mark.parametrize(
    ("has_bf16", "golden", "others", "drift", "accepted"),
    [
        (False, 0.0, 0.0, None, None),
        (True, 0.0, 0.019, 0.019, True),
        (True, 0.021, 0.0, 0.021, False),
        (True, 0.0, 0.021, 0.021, False),
    ],
)
def test_drift_is_measured_and_that_of_bf16_where_the_cpu_has_it(
    bundle, model, fp32, images, monkeypatch, tmp_path, has_bf16, golden, others, drift, accepted
) -> None:
    """A fake bf16 runtime is off by `golden` on the golden images and by `others` on the validation images."""

    def predict(pixels: np.ndarray) -> runtime.Outputs:
        found = fp32.predict(pixels)
        off = np.float32(golden if len(pixels) == exports.GOLDEN_IMAGES else others)
        return found._replace(probabilities=found.probabilities + off)

    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(runtime, "OpenVinoRuntime", lambda *_: SimpleNamespace(predict=predict))
    monkeypatch.setattr(exports, "_convert", lambda *_: fp32)
    sample = exports.SampleImages(images[:0], images[60:90])
    info = exports.export(tmp_path, model, bundle.architecture, bundle.input_spec, sample)
    assert info["runtimes"]["fp32"] == {
        "largest_drift": pytest.approx(0, abs=1e-5),
        "tolerance": 1e-3,
        "accepted": True,
    }
    expected = {"largest_drift": drift and pytest.approx(drift, abs=1e-5), "tolerance": 0.02, "accepted": accepted}
    assert info["runtimes"]["bf16"] == expected
    assert runtime.choose_precision(info, "auto", gpu=False) == ("bf16" if accepted else "fp32")


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [("bf16", "no such op"), ("all", "no such op"), ("drift", "off by"), ("import", "not installed")],
)
def test_bundle_whose_graph_is_refused_runs(model, images, monkeypatch, tmp_path: Path, obstacle, reason: str) -> None:
    """Without bf16 it runs in fp32, without any graph in Keras."""
    if obstacle == "drift":
        monkeypatch.setitem(runtime.TOLERANCE, "fp32", -1.0)
    elif obstacle == "import":
        monkeypatch.setattr(runtime, "import_openvino", Mock(side_effect=RuntimeError("not installed\nat 0x0")))
    else:
        refuse_graphs(monkeypatch, *(["bf16"] if obstacle == "bf16" else runtime.TOLERANCE))
    bundle = write(tmp_path / "b", images=exports.SampleImages(images[:60], images[60:90]))
    monkeypatch.undo()
    if obstacle == "bf16":
        bf16 = dict(bundle.info["runtimes"]["bf16"])
        refused = bf16.pop("reason")
        assert bf16 == {"largest_drift": None, "tolerance": 0.02, "accepted": None}
        assert bundle.info["runtimes"]["fp32"]["accepted"] is True
    else:
        refused = bundle.info["runtimes_refused"]
        assert "runtimes" not in bundle.info
        assert bundle.files == {*bundles.FILES, bundles.WEIGHTS, runtime.GOLDEN, exports.QUALITY}
    assert reason in refused
    assert "\n" not in refused
    assert str(tmp_path) not in refused
    found = load_bundle(bundle.path).predict(images[:3])[[f"p_{name}" for name in bundle.findings]].to_numpy()
    np.testing.assert_allclose(found, model.predict(images[:3, ..., None], verbose=0), rtol=0, atol=1e-5)


def test_weights_without_probabilities_make_no_bundle(bundle: bundles.Bundle, tmp_path: Path) -> None:
    broken = bundle.model()
    kernel, bias = broken.get_layer("logits").get_weights()
    broken.get_layer("logits").set_weights([kernel, bias * np.nan])
    with pytest.raises(BundleError, match=r"TinyCNN: .*not probabilities"):
        write(tmp_path / "b", broken)
    assert list(tmp_path.iterdir()) == []


def test_quality_is_read_as_fitted_and_flags_unusual_images(bundle: bundles.Bundle, images) -> None:
    fitted = bundle.quality
    assert fitted is not None
    assert (fitted.training, fitted.held_out) == (60, 30)
    assert bundle.info["quality"]["expected_rates"] == {name: fitted.expected_rates[name] for name in quality.JUDGED}
    noise = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE), dtype=np.uint8)
    frame = bundle.predict(np.concatenate([images[90:], 255 - images[90:], noise]), precision="fp32")
    flags = frame["quality_flag"].astype(object).where(frame["quality_flag"].notna(), None).tolist()
    assert flags[:20].count(None) >= 18
    assert flags[20:40].count("inverted") >= 18
    assert flags[40:] == ["not_frontal_chest"] * 2


def test_missing_quality_has_a_reason_and_damaged_is_refused(bundle, fp32, images, tmp_path: Path) -> None:
    none, few = exports.SampleImages(images[:0], images[:0]), exports.SampleImages(images[:40], images[:0])
    for sample, reason in ((None, "without images"), (none, "without images"), (few, "60 and 30")):
        entry = exports._fit_quality(tmp_path, fp32, sample)
        assert set(entry) == {"lacking"}
        assert reason in entry["lacking"]
    assert list(tmp_path.iterdir()) == []
    copy = writable_copy(bundle, tmp_path / "b")
    (copy / exports.QUALITY).write_bytes(b"PK\x03\x04")
    reseal(copy)
    with pytest.raises(BundleError, match=r"quality\.npz: damaged"):
        load_bundle(copy).predict(drawn(0, 1), precision="fp32")


def test_sample_depends_on_its_seed() -> None:
    images = np.arange(50, dtype=np.uint8)
    np.testing.assert_array_equal(exports.sample_images(images, 0, 50), images)
    first, again, other = (exports.sample_images(images, seed, 10).tolist() for seed in (0, 0, 1))
    assert len({*first}) == 10
    assert first == again != other
