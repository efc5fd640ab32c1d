"""Synthetic frontal chest radiographs with drawn findings: data for the demo, which no patient stands behind.

    write_phantoms -> images/*.png, Data_Entry_phantoms.csv, train_val_list.txt, test_list.txt, phantoms.json

A phantom is drawn the way a radiograph comes about: attenuation of tissue, less the air of the lungs, plus
bone. A finding that fills the lung (Consolidation, Effusion, Mass, ...) takes the air away; one that is a
shape of the chest (Cardiomegaly, Emphysema, the volume loss of Atelectasis) changes the anatomy before it is drawn.
Findings are larger, denser and more frequent than in life, so that a small network learns them from under a
thousand images; nothing learnt here says anything about real chests.

Coordinates are fractions of the side, x to the right and y down; the side stands for 380 mm. As in every
frontal view the patient faces the reader: the patient's left is on the right of the picture. `side` is -1 on
the left of the picture (the patient's right) and +1 on its right.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ray_cxr.errors import ConfigError, OutputError
from ray_cxr.labels import FINDINGS

TABLE_NAME = "Data_Entry_phantoms.csv"
#: NIH's own header; the bracketed names break at the comma into two columns each.
TABLE_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
#: What is wrong with the files of the last patients, in order, when `broken` is set.
BREAKAGES: tuple[str, ...] = ("truncated", "empty", "text", "missing", "bad_crc", "blank")
#: How the first image of the first patients is encoded; all others are 8-bit gray.
ENCODINGS: tuple[str, ...] = ("rgba", "gray16", "palette")

_FORMAT = 1  # raised when the drawing changes, so that an older folder is not taken for this one
_SIDE_MM = 380.0
_DONE, _BEGUN = "phantoms.json", "phantoms.partial.json"

# Of every 23 patients, 14 come with a finding of their own and 9 with none. One in 4 is a test patient; as 4
# and 23 have no common factor, each finding meets the test split equally often over every 92 patients.
_SLOTS: tuple[str | None, ...] = (*FINDINGS, *(None,) * 9)
_TEST_EVERY = 4

_COMPANIONS: Mapping[str, tuple[str, ...]] = {
    "Atelectasis": ("Effusion", "Pneumothorax", "Pleural_Thickening", "Infiltration"),
    "Cardiomegaly": ("Edema", "Effusion", "Hernia", "Pneumonia"),
    "Consolidation": ("Effusion", "Pneumonia", "Edema", "Nodule"),
    "Edema": ("Cardiomegaly", "Effusion", "Infiltration", "Pneumonia"),
    "Effusion": ("Atelectasis", "Cardiomegaly", "Consolidation", "Mass"),
    "Emphysema": ("Pneumothorax", "Fibrosis", "Nodule", "Mass"),
    "Fibrosis": ("Emphysema", "Pleural_Thickening", "Infiltration", "Pneumothorax"),
    "Hernia": ("Cardiomegaly", "Atelectasis", "Fibrosis", "Nodule"),
    "Infiltration": ("Edema", "Pneumonia", "Consolidation", "Fibrosis"),
    "Mass": ("Nodule", "Consolidation", "Pleural_Thickening", "Emphysema"),
    "Nodule": ("Mass", "Infiltration", "Pleural_Thickening", "Hernia"),
    "Pleural_Thickening": ("Fibrosis", "Mass", "Pneumothorax", "Hernia"),
    "Pneumonia": ("Infiltration", "Consolidation", "Atelectasis", "Effusion"),
    "Pneumothorax": ("Emphysema", "Pleural_Thickening", "Nodule", "Atelectasis"),
}
# Pairs whose signs undo each other: diaphragms cannot be both raised and flattened.
_EXCLUSIVE: tuple[frozenset[str], ...] = tuple(
    frozenset({"Emphysema", other}) for other in ("Cardiomegaly", "Edema", "Atelectasis")
)

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class PhantomSet:
    """Where a written set lies, and what it holds.

    Attributes:
        table: `Data_Entry_phantoms.csv`, NIH's v2020 dialect.
        images: the folder of PNGs.
        train_val_list, test_list: names of images, one a line, as in NIH's official split.
        counts: images (rows of the table), patients, train_val, test, broken; then one count per finding and
            one for `No Finding`.
    """

    table: Path
    images: Path
    train_val_list: Path
    test_list: Path
    counts: Mapping[str, int]


@dataclass(frozen=True)
class Anatomy:
    """One chest on one visit: all that its picture depends on, findings aside.

    Lengths are fractions of the side. `key` (seed, patient) seeds where a finding sits, so that it stays in
    its place from visit to visit; `visit` seeds what differs between exposures, noise above all.
    """

    key: tuple[int, int]
    visit: int
    size: int
    age: int
    sex: str
    view: str
    # the patient
    half_width: float  # of the rib cage inside, at its widest
    apex: float  # y of the lung's apex
    dome: float  # y of the right diaphragm's dome
    dome_drop: float  # how much lower the left dome stands
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
        """Distance of the lateral lung border from the midline at height y."""
        u = (np.asarray(y) - self.apex) / (self.dome + self.recess - self.apex)
        shape = np.interp(u, _WALL_U, _WALL_H)
        return np.asarray(self.half_width * shape)

    def domes(self, side: int) -> float:
        return self.dome + (self.dome_drop if side > 0 else 0.0)


_WALL_U = np.array([0.0, 0.03, 0.10, 0.20, 0.35, 0.50, 0.70, 1.0])
_WALL_H = np.array([0.38, 0.50, 0.63, 0.75, 0.88, 0.95, 1.0, 1.01])


def anatomy(seed: int, patient: int, visit: int, *, size: int = 256) -> Anatomy:
    """The chest of one patient on one visit, both numbered from 1 and 0; a pure function of its arguments.

    Raises:
        ValueError: patient below 1, or a negative seed or visit.
    """
    if patient < 1 or visit < 0 or seed < 0:
        raise ValueError(f"no such phantom: seed {seed}, patient {patient}, visit {visit}")
    body = _generator(seed, patient)
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
    shot = _generator(seed, patient, visit)
    view = usual_view if shot.random() < 0.85 else ("PA" if usual_view == "AP" else "AP")
    ap = view == "AP"
    if ap:  # nearer to the tube and lying down: a magnified heart, less breath
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


def draw(chest: Anatomy, findings: Collection[str] = ()) -> Array:
    """The radiograph of one chest: uint8[size, size], MONOCHROME2 (dense is bright).

    Pure: the same chest and findings give the same bytes, and the chest without a finding differs from the
    chest with it only by the finding's own signs (noise and exposure are the same).

    Raises:
        ValueError: a name that is not one of `FINDINGS`.
    """
    unknown = sorted(set(findings) - set(FINDINGS))
    if unknown:
        raise ValueError(f"not a finding: {unknown[0]!r}")
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
        chest = replace(chest, heart=chest.heart + _spot(chest, "Cardiomegaly")[1].uniform(0.16, 0.22))
    if "Atelectasis" in findings:
        raised[_spot(chest, "Atelectasis")[0]] = 0.06

    pen = _Pen(chest, chest.size)
    chance = _generator(*chest.key, chest.visit, 1)
    cavity = pen.area(_cavity(chest, -1), _cavity(chest, 1))
    abdomen = pen.area(_abdomen(chest, raised))
    heart = pen.area(_mediastinum(chest), blur=0.006)
    soft = np.maximum(heart, abdomen)

    # The lung thins towards its edges, and a little of it lies behind heart and domes.
    air = cavity * (0.62 + 0.38 * pen.soften(cavity, 0.05))
    air *= (1 - 0.94 * abdomen) * (1 - 0.86 * heart)
    picture, vessels = _fine(chest, raised, chance, soft)
    signs = _Signs(pen, chest, raised, air, np.zeros_like(air), picture)
    for finding in FINDINGS:
        if finding in findings and finding in _SIGNS:
            _SIGNS[finding](signs)

    picture += heart * (40 - 34 * abdomen)
    # The abdomen is sharp where it meets lung or heart, soft towards the flank.
    flank = pen.soften(abdomen, 0.035)
    abdomen -= flank
    abdomen *= np.maximum(cavity, heart)
    abdomen += flank
    abdomen *= 56
    picture += abdomen
    vessels *= (0.35 if hyperinflated else 1.0) * (58 + 0.25 * (chest.age - 50))
    vessels -= 124 * chest.lucency
    if "Pneumothorax" in findings:  # pleural air: darker than lung, and without vessels
        vessels -= signs.bare * (vessels + 155 * chest.lucency)
    vessels *= air
    picture += vessels
    picture = cv2.GaussianBlur(picture, (3, 3), 0.0026 * chest.size)
    picture += cv2.LUT(chance.integers(0, 256, picture.shape, dtype=np.uint8), _NOISE)
    return _expose(pen, picture, chest)


def write_phantoms(
    out: Path, *, patients: int = 400, size: int = 256, seed: int = 0, broken: bool = True
) -> PhantomSet:
    """Draw and write a whole set; about 2.5 images a patient, a quarter of the patients for the test.

    The bytes are a function of the arguments. A complete set of the same settings is left alone; one that was
    interrupted is written again.

    Args:
        out: folder to make; it may exist if it is empty.
        patients: those with whole images; every finding occurs from 23 on.
        size: side of the images, pixels.
        seed: another seed gives other patients.
        broken: add one test patient with an unusable file for each of `BREAKAGES`, labelled No Finding.

    Raises:
        ConfigError: patients, size or seed out of range.
        OutputError: `out` is a file, or holds other things or a set of other settings.
    """
    for name, value, low, high in (
        ("patients", patients, _TEST_EVERY, 1_000_000),
        ("size", size, 64, 2048),
        ("seed", seed, 0, 2**31 - 1),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name}: {value} is not between {low} and {high}")
    out = Path(out)
    settings = {"format": _FORMAT, "patients": patients, "size": size, "seed": seed, "broken": broken}
    rows = list(_rows(patients, seed, size))
    spoilt = [patients + 1 + index for index in range(len(BREAKAGES))] if broken else []
    rows += [_Row(anatomy(seed, patient, 0, size=size), (), test=True) for patient in spoilt]
    result = PhantomSet(
        out / TABLE_NAME,
        out / "images",
        out / "train_val_list.txt",
        out / "test_list.txt",
        _counts(rows, len(spoilt)),
    )
    if _is_written(out, settings, result, [row.name for row in rows]):
        return result

    out.mkdir(parents=True, exist_ok=True)
    _write_text(out / _BEGUN, json.dumps(settings))  # first of all: it says whose an unfinished folder is
    result.images.mkdir(exist_ok=True)

    for row in rows:
        picture = draw(row.chest, row.findings)
        patient, visit = row.chest.key[1], row.chest.visit
        encoding = ENCODINGS[patient - 1] if visit == 0 and patient <= len(ENCODINGS) else "gray8"
        data: bytes | None = _encode(picture, encoding)
        if data and patient in spoilt:
            data = _spoil(data, picture, BREAKAGES[spoilt.index(patient)])
        if data is not None:
            (result.images / row.name).write_bytes(data)
    _write_text(result.table, "\n".join([TABLE_HEADER, *(row.line() for row in rows)]) + "\n")
    for path, test in ((result.train_val_list, False), (result.test_list, True)):
        _write_text(path, "".join(f"{row.name}\n" for row in rows if row.test is test))
    _write_text(out / _DONE, json.dumps({"settings": settings, "counts": result.counts}, indent=1) + "\n")
    (out / _BEGUN).unlink()
    return result


# ---- who has what -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One image: its chest, its findings and its split."""

    chest: Anatomy
    findings: tuple[str, ...]
    test: bool

    @property
    def name(self) -> str:
        return f"{self.chest.key[1]:08d}_{self.chest.visit:03d}.png"

    def line(self) -> str:
        chest, spacing = self.chest, _SIDE_MM / self.chest.size
        cells = (
            self.name,
            "|".join(self.findings) or "No Finding",
            chest.visit,
            chest.key[1],
            chest.age,
            chest.sex,
            chest.view,
            chest.size,
            chest.size,
            f"{spacing:.4g}",
            f"{spacing:.4g}",
        )
        return ",".join(str(cell) for cell in cells)


def _rows(patients: int, seed: int, size: int) -> Iterator[_Row]:
    order = _generator(seed).permutation(len(_SLOTS))
    for patient in range(1, patients + 1):
        first = _SLOTS[order[(patient - 1) % len(_SLOTS)]]
        for visit, findings in enumerate(_course(seed, patient, first)):
            yield _Row(anatomy(seed, patient, visit, size=size), findings, test=patient % _TEST_EVERY == 0)


def _course(seed: int, patient: int, first: str | None) -> list[tuple[str, ...]]:
    """The findings of a patient on each visit: most stay, some go, some come."""
    chance = _generator(seed, patient, 0, 99)
    visits = int(chance.choice(5, p=(0.30, 0.25, 0.20, 0.15, 0.10))) + 1
    current: list[str] = []
    if first is not None:
        current = [first]
        for probability in (0.60, 0.35):
            if chance.random() < probability:
                _join(current, chance)
    course = [tuple(sorted(current))]
    for _ in range(visits - 1):
        current = [finding for finding in current if chance.random() < 0.8]
        if chance.random() < (0.30 if current else 0.15):
            _join(current, chance)
        course.append(tuple(sorted(current)))
    return course


def _join(current: list[str], chance: np.random.Generator) -> None:
    """Add a finding that goes with those there are; at most three, and none that excludes another."""
    pool = _COMPANIONS[current[0]] if current else FINDINGS
    new = pool[int(chance.integers(len(pool)))]
    excluded = any(frozenset({new, old}) in _EXCLUSIVE for old in current)
    if len(current) < 3 and new not in current and not excluded:
        current.append(new)


def _counts(rows: Sequence[_Row], broken: int) -> dict[str, int]:
    return {
        "images": len(rows),
        "patients": len({row.chest.key for row in rows}),
        "train_val": sum(not row.test for row in rows),
        "test": sum(row.test for row in rows),
        "broken": broken,
        **{finding: sum(finding in row.findings for row in rows) for finding in FINDINGS},
        "No Finding": sum(not row.findings for row in rows),
    }


# ---- files ------------------------------------------------------------------------------------------------


def _is_written(out: Path, settings: Mapping[str, Any], result: PhantomSet, names: Sequence[str]) -> bool:
    """Whether the very set is there already; refuses a folder that is somebody else's."""
    try:
        entries = {entry.name for entry in out.iterdir()} - {_BEGUN + ".part"}
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise OutputError(f"{out} is a file; name a folder for the phantoms") from None
    if not entries:
        return False
    for name in (_DONE, _BEGUN):
        if name not in entries:
            continue
        try:
            held = json.loads((out / name).read_text(encoding="utf-8"))
        except ValueError:
            held = None
        if name == _DONE:
            held = held.get("settings") if isinstance(held, dict) else None
        if held != settings:
            raise OutputError(f"{out} holds phantoms of other settings ({name}); name another folder")
        if name == _BEGUN:
            return False
        lost = len(names) - sum((result.images / name).exists() for name in names)
        texts = (result.table, result.train_val_list, result.test_list)
        return all(path.exists() for path in texts) and lost == int(bool(settings["broken"]))
    raise OutputError(f"{out} holds files that are no phantoms; name a new or an empty folder")


def _write_text(path: Path, text: str) -> None:
    """Whole or not at all: a killed run leaves no half of a table or list."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def _encode(picture: Array, encoding: str) -> bytes:
    """A uint8[H, W] as PNG; every encoding decodes to the same gray values."""
    if encoding == "palette":
        # Indices run against the grays, so that a reader that takes indices for grays shows a negative.
        image = Image.fromarray(255 - picture).convert("L")
        paletted = Image.frombytes("P", image.size, image.tobytes())
        paletted.putpalette([255 - index for index in range(256) for _ in range(3)])
        buffer = io.BytesIO()
        paletted.save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()
    if encoding == "rgba":
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGRA)
    elif encoding == "gray16":
        picture = picture.astype(np.uint16) * 257  # 255 becomes 65535: the same fraction of full scale
    # Noise has no repeats to look for: Huffman codes alone are both faster and smaller.
    how = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    return bytes(cv2.imencode(".png", picture, how)[1])


def _spoil(data: bytes, picture: Array, breakage: str) -> bytes | None:
    """The bytes of a file that cannot be used; None for one that is not there at all."""
    match breakage:
        case "missing":
            return None
        case "truncated":
            return data[: len(data) * 6 // 10]
        case "empty":
            return b""
        case "text":
            return b"This file has the name of a PNG and is none.\n"
        case "bad_crc":
            start = data.index(b"IDAT") + 4
            length = int.from_bytes(data[start - 8 : start - 4], "big")
            spot = start + length // 2
            return data[:spot] + bytes([data[spot] ^ 0xFF]) + data[spot + 1 :]
        case "blank":
            return _encode(np.zeros_like(picture), "gray8")
    raise AssertionError(breakage)


# Quantum noise of 2.6 gray values, by the normal quantiles of a byte: much cheaper than normal numbers.
_NOISE = np.array([2.6 * NormalDist().inv_cdf((k + 0.5) / 256) for k in range(256)], dtype=np.float32)


# ---- drawing ----------------------------------------------------------------------------------------------


def _generator(seed: int, patient: int = 0, visit: int = -1, stream: int = 0) -> np.random.Generator:
    """One stream per purpose; visit -1 stands for the patient as such.

    Always four words: numpy takes missing words of a seed as zeros, so that [seed, patient] and
    [seed, patient, 0] would be the same stream.
    """
    return np.random.default_rng([seed, patient, visit + 1, stream])


_STEP = np.arange(6)[:, None] / 6
_SPLINE = (
    np.concatenate(
        [
            -_STEP + 2 * _STEP**2 - _STEP**3,
            2 - 5 * _STEP**2 + 3 * _STEP**3,
            _STEP + 4 * _STEP**2 - 3 * _STEP**3,
            -(_STEP**2) + _STEP**3,
        ],
        axis=1,
    )
    / 2
)
_ANGLE = np.arange(24) * (np.pi / 12)
_CIRCLE = np.stack([np.cos(_ANGLE), np.sin(_ANGLE)], axis=1)


def _curve(points: Array, *, closed: bool) -> Array:
    """A Catmull-Rom spline through float[n, 2] points, six steps from each to the next: float[m, 2]."""
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    segments = len(padded) - 3
    curve = np.empty((segments, 6, 2))
    for axis in (0, 1):
        windows = padded[np.arange(segments)[:, None] + np.arange(4), axis]
        curve[:, :, axis] = windows @ _SPLINE.T
    inner = curve.reshape(-1, 2)
    return inner if closed else np.concatenate([inner, points[-1:]])


class _Pen:
    """Rasters shapes given in fractions of the side, after the pose of one exposure.

    Masks come back as float32[size, size] from 0 to 1, anti-aliased.
    """

    def __init__(self, chest: Anatomy, size: int) -> None:
        self.size = size
        cos, sin = np.cos(chest.tilt) * chest.zoom, np.sin(chest.tilt) * chest.zoom
        self._turn = np.array([[cos, sin], [-sin, cos]])
        self._move = np.array(chest.shift) + 0.5

    def pixels(self, points: Array) -> Array:
        """float[..., 2] fractions as int32[..., 2] sixteenths of a pixel, what OpenCV calls shift=4."""
        posed = (np.asarray(points) - 0.5) @ self._turn + self._move
        return np.asarray(posed * (self.size * 16) - 7.5, dtype=np.int32)

    def width(self, fraction: float) -> int:
        return max(1, round(fraction * self.size))

    def blank(self) -> Array:
        return np.zeros((self.size, self.size), np.uint8)

    def area(self, *shapes: Array, blur: float = 0.0) -> Array:
        canvas = self.blank()
        for shape in shapes:
            cv2.fillPoly(canvas, [self.pixels(shape)], 255, cv2.LINE_AA, 4)
        return self.finish(canvas, blur)

    def stroke(self, canvas: Array, lines: Array, width: float, value: float) -> None:
        """Draw one line float[n, 2], or several at once float[k, n, 2]; `value` is 0 to 1."""
        pixels = self.pixels(lines if lines.ndim == 3 else lines[None])
        cv2.polylines(canvas, list(pixels), False, 255 * value, self.width(width), cv2.LINE_AA, 4)

    def dot(self, canvas: Array, shape: Array, value: float = 1.0) -> None:
        """Fill an outline float[n, 2] on a uint8 canvas."""
        cv2.fillPoly(canvas, [self.pixels(shape)], 255 * value, cv2.LINE_AA, 4)

    def finish(self, canvas: Array, blur: float = 0.0) -> Array:
        """A uint8 canvas, softened by `blur` (a standard deviation), as float32 from 0 to 1."""
        if blur * self.size > 5:
            return self.soften(canvas.astype(np.float32) * np.float32(1 / 255), blur)
        if blur:
            canvas = cv2.GaussianBlur(canvas, (0, 0), blur * self.size)
        return canvas.astype(np.float32) * np.float32(1 / 255)

    def soften(self, mask: Array, blur: float) -> Array:
        """A wide blur, done on a coarse grid: a quarter of a millisecond instead of ten."""
        side = min(64, self.size)
        small = cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA)
        small = cv2.GaussianBlur(small, (0, 0), blur * side, borderType=cv2.BORDER_REPLICATE)
        return np.asarray(cv2.resize(small, (self.size, self.size), interpolation=cv2.INTER_LINEAR))


def _place(side: int, distance: Any, y: Any) -> Array:
    """Points at a distance from the midline, on one side: float[..., 2]."""
    distance = np.asarray(distance, dtype=np.float64)
    points = np.empty((*np.shape(distance), 2))
    points[..., 0] = 0.5 + side * distance
    points[..., 1] = y
    return points


def _both(distance: Array, y: Array) -> Array:
    """The same lines on either side: float[k, n] twice becomes float[2k, n, 2]."""
    return np.concatenate([_place(-1, distance, y), _place(1, distance, y)])


def _ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Array:
    cos, sin = np.cos(turn), np.sin(turn)
    return np.asarray((_CIRCLE * (rx, ry)) @ np.array([[cos, sin], [-sin, cos]]) + (x, y))


def _cavity(chest: Anatomy, side: int) -> Array:
    """One half of the rib cage, open below the diaphragm."""
    base = chest.dome + chest.recess
    y = np.array([0.10, 0.2, 0.32, 0.46, 0.62, 0.8, 0.92, 1.0]) * (base - chest.apex) + chest.apex
    top = chest.apex
    points = [
        _place(side, [0.034, 0.034, 0.055], [0.45, top + 0.10, top + 0.035]),
        _place(side, [0.10, 0.155], [top + 0.004, top + 0.006]),
        _place(side, chest.wall(y), y),
        _place(side, [0.6 * chest.half_width, 0.034], [base + 0.02, base + 0.02]),
    ]
    return _curve(np.concatenate(points), closed=True)


def _dome_line(chest: Anatomy, side: int, raised: float, distance: Array) -> Array:
    """Height y of the diaphragm at each distance from the midline."""
    top, peak = chest.domes(side) - raised, 0.50 * chest.half_width
    foot = chest.domes(side) + chest.recess  # the angle stays where it is when the dome is raised
    lateral = np.clip((distance - peak) / (chest.half_width * 1.01 - peak), 0, 1.2)
    medial = np.clip((peak - distance) / peak, 0, 1)
    middle = chest.dome + 0.5 * chest.dome_drop + 0.035  # where both halves meet
    return np.asarray(top + (foot - top) * lateral**2.4 + (middle - top) * medial**2)


def _abdomen(chest: Anatomy, raised: Mapping[int, float]) -> Array:
    flank = 1.03 * chest.half_width
    distance = np.linspace(0, flank, 16)
    left = _place(-1, distance, _dome_line(chest, -1, raised[-1], distance))[::-1]
    right = _place(1, distance, _dome_line(chest, 1, raised[1], distance))
    corners = [_place(1, flank + 0.02, 1.4)[None], _place(-1, flank + 0.02, 1.4)[None]]
    return np.concatenate([left, right, *corners])


def _heart_reach(chest: Anatomy) -> tuple[float, float]:
    """How far the heart reaches from the midline to the patient's right and left; together ratio x width."""
    width = chest.heart * 2 * chest.half_width
    return 0.31 * width, 0.69 * width


def _mediastinum(chest: Anatomy) -> Array:
    """Great vessels, aortic arch and heart as one outline."""
    right, left = _heart_reach(chest)
    floor = chest.dome + 0.5 * chest.recess
    mid = 0.40 + 0.35 * (floor - 0.74)
    span = floor - mid
    knob = chest.knob
    x = [-0.040, -0.046, -0.050, -0.055, -right * 0.86, -right, -right * 0.90, -0.05]
    y = [0.02, 0.20, mid - 0.06, mid, mid + 0.28 * span, mid + 0.55 * span, mid + 0.82 * span, floor + 0.05]
    x += [0.10, left * 0.84, left, left * 0.92, left * 0.66, 0.070, 0.056, knob + 0.006, knob, 0.044, 0.036]
    y += [floor + 0.08, floor + 0.035, floor - 0.035, mid + 0.60 * span, mid + 0.28 * span]
    y += [mid + 0.05, mid - 0.01, mid - 0.05, mid - 0.10, mid - 0.15, 0.02]
    return _curve(np.stack([0.5 + np.array(x), np.array(y)], axis=1), closed=True)


def _outline(chest: Anatomy) -> Array:
    """Neck, shoulders and trunk; in AP the arms lie along the trunk."""
    trunk = chest.half_width + chest.fat
    if chest.view == "AP":
        shoulder = [(0.50, 0.21), (0.56, 0.34), (0.56, 0.60), (0.54, 0.95), (0.52, 1.25)]
    else:
        shoulder = [(0.50, 0.19), (0.57, 0.28), (0.55, 0.42), (trunk + 0.06, 0.52), (trunk + 0.015, 0.60)]
        shoulder += [(trunk, 0.70), (trunk + 0.01, 0.95), (trunk + 0.02, 1.25)]
    neck = [(0.095, -0.25), (0.10, -0.02), (0.13, 0.05), (0.25, 0.095), (0.38, 0.13)]
    distance, y = np.array(neck + shoulder).T
    y = y + np.where(y < 0.3, chest.apex - 0.125, 0.0)  # shoulders go with the apices
    half = _place(1, distance, y)
    other = _place(-1, distance, y)[::-1]
    return _curve(np.concatenate([half, other]), closed=True)


def _bones(pen: _Pen, chest: Anatomy, soft: Array) -> Array:
    """Ribs and clavicles: float32[size, size], gray values to add.

    Ribs fade by `soft` (0 to 1, heart and abdomen), in which thicker tissue drowns them.
    """
    t, rib = np.linspace(0, 1, 9)[None], np.arange(10.0)[:, None]
    y = chest.apex + 0.027 + rib * chest.rib_pitch
    y = y - 0.030 * np.sin(np.pi * np.minimum(1.25 * t, 1)) + (0.030 + 0.012 * rib) * t**2.2
    x = 0.03 + (chest.wall(y) * 1.02 - 0.03) * np.sin(0.5 * np.pi * t) ** 0.9
    back = _both(x, y)
    # The front ends run on from the wall, down and towards the midline.
    front_y = y[1:7, -1:] + (0.13 + 0.006 * rib[1:7]) * t**0.85
    reach = x[1:7, -1:]
    front = _both(np.minimum(reach, chest.wall(front_y)) - (reach - 0.15) * t**1.7, front_y)
    ribs, fronts, other = pen.blank(), pen.blank(), pen.blank()
    collar_x = np.array([[0.034, 0.09, 0.16, 0.24, 0.32, 0.39]])
    collar_y = chest.apex + np.array([[0.088, 0.072, 0.050, 0.030, 0.026, 0.045]])
    collars = np.stack([_curve(line, closed=False) for line in _both(collar_x, collar_y)])
    pen.stroke(fronts, front, 0.024, 0.7)
    for width, value in ((1.0, 0.75), (0.46, 0.45)):  # cortex first, then the paler marrow inside it
        pen.stroke(ribs, back, 0.0215 * width, value)
        pen.stroke(other, collars, 0.027 * width, value + 0.1)
    gray = 44.0 - 0.14 * (chest.age - 50)  # bone thins with age
    bones = np.maximum(pen.finish(ribs), 0.6 * pen.finish(fronts)) * (1 - 0.72 * soft)
    bones = gray * np.maximum(bones, pen.finish(other))

    return np.asarray(bones)


def _fine(chest: Anatomy, raised: Mapping[int, float], chance: np.random.Generator, soft: Array) -> tuple[Array, Array]:
    """Tissue with bones (gray values), and vessels (0 to 1): float32[size, size] each.

    Drawn at half the size for a quarter of the time: only the outlines of lung, heart and diaphragm have to
    be sharp. `soft` (0 to 1) is heart and abdomen, in which ribs drown.
    """
    pen = _Pen(chest, chest.size // 2)
    full, half = (chest.size,) * 2, (pen.size,) * 2
    tissue = _tissue(pen, chest, raised, chance)
    tissue += _bones(pen, chest, cv2.resize(soft, half, interpolation=cv2.INTER_AREA))
    vessels = _vessels(pen, chance)
    return (
        np.asarray(cv2.resize(tissue, full, interpolation=cv2.INTER_LINEAR)),
        np.asarray(cv2.resize(vessels, full, interpolation=cv2.INTER_LINEAR)),
    )


def _tissue(pen: _Pen, chest: Anatomy, raised: Mapping[int, float], chance: np.random.Generator) -> Array:
    """Trunk, breasts, scapulae, spine, windpipe and stomach: float32[size, size], gray values."""
    body = pen.area(_outline(chest), blur=0.005)
    tissue = 68 + 88 * pen.soften(body, 0.16)
    if chest.breast:
        tissue += _breasts(pen, chest)
    tissue += 34 * _frame(pen, chest)
    hollow = pen.blank()
    pen.stroke(hollow, np.array([[0.498, -0.1], [0.492, 0.34]]), 0.036, 0.6)
    pen.stroke(hollow, np.array([[[0.492, 0.335], [0.44, 0.40]], [[0.494, 0.335], [0.56, 0.41]]]), 0.02, 0.45)
    width, height = chance.uniform(0.02, 0.06), chance.uniform(0.012, 0.030)
    x, y = 0.5 + chance.uniform(0.12, 0.20), chest.domes(1) - raised[1] + 0.035 + height
    pen.dot(hollow, _ellipse(x, y, width, height), chance.uniform(0.2, 0.9))
    tissue -= 48 * pen.finish(hollow, 0.006)
    coarse = 3 * chance.standard_normal((18, 18), dtype=np.float32)
    tissue += cv2.resize(coarse, (pen.size,) * 2, interpolation=cv2.INTER_LINEAR)
    tissue *= body
    tissue += 10
    return np.asarray(tissue)


def _frame(pen: _Pen, chest: Anatomy) -> Array:
    """Scapulae, heads of the humeri and spine: float32 from 0 to 1."""
    medial = 0.27 if chest.view == "AP" else 0.35
    blade_x = np.array([medial + 0.02, medial + 0.01, medial + 0.07, 0.44, 0.46, 0.42])
    blade_y = chest.apex + np.array([0.06, 0.20, 0.33, 0.18, 0.08, 0.04])
    canvas = pen.blank()
    for side in (-1, 1):
        pen.dot(canvas, _curve(_place(side, blade_x, blade_y), closed=True), 0.45)
        pen.dot(canvas, _ellipse(0.5 + side * 0.47, chest.apex + 0.09, 0.045, 0.05), 0.6)
    pen.stroke(canvas, np.array([[0.5, -0.2], [0.5, 1.2]]), 0.07, 0.30)
    levels = np.arange(-0.05, 1.1, 0.056)[:, None]
    pen.stroke(canvas, _place(1, np.array([[-0.028, 0.028]]).repeat(len(levels), 0), levels), 0.034, 0.62)
    pen.stroke(canvas, _place(1, np.zeros((len(levels), 2)), levels + np.array([[0.012, 0.024]])), 0.010, 0.9)
    return pen.finish(canvas, 0.004)


def _vessels(pen: _Pen, chance: np.random.Generator) -> Array:
    """Hila and the vessels that fan out from them, finer with each branching: float32 from 0 to 1."""
    canvas = pen.blank()
    t = np.linspace(0, 1, 5)[None]
    stems = 10
    angle = np.tile(np.linspace(-1.4, 1.45, stems), 2)[:, None] + chance.uniform(-0.15, 0.15, (2 * stems, 1))
    side = np.repeat([-1.0, 1.0], stems)[:, None]
    x, y = np.full_like(side, 0.078), 0.435 - 0.008 * side
    length = chance.uniform(0.08, 0.14, (2 * stems, 1))
    for width, value in ((0.0085, 0.75), (0.006, 0.60), (0.004, 0.42)):
        turn = angle + chance.uniform(-0.6, 0.6, angle.shape) * t
        along, down = length * t * np.cos(turn), length * t * np.sin(turn)
        points = np.stack([0.5 + side * (x + along), y + down], axis=-1)
        pen.stroke(canvas, points, width, value)
        # Each forks: the children start where it ends.
        x, y = side * (points[:, -1:, 0] - 0.5), points[:, -1:, 1]
        x, y, side, length = (np.repeat(each, 2, axis=0) for each in (x, y, side, 0.85 * length))
        fork = np.tile([[-0.42], [0.38]], (len(angle), 1))
        angle = np.repeat(turn[:, -1:], 2, axis=0) + fork * chance.uniform(0.5, 1.3, fork.shape)
    for hilum in (-1, 1):
        root = _ellipse(0.5 + hilum * 0.082, 0.435 - 0.008 * hilum, 0.024, 0.052, -0.3 * hilum)
        pen.dot(canvas, root, 0.62)
    return pen.finish(canvas)


def _breasts(pen: _Pen, chest: Anatomy) -> Array:
    """Soft shadows, densest along the lower fold: float32[size, size], gray values to add."""
    y = chest.dome - 0.09
    full = pen.area(*(_ellipse(0.5 + side * 0.20, y, 0.155, 0.14) for side in (-1, 1)), blur=0.008)
    upper = pen.area(*(_ellipse(0.5 + side * 0.20, y - 0.06, 0.16, 0.15) for side in (-1, 1)), blur=0.04)
    return np.asarray(full * ((23 - 15 * upper) * np.float32(chest.breast)))


def _expose(pen: _Pen, picture: Array, chest: Anatomy) -> Array:
    """Gray values through gain and gamma to uint8, and the side marker, which no exposure fades."""
    levels = np.clip(picture * chest.gain, 0, 255).astype(np.uint8)
    shown = cv2.LUT(levels, np.rint(255 * (np.arange(256) / 255) ** chest.gamma).astype(np.uint8))
    corner = pen.pixels(np.array([[0.93, 0.07]]))[0] // 16
    scale = chest.size / 256 * 0.45
    where = (int(corner[0]), int(corner[1]))
    cv2.putText(shown, "L", where, cv2.FONT_HERSHEY_DUPLEX, scale, 235, pen.width(0.005), cv2.LINE_AA)
    return shown


# ---- findings ---------------------------------------------------------------------------------------------

# Findings that are often together start on opposite sides, so that one rarely hides the other.
_OPPOSITE: frozenset[str] = frozenset({"Atelectasis", "Pneumonia", "Nodule", "Pneumothorax"})


def _spot(chest: Anatomy, finding: str) -> tuple[int, np.random.Generator]:
    """The side of a one-sided finding and the generator of its size and place: the same on every visit."""
    side = 1 if _generator(*chest.key, -1, 50).random() < 0.5 else -1
    return (-side if finding in _OPPOSITE else side), _generator(*chest.key, -1, 51 + FINDINGS.index(finding))


@dataclass(frozen=True)
class _Signs:
    """What findings leave in a picture; the arrays are float32[size, size] and are changed in place.

    Attributes:
        air: thickness of air, 0 to 1.
        bare: part of the air that lies outside the lung, without vessels.
        picture: gray values of all but the air.
    """

    pen: _Pen
    chest: Anatomy
    raised: Mapping[int, float]
    air: Array
    bare: Array
    picture: Array

    def brighten(self, grays: Array) -> None:
        """Add gray values."""
        np.add(self.picture, grays, out=self.picture)

    def fill(self, mask: Array, amount: float) -> None:
        """Take the part `amount` of what air is left under a mask."""
        np.multiply(self.air, 1 - amount * mask, out=self.air)


def _effusion(signs: _Signs) -> None:
    """Fluid with a meniscus: it climbs the lateral wall and hides dome and costophrenic angle."""
    chest = signs.chest
    side, chance = _spot(chest, "Effusion")
    level = chest.domes(side) - signs.raised[side] - chance.uniform(0.0, 0.06)
    climb = chance.uniform(0.12, 0.18)
    x = np.linspace(0.0, 0.45, 14)
    y = level - climb * np.clip(x / chest.half_width, 0, 1.1) ** 4
    pool = np.concatenate([_place(side, x, y), _place(side, [0.45, 0.0], [1.2, 1.2])])
    fluid = signs.pen.area(pool, blur=0.006)
    signs.fill(fluid, 0.97)
    signs.brighten(8 * fluid)


def _nodule(signs: _Signs) -> None:
    """One or two round opacities of 20 to 29 mm, sharply outlined."""
    chest = signs.chest
    side, chance = _spot(chest, "Nodule")
    for one in range(1 + int(chance.random() < 0.4)):
        y = chance.uniform(0.30, 0.56)
        x = chance.uniform(0.56, 0.74) * float(chest.wall(y))
        radius = chance.uniform(0.029, 0.037)
        here = side if one == 0 else -side
        ball = signs.pen.area(_ellipse(0.5 + here * x, y, radius, radius), blur=0.003)
        signs.fill(ball, 0.85)
        signs.brighten(16 * ball)


def _mass(signs: _Signs) -> None:
    """A lobulated opacity of 50 to 70 mm."""
    chest = signs.chest
    side, chance = _spot(chest, "Mass")
    y = chance.uniform(0.33, 0.47)
    x = chance.uniform(0.50, 0.62) * float(chest.wall(y))
    angle = np.linspace(0, 2 * np.pi, 13)[:-1]
    radius = chance.uniform(0.068, 0.090) * chance.uniform(0.84, 1.16, 12)
    lobes = _place(side, x + radius * np.cos(angle), y + radius * np.sin(angle))
    mask = signs.pen.area(_curve(lobes, closed=True), blur=0.004)
    signs.fill(mask, 0.97)
    signs.brighten(16 * mask)


def _consolidation(signs: _Signs) -> None:
    """An upper lobe filled down to its fissure, which shows as a straight lower edge."""
    chest = signs.chest
    side, chance = _spot(chest, "Consolidation")
    fissure = chance.uniform(0.40, 0.46)
    slope = chance.uniform(-0.02, 0.05)
    top = chance.uniform(0.20, 0.25)
    lobe = _place(side, [0.03, 0.42, 0.42, 0.03], [fissure, fissure + slope, top, top + 0.03])
    patches = chance.uniform(0.55, 1.0, (9, 9)).astype(np.float32)
    patches = cv2.resize(patches, (signs.pen.size,) * 2, interpolation=cv2.INTER_LINEAR)
    signs.fill(signs.pen.area(lobe, blur=0.012) * patches, 0.90)


def _pneumonia(signs: _Signs) -> None:
    """A round dense focus in the lower zone, crossed by dark air-filled bronchi."""
    chest = signs.chest
    side, chance = _spot(chest, "Pneumonia")
    y = chance.uniform(0.58, 0.63)
    x = chance.uniform(0.54, 0.64) * float(chest.wall(y))
    radius = chance.uniform(0.085, 0.105)
    focus = signs.pen.area(_ellipse(0.5 + side * x, y, radius, 0.9 * radius), blur=0.014)
    bronchi = signs.pen.blank()
    for angle in (-0.55, -0.05, 0.45):
        reach = np.array([-0.9, 1.0]) * radius
        fall = np.array([-0.35, 1.4]) * radius
        line = _place(side, x + reach * np.cos(angle), y + fall * np.sin(angle))
        signs.pen.stroke(bronchi, line, 0.011, 1.0)
    signs.fill(focus * (1 - 0.75 * signs.pen.finish(bronchi, 0.003)), 0.92)


def _infiltration(signs: _Signs) -> None:
    """Faint patches all over both lungs."""
    chest = signs.chest
    _, chance = _spot(chest, "Infiltration")
    canvas = signs.pen.blank()
    for side in (-1, 1):
        for y in np.linspace(0.24, 0.66, 7):
            where = y + chance.uniform(-0.02, 0.02)
            x = chance.uniform(0.40, 0.88) * float(chest.wall(where))
            radius = chance.uniform(0.030, 0.046)
            patch = _ellipse(0.5 + side * x, where, radius * 1.25, radius, chance.uniform(-1, 1))
            signs.pen.dot(canvas, patch)
    signs.fill(signs.pen.finish(canvas, 0.014), 0.50)


def _edema(signs: _Signs) -> None:
    """Haze around both hila in the shape of a bat's wings."""
    _, chance = _spot(signs.chest, "Edema")
    reach, height = chance.uniform(0.115, 0.14), chance.uniform(0.15, 0.18)
    wings = [_ellipse(0.5 + side * 0.125, 0.45, reach, height, 0.25 * side) for side in (-1, 1)]
    signs.fill(signs.pen.area(*wings, blur=0.028), 0.72)


def _atelectasis(signs: _Signs) -> None:
    """Plates above a raised dome."""
    chest = signs.chest
    side, chance = _spot(chest, "Atelectasis")
    canvas = signs.pen.blank()
    floor = chest.domes(side) - signs.raised[side]
    for step in (0.035, 0.085, 0.135):
        y = floor - step + chance.uniform(-0.008, 0.008)
        x = np.array([0.28, 0.96]) * float(chest.wall(y))
        line = _place(side, x, y + np.array([chance.uniform(-0.015, 0.0), chance.uniform(0.0, 0.02)]))
        signs.pen.stroke(canvas, line, 0.020, 1.0)
    plates = signs.pen.finish(canvas, 0.004)
    signs.fill(plates, 0.88)
    signs.brighten(10 * plates)


def _fibrosis(signs: _Signs) -> None:
    """A coarse net of lines at both bases, densest at the periphery."""
    chest = signs.chest
    _, chance = _spot(chest, "Fibrosis")
    net, zone = signs.pen.blank(), []
    for side in (-1, 1):
        floor = chest.domes(side) - signs.raised[side]
        y = floor - chance.uniform(-0.05, 0.19, 110)
        x = (1 - 0.62 * chance.random(110) ** 1.2) * chest.wall(y)
        angle = chance.uniform(0, np.pi, 110)[:, None]
        run = chance.uniform(0.013, 0.026, (110, 1)) * np.array([[-1.0, 0.0, 1.0]])
        bend = np.array([[0.0, 0.007, 0.0]])
        lines = _place(
            side,
            x[:, None] + run * np.cos(angle) - bend * np.sin(angle),
            y[:, None] + run * np.sin(angle) + bend * np.cos(angle),
        )
        signs.pen.stroke(net, lines, 0.005, 1.0)
        y = floor + np.array([-0.20, -0.10, 0.0, 0.10])
        outer = _place(side, chest.wall(y) * 1.05, y)
        inner = _place(side, chest.wall(y) * np.array([0.9, 0.6, 0.45, 0.4]), y)[::-1]
        zone.append(np.concatenate([outer, inner]))
    signs.fill(signs.pen.area(*zone, blur=0.015), 0.28)
    signs.fill(signs.pen.finish(net, 0.002), 0.75)


def _pleural_thickening(signs: _Signs) -> None:
    """A wavy dense band along the lateral wall, with a cap over the apex."""
    chest = signs.chest
    side, chance = _spot(chest, "Pleural_Thickening")
    y = chest.apex + np.linspace(0.03, 0.52, 10)
    outer = np.concatenate(
        [
            _place(side, [0.04, 0.09, 0.15], chest.apex + np.array([0.04, 0.0, 0.0])),
            _place(side, chest.wall(y), y),
        ]
    )
    centre = np.array([0.5 + side * 0.5 * chest.half_width, 0.45])
    inward = (centre - outer) / np.linalg.norm(centre - outer, axis=1, keepdims=True)
    thick = chance.uniform(0.040, 0.050) * chance.uniform(0.75, 1.2, (len(outer), 1))
    band = np.concatenate([outer - 0.03 * inward, (outer + thick * inward)[::-1]])
    signs.fill(signs.pen.area(_curve(band, closed=True), blur=0.005), 0.88)


def _pneumothorax(signs: _Signs) -> None:
    """Air between the wall and a shrunken lung: darker, without vessels, behind a thin pleural line."""
    chest = signs.chest
    side, chance = _spot(chest, "Pneumothorax")
    gap = chance.uniform(0.30, 0.42)
    y = chest.apex + np.linspace(0.07, 0.60, 12)
    shrunk = chest.wall(y) * (1 - gap * np.linspace(1.0, 0.35, 12))
    edge = np.concatenate([_place(side, [0.05], [chest.apex + 0.085]), _place(side, shrunk, y + 0.02)])
    outer = _place(side, [0.45, 0.45, 0.05], [y[-1] + 0.02, -0.1, -0.1])
    zone = signs.pen.area(np.concatenate([edge, outer]), blur=0.003)
    np.copyto(signs.bare, zone)
    line = signs.pen.blank()
    signs.pen.stroke(line, _curve(edge, closed=False), 0.009, 1.0)
    signs.brighten(34 * signs.pen.finish(line, 0.002))
    lung = _place(side, np.concatenate([[0.03], shrunk, [0.03]]), np.concatenate([[y[0]], y, [y[-1]]]))
    signs.fill(signs.pen.area(lung, blur=0.02) * (1 - zone), 0.22)


def _hernia(signs: _Signs) -> None:
    """A round pouch behind the heart: air above, fluid below, a flat level between."""
    chest = signs.chest
    _, chance = _spot(chest, "Hernia")
    x, y = 0.5 + chance.uniform(0.03, 0.06), chest.dome - chance.uniform(0.0, 0.03)
    radius = chance.uniform(0.082, 0.10)
    pouch = signs.pen.area(_ellipse(x, y, radius, 0.92 * radius), blur=0.003)
    inside = signs.pen.area(_ellipse(x, y, 0.86 * radius, 0.78 * radius), blur=0.003)
    above = signs.pen.area(np.array([[0.0, -0.2], [1.0, -0.2], [1.0, y], [0.0, y]]))
    signs.fill(pouch, 0.9)
    signs.brighten(20 * pouch - 76 * inside * above)


_SIGNS: Mapping[str, Callable[[_Signs], None]] = {
    "Atelectasis": _atelectasis,
    "Consolidation": _consolidation,
    "Edema": _edema,
    "Effusion": _effusion,
    "Fibrosis": _fibrosis,
    "Hernia": _hernia,
    "Infiltration": _infiltration,
    "Mass": _mass,
    "Nodule": _nodule,
    "Pleural_Thickening": _pleural_thickening,
    "Pneumonia": _pneumonia,
    "Pneumothorax": _pneumothorax,
}
