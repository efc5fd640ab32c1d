"""DICOM to gray: every expected pixel is a literal, computed by hand from the formulas of PS3.3, C.11."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from ray_cxr.errors import ImageError
from ray_cxr.imaging.decode import decode
from ray_cxr.imaging.dicom import decode_dicom, looks_like_dicom, read_tags
from ray_cxr.imaging.sandbox import DecodedImage, Decoder, Failure

SECRET = "Doe^Jane"
U8, U16, I8, I16 = np.uint8, np.uint16, np.int8, np.int16


def tile(*values: int, dtype: Any = np.uint16) -> np.ndarray:
    """A 32 x 32 image whose first row starts with `values`; all other pixels have the first of them."""
    image = np.full((32, 32), values[0], dtype=dtype)
    image[0, : len(values)] = values
    return image


def ramp(dtype: Any = np.uint8) -> np.ndarray:
    """A 48 x 40 image that has every row and column different."""
    return (np.arange(48)[:, None] * 3 + np.arange(40)[None, :] * 2).astype(dtype)


def golden(dtype: Any) -> np.ndarray:
    """A 32 x 32 black image with three other pixels at its start and four gray rows."""
    image = np.zeros((32, 32), dtype)
    image[0, :3] = (0, 128, 255)
    image[5:9] = 77
    return image


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


def dataset(array: np.ndarray, bits: int | None = None, syntax=uid.ExplicitVRLittleEndian, **fields: Any) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    meta.TransferSyntaxUID = syntax
    ds = Dataset()
    ds.file_meta = meta
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality = "DX"
    ds.PatientName = ds.PatientID = SECRET
    ds.Rows, ds.Columns = array.shape[:2]
    ds.SamplesPerPixel = 1 if array.ndim == 2 else 3
    ds.PhotometricInterpretation = "MONOCHROME2" if array.ndim == 2 else "RGB"
    if array.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = 8 * array.dtype.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(array.dtype.kind == "i")
    ds.PixelData = array.astype(array.dtype.newbyteorder(">" if syntax == uid.ExplicitVRBigEndian else "<")).tobytes()
    ds["PixelData"].VR = "OB" if array.dtype.itemsize == 1 else "OW"
    for keyword, value in fields.items():
        setattr(ds, keyword, value)
    return ds


def written(ds: Dataset) -> bytes:
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def file_of(array: np.ndarray, bits: int | None = None, syntax=uid.ExplicitVRLittleEndian, **fields: Any) -> bytes:
    return written(dataset(array, bits, syntax, **fields))


def without(ds: Dataset, *keywords: str) -> bytes:
    for keyword in keywords:
        delattr(ds, keyword)
    return written(ds)


def compressed(array: np.ndarray, syntax: str) -> bytes:
    ds = dataset(array)
    ds.compress(syntax)
    return written(ds)


def encapsulated(array: np.ndarray, syntax: str, frame: bytes, bits: int | None = None, **fields: Any) -> bytes:
    ds = dataset(array, bits, syntax, **fields)
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return written(ds)


def jpeg_of(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=90)
    data = out.getvalue()
    return data + b"\0" * (len(data) % 2)


ABSENT = object()


def jpeg_lossless(image: np.ndarray, precision: int) -> bytes:
    """A JPEG of process 14 (ITU-T T.81, H): differences to the left neighbour, all lengths coded with 5 bits."""
    samples = np.atleast_3d(image).astype(int)
    height, width, components = samples.shape
    predicted = np.concatenate([np.roll(samples[:, :1], 1, axis=0), samples[:, :-1]], axis=1)
    predicted[0, 0] = 1 << (precision - 1)
    bits = ""
    for difference in (samples - predicted).ravel().tolist():
        length = abs(difference).bit_length()
        bits += f"{length:05b}"
        if length:
            bits += f"{difference if difference > 0 else difference + (1 << length) - 1:0{length}b}"
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    frame = struct.pack(">BHHB", precision, height, width, components)
    frame += b"".join(bytes([number + 1, 0x11, 0]) for number in range(components))
    table = bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])
    start = bytes([components, *(byte for number in range(components) for byte in (number + 1, 0)), 1, 0, 0])
    segments = [(0xC3, frame), (0xC4, table), (0xDA, start)]
    data = b"\xff\xd8" + b"".join(b"\xff%c" % kind + struct.pack(">H", len(body) + 2) + body for kind, body in segments)
    data += scan + b"\xff\xd9"
    return data + b"\0" * (len(data) % 2)


def lut(descriptor: Any, data: Any) -> Dataset:
    item = Dataset()
    if descriptor is not ABSENT:
        item.add_new("LUTDescriptor", "US", descriptor)
    if data is not ABSENT:
        item.add_new("LUTData", "US" if isinstance(data, list) else "OW", data)
    return item


def voi(descriptor: list[int], data: Any) -> dict[str, list[Dataset]]:
    return {"VOILUTSequence": [lut(descriptor, data)]}


def window(centre: float, width: int) -> dict[str, str]:
    return {"WindowCenter": str(centre), "WindowWidth": str(width)}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    """A child process that returns images in their own size."""
    with Decoder([None]) as decoder:
        yield decoder


def code_of(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode_dicom(data, **limits)
    assert SECRET not in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.code


INVERTED = {"PhotometricInterpretation": "MONOCHROME1"}
WINDOW = window(50, 100)
RESCALE = {"RescaleSlope": "2", "RescaleIntercept": "-100"}
EXACT = {**WINDOW, "VOILUTFunction": "LINEAR_EXACT"}
INPUT = (0, 20, 40, 50, 60, 100, 200)
LINEAR = [0, 52, 103, 129, 155, 255, 255]  # ((x - 49.5) / 99 + 0.5) * 255
PADDING = {"PixelPaddingValue": 4000}

CENTRED = {**window(0, 4096), "PixelRepresentation": 1}
PADDING_RANGE = {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4000}
VOI_8 = voi([4, 100, 8], [0, 10, 200, 255])
VOI_12 = {**window(1, 1), **voi([3, 0, 12], [0, 2048, 4095])}
VOI_SIGNED = voi([3, 0xFFFF, 8], [5, 100, 250])  # it starts at -1
MODALITY = {**EXACT, "ModalityLUTSequence": [lut([4, 0, 12], [100, 60, 40, 0])]}

#: Type and bits of the stored values, header fields, first stored values, and their gray values.
PIXELS: dict[str, tuple[Any, int, dict[str, Any], tuple[int, ...], list[int]]] = {
    # Up to 8 bits: the full range of the stored values.
    "MONOCHROME1": (U8, 8, INVERTED, (0, 1, 200, 255), [255, 254, 55, 0]),
    "8 bits, signed": (I8, 8, {}, (-128, -1, 0, 127), [0, 127, 128, 255]),
    "6 bits": (U8, 6, {}, (0, 1, 32, 63), [0, 4, 130, 255]),  # x / 63 * 255
    "8 bits, rescaled": (U8, 8, {"RescaleSlope": "2", "RescaleIntercept": "-7"}, (10, 20, 30), [10, 20, 30]),
    "negative slope": (U8, 8, {"RescaleSlope": "-1", "RescaleIntercept": "0"}, (10, 20, 30), [245, 235, 225]),
    # Above 8 bits: minimum and maximum of the image; halfway is 127.5, which rounds up.
    **{f"{bits} bits": (U16, bits, {}, (100, 500, 900), [0, 128, 255]) for bits in (10, 12, 14, 16)},
    "12 bits, MONOCHROME1": (U16, 12, INVERTED, (100, 600, 1100), [255, 127, 0]),
    # -1000, 0, 1000 -> -1990, 10, 2010
    "rescaled": (I16, 16, {"RescaleSlope": "2", "RescaleIntercept": "10"}, (-1000, 0, 1000), [0, 128, 255]),
    # The sign is bit 11. ((x + 0.5) / 4095 + 0.5) * 255 for -2048, -1, 0, 2047
    "12 bits, signed": (U16, 12, CENTRED, (0x0800, 0x0FFF, 0x0000, 0x07FF), [0, 127, 128, 255]),
    "overlay bits": (U16, 12, {}, (100, 600 | 0x8000, 1100 | 0x1000), [0, 128, 255]),
    "high bit 15": (U16, 12, {"HighBit": 15}, (100 << 4, 600 << 4, 1100 << 4), [0, 128, 255]),
    # Windows
    "LINEAR by default": (U16, 12, WINDOW, INPUT, LINEAR),
    "LINEAR": (U16, 12, {**WINDOW, "VOILUTFunction": "LINEAR"}, INPUT, LINEAR),
    "LINEAR_EXACT": (U16, 12, EXACT, INPUT, [0, 51, 102, 128, 153, 255, 255]),  # ((x - 50) / 100 + 0.5) * 255
    # 255 / (1 + exp(-4 (x - 50) / 100))
    "SIGMOID": (U16, 12, {**WINDOW, "VOILUTFunction": "SIGMOID"}, INPUT, [30, 59, 102, 128, 153, 225, 254]),
    # x -> 2 x - 100: 50, 60, 70 -> 0, 20, 40
    "window after rescale": (U16, 12, {**EXACT, **RESCALE}, (50, 60, 70), [0, 51, 102]),
    "window before inversion": (U16, 12, {**WINDOW, **INVERTED}, INPUT, [255, 203, 152, 126, 100, 0, 0]),
    # ((x - 99.5) / 100 + 0.5) * 255
    "8 bits, window": (U8, 8, window(100, 101), (50, 75, 100, 150, 151), [1, 65, 129, 255, 255]),
    "first window": (U16, 12, {"WindowCenter": ["50", "2000"], "WindowWidth": ["100", "10"]}, INPUT, LINEAR),
    "width 1": (U8, 8, window(50, 1), (49, 50, 51), [0, 255, 255]),
    "width 1, value on the edge": (U8, 8, window(50.5, 1), (50, 51), [0, 255]),  # white above c - 0.5
    "width 0": (U16, 12, window(5, 0), (100, 600, 1100), [0, 128, 255]),
    # Lookup tables
    "VOI LUT of 8 bits": (U16, 12, VOI_8, (99, 100, 101, 102, 103, 104), [0, 0, 10, 200, 255, 255]),
    "VOI LUT before window": (U16, 12, VOI_12, (0, 1, 2), [0, 128, 255]),  # 2048 / 4095 * 255 = 127.5
    "VOI LUT of signed values": (I16, 16, VOI_SIGNED, (-2, -1, 0, 1), [5, 5, 100, 250]),
    "VOI LUT of bytes": (U16, 12, voi([4, 0, 8], b"\x05\x64\xfa\xff"), (0, 1, 2), [5, 100, 250]),
    # 16 bits declared and fewer in use: white is that of the bits in use, 8 at least. 15 in use: a dark table.
    "VOI LUT uses 12 of 16 bits": (U16, 12, voi([4, 0, 16], [0, 1024, 2048, 4095]), (0, 1, 2, 3), [0, 64, 128, 255]),
    "VOI LUT uses 14 of 16 bits": (U16, 12, voi([4, 0, 16], [0, 4096, 8192, 16383]), (0, 1, 2, 3), [0, 64, 128, 255]),
    "VOI LUT uses 15 of 16 bits": (U16, 12, voi([4, 0, 16], [0, 8192, 16384, 32767]), (0, 1, 2, 3), [0, 32, 64, 127]),
    "VOI LUT uses 3 of 16 bits": (U16, 12, voi([4, 0, 16], [0, 1, 5, 7]), (0, 1, 2, 3), [0, 1, 5, 7]),
    "VOI LUT uses 10 of 12 bits": (U16, 12, voi([3, 0, 12], [0, 512, 1023]), (0, 1, 2), [0, 128, 255]),
    # Fewer declared than the entries need: also the bits in use. One step above white is rounding.
    "VOI LUT of 12 bits declared as 8": (U16, 12, voi([3, 0, 8], [0, 2048, 4095]), (0, 1, 2), [0, 128, 255]),
    "VOI LUT rounded above white": (U16, 12, voi([3, 0, 12], [0, 2048, 4096]), (0, 1, 2), [0, 128, 255]),
    "modality LUT before window": (U16, 12, MODALITY, (0, 1, 2, 3), [255, 153, 102, 0]),
    # Padding is black and does not count for minimum and maximum.
    "padding": (U16, 12, PADDING, (4000, 100, 600, 1100), [0, 0, 128, 255]),
    "padding, MONOCHROME1": (U16, 12, {**PADDING, **INVERTED}, (4000, 100, 600, 1100), [0, 255, 127, 0]),
    "padding range": (U16, 12, PADDING_RANGE, (4000, 4050, 4095, 100, 1100), [0, 0, 0, 0, 255]),
    "padding, signed": (I16, 16, {"PixelPaddingValue": -2000}, (-2000, 100, 600, 1100), [0, 0, 128, 255]),
}


@pytest.mark.parametrize(("dtype", "bits", "fields", "stored", "gray"), PIXELS.values(), ids=PIXELS)
def test_gray_values(dtype: Any, bits: int, fields: dict[str, Any], stored: tuple[int, ...], gray: list[int]) -> None:
    image = decode_dicom(file_of(tile(*stored, dtype=dtype), bits, **fields))
    assert image[0, : len(gray)].tolist() == gray
    assert (image.dtype, image.flags.c_contiguous) == (np.uint8, True)


#: Items without a table: nothing at all, or an empty or absent descriptor or data.
EMPTY_LUTS: dict[str, Dataset] = {
    "item": Dataset(),
    "descriptor and data": lut(None, None),
    "no descriptor": lut(ABSENT, [0, 255]),
    "empty descriptor": lut([], [0, 255]),
    "no data": lut([2, 0, 8], ABSENT),
    "no value of data": lut([2, 0, 8], None),
    "empty data": lut([2, 0, 8], b""),
}
SYNTAXES = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)


@pytest.mark.parametrize("name", EMPTY_LUTS)
@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
def test_empty_lut_is_none(name: str, sequence: str) -> None:
    image = tile(*INPUT)
    for syntax in SYNTAXES:
        empty = {sequence: [EMPTY_LUTS[name]]}
        assert decode_dicom(file_of(image, 12, syntax, **empty, **WINDOW))[0, :7].tolist() == LINEAR
        # Without a window: the range of the image, which is 0 to 200.
        assert decode_dicom(file_of(image, 12, syntax, **empty))[0, :7].tolist() == [0, 26, 51, 64, 77, 128, 255]


def test_empty_luts_are_skipped() -> None:
    for items in ([], [lut(None, None)], [Dataset(), lut([2, 0, 8], b"")]):
        data = file_of(tile(50, 60, 70), 12, **EXACT, **RESCALE, ModalityLUTSequence=items, VOILUTSequence=items)
        assert decode_dicom(data)[0, :3].tolist() == [0, 51, 102]
    # The first item with a table is used.
    table = lut([4, 100, 8], [0, 10, 200, 255])
    for empty in EMPTY_LUTS.values():
        data = file_of(tile(99, 101, 102, 103), 12, VOILUTSequence=[empty, table], **WINDOW)
        assert decode_dicom(data)[0, :4].tolist() == [0, 10, 200, 255]
        data = file_of(tile(0, 1, 2, 3), 12, **EXACT, ModalityLUTSequence=[empty, lut([4, 0, 12], [100, 60, 40, 0])])
        assert decode_dicom(data)[0, :4].tolist() == [255, 153, 102, 0]


@pytest.mark.parametrize("descriptor", [[2], [2, 0], [2, 0, 7], [2, 0, 0], [2, 0, 17]])
def test_incomplete_lut_descriptor_is_named(descriptor: list[int]) -> None:
    for sequence in ("VOILUTSequence", "ModalityLUTSequence"):
        for syntax in SYNTAXES:
            with pytest.raises(ImageError, match="LUTDescriptor") as caught:
                decode_dicom(file_of(ramp(np.uint16), 12, syntax, **{sequence: [lut(descriptor, b"\0\0\xff\0")]}))
            assert caught.value.code == "corrupt"
            assert "Error" not in caught.value.message


#: Header fields with empty values, and the gray values of `INPUT` in 12 bits.
SCALED = [0, 26, 51, 64, 77, 128, 255]
EMPTY_NUMBERS: dict[str, tuple[dict[str, Any], list[int]]] = {
    # The first window that has both of its values.
    "empty first centre": ({"WindowCenter": ["", "50"], "WindowWidth": ["9", "100"]}, LINEAR),
    "empty first width": ({"WindowCenter": ["9", "50"], "WindowWidth": ["", "100"]}, LINEAR),
    "empty first window": ({"WindowCenter": ["", "50"], "WindowWidth": ["", "100"]}, LINEAR),
    "empty second window": ({"WindowCenter": ["50", ""], "WindowWidth": ["100", ""]}, LINEAR),
    "no whole window": ({"WindowCenter": ["", "50"], "WindowWidth": ["100", ""]}, SCALED),
    "empty window": ({"WindowCenter": "", "WindowWidth": None}, SCALED),
    "blank window": ({"WindowCenter": " ", "WindowWidth": " "}, SCALED),
    "empty width": ({"WindowCenter": "50", "WindowWidth": ""}, SCALED),
    "empty rescale": ({**WINDOW, "RescaleSlope": "", "RescaleIntercept": None}, LINEAR),
    "blank rescale": ({**WINDOW, "RescaleSlope": "  ", "RescaleIntercept": " "}, LINEAR),
    # x -> 2 x - 50
    "empty first slope": (
        {**EXACT, "RescaleSlope": ["", "2"], "RescaleIntercept": "-50"},
        [0, 0, 77, 128, 179, 255, 255],
    ),
    "empty padding": ({**WINDOW, "PixelPaddingValue": None}, LINEAR),
    "empty padding range": ({**WINDOW, "PixelPaddingValue": 4000, "PixelPaddingRangeLimit": None}, LINEAR),
    **{
        f"empty {keyword}": ({**WINDOW, keyword: None}, LINEAR)
        for keyword in ("PixelRepresentation", "SamplesPerPixel", "HighBit", "NumberOfFrames", "PlanarConfiguration")
    },
    "blank NumberOfFrames": ({**WINDOW, "NumberOfFrames": " "}, LINEAR),
}


@pytest.mark.parametrize("name", EMPTY_NUMBERS)
def test_empty_header_number_is_as_if_absent(name: str) -> None:
    fields, gray = EMPTY_NUMBERS[name]
    for syntax in SYNTAXES:
        assert decode_dicom(file_of(tile(*INPUT), 12, syntax, **fields))[0, :7].tolist() == gray


def test_header_numbers_that_may_be_absent() -> None:
    for keyword in ("PixelRepresentation", "SamplesPerPixel", "HighBit"):
        for syntax in SYNTAXES:
            data = without(dataset(tile(*INPUT), 12, syntax, **WINDOW), keyword)
            assert decode_dicom(data)[0, :7].tolist() == LINEAR
    np.testing.assert_array_equal(decode_dicom(file_of(ramp(), BitsStored=None)), ramp())
    compressed_ds = dataset(ramp())
    compressed_ds.compress(uid.JPEG2000Lossless)
    np.testing.assert_array_equal(decode_dicom(without(compressed_ds, "PixelRepresentation")), ramp())
    colour = np.stack([ramp()] * 3, axis=-1)
    np.testing.assert_array_equal(decode_dicom(file_of(colour, PlanarConfiguration=None)), ramp())


def test_colour_is_luma() -> None:
    rgb, ybr = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 128, np.uint8)  # neutral chroma
    rgb[0, :5] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [7, 7, 7]]
    ybr[0, :3, 0] = [0, 77, 255]
    assert decode_dicom(file_of(rgb))[0, :5].tolist() == [76, 150, 29, 255, 7]
    assert decode_dicom(file_of(ybr, PhotometricInterpretation="YBR_FULL"))[0, :3].tolist() == [0, 77, 255]


@pytest.mark.parametrize("syntax", [*SYNTAXES, uid.DeflatedExplicitVRLittleEndian])
def test_uncompressed_syntaxes(syntax: str) -> None:
    for dtype in (np.uint8, np.uint16):
        # With a window, because minimum and maximum could look right with the two bytes swapped.
        data = file_of(tile(*INPUT, dtype=dtype), syntax=syntax, **WINDOW)
        assert decode_dicom(data)[0, :7].tolist() == LINEAR
    words = np.array([0, 2048, 4095], ">u2" if syntax == uid.ExplicitVRBigEndian else "<u2").tobytes()
    data = file_of(tile(0, 1, 2), 12, syntax, VOILUTSequence=[lut([3, 0, 12], words)])
    assert decode_dicom(data)[0, :3].tolist() == [0, 128, 255]


def test_compressed_syntaxes() -> None:
    frame = jpeg_of(ramp())
    files = {"JPEG": (encapsulated(ramp(), uid.JPEGBaseline8Bit, frame), decode(frame))}
    image = ramp()
    image[0, :3] = (0, 128, 255)  # so that 16 bits keep their values
    for syntax in (uid.RLELossless, uid.JPEG2000Lossless):
        for dtype in (np.uint8, np.uint16):
            files[f"{syntax.name}, {dtype.__name__}"] = (compressed(image.astype(dtype), syntax), image)
    signed = compressed(tile(-1000, 0, 1000, dtype=np.int16), uid.JPEG2000Lossless)
    files["JPEG 2000, int16"] = (signed, tile(0, 128, 255, dtype=np.uint8))
    for syntax, eight, sixteen in (
        (uid.JPEGLossless, LOSSLESS_8, LOSSLESS_16),
        (uid.JPEGLosslessSV1, LOSSLESS_8, LOSSLESS_16),
        (uid.JPEGLSLossless, LS_8, LS_16),
    ):
        files[f"{syntax}, uint8"] = (encapsulated(golden(np.uint8), syntax, eight), golden(np.uint8))
        files[f"{syntax}, uint16"] = (encapsulated(golden(np.uint16), syntax, sixteen), golden(np.uint8))
    for name, (data, expected) in files.items():
        np.testing.assert_array_equal(decode_dicom(data), expected, err_msg=name)
        assert code_of(data[: len(data) * 3 // 4]) == "truncated", name


#: Bits allocated and stored and precision of a lossless JPEG; samples; first stored values, and their gray values.
LOSSLESS: dict[str, tuple[int, int, int, int, tuple[int, ...], list[int]]] = {
    # x / 63 * 255. GDCM ended the process over less than 8 of 8 bits.
    "6 of 8 bits": (8, 6, 6, 1, (0, 1, 32, 63), [0, 4, 130, 255]),
    "6 of 8 bits, 8 in the JPEG": (8, 6, 8, 1, (0, 1, 32, 63), [0, 4, 130, 255]),
    "6 of 8 bits, signed": (8, 6, 6, 1, (0x20, 0x3F, 0, 0x1F), [0, 125, 130, 255]),
    "1 of 8 bits, 2 in the JPEG": (8, 1, 2, 1, (0, 1), [0, 255]),
    "8 of 16 bits": (16, 8, 8, 1, (0, 1, 200, 255), [0, 1, 200, 255]),
    "12 of 16 bits, 8 in the JPEG": (16, 12, 8, 1, (0, 100, 200), [0, 128, 255]),
    "10 of 16 bits": (16, 10, 10, 1, (100, 500, 900), [0, 128, 255]),
    "12 of 16 bits, 16 in the JPEG": (16, 12, 16, 1, (100, 600, 1100), [0, 128, 255]),
    "7 of 8 bits, colour": (8, 7, 7, 3, (0, 1, 64, 127), [0, 2, 129, 255]),  # x / 127 * 255
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_jpeg_of_any_precision(decoder: Decoder, name: str) -> None:
    allocated, stored, precision, samples, values, gray = LOSSLESS[name]
    image = tile(*values)
    if samples == 3:
        image = np.stack([image] * 3, axis=-1)
    fields = {"BitsAllocated": allocated, "PixelRepresentation": int("signed" in name)}
    for syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1):
        data = encapsulated(image, syntax, jpeg_lossless(image, precision), stored, **fields)
        found = decoder.load(data)  # in a child process: a failure would be a crash
        assert isinstance(found, DecodedImage), found
        assert found.images[0][0, : len(gray)].tolist() == gray


def test_precision_without_a_decoder_is_unsupported_and_an_impossible_one_corrupt(decoder: Decoder) -> None:
    frame = bytearray(LS_8)
    for precision in (6, 7):
        frame[frame.index(b"\xff\xf7") + 4] = precision
        found = decoder.load(encapsulated(golden(np.uint8), uid.JPEGLSLossless, bytes(frame), precision))
        assert isinstance(found, Failure)
        assert (found.code, f"{precision} bits" in found.message) == ("unsupported_transfer_syntax", True)
    frame = bytearray(LS_16)
    for precision in (1, 17):
        frame[frame.index(b"\xff\xf7") + 4] = precision
        assert code_of(encapsulated(golden(np.uint16), uid.JPEGLSLossless, bytes(frame))) == "corrupt"


def test_cut_codestream_is_truncated() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 40), dtype=np.uint8)
    whole = pydicom.dcmread(io.BytesIO(compressed(noise, uid.JPEG2000Lossless)))
    stream = pydicom.encaps.get_frame(whole.PixelData, 0, number_of_frames=1)
    frames = [(noise, uid.JPEG2000Lossless, stream[:cut]) for cut in (40, 200, len(stream) // 4 * 2)]
    for image, syntax, frame in (
        (ramp(), uid.JPEGBaseline8Bit, jpeg_of(ramp())),
        (golden(np.uint8), uid.JPEGLosslessSV1, LOSSLESS_8),
        (golden(np.uint16), uid.JPEGLossless, LOSSLESS_16),
        (golden(np.uint8), uid.JPEGLSLossless, LS_8),
        (golden(np.uint16), uid.JPEGLSLossless, LS_16),
    ):
        frames.append((image, syntax, frame[: len(frame) // 4 * 2]))
    for image, syntax, frame in frames:
        assert code_of(encapsulated(image, syntax, frame)) == "truncated", (syntax, len(frame))


def test_unsupported_transfer_syntax_is_named() -> None:
    # A retired JPEG process; JPIP, whose pixels are somewhere else; one that is not registered.
    for name in ("1.2.840.10008.1.2.4.56", "1.2.840.10008.1.2.4.94", "1.2.826.0.1.3680043.99"):
        data = encapsulated(ramp(), uid.JPEGBaseline8Bit, b"1234").replace(uid.JPEGBaseline8Bit.encode(), name.encode())
        with pytest.raises(ImageError, match=re.escape(name)) as caught:
            decode_dicom(data)
        assert caught.value.code == "unsupported_transfer_syntax"


def test_modalities() -> None:
    for modality in ("CR", "DX", "RG", "OT", "SC", "dx", "", None):
        assert decode_dicom(file_of(ramp(), Modality=modality)).shape == (48, 40)
    for modality in ("CT", "MR", "US", "MG", "SR", "SEG", "RF", "DOE"):
        with pytest.raises(ImageError) as caught:
            decode_dicom(file_of(ramp(), Modality=modality))
        assert caught.value.code == "not_a_radiograph"
        # A text that is no modality could be a name, so it is not quoted.
        assert (modality in caught.value.message) == (modality != "DOE")


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"NumberOfFrames": 2}, "not_a_radiograph"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "not_a_radiograph"),
        ({"BitsAllocated": 32}, "not_a_radiograph"),
        ({"Rows": 60000, "Columns": 60000}, "too_large"),
        ({"Rows": 31}, "too_small"),
        ({"Rows": 0}, "corrupt"),
        ({"BitsAllocated": 12}, "corrupt"),
        ({"BitsStored": 20}, "corrupt"),
        ({"HighBit": 3}, "corrupt"),
        ({"SamplesPerPixel": 2}, "corrupt"),
        ({"PhotometricInterpretation": "NONSENSE"}, "corrupt"),
        ({"RescaleSlope": "nan"}, "corrupt"),
        (voi([9, 0, 8], [1, 2]), "corrupt"),
        (voi([2, 0, 7], [1, 2]), "corrupt"),
    ],
)
def test_refused_headers(fields: dict[str, Any], code: str) -> None:
    assert code_of(file_of(ramp(), **fields)) == code


def test_missing_elements_and_pixel_limit() -> None:
    assert code_of(without(dataset(ramp()), "PixelData")) == "not_a_radiograph"
    for keyword in ("Rows", "Columns", "BitsAllocated"):
        for data in (without(dataset(ramp()), keyword), file_of(ramp(), **{keyword: None})):
            with pytest.raises(ImageError, match=f"corrupt: .*has no {keyword}"):
                decode_dicom(data)
    assert code_of(file_of(ramp()), max_pixels=1919) == "too_large"
    assert decode_dicom(file_of(ramp()), max_pixels=1920).shape == (48, 40)


def test_damaged_codestream_is_corrupt() -> None:
    larger = np.zeros((64, 64), np.uint8)
    assert code_of(encapsulated(ramp(), uid.JPEGBaseline8Bit, jpeg_of(larger))) == "corrupt"
    ds = dataset(larger)
    ds.compress(uid.JPEG2000Lossless)
    ds.Rows, ds.Columns = 48, 40
    assert code_of(written(ds)) == "corrupt"
    for syntax in (uid.JPEGBaseline8Bit, uid.JPEG2000Lossless, uid.RLELossless, uid.JPEGLSLossless):
        assert code_of(encapsulated(ramp(), syntax, b"\x13\x37" * 200)) == "corrupt"


def test_deflate_bomb() -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = squeeze.compress(b"\x08\x00\x60\x00OB\0\0" + struct.pack("<I", 20_000_000) + bytes(20_000_000))
    bomb += squeeze.flush()
    name = uid.DeflatedExplicitVRLittleEndian.encode()
    head = bytes(128) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(name)) + name
    assert len(bomb) < 30_000
    assert code_of(head + bomb, max_pixels=10_000) == "too_large"
    assert code_of(head + bomb[: len(bomb) // 2]) == "truncated"
    assert code_of(head + b"\xff" * 500) == "corrupt"


def test_cut_pixel_data_are_truncated() -> None:
    for syntax in SYNTAXES:
        data = file_of(ramp(np.uint16), syntax=syntax)
        assert {code_of(data[:end]) for end in (-1000, -2)} == {"truncated"}
    data = file_of(ramp())
    for end in range(140, len(data), 13):
        assert code_of(data[:end]) in ("truncated", "not_a_radiograph", "corrupt")


def test_files_without_a_preamble() -> None:
    for syntax in (uid.ImplicitVRLittleEndian, uid.DeflatedExplicitVRLittleEndian):
        np.testing.assert_array_equal(decode(file_of(ramp(), syntax=syntax)[132:]), ramp())
    for syntax in SYNTAXES:  # a bare data set
        ds = dataset(ramp(np.uint16), syntax=syntax, **WINDOW)
        expected = decode_dicom(written(ds))
        del ds.file_meta
        out, order = io.BytesIO(), {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
        ds.save_as(out, **order, enforce_file_format=False)
        assert out.getvalue()[128:132] != b"DICM"
        np.testing.assert_array_equal(decode_dicom(out.getvalue()), expected)


def test_other_contents_are_not_an_image() -> None:
    for data in (
        b"\x08\x00" + b"text that goes on and on" * 50,
        b"\x08\x00\x05\x00CS\x02\x00AB" * 50,
        b"GIF89a" + bytes(500),
        jpeg_of(ramp()),
    ):
        assert code_of(data) == "not_an_image"
        with pytest.raises(ImageError, match="not_an_image"):
            read_tags(data)
    assert not looks_like_dicom(b"")


def test_tags() -> None:
    fields = {"PatientID": "17", "StudyInstanceUID": "1.2.3", "PatientAge": "058Y", "PatientSex": "F"}
    tags = {"patient_id": "17", "study_id": "1.2.3", "sop_instance_uid": "1.2.3.4", "age": 58.0, "sex": "F"}
    assert read_tags(file_of(ramp(), **fields, ViewPosition="pa")) == {**tags, "view": "PA"}
    empty = without(dataset(ramp()), "PatientID", "SOPInstanceUID", "PixelData")
    assert read_tags(empty) == dict.fromkeys([*tags, "view"])
    for positions, view in (
        ({"ViewPosition": "LL"}, "LATERAL"),
        ({"PatientPosition": "AP"}, "AP"),
        ({"PatientPosition": "HFS"}, None),
        ({"PatientPosition": "AP", "ViewPosition": "PA"}, "PA"),
        ({"ViewPosition": "XTABLE LATERAL"}, "LATERAL"),
        ({"ViewPosition": "Doe^Jane"}, None),
        ({"ViewPosition": "SWIMMERS", "SeriesDescription": "W Chest Lat."}, "LATERAL"),
        ({"ViewCodeSequence": view_codes("272479007", "SCT")}, "PA"),
        ({"ViewCodeSequence": view_codes("R-10206", "SRT")}, "AP"),
        ({"ViewCodeSequence": view_codes("X17", "99LOCAL", "Thorax lateral")}, "LATERAL"),
        ({"ViewCodeSequence": view_codes("399033003", "SCT"), "SeriesDescription": "Thorax p.a."}, "PA"),
        ({"ViewCodeSequence": [], "AcquisitionDeviceProcessingDescription": "CHEST,LAT"}, "LATERAL"),
        ({"SeriesDescription": "Chest PA and lateral"}, None),
        ({"ViewPosition": "L"}, "LATERAL"),
        ({"SeriesDescription": "L", "ProtocolName": "L", "PatientPosition": "L"}, None),  # the left side
        ({"ViewCodeSequence": view_codes("X17", "99LOCAL", "L")}, None),
        ({"SeriesDescription": "L", "PatientOrientation": ["L", "F"]}, "FRONTAL"),
        ({"PatientOrientation": ["A", "F"]}, "LATERAL"),
        ({"PatientOrientation": ["PL", "FR"], "SeriesDescription": "Thorax PA"}, "LATERAL"),
        ({"PatientOrientation": ["L", "F"]}, "FRONTAL"),
        ({"PatientOrientation": ["L", "F"], "ProtocolName": "CHEST AP"}, "AP"),
        ({"PatientOrientation": ["L", "P"]}, None),
        ({"PatientOrientation": ["L"]}, None),
    ):
        assert read_tags(file_of(ramp(), **positions))["view"] == view


def view_codes(value: str, scheme: str, meaning: str = "") -> list[Dataset]:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return [item]


def test_ages_of_headers() -> None:
    dates = {"PatientBirthDate": "19600501", "StudyDate": "20200430"}
    for fields, age in (
        ({"PatientAge": "999Y"}, None),
        ({"PatientAge": "058Y", **dates}, 58.0),
        ({"PatientAge": "", **dates}, 59.0),
        ({"PatientAge": "999Y", **dates}, 59.0),
        ({**dates, "StudyDate": "20501231"}, 90.0),  # ages above 89 are kept
        (dates, 59.0),
        ({"PatientBirthDate": "19600501"}, None),
        ({"StudyDate": "20200430"}, None),
    ):
        tags = read_tags(file_of(ramp(), **fields))
        assert tags["age"] == age
        assert tags.keys() == {"patient_id", "study_id", "sop_instance_uid", "age", "sex", "view"}  # no dates
