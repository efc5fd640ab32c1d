"""Phantoms: synthetic frontal chest radiographs with drawn findings, for the demo and the tests.

    write_phantoms -> images/*.png, Data_Entry_phantoms.csv, train_val_list.txt, test_list.txt, phantoms.json

A phantom imitates the physics of a radiograph: attenuation of tissue, minus the air of the lungs, plus bone. Findings
are larger, denser and more frequent than in reality, so that a small model learns them from fewer than a thousand
images. Results on phantoms say nothing about real chests. The side stands for 380 mm, and the patient faces the
reader: the patient's left is on the right of the image.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ray_cxr.errors import OutputError
from ray_cxr.imaging.phantom_anatomy import Anatomy, sample_anatomy
from ray_cxr.imaging.phantom_drawing import Array, make_generator
from ray_cxr.imaging.phantom_findings import draw_phantom
from ray_cxr.labels import FINDINGS
from ray_cxr.storage import atomic
from ray_cxr.storage.run_folder import read_json

TABLE_NAME = "Data_Entry_phantoms.csv"
#: NIH's header, whose bracketed names break at the comma into two columns each.
TABLE_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
#: Faults in the files of the last patients, in order, if `broken` is set.
BREAKAGES: tuple[str, ...] = ("truncated", "empty", "text", "missing", "bad_crc", "blank")
#: Encodings of the first image of the first patients; all other images are 8-bit gray.
ENCODINGS: tuple[str, ...] = ("rgba", "gray16", "palette")

_FORMAT = 1  # increase it when the drawing changes, so that an older folder is not reused
_SIDE_MM = 380.0
_DONE, _PARTIAL = "phantoms.json", "phantoms.partial.json"

# In every 23 patients, each finding is the main finding of one, and 9 have none. One in 4 is a test patient. As 4 and
# 23 have no common factor, each finding is in the test split equally often over every 92 patients.
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
# Pairs whose signs cancel each other: diaphragms cannot be both raised and flattened.
_EXCLUSIVE = [{"Emphysema", finding} for finding in ("Cardiomegaly", "Edema", "Atelectasis")]


@dataclass(frozen=True)
class PhantomSet:
    """Paths and counts of a written set; the lists name images, one per line, as in NIH's official split."""

    table: Path
    images: Path
    train_val_list: Path
    test_list: Path
    counts: Mapping[str, int]  # images, patients, train_val, test, broken; then by finding, and `No Finding`


def write_phantoms(
    out: Path, *, patients: int = 400, size: int = 256, seed: int = 0, broken: bool = True
) -> PhantomSet:
    """Draw and write a set with about 2.5 images per patient; a quarter of the patients are for the test.

    The bytes depend on the arguments only. A complete set with the same settings is kept; an interrupted one is written
    again. With 23 or more patients every finding occurs. `broken` adds one test patient with an unusable file for each
    of `BREAKAGES`, labelled No Finding.

    Raises:
        OutputError: `out` is a file, or holds other files or a set with other settings.
    """
    settings = {"format": _FORMAT, "patients": patients, "size": size, "seed": seed, "broken": broken}
    rows = list(_plan_rows(patients, seed, size))
    n_broken = len(BREAKAGES) if broken else 0
    for patient in range(patients + 1, patients + n_broken + 1):
        rows.append(_Row(sample_anatomy(seed, patient, 0, size=size), (), test=True))
    counts = {
        "images": len(rows),
        "patients": patients + n_broken,
        "train_val": sum(not row.test for row in rows),
        "test": sum(row.test for row in rows),
        "broken": n_broken,
        **{finding: sum(finding in row.findings for row in rows) for finding in FINDINGS},
        "No Finding": sum(not row.findings for row in rows),
    }
    result = PhantomSet(out / TABLE_NAME, out / "images", out / "train_val_list.txt", out / "test_list.txt", counts)
    if _is_complete(out, settings, result, [row.name for row in rows]):
        return result

    out.mkdir(parents=True, exist_ok=True)
    atomic.write_text(out / _PARTIAL, json.dumps(settings))  # first, to mark an unfinished folder as ours
    result.images.mkdir(exist_ok=True)

    for row in rows:
        image = draw_phantom(row.chest, row.findings)
        patient, visit = row.chest.key[1], row.chest.visit
        encoding = ENCODINGS[patient - 1] if visit == 0 and patient <= len(ENCODINGS) else "gray8"
        data: bytes | None = _encode_png(image, encoding)
        if data and patient > patients:
            data = _damage(data, image, BREAKAGES[patient - patients - 1])
        if data is not None:
            (result.images / row.name).write_bytes(data)
    atomic.write_text(result.table, "\n".join([TABLE_HEADER, *(row.line() for row in rows)]) + "\n")
    for path, test in ((result.train_val_list, False), (result.test_list, True)):
        atomic.write_text(path, "".join(f"{row.name}\n" for row in rows if row.test is test))
    atomic.write_text(out / _DONE, json.dumps({"settings": settings, "counts": result.counts}, indent=1) + "\n")
    (out / _PARTIAL).unlink()
    return result


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
        chest, spacing = self.chest, f"{_SIDE_MM / self.chest.size:.4g}"
        labels = "|".join(self.findings) or "No Finding"
        person = (chest.visit, chest.key[1], chest.age, chest.sex, chest.view)
        return ",".join(map(str, (self.name, labels, *person, chest.size, chest.size, spacing, spacing)))


def _plan_rows(patients: int, seed: int, size: int) -> Iterator[_Row]:
    order = make_generator(seed).permutation(len(_SLOTS))
    for patient in range(1, patients + 1):
        first = _SLOTS[order[(patient - 1) % len(_SLOTS)]]
        for visit, findings in enumerate(_plan_visits(seed, patient, first)):
            yield _Row(sample_anatomy(seed, patient, visit, size=size), findings, test=patient % _TEST_EVERY == 0)


def _plan_visits(seed: int, patient: int, first: str | None) -> list[tuple[str, ...]]:
    """Return the findings of a patient on each visit: most stay, some go, some are new."""
    rng = make_generator(seed, patient, 0, 99)
    visits = int(rng.choice(5, p=(0.30, 0.25, 0.20, 0.15, 0.10))) + 1
    current: list[str] = []
    if first is not None:
        current = [first]
        for probability in (0.60, 0.35):
            if rng.random() < probability:
                _add_finding(current, rng)
    course = [tuple(sorted(current))]
    for _ in range(visits - 1):
        current = [finding for finding in current if rng.random() < 0.8]
        if rng.random() < (0.30 if current else 0.15):
            _add_finding(current, rng)
        course.append(tuple(sorted(current)))
    return course


def _add_finding(current: list[str], rng: np.random.Generator) -> None:
    """Add a companion of the current findings; at most three, and none that excludes another."""
    pool = _COMPANIONS[current[0]] if current else FINDINGS
    finding = pool[int(rng.integers(len(pool)))]
    excluded = any({finding, other} in _EXCLUSIVE for other in current)
    if len(current) < 3 and finding not in current and not excluded:
        current.append(finding)


def _is_complete(out: Path, settings: Mapping[str, Any], result: PhantomSet, names: Sequence[str]) -> bool:
    """Return whether the set is complete; refuse an `out` with foreign files, or with a set of other settings."""
    try:
        entries = {entry.name for entry in out.iterdir() if not entry.name.endswith(".part")}
    except FileNotFoundError:
        return False
    except NotADirectoryError:
        raise OutputError(f"{out}: is a file; choose a folder for the phantoms") from None
    if not entries:
        return False
    mark = next((name for name in (_DONE, _PARTIAL) if name in entries), None)
    if mark is None:
        raise OutputError(f"{out}: holds files that are not phantoms; choose a new or an empty folder")
    content = read_json(out / mark)
    if (content.get("settings") if mark == _DONE else content) != settings:
        raise OutputError(f"{out}: holds phantoms with other settings ({mark}); choose another folder")
    texts = (result.table, result.train_val_list, result.test_list)
    missing = sum(not (result.images / name).exists() for name in names)
    return mark == _DONE and all(path.exists() for path in texts) and missing == int(settings["broken"])


def _encode_png(gray: Array, encoding: str) -> bytes:
    """Return uint8[H, W] as PNG; every encoding decodes to the same gray values."""
    if encoding == "palette":
        # Indices are inverted grays, so that a reader that takes indices for grays shows a negative.
        image = Image.fromarray(255 - gray)
        image.putpalette([255 - index for index in range(256) for _ in range(3)])
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()
    if encoding == "rgba":
        gray = cv2.cvtColor(gray, cv2.COLOR_GRAY2BGRA)
    elif encoding == "gray16":
        gray = gray.astype(np.uint16) * 257  # 255 becomes 65535: the same fraction of full scale
    # Noise has no repeats, so Huffman codes alone are both faster and smaller.
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
    return bytes(cv2.imencode(".png", gray, options)[1])


def _damage(data: bytes, image: Array, breakage: str) -> bytes | None:
    """Return the bytes of an unusable file; None for a missing one."""
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
            middle = start + length // 2
            return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]
        case _:
            return _encode_png(np.zeros_like(image), "gray8")
