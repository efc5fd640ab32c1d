"""Quality flags: which images are flagged and how, which are not, and independence of the batch.

Synthetic radiographs stand for an archive. Features are statistics of the pixels: the rules do not need a model.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ray_cxr.config import InputSpec
from ray_cxr.evaluation import quality
from ray_cxr.evaluation.quality import FLAGS, QualityModel, find_most_severe, fit_quality_model, judge_images
from ray_cxr.imaging.decode import load_image
from ray_cxr.imaging.phantom_anatomy import sample_anatomy
from ray_cxr.imaging.phantom_findings import draw_phantom

SIZE = 64
TRAINING, HELD_OUT, ORDINARY = 100, 60, 50
Images = np.ndarray


def compute_features(images: Images) -> np.ndarray:
    """Return float32 [N,24]: means of 16 tiles, and mean differences of neighbours in eight bands."""
    n, side = images.shape[:2]
    x = images.astype(np.float32)
    tiles = x.reshape(n, 4, side // 4, 4, side // 4).mean(axis=(2, 4)).reshape(n, 16)
    edges = np.abs(np.diff(x, axis=2)).reshape(n, 8, side // 8 * (side - 1)).mean(axis=2)
    return np.concatenate([tiles, edges], axis=1)


def fit_images(train: Images, held_out: Images) -> tuple[QualityModel | None, str | None]:
    return fit_quality_model(train, compute_features(train), held_out, compute_features(held_out))


def judge(model: QualityModel, images: Images, like: Images | None = None) -> list[str | None]:
    """Judge images; with `like`, by the features of those images."""
    images = np.ascontiguousarray(images, dtype=np.uint8)
    return judge_images(model, images, compute_features(images if like is None else like))


def share(flags: list[str | None], *names: str | None) -> float:
    return sum(flag in names for flag in flags) / len(flags)


@pytest.fixture(scope="module")
def chests() -> Images:
    """Draw uint8 [210,64,64]: one radiograph per patient, every sixth with one of three findings."""
    findings = ("Effusion", "Mass", "Cardiomegaly")
    anatomies = {i: sample_anatomy(0, i, 0, size=SIZE) for i in range(1, TRAINING + HELD_OUT + ORDINARY + 1)}
    return np.stack([draw_phantom(anatomy, findings[i % 3 :][: i % 6 == 0]) for i, anatomy in anatomies.items()])


@pytest.fixture(scope="module")
def fitted(chests: Images) -> QualityModel:
    return fit_images(chests[:TRAINING], chests[TRAINING : TRAINING + HELD_OUT])[0]


@pytest.fixture
def ordinary(chests: Images) -> Images:
    return chests[TRAINING + HELD_OUT :]


def test_ordinary_images_are_rarely_flagged(fitted: QualityModel, ordinary: Images) -> None:
    # Pixel means follow every change of tone; a model's features do not, so those of the originals are used.
    tones = {"flatter": np.rint(64 + 0.5 * ordinary), "darker": np.rint(255 * (ordinary / 255) ** 1.25)}
    for name, changed in {**tones, "none": ordinary, "mirrored": ordinary[:, :, ::-1]}.items():
        assert share(judge(fitted, changed, like=ordinary), None) >= 0.94, name


def test_other_images_are_flagged_as_not_frontal_chest(fitted: QualityModel, ordinary: Images) -> None:
    for name, changed in {
        "quarter turn": np.rot90(ordinary, axes=(1, 2)),
        "upside down": ordinary[:, ::-1],
        "four in one": np.tile(ordinary[:, ::2, ::2], (1, 2, 2)),
        "half missing": np.where(np.arange(SIZE) < SIZE // 2, 0, ordinary),
        "noise": np.random.default_rng(1).integers(0, 256, ordinary.shape),
        "blank": np.full_like(ordinary, 77),
    }.items():
        flags = judge(fitted, changed, like=ordinary)  # the pixels decide
        assert share(flags, None) <= 0.02, name
        assert share(flags, "not_frontal_chest") >= 0.9, name


def test_negatives_and_odd_features_are_flagged(fitted: QualityModel, chests: Images, ordinary: Images) -> None:
    assert share(judge(fitted, 255 - ordinary), "inverted") >= 0.98
    usual = compute_features(ordinary)
    assert share(judge_images(fitted, ordinary, usual + 100 * usual.std(axis=0)), "out_of_distribution") >= 0.94
    broken = usual[:3].copy()
    broken[0, 4], broken[1, 0] = np.nan, -np.inf
    assert judge_images(fitted, ordinary[:3], broken) == ["out_of_distribution", "out_of_distribution", None]
    # A few negatives among the training images change little.
    train, held_out, _ = np.split(chests.copy(), [TRAINING, TRAINING + HELD_OUT])
    train[:2], held_out[:1] = 255 - train[:2], 255 - held_out[:1]
    model, _ = fit_images(train, held_out)
    assert share(judge(model, 255 - ordinary), "inverted") >= 0.94
    assert share(judge(model, ordinary), None) >= 0.94


def test_flags_from_distances() -> None:
    """Distances of image, negative, symmetrised image and features; limits 2 and 3."""
    distances = {
        (5.0, 1.0, 1.0, 9.0): "inverted",  # all four rules hold
        (5.0, 9.0, 1.0, 9.0): "lateral",
        (5.0, 9.0, 2.5, 0.0): "not_frontal_chest",
        (1.0, 9.0, 9.0, 9.0): "out_of_distribution",
        (1.0, 9.0, 9.0, 1.0): None,
        (2.0, 9.0, 9.0, 3.0): None,  # at the limits
        (2.5, 2.0, 9.0, 1.0): "not_frontal_chest",  # the factor is 1.25, not above
        (2.6, 2.0, 9.0, 1.0): "inverted",
        (2.6, 2.01, 2.0, 1.0): "lateral",
        (2.0, 1.9, 9.0, 1.0): None,
    }
    assert quality._choose_flags(np.array(list(distances)), 2.0, 3.0) == list(distances.values())


def test_most_severe_flag() -> None:
    assert find_most_severe([]) is find_most_severe([None, None]) is None
    assert [find_most_severe([flag, FLAGS[-1]]) for flag in FLAGS] == list(FLAGS)
    assert find_most_severe(["age_outside_training", None, "out_of_distribution"]) == "out_of_distribution"


@pytest.fixture(scope="module")
def spaces() -> tuple[quality.Subspace, quality.Subspace]:
    """Descriptions of random thumbnails and of five random features."""
    rng = np.random.default_rng(0)
    return quality._fit_subspace(rng.normal(size=(300, 256))), quality._fit_subspace(rng.normal(size=(80, 5)))


def test_distances_do_not_depend_on_the_batch(spaces: tuple[quality.Subspace, quality.Subspace]) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(12, 5))
    for size in (64, 67):
        images = rng.integers(0, 256, (12, size, size)).astype(np.uint8)
        whole = quality._measure_distances(*spaces, quality._make_thumbnails(images), vectors)
        for rows in (*np.split(np.arange(12), 12), *np.split(rng.permutation(12), 4)):
            got = quality._measure_distances(*spaces, quality._make_thumbnails(images[rows]), vectors[rows])
            np.testing.assert_array_equal(got, whole[rows])


def test_thumbnail_of_two_halves() -> None:
    """Thumbnails average blocks, without brightness and contrast; an odd row falls between blocks."""
    left = np.zeros((1, 33, 33), dtype=np.uint8)
    left[:, :, :16] = 200
    expected = np.where(np.arange(16) < 8, 1.0, -1.0) * np.ones((16, 1))
    for image in (left, left // 2 + 30, left.repeat(2, axis=1).repeat(2, axis=2)):
        np.testing.assert_allclose(quality._make_thumbnails(image).reshape(16, 16), expected)
    np.testing.assert_allclose(quality._make_thumbnails(left.transpose(0, 2, 1)).reshape(16, 16), expected.T)
    assert np.isnan(quality._make_thumbnails(np.full((1, 33, 33), 9, dtype=np.uint8))).all()
    # Sums over 258 rows exceed uint16.
    large = np.full((1, 4128, 4128), 128, dtype=np.uint8)
    large[:, :, :2064] = 255
    np.testing.assert_allclose(quality._make_thumbnails(large).reshape(16, 16), expected)


def test_symmetrised_image_is_undefined_if_mostly_asymmetric(spaces: tuple[quality.Subspace, quality.Subspace]) -> None:
    """Averaging an image with its mirror image keeps the symmetric part; below one half the distance is infinite."""
    odd = np.tile(np.repeat([1.0, -1.0], 8), 16)[None]
    even = np.tile(np.repeat([1.0, -1.0, 1.0], [4, 8, 4]), 16)[None]
    for weight, finite in ((0.9, True), (1.1, False)):
        mixed = quality._standardise(even + weight * odd, 0.5)
        got = quality._measure_distances(*spaces, mixed, np.zeros((1, 5)))[0]
        assert np.isfinite(got).tolist() == [True, True, finite, True]
        if finite:
            np.testing.assert_allclose(got[2], spaces[0].distances(even)[0], rtol=1e-9)
            np.testing.assert_allclose(got[1], spaces[0].distances(-mixed)[0])


def test_distances() -> None:
    # Coordinates are halved; the axis has the variance 2, the rest 1/2.
    space = quality.Subspace(np.ones(2), np.full(2, 2.0), np.array([[1.0], [0.0]]), np.array([2.0]), 0.5)
    got = space.distances(np.array([[1.0, 1.0], [5.0, 1.0], [1.0, 5.0], [5.0, 5.0]]))
    np.testing.assert_allclose(got, [0.0, 2.0, 8.0, 10.0])
    # With more features than images, eigenvectors come from the smaller product; distances are the same.
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(80, 60)) * np.linspace(1, 3, 60)
    wide = np.concatenate([vectors, vectors], axis=1)  # rank 60 of 120 columns, all variances twice
    got, expected = quality._fit_subspace(wide), quality._fit_subspace(vectors)
    np.testing.assert_allclose(got.axes.T @ got.axes, np.eye(16), atol=1e-9)
    np.testing.assert_allclose(got.variances, 2 * expected.variances)
    np.testing.assert_allclose(got.distances(wide), expected.distances(vectors), rtol=1e-9)


@pytest.mark.parametrize("shape", [(400, 256), (120, 256)])
def test_training_vectors_have_a_mean_distance_of_two(shape: tuple[int, int]) -> None:
    """Along the axes and outside them, the mean squared distance is 1 each by the definition of the variances."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=shape) * np.linspace(0.5, 3, shape[1])
    assert quality._fit_subspace(vectors).distances(vectors).mean() == pytest.approx(2.0)


def test_fitting_needs_enough_images(chests: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    # With fewer than 30 held-out images, a third of the training images is held out too.
    for train, held_out, counts in ((60, 30, (60, 30)), (60, 29, None), (90, 0, (60, 30)), (89, 0, None)):
        model, reason = fit_images(chests[:train], chests[90 : 90 + held_out])
        assert (None if model is None else (model.training, model.held_out)) == counts
        assert (reason is None) == (counts is not None)
    blank = chests[:90].copy()
    blank[7] = 40  # does not count
    assert "29" in fit_images(blank, blank[:0])[1]
    constant = np.ones((90, 5), np.float32)
    model, reason = fit_quality_model(chests[:90], constant, chests[:0], constant[:0])
    assert (model, "features" in reason) == (None, True)
    monkeypatch.setattr(quality, "MAX_TRAINING", 70)
    assert fit_images(chests[:100], chests[100:140])[0].training == 70


def test_bad_input_is_refused(fitted: QualityModel, chests: Images) -> None:
    images, vectors = np.zeros((3, 32, 32), np.uint8), np.zeros((3, 24), np.float32)
    for wrong in (images.astype(np.float32), np.zeros((3, 32, 40), np.uint8), images[:, :15, :15], images[0]):
        with pytest.raises(ValueError, match="images"):
            judge_images(fitted, wrong, vectors)
    for wrong in (vectors[:2], vectors.astype(np.int64), np.zeros((3, 25), np.float32), vectors[0]):
        with pytest.raises(ValueError, match="features"):
            judge_images(fitted, images, wrong)
    # The smallest images and an empty batch are valid.
    assert judge_images(fitted, images[:1, :16, :16], compute_features(chests[:1])) == ["not_frontal_chest"]
    assert judge_images(fitted, images[:0], vectors[:0]) == []
    x, f = chests[:90], compute_features(chests[:90])
    with pytest.raises(ValueError, match="differ"):
        fit_quality_model(x, f, x, f[:, :3])
    with pytest.raises(ValueError, match="images"):
        fit_quality_model(x.astype(np.float32), f, x, f)
    with pytest.raises(ValueError, match="not finite"):
        fit_quality_model(x, np.where(np.arange(24) == 4, np.inf, f), x, f)


def test_refitting_and_storing_give_the_same_model(chests: Images, fitted: QualityModel, ordinary: Images) -> None:
    assert sum(fitted.expected_rates.values()) <= 0.1
    refitted, _ = fit_images(chests[:TRAINING], chests[TRAINING : TRAINING + HELD_OUT])
    file = io.BytesIO()
    np.savez(file, **fitted.arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        again = QualityModel.from_arrays(dict(stored))
    for other in (again, refitted):
        for name, array in fitted.arrays().items():
            np.testing.assert_array_equal(other.arrays()[name], array, err_msg=name)
    mixed = np.concatenate([ordinary, 255 - ordinary])
    assert judge(again, mixed) == judge(fitted, mixed)


def test_damaged_arrays_are_refused(fitted: QualityModel) -> None:
    damages: list[tuple[str, Callable | None]] = [
        ("format", lambda a: a + 1),
        ("format", lambda a: a.astype(float)),
        ("format", None),
        ("pixels_mean", None),
        ("other", lambda a: np.zeros(3)),
        ("pixels_axes", lambda a: a.T),
        ("features_axes", lambda a: np.where(a == a.max(), np.nan, a)),
        ("features_mean", lambda a: a[:0]),
        ("features_mean", lambda a: a.astype(np.float32)),
        ("features_mean", lambda a: a[:, None]),
        ("features_scale", lambda a: 0 * a),
        ("pixels_variances", lambda a: -a),
        ("pixels_residual", lambda a: np.array(np.inf)),
        ("limits", lambda a: a - a[0]),
        ("expected_rates", lambda a: a - 0.5),
        ("expected_rates", lambda a: a + 0.5),
    ]
    for name, damage in damages:
        arrays = fitted.arrays()
        old = arrays.pop(name, np.zeros(0))
        if damage is not None:
            arrays[name] = damage(old)
        with pytest.raises(ValueError, match=name):
            QualityModel.from_arrays(arrays)


@pytest.mark.slow
def test_real_images(shared: Path) -> None:
    paths = sorted((shared / "nih" / "images256").glob("*.png"))
    images = np.stack([load_image(str(path), InputSpec(size=SIZE)) for path in paths])
    patients = np.array([path.name[:8] for path in paths])
    training = np.isin(patients, np.random.default_rng(0).permutation(np.unique(patients))[:300])
    rest = np.flatnonzero(~training)
    x = images[rest[1::2]]
    model, _ = fit_images(images[training], images[rest[::2]])
    for usual in (x, x[:, :, ::-1]):
        assert judge(model, usual, like=x).count(None) >= len(x) - 4
    assert share(judge(model, 255 - x), "inverted") >= 0.95
    assert share(judge(model, np.rot90(x, axes=(1, 2)), like=x), None) <= 0.2
    # The most common inversion: MONOCHROME1 read as MONOCHROME2.
    film = load_image(str(shared / "dicom" / "cr_chest_monochrome2_jpeg.dcm"), InputSpec(size=SIZE))[None]
    assert sorted(map(str, judge(model, np.concatenate([film, 255 - film])))) == ["None", "inverted"]
    # This image is a negative in the release itself, which its tables do not mention.
    at = [path.name for path in paths].index("00017625_000.png")
    others = images[patients != patients[at]]
    model, _ = fit_images(others[::2], others[1::2])
    assert judge(model, images[at : at + 1])[0] in ("inverted", "not_frontal_chest")
