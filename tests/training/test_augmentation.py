"""Where every change of the training images puts a dot, by how much, and from which draws."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from scipy import ndimage

from ray_cxr.config import TrainSettings
from ray_cxr.training import augmentation
from ray_cxr.training.augmentation import DRAWS, KINDS, augment, draw_random, mix_images, mix_labels

#: Draws that change nothing; `flip` mirrors below 1/2.
STILL = {"flip": 0.9, **dict.fromkeys(("shift_x", "shift_y", "contrast", "rotation", "zoom", "shear"), 0.5)}
STILL |= {f"{option}_{name}": 0.5 for option in ("crop", "erase") for name in ("ratio", "x", "y")}
STILL |= {"crop_area": 0.0, "erase_area": 0.5, "noise": 0.0}
COLUMNS = {name: getattr(augmentation, name.upper()) for name in STILL}
OFF: dict[str, Any] = {"flip": False, "shift": 0.0, "contrast": 0.0, "rotation": 0.0, "zoom": 0.0}
ALL_ON: dict[str, Any] = {"flip": True, "shift": 0.1, "contrast": 0.5, "rotation": 20.0, "zoom": 0.3}
ALL_ON |= {"shear": 10.0, "crop": 0.5, "erase": 0.3}
#: The draw of the largest change upwards; `draws` stays below 1, by less than a float32 shows in a pixel.
MOST = 1.0


def change(image: np.ndarray, options: dict[str, Any], **values: float) -> np.ndarray:
    """Augment one image uint8 [S,S] with draws that change only what is named."""
    row = np.zeros((1, DRAWS), np.float32)
    for name, value in {**STILL, **values}.items():
        row[0, COLUMNS[name]] = value
    return apply(image, options, row)


def apply(image: np.ndarray, options: dict[str, Any], row: np.ndarray) -> np.ndarray:
    out = augment(tf.constant(image[None, :, :, None]), row, TrainSettings(**{**OFF, **options}))
    assert (out.dtype, out.shape) == (tf.uint8, (1, *image.shape, 1))
    return out.numpy()[0, :, :, 0]


def dot(side: int, y: float, x: float) -> np.ndarray:
    """Return a soft bright dot, whose centre of mass is at (y, x) to a tenth of a pixel."""
    rows, columns = np.mgrid[:side, :side]
    return np.round(250 * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * 1.5**2))).astype(np.uint8)


def centre_of_mass(image: np.ndarray) -> tuple[float, float]:
    """Return (right, down) from the centre of the image, pixels."""
    down, right = np.array(ndimage.center_of_mass(image)) - (len(image) - 1) / 2
    return float(right), float(down)


def noise(side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side)).astype(np.uint8)


def test_draws_are_a_function_of_seed_epoch_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = list(itertools.product(range(3), repeat=3))
    assert len({draw_random(*key, 4).tobytes() for key in keys}) == len(keys)
    before = draw_random(7, 3, 0, 16)
    np.testing.assert_array_equal(draw_random(7, 3, 0, 16), before)
    # NumPy gives [seed, epoch] and [seed, epoch, 0] one stream; the first step must not repeat the order's.
    assert not np.isin(np.random.default_rng([7, 3]).random((DRAWS, 16), dtype=np.float32), before).any()
    monkeypatch.setattr(augmentation, "DRAWS", DRAWS + 1)
    np.testing.assert_array_equal(draw_random(7, 3, 0, 16)[:, :DRAWS], before, "a new option must not change old runs")
    monkeypatch.undo()
    # They are uniform and independent.
    many = draw_random(0, 0, 0, 20_000)
    assert (many.shape, many.dtype) == ((20_000, DRAWS), np.float32)
    kinds = [start + i for start in (augmentation.CHOICE, augmentation.STRENGTH) for i in range(len(KINDS))]
    columns = [*COLUMNS.values(), augmentation.PARTNER, augmentation.SHARE, *kinds]
    assert sorted(columns) == list(range(DRAWS)), "two options share a column"
    assert 0.0 <= many.min() < many.max() < 1.0
    np.testing.assert_allclose(many.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(many.var(axis=0), 1 / 12, atol=0.003)
    assert np.abs(np.corrcoef(many.T) - np.eye(DRAWS)).max() < 0.03


@pytest.mark.parametrize("side", [32, 33])
def test_draws_in_the_middle_change_no_pixel_and_flip_mirrors_below_half(side: int) -> None:
    images = tf.constant(noise()[None, :, :, None])
    assert augment(images, draw_random(0, 0, 0, 1), TrainSettings(**OFF)) is images, "without options, the same tensor"
    for draw, step in ((0.0, -1), (0.49, -1), (0.5, 1)):
        np.testing.assert_array_equal(change(noise(side), {"flip": True}, flip=draw), noise(side)[:, ::step])
    for options in (*({name: value} for name, value in ALL_ON.items()), ALL_ON):
        np.testing.assert_array_equal(change(noise(side), options), noise(side), str(options))


@pytest.mark.parametrize(
    ("x", "y", "right", "down"),
    # In the last, two and a half pixels are rounded to the even two.
    [(1.0, 0.5, -8, 0), (0.5, 0.0, 0, 8), (0.51, 0.5, 0, 0), (0.65625, 0.34375, -2, 2)],
)
def test_shift_is_in_whole_pixels_and_repeats_the_edge(x: float, y: float, right: int, down: int) -> None:
    """At most a quarter of 32 pixels to either side; a flip after it mirrors the shifted image."""
    rows, columns = np.clip(np.arange(32) - down, 0, 31), np.clip(np.arange(32) - right, 0, 31)
    expected = noise()[rows][:, columns]
    np.testing.assert_array_equal(change(noise(), {"shift": 0.25}, shift_x=x, shift_y=y), expected)
    both = change(noise(), {"shift": 0.25, "flip": True}, shift_x=x, shift_y=y, flip=0.0)
    np.testing.assert_array_equal(both, expected[:, ::-1])


@pytest.mark.parametrize("side", [64, 65])
@pytest.mark.parametrize(("draw", "part"), [(MOST, 1.0), (0.0, -1.0), (0.75, 0.5)])
def test_rotation_is_counter_clockwise_and_zoom_about_the_centre(draw: float, part: float, side: int) -> None:
    """An angle of t takes (right, down) to (right cos t + down sin t, down cos t - right sin t)."""
    centre, t, factor = (side - 1) / 2, math.radians(30.0 * part), 1 + 0.2 * part
    for right, down in ((20.0, 0.0), (-12.0, 9.0)):
        image = dot(side, centre + down, centre + right)
        turned = right * math.cos(t) + down * math.sin(t), down * math.cos(t) - right * math.sin(t)
        assert centre_of_mass(change(image, {"rotation": 30.0}, rotation=draw)) == pytest.approx(turned, abs=0.1)
        out = change(image, {"zoom": 0.2}, zoom=draw)
        assert centre_of_mass(out) == pytest.approx((right * factor, down * factor), abs=0.1)
        assert out.astype(float).sum() == pytest.approx(image.astype(float).sum() * factor**2, rel=0.06)
    options = {"rotation": 45.0, "zoom": 0.5, "flip": True}
    out = change(dot(side, centre, centre), options, rotation=draw, zoom=draw, flip=draw)
    assert centre_of_mass(out) == pytest.approx((0, 0), abs=0.02)


@pytest.mark.parametrize("side", [64, 65])
def test_shear_moves_rows_by_their_height_and_crop_magnifies_a_window(side: int) -> None:
    centre = (side - 1) / 2
    for right, down in ((3.0, 12.0), (-5.0, -9.0)):
        sheared = change(dot(side, centre + down, centre + right), {"shear": 20.0}, shear=MOST)
        expected = right - down * math.tan(math.radians(20.0)), down
        assert centre_of_mass(sheared) == pytest.approx(expected, abs=0.1)
    # The top left quarter of the area, and a window of 3/4 of the height of a square one at the bottom.
    corner = dot(side, centre - side / 4 + 2, centre - side / 4)
    out = change(corner, {"crop": 0.75}, crop_area=MOST, crop_x=0.0, crop_y=0.0)
    assert centre_of_mass(out) == pytest.approx((0, 4), abs=0.1)
    assert out.astype(float).sum() == pytest.approx(corner.astype(float).sum() * 4, rel=0.02)
    height, width = 0.5 / math.sqrt(4 / 3), 0.5 * math.sqrt(4 / 3)
    down = side * (1 - height) / 2
    out = change(dot(side, centre + down + 2, centre + 3), {"crop": 0.75}, crop_area=MOST, crop_ratio=MOST, crop_y=MOST)
    assert centre_of_mass(out) == pytest.approx((3 / width, 2 / height), abs=0.1)


def test_erasing_fills_a_rectangle_with_the_mean_in_half_of_the_images() -> None:
    image, expected = noise(), noise()
    expected[16:, :16] = round(image.mean())
    np.testing.assert_array_equal(change(image, {"erase": 0.25}, erase_area=MOST, erase_x=0.0, erase_y=MOST), expected)
    np.testing.assert_array_equal(change(image, {"erase": 0.25}, erase_area=0.49), image)
    tall = change(image, {"erase": 0.25}, erase_area=MOST, erase_ratio=0.0) == round(image.mean())
    assert (tall.sum(axis=0) > 20).sum() == 10, "a third as wide as high"


def change_gray(image: np.ndarray, amounts: dict[str, float], count: int | None = None) -> np.ndarray:
    """Apply kinds of `intensity` with their draws at full strength; those named first are chosen first."""
    row = np.full((1, DRAWS), 0.5, np.float32)
    row[0, augmentation.CHOICE : augmentation.CHOICE + len(KINDS)] = 0.9
    for order, (kind, value) in enumerate(amounts.items()):
        row[0, augmentation.CHOICE + KINDS.index(kind)] = order / 10
        row[0, augmentation.STRENGTH + KINDS.index(kind)] = value
    return apply(image, {"intensity": count or len(amounts), "intensity_strength": 1.0}, row)


def test_each_kind_of_intensity_is_its_formula() -> None:
    image = np.clip(noise(64), 70, 180).astype(np.uint8)
    x = image.astype(float)
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    smooth = ndimage.convolve(x, kernel, mode="reflect")
    halves = np.repeat([[50, 200]], 32, axis=1).repeat(64, axis=0).astype(np.uint8)
    cases = [
        ("brightness", image, 1.0, x + 64),
        ("brightness", image, 0.25, x - 32),
        ("contrast", image, 1.0, x.mean() + (x - x.mean()) * 2),
        ("gamma", image, 1.0, 255 * (x / 255) ** 2),
        ("gamma", image, 0.0, 255 * (x / 255) ** 0.5),
        ("equalise", halves, 1.0, np.where(halves == 50, (50 + 127.5) / 2, (200 + 255) / 2)),
        ("posterise", image, 1.0, np.round(x / 16) * 16),
        ("blur", image, 1.0, smooth),
        ("sharpen", image, 0.5, x + (x - smooth)),
    ]
    for kind, given, draw, expected in cases:
        out = change_gray(given, {kind: draw}).astype(float)
        assert np.abs(out - np.clip(expected, 0, 255)).max() <= 0.51, (kind, draw)
    flat = np.full((64, 64), 128, np.uint8)
    noisy = change_gray(flat, {"noise": 1.0}).astype(float)
    assert (abs(noisy.mean() - 128) < 0.5, abs(noisy.std() - 10) < 0.5) == (True, True)
    both = {"brightness": 1.0, "posterise": 1.0}
    np.testing.assert_array_equal(change_gray(flat, both, 1), flat + 64)
    np.testing.assert_array_equal(change_gray(flat + 4, both, 2), flat + 64)


def test_mixup_by_hand() -> None:
    """Each image has its own share; a finding counts only where both images are labelled."""
    draws = np.zeros((3, DRAWS), np.float32)
    draws[:, augmentation.PARTNER], draws[:, augmentation.SHARE] = [0.9, 0.1, 0.5], [0.25, 0.5, 0.75]
    labels, weight = np.float32([[1, 0], [0, 1], [0, 0]]), np.float32([[1, 0], [1, 1], [0, 0]])
    real = np.array([True, True, False])  # the last is padding
    mixed, weights, partners = mix_labels(labels, weight, draws, real, 1.0)  # Beta(1, 1) is uniform
    assert partners[:2].tolist() == [1, 0]
    np.testing.assert_allclose(mixed[:2], [[0.25, 0.75], [0.5, 0.5]])
    np.testing.assert_array_equal(weights, [[1, 0], [1, 0], [0, 0]])
    images = np.full((4, 2, 2, 1), 100, np.uint8)
    images[1:3] = 200
    out = mix_images(tf.constant(images), tf.constant(np.concatenate([draws[:2], draws[:2][::-1]])))
    assert out.dtype == tf.uint8
    assert out.numpy()[:, 0, 0, 0].tolist() == [175, 150]
    draws = draw_random(0, 0, 0, 4000)
    mix_labels(np.zeros((4000, 1)), np.ones((4000, 1)), draws, np.ones(4000, bool), 0.2)
    assert np.var(draws[:, augmentation.SHARE]) == pytest.approx(0.25 / 1.4, rel=0.05)  # that of Beta(0.2, 0.2)


def test_pixels_from_outside_repeat_the_edge() -> None:
    image = np.full((32, 32), 90, np.uint8)
    for options in ({"rotation": 45.0}, {"zoom": 0.5}, {"shift": 0.5}, ALL_ON):
        out = change(image, options, rotation=MOST, zoom=0.0, shift_x=0.0, shift_y=MOST, shear=0.0)
        assert (out == 90).all(), options


@pytest.mark.parametrize(("draw", "gain"), [(MOST, 1.5), (0.0, 0.5), (0.75, 1.25)])
def test_contrast_spreads_about_the_mean_of_the_image(draw: float, gain: float) -> None:
    image = np.random.default_rng(0).integers(90, 160, (32, 32)).astype(np.uint8)
    out = change(image, {"contrast": 0.5}, contrast=draw).astype(float)
    assert np.abs(out - (image.mean() + (image - image.mean()) * gain)).max() <= 0.501
    # Without the limits of 0 and 255, TensorFlow's cast makes the brightest pixels black in small images only.
    for side in (2, 16):
        halves = np.repeat([[0, 255]], side // 2, axis=1).repeat(side, axis=0).astype(np.uint8)
        np.testing.assert_array_equal(change(halves, {"contrast": 0.9}, contrast=MOST), halves)


@pytest.mark.slow
def test_shares_of_a_batch_and_graphs_give_the_same_images() -> None:
    images = np.stack([noise(seed=seed) for seed in range(8)])[..., None]
    numbers, settings = draw_random(1, 2, 3, 8), TrainSettings(**ALL_ON, intensity=3)
    whole = augment(tf.constant(images), tf.constant(numbers), settings).numpy()
    assert len({image.tobytes() for image in (*whole, *images)}) == 16
    shares = zip(np.split(images, 4), np.split(numbers, 4), strict=True)
    parts = [augment(tf.constant(share), tf.constant(theirs), settings).numpy() for share, theirs in shares]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    graph = tf.function(lambda x, u: augment(x, u, settings))(tf.constant(images), tf.constant(numbers))
    assert np.abs(graph.numpy().astype(int) - whole).max() <= 1
