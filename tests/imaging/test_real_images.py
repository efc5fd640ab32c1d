"""Decoding of real radiographs: NIH ChestX-ray14, and DICOM files made of it and of a CR."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from ray_cxr.imaging.decode import load_image
from ray_cxr.imaging.dicom import read_tags


def assert_pixels(image: np.ndarray, pixels: list[int], sha256: str) -> None:
    """Compare three pixels (corner, centre, near the lower edge) and the digest of all of them."""
    assert [int(image[0, 0]), int(image[512, 512]), int(image[1000, 300])] == pixels
    assert hashlib.sha256(image.tobytes()).hexdigest() == sha256


def test_dicom_equals_its_png(shared: Path) -> None:
    for name, pixels, sha256 in (
        ("00000001_000", [202, 198, 228], "ab30bbf7c6b0698e45759e221036bd9fead16c4d75bd73032fa1e9955e656acd"),
        ("00000002_000", [199, 229, 240], "8a771769a267418e92560b937fcb66b067c71a3e2e857ff4713993a72cfe21e1"),
    ):
        for path in (shared / "nih" / "images1024" / f"{name}.png", shared / "dicom" / f"nih_{name}.dcm"):
            image = load_image(str(path))
            assert image.shape == (1024, 1024)
            assert_pixels(image, pixels, sha256)


def test_monochrome1_and_2_are_inverses(shared: Path) -> None:
    one, two = (load_image(str(shared / "dicom" / f"cr_chest_monochrome{kind}_jpeg.dcm")) for kind in (1, 2))
    np.testing.assert_array_equal(one, 255 - two)
    assert_pixels(two, [0, 208, 229], "938432fbb18d79f48568dc5b1fb06ffd2ace4a4ded4bfc490c35981e58f053fb")


def test_rgba_gives_its_channel(shared: Path) -> None:
    path = shared / "nih" / "images1024" / "00000100_000.png"
    image = load_image(str(path))
    with Image.open(path) as stored:
        assert stored.mode == "RGBA"
        np.testing.assert_array_equal(image, np.asarray(stored)[:, :, 0])


def test_tags(shared: Path) -> None:
    for name, patient, age, view in (
        ("nih_00000001_000", "1", 58.0, "AP"),
        ("cr_chest_monochrome1_jpeg", "16d7f894-55d7-4d95-8957-d18987f0e981", 62.0, "PA"),
    ):
        tags = read_tags((shared / "dicom" / f"{name}.dcm").read_bytes())
        assert (tags["patient_id"], tags["age"], tags["sex"], tags["view"]) == (patient, age, "M", view)
