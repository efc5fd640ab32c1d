"""Anatomy of phantoms: the proportions of a chest and the organs drawn from them.

Lengths are fractions of the side; see `phantom_drawing` for the coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from ray_cxr.imaging.phantom_drawing import (
    Array,
    Pen,
    fit_curve,
    make_generator,
    mirror,
    scale,
    to_points,
    trace_ellipse,
)


@dataclass(frozen=True)
class Anatomy:
    """One chest on one visit, without its findings.

    `key` (seed, patient) seeds the position of findings, so that they stay in place from visit to visit. `visit` seeds
    the differences between exposures, such as noise.
    """

    key: tuple[int, int]
    visit: int
    size: int
    age: int
    sex: str
    view: str
    # the patient
    half_width: float  # inside the rib cage, at its widest
    apex: float  # y of the lung's apex
    dome: float  # y of the right diaphragm's dome
    dome_drop: float  # how much lower the left dome is
    recess: float  # depth of the costophrenic angle below the dome
    heart: float  # cardiothoracic ratio
    rib_pitch: float
    knob: float  # bulge of the aortic arch
    fat: float  # soft tissue outside the ribs
    breast: float
    # the exposure
    tilt: float  # radians
    shift: tuple[float, float]
    zoom: float
    gain: float
    gamma: float
    lucency: float  # how dark air is

    def wall(self, y: Array | float) -> Array:
        """Return the distance of the lateral lung border from the midline at height y."""
        u = (np.asarray(y) - self.apex) / (self.dome + self.recess - self.apex)
        return np.asarray(self.half_width * np.interp(u, _WALL_U, _WALL_H))

    def dome_at(self, side: int) -> float:
        """Return the height y of the diaphragm's dome on one side."""
        return self.dome + (self.dome_drop if side > 0 else 0.0)

    def make_pen(self, size: int) -> Pen:
        return Pen(size, tilt=self.tilt, zoom=self.zoom, shift=self.shift)


_WALL_U = np.array([0.0, 0.03, 0.10, 0.20, 0.35, 0.50, 0.70, 1.0])
_WALL_H = np.array([0.38, 0.50, 0.63, 0.75, 0.88, 0.95, 1.0, 1.01])


def sample_anatomy(seed: int, patient: int, visit: int, *, size: int = 256) -> Anatomy:
    """Return the chest of one patient (from 1) on one visit (from 0), a pure function of the arguments."""
    body = make_generator(seed, patient)
    sex = "F" if body.random() < 0.45 else "M"
    age = int(np.clip(body.normal(52, 17), 18, 88))
    usual_view = "AP" if body.random() < 0.4 else "PA"
    male = sex == "M"
    stature = float(np.clip(body.normal(0, 1), -2, 2))
    own = {
        "half_width": (0.345 if male else 0.335) + 0.008 * stature + body.uniform(-0.012, 0.012),
        "apex": 0.125 + body.uniform(-0.02, 0.02) - 0.006 * stature,
        "dome": 0.70 + 0.008 * stature + body.uniform(-0.02, 0.02),
        "dome_drop": body.uniform(0.014, 0.032),
        "recess": body.uniform(0.085, 0.105),
        "heart": 0.445 + body.uniform(-0.025, 0.025) + 0.0004 * (age - 50),
        "rib_pitch": 0.066 + body.uniform(-0.005, 0.005),
        "knob": 0.058 + 0.0004 * (age - 50) + body.uniform(-0.006, 0.006),
        "fat": body.uniform(0.045, 0.095),
        "breast": 0.0 if male else body.uniform(0.6, 1.0),
    }
    shot = make_generator(seed, patient, visit)
    view = usual_view if shot.random() < 0.85 else ("PA" if usual_view == "AP" else "AP")
    ap = view == "AP"
    if ap:  # closer to the tube and lying down: a magnified heart, a shallower breath
        own["heart"] *= 1.07
        own["dome"] -= 0.028
    own["dome"] += shot.uniform(-0.012, 0.012)
    return Anatomy(
        key=(seed, patient),
        visit=visit,
        size=size,
        age=min(age + visit, 90),
        sex=sex,
        view=view,
        **own,
        tilt=shot.normal(0, 0.02 if ap else 0.01),
        shift=(shot.normal(0, 0.012), shot.normal(0, 0.012)),
        zoom=(1.03 if ap else 1.0) + shot.uniform(-0.03, 0.03),
        gain=(0.93 if ap else 1.0) + shot.uniform(-0.06, 0.06),
        gamma=float(np.exp(shot.normal(0, 0.10))),
        lucency=(0.90 if ap else 1.0) + shot.uniform(-0.05, 0.05),
    )


def outline_lung(chest: Anatomy, side: int) -> Array:
    """Return one half of the rib cage, open below the diaphragm: float[n, 2]."""
    base = chest.dome + chest.recess
    y = np.array([0.10, 0.2, 0.32, 0.46, 0.62, 0.8, 0.92, 1.0]) * (base - chest.apex) + chest.apex
    top = chest.apex
    points = [
        to_points(side, [0.034, 0.034, 0.055], [0.45, top + 0.10, top + 0.035]),
        to_points(side, [0.10, 0.155], [top + 0.004, top + 0.006]),
        to_points(side, chest.wall(y), y),
        to_points(side, [0.6 * chest.half_width, 0.034], [base + 0.02, base + 0.02]),
    ]
    return fit_curve(np.concatenate(points), closed=True)


def _compute_dome(chest: Anatomy, side: int, raised: float, distance: Array) -> Array:
    """Return the height y of the diaphragm at each distance from the midline."""
    top, peak = chest.dome_at(side) - raised, 0.50 * chest.half_width
    foot = chest.dome_at(side) + chest.recess  # raising the dome does not move the angle
    lateral = np.clip((distance - peak) / (chest.half_width * 1.01 - peak), 0, 1.2)
    medial = np.clip((peak - distance) / peak, 0, 1)
    middle = chest.dome + 0.5 * chest.dome_drop + 0.035  # where the halves meet
    return np.asarray(top + (foot - top) * lateral**2.4 + (middle - top) * medial**2)


def outline_abdomen(chest: Anatomy, raised: Mapping[int, float]) -> Array:
    """Return the region below the diaphragm, whose domes are raised by side: float[n, 2]."""
    flank = 1.03 * chest.half_width
    distance = np.linspace(0, flank, 16)
    left = to_points(-1, distance, _compute_dome(chest, -1, raised[-1], distance))[::-1]
    right = to_points(1, distance, _compute_dome(chest, 1, raised[1], distance))
    corners = [to_points(1, flank + 0.02, 1.4)[None], to_points(-1, flank + 0.02, 1.4)[None]]
    return np.concatenate([left, right, *corners])


def outline_mediastinum(chest: Anatomy) -> Array:
    """Return great vessels, aortic arch and heart as one outline: float[n, 2]."""
    width = chest.heart * 2 * chest.half_width
    right, left = 0.31 * width, 0.69 * width  # the heart's extent to the patient's right and left
    floor = chest.dome + 0.5 * chest.recess
    mid = 0.40 + 0.35 * (floor - 0.74)
    span = floor - mid
    knob = chest.knob
    x = [-0.040, -0.046, -0.050, -0.055, -right * 0.86, -right, -right * 0.90, -0.05]
    y = [0.02, 0.20, mid - 0.06, mid, mid + 0.28 * span, mid + 0.55 * span, mid + 0.82 * span, floor + 0.05]
    x += [0.10, left * 0.84, left, left * 0.92, left * 0.66, 0.070, 0.056, knob + 0.006, knob, 0.044, 0.036]
    y += [floor + 0.08, floor + 0.035, floor - 0.035, mid + 0.60 * span, mid + 0.28 * span]
    y += [mid + 0.05, mid - 0.01, mid - 0.05, mid - 0.10, mid - 0.15, 0.02]
    return fit_curve(np.stack([0.5 + np.array(x), np.array(y)], axis=1), closed=True)


def _outline_trunk(chest: Anatomy) -> Array:
    """Return neck, shoulders and trunk; in AP the arms lie along the trunk."""
    trunk = chest.half_width + chest.fat
    if chest.view == "AP":
        shoulder = [(0.50, 0.21), (0.56, 0.34), (0.56, 0.60), (0.54, 0.95), (0.52, 1.25)]
    else:
        shoulder = [(0.50, 0.19), (0.57, 0.28), (0.55, 0.42), (trunk + 0.06, 0.52), (trunk + 0.015, 0.60)]
        shoulder += [(trunk, 0.70), (trunk + 0.01, 0.95), (trunk + 0.02, 1.25)]
    neck = [(0.095, -0.25), (0.10, -0.02), (0.13, 0.05), (0.25, 0.095), (0.38, 0.13)]
    distance, y = np.array(neck + shoulder).T
    y = y + np.where(y < 0.3, chest.apex - 0.125, 0.0)  # shoulders follow the apices
    half = to_points(1, distance, y)
    other = to_points(-1, distance, y)[::-1]
    return fit_curve(np.concatenate([half, other]), closed=True)


def _draw_bones(pen: Pen, chest: Anatomy, soft: Array) -> Array:
    """Return ribs and clavicles: float32[size, size], gray values to add. Ribs fade under `soft` (heart and abdomen, 0
    to 1), where thicker tissue hides them.
    """
    t, rib = np.linspace(0, 1, 9)[None], np.arange(10.0)[:, None]
    y = chest.apex + 0.027 + rib * chest.rib_pitch
    y = y - 0.030 * np.sin(np.pi * np.minimum(1.25 * t, 1)) + (0.030 + 0.012 * rib) * t**2.2
    x = 0.03 + (chest.wall(y) * 1.02 - 0.03) * np.sin(0.5 * np.pi * t) ** 0.9
    back = mirror(x, y)
    # The front ends continue from the wall, down and towards the midline.
    front_y = y[1:7, -1:] + (0.13 + 0.006 * rib[1:7]) * t**0.85
    reach = x[1:7, -1:]
    front = mirror(np.minimum(reach, chest.wall(front_y)) - (reach - 0.15) * t**1.7, front_y)
    ribs, fronts, other = pen.new_canvas(), pen.new_canvas(), pen.new_canvas()
    collar_x = np.array([[0.034, 0.09, 0.16, 0.24, 0.32, 0.39]])
    collar_y = chest.apex + np.array([[0.088, 0.072, 0.050, 0.030, 0.026, 0.045]])
    collars = np.stack([fit_curve(line, closed=False) for line in mirror(collar_x, collar_y)])
    pen.stroke(fronts, front, 0.024, 0.7)
    for width, value in ((1.0, 0.75), (0.46, 0.45)):  # the cortex, then the paler marrow inside
        pen.stroke(ribs, back, 0.0215 * width, value)
        pen.stroke(other, collars, 0.027 * width, value + 0.1)
    gray = 44.0 - 0.14 * (chest.age - 50)  # bone thins with age
    bones = np.maximum(pen.finish(ribs), 0.6 * pen.finish(fronts)) * (1 - 0.72 * soft)
    return np.asarray(gray * np.maximum(bones, pen.finish(other)))


def draw_background(
    chest: Anatomy, raised: Mapping[int, float], rng: np.random.Generator, soft: Array
) -> tuple[Array, Array]:
    """Return tissue with bones (gray values) and vessels (0 to 1): float32[size, size] each.

    Both are drawn at half the size in a quarter of the time, because only the outlines of lung, heart and diaphragm
    have to be sharp. `soft` (0 to 1) is heart and abdomen, which hide the ribs.
    """
    pen = chest.make_pen(chest.size // 2)
    tissue = _draw_tissue(pen, chest, raised, rng)
    tissue += _draw_bones(pen, chest, scale(soft, pen.size))
    return scale(tissue, chest.size), scale(_draw_vessels(pen, rng), chest.size)


def _draw_tissue(pen: Pen, chest: Anatomy, raised: Mapping[int, float], rng: np.random.Generator) -> Array:
    """Return trunk, breasts, scapulae, spine, trachea and stomach: float32[size, size], gray values."""
    body = pen.mask(_outline_trunk(chest), blur=0.005)
    tissue = 68 + 88 * pen.soften(body, 0.16)
    if chest.breast:
        tissue += _draw_breasts(pen, chest)
    tissue += 34 * _draw_skeleton(pen, chest)
    hollow = pen.new_canvas()
    pen.stroke(hollow, np.array([[0.498, -0.1], [0.492, 0.34]]), 0.036, 0.6)
    pen.stroke(hollow, np.array([[[0.492, 0.335], [0.44, 0.40]], [[0.494, 0.335], [0.56, 0.41]]]), 0.02, 0.45)
    width, height = rng.uniform(0.02, 0.06), rng.uniform(0.012, 0.030)
    x, y = 0.5 + rng.uniform(0.12, 0.20), chest.dome_at(1) - raised[1] + 0.035 + height
    pen.fill(hollow, trace_ellipse(x, y, width, height), rng.uniform(0.2, 0.9))
    tissue -= 48 * pen.finish(hollow, 0.006)
    coarse = 3 * rng.standard_normal((18, 18), dtype=np.float32)
    return np.asarray((tissue + scale(coarse, pen.size)) * body + 10)


def _draw_skeleton(pen: Pen, chest: Anatomy) -> Array:
    """Return scapulae, humeral heads and spine: float32[size, size] from 0 to 1."""
    medial = 0.27 if chest.view == "AP" else 0.35
    blade_x = np.array([medial + 0.02, medial + 0.01, medial + 0.07, 0.44, 0.46, 0.42])
    blade_y = chest.apex + np.array([0.06, 0.20, 0.33, 0.18, 0.08, 0.04])
    canvas = pen.new_canvas()
    for side in (-1, 1):
        pen.fill(canvas, fit_curve(to_points(side, blade_x, blade_y), closed=True), 0.45)
        pen.fill(canvas, trace_ellipse(0.5 + side * 0.47, chest.apex + 0.09, 0.045, 0.05), 0.6)
    pen.stroke(canvas, np.array([[0.5, -0.2], [0.5, 1.2]]), 0.07, 0.30)
    levels = np.arange(-0.05, 1.1, 0.056)[:, None]
    pen.stroke(canvas, to_points(1, np.array([[-0.028, 0.028]]).repeat(len(levels), 0), levels), 0.034, 0.62)
    pen.stroke(canvas, to_points(1, np.zeros((len(levels), 2)), levels + np.array([[0.012, 0.024]])), 0.010, 0.9)
    return pen.finish(canvas, 0.004)


def _draw_vessels(pen: Pen, rng: np.random.Generator) -> Array:
    """Return hila and vessels, which get finer with each branching: float32[size, size] from 0 to 1."""
    canvas = pen.new_canvas()
    t = np.linspace(0, 1, 5)[None]
    stems = 10
    angle = np.tile(np.linspace(-1.4, 1.45, stems), 2)[:, None] + rng.uniform(-0.15, 0.15, (2 * stems, 1))
    side = np.repeat([-1.0, 1.0], stems)[:, None]
    x, y = np.full_like(side, 0.078), 0.435 - 0.008 * side
    length = rng.uniform(0.08, 0.14, (2 * stems, 1))
    for width, value in ((0.0085, 0.75), (0.006, 0.60), (0.004, 0.42)):
        turn = angle + rng.uniform(-0.6, 0.6, angle.shape) * t
        along, down = length * t * np.cos(turn), length * t * np.sin(turn)
        points = np.stack([0.5 + side * (x + along), y + down], axis=-1)
        pen.stroke(canvas, points, width, value)
        # Each vessel forks: its children start at its end.
        x, y = side * (points[:, -1:, 0] - 0.5), points[:, -1:, 1]
        x, y, side, length = (np.repeat(each, 2, axis=0) for each in (x, y, side, 0.85 * length))
        fork = np.tile([[-0.42], [0.38]], (len(angle), 1))
        angle = np.repeat(turn[:, -1:], 2, axis=0) + fork * rng.uniform(0.5, 1.3, fork.shape)
    for hilum in (-1, 1):
        root = trace_ellipse(0.5 + hilum * 0.082, 0.435 - 0.008 * hilum, 0.024, 0.052, -0.3 * hilum)
        pen.fill(canvas, root, 0.62)
    return pen.finish(canvas)


def _draw_breasts(pen: Pen, chest: Anatomy) -> Array:
    """Return soft shadows, densest along the lower fold: float32[size, size], gray values to add."""
    y = chest.dome - 0.09
    full = pen.mask(*(trace_ellipse(0.5 + side * 0.20, y, 0.155, 0.14) for side in (-1, 1)), blur=0.008)
    upper = pen.mask(*(trace_ellipse(0.5 + side * 0.20, y - 0.06, 0.16, 0.15) for side in (-1, 1)), blur=0.04)
    return np.asarray(full * ((23 - 15 * upper) * np.float32(chest.breast)))


def expose(pen: Pen, image: Array, chest: Anatomy) -> Array:
    """Return uint8 gray values after gain and gamma, with the side marker, which the exposure does not change."""
    levels = np.clip(image * chest.gain, 0, 255).astype(np.uint8)
    shown = cv2.LUT(levels, np.rint(255 * (np.arange(256) / 255) ** chest.gamma).astype(np.uint8))
    corner = pen.to_pixels(np.array([[0.93, 0.07]]))[0] // 16
    scale = chest.size / 256 * 0.45
    position = (int(corner[0]), int(corner[1]))
    cv2.putText(shown, "L", position, cv2.FONT_HERSHEY_DUPLEX, scale, 235, pen.to_width(0.005), cv2.LINE_AA)
    return shown
