"""DICOM to gray: every expected pixel is a literal, worked out by hand from the formulas of PS3.3, C.11."""

from __future__ import annotations

import base64
import io
import logging
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from ray_cxr.data.dicom import decode_dicom, looks_like_dicom, read_tags
from ray_cxr.data.imaging import decode
from ray_cxr.errors import ImageError

SECRET = "Doe^Jane"


def tile(*values: int, dtype: Any = np.uint16) -> np.ndarray:
    """A 32 x 32 picture whose first row begins with `values`; all the rest has the first of them."""
    image = np.full((32, 32), values[0], dtype=dtype)
    image[0, : len(values)] = values
    return image


def ramp(dtype: Any = np.uint8) -> np.ndarray:
    """A 48 x 40 picture that has every row and column different."""
    return (np.arange(48)[:, None] * 3 + np.arange(40)[None, :] * 2).astype(dtype)


def dataset(array: np.ndarray, bits: int | None = None, syntax: str = ExplicitVRLittleEndian, **fields: Any) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    meta.TransferSyntaxUID = syntax
    ds = Dataset()
    ds.file_meta = meta
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality = "DX"
    ds.PatientName = SECRET
    ds.PatientID = SECRET
    ds.Rows, ds.Columns = array.shape[:2]
    ds.SamplesPerPixel = 1 if array.ndim == 2 else 3
    ds.PhotometricInterpretation = "MONOCHROME2" if array.ndim == 2 else "RGB"
    if array.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * array.dtype.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(array.dtype.kind == "i")
    ds.PixelData = array.astype(array.dtype.newbyteorder(">" if syntax == ExplicitVRBigEndian else "<")).tobytes()
    ds["PixelData"].VR = "OB" if array.dtype.itemsize == 1 else "OW"
    for keyword, value in fields.items():
        setattr(ds, keyword, value)
    return ds


def written(ds: Dataset) -> bytes:
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def file_of(array: np.ndarray, bits: int | None = None, syntax: str = ExplicitVRLittleEndian, **fields: Any) -> bytes:
    return written(dataset(array, bits, syntax, **fields))


def encapsulated(array: np.ndarray, syntax: str, frame: bytes, bits: int | None = None, **fields: Any) -> bytes:
    ds = dataset(array, bits, syntax, **fields)
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return written(ds)


#: Frames of `golden()`, written once by GDCM 3.2.6 (writing them here could end the process, see its PixelFormat).
LS_8 = base64.b64decode(
    "/9j/9wALCAAgACABAREA/9oACAEBAAAAAIAAAP6AAAD+QP9+AAAA/wAAAH9n/gJmFCiggghCEIQhCIiIiIiIiIiIuATEkkkkkkkk"
    "kkkkkkkv/3/g/9k="
)
LS_16 = base64.b64decode(
    "/9j/9wALEAAgACABAREA//gADQH//wASAEMBFABA/9oACAEBAAAAAKf8/cAf/wAT/n9AD/wJMwBAEAQCAQCAQCAgICAgICAgICAg"
    "IECBAgQIECBAgQIA4CmIECBAgQIECBAggggggggggggggggggggggD//f4D/2QA="
)
LOSSLESS_8 = base64.b64decode(
    "/9j/wwALCAAgACABAREA/8QAFgABAQEAAAAAAAAAAAAAAAAAAAcI/9oACAEBAAEAAM/6Av8AgAAAAAAAAAAAAAAAAAAAAAAAAAAC"
    "mgAAAAAAAAAAAAAAAAAAAAJkAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAP/2QA="
)
LOSSLESS_16 = base64.b64decode(
    "/9j/wwALEAAgACABAREA/8QAFwABAQEBAAAAAAAAAAAAAAAAAAcIEP/aAAgBAQABAADtAX/AAAAAAAAAAAAAAAAAAAAAAAAAAAFN"
    "AAAAAAAAAAAAAAAAAAAAATIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAf/Z"
)


def golden(dtype: Any) -> np.ndarray:
    """32 x 32, black, but for the first three pixels and four gray rows."""
    image = np.zeros((32, 32), dtype)
    image[0, :3] = (0, 128, 255)
    image[5:9] = 77
    return image


def first(data: bytes, count: int) -> list[int]:
    return decode_dicom(data)[0, :count].tolist()


def code_of(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode_dicom(data, **limits)
    assert SECRET not in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.code


# ---------------------------------------------------------------- without a window


def test_8_bit_unsigned_is_unchanged() -> None:
    image = ramp()
    gray = decode_dicom(file_of(image))
    assert gray.dtype == np.uint8
    assert gray.flags.c_contiguous
    np.testing.assert_array_equal(gray, image)


def test_monochrome1_is_inverted() -> None:
    assert first(file_of(tile(0, 1, 200, 255, dtype=np.uint8), PhotometricInterpretation="MONOCHROME1"), 4) == [
        255,
        254,
        55,
        0,
    ]


def test_8_bit_signed_spans_its_full_range() -> None:
    assert first(file_of(tile(-128, -1, 0, 127, dtype=np.int8)), 4) == [0, 127, 128, 255]


def test_6_bits_stored_span_their_full_range() -> None:
    # x / 63 * 255
    assert first(file_of(tile(0, 1, 32, 63, dtype=np.uint8), bits=6), 4) == [0, 4, 130, 255]


def test_8_bit_rescale_does_not_stretch_to_the_pictures_own_range() -> None:
    data = file_of(tile(10, 20, 30, dtype=np.uint8), RescaleSlope="2", RescaleIntercept="-7")
    assert first(data, 3) == [10, 20, 30]


def test_negative_slope_inverts() -> None:
    assert first(file_of(tile(10, 20, 30, dtype=np.uint8), RescaleSlope="-1", RescaleIntercept="0"), 3) == [
        245,
        235,
        225,
    ]


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_above_8_bits_minimum_and_maximum_span(bits: int) -> None:
    # 500 is halfway: 127.5 rounds up
    assert first(file_of(tile(100, 500, 900), bits=bits), 3) == [0, 128, 255]


def test_12_bit_monochrome1() -> None:
    assert first(file_of(tile(100, 600, 1100), bits=12, PhotometricInterpretation="MONOCHROME1"), 3) == [
        255,
        127,
        0,
    ]


def test_signed_16_bit_with_rescale() -> None:
    # -1000, 0, 1000 -> -1990, 10, 2010: minimum, middle, maximum
    data = file_of(tile(-1000, 0, 1000, dtype=np.int16), RescaleSlope="2", RescaleIntercept="10")
    assert first(data, 3) == [0, 128, 255]


def test_signed_12_bits_in_16() -> None:
    # the sign is bit 11; the bits above it are not the picture's
    stored = tile(0x0800, 0x0FFF, 0x0000, 0x07FF)
    data = file_of(stored, bits=12, PixelRepresentation=1, WindowCenter="0", WindowWidth="4096")
    # ((x + 0.5) / 4095 + 0.5) * 255 for -2048, -1, 0, 2047
    assert first(data, 4) == [0, 127, 128, 255]


def test_overlay_bits_above_the_stored_ones_are_ignored() -> None:
    stored = tile(100, 600 | 0x8000, 1100 | 0x1000)
    assert first(file_of(stored, bits=12), 3) == [0, 128, 255]


def test_high_bit_above_bits_stored() -> None:
    assert first(file_of(tile(100 << 4, 600 << 4, 1100 << 4), bits=12, HighBit=15), 3) == [0, 128, 255]


# ---------------------------------------------------------------- windows and LUTs

WINDOW_INPUT = (0, 20, 40, 50, 60, 100, 200)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        # ((x - 49.5) / 99 + 0.5) * 255
        (None, [0, 52, 103, 129, 155, 255, 255]),
        ("LINEAR", [0, 52, 103, 129, 155, 255, 255]),
        # ((x - 50) / 100 + 0.5) * 255
        ("LINEAR_EXACT", [0, 51, 102, 128, 153, 255, 255]),
        # 255 / (1 + exp(-4 (x - 50) / 100))
        ("SIGMOID", [30, 59, 102, 128, 153, 225, 254]),
    ],
)
def test_window_functions(function: str | None, expected: list[int]) -> None:
    extra = {} if function is None else {"VOILUTFunction": function}
    data = file_of(tile(*WINDOW_INPUT), bits=12, WindowCenter="50", WindowWidth="100", **extra)
    assert first(data, 7) == expected


def test_window_acts_on_rescaled_values() -> None:
    # x -> 2 x - 100: 50, 60, 70 -> 0, 20, 40
    data = file_of(
        tile(50, 60, 70),
        bits=12,
        RescaleSlope="2",
        RescaleIntercept="-100",
        WindowCenter="50",
        WindowWidth="100",
        VOILUTFunction="LINEAR_EXACT",
    )
    assert first(data, 3) == [0, 51, 102]


def test_window_comes_before_the_inversion() -> None:
    data = file_of(
        tile(*WINDOW_INPUT),
        bits=12,
        WindowCenter="50",
        WindowWidth="100",
        PhotometricInterpretation="MONOCHROME1",
    )
    assert first(data, 7) == [255, 203, 152, 126, 100, 0, 0]


def test_8_bit_window_is_applied() -> None:
    # ((x - 99.5) / 100 + 0.5) * 255
    data = file_of(tile(50, 75, 100, 150, 151, dtype=np.uint8), WindowCenter="100", WindowWidth="101")
    assert first(data, 5) == [1, 65, 129, 255, 255]


def test_first_of_several_windows() -> None:
    data = file_of(
        tile(*WINDOW_INPUT),
        bits=12,
        WindowCenter=["50", "2000"],
        WindowWidth=["100", "10"],
    )
    assert first(data, 7) == [0, 52, 103, 129, 155, 255, 255]


def test_window_of_width_1_is_a_threshold() -> None:
    data = file_of(tile(49, 50, 51, dtype=np.uint8), WindowCenter="50", WindowWidth="1")
    assert first(data, 3) == [0, 255, 255]


@pytest.mark.parametrize("width", ["0", "-5"])
def test_forbidden_window_is_taken_as_none(width: str) -> None:
    assert first(file_of(tile(100, 600, 1100), bits=12, WindowCenter="5", WindowWidth=width), 3) == [
        0,
        128,
        255,
    ]


def lut(descriptor: list[int], data: list[int]) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    item.add_new("LUTData", "US", data)
    return item


def test_voi_lut_of_8_bits() -> None:
    data = file_of(tile(99, 100, 101, 102, 103, 104), bits=12, VOILUTSequence=[lut([4, 100, 8], [0, 10, 200, 255])])
    assert first(data, 6) == [0, 0, 10, 200, 255, 255]


def test_voi_lut_of_12_bits_goes_before_a_window() -> None:
    # 2048 / 4095 * 255 = 127.5
    data = file_of(
        tile(0, 1, 2),
        bits=12,
        VOILUTSequence=[lut([3, 0, 12], [0, 2048, 4095])],
        WindowCenter="1",
        WindowWidth="1",
    )
    assert first(data, 3) == [0, 128, 255]


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian])
def test_voi_lut_as_ow_words(syntax: str) -> None:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [3, 0, 12])
    item.add_new(
        "LUTData",
        "OW",
        np.array([0, 2048, 4095], ">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes(),
    )
    assert first(file_of(tile(0, 1, 2), 12, syntax, VOILUTSequence=[item]), 3) == [0, 128, 255]


def test_modality_lut_feeds_the_window() -> None:
    data = file_of(
        tile(0, 1, 2, 3),
        bits=12,
        ModalityLUTSequence=[lut([4, 0, 12], [100, 60, 40, 0])],
        WindowCenter="50",
        WindowWidth="100",
        VOILUTFunction="LINEAR_EXACT",
    )
    assert first(data, 4) == [255, 153, 102, 0]


def test_voi_lut_for_signed_values() -> None:
    data = file_of(
        tile(-2, -1, 0, 1, dtype=np.int16),
        VOILUTSequence=[lut([3, 0xFFFF, 8], [5, 100, 250])],  # begins at -1
    )
    assert first(data, 4) == [5, 5, 100, 250]


def test_short_lut_is_corrupt() -> None:
    assert code_of(file_of(tile(0, 1), bits=12, VOILUTSequence=[lut([9, 0, 8], [1, 2])])) == "corrupt"


# ---------------------------------------------------------------- padding


def test_padding_is_black_and_outside_of_the_range() -> None:
    data = file_of(tile(4000, 100, 600, 1100), bits=12, PixelPaddingValue=4000)
    assert first(data, 4) == [0, 0, 128, 255]


def test_padding_is_black_in_monochrome1_too() -> None:
    data = file_of(tile(4000, 100, 600, 1100), bits=12, PixelPaddingValue=4000, PhotometricInterpretation="MONOCHROME1")
    assert first(data, 4) == [0, 255, 127, 0]


def test_padding_range() -> None:
    data = file_of(tile(4000, 4050, 4095, 100, 1100), bits=12, PixelPaddingValue=4095, PixelPaddingRangeLimit=4000)
    assert first(data, 5) == [0, 0, 0, 0, 255]


def test_signed_padding() -> None:
    data = file_of(tile(-2000, 100, 600, 1100, dtype=np.int16), PixelPaddingValue=-2000)
    assert first(data, 4) == [0, 0, 128, 255]


# ---------------------------------------------------------------- colour


def test_rgb_is_luma() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[0, :5] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [7, 7, 7]]
    assert first(file_of(image), 5) == [76, 150, 29, 255, 7]


def test_ybr_full_is_luma() -> None:
    image = np.full((32, 32, 3), 128, np.uint8)  # neutral chroma
    image[0, :3, 0] = [0, 77, 255]
    assert first(file_of(image, PhotometricInterpretation="YBR_FULL"), 3) == [0, 77, 255]


# ---------------------------------------------------------------- transfer syntaxes


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_uncompressed(syntax: str, dtype: Any) -> None:
    # a window, because minimum and maximum could look right with the two bytes swapped
    data = file_of(tile(*WINDOW_INPUT, dtype=dtype), syntax=syntax, WindowCenter="50", WindowWidth="100")
    assert first(data, 7) == [0, 52, 103, 129, 155, 255, 255]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_compressed_by_pydicom(syntax: Any, dtype: Any) -> None:
    image = ramp(dtype)
    image[0, :3] = (0, 128, 255)
    ds = dataset(image)
    ds.compress(syntax)
    np.testing.assert_array_equal(decode_dicom(written(ds)), image.astype(np.uint8))


def test_signed_jpeg_2000() -> None:
    ds = dataset(tile(-1000, 0, 1000, dtype=np.int16))
    ds.compress(JPEG2000Lossless)
    assert first(written(ds), 3) == [0, 128, 255]


def test_jpeg_baseline_equals_the_jpeg_file() -> None:
    frame = jpeg_of(ramp())
    np.testing.assert_array_equal(decode_dicom(encapsulated(ramp(), JPEGBaseline8Bit, frame)), decode(frame))


def jpeg_of(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=90)
    data = out.getvalue()
    return data + b"\0" * (len(data) % 2)


@pytest.mark.parametrize(
    ("uid", "frame", "dtype"),
    [
        ("1.2.840.10008.1.2.4.57", LOSSLESS_8, np.uint8),
        ("1.2.840.10008.1.2.4.57", LOSSLESS_16, np.uint16),
        ("1.2.840.10008.1.2.4.70", LOSSLESS_8, np.uint8),
        ("1.2.840.10008.1.2.4.70", LOSSLESS_16, np.uint16),
        ("1.2.840.10008.1.2.4.80", LS_8, np.uint8),
        ("1.2.840.10008.1.2.4.80", LS_16, np.uint16),
    ],
)
def test_lossless_jpeg_and_jpeg_ls(uid: str, frame: bytes, dtype: Any) -> None:
    data = encapsulated(golden(dtype), uid, frame)
    np.testing.assert_array_equal(decode_dicom(data), golden(np.uint8))
    assert code_of(encapsulated(golden(dtype), uid, frame[: len(frame) // 4 * 2])) == "truncated"


@pytest.mark.parametrize("precision", [0, 1, 17, 200])
def test_impossible_precision_never_reaches_gdcm(precision: int) -> None:
    frame = bytearray(LS_16)
    frame[frame.index(b"\xff\xf7") + 4] = precision
    assert code_of(encapsulated(golden(np.uint16), "1.2.840.10008.1.2.4.80", bytes(frame))) == "corrupt"


@pytest.mark.parametrize(
    "uid",
    [
        "1.2.840.10008.1.2.4.56",  # a retired JPEG process
        "1.2.840.10008.1.2.4.94",  # JPIP: the pixels are somewhere else
        "1.2.826.0.1.3680043.99",  # nobody's
    ],
)
def test_unsupported_transfer_syntax(uid: str) -> None:
    data = encapsulated(ramp(), JPEGBaseline8Bit, b"1234").replace(JPEGBaseline8Bit.encode(), uid.encode())
    assert code_of(data) == "unsupported_transfer_syntax"
    with pytest.raises(ImageError, match=uid.replace(".", r"\.")):
        decode_dicom(data)


def test_jpeg_of_12_bits_is_unsupported() -> None:
    frame = bytearray(jpeg_of(ramp()))
    at = frame.index(b"\xff\xc0")
    frame[at + 1 : at + 5] = b"\xc1\x00\x0b\x0c"  # extended sequential, 12 bits
    data = encapsulated(ramp(np.uint16), "1.2.840.10008.1.2.4.51", bytes(frame), bits=12)
    assert code_of(data) == "unsupported_transfer_syntax"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("modality", ["CT", "MR", "US", "MG", "NM", "PT", "SR", "PR", "SEG", "ECG", "RF", "PX"])
def test_other_modalities(modality: str) -> None:
    with pytest.raises(ImageError, match=rf"modality is {modality}$") as caught:
        decode_dicom(file_of(ramp(), Modality=modality))
    assert caught.value.code == "not_a_radiograph"


@pytest.mark.parametrize("modality", ["CR", "DX", "RG", "OT", "SC", "dx", "", None])
def test_radiograph_modalities(modality: str | None) -> None:
    assert decode_dicom(file_of(ramp(), Modality=modality)).shape == (48, 40)


def test_unknown_modality_is_not_quoted() -> None:
    with pytest.raises(ImageError) as caught:
        decode_dicom(file_of(ramp(), Modality="DOE"))
    assert caught.value.code == "not_a_radiograph"
    assert "DOE" not in caught.value.message


def without(ds: Dataset, *keywords: str) -> bytes:
    for keyword in keywords:
        delattr(ds, keyword)
    return written(ds)


def test_no_pixel_data() -> None:
    assert code_of(without(dataset(ramp()), "PixelData")) == "not_a_radiograph"
    assert code_of(without(dataset(ramp()), "PixelData", "Rows", "Columns")) == "not_a_radiograph"


def test_several_frames() -> None:
    twice = np.concatenate([ramp(), ramp()])
    assert code_of(file_of(twice, NumberOfFrames=2, Rows=48)) == "not_a_radiograph"


def test_palette() -> None:
    assert code_of(file_of(ramp(), PhotometricInterpretation="PALETTE COLOR")) == "not_a_radiograph"


def test_size_limits() -> None:
    assert code_of(file_of(ramp()), max_pixels=1919) == "too_large"
    assert decode_dicom(file_of(ramp()), max_pixels=1920).shape == (48, 40)
    assert code_of(file_of(np.arange(31 * 40, dtype=np.uint16).reshape(31, 40))) == "too_small"


def test_size_is_refused_before_decoding() -> None:
    data = file_of(ramp(), Rows=60000, Columns=60000)
    assert code_of(data) == "too_large"


def test_codestream_larger_than_its_header() -> None:
    frame = jpeg_of(np.zeros((64, 64), np.uint8))
    assert code_of(encapsulated(ramp(), JPEGBaseline8Bit, frame)) == "corrupt"
    ds = dataset(np.zeros((64, 64), np.uint8))
    ds.compress(JPEG2000Lossless)
    ds.Rows, ds.Columns = 48, 40
    assert code_of(written(ds)) == "corrupt"


def test_deflate_bomb() -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = squeeze.compress(b"\x08\x00\x60\x00OB\0\0" + struct.pack("<I", 20_000_000) + bytes(20_000_000))
    bomb += squeeze.flush()
    uid = b"1.2.840.10008.1.2.1.99"
    head = bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid
    assert len(bomb) < 30_000
    assert code_of(head + bomb, max_pixels=10_000) == "too_large"
    assert code_of(head + bomb[: len(bomb) // 2]) == "truncated"
    assert code_of(head + b"\xff" * 500) == "corrupt"


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_cut_pixel_data_is_truncated(syntax: str) -> None:
    data = file_of(ramp(np.uint16), syntax=syntax)
    assert code_of(data[:-1000]) == "truncated"
    assert code_of(data[:-2]) == "truncated"


def test_cut_anywhere_is_never_a_picture() -> None:
    data = file_of(ramp())
    for end in range(140, len(data), 13):
        assert code_of(data[:end]) in ("truncated", "not_a_radiograph", "corrupt")


def test_cut_compressed_data_are_truncated() -> None:
    for data in compressed_files().values():
        assert code_of(data[: len(data) * 3 // 4]) == "truncated"


def test_cut_codestream_is_truncated() -> None:
    frame = jpeg_of(ramp())
    assert code_of(encapsulated(ramp(), JPEGBaseline8Bit, frame[: len(frame) // 4 * 2])) == "truncated"
    noise = np.random.default_rng(0).integers(0, 256, (48, 40), dtype=np.uint8)
    ds = dataset(noise)
    ds.compress(JPEG2000Lossless)
    stream = pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1)
    for cut in (40, 200, len(stream) // 4 * 2):
        assert code_of(encapsulated(noise, JPEG2000Lossless, stream[:cut])) == "truncated"


def test_garbage_codestream_is_corrupt() -> None:
    for syntax in (JPEGBaseline8Bit, JPEG2000Lossless, RLELossless, "1.2.840.10008.1.2.4.80"):
        assert code_of(encapsulated(ramp(), syntax, b"\x13\x37" * 200)) == "corrupt"


@pytest.mark.parametrize(
    "fields",
    [
        {"BitsAllocated": 12},
        {"BitsStored": 20},
        {"SamplesPerPixel": 2},
        {"PhotometricInterpretation": "NONSENSE"},
        {"PhotometricInterpretation": ""},
        {"HighBit": 3},
        {"Rows": 0},
    ],
)
def test_contradictions_are_corrupt(fields: dict[str, Any]) -> None:
    assert code_of(file_of(ramp(), **fields)) == "corrupt"


def test_32_bits_are_not_a_radiograph() -> None:
    assert code_of(file_of(ramp(np.uint32))) == "not_a_radiograph"


# ---------------------------------------------------------------- without a preamble


def test_bare_data_set() -> None:
    for syntax, implicit in ((ImplicitVRLittleEndian, True), (ExplicitVRLittleEndian, False)):
        ds = dataset(ramp(), syntax=syntax)
        del ds.file_meta
        out = io.BytesIO()
        ds.save_as(out, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        assert out.getvalue()[128:132] != b"DICM"
        np.testing.assert_array_equal(decode_dicom(out.getvalue()), ramp())


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_missing_preamble_alone(syntax: str) -> None:
    np.testing.assert_array_equal(decode(file_of(ramp(), syntax=syntax)[132:]), ramp())


@pytest.mark.parametrize(
    "data",
    [
        b"Name,Age\n" * 100,
        b"\x08\x00" + b"text that goes on and on" * 50,
        b"\x08\x00\x05\x00CS\x02\x00AB" * 50,
    ],
)
def test_text_is_not_an_image(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.code == "not_an_image"
    assert code_of(data) == "not_an_image"


def test_looks_like_dicom() -> None:
    assert looks_like_dicom(file_of(ramp()))
    assert not looks_like_dicom(b"")
    assert not looks_like_dicom(b"GIF89a" + bytes(500))


# ---------------------------------------------------------------- tags


def test_read_tags() -> None:
    data = file_of(
        ramp(),
        PatientID="17",
        StudyInstanceUID="1.2.3",
        PatientAge="058Y",
        PatientSex="F",
        ViewPosition="pa",
    )
    assert read_tags(data) == {"patient_id": "17", "study_id": "1.2.3", "age": 58.0, "sex": "F", "view": "PA"}


def test_read_tags_of_an_empty_header() -> None:
    data = without(dataset(ramp()), "PatientID", "PixelData")
    assert read_tags(data) == {"patient_id": None, "study_id": None, "age": None, "sex": None, "view": None}


@pytest.mark.parametrize(
    ("text", "years"),
    [("058Y", 58.0), ("006M", 0.5), ("62", 62.0), ("", None), ("Y58", None), ("abc", None), ("000D", 0.0)],
)
def test_ages(text: str, years: float | None) -> None:
    assert read_tags(file_of(ramp(), PatientAge=text))["age"] == years


def test_ages_in_days_and_weeks() -> None:
    assert read_tags(file_of(ramp(), PatientAge="010D"))["age"] == pytest.approx(0.0273785, abs=1e-6)
    assert read_tags(file_of(ramp(), PatientAge="026W"))["age"] == pytest.approx(0.4982888, abs=1e-6)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("AP", "AP"),
        ("LL", "LATERAL"),
        ("RL", "LATERAL"),
        ("lat", "LATERAL"),
        ("LATERAL", "LATERAL"),
        ("RAO", "RAO"),
    ],
)
def test_views(view: str, expected: str | None) -> None:
    assert read_tags(file_of(ramp(), ViewPosition=view))["view"] == expected


def test_view_from_patient_position() -> None:
    assert read_tags(file_of(ramp(), PatientPosition="AP"))["view"] == "AP"
    assert read_tags(file_of(ramp(), PatientPosition="HFS"))["view"] is None
    assert read_tags(file_of(ramp(), PatientPosition="AP", ViewPosition="PA"))["view"] == "PA"


@pytest.mark.parametrize(("sex", "expected"), [("M", "M"), ("f", "F"), ("O", None), ("", None)])
def test_sexes(sex: str, expected: str | None) -> None:
    assert read_tags(file_of(ramp(), PatientSex=sex))["sex"] == expected


def test_read_tags_of_a_picture_is_an_image_error() -> None:
    with pytest.raises(ImageError) as caught:
        read_tags(jpeg_of(ramp()))
    assert caught.value.code == "not_an_image"


# ---------------------------------------------------------------- nothing gets out


def test_nothing_is_logged_or_printed(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    bad = [
        file_of(ramp(), PatientBirthDate="Doe^Jane was born", PatientAge="Doe^Jane", WindowCenter="1"),
        encapsulated(ramp(), JPEGBaseline8Bit, b"Doe^Jane" * 100),
        *(data[:-200] for data in compressed_files().values()),
    ]
    for data in bad:
        for read in (decode_dicom, read_tags):
            assert SECRET not in outcome(read, data)
    out, err = capfd.readouterr()
    assert (out, err, caplog.text) == ("", "", "")


def outcome(read: Callable[[bytes], Any], data: bytes) -> str:
    """The message of the `ImageError` that `read` raises, or nothing; any other exception gets through."""
    try:
        read(data)
    except ImageError as error:
        return str(error)
    return ""


def compressed_files() -> dict[str, bytes]:
    files = {"JPEG": encapsulated(ramp(), JPEGBaseline8Bit, jpeg_of(ramp()))}
    for syntax in (RLELossless, JPEG2000Lossless):
        ds = dataset(ramp(np.uint16))
        ds.compress(syntax)
        files[syntax.name] = written(ds)
    files["JPEG lossless"] = encapsulated(golden(np.uint16), "1.2.840.10008.1.2.4.70", LOSSLESS_16)
    files["JPEG-LS"] = encapsulated(golden(np.uint8), "1.2.840.10008.1.2.4.80", LS_8)
    return files


SAMPLES = [
    file_of(ramp()),
    file_of(ramp(np.uint16), bits=12, syntax=ImplicitVRLittleEndian),
    *compressed_files().values(),
]


@settings(max_examples=150, deadline=None)
@given(
    which=st.integers(0, len(SAMPLES) - 1),
    cut=st.one_of(st.none(), st.integers(0, 5000)),
    flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 255)), max_size=4),
)
def test_damaged_files_raise_image_errors_only(which: int, cut: int | None, flips: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLES[which])
    for place, change in flips:
        data[place % len(data)] ^= change
    damaged = bytes(data if cut is None else data[: cut % len(data)])
    for read in (decode, read_tags):
        assert SECRET not in outcome(read, damaged)
