"""Damaged files of every kind: each gives an image or a code, and none ends the decoder process."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ray_cxr.config import InputSpec
from ray_cxr.data.dicom import read_tags
from ray_cxr.data.imaging import decode
from ray_cxr.data.sandbox import Decoder, Failure
from ray_cxr.errors import ERROR_CODES, ImageError

sys.path.insert(0, str(Path(__file__).parents[1]))
from soak_files import generated, mutated, test_dicom

#: Codes that depend on the contents of a file alone.
CODES = set(ERROR_CODES) - {"missing", "permission", "storage", "decode_timeout", "decoder_crash"}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder([InputSpec(size=64)], tags=True) as decoder:
        decoder.start()
        yield decoder


def test_a_damaged_file_gives_an_image_or_a_code(decoder: Decoder) -> None:
    assert [seed.name for seed in generated() if isinstance(decoder.load(seed.data), Failure)] == []
    found: Counter[str] = Counter()
    child = decoder._child
    for number in range(400):
        name, data = mutated(7, number, with_real=False)
        result = decoder.load(data)
        if isinstance(result, Failure):
            assert result.code in CODES, f"{name}: {result}"
            assert "\n" not in result.message
            assert "Doe" not in result.message
            found[result.code] += 1
        else:
            assert [(image.shape, image.dtype) for image in result.images] == [((64, 64), np.uint8)], name
            found["ok"] += 1
    assert decoder._child is child
    assert {"ok", "corrupt", "truncated", "not_an_image"} <= set(found)


def test_damaged_files_raise_image_errors_and_print_no_header_value(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    image = test_dicom.ramp()
    files = dict(mutated(8, number, with_real=False) for number in range(150))
    # GDCM can print fixed lines, and end the process.
    files = {name: data for name, data in files.items() if "jpeg_ls" not in name and "lossless" not in name}
    files["tags"] = test_dicom.file_of(image, PatientBirthDate="Doe^Jane", PatientAge="Doe^Jane", WindowCenter="1")
    files["frame"] = test_dicom.encapsulated(image, "1.2.840.10008.1.2.4.50", b"Doe^Jane" * 100)
    readers: list[Callable[[bytes], object]] = [decode, read_tags]
    for name, data in files.items():
        for read in readers:
            try:
                read(data)
            except ImageError as error:
                assert error.code in CODES, name  # noqa: PT017
                assert "Doe" not in error.message, name  # noqa: PT017
    assert capfd.readouterr() == ("", "")
    assert {record.name.split(".")[0] for record in caplog.records} <= {"PIL"}  # it logs offsets in PNGs
    assert "Doe" not in caplog.text
