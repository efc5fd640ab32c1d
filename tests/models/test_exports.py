"""What a bundle carries beside its weights: graph, golden images, what ordinary images look like."""

from __future__ import annotations

import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

from ray_cxr.config import InputSpec
from ray_cxr.data import phantoms
from ray_cxr.errors import BundleError
from ray_cxr.evaluation import quality
from ray_cxr.labels import FINDINGS
from ray_cxr.models import bundle as bundles
from ray_cxr.models import classifier, exports, runtime
from ray_cxr.models.architecture import Architecture

SIZE = 64


def drawn(first: int, end: int) -> np.ndarray:
    """Radiographs of synthetic patients, uint8 [end - first,64,64]."""
    return np.stack(
        [phantoms.draw(phantoms.anatomy(7, patient, 0, size=SIZE)) for patient in range(first + 1, end + 1)]
    )


def write(out: Path, **more: object) -> bundles.Bundle:
    """A TinyCNN of two findings with random weights."""
    names = FINDINGS[:2]
    architecture = Architecture(backbone="TinyCNN", size=SIZE, findings=names)
    keras.utils.set_random_seed(4)
    model = classifier.build(architecture)
    given = {
        "save_weights": lambda path: model.save_weights(str(path)),
        "architecture": architecture,
        "input_spec": InputSpec(size=SIZE),
        "calibration": dict.fromkeys(names),
        "operating_points": dict.fromkeys(names),
        "expected_flag_rates": dict.fromkeys(names),
        "provenance": {"origin": "made by a test", "initial_weights": "random"},
        "config_toml": "",
        "curves": [],
        "split": bundles.SPLIT_SCHEMA.empty_table(),
    }
    return bundles.write_bundle(out, **(given | more))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return drawn(0, 110)


@pytest.fixture(scope="module")
def bundle(images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> bundles.Bundle:
    """Made with sixty images to learn from and thirty held out, as `train` makes it."""
    return write(tmp_path_factory.mktemp("exports") / "b", ordinary=exports.Ordinary(images[:60], images[60:90]))


def test_golden_images_are_the_same_for_ever_and_no_patients() -> None:
    images = exports.golden_images(InputSpec(size=SIZE))
    assert (images.dtype, images.shape) == (np.uint8, (exports.GOLDEN_IMAGES, SIZE, SIZE))
    np.testing.assert_array_equal(images, exports.golden_images(InputSpec(size=SIZE)))
    assert images.std(axis=(1, 2)).min() > 20
    assert len({image.tobytes() for image in images}) == len(images)


def test_the_golden_file_holds_what_keras_says_of_them(bundle: bundles.Bundle) -> None:
    with np.load(bundle.path / runtime.GOLDEN, allow_pickle=False) as arrays:
        images, expected = arrays["images"], arrays["fp32"]
    np.testing.assert_array_equal(images, exports.golden_images(bundle.input_spec))
    found = bundle.model().predict(images[..., None], verbose=0)
    np.testing.assert_allclose(expected, found, rtol=0, atol=1e-6)


def test_two_exports_of_the_same_weights_are_the_same_bytes(bundle: bundles.Bundle, images, tmp_path: Path) -> None:
    for _ in range(2):  # names that Keras counts up must not reach the graph
        classifier.build(bundle.architecture)
    again = write(
        tmp_path / "b",
        save_weights=lambda path: shutil.copyfile(bundle.path / bundles.WEIGHTS, path),
        ordinary=exports.Ordinary(images[:60], images[60:90]),
    )
    assert again.digest == bundle.digest


def test_what_is_measured_stands_in_the_bundle_and_its_card(bundle: bundles.Bundle) -> None:
    fp32, bf16 = bundle.info["runtimes"]["fp32"], bundle.info["runtimes"]["bf16"]
    assert fp32["accepted"] is True
    assert fp32["largest_drift"] < 1e-5
    assert (fp32["tolerance"], bf16["tolerance"]) == (1e-3, 0.02)
    card = (bundle.path / "MODEL_CARD.md").read_text()
    assert f"- fp32: moves no probability by more than {fp32['largest_drift']:.2g}, of 0.001 allowed." in card
    if runtime.cpu_has_bf16():
        assert 0 < bf16["largest_drift"] <= 0.02
        assert f"- bf16: moves no probability by more than {bf16['largest_drift']:.2g}, of 0.02 allowed." in card
    assert "- Learned from 60 training images, limits from 30 others" in card


def test_a_machine_without_bf16_leaves_it_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    info = write(tmp_path / "b").info
    assert info["runtimes"]["bf16"] == {"largest_drift": None, "tolerance": 0.02, "accepted": None}
    assert "- bf16: not measured" in (tmp_path / "b" / "MODEL_CARD.md").read_text()
    assert runtime.choose_precision(info, "auto", gpu=False) == "fp32"


@pytest.mark.skipif(not runtime.cpu_has_bf16(), reason="this CPU does not compute in bf16")
def test_bf16_that_moves_too_far_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(runtime.TOLERANCE, "bf16", 1e-9)
    info = write(tmp_path / "b").info
    assert info["runtimes"]["bf16"]["accepted"] is False
    assert ": **refused**." in (tmp_path / "b" / "MODEL_CARD.md").read_text()
    assert runtime.choose_precision(info, "auto", gpu=False) == "fp32"


@pytest.mark.parametrize("how", ["off", "fails"])
def test_a_graph_that_is_not_keras_is_left_out_and_keras_runs(
    how: str, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if how == "off":
        monkeypatch.setitem(runtime.TOLERANCE, "fp32", -1.0)
    else:
        monkeypatch.setattr(runtime, "openvino", lambda: (_ for _ in ()).throw(RuntimeError("no such op\nat 0x0")))
    ordinary = exports.Ordinary(images[:60], images[60:90])
    bundle = write(tmp_path / "b", ordinary=ordinary)
    monkeypatch.undo()
    assert "runtimes" not in bundle.info
    assert ("its answers are off by" if how == "off" else "cannot convert it: no such op") in (
        bundle.info["runtimes_refused"]
    )
    assert bundle.files == {*bundles.FILES, runtime.GOLDEN, exports.QUALITY}
    assert "in Keras alone" in (bundle.path / "MODEL_CARD.md").read_text()
    expected = bundle.model().predict(images[:3, ..., None], verbose=0)
    frame = bundle.predict(images[:3])
    np.testing.assert_allclose(frame[[f"p_{name}" for name in bundle.findings]].to_numpy(), expected, rtol=0, atol=1e-6)


def test_weights_that_give_no_numbers_make_no_bundle(tmp_path: Path) -> None:
    architecture = Architecture(backbone="TinyCNN", size=SIZE, findings=FINDINGS[:2])
    model = classifier.build(architecture)
    kernel, bias = model.get_layer("logits").get_weights()
    model.get_layer("logits").set_weights([kernel, bias * np.nan])
    with pytest.raises(BundleError, match="gives no probabilities"):
        write(tmp_path / "b", save_weights=lambda path: model.save_weights(str(path)))
    assert list(tmp_path.iterdir()) == []


def test_quality_comes_back_as_it_was_fitted_and_flags_what_is_unlike(bundle: bundles.Bundle, images) -> None:
    model = bundle.quality
    assert model is not None
    assert bundle.info["quality"] == {
        "train_images": 60,
        "held_out_images": 30,
        "expected_rates": {name: model.expected_rates[name] for name in quality.JUDGED},
    }
    assert (model.training, model.held_out) == (60, 30)
    noise = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE), dtype=np.uint8)
    frame = bundle.predict(np.concatenate([images[90:], 255 - images[90:], noise]))
    flags = frame["quality_flag"].astype(object).where(frame["quality_flag"].notna(), None).tolist()
    assert flags[:20].count(None) >= 18
    assert flags[20:40].count("inverted") >= 18
    assert flags[40:] == ["not_frontal_chest"] * 2


@pytest.mark.parametrize(
    ("count", "reason"),
    [(None, "the bundle was made without images"), (0, "made without images"), (40, "60 and 30 are needed")],
)
def test_where_there_are_no_flags_the_reason_stands(
    count: int | None, reason: str, images: np.ndarray, tmp_path: Path
) -> None:
    ordinary = None if count is None else exports.Ordinary(images[:count], images[:0])
    bundle = write(tmp_path / "b", ordinary=ordinary)
    assert set(bundle.info["quality"]) == {"lacking"}
    assert reason in bundle.info["quality"]["lacking"]
    assert bundle.quality is None
    assert f"{reason}." in (bundle.path / "MODEL_CARD.md").read_text()


def test_a_copy_with_other_rules_keeps_graphs_golden_images_and_quality(bundle: bundles.Bundle, tmp_path: Path) -> None:
    """As `recalibrate` writes it."""
    copy = write(
        tmp_path / "b",
        save_weights=lambda path: shutil.copyfile(bundle.path / bundles.WEIGHTS, path),
        like=bundle,
        rule_notes=dict.fromkeys(bundle.findings, "another"),
    )
    assert copy.files == bundle.files
    kept = bundle.files & set(exports.OPTIONAL_FILES)
    assert kept == {"golden.npz", "openvino.bin", "openvino.xml", "quality.npz"}
    for name in kept:
        assert (copy.path / name).read_bytes() == (bundle.path / name).read_bytes()
    for name in ("runtimes", "quality"):
        assert copy.info[name] == bundle.info[name]


def test_a_damaged_quality_file_is_one_line(bundle: bundles.Bundle, tmp_path: Path) -> None:
    def add(part: Path, info: dict) -> None:
        (part / exports.QUALITY).write_bytes(b"PK\x03\x04")

    broken = write(
        tmp_path / "b",
        save_weights=lambda path: shutil.copyfile(bundle.path / bundles.WEIGHTS, path),
        like=bundle,
        add=add,
    )
    with pytest.raises(BundleError, match=r"quality\.npz: is damaged"):
        broken.predict(drawn(0, 1))


def test_a_sample_is_chosen_by_its_seed() -> None:
    images = np.arange(50, dtype=np.uint8)[:, None, None]
    assert exports.sample(images, 0, 50).tobytes() == images.tobytes()
    some = exports.sample(images, 0, 10)
    assert len(set(some.ravel().tolist())) == 10
    np.testing.assert_array_equal(some, exports.sample(images, 0, 10))
    assert some.tobytes() != exports.sample(images, 1, 10).tobytes()
