"""Reading, decoding and resizing of pictures; every expected pixel is a literal."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from ray_cxr.config import InputSpec
from ray_cxr.data import imaging
from ray_cxr.data.imaging import decode, load, resize
from ray_cxr.errors import ImageError


def ramp(height: int = 40, width: int = 48) -> np.ndarray:
    """A picture that has every row and column different."""
    return ((np.arange(height)[:, None] * 3 + np.arange(width)[None, :] * 2) % 256).astype(np.uint8)


def png_of(array: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(out, "PNG", **options)
    return out.getvalue()


def jpeg_of(array: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(out, "JPEG", **{"quality": 95, **options})
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG from packed rows, for depths that Pillow cannot write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    line = len(rows) // height
    filtered = b"".join(b"\0" + rows[at : at + line] for at in range(0, len(rows), line))
    body = chunk(b"IDAT", zlib.compress(filtered))
    return b"\x89PNG\r\n\x1a\n" + header + before + body + chunk(b"IEND", b"")


def code_of(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **limits)
    assert "\n" not in caught.value.message
    return caught.value.code


# ---------------------------------------------------------------- PNG to gray


def test_8_bit_gray_is_unchanged() -> None:
    gray = decode(png_of(ramp()))
    assert gray.dtype == np.uint8
    assert gray.flags.c_contiguous
    assert gray.flags.writeable
    np.testing.assert_array_equal(gray, ramp())


def test_interlaced_and_plain_are_the_same() -> None:
    # 32 x 32, 8 bits, seven passes: made by hand, since Pillow does not write Adam7
    image = ramp(32, 32)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in image[y::dy, x::dx])
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 0, 0, 0, 1))
    data += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(decode(data), image)


def test_1_bit_is_black_and_white() -> None:
    gray = decode(raw_png(32, 32, 1, 0, bytes([0b10110000, 0, 0, 0]) * 32))
    assert gray[0, :5].tolist() == [255, 0, 255, 255, 0]


def test_2_bits_fill_the_range() -> None:
    gray = decode(raw_png(32, 32, 2, 0, bytes([0b00011011, 0, 0, 0, 0, 0, 0, 0]) * 32))
    assert gray[0, :4].tolist() == [0, 85, 170, 255]


def test_4_bits_fill_the_range() -> None:
    gray = decode(raw_png(32, 32, 4, 0, (bytes([0x01, 0x8F]) + bytes(14)) * 32))
    assert gray[0, :4].tolist() == [0, 17, 136, 255]


def test_16_bits_are_divided_by_257() -> None:
    image = np.zeros((32, 32), np.uint16)
    image[0, :7] = [0, 128, 129, 257, 32768, 65406, 65535]
    assert decode(png_of(image))[0, :7].tolist() == [0, 0, 1, 1, 128, 254, 255]
    image[0, :3] = [65407, 65408, 65534]
    assert decode(png_of(image))[0, :3].tolist() == [255, 255, 255]


def test_16_bits_are_not_stretched() -> None:
    image = np.zeros((32, 32), np.uint16)
    image[0, 0] = 2570
    assert decode(png_of(image)).max() == 10


def colours() -> np.ndarray:
    image = np.zeros((32, 32, 3), np.uint8)
    image[0, :6] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [10, 20, 30], [200, 100, 50]]
    return image


# 0.299 R + 0.587 G + 0.114 B
LUMA = [76, 150, 29, 255, 18, 124]


def test_rgb_is_luma() -> None:
    assert decode(png_of(colours()))[0, :6].tolist() == LUMA


def test_palette_is_luma() -> None:
    picture = Image.fromarray(colours()).quantize(16)
    out = io.BytesIO()
    picture.save(out, "PNG")
    assert decode(out.getvalue())[0, :6].tolist() == LUMA


def test_palette_with_transparency_is_luma() -> None:
    picture = Image.fromarray(colours()).quantize(16)
    out = io.BytesIO()
    picture.save(out, "PNG", transparency=0)
    assert decode(out.getvalue())[0, :6].tolist() == LUMA


def test_equal_channels_are_exact() -> None:
    values = np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8)
    np.testing.assert_array_equal(decode(png_of(np.stack([values] * 3, axis=-1))), values)


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped(alpha: int) -> None:
    opacity = np.full((40, 48), alpha, np.uint8)
    np.testing.assert_array_equal(decode(png_of(np.stack([ramp(), ramp(), ramp(), opacity], axis=-1))), ramp())
    np.testing.assert_array_equal(decode(png_of(np.stack([ramp(), opacity], axis=-1))), ramp())


def test_16_bit_rgb_keeps_the_upper_byte() -> None:
    row = b"".join(struct.pack(">HHH", value, value, value) for value in (0, 257, 32896, 65535, 511)) + bytes(27 * 6)
    assert decode(raw_png(32, 32, 16, 2, row * 32))[0, :5].tolist() == [0, 1, 128, 255, 1]


def test_first_frame_of_an_animation() -> None:
    out = io.BytesIO()
    Image.fromarray(ramp()).save(
        out, "PNG", save_all=True, append_images=[Image.fromarray(255 - ramp())], default_image=False
    )
    assert b"acTL" in out.getvalue()
    np.testing.assert_array_equal(decode(out.getvalue()), ramp())


def test_text_and_profiles_are_never_read() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "x" * 2_000_000, zip=True)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = png_of(ramp(), pnginfo=info, icc_profile=profile)
    np.testing.assert_array_equal(decode(data), ramp())


def test_trailing_bytes_are_tolerated() -> None:
    np.testing.assert_array_equal(decode(png_of(ramp()) + b"more"), ramp())
    jpeg = jpeg_of(ramp())
    np.testing.assert_array_equal(decode(jpeg + b"more"), decode(jpeg))


# ---------------------------------------------------------------- PNG by two decoders


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], np.ndarray]:
    """`decode` without kornia-rs."""

    def decoded(data: bytes) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr(imaging, "_quick_decoder", lambda: None)
            return decode(data)

    return decoded


@pytest.fixture
def quick_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modes that kornia-rs is asked for from here on."""
    calls: list[str] = []
    real = imaging._quick_decoder()
    assert real is not None

    def noted(data: bytes, shape: tuple[int, int], mode: str) -> np.ndarray:
        calls.append(mode)
        return real(data, shape, mode)

    monkeypatch.setattr(imaging, "_quick_decoder", lambda: noted)
    return calls


def every_filter(samples: int, width: int = 45, height: int = 50) -> bytes:
    """8 bits per sample, noise, and rows that take the five filters in turn."""
    rows = np.random.default_rng(samples).integers(0, 256, (height, width * samples), dtype=np.uint8)
    filtered = b"".join(bytes([at % 5]) + row.tobytes() for at, row in enumerate(rows))
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[samples]
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return head + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("samples", "modes"), [(1, ["mono"]), (2, []), (3, ["rgb"]), (4, ["rgba"])])
def test_both_decoders_give_the_same(
    samples: int, modes: list[str], slow: Callable[[bytes], np.ndarray], quick_calls: list[str]
) -> None:
    data = every_filter(samples)
    image = decode(data)
    assert quick_calls == modes
    np.testing.assert_array_equal(image, slow(data))
    assert image.shape == (50, 45)
    assert image.flags.c_contiguous
    assert image.flags.writeable


@pytest.mark.parametrize(
    "data",
    [
        png_of(ramp().astype(np.uint16)),
        png_of(ramp() > 90),
        png_of(ramp(), "P"),
        png_of(ramp(), "LA"),
        raw_png(32, 32, 2, 0, bytes(range(8)) * 32),
        raw_png(32, 32, 4, 0, bytes(range(16)) * 32),
        raw_png(32, 32, 16, 2, bytes(range(192)) * 32),
    ],
)
def test_other_kinds_are_pillows(data: bytes, slow: Callable[[bytes], np.ndarray], quick_calls: list[str]) -> None:
    np.testing.assert_array_equal(decode(data), slow(data))
    assert quick_calls == []


def test_very_large_pictures_are_pillows(monkeypatch: pytest.MonkeyPatch, quick_calls: list[str]) -> None:
    decode(png_of(ramp(40, 40)))
    monkeypatch.setattr(imaging, "_QUICK_PIXELS", 1599)
    decode(png_of(ramp(40, 40)))
    assert quick_calls == ["mono"]


def test_what_kornia_refuses_pillow_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    raised: list[BaseException] = []

    def refuse(*args: Any) -> np.ndarray:
        raise raised[0]

    monkeypatch.setattr(imaging, "_quick_decoder", lambda: refuse)
    for error in (Exception("Doe^Jane"), MemoryError(), PanicException("Doe^Jane")):
        raised[:] = [error]
        np.testing.assert_array_equal(decode(png_of(ramp())), ramp())
    raised[:] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        decode(png_of(ramp()))


def test_without_kornia_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    imaging._quick_decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "kornia_rs", None)
    try:
        assert imaging._quick_decoder() is None
        np.testing.assert_array_equal(decode(png_of(ramp())), ramp())
    finally:
        imaging._quick_decoder.cache_clear()


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_both_decoders_refuse_the_same(samples: int, slow: Callable[[bytes], np.ndarray]) -> None:
    whole = every_filter(samples)
    at = whole.index(b"IDAT")
    stream = whole[at + 4 : -16]
    rows = zlib.decompress(stream)
    line = 1 + 45 * samples

    def with_pixels(*parts: bytes) -> bytes:
        return whole[: at - 4] + b"".join(chunk(b"IDAT", part) for part in parts) + chunk(b"IEND", b"")

    refused = {
        "no stream": with_pixels(b""),
        "half a stream": with_pixels(stream[: len(stream) // 2]),
        "no row": with_pixels(zlib.compress(b"")),
        "no last row": with_pixels(zlib.compress(rows[:-line])),
        "no last byte": with_pixels(zlib.compress(rows[:-1])),
        "unknown filter": with_pixels(zlib.compress(b"\5" + rows[1:])),
        "no stream at all": with_pixels(b"\x13\x37" * 50),
    }
    for name, data in refused.items():
        codes = []
        for decoder in (decode, slow):
            with pytest.raises(ImageError) as caught:
                decoder(data)
            codes.append((caught.value.code, caught.value.message))
        assert codes[0][0] == "corrupt", name
        assert codes[0] == codes[1], name
    expected = slow(whole)
    taken = {
        "cut anywhere": with_pixels(stream[:1], b"", stream[1:50], stream[50:]),
        "no checksum": with_pixels(stream[:-4]),
        "bytes behind the stream": with_pixels(stream + b"more"),
        "rows behind the last": with_pixels(zlib.compress(rows + rows)),
    }
    for data in taken.values():
        np.testing.assert_array_equal(decode(data), expected)
        np.testing.assert_array_equal(slow(data), expected)


# ---------------------------------------------------------------- JPEG to gray


def test_gray_jpeg() -> None:
    assert np.abs(decode(jpeg_of(ramp())).astype(int) - ramp()).max() <= 3


def test_flat_areas_of_a_jpeg_are_exact() -> None:
    image = np.full((32, 32), 40, np.uint8)
    image[:, 16:] = 200
    gray = decode(jpeg_of(image, quality=100))
    assert (gray[0, 0], gray[0, 31]) == (40, 200)


@pytest.mark.parametrize("progressive", [False, True])
def test_gray_in_ycbcr_equals_gray(progressive: bool) -> None:
    plain = decode(jpeg_of(ramp(), progressive=progressive))
    np.testing.assert_array_equal(decode(jpeg_of(ramp(), "RGB", progressive=progressive)), plain)


def test_colour_jpeg_is_luma() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16] = (255, 0, 0)
    image[16:] = (0, 0, 255)
    gray = decode(jpeg_of(image, quality=100, subsampling=0)).astype(int)
    assert abs(gray[0, 0] - 76) <= 2
    assert abs(gray[31, 0] - 29) <= 2


def test_cmyk_jpeg() -> None:
    image = np.zeros((32, 32, 4), np.uint8)
    image[16:, :, 3] = 255  # half white, half black ink
    out = io.BytesIO()
    Image.fromarray(image, "CMYK").save(out, "JPEG", quality=100)
    gray = decode(out.getvalue())
    assert (int(gray[0, 0]), int(gray[31, 0])) == (255, 0)


def test_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(decode(jpeg_of(ramp(), exif=exif)), decode(jpeg_of(ramp())))


def test_preview_and_comment_in_a_jpeg_are_skipped() -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 1000
    preview = jpeg_of(ramp(32, 32))
    data = jpeg_of(ramp(), exif=exif, comment=b"\xff\xd9\xff\xd8")
    at = 2
    data = data[:at] + b"\xff\xe5" + struct.pack(">H", len(preview) + 2) + preview + data[at:]
    np.testing.assert_array_equal(decode(data), decode(jpeg_of(ramp())))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "data",
    [
        b"text",
        b"\x89PNG",
        b"GIF89a" + bytes(1000),
        b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(100),
        b"%PDF-1.7\n" + bytes(1000),
        b"<html>" * 100,
        b"II*\0" + bytes(1000),
        bytes(1000),
    ],
)
def test_not_an_image(data: bytes) -> None:
    assert code_of(data) == "not_an_image"


def test_empty() -> None:
    assert code_of(b"") == "empty"


def test_every_cut_of_a_png_is_truncated() -> None:
    data = png_of(ramp())
    for end in range(8, len(data)):
        assert code_of(data[:end]) == "truncated"


def test_every_cut_of_a_jpeg_is_truncated() -> None:
    data = jpeg_of(ramp())
    for end in range(3, len(data)):
        assert code_of(data[:end]) == "truncated"


def test_changed_chunk_of_a_png_is_corrupt() -> None:
    data = bytearray(png_of(ramp()))
    data[data.index(b"IDAT") + 10] ^= 1
    assert code_of(bytes(data)) == "corrupt"


def test_damaged_pixel_stream_of_a_png_is_corrupt() -> None:
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 8, 0, 0, 0, 0))
    end = chunk(b"IEND", b"")
    assert code_of(head + chunk(b"IDAT", b"\x13\x37" * 50) + end) == "corrupt"
    assert code_of(head + chunk(b"IDAT", b"") + end) == "corrupt"
    assert code_of(head + end) == "corrupt"
    assert code_of(head + chunk(b"ABCD", b"") + end) == "corrupt"


@pytest.mark.parametrize("interlace", [0, 1])
def test_png_without_its_last_rows_is_corrupt(interlace: int) -> None:
    # every checksum is right and the compressed stream ends in good order; Pillow alone would add black
    rows = b"".join(b"\0" + row.tobytes() for row in ramp(40, 40))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 8, 0, 0, 0, interlace))
    end = chunk(b"IEND", b"")
    for length in (0, 1, 41 * 20, 41 * 39, 41 * 40 - 1):
        assert code_of(head + chunk(b"IDAT", zlib.compress(rows[:length])) + end) == "corrupt"


def test_black_last_row_is_no_missing_row() -> None:
    image = ramp()
    image[-5:] = 0
    np.testing.assert_array_equal(decode(png_of(image)), image)
    np.testing.assert_array_equal(decode(png_of(image > 60)), (image > 60) * np.uint8(255))


@pytest.mark.parametrize(
    "header",
    [
        struct.pack(">IIBBBBB", 40, 40, 3, 0, 0, 0, 0),
        struct.pack(">IIBBBBB", 40, 40, 8, 5, 0, 0, 0),
        struct.pack(">IIBBBBB", 40, 40, 8, 0, 1, 0, 0),
        struct.pack(">IIBBBBB", 40, 40, 8, 0, 0, 0, 2),
        struct.pack(">IIBBBBB", 0, 40, 8, 0, 0, 0, 0),
        struct.pack(">IIBBBBB", 40, 40, 8, 3, 0, 0, 0),  # a palette picture without its palette
        struct.pack(">II", 40, 40),
    ],
)
def test_bad_header_of_a_png_is_corrupt(header: bytes) -> None:
    body = chunk(b"IDAT", zlib.compress(bytes(41 * 40))) + chunk(b"IEND", b"")
    assert code_of(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body) == "corrupt"


def test_jpeg_without_a_picture_is_corrupt() -> None:
    assert code_of(b"\xff\xd8\xff\xd9" + bytes(200)) == "corrupt"
    assert code_of(b"\xff\xd8\xff\xdb\x00\x01" + bytes(200)) == "corrupt"
    assert code_of(b"\xff\xd8\xff\xfe\x00\x04ab" + b"no marker" * 30) == "corrupt"


def test_damaged_tables_of_a_jpeg_are_corrupt() -> None:
    data = bytearray(jpeg_of(ramp()))
    at = data.index(b"\xff\xc4")
    data[at + 5 : at + 21] = b"\xff" * 16
    assert code_of(bytes(data)) == "corrupt"


def test_size_limits() -> None:
    for data in (png_of(ramp()), jpeg_of(ramp())):
        assert code_of(data, max_pixels=1919) == "too_large"
        assert decode(data, max_pixels=1920).shape == (40, 48)
    for height, width in ((31, 400), (400, 31), (1, 1)):
        assert code_of(png_of(ramp(height, width))) == "too_small"
        assert code_of(jpeg_of(ramp(height, width))) == "too_small"
    assert decode(png_of(ramp(32, 32))).shape == (32, 32)


def test_pixel_bomb_is_refused_by_its_header() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0))
    assert code_of(b"\x89PNG\r\n\x1a\n" + header) == "too_large"
    jpeg = bytearray(jpeg_of(ramp()))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    assert code_of(bytes(jpeg)) == "too_large"


def test_large_picture_within_the_limit_gives_no_warning() -> None:
    side = 9600  # above Pillow's own 89 million pixels, where it warns; warnings are errors in these tests
    row = bytes(side // 8 - 1) + b"\x01"
    gray = decode(raw_png(side, side, 1, 0, row * side))
    assert gray.shape == (side, side)
    assert gray[side - 1, side - 2 :].tolist() == [0, 255]


def test_blank() -> None:
    assert code_of(png_of(np.full((40, 40), 9, np.uint8))) == "blank"
    almost = np.full((40, 40), 9, np.uint8)
    almost[39, 39] = 10
    assert decode(png_of(almost))[39, 39] == 10


def test_memory_and_foreign_errors_become_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):  # what a Rust extension raises
        pass

    def failing(error: BaseException) -> str:
        def broken(picture: Any) -> np.ndarray:
            raise error

        monkeypatch.setattr(imaging, "_gray_array", broken)
        return code_of(png_of(ramp().astype(np.uint16)))

    assert failing(MemoryError()) == "too_large"
    assert failing(RecursionError()) == "corrupt"
    assert failing(SyntaxError("Doe^Jane")) == "corrupt"
    assert failing(PanicException()) == "corrupt"
    with pytest.raises(KeyboardInterrupt):
        failing(KeyboardInterrupt())


def test_image_error_survives_pickling() -> None:
    with pytest.raises(ImageError) as caught:
        decode(b"text")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert type(copy) is ImageError
    assert (copy.code, copy.message, str(copy)) == (
        "not_an_image",
        caught.value.message,
        f"not_an_image: {caught.value.message}",
    )


def test_threads_decode_the_same() -> None:
    files = [png_of(ramp()), jpeg_of(ramp()), png_of(colours())]
    expected = [decode(data) for data in files]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(30):
            for index, data in enumerate(files):
                if not np.array_equal(decode(data), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


SAMPLES = [
    png_of(ramp()),
    png_of(colours()),
    png_of(ramp(), "1"),
    jpeg_of(ramp()),
    jpeg_of(colours(), progressive=True),
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
    try:
        gray = decode(bytes(data if cut is None else data[: cut % len(data)]))
    except ImageError:
        return
    assert gray.dtype == np.uint8
    assert gray.ndim == 2


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    for data in SAMPLES:
        for at in range(10, len(data), max(1, len(data) // 40)):
            damaged = bytearray(data)
            damaged[at] ^= 0x55
            with contextlib.suppress(ImageError):
                decode(bytes(damaged))
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- resize


def test_area_averages() -> None:
    image = np.zeros((64, 64), np.uint8)
    image[:2, :2] = [[10, 20], [30, 40]]
    assert resize(image, InputSpec(size=32))[0, :2].tolist() == [25, 0]


def test_same_size_is_a_copy() -> None:
    image = ramp(32, 32)
    same = resize(image, InputSpec(size=32, interpolation="lanczos"))
    np.testing.assert_array_equal(same, image)
    same[0, 0] = 99
    assert image[0, 0] == 0


def test_stretch_fills_the_square() -> None:
    image = np.zeros((64, 128), np.uint8)
    image[:, 64:] = 200
    small = resize(image, InputSpec(size=32, aspect="stretch"))
    assert small[0].tolist() == [0] * 16 + [200] * 16
    assert small[31].tolist() == [0] * 16 + [200] * 16


def test_pad_centres_on_black() -> None:
    image = np.full((64, 128), 200, np.uint8)
    small = resize(image, InputSpec(size=32, aspect="pad"))
    assert small[:, 5].tolist() == [0] * 8 + [200] * 16 + [0] * 8
    tall = resize(image.T, InputSpec(size=32, aspect="pad"))
    assert tall[5].tolist() == [0] * 8 + [200] * 16 + [0] * 8


def test_pad_puts_an_odd_remainder_after() -> None:
    image = np.full((58, 64), 200, np.uint8)  # 29 of 32 rows: 1 before, 2 after
    assert resize(image, InputSpec(size=32, aspect="pad"))[:, 0].tolist() == [0] + [200] * 29 + [0] * 2


def test_pad_keeps_at_least_one_row() -> None:
    image = np.full((1, 500), 200, np.uint8)
    assert resize(image, InputSpec(size=32, aspect="pad"))[:, 0].tolist() == [0] * 15 + [200] + [0] * 16


def test_crop_takes_the_centre() -> None:
    image = np.tile(np.arange(38, dtype=np.uint8), (32, 1))
    np.testing.assert_array_equal(resize(image, InputSpec(size=32, aspect="crop"))[0], np.arange(3, 35))


def test_crop_loses_an_odd_remainder_after() -> None:
    image = np.tile(np.arange(35, dtype=np.uint8)[:, None], (1, 32))
    np.testing.assert_array_equal(resize(image, InputSpec(size=32, aspect="crop"))[:, 0], np.arange(1, 33))


@pytest.mark.parametrize("interpolation", ["area", "linear", "cubic", "lanczos"])
def test_flat_stays_flat(interpolation: Any) -> None:
    image = np.full((50, 70), 123, np.uint8)
    assert np.unique(resize(image, InputSpec(size=96, interpolation=interpolation))).tolist() == [123]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 40), np.float32),
        np.zeros((40, 40), np.uint16),
        np.zeros((40, 40, 3), np.uint8),
        np.zeros(40, np.uint8),
        np.zeros((0, 40), np.uint8),
        [[0, 0], [0, 0]],
    ],
)
def test_resize_refuses_what_is_no_picture(image: Any) -> None:
    with pytest.raises(ValueError, match="image must"):
        resize(image, InputSpec())


@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    size=st.integers(32, 100),
    aspect=st.sampled_from(["stretch", "pad", "crop"]),
    interpolation=st.sampled_from(["area", "linear", "cubic", "lanczos"]),
)
def test_resize_gives_the_square_it_was_asked_for(
    height: int, width: int, size: int, aspect: Any, interpolation: Any
) -> None:
    image = ramp(height, width)[:, ::-1]  # not contiguous
    before = image.copy()
    result = resize(image, InputSpec(size=size, aspect=aspect, interpolation=interpolation))
    assert result.shape == (size, size)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert not np.shares_memory(result, image)
    np.testing.assert_array_equal(image, before)


@given(side=st.integers(32, 80), aspect=st.sampled_from(["stretch", "pad", "crop"]))
@settings(max_examples=30, deadline=None)
def test_aspect_is_no_matter_for_a_square(side: int, aspect: Any) -> None:
    spec = InputSpec(size=48)
    np.testing.assert_array_equal(resize(ramp(side, side), spec.replace(aspect=aspect)), resize(ramp(side, side), spec))


# ---------------------------------------------------------------- files


def test_load_is_read_decode_resize(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"  # the name says nothing
    file.write_bytes(png_of(ramp(64, 64)))
    np.testing.assert_array_equal(load(str(file)), ramp(64, 64))
    np.testing.assert_array_equal(load(str(file), InputSpec(size=32)), resize(ramp(64, 64), InputSpec(size=32)))
    with pytest.raises(ImageError, match="too_large"):
        load(str(file), max_pixels=4095)


# ---------------------------------------------------------------- real files


def test_both_decoders_give_the_same_of_real_files(shared: Path, slow: Callable[[bytes], np.ndarray]) -> None:
    folders = [shared / "nih" / name for name in ("images1024", "images256")]
    paths = [path for folder in folders for path in sorted(folder.glob("*.png"))[::9]]
    # The few RGBA files, whatever their place.
    paths += [path for path in folders[0].glob("*.png") if path.open("rb").read(26)[25] == 6]
    assert len(paths) > 50
    for path in paths:
        data = path.read_bytes()
        np.testing.assert_array_equal(decode(data), slow(data), err_msg=path.name)
