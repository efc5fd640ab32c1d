"""Quality flags: what must be flagged and how, what must not, and that no neighbour in the batch matters.

Synthetic chests stand for an archive; real images are judged where they are at hand. Features are statistics of the
pixels, for a network is not needed to see that they are read rightly.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ray_cxr.config import InputSpec
from ray_cxr.data import imaging, phantoms
from ray_cxr.evaluation import quality
from ray_cxr.evaluation.quality import FLAGS, JUDGED, QualityModel, fit, gravest, judge, lacking

SIZE = 96
TRAINING, HELD_OUT = 130, 80
Images = np.ndarray


def features(images: Images) -> np.ndarray:
    """float32 [N,24]: means of pieces, and how much neighbours differ in each of eight bands."""
    n, side = images.shape[:2]
    x = images.astype(np.float32)
    pieces = x.reshape(n, 4, side // 4, 4, side // 4).mean(axis=(2, 4)).reshape(n, 16)
    edges = np.abs(np.diff(x, axis=2)).reshape(n, 8, side // 8 * (side - 1)).mean(axis=2)
    return np.concatenate([pieces, edges], axis=1)


@pytest.fixture(scope="module")
def chests() -> Images:
    """uint8 [300,96,96]: one chest a patient, each sixth with one of three findings, which come in turn."""
    findings = ("Effusion", "Mass", "Cardiomegaly")
    return np.stack(
        [
            phantoms.draw(phantoms.anatomy(0, patient, 0, size=SIZE), findings[patient % 3 :][: patient % 6 == 0])
            for patient in range(1, 301)
        ]
    )


@pytest.fixture(scope="module")
def fitted(chests: Images) -> QualityModel:
    train, held, _ = np.split(chests, [TRAINING, TRAINING + HELD_OUT])
    model = fit(train, features(train), held, features(held))
    assert model is not None
    return model


@pytest.fixture
def ordinary(chests: Images) -> Images:
    return chests[TRAINING + HELD_OUT :]


def flagged(model: QualityModel, images: Images) -> list[str | None]:
    return judge(model, images, features(images))


def share(flags: list[str | None], *names: str) -> float:
    return sum(flag in names for flag in flags) / len(flags)


def lateral(rng: np.random.Generator) -> Images:
    """A crude chest from the side: trunk, one lung field, heart in front and low, spine behind, sloping diaphragm."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1)

    def disc(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        cx, cy = cx + rng.normal(0, 0.015), cy + rng.normal(0, 0.015)
        return np.asarray(np.clip(6 * (1 - ((x - cx) / rx) ** 2 - ((y - cy) / ry) ** 2), 0, 1))

    trunk, lung, heart = disc(0.5, 0.6, 0.40, 0.62), disc(0.5, 0.45, 0.27, 0.36), disc(0.36, 0.62, 0.14, 0.15)
    below = 1 / (1 + np.exp(-(y - 0.70 - 0.12 * (x - 0.4)) / 0.015))
    spine = np.exp(-(((x - 0.74) / 0.045) ** 2))
    picture = 15 + 150 * trunk - 105 * lung + lung * (70 * heart + 75 * below) + 60 * spine * trunk
    picture += rng.normal(0, 3, picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def noise(images: Images) -> Images:
    return np.random.default_rng(1).integers(0, 256, images.shape).astype(np.uint8)


def stripes(images: Images) -> Images:
    """Lines of dark dashes on white, as a page of text."""
    rng = np.random.default_rng(2)
    page = np.full(images.shape, 245, dtype=np.uint8)
    page[:, 6:-6:5, 6:-6] = np.where(rng.random((len(page), 17, SIZE - 12)) < 0.6, 30, 245)
    return page


def tones(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Images], Images]:
    return lambda images: np.clip(np.rint(255 * change(images / 255.0)), 0, 255).astype(np.uint8)


# ---- what is flagged and what is not ----------------------------------------------------------------------


def test_ordinary_chests_are_rarely_flagged(fitted: QualityModel, ordinary: Images) -> None:
    flags = flagged(fitted, ordinary)
    assert sum(flag is not None for flag in flags) <= 2, flags


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x[:, :, ::-1], id="mirrored"),
        pytest.param(tones(lambda x: x * 0.9), id="darker"),
        pytest.param(tones(lambda x: 0.25 + 0.5 * x), id="flatter"),
        pytest.param(tones(lambda x: x**0.8), id="gamma 0.8"),
        pytest.param(tones(lambda x: x**1.25), id="gamma 1.25"),
    ],
)
def test_harmless_changes_do_not_count(
    fitted: QualityModel, ordinary: Images, change: Callable[[Images], Images]
) -> None:
    # Features that know no better than pixels' means would tell of any change of tone; a network's may not.
    changed = np.ascontiguousarray(change(ordinary))
    assert share(judge(fitted, changed, features(ordinary)), None) >= 0.95


def test_negatives_are_inverted(fitted: QualityModel, ordinary: Images) -> None:
    assert share(flagged(fitted, 255 - ordinary), "inverted") >= 0.98


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: np.rot90(x, axes=(1, 2)), id="quarter turn"),
        pytest.param(lambda x: x[:, ::-1], id="upside down"),
        pytest.param(lambda x: np.tile(x[:, ::2, ::2], (1, 2, 2)), id="four in one"),
        pytest.param(lambda x: np.where(np.arange(SIZE) < SIZE // 2, 0, x).astype(np.uint8), id="half missing"),
        pytest.param(noise, id="noise"),
        pytest.param(stripes, id="text"),
    ],
)
def test_what_is_no_upright_frontal_chest(
    fitted: QualityModel, ordinary: Images, change: Callable[[Images], Images]
) -> None:
    # By the pixels alone: the features say that all is well.
    changed = np.ascontiguousarray(change(ordinary))
    flags = judge(fitted, changed, features(ordinary))
    assert share(flags, None) <= 0.02
    assert share(flags, "not_frontal_chest") >= 0.9


def test_views_from_the_side_are_flagged(fitted: QualityModel) -> None:
    """Drawn ones: that they are unlike is certain, that they are called lateral is not (see the decision)."""
    rng = np.random.default_rng(3)
    flags = flagged(fitted, np.stack([lateral(rng) for _ in range(20)]))
    assert share(flags, "lateral", "not_frontal_chest") == 1.0


def test_asymmetry_alone_is_lateral() -> None:
    """Distances by hand: of the image, its negative, the image made symmetric, its features; limits 2 and 3."""
    distances = np.array([[5.0, 9.0, 1.0, 0.0], [5.0, 9.0, 2.5, 0.0], [2.0, 9.0, 9.0, 0.0]])
    assert quality._flags(distances, 2.0, 3.0) == ["lateral", "not_frontal_chest", None]


def test_order_of_gravity() -> None:
    """Where several rules hold the first of `FLAGS` is given."""
    distances = np.array(
        [
            [5.0, 1.0, 1.0, 9.0],  # all four
            [5.0, 9.0, 1.0, 9.0],  # no negative
            [5.0, 9.0, 9.0, 9.0],  # nor symmetric
            [1.0, 9.0, 9.0, 9.0],  # the features alone
            [1.0, 9.0, 9.0, 1.0],
            [2.0, 1.9, 9.0, 1.0],  # the negative is nearer, but not clearly so
        ]
    )
    assert quality._flags(distances, 2.0, 3.0) == [*JUDGED, None, None]


def test_features_far_away_are_out_of_distribution(fitted: QualityModel, ordinary: Images) -> None:
    usual = features(ordinary)
    assert share(judge(fitted, ordinary, usual + 100 * usual.std(axis=0)), "out_of_distribution") >= 0.95
    broken = usual[:3].copy()
    broken[0, 4], broken[1, 0] = np.nan, -np.inf
    assert judge(fitted, ordinary[:3], broken) == ["out_of_distribution", "out_of_distribution", None]


def test_a_blank_picture_is_no_chest(fitted: QualityModel, ordinary: Images) -> None:
    blank = np.full((1, SIZE, SIZE), 77, dtype=np.uint8)
    assert judge(fitted, blank, features(ordinary[:1])) == ["not_frontal_chest"]


def test_gravest() -> None:
    assert gravest([]) is None
    assert gravest([None, None]) is None
    assert gravest(["age_outside_training", None, "out_of_distribution"]) == "out_of_distribution"
    assert [gravest([flag, FLAGS[-1]]) for flag in FLAGS] == list(FLAGS)
    with pytest.raises(ValueError, match="no quality flag: upside_down"):
        gravest(["upside_down"])


# ---- the same answer everywhere ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 96, 100, 223, 224])
def test_no_neighbour_in_the_batch_matters(size: int) -> None:
    rng = np.random.default_rng(size)
    images = rng.integers(0, 256, (40, size, size)).astype(np.uint8)
    vectors = rng.normal(size=(40, 150))
    space = quality._describe(rng.normal(size=(80, 150)))
    pixels = quality._describe(rng.normal(size=(300, 256)))

    def distances(rows: slice | list[int]) -> np.ndarray:
        return quality._distances(pixels, space, quality._thumbnails(images[rows]), vectors[rows])

    whole = distances(slice(None))
    for batch in (1, 3, 16):
        parts = [distances(slice(start, start + batch)) for start in range(0, 40, batch)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    order = list(rng.permutation(40))
    np.testing.assert_array_equal(distances(order), whole[order])


def test_no_images_no_flags(fitted: QualityModel) -> None:
    assert judge(fitted, np.empty((0, SIZE, SIZE), np.uint8), np.empty((0, 24), np.float32)) == []


def test_thumbnail_by_hand() -> None:
    """Blocks are averaged; brightness and contrast drop out; the odd row falls between blocks."""
    left = np.zeros((1, 33, 33), dtype=np.uint8)
    left[:, :, :16] = 200
    thumbnail = quality._thumbnails(left).reshape(16, 16)
    np.testing.assert_allclose(thumbnail, np.where(np.arange(16) < 8, 1.0, -1.0) * np.ones((16, 1)))
    np.testing.assert_allclose(quality._thumbnails(left // 2 + 30).reshape(16, 16), thumbnail)
    assert np.isnan(quality._thumbnails(np.full((1, 33, 33), 9, dtype=np.uint8))).all()


def test_distances_by_hand() -> None:
    """Four points on a cross: variance 2 along the first axis, 1/2 along the second."""
    space = quality.Subspace(np.ones(2), np.full(2, 2.0), np.array([[1.0], [0.0]]), np.array([2.0]), 0.5)
    got = space.distances(np.array([[1.0, 1.0], [5.0, 1.0], [1.0, 5.0], [5.0, 5.0]]))
    np.testing.assert_allclose(got, [0.0, 2.0, 8.0, 10.0])


def test_the_smaller_product_gives_the_same_axes() -> None:
    """More features than images: the eigenvectors come from the other product, the distances do not change."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(80, 60)) * np.linspace(1, 3, 60)
    wide = np.concatenate([vectors, vectors], axis=1)  # rank 60 of 120 columns, all variances twice
    got, expected = quality._describe(wide), quality._describe(vectors)
    np.testing.assert_allclose(got.axes.T @ got.axes, np.eye(16), atol=1e-9)
    np.testing.assert_allclose(got.variances, 2 * expected.variances)
    np.testing.assert_allclose(got.distances(wide), expected.distances(vectors), rtol=1e-9)


# ---- fitting ----------------------------------------------------------------------------------------------


def test_expected_rates_are_those_of_held_out_images(fitted: QualityModel) -> None:
    assert set(fitted.expected_rates) == set(JUDGED)
    assert sum(fitted.expected_rates.values()) <= 0.05
    assert (fitted.training, fitted.held_out) == (TRAINING, HELD_OUT)


def test_fitting_again_gives_the_same(chests: Images, fitted: QualityModel) -> None:
    train, held, _ = np.split(chests, [TRAINING, TRAINING + HELD_OUT])
    again = fit(train, features(train), held, features(held))
    assert again is not None
    for name, array in again.arrays().items():
        np.testing.assert_array_equal(array, fitted.arrays()[name], err_msg=name)


def test_without_images_held_out_a_third_is(chests: Images, ordinary: Images) -> None:
    train, none = chests[:150], chests[:0]
    model = fit(train, features(train), none, features(none))
    assert model is not None
    assert (model.training, model.held_out) == (100, 50)
    assert share(flagged(model, 255 - ordinary), "inverted") >= 0.95


def test_too_few_images_give_no_model(chests: Images) -> None:
    few, none = chests[:89], chests[:0]
    arguments = (few, features(few), none, features(none))
    assert fit(*arguments) is None
    assert lacking(*arguments) == "60 images to learn from and 29 to set limits by; 60 and 30 are needed"
    enough = chests[:90]
    assert lacking(enough, features(enough), none, features(none)) is None
    assert fit(enough, features(enough), none, features(none)) is not None


def test_blank_pictures_do_not_count(chests: Images) -> None:
    images = chests[:90].copy()
    images[7] = 40
    reason = lacking(images, features(images), chests[:0], features(chests[:0]))
    assert reason is not None
    assert reason.startswith("60 images to learn from and 29 ")


def test_a_dead_network_gives_no_model(chests: Images) -> None:
    same = np.ones((90, 5), dtype=np.float32)
    arguments = (chests[:90], same, chests[:0], same[:0])
    assert fit(*arguments) is None
    assert lacking(*arguments) == "the network gives every image the same features"


def test_a_few_negatives_among_the_training_images_do_no_harm(chests: Images, ordinary: Images) -> None:
    train, held, _ = np.split(chests.copy(), [TRAINING, TRAINING + HELD_OUT])
    train[:2] = 255 - train[:2]
    held[:1] = 255 - held[:1]
    model = fit(train, features(train), held, features(held))
    assert model is not None
    assert share(flagged(model, 255 - ordinary), "inverted") >= 0.95
    assert share(flagged(model, ordinary), None) >= 0.95


@pytest.mark.parametrize(
    ("images", "vectors", "message"),
    [
        (np.zeros((3, 32, 32), np.float32), np.zeros((3, 24), np.float32), "expected uint8"),
        (np.zeros((3, 32, 40), np.uint8), np.zeros((3, 24), np.float32), "expected uint8"),
        (np.zeros((3, 8, 8), np.uint8), np.zeros((3, 24), np.float32), "expected uint8"),
        (np.zeros((3, 32, 32), np.uint8), np.zeros((2, 24), np.float32), "expected floats"),
        (np.zeros((3, 32, 32), np.uint8), np.zeros((3, 24), np.int64), "expected floats"),
        (np.zeros((3, 32, 32), np.uint8), np.zeros((3, 25), np.float32), "25 features"),
    ],
)
def test_wrong_shapes_are_refused(fitted: QualityModel, images: np.ndarray, vectors: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(fitted, images, vectors)


def test_fitting_refuses_what_does_not_fit_together(chests: Images) -> None:
    x, f = chests[:90], features(chests[:90])
    with pytest.raises(ValueError, match="differ"):
        fit(x, f, x, f[:, :3])
    f = f.copy()
    f[4, 4] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        fit(x, f, x, features(x))


# ---- kept in a bundle -------------------------------------------------------------------------------------


def test_arrays_come_back_from_a_file(fitted: QualityModel, ordinary: Images) -> None:
    file = io.BytesIO()
    np.savez(file, **fitted.arrays())
    file.seek(0)
    with np.load(file, allow_pickle=False) as stored:
        again = QualityModel.from_arrays(dict(stored))
    for name, array in fitted.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array, err_msg=name)
    mixed = np.concatenate([ordinary, 255 - ordinary])
    assert flagged(again, mixed) == flagged(fitted, mixed)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("format", lambda a: a + 1, "format 2"),
        ("format", lambda a: None, "no array 'format'"),
        ("pixels_mean", lambda a: None, "missing or unknown"),
        ("other", lambda a: np.zeros(3), "missing or unknown"),
        ("pixels_mean", lambda a: a[:-1], "pixels_mean is"),
        ("pixels_axes", lambda a: a.T, "pixels_axes is"),
        ("features_axes", lambda a: a[:, :-1], "features_axes is"),
        ("features_mean", lambda a: a[:0], "features_mean is"),
        ("features_mean", lambda a: a.astype(np.float32), "features_mean is float32"),
        ("features_mean", lambda a: a[:, None], "features_mean is"),
        ("features_axes", lambda a: np.where(a == a.max(), np.nan, a), "features_axes holds a value that is not fin"),
        ("features_scale", lambda a: 0 * a, "features_scale holds a value that is not positive"),
        ("pixels_variances", lambda a: -a, "pixels_variances holds"),
        ("pixels_residual", lambda a: np.array(np.inf), "pixels_residual holds"),
        ("limits", lambda a: a - a[0], "limits holds"),
        ("counts", lambda a: a.astype(float), "counts is float64"),
        ("expected_rates", lambda a: a - 0.5, "no shares"),
        ("expected_rates", lambda a: a + 0.5, "no shares"),
    ],
)
def test_damaged_arrays_are_refused(
    fitted: QualityModel, name: str, damage: Callable[[np.ndarray], np.ndarray | None], message: str
) -> None:
    arrays = fitted.arrays()
    damaged = damage(arrays.pop(name, np.zeros(0)))
    if damaged is not None:
        arrays[name] = damaged
    with pytest.raises(ValueError, match=message):
        QualityModel.from_arrays(arrays)


# ---- real images ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nih(shared: Path) -> tuple[Images, np.ndarray, list[str]]:
    """Images of NIH ChestX-ray14 at 96 x 96, their patients and their names."""
    paths = sorted((shared / "nih" / "images256").glob("*.png"))
    images = np.stack([imaging.load(str(path), InputSpec(size=SIZE)) for path in paths])
    return images, np.array([path.name[:8] for path in paths]), [path.name for path in paths]


def test_real_images(nih: tuple[Images, np.ndarray, list[str]], shared: Path) -> None:
    images, patients, names = nih
    training = np.isin(patients, np.random.default_rng(0).permutation(np.unique(patients))[:300])
    rest = np.flatnonzero(~training)
    held, new = rest[::2], rest[1::2]
    model = fit(images[training], features(images[training]), images[held], features(images[held]))
    assert model is not None
    x = images[new]
    usual = judge(model, x, features(x))
    assert sum(flag is not None for flag in usual) <= 4, [(names[i], f) for i, f in zip(new, usual, strict=True) if f]
    assert judge(model, np.ascontiguousarray(x[:, :, ::-1]), features(x)).count(None) >= len(x) - 4
    assert share(flagged(model, 255 - x), "inverted") >= 0.95
    turned = np.ascontiguousarray(np.rot90(x, axes=(1, 2)))
    assert share(judge(model, turned, features(x)), None) <= 0.2
    # One file, stored with its two tags: MONOCHROME1 read as if it were MONOCHROME2 is the commonest inversion.
    film = imaging.load(str(shared / "dicom" / "cr_chest_monochrome2_jpeg.dcm"), InputSpec(size=SIZE))[None]
    assert sorted(map(str, flagged(model, np.concatenate([film, 255 - film])))) == ["None", "inverted"]


def test_a_negative_among_the_real_images_is_found(nih: tuple[Images, np.ndarray, list[str]]) -> None:
    """00017625_000.png is a photographic negative in the release itself, which nothing in its tables says."""
    images, patients, names = nih
    at = names.index("00017625_000.png")
    others = np.flatnonzero(patients != patients[at])
    train, held = images[others[::2]], images[others[1::2]]
    model = fit(train, features(train), held, features(held))
    assert model is not None
    assert flagged(model, images[at : at + 1])[0] in ("inverted", "not_frontal_chest")
