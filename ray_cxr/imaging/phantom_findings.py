"""Findings of phantoms: how each changes the image, and the drawing of a whole radiograph.

Findings that fill the lung (Consolidation, Effusion, Mass, ...) remove air. Findings that change the shape of the chest
(Cardiomegaly, Emphysema, the volume loss of Atelectasis) change the anatomy before it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

import cv2
import numpy as np

from ray_cxr.imaging import phantom_anatomy as anatomy
from ray_cxr.imaging.phantom_anatomy import Anatomy
from ray_cxr.imaging.phantom_drawing import Array, Pen, fit_curve, make_generator, scale, to_points, trace_ellipse
from ray_cxr.labels import FINDINGS

# Quantum noise of 2.6 gray values, from normal quantiles of a random byte: much faster than normal numbers.
_NOISE = np.array([2.6 * NormalDist().inv_cdf((k + 0.5) / 256) for k in range(256)], dtype=np.float32)


def draw_phantom(chest: Anatomy, findings: Collection[str] = ()) -> Array:
    """Return the radiograph of one chest: uint8[size, size], MONOCHROME2 (dense is bright).

    The same chest and findings give the same bytes. If one finding is removed, only its own signs disappear; noise and
    exposure stay.
    """
    raised = {-1: 0.0, 1: 0.0}
    hyperinflated = "Emphysema" in findings
    if hyperinflated:
        chest = replace(
            chest,
            half_width=chest.half_width * 1.05,
            apex=chest.apex - 0.02,
            dome=chest.dome + 0.085,
            recess=chest.recess * 0.42,
            heart=chest.heart * 0.74,
            lucency=chest.lucency * 1.16,
        )
    if "Cardiomegaly" in findings:
        chest = replace(chest, heart=chest.heart + _locate(chest, "Cardiomegaly")[1].uniform(0.16, 0.22))
    if "Atelectasis" in findings:
        raised[_locate(chest, "Atelectasis")[0]] = 0.06

    pen = chest.make_pen(chest.size)
    rng = make_generator(*chest.key, chest.visit, 1)
    cavity = pen.mask(anatomy.outline_lung(chest, -1), anatomy.outline_lung(chest, 1))
    abdomen = pen.mask(anatomy.outline_abdomen(chest, raised))
    heart = pen.mask(anatomy.outline_mediastinum(chest), blur=0.006)
    soft = np.maximum(heart, abdomen)

    # The lung thins towards its edges, and a little lies behind heart and domes.
    air = cavity * (0.62 + 0.38 * pen.soften(cavity, 0.05))
    air *= (1 - 0.94 * abdomen) * (1 - 0.86 * heart)
    image, vessels = anatomy.draw_background(chest, raised, rng, soft)
    layers = _Layers(pen, chest, raised, air, np.zeros_like(air), image)
    for finding in FINDINGS:
        if finding in findings and finding in _DRAW:
            _DRAW[finding](layers, *_locate(chest, finding))

    image += heart * (40 - 34 * abdomen)
    # The abdomen is sharp where it meets lung or heart, soft towards the flank.
    flank = pen.soften(abdomen, 0.035)
    image += 56 * ((abdomen - flank) * np.maximum(cavity, heart) + flank)
    vessels *= (0.35 if hyperinflated else 1.0) * (58 + 0.25 * (chest.age - 50))
    vessels -= 124 * chest.lucency
    if "Pneumothorax" in findings:  # pleural air is darker than lung and has no vessels
        vessels -= layers.pleural_air * (vessels + 155 * chest.lucency)
    image += vessels * air
    image = cv2.GaussianBlur(image, (3, 3), 0.0026 * chest.size)
    image += cv2.LUT(rng.integers(0, 256, image.shape, dtype=np.uint8), _NOISE)
    return anatomy.expose(pen, image, chest)


#: These findings are on the other side of the chest, so that findings of one patient rarely hide each other.
_OPPOSITE: frozenset[str] = frozenset({"Atelectasis", "Pneumonia", "Nodule", "Pneumothorax"})


def _locate(chest: Anatomy, finding: str) -> tuple[int, np.random.Generator]:
    """Return the side of a finding and the generator of its size and position, the same on every visit."""
    side = 1 if make_generator(*chest.key, -1, 50).random() < 0.5 else -1
    return (-side if finding in _OPPOSITE else side), make_generator(*chest.key, -1, 51 + FINDINGS.index(finding))


@dataclass
class _Layers:
    """Layers of an image, float32[size, size], which findings change in place."""

    pen: Pen
    chest: Anatomy
    raised: Mapping[int, float]  # how far each dome is raised, by side
    air: Array  # thickness of air, 0 to 1
    pleural_air: Array  # the part of the air outside the lung, without vessels
    image: Array  # gray values of everything except air

    def fill(self, mask: Array, amount: float, gray: int = 0) -> None:
        """Remove the fraction `amount` of the remaining air under a mask, and add `gray` there."""
        self.air *= 1 - amount * mask
        if gray:
            self.image += gray * mask


def _draw_effusion(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw fluid with a meniscus along the lateral wall; it hides dome and costophrenic angle."""
    level = layers.chest.dome_at(side) - layers.raised[side] - rng.uniform(0.0, 0.06)
    climb = rng.uniform(0.12, 0.18)
    x = np.linspace(0.0, 0.45, 14)
    y = level - climb * np.clip(x / layers.chest.half_width, 0, 1.1) ** 4
    pool = np.concatenate([to_points(side, x, y), to_points(side, [0.45, 0.0], [1.2, 1.2])])
    layers.fill(layers.pen.mask(pool, blur=0.006), 0.97, 8)


def _draw_nodule(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw one or two round opacities of 20 to 29 mm with sharp outlines."""
    for nodule_side in (side, -side) if rng.random() < 0.4 else (side,):
        y = rng.uniform(0.30, 0.56)
        x = rng.uniform(0.56, 0.74) * float(layers.chest.wall(y))
        radius = rng.uniform(0.029, 0.037)
        ball = trace_ellipse(0.5 + nodule_side * x, y, radius, radius)
        layers.fill(layers.pen.mask(ball, blur=0.003), 0.85, 16)


def _draw_mass(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw a lobulated opacity of 50 to 70 mm."""
    y = rng.uniform(0.33, 0.47)
    x = rng.uniform(0.50, 0.62) * float(layers.chest.wall(y))
    angle = np.linspace(0, 2 * np.pi, 13)[:-1]
    radius = rng.uniform(0.068, 0.090) * rng.uniform(0.84, 1.16, 12)
    lobes = to_points(side, x + radius * np.cos(angle), y + radius * np.sin(angle))
    layers.fill(layers.pen.mask(fit_curve(lobes, closed=True), blur=0.004), 0.97, 16)


def _draw_consolidation(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Fill an upper lobe down to its fissure, which shows as a straight lower edge."""
    fissure = rng.uniform(0.40, 0.46)
    slope = rng.uniform(-0.02, 0.05)
    top = rng.uniform(0.20, 0.25)
    lobe = to_points(side, [0.03, 0.42, 0.42, 0.03], [fissure, fissure + slope, top, top + 0.03])
    patches = rng.uniform(0.55, 1.0, (9, 9)).astype(np.float32)
    layers.fill(layers.pen.mask(lobe, blur=0.012) * scale(patches, layers.pen.size), 0.90)


def _draw_pneumonia(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw a round dense focus in the lower zone, crossed by dark air-filled bronchi."""
    y = rng.uniform(0.58, 0.63)
    x = rng.uniform(0.54, 0.64) * float(layers.chest.wall(y))
    radius = rng.uniform(0.085, 0.105)
    focus = layers.pen.mask(trace_ellipse(0.5 + side * x, y, radius, 0.9 * radius), blur=0.014)
    bronchi = layers.pen.new_canvas()
    for angle in (-0.55, -0.05, 0.45):
        reach = np.array([-0.9, 1.0]) * radius
        fall = np.array([-0.35, 1.4]) * radius
        line = to_points(side, x + reach * np.cos(angle), y + fall * np.sin(angle))
        layers.pen.stroke(bronchi, line, 0.011, 1.0)
    layers.fill(focus * (1 - 0.75 * layers.pen.finish(bronchi, 0.003)), 0.92)


def _draw_infiltration(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw faint patches over both lungs."""
    canvas = layers.pen.new_canvas()
    for side in (-1, 1):
        for y in np.linspace(0.24, 0.66, 7):
            centre = y + rng.uniform(-0.02, 0.02)
            x = rng.uniform(0.40, 0.88) * float(layers.chest.wall(centre))
            radius = rng.uniform(0.030, 0.046)
            patch = trace_ellipse(0.5 + side * x, centre, radius * 1.25, radius, rng.uniform(-1, 1))
            layers.pen.fill(canvas, patch)
    layers.fill(layers.pen.finish(canvas, 0.014), 0.50)


def _draw_edema(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw haze around both hila in the shape of a bat's wings."""
    reach, height = rng.uniform(0.115, 0.14), rng.uniform(0.15, 0.18)
    wings = [trace_ellipse(0.5 + side * 0.125, 0.45, reach, height, 0.25 * side) for side in (-1, 1)]
    layers.fill(layers.pen.mask(*wings, blur=0.028), 0.72)


def _draw_atelectasis(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw plates above a raised dome."""
    canvas = layers.pen.new_canvas()
    floor = layers.chest.dome_at(side) - layers.raised[side]
    for step in (0.035, 0.085, 0.135):
        y = floor - step + rng.uniform(-0.008, 0.008)
        x = np.array([0.28, 0.96]) * float(layers.chest.wall(y))
        line = to_points(side, x, y + np.array([rng.uniform(-0.015, 0.0), rng.uniform(0.0, 0.02)]))
        layers.pen.stroke(canvas, line, 0.020, 1.0)
    layers.fill(layers.pen.finish(canvas, 0.004), 0.88, 10)


def _draw_fibrosis(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw a coarse mesh of lines at both bases, densest at the periphery."""
    mesh, zone = layers.pen.new_canvas(), []
    for side in (-1, 1):
        floor = layers.chest.dome_at(side) - layers.raised[side]
        y = floor - rng.uniform(-0.05, 0.19, 110)
        x = (1 - 0.62 * rng.random(110) ** 1.2) * layers.chest.wall(y)
        angle = rng.uniform(0, np.pi, 110)[:, None]
        run = rng.uniform(0.013, 0.026, (110, 1)) * np.array([[-1.0, 0.0, 1.0]])
        bend = np.array([[0.0, 0.007, 0.0]])
        lines = to_points(
            side,
            x[:, None] + run * np.cos(angle) - bend * np.sin(angle),
            y[:, None] + run * np.sin(angle) + bend * np.cos(angle),
        )
        layers.pen.stroke(mesh, lines, 0.005, 1.0)
        y = floor + np.array([-0.20, -0.10, 0.0, 0.10])
        outer = to_points(side, layers.chest.wall(y) * 1.05, y)
        inner = to_points(side, layers.chest.wall(y) * np.array([0.9, 0.6, 0.45, 0.4]), y)[::-1]
        zone.append(np.concatenate([outer, inner]))
    layers.fill(layers.pen.mask(*zone, blur=0.015), 0.28)
    layers.fill(layers.pen.finish(mesh, 0.002), 0.75)


def _draw_pleural_thickening(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw a wavy dense band along the lateral wall, with a cap over the apex."""
    y = layers.chest.apex + np.linspace(0.03, 0.52, 10)
    outer = np.concatenate(
        [
            to_points(side, [0.04, 0.09, 0.15], layers.chest.apex + np.array([0.04, 0.0, 0.0])),
            to_points(side, layers.chest.wall(y), y),
        ]
    )
    centre = np.array([0.5 + side * 0.5 * layers.chest.half_width, 0.45])
    inward = (centre - outer) / np.linalg.norm(centre - outer, axis=1, keepdims=True)
    thick = rng.uniform(0.040, 0.050) * rng.uniform(0.75, 1.2, (len(outer), 1))
    band = np.concatenate([outer - 0.03 * inward, (outer + thick * inward)[::-1]])
    layers.fill(layers.pen.mask(fit_curve(band, closed=True), blur=0.005), 0.88)


def _draw_pneumothorax(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw air between the wall and a shrunken lung: dark, without vessels, behind a thin pleural line."""
    gap = rng.uniform(0.30, 0.42)
    y = layers.chest.apex + np.linspace(0.07, 0.60, 12)
    shrunk = layers.chest.wall(y) * (1 - gap * np.linspace(1.0, 0.35, 12))
    edge = np.concatenate([to_points(side, [0.05], [layers.chest.apex + 0.085]), to_points(side, shrunk, y + 0.02)])
    outer = to_points(side, [0.45, 0.45, 0.05], [y[-1] + 0.02, -0.1, -0.1])
    zone = layers.pen.mask(np.concatenate([edge, outer]), blur=0.003)
    layers.pleural_air = zone
    line = layers.pen.new_canvas()
    layers.pen.stroke(line, fit_curve(edge, closed=False), 0.009, 1.0)
    layers.image += 34 * layers.pen.finish(line, 0.002)
    lung = to_points(side, np.concatenate([[0.03], shrunk, [0.03]]), np.concatenate([[y[0]], y, [y[-1]]]))
    layers.fill(layers.pen.mask(lung, blur=0.02) * (1 - zone), 0.22)


def _draw_hernia(layers: _Layers, side: int, rng: np.random.Generator) -> None:
    """Draw a round pouch behind the heart with air above fluid and a flat level between."""
    x, y = 0.5 + rng.uniform(0.03, 0.06), layers.chest.dome - rng.uniform(0.0, 0.03)
    radius = rng.uniform(0.082, 0.10)
    pouch = layers.pen.mask(trace_ellipse(x, y, radius, 0.92 * radius), blur=0.003)
    inside = layers.pen.mask(trace_ellipse(x, y, 0.86 * radius, 0.78 * radius), blur=0.003)
    above = layers.pen.mask(np.array([[0.0, -0.2], [1.0, -0.2], [1.0, y], [0.0, y]]))
    layers.fill(pouch, 0.9)
    layers.image += 20 * pouch - 76 * inside * above


_DRAW: Mapping[str, Callable[[_Layers, int, np.random.Generator], None]] = {
    "Atelectasis": _draw_atelectasis,
    "Consolidation": _draw_consolidation,
    "Edema": _draw_edema,
    "Effusion": _draw_effusion,
    "Fibrosis": _draw_fibrosis,
    "Hernia": _draw_hernia,
    "Infiltration": _draw_infiltration,
    "Mass": _draw_mass,
    "Nodule": _draw_nodule,
    "Pleural_Thickening": _draw_pleural_thickening,
    "Pneumonia": _draw_pneumonia,
    "Pneumothorax": _draw_pneumothorax,
}
