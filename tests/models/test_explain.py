"""Heat maps follow the formula, and cover the right region of the image."""

from __future__ import annotations

import functools
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
from ray_cxr.imaging.overlays import (
    WHOLE,
    Area,
    compute_area,
    crop_padding,
    draw_overlay,
    encode_jpeg,
    project_cells,
    scale_to_side,
)
from ray_cxr.imaging.phantom_anatomy import sample_anatomy
from ray_cxr.imaging.phantom_findings import draw_phantom
from ray_cxr.imaging.resize import locate_in_input, resize
from ray_cxr.labels import FINDINGS
from ray_cxr.models import backbones, classifier
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.explain import GradCam

SIZE = 32
#: Every other backbone takes a second or more to build.
QUICK = "TinyCNN"
HEADS = [{"pooling": "avg"}, {"pooling": "max"}, {"pooling": "avgmax", "dense": (12, 8), "dropout": 0.5}]


@pytest.fixture(autouse=True)
def eagerly() -> Iterator[None]:
    """Run eagerly: for a few images, tracing takes longer than it saves."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def build_model(backbone: str = QUICK, size: int = SIZE, findings: tuple = FINDINGS, **head) -> keras.Model:
    keras.utils.set_random_seed(1)
    return classifier.build(Architecture(backbone=backbone, size=size, findings=findings, **head))


@functools.cache
def shared_model(head: int) -> keras.Model:
    """Build a model that tests share; they must not change its weights."""
    return build_model(**HEADS[head])


def make_images(count: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (count, size, size, 1), dtype=np.uint8)


def expected_map(model: keras.Model, image: np.ndarray, finding: int, method: str) -> np.ndarray:
    """Compute the map of one finding of one image in NumPy, with the whole model under one tape."""
    feature = model.get_layer("tiny_relu3").output
    both = keras.Model(model.input, [feature, model.get_layer("logits").output])
    with tf.GradientTape() as tape:
        features, logits = both(image[None], training=False)
        wanted = logits[0, finding]
    gradient = np.asarray(tape.gradient(wanted, features))[0]
    features = np.asarray(features)[0]
    weights = gradient.mean(axis=(0, 1)) if method == "gradcam" else gradient
    return np.maximum((weights * features).sum(axis=-1), 0)


@pytest.mark.parametrize("method", ["gradcam", "hirescam"])
@pytest.mark.parametrize("head", range(len(HEADS)))
def test_maps_equal_the_formula_under_a_plain_tape(head: int, method: str) -> None:
    model, images, chosen = shared_model(head), make_images(2), np.array([[0, 5], [13, 0]])
    maps, probabilities = (found := GradCam(model, method).explain(images, chosen)).maps, found.probabilities
    assert (maps.shape, maps.dtype) == ((2, 2, 4, 4), np.float32)
    np.testing.assert_allclose(probabilities, np.asarray(model(images)), rtol=0, atol=1e-6)
    for i, k in np.ndindex(2, 2):
        expected = expected_map(model, images[i], int(chosen[i, k]), method)
        np.testing.assert_allclose(maps[i, k], expected, rtol=1e-4, atol=1e-6)
    assert maps.max() > 0


def test_map_without_evidence_is_zero_and_its_overlay_gray() -> None:
    model = build_model()
    kernel, bias = model.get_layer("logits").get_weights()
    kernel[:, 0] = -np.abs(kernel[:, 0])  # features are outputs of a ReLU, so no cell supports the first finding
    model.get_layer("logits").set_weights([kernel, bias])
    images = make_images(1)
    (cells,) = GradCam(model).explain(images, np.array([[0]])).maps[0]
    assert not cells.any()
    np.testing.assert_array_equal(draw_overlay(images[0, ..., 0], cells, side=SIZE), np.repeat(images[0], 3, axis=2))


#: One backbone of each family takes part in the gate.
LEVELS = dict.fromkeys(("ResNet50", "DenseNet121", "ConvNeXtTiny"), pytest.mark.slow)
OTHERS = [pytest.param(name, marks=LEVELS.get(name, pytest.mark.long)) for name in backbones.BACKBONES if name != QUICK]


@pytest.mark.parametrize("backbone", [QUICK, *OTHERS])
def test_every_backbone_has_maps(backbone: str) -> None:
    model = build_model(backbone, size=64)
    maps = GradCam(model).explain(make_images(1, 64), np.arange(14)[None]).maps
    h, w = model.get_layer("pool").input.shape[1:3]
    assert (maps.shape, h > 1) == ((1, 14, h, w), True)
    assert 0 <= maps.min() < maps.max() < np.inf


@settings(max_examples=60)
@given(*[st.integers(32, 400)] * 2, st.sampled_from(["stretch", "pad", "crop"]), *[st.floats(0, 1)] * 2)
def test_spot_in_the_input_is_drawn_on_the_spot_in_the_original(height, width, aspect: str, down, right) -> None:
    """Resize is the oracle: a resized bright square, used as a map, must cover the original square."""
    spec = InputSpec(size=64, aspect=aspect)
    side = max(6, min(height, width) // 6)
    top, left = int(down * (height - side)), int(right * (width - side))
    image = np.zeros((height, width), np.uint8)
    image[top : top + side, left : left + side] = 255
    seen, area = resize(image, spec), compute_area(spec, height, width)
    laid = project_cells(seen.astype(np.float32), area, image.shape)
    inside = project_cells(np.ones((8, 8), np.float32), area, image.shape) > 0.5
    assert inside.all() or aspect == "crop"
    pixel = max(height, width) / 64 + 1  # the input's own blur, on either side
    found, visible = np.argwhere(laid > 127), np.argwhere((image > 0) & inside)
    if len(found) and len(visible):
        assert (np.abs(found.min(axis=0) - visible.min(axis=0)) <= 1.5 * pixel).all()
        assert (np.abs(found.max(axis=0) - visible.max(axis=0)) <= 1.5 * pixel).all()


def test_areas_and_cells_equal_manual_results() -> None:
    # An image of 100 x 200 in a square input of 64.
    assert compute_area(InputSpec(size=64), 100, 200) == WHOLE
    assert compute_area(InputSpec(size=64, aspect="pad"), 100, 200) == Area(-0.5, 0.0, 1.5, 1.0)
    assert locate_in_input(InputSpec(size=64, aspect="pad"), 200, 99) == (0, 16, 64, 32)
    assert compute_area(InputSpec(size=64, aspect="crop"), 100, 200) == Area(0.0, 0.25, 1.0, 0.75)
    cells = np.array([[0.0, 4.0]], np.float32)
    np.testing.assert_allclose(project_cells(cells, WHOLE, (1, 4)), [[0, 1, 3, 4]])
    np.testing.assert_allclose(project_cells(cells + 1, Area(0.0, 0.25, 1.0, 0.75), (1, 4)), [[0, 1, 5, 0]])
    padded = project_cells(np.array([[8.0], [1.0], [2.0], [8.0]], np.float32), Area(-0.5, 0.0, 1.5, 1.0), (2, 1))
    np.testing.assert_allclose(padded, [[1], [2]])


def test_overlay_has_the_proportions_of_the_image_and_colour_on_the_place() -> None:
    image = np.full((300, 150), 100, np.uint8)
    image[:10] = 90
    cells = np.zeros((4, 4), np.float32)
    cells[3, 0] = 2.0  # below, on the left
    shown = draw_overlay(image, cells, side=200)
    assert (shown.shape, shown.dtype) == ((200, 100, 3), np.uint8)
    coloured = np.ptp(shown.astype(int), axis=2) > 0
    assert coloured[190:, :10].all()
    assert not coloured[:100].any()
    assert not coloured[:, 60:].any()
    # In a padded image the same corner of the input is the left margin, which must not appear.
    padded = draw_overlay(image, cells, compute_area(InputSpec(size=64, aspect="pad"), 300, 150), side=200)
    assert np.ptp(padded[:, 55:].astype(int), axis=2).max() == 0


def test_scaling_keeps_proportions() -> None:
    assert scale_to_side(np.zeros((1024, 512), np.uint8), 256).shape == (256, 128)
    assert scale_to_side(np.zeros((40, 50), np.uint8), 200).shape == (160, 200)
    same = make_images(1)[0, ..., 0]
    assert scale_to_side(same, SIZE) is same
    spec = InputSpec(size=256, aspect="pad")
    image = np.random.default_rng(0).integers(0, 256, (300, 500), dtype=np.uint8)
    np.testing.assert_array_equal(crop_padding(resize(image, spec), spec, (300, 500)), scale_to_side(image, 256))


@pytest.mark.parametrize("colours", [(), (3,)])
def test_overlay_files_are_the_image_without_metadata(colours: tuple[int, ...]) -> None:
    pixels = np.repeat(np.linspace(0, 255, 30).astype(np.uint8)[None], 20, axis=0)
    if colours:
        pixels = np.stack([pixels, 255 - pixels, np.full_like(pixels, 40)], axis=2)
    with Image.open(io.BytesIO(encode_jpeg(pixels))) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB" if colours else "L")
        assert np.abs(np.asarray(image).astype(int) - pixels).max() < 30
        assert not {"exif", "comment", "icc_profile"} & set(image.info)


@pytest.mark.slow
def test_maps_of_a_trained_model_cover_the_drawn_finding() -> None:
    """In phantoms with a Mass, the map covers the mass far more than by chance."""
    count, unseen = 80, 20
    anatomies = [sample_anatomy(3, patient, 0, size=64) for patient in range(1, count + 1)]
    healthy = [draw_phantom(anatomy) for anatomy in anatomies]
    ill = [draw_phantom(anatomy, ("Mass",)) for anatomy in anatomies]
    images = np.stack([resize(image, InputSpec(size=48)) for image in (*healthy, *ill)])[..., None]
    labels = np.repeat([[0.0], [1.0]], count, axis=0)
    seen = np.r_[0 : count - unseen, count : 2 * count - unseen]
    model = build_model(size=48, findings=("Mass",))
    model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy")
    model.fit(images[seen], labels[seen], batch_size=24, epochs=10, verbose=0)

    maps = GradCam(model).explain(images[-unseen:], np.zeros((unseen, 1), np.int32)).maps[:, 0]
    evidence, areas = [], []
    for cells, without, with_it in zip(maps, healthy[-unseen:], ill[-unseen:], strict=True):
        mass = np.abs(with_it.astype(int) - without) > 24
        strength = project_cells(cells, WHOLE, mass.shape)
        evidence.append(strength[mass].sum() / max(strength.sum(), 1e-6))
        areas.append(mass.mean())
    assert np.mean(evidence) > 2 * np.mean(areas), (np.mean(evidence), np.mean(areas))
