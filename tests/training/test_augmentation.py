"""Where every change of the training images puts a dot, by how much, and from which draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from ray_cxr.config import TrainSettings
from ray_cxr.training import augmentation
from ray_cxr.training.augmentation import DRAWS, augment, draws

#: A draw that leaves its option at no change; `flip` has none in the middle, it mirrors below 1/2.
STILL = {"flip": 0.9, "shift_x": 0.5, "shift_y": 0.5, "contrast": 0.5, "rotation": 0.5, "zoom": 0.5}
COLUMNS = {name: getattr(augmentation, name.upper()) for name in STILL}
OFF: dict[str, Any] = {"flip": False, "shift": 0.0, "contrast": 0.0, "rotation": 0.0, "zoom": 0.0}
ALL_ON: dict[str, Any] = {"flip": True, "shift": 0.1, "contrast": 0.5, "rotation": 20.0, "zoom": 0.3}
#: Which draws each option listens to.
LISTENS = {
    "flip": ["flip"],
    "shift": ["shift_x", "shift_y"],
    "contrast": ["contrast"],
    "rotation": ["rotation"],
    "zoom": ["zoom"],
}
#: The draw of the largest change upwards; `draws` stays below 1, by less than a float32 shows in a pixel.
MOST = 1.0


def drawn(rows: int = 1, **values: float) -> np.ndarray:
    """Draws that change nothing but what is named."""
    row = np.zeros(DRAWS, np.float32)
    for name, value in {**STILL, **values}.items():
        row[COLUMNS[name]] = value
    return np.tile(row, (rows, 1))


def changed(image: np.ndarray, options: dict[str, Any], **values: float) -> np.ndarray:
    """One image uint8 [S,S] under some options and draws."""
    out = augment(tf.constant(image[None, :, :, None]), drawn(**values), TrainSettings(**{**OFF, **options}))
    assert out.dtype == tf.uint8
    assert out.shape == (1, *image.shape, 1)
    return out.numpy()[0, :, :, 0]


def dot(side: int, y: float, x: float) -> np.ndarray:
    """A soft bright dot, whose centre of mass is at (y, x) to a tenth of a pixel."""
    rows, columns = np.mgrid[:side, :side]
    return np.round(250 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 1.5**2))).astype(np.uint8)


def place(image: np.ndarray) -> tuple[float, float]:
    """The centre of mass of an image (y, x), pixels."""
    total = image.astype(float)
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    return float((total * rows).sum() / total.sum()), float((total * columns).sum() / total.sum())


def noise(side: int = 32, rows: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, side, side, 1)).astype(np.uint8)


# Draws


@given(st.integers(0, 2**31 - 1), st.integers(0, 10_000), st.integers(0, 10_000), st.integers(1, 64))
def test_draws_are_a_pure_function_in_the_unit_interval(seed: int, epoch: int, step: int, batch: int) -> None:
    one = draws(seed, epoch, step, batch)
    assert one.shape == (batch, DRAWS)
    assert one.dtype == np.float32
    assert (one >= 0.0).all()
    assert (one < 1.0).all()
    np.random.default_rng().random(3)
    np.testing.assert_array_equal(one, draws(seed, epoch, step, batch))


def test_draws_differ_between_seeds_epochs_and_steps() -> None:
    keys = [(seed, epoch, step) for seed in range(3) for epoch in range(3) for step in range(3)]
    assert len({draws(*key, 4).tobytes() for key in keys}) == len(keys)


def test_draws_are_not_those_of_the_epochs_order() -> None:
    """NumPy gives [seed, epoch] and [seed, epoch, 0] one stream; the first step must not repeat the order's."""
    order = np.random.default_rng([7, 3]).random((DRAWS, 16), dtype=np.float32)
    assert not np.isin(order, draws(7, 3, 0, 16)).any()


def test_draws_are_uniform_and_their_columns_independent() -> None:
    many = draws(0, 0, 0, 20_000)
    np.testing.assert_allclose(many.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(many.var(axis=0), 1 / 12, atol=0.003)
    correlations = np.corrcoef(many.T) - np.eye(DRAWS)
    assert np.abs(correlations).max() < 0.03


def test_a_further_column_leaves_the_others_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new option must not change what a run with the old ones draws."""
    before = draws(1, 2, 3, 8)
    monkeypatch.setattr(augmentation, "DRAWS", DRAWS + 1)
    after = draws(1, 2, 3, 8)
    assert after.shape == (8, DRAWS + 1)
    np.testing.assert_array_equal(after[:, :DRAWS], before)


def test_every_column_is_someones_and_no_column_is_shared() -> None:
    assert sorted(COLUMNS.values()) == list(range(DRAWS))


# Nothing


def test_with_everything_off_the_very_tensor_comes_back() -> None:
    images = tf.constant(noise(rows=2))
    assert augment(images, draws(0, 0, 0, 2), TrainSettings(**OFF)) is images


@pytest.mark.parametrize("side", [32, 33])
@pytest.mark.parametrize("option", [*LISTENS, "all"])
def test_draws_that_say_no_change_change_no_pixel(option: str, side: int) -> None:
    image = noise(side)[0, :, :, 0]
    options = ALL_ON if option == "all" else {option: ALL_ON[option]}
    np.testing.assert_array_equal(changed(image, options), image)


# Each alone


@pytest.mark.parametrize("side", [32, 33])
@pytest.mark.parametrize(("draw", "mirrored"), [(0.0, True), (0.49, True), (0.5, False), (0.99, False)])
def test_flip_mirrors_left_to_right(draw: float, mirrored: bool, side: int) -> None:
    image = noise(side)[0, :, :, 0]
    np.testing.assert_array_equal(changed(image, {"flip": True}, flip=draw), image[:, ::-1] if mirrored else image)


@pytest.mark.parametrize(
    ("x", "y", "right", "down"),
    [
        (1.0, 0.5, -8, 0),
        (0.0, 0.5, 8, 0),
        (0.5, 1.0, 0, -8),
        (0.5, 0.0, 0, 8),
        (0.75, 0.25, -4, 4),
        (0.51, 0.5, 0, 0),
        (0.65625, 0.34375, -2, 2),
    ],
)
def test_shift_is_in_whole_pixels_and_repeats_the_edge(x: float, y: float, right: int, down: int) -> None:
    """A quarter of 32 pixels to either side at the most; two and a half pixels are rounded to the even two."""
    image = noise(32)[0, :, :, 0]
    rows, columns = np.clip(np.arange(32) - down, 0, 31), np.clip(np.arange(32) - right, 0, 31)
    expected = image[rows][:, columns]
    np.testing.assert_array_equal(changed(image, {"shift": 0.25}, shift_x=x, shift_y=y), expected)


@pytest.mark.parametrize("side", [64, 65])
@pytest.mark.parametrize(("draw", "degrees"), [(MOST, 30.0), (0.0, -30.0), (0.75, 15.0)])
@pytest.mark.parametrize(("up", "right"), [(0.0, 20.0), (20.0, 0.0), (-12.0, 9.0)])
def test_rotation_turns_counter_clockwise(draw: float, degrees: float, up: float, right: float, side: int) -> None:
    """At (right, up) from the centre, an angle of t takes a dot to (right cos t - up sin t, right sin t + up cos t)."""
    centre, t = (side - 1) / 2, math.radians(degrees)
    y, x = place(changed(dot(side, centre - up, centre + right), {"rotation": 30.0}, rotation=draw))
    assert x - centre == pytest.approx(right * math.cos(t) - up * math.sin(t), abs=0.1)
    assert centre - y == pytest.approx(right * math.sin(t) + up * math.cos(t), abs=0.1)


@pytest.mark.parametrize("side", [64, 65])
@pytest.mark.parametrize(("draw", "factor"), [(MOST, 1.2), (0.0, 0.8), (0.75, 1.1)])
def test_zoom_is_about_the_centre(draw: float, factor: float, side: int) -> None:
    centre = (side - 1) / 2
    image = dot(side, centre - 15, centre + 10)
    out = changed(image, {"zoom": 0.2}, zoom=draw)
    y, x = place(out)
    assert y - centre == pytest.approx(-15 * factor, abs=0.1)
    assert x - centre == pytest.approx(10 * factor, abs=0.1)
    assert out.astype(float).sum() == pytest.approx(image.astype(float).sum() * factor**2, rel=0.06)


@pytest.mark.parametrize("side", [64, 65])
@pytest.mark.parametrize("options", [{"rotation": 45.0}, {"zoom": 0.5}, {"rotation": 45.0, "zoom": 0.5, "flip": True}])
@pytest.mark.parametrize("draw", [0.0, 0.3, MOST])
def test_the_centre_stays_put(options: dict[str, Any], draw: float, side: int) -> None:
    centre = (side - 1) / 2
    out = changed(dot(side, centre, centre), options, rotation=draw, zoom=draw, flip=draw)
    assert place(out) == pytest.approx((centre, centre), abs=0.02)


def test_what_comes_in_from_outside_repeats_the_edge() -> None:
    image = np.full((32, 32), 90, np.uint8)
    for options in ({"rotation": 45.0}, {"zoom": 0.5}, {"shift": 0.5}, ALL_ON):
        out = changed(image, options, rotation=MOST, zoom=0.0, shift_x=0.0, shift_y=MOST)
        assert (out == 90).all(), options


@pytest.mark.parametrize(("draw", "gain"), [(MOST, 1.5), (0.0, 0.5), (0.75, 1.25)])
def test_contrast_spreads_about_the_images_own_mean(draw: float, gain: float) -> None:
    image = np.random.default_rng(0).integers(90, 160, (32, 32)).astype(np.uint8)
    out = changed(image, {"contrast": 0.5}, contrast=draw).astype(float)
    expected = image.mean() + (image.astype(float) - image.mean()) * gain
    assert np.abs(out - expected).max() <= 0.501
    assert out.mean() == pytest.approx(image.mean(), abs=0.1)


def test_contrast_takes_each_image_by_itself() -> None:
    images = np.stack([np.full((8, 8, 1), 20, np.uint8), np.full((8, 8, 1), 220, np.uint8)])
    out = augment(tf.constant(images), drawn(rows=2, contrast=MOST), TrainSettings(**{**OFF, "contrast": 0.9}))
    np.testing.assert_array_equal(out, images)


@pytest.mark.parametrize("side", [2, 16])
def test_values_stop_at_0_and_255(side: int) -> None:
    """Wrapped around, the brightest pixels would be black; TensorFlow's cast does so in small images, not in large."""
    image = np.zeros((side, side), np.uint8)
    image[:, side // 2 :] = 255
    np.testing.assert_array_equal(changed(image, {"contrast": 0.9}, contrast=MOST), image)


# Together


def test_all_changes_come_in_the_order_that_the_docstring_says() -> None:
    side, centre = 96, 47.5
    y, x = 40.0, 55.0
    options = {"flip": True, "shift": 0.1, "rotation": 30.0, "zoom": 0.2}
    out = changed(dot(side, y, x), options, flip=0.0, shift_x=MOST, shift_y=0.25, rotation=MOST, zoom=MOST)
    x, y = x - 0.1 * side - centre, y + 0.05 * side - centre  # shifted
    x = -x  # mirrored
    t = math.radians(30.0)
    x, y = x * math.cos(t) + y * math.sin(t), -x * math.sin(t) + y * math.cos(t)  # turned; y is down
    x, y = 1.2 * x, 1.2 * y  # magnified
    assert place(out) == pytest.approx((centre + y, centre + x), abs=0.1)


def test_flip_and_shift_together_move_pixels_whole() -> None:
    image = noise(32)[0, :, :, 0]
    out = changed(image, {"flip": True, "shift": 0.25}, flip=0.0, shift_x=MOST, shift_y=0.5)
    shifted_left = image[:, np.clip(np.arange(32) + 8, 0, 31)]
    np.testing.assert_array_equal(out, shifted_left[:, ::-1])


@pytest.mark.parametrize("option", LISTENS)
def test_an_option_listens_to_its_own_draws_alone(option: str) -> None:
    image = noise(32)[0, :, :, 0]
    options = {option: ALL_ON[option]}
    for name in STILL:
        moved = not np.array_equal(changed(image, options, **{name: 0.1}), image)
        assert moved == (name in LISTENS[option]), name


def test_each_row_of_the_draws_is_its_images() -> None:
    image = noise(32)
    rows = np.concatenate([drawn(), drawn(flip=0.1), drawn(contrast=0.9)])
    settings = TrainSettings(**{**OFF, "flip": True, "contrast": 0.5})
    out = augment(tf.constant(np.repeat(image, 3, axis=0)), rows, settings).numpy()
    np.testing.assert_array_equal(out[0], image[0])
    np.testing.assert_array_equal(out[1], image[0, :, ::-1])
    np.testing.assert_array_equal(out[2, :, :, 0], changed(image[0, :, :, 0], {"contrast": 0.5}, contrast=0.9))


@pytest.mark.parametrize("workers", [2, 4])
def test_shares_of_a_batch_are_changed_like_the_whole(workers: int) -> None:
    images, numbers, settings = noise(rows=8), draws(1, 2, 3, 8), TrainSettings(**ALL_ON)
    whole = augment(tf.constant(images), tf.constant(numbers), settings).numpy()
    assert all(not np.array_equal(a, b) for a, b in zip(whole, images, strict=True))
    shares = zip(np.split(images, workers), np.split(numbers, workers), strict=True)
    parts = [augment(tf.constant(some), tf.constant(theirs), settings).numpy() for some, theirs in shares]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_graph_gives_what_eager_gives() -> None:
    images, numbers, settings = noise(rows=4), draws(0, 0, 0, 4), TrainSettings(**ALL_ON)
    eager = augment(tf.constant(images), tf.constant(numbers), settings).numpy()
    graph = tf.function(lambda x, u: augment(x, u, settings))(tf.constant(images), tf.constant(numbers))
    assert graph.dtype == tf.uint8
    assert np.abs(graph.numpy().astype(int) - eager).max() <= 1
