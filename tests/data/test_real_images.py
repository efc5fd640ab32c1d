"""Decoding of real radiographs: NIH ChestX-ray14, and DICOM files made of it and of a CR."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_cxr.config import InputSpec
from ray_cxr.data.dicom import read_tags
from ray_cxr.data.imaging import load

SHARED = Path(__file__).parents[2].parent / "shared"
NIH = SHARED / "nih" / "images1024"
DICOM = SHARED / "dicom"

pytestmark = pytest.mark.skipif(
    not (NIH.is_dir() and DICOM.is_dir()), reason=f"real images are not at hand: no {SHARED}/nih and {SHARED}/dicom"
)


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "pixels", "sha256"),
    [
        (
            "00000001_000",
            [202, 198, 204],
            "ab30bbf7c6b0698e45759e221036bd9fead16c4d75bd73032fa1e9955e656acd",
        ),
        (
            "00000002_000",
            [199, 229, 224],
            "8a771769a267418e92560b937fcb66b067c71a3e2e857ff4713993a72cfe21e1",
        ),
    ],
)
def test_dicom_equals_its_png(name: str, pixels: list[int], sha256: str) -> None:
    png, dcm = load(str(NIH / f"{name}.png")), load(str(DICOM / f"nih_{name}.dcm"))
    np.testing.assert_array_equal(dcm, png)
    for image in (png, dcm):
        assert image.shape == (1024, 1024)
        assert [int(image[0, 0]), int(image[512, 512]), int(image[1023, 100])] == pixels
        assert digest(image) == sha256


def test_monochrome1_and_2_are_inverses() -> None:
    one, two = (load(str(DICOM / f"cr_chest_monochrome{kind}_jpeg.dcm")) for kind in (1, 2))
    np.testing.assert_array_equal(one, 255 - two)
    assert [int(two[0, 0]), int(two[512, 512]), int(two[1000, 300])] == [0, 208, 229]
    assert digest(two) == "938432fbb18d79f48568dc5b1fb06ffd2ace4a4ded4bfc490c35981e58f053fb"


@pytest.mark.parametrize(
    ("name", "sha256"),
    [
        ("00000100_000.png", "8735d699c9f94250431817b52924edde4e75352298cd3384987d107e62f9de7e"),
        ("00001369_000.png", "e21a3588fd524a8a1fd0a093915ea7415eaf6847102b430a97b4888905897d4b"),
        ("00004934_000.png", "bfae54ad33769144e52cb289b4c4cb0c92c6ec6a2ec965f6a077805f109f6fa3"),
    ],
)
def test_rgba_gives_its_channel(name: str, sha256: str) -> None:
    with (SHARED / "nih" / "images.csv").open(newline="") as file:
        modes = {row["Image Index"]: row["mode"] for row in csv.DictReader(file)}
    assert modes[name] == "RGBA"
    image = load(str(NIH / name))
    with Image.open(NIH / name) as picture:
        stored = np.asarray(picture)
    assert stored.shape == (1024, 1024, 4)
    np.testing.assert_array_equal(image, stored[:, :, 0])
    assert digest(image) == sha256


def test_model_input_is_the_same_from_png_and_dicom() -> None:
    spec = InputSpec(size=224)
    png, dcm = load(str(NIH / "00000001_000.png"), spec), load(str(DICOM / "nih_00000001_000.dcm"), spec)
    assert png.shape == (224, 224)
    np.testing.assert_array_equal(png, dcm)


@pytest.mark.parametrize(
    ("name", "patient", "age", "view"),
    [
        ("nih_00000001_000.dcm", "1", 58.0, "AP"),
        ("nih_00000002_000.dcm", "2", 81.0, "PA"),
        ("cr_chest_monochrome1_jpeg.dcm", "16d7f894-55d7-4d95-8957-d18987f0e981", 62.0, "PA"),
    ],
)
def test_tags(name: str, patient: str, age: float, view: str) -> None:
    tags = read_tags((DICOM / name).read_bytes())
    assert (tags["patient_id"], tags["age"], tags["sex"], tags["view"]) == (patient, age, "M", view)
