"""Damaged files of every kind: each gives an image or a code, and none ends the decoder process."""

from __future__ import annotations

import io
import itertools
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from ray_cxr.config import InputSpec
from ray_cxr.errors import ERROR_CODES, ImageError
from ray_cxr.imaging.decode import decode
from ray_cxr.imaging.dicom import read_tags
from ray_cxr.imaging.sandbox import Decoder, Failure

sys.path.insert(0, str(Path(__file__).parents[1]))
from soak_files import SYNTAXES, UIDS, generated, mutated, saved, test_dicom

#: Codes that depend on the contents of a file alone.
CODES = set(ERROR_CODES) - {"missing", "permission", "storage", "decode_timeout", "decoder_crash"}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder([InputSpec(size=64)], tags=True) as decoder:
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


def frames() -> dict[str, bytes]:
    """Compressed frames of every kind, gray and colour, 32 x 32 pixels."""
    gray = (np.arange(32)[:, None] * 3 + np.arange(32)[None, :] * 5).astype(np.uint16)
    found = {"ls_8": test_dicom.LS_8, "ls_16": test_dicom.LS_16}
    for precision in (2, 7, 8, 9, 12, 16):
        image = (gray << max(0, precision - 8)) & ((1 << precision) - 1)
        found[f"lossless_{precision}"] = test_dicom.jpeg_lossless(image, precision)
        found[f"lossless_{precision}_colour"] = test_dicom.jpeg_lossless(np.stack([image] * 3, axis=-1), precision)
    whole = Image.fromarray(gray.astype(np.uint8))
    for name, image in (("", whole), ("_colour", whole.convert("RGB"))):
        found[f"jpeg{name}"] = test_dicom.jpeg_of(np.asarray(image))
        twelve = bytearray(found[f"jpeg{name}"])
        at = twelve.index(b"\xff\xc0")
        twelve[at + 1], twelve[at + 4] = 0xC1, 12  # extended sequential, 12 bits
        found[f"jpeg_12{name}"] = bytes(twelve)
        found[f"j2k{name}"] = saved(image, "JPEG2000", no_jp2=True, irreversible=False)
    for dtype in (np.uint8, np.uint16):
        file = pydicom.dcmread(io.BytesIO(test_dicom.compressed(gray.astype(dtype), f"{UIDS}.5")))
        found[f"rle_{dtype.__name__}"] = pydicom.encaps.get_frame(file.PixelData, 0, number_of_frames=1)
    return found


def dicom_of(frame: bytes, syntax: str, bits: tuple[int, int], sign: int, colour: str) -> bytes:
    """A file whose header need not fit its frame."""
    image = np.zeros((32, 32, 3) if colour else (32, 32), np.uint8)
    fields = {"BitsAllocated": bits[0], "PixelRepresentation": sign}
    if colour:
        fields["PhotometricInterpretation"] = colour
    return test_dicom.encapsulated(image, f"{UIDS}{syntax}", frame, bits[1], **fields)


@pytest.mark.parametrize("count", [250, pytest.param(None, marks=pytest.mark.long)])
def test_no_header_of_a_compressed_image_ends_the_decoder(decoder: Decoder, count: int | None) -> None:
    """GDCM calls abort() over fewer than 8 of 8 bits stored; every combination must give an image or a code."""
    syntaxes = [syntax for syntax in SYNTAXES if syntax == ".5" or syntax.startswith(".4.")]
    bits = [(1, 1), *((8, bits) for bits in (1, 5, 6, 7, 8)), *((16, bits) for bits in (1, 7, 8, 9, 12, 15, 16))]
    colours = ("", "RGB", "YBR_FULL", "YBR_FULL_422")
    cases = list(itertools.product(frames().items(), syntaxes, bits, (0, 1), colours))
    chosen = cases if count is None else random.Random(0).sample(cases, count)
    chosen += [case for case in cases if case[0][0] == "lossless_8" and case[1] == ".4.70" and case[2][0] == 8]
    decoder.load(generated()[0].data)
    child, found = decoder._child, Counter[str]()
    for (name, frame), *header in chosen:
        result = decoder.load(dicom_of(frame, *header))
        code = result.code if isinstance(result, Failure) else "ok"
        assert code == "ok" or code in CODES, f"{name}, {header}: {result}"
        found[code] += 1
    assert decoder._child is child
    assert {"ok", "corrupt"} <= set(found)


def test_damaged_files_raise_image_errors_and_print_no_header_value(caplog, capfd) -> None:
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
