"""Heat maps are the gradients they say they are, on the place they say they are."""

from __future__ import annotations

import io
from collections.abc import Iterator

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_cxr.config import InputSpec
from ray_cxr.data import imaging, phantoms
from ray_cxr.data.heatmaps import WHOLE, Area, area_of, content, on_picture
from ray_cxr.labels import FINDINGS
from ray_cxr.models import backbones, classifier
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.explain import GradCam, bounded, encode, overlay, unpadded

SIZE = 32
#: Built in seconds each, which is for the slower half of the tests.
LARGE = ("ResNet50", "ResNet50V2", "DenseNet121", "DenseNet169", "EfficientNetV2B0")
HEADS = [
    {"pooling": "avg"},
    {"pooling": "max"},
    {"pooling": "avgmax"},
    {"pooling": "avg", "dense": (12,), "dropout": 0.5},
    {"pooling": "avgmax", "dense": (12, 8), "dropout": 0.5},
]


@pytest.fixture
def eagerly() -> Iterator[None]:
    """For a few images a graph costs more than it saves."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def network(backbone: str = "TinyCNN", size: int = SIZE, findings: tuple[str, ...] = FINDINGS, **head) -> keras.Model:
    keras.utils.set_random_seed(1)
    return classifier.build(Architecture(backbone=backbone, size=size, findings=findings, **head))


def pictures(count: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, size, size, 1), dtype=np.uint8)


def naive(model: keras.Model, image: np.ndarray, finding: int, method: str) -> np.ndarray:
    """One image, one finding, the whole network under one tape, the formula in NumPy."""
    feature = model.get_layer("tiny_relu3").output
    both = keras.Model(model.input, [feature, model.get_layer("logits").output])
    with tf.GradientTape() as tape:
        features, logits = both(image[None], training=False)
        wanted = logits[0, finding]
    gradient = np.asarray(tape.gradient(wanted, features))[0]
    features = np.asarray(features)[0]
    weights = gradient.mean(axis=(0, 1)) if method == "gradcam" else gradient
    return np.maximum((weights * features).sum(axis=-1), 0)


@pytest.mark.parametrize(
    ("head", "method"),
    [*((head, "gradcam") for head in HEADS), (HEADS[1], "hirescam"), (HEADS[-1], "hirescam")],
    ids=str,
)
@pytest.mark.usefixtures("eagerly")
def test_equals_the_formula_under_a_plain_tape(head: dict, method: str) -> None:
    model, images = network(**head), pictures(2)
    chosen = np.array([[0, 5], [13, 0]])
    maps = GradCam(model, method).maps(images, chosen)
    assert maps.shape == (2, 2, 4, 4)
    assert maps.dtype == np.float32
    for i in range(2):
        for k in range(2):
            expected = naive(model, images[i], int(chosen[i, k]), method)
            np.testing.assert_allclose(maps[i, k], expected, rtol=1e-4, atol=1e-6)
    assert maps.max() > 0


@pytest.mark.usefixtures("eagerly")
def test_sums_to_the_logit_less_its_bias_where_the_head_is_an_average() -> None:
    """The two halves, for and against, are the logit: a bias of 1 for each sign of the weights."""
    model, images = network(), pictures(2)
    kernel = model.get_layer("logits").kernel.numpy()
    cam, chosen = GradCam(model), np.tile(np.arange(14), (2, 1))
    logits = np.asarray(classifier.logits_of(model)(images))
    for_it = cam.maps(images, chosen)
    model.get_layer("logits").set_weights([-kernel, np.ones(14, np.float32)])
    against = cam.maps(images, chosen)
    np.testing.assert_allclose((for_it - against).sum(axis=(2, 3)), logits, rtol=1e-4, atol=1e-5)
    assert not np.logical_and(for_it > 0, against > 0).any()


@pytest.mark.usefixtures("eagerly")
def test_both_methods_agree_where_the_head_is_an_average() -> None:
    model, images, chosen = network(), pictures(2), np.array([[3], [4]])
    one, other = (GradCam(model, method).maps(images, chosen) for method in ("gradcam", "hirescam"))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("eagerly")
def test_probabilities_are_the_networks_and_a_picture_does_not_depend_on_its_company() -> None:
    model, images = network(pooling="avgmax", dense=(8,), dropout=0.5), pictures(4)
    cam = GradCam(model)
    found = cam.explain(images, np.tile([1, 2, 3], (4, 1)))
    np.testing.assert_allclose(found.probabilities, np.asarray(model(images)), rtol=0, atol=1e-6)
    alone = cam.maps(images[2:3], np.array([[3, 1, 2]]))
    np.testing.assert_allclose(alone[0], found.maps[2, [2, 0, 1]], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("eagerly")
def test_a_map_without_evidence_is_all_zero_and_its_overlay_gray() -> None:
    model = network()
    kernel, bias = model.get_layer("logits").get_weights()
    kernel[:, 0] = -np.abs(kernel[:, 0])  # the features are a ReLU's, so that nothing speaks for the first
    model.get_layer("logits").set_weights([kernel, bias])
    (cells,) = GradCam(model).maps(pictures(1), np.array([[0]]))[0]
    assert not cells.any()
    picture = pictures(1)[0, ..., 0]
    shown = overlay(picture, cells, side=SIZE)
    np.testing.assert_array_equal(shown, np.repeat(picture[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "backbone", [pytest.param(name, marks=[pytest.mark.ray] if name in LARGE else []) for name in backbones.BACKBONES]
)
@pytest.mark.usefixtures("eagerly")
def test_every_backbone_has_maps(backbone: str) -> None:
    model = network(backbone, size=64)
    maps = GradCam(model).maps(pictures(2, 64), np.array([[0, 1, 2], [3, 4, 5]]))
    h, w = model.get_layer("pool").input.shape[1:3]
    assert maps.shape == (2, 3, h, w)
    assert h > 1
    assert np.isfinite(maps).all()
    assert (maps >= 0).all()
    assert maps.max() > 0


@pytest.mark.slow
def test_a_trained_network_looks_where_the_finding_is_drawn() -> None:
    """Phantoms with and without a Mass: the highest cell lies on the mass far more often than by chance."""
    count, unseen = 160, 40
    chests = [phantoms.anatomy(3, patient, 0, size=64) for patient in range(1, count + 1)]
    healthy = [phantoms.draw(chest) for chest in chests]
    ill = [phantoms.draw(chest, ("Mass",)) for chest in chests]
    spec = InputSpec(size=48)
    images = np.stack([imaging.resize(one, spec) for one in (*healthy, *ill)])[..., None]
    labels = np.repeat([[0.0], [1.0]], count, axis=0).astype(np.float32)
    seen = np.r_[0 : count - unseen, count : 2 * count - unseen]
    model = network(size=48, findings=("Mass",))
    train(model, images[seen], labels[seen], steps=50)

    maps = GradCam(model).maps(images[-unseen:], np.zeros((unseen, 1), np.int32))[:, 0]
    hits, chance = [], []
    for cells, without, with_it in zip(maps, healthy[-unseen:], ill[-unseen:], strict=True):
        drawn = np.abs(with_it.astype(int) - without) > 24
        hits.append(drawn.ravel()[on_picture(cells, WHOLE, drawn.shape).argmax()])
        chance.append(drawn.mean())
    assert np.mean(hits) > 4 * np.mean(chance), (np.mean(hits), np.mean(chance))


def train(model: keras.Model, images: np.ndarray, labels: np.ndarray, steps: int) -> None:
    logits, optimizer = classifier.logits_of(model), keras.optimizers.Adam(3e-3)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(y, logits(x, training=True)))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    chance = np.random.default_rng(0)
    for _ in range(steps):
        batch = chance.choice(len(images), 24, replace=False)
        step(images[batch], labels[batch])


# ---------------------------------------------------------------- where a map lies


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(32, 400),
    width=st.integers(32, 400),
    aspect=st.sampled_from(["stretch", "pad", "crop"]),
    where=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_spot_in_the_input_is_laid_back_on_the_spot_in_the_original(
    height: int, width: int, aspect: str, where: tuple[float, float]
) -> None:
    """The resize itself is the oracle: what it makes of a bright square, as a map, lies on that square again."""
    spec = InputSpec(size=64, aspect=aspect)
    side = max(6, min(height, width) // 6)
    top, left = int(where[0] * (height - side)), int(where[1] * (width - side))
    picture = np.zeros((height, width), np.uint8)
    picture[top : top + side, left : left + side] = 255
    seen = imaging.resize(picture, spec)
    laid = on_picture(seen.astype(np.float32), area_of(spec, height, width), (height, width))
    inside = on_picture(np.ones((8, 8), np.float32), area_of(spec, height, width), (height, width)) > 0.5
    if aspect != "crop":
        assert inside.all()
    if not seen.any():
        return
    pixel = max(height, width) / 64 + 1  # the input's own blur, on either side
    rows, columns = np.nonzero(laid > 127)
    visible = np.argwhere((picture > 0) & inside)
    if not len(rows) or not len(visible):
        return
    (first_row, first_column), (last_row, last_column) = visible.min(axis=0), visible.max(axis=0)
    assert abs(rows.min() - first_row) <= 1.5 * pixel
    assert abs(rows.max() - last_row) <= 1.5 * pixel
    assert abs(columns.min() - first_column) <= 1.5 * pixel
    assert abs(columns.max() - last_column) <= 1.5 * pixel


@given(height=st.integers(32, 3000), width=st.integers(32, 3000), size=st.integers(32, 512))
@settings(deadline=None, max_examples=40)
def test_the_margins_of_padding_are_those_of_the_resize(height: int, width: int, size: int) -> None:
    spec = InputSpec(size=size, aspect="pad", interpolation="linear")
    white = np.nonzero(imaging.resize(np.full((height, width), 255, np.uint8), spec))
    top, left, rows, columns = content(spec, height, width)
    assert (white[0].min(), white[1].min()) == (top, left)
    assert (white[0].max() + 1, white[1].max() + 1) == (top + rows, left + columns)


def test_areas_by_hand() -> None:
    """A picture of 100 x 200 in a square input of 64."""
    assert area_of(InputSpec(size=64), 100, 200) == WHOLE
    assert area_of(InputSpec(size=64, aspect="pad"), 100, 200) == Area(-0.5, 0.0, 1.5, 1.0)
    assert area_of(InputSpec(size=64, aspect="crop"), 100, 200) == Area(0.0, 0.25, 1.0, 0.75)


def test_on_a_picture_by_hand() -> None:
    cells = np.array([[0.0, 4.0]], np.float32)
    np.testing.assert_allclose(on_picture(cells, WHOLE, (1, 4)), [[0, 1, 3, 4]])
    cropped = on_picture(cells + 1, Area(0.0, 0.25, 1.0, 0.75), (1, 4))
    np.testing.assert_allclose(cropped, [[0, 1, 5, 0]])
    padded = on_picture(np.array([[8.0], [1.0], [2.0], [8.0]], np.float32), Area(-0.5, 0.0, 1.5, 1.0), (2, 1))
    np.testing.assert_allclose(padded, [[1], [2]])


# ---------------------------------------------------------------- the picture of it


def test_an_overlay_has_the_originals_proportions_and_its_colour_on_the_place() -> None:
    picture = np.full((300, 150), 100, np.uint8)
    picture[:10] = 90
    cells = np.zeros((4, 4), np.float32)
    cells[3, 0] = 2.0  # below, on the left
    shown = overlay(picture, cells, side=200)
    assert shown.shape == (200, 100, 3)
    assert shown.dtype == np.uint8
    coloured = np.ptp(shown.astype(int), axis=2) > 0
    assert coloured[190:, :10].all()
    assert not coloured[:100].any()
    assert not coloured[:, 60:].any()
    # Padded to a square, the same corner of the input is the margin, left of the picture; nothing of it may show.
    padded = overlay(picture, cells, area_of(InputSpec(size=64, aspect="pad"), 300, 150), side=200)
    assert np.ptp(padded[:, 55:].astype(int), axis=2).max() == 0


def test_a_strong_place_hides_more_of_the_picture_than_a_weak_one() -> None:
    dark, light = np.full((64, 64), 0, np.uint8), np.full((64, 64), 255, np.uint8)
    cells = np.linspace(0, 1, 16, dtype=np.float32).reshape(1, 16)
    contrast = overlay(light, cells, side=64).astype(int) - overlay(dark, cells, side=64)
    assert (np.diff(contrast.sum(axis=(0, 2))) <= 0).all()
    assert contrast[0, 0].tolist() == [255, 255, 255]
    assert (contrast[0, -1] < 130).all()


def test_bounded_keeps_proportions_and_what_has_the_size_already() -> None:
    assert bounded(np.zeros((1024, 512), np.uint8), 256).shape == (256, 128)
    assert bounded(np.zeros((40, 50), np.uint8), 200).shape == (160, 200)
    same = pictures(1)[0, ..., 0]
    assert bounded(same, SIZE) is same
    spec = InputSpec(size=256, aspect="pad")
    picture = np.random.default_rng(0).integers(0, 256, (300, 500), dtype=np.uint8)
    np.testing.assert_array_equal(unpadded(imaging.resize(picture, spec), spec, (300, 500)), bounded(picture, 256))


def test_a_png_is_pixels_alone() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    data = encode(rgb)
    with Image.open(io.BytesIO(data)) as picture:
        np.testing.assert_array_equal(np.asarray(picture), rgb)
        assert not picture.info
    kinds, at = set(), 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kinds.add(data[at + 4 : at + 8])
        at += 12 + length
    assert kinds == {b"IHDR", b"IDAT", b"IEND"}
