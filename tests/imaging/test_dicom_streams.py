"""Pixel data of another kind than the transfer syntax declares, and JPEG of 12 bits."""

from __future__ import annotations

import io
import struct

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from test_dicom import (
    LOSSLESS_8,
    LOSSLESS_16,
    LS_8,
    LS_16,
    SYNTAXES,
    code_of,
    compressed,
    dataset,
    file_of,
    golden,
    jpeg_of,
    ramp,
    written,
)

from ray_cxr.errors import ImageError
from ray_cxr.imaging.decode import decode
from ray_cxr.imaging.dicom import decode_dicom, read_image
from ray_cxr.imaging.sandbox import DecodedImage, Decoder


def frame_of(data: bytes) -> bytes:
    return get_frame(pydicom.dcmread(io.BytesIO(data)).PixelData, 0, number_of_frames=1)


def saved(image: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind, **options)
    return out.getvalue() + b"\0" * (len(out.getvalue()) % 2)


#: Streams with the gray values that they hold.
STREAMS = {
    "JPEG": (jpeg_of(ramp()), decode(jpeg_of(ramp()))),
    "progressive JPEG": (saved(ramp(), "JPEG", quality=90, progressive=True), decode(jpeg_of(ramp()))),
    "lossless JPEG": (LOSSLESS_8, golden(np.uint8)),
    "lossless JPEG, 16 bits": (LOSSLESS_16, golden(np.uint8)),
    "JPEG-LS": (LS_8, golden(np.uint8)),
    "JPEG-LS, 16 bits": (LS_16, golden(np.uint8)),
    "JPEG 2000": (frame_of(compressed(ramp(), uid.JPEG2000Lossless)), ramp()),
    "JP2": (saved(ramp(), "JPEG2000", irreversible=False), ramp()),
    "RLE": (frame_of(compressed(ramp(), uid.RLELossless)), ramp()),
}
DECLARED = (
    *SYNTAXES,
    uid.JPEGBaseline8Bit,
    uid.JPEGExtended12Bit,
    uid.JPEGLosslessSV1,
    uid.JPEGLSLossless,
    uid.JPEG2000,
    uid.RLELossless,
    uid.UID("1.2.840.10008.1.2.4.55"),  # a retired JPEG process without a decoder
)


def dataset_for(gray: np.ndarray, name: str, syntax: str) -> Dataset:
    return dataset(gray.astype(np.uint16 if "16 bits" in name else np.uint8), syntax=syntax)


@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_decoded_with_any_declared_syntax(name: str) -> None:
    stream, gray = STREAMS[name]
    for syntax in DECLARED:
        ds = dataset_for(gray, name, syntax)
        image, flags = read_image(_with_stream(ds, stream))
        np.testing.assert_array_equal(image, gray, err_msg=f"{name} as {syntax.name}")
        assert flags == ()


def _with_stream(ds: Dataset, stream: bytes, *, is_item: bool = True) -> bytes:
    ds.PixelData = encapsulate([stream]) if is_item else stream
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = is_item
    return written(ds)


def declare(data: bytes, syntax: str) -> bytes:
    """Replace the transfer syntax Explicit VR Little Endian of a file by another."""
    element = struct.pack("<HH2sH", 2, 0x10, b"UI", 20) + uid.ExplicitVRLittleEndian.encode() + b"\0"
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    assert element in data
    data = data.replace(element, struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value)
    # The length of group 0002 follows from its elements.
    at = data.index(struct.pack("<HH2sH", 2, 0, b"UL", 4)) + 8
    (length,) = struct.unpack_from("<I", data, at)
    return data[:at] + struct.pack("<I", length + len(value) - 20) + data[at + 4 :]


@pytest.mark.parametrize("name", STREAMS)
def test_stream_without_items_or_with_a_length_is_decoded(name: str) -> None:
    stream, gray = STREAMS[name]
    for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian):
        bare = _with_stream(dataset_for(gray, name, syntax), stream, is_item=False)
        np.testing.assert_array_equal(decode_dicom(bare), gray)
        ds = dataset_for(gray, name, syntax)
        ds.PixelData = encapsulate([stream])  # of a defined length
        np.testing.assert_array_equal(decode_dicom(written(ds)), gray)


def test_stream_in_a_file_without_a_transfer_syntax_is_decoded() -> None:
    stream, gray = STREAMS["JPEG 2000"]
    np.testing.assert_array_equal(decode_dicom(declare(_with_stream(dataset(gray), stream), "")), gray)


def test_uncompressed_pixels_with_a_compressed_syntax_are_decoded() -> None:
    gray = ramp(np.uint16)
    native = file_of(gray, 16)
    for syntax in (uid.JPEGBaseline8Bit, uid.JPEG2000, uid.RLELossless):
        np.testing.assert_array_equal(decode_dicom(declare(native, syntax)), decode_dicom(native))
        assert code_of(declare(native[:-100], syntax)) == "corrupt"
        assert code_of(_with_stream(dataset(gray, 16, syntax), gray.tobytes())) == "corrupt"  # in an item
    for syntax in (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian):
        data = _with_stream(dataset(gray, 16, syntax), gray.tobytes())
        np.testing.assert_array_equal(decode_dicom(data), decode_dicom(native))


def test_message_names_a_wrong_syntax() -> None:
    for stream, code, kind in (
        (jpeg_of(ramp())[:-200], "truncated", "JPEG"),
        (LS_8[:-20], "truncated", "JPEG-LS"),
        (STREAMS["JPEG 2000"][0][:-60], "truncated", "JPEG 2000"),
        (jpeg_of(np.zeros((64, 64), np.uint8)), "corrupt", "JPEG"),
    ):
        image = golden(np.uint8) if kind == "JPEG-LS" else ramp()
        with pytest.raises(ImageError) as caught:
            decode_dicom(_with_stream(dataset(image), stream))
        assert caught.value.code == code
        expected = f"the transfer syntax Explicit VR Little Endian is wrong, the pixel data are {kind}"
        assert caught.value.message.endswith(expected)
    with pytest.raises(ImageError, match="corrupt: the pixel data do not have the transfer syntax Explicit VR"):
        decode_dicom(_with_stream(dataset(ramp()), b"\x13\x37" * 200))
    # Uncompressed data of the right length are never taken for a stream.
    image = ramp()
    image[0, :3] = (0xFF, 0xD8, 0xFF)
    np.testing.assert_array_equal(decode_dicom(file_of(image)), image)
    assert code_of(file_of(ramp())[:-500]) == "truncated"


def jpeg_12_bits(image: np.ndarray, components: int = 1) -> bytes:
    """An extended JPEG (ITU-T T.81, process 4) of an image of uniform blocks of 8 x 8 pixels."""
    height, width = image.shape
    means = (image[::8, ::8].astype(int) - 2048) * 8  # the first coefficient of a uniform block
    bits = ""
    for difference in np.diff(means.ravel(), prepend=0).tolist():
        length = abs(difference).bit_length()
        bits += f"{length:05b}"
        if length:
            bits += f"{difference if difference > 0 else difference + (1 << length) - 1:0{length}b}"
        bits += "0"  # the other coefficients are 0
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    segments = [
        (0xDB, bytes([0] + [1] * 64)),
        (0xC1, struct.pack(">BHHB", 12, height, width, components) + bytes([1, 0x11, 0] * components)),
        (0xC4, bytes([0, 0, 0, 0, 0, 16, *[0] * 11, *range(16)])),
        (0xC4, bytes([0x10, 1, *[0] * 15, 0])),
        (0xDA, bytes([1, 1, 0, 0, 63, 0])),
    ]
    data = b"\xff\xd8" + b"".join(b"\xff%c" % kind + struct.pack(">H", len(body) + 2) + body for kind, body in segments)
    data += scan + b"\xff\xd9"
    return data + b"\0" * (len(data) % 2)


def test_jpeg_of_12_bits() -> None:
    values = np.arange(30).reshape(5, 6) * 100 + 100
    image = np.kron(values, np.ones((8, 8), int)).astype(np.uint16)
    frame = jpeg_12_bits(image)
    with Decoder([None]) as decoder:  # in a child process: GDCM could end it
        for syntax in (uid.JPEGExtended12Bit, uid.ExplicitVRLittleEndian, uid.JPEG2000):
            found = decoder.load(_with_stream(dataset(image, 12, syntax), frame))
            assert isinstance(found, DecodedImage), found
            # x -> (x - 100) / 2900 * 255
            assert found.images[0][::8, ::8].ravel()[[0, 1, 14, 15, 29]].tolist() == [0, 9, 123, 132, 255]
    assert code_of(_with_stream(dataset(image, 12, uid.JPEGExtended12Bit), frame[: len(frame) // 2])) == "truncated"
    colour = np.stack([image] * 3, axis=-1)
    data = _with_stream(dataset(colour, 12, uid.JPEGExtended12Bit), jpeg_12_bits(image, 3))
    with pytest.raises(ImageError, match="unsupported_transfer_syntax: no decoder for 12 bits"):
        decode_dicom(data)
