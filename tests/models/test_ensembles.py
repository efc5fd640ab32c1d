"""Ensembles of bundles, and averages over copies of an image."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import expit, logit
from test_recalibration import Site

from ray_cxr.cli import main
from ray_cxr.config import Aspect, InputSpec
from ray_cxr.imaging.resize import list_images, resize
from ray_cxr.labels import FINDINGS
from ray_cxr.models import augmented, ensembles, importing, runtime
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.models.bundle_writer import derive_bundle

SMALL = Path(__file__).parent / "small.onnx"
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 64, 64), dtype=np.uint8)


def make_member(
    out: Path,
    outputs: Sequence[str],
    normalization: str,
    calibration: tuple[float, float] | None = None,
    aspect: Aspect | None = None,
) -> Bundle:
    options = importing.ImportOptions(
        outputs=tuple(outputs), normalization=normalization, aspect=aspect, layout="nchw", logits=True
    )
    bundle = importing.import_weights(SMALL, out / "raw", backbone=None, options=options)
    if calibration is None:
        return bundle
    rule = {"method": "platt", "slope": calibration[0], "intercept": calibration[1]}
    return derive_bundle(bundle, out / "calibrated", calibration=dict.fromkeys(bundle.findings, rule))


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    home = tmp_path_factory.mktemp("members")
    return [
        make_member(home / "a", ["Mass", "Edema", "Hernia"], "imagenet", (2.0, 0.5)),
        make_member(home / "b", ["Edema", "-", "Mass"], "0.2,0.3", (0.5, -1.0)),
    ]


def predict(bundle: Bundle, name: str, column: str = "p") -> np.ndarray:
    return bundle.predict(IMAGES, precision="fp32")[f"{column}_{name}"].to_numpy(np.float64)


def test_probability_is_the_mean_of_calibrated_logits(members: list[Bundle], tmp_path: Path) -> None:
    assert main(["ensemble", *(str(bundle.path) for bundle in members), "--out", str(tmp_path / "both")]) == 0
    both = load_bundle(tmp_path / "both")
    assert both.findings == ("Edema", "Hernia", "Mass")
    for name in ("Edema", "Mass"):
        one, two = (predict(bundle, name, "c") for bundle in members)
        assert np.abs(one - two).max() > 0.05
        np.testing.assert_allclose(predict(both, name), expit((logit(one) + logit(two)) / 2), atol=1e-5)
        np.testing.assert_allclose(predict(both, name, "p_spread"), np.abs(one - two) / 2, atol=1e-5)
    np.testing.assert_allclose(predict(both, "Hernia"), predict(members[0], "Hernia", "c"), atol=1e-5)
    np.testing.assert_allclose(predict(both, "Hernia", "p_spread"), 0, atol=1e-6)
    features = both.open_runtime("fp32", batch_size=2, threads=1).predict(IMAGES).features
    assert features.shape == (5, 8)
    assert main(["ensemble", *(str(bundle.path) for bundle in members), "--out", str(tmp_path / "both")]) == 0
    assert main(["ensemble", *(str(bundle.path) for bundle in members[::-1]), "--out", str(tmp_path / "both")]) == 2


@pytest.mark.slow
def test_members_of_different_inputs_share_one_decode(
    tmp_path: Path, members: list[Bundle], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        make_member(tmp_path / str(number), ["Mass", "Edema", "Hernia"], rule, aspect=aspect)
        for number, (rule, aspect) in enumerate((("none", "pad"), ("imagenet", "crop"), ("0.2,0.3", "pad")))
    ]
    both = ensembles.build_ensemble([bundle.path for bundle in given], tmp_path / "both")
    assert [(tile.size, tile.aspect) for tile in both.input_spec.tiles] == [(64, "pad"), (64, "crop")]
    wide = [np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8) for shape in ((80, 200), (300, 90))]
    rows = [bundle.predict(wide, precision="fp32")["p_Mass"].to_numpy(np.float64) for bundle in given]
    assert np.ptp(rows, axis=0).min() > 0.01
    found = both.predict(wide, precision="fp32")["p_Mass"].to_numpy(np.float64)
    np.testing.assert_allclose(found, expit(logit(rows).mean(axis=0)), atol=1e-5)
    copies = []
    for bundle in [*given, both]:
        opened = bundle.open_runtime("fp32", batch_size=2, threads=1)
        batch = np.stack([resize(image, bundle.input_spec) for image in wide])
        inner = augmented.AugmentedRuntime(opened, 4, bundle.input_spec).predict(batch)
        copies.append(logit(inner.probabilities[:, bundle.findings.index("Mass")].astype(np.float64)))
    np.testing.assert_allclose(copies[3], np.mean(copies[:3], axis=0), atol=1e-4)
    nested = ensembles.build_ensemble([both.path, given[1].path], tmp_path / "nested")
    assert nested.input_spec.tiles == (both.input_spec, given[1].input_spec)
    pair = np.stack([found, rows[1]])
    again = nested.predict(wide, precision="fp32")["p_Mass"].to_numpy(np.float64)
    np.testing.assert_allclose(again, expit(logit(pair).mean(axis=0)), atol=1e-5)
    assert len(list_images(nested.input_spec)) == 3
    command = ["score", "--model", str(both.path), "--images", str(tmp_path), "--out", str(tmp_path / "s")]
    assert main([*command, "--heatmaps", "1", "--dry-run"]) == 2
    assert "different inputs" in capsys.readouterr().err


@pytest.mark.slow
def test_ensemble_can_be_recalibrated(members: list[Bundle], tmp_path: Path) -> None:
    both = ensembles.build_ensemble([bundle.path for bundle in members], tmp_path / "both")
    site = Site(tmp_path, both)
    site.p = site.p[:, [FINDINGS.index(name) for name in both.findings]]
    site.spread = site.p / 10
    site.write()
    assert "p_spread_Edema" in pq.read_table(site.part(0)).column_names
    assert main([str(item) for item in site.arguments()]) == 0
    rows = load_bundle(site.out).predict(IMAGES, precision="fp32")
    assert rows[["p_Edema", "p_spread_Edema", "c_Edema", "flag_Edema"]].notna().all(axis=None)
    np.testing.assert_allclose(rows["p_Edema"], predict(both, "Edema"), atol=1e-6)


@pytest.mark.slow
def test_provenance_says_only_what_is_true_of_all_members(members: list[Bundle], tmp_path: Path) -> None:
    settings = {"size": 64, "findings": ["Edema", "Hernia", "Mass"]}
    records = [{"kind": "patient", "seed": seed} for seed in (0, 0, 1)]
    for number, (split, other) in enumerate(((records[0], records[1]), (records[0], records[2]))):
        given = [
            derive_bundle(bundle, tmp_path / f"{number}-{j}", provenance={**bundle.info["provenance"], "split": record})
            for j, (bundle, record) in enumerate(zip(members, (split, other), strict=True))
        ]
        both = ensembles.build_ensemble([bundle.path for bundle in given], tmp_path / f"both{number}")
        source = both.info["provenance"]
        assert source["split"] == (split if split == other else {})
        assert source["ensemble"]["splits"] == [split, other]
        assert source["settings"] == settings
        assert tomllib.loads((both.path / "config.toml").read_text(encoding="utf-8")) == {"train": settings}
    imported = [bundle.info["provenance"]["settings"] for bundle in members]
    assert [set(found) for found in imported] == [{"size", "findings"}] * 2


def test_members_that_do_not_fit_are_refused(
    members: list[Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_member(tmp_path / "raw", ["Mass", "-", "-"], "none")
    given = [
        (members[:1], "at least two"),
        ([members[0], members[0]], "named twice"),
        ([members[0], raw], "calibrate Mass and others do not"),
    ]
    for bundles, reason in given:
        assert main(["ensemble", *(str(one.path) for one in bundles), "--out", str(tmp_path / "e")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert reason in line
    assert not (tmp_path / "e").exists()


def test_training_images_of_all_members_are_kept(members: list[Bundle], tiny_bundle: Bundle) -> None:
    merged = ensembles._merge_splits([members[0], tiny_bundle, members[1]])
    assert merged.sort_by("image_id").equals(pq.read_table(tiny_bundle.path / "split.parquet").sort_by("image_id"))


class Brightness(runtime.Runtime):
    """Its probability is the brightness of the image's upper left quarter; it fails for images of zeros."""

    batch_shape = (4, 64, 64, 1)

    def _submit_batch(self, batch: np.ndarray, n: int) -> Future[runtime.Outputs]:
        future: Future[runtime.Outputs] = Future()
        if not batch[:n].any():
            future.set_exception(RuntimeError("black"))
            return future
        p = (batch[:n, :32, :32].mean(axis=(1, 2)) / 256).astype(np.float32)
        future.set_result(runtime.Outputs(p, p))
        return future


def test_copies_are_averaged_and_never_flipped() -> None:
    model = augmented.AugmentedRuntime(Brightness(), 6, InputSpec(size=64))
    outputs = model.predict(IMAGES)
    plain = Brightness().predict(IMAGES)
    assert outputs.spread is not None
    assert (outputs.spread > 0).all()
    np.testing.assert_array_equal(outputs.features, plain.features)
    np.testing.assert_allclose(outputs.probabilities, plain.probabilities, atol=0.02)
    again = augmented.AugmentedRuntime(Brightness(), 6, InputSpec(size=64)).predict(IMAGES[2:])
    np.testing.assert_array_equal(again.probabilities, outputs.probabilities[2:])
    # A bright left half stays left in every copy.
    halves = np.zeros((1, 64, 64), np.uint8)
    halves[:, :, :32] = 200
    for k in range(9):
        moved = model._copy(halves, k)
        assert moved[0, :, :24].mean() > 190
        assert moved[0, :, 40:].mean() < 10
    with pytest.raises(RuntimeError, match="black"):
        model.predict(np.zeros((1, 64, 64), np.uint8))


def test_mean_of_copies_is_that_of_their_logits() -> None:
    def outputs(p: float, spread: float | None = None) -> runtime.Outputs:
        array = np.array([[p]], np.float32)
        return runtime.Outputs(array, array, None if spread is None else np.array([[spread]], np.float32))

    average = augmented._average([outputs(0.5), outputs(0.9)])
    np.testing.assert_allclose(average.probabilities, [[0.75]], atol=1e-6)  # logits 0 and ln 9, mean ln 3
    np.testing.assert_allclose(average.spread, [[0.2]], atol=1e-6)
    average = augmented._average([outputs(0.5, 0.3), outputs(0.5, 0.4)])
    np.testing.assert_allclose(average.spread, [[np.sqrt(0.125)]], atol=1e-6)
