"""Reading, decoding and resizing of PNG and JPEG files; every expected pixel is a literal."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from ray_cxr.config import InputSpec
from ray_cxr.errors import ImageError
from ray_cxr.imaging import png
from ray_cxr.imaging.decode import decode, load_image
from ray_cxr.imaging.resize import resize


class PanicException(BaseException):
    """What an extension in Rust raises."""


def ramp(height: int = 40, width: int = 48) -> np.ndarray:
    """An image that has every row and column different."""
    return ((np.arange(height)[:, None] * 3 + np.arange(width)[None, :] * 2) % 256).astype(np.uint8)


def saved(image: np.ndarray | Image.Image, kind: str, mode: str | None = None, **options: Any) -> bytes:
    out = io.BytesIO()
    pillow = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    (pillow.convert(mode) if mode else pillow).save(out, kind, **options)
    return out.getvalue()


def png_of(image: np.ndarray | Image.Image, mode: str | None = None, **options: Any) -> bytes:
    return saved(image, "PNG", mode, **options)


def jpeg_of(image: np.ndarray, mode: str | None = None, **options: Any) -> bytes:
    return saved(image, "JPEG", mode, **{"quality": 95, **options})


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, depth: int = 8, colour: int = 0, rest: tuple[int, int, int] = (0, 0, 0)) -> bytes:
    """Contents of IHDR; `rest` is compression, filter and interlace."""
    return struct.pack(">IIBBBBB", width, height, depth, colour, *rest)


def assembled(head: bytes, *streams: bytes) -> bytes:
    """A PNG with right checksums from its header and the parts of its pixel stream."""
    body = b"".join(chunk(b"IDAT", stream) for stream in streams)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def raw_png(depth: int, colour: int, row: bytes) -> bytes:
    """A PNG of 32 equal packed rows of 32 pixels, for depths that Pillow cannot write."""
    return assembled(header(32, 32, depth, colour), zlib.compress((b"\0" + row) * 32))


def interlaced_png(image: np.ndarray) -> bytes:
    """An 8-bit PNG in the seven passes of Adam7, which Pillow does not write."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in image[y::dy, x::dx])
    return assembled(header(image.shape[1], image.shape[0], rest=(0, 0, 1)), zlib.compress(rows))


def first_row(*values: int, dtype: Any = np.uint16) -> np.ndarray:
    image = np.zeros((32, 32), dtype)
    image[0, : len(values)] = values
    return image


def code_of(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **limits)
    assert "\n" not in caught.value.message
    return caught.value.code


COLOURS = np.zeros((32, 32, 3), np.uint8)
COLOURS[0, :6] = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [10, 20, 30], [200, 100, 50]]
LUMA = [76, 150, 29, 255, 18, 124]  # 0.299 R + 0.587 G + 0.114 B
RGB_16 = b"".join(struct.pack(">HHH", value, value, value) for value in (0, 257, 32896, 65535, 511)) + bytes(27 * 6)

GRAY_VALUES = {
    "1 bit": (raw_png(1, 0, bytes([0b10110000, 0, 0, 0])), [255, 0, 255, 255, 0]),
    "2 bits": (raw_png(2, 0, bytes([0b00011011, 0, 0, 0, 0, 0, 0, 0])), [0, 85, 170, 255]),
    "4 bits": (raw_png(4, 0, bytes([0x01, 0x8F]) + bytes(14)), [0, 17, 136, 255]),
    # 16 bits are divided by 257 and rounded, and not stretched to the range of the image.
    "16 bits": (
        png_of(first_row(0, 128, 129, 257, 32768, 65406, 65407, 65408, 65534, 65535)),
        [0, 0, 1, 1, 128, 254, 255, 255, 255, 255],
    ),
    "dark 16 bits": (png_of(first_row(2570)), [10, 0]),
    "RGB": (png_of(COLOURS), LUMA),
    "palette": (png_of(Image.fromarray(COLOURS).quantize(16)), LUMA),
    "palette with transparency": (png_of(Image.fromarray(COLOURS).quantize(16), transparency=0), LUMA),
    "16-bit RGB, upper byte": (raw_png(16, 2, RGB_16), [0, 1, 128, 255, 1]),
}


@pytest.mark.parametrize(("data", "expected"), GRAY_VALUES.values(), ids=GRAY_VALUES)
def test_gray_values(data: bytes, expected: list[int]) -> None:
    assert decode(data)[0, : len(expected)].tolist() == expected


BOMB = PngImagePlugin.PngInfo()
BOMB.add_text("bomb", "x" * 2_000_000, zip=True)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EVERY_VALUE = np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8)
BLACK_END = ramp() * (np.arange(40) < 35)[:, None].astype(np.uint8)
SAME_PIXELS = {
    "gray": (png_of(ramp()), ramp()),
    "interlaced": (interlaced_png(ramp()), ramp()),
    "RGB with equal channels": (png_of(np.stack([EVERY_VALUE] * 3, axis=-1)), EVERY_VALUE),
    **{
        f"{gray} gray and alpha {alpha}": (png_of(np.dstack([*[ramp()] * gray, np.full_like(ramp(), alpha)])), ramp())
        for gray, alpha in product((1, 3), (0, 128, 255))
    },
    "first frame of an animation": (
        png_of(ramp(), save_all=True, append_images=[Image.fromarray(255 - ramp())], default_image=False),
        ramp(),
    ),
    "text bomb and colour profile": (png_of(ramp(), pnginfo=BOMB, icc_profile=PROFILE), ramp()),
    "bytes after the end": (png_of(ramp()) + b"more", ramp()),
    "black last rows": (png_of(BLACK_END), BLACK_END),
    "1 bit, black last rows": (png_of(BLACK_END > 60), (BLACK_END > 60) * np.uint8(255)),
}


@pytest.mark.parametrize(("data", "expected"), SAME_PIXELS.values(), ids=SAME_PIXELS)
def test_pixels_are_unchanged(data: bytes, expected: np.ndarray) -> None:
    gray = decode(data)
    assert gray.dtype == np.uint8
    assert gray.flags.c_contiguous
    assert gray.flags.writeable
    np.testing.assert_array_equal(gray, expected)


@pytest.fixture
def decode_with_pillow(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], np.ndarray]:
    def decoded(data: bytes) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr(png, "_load_kornia", lambda: None)
            return decode(data)

    return decoded


@pytest.fixture
def quick_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mode of every call of kornia-rs."""
    calls: list[str] = []
    real = png._load_kornia()
    assert real is not None

    def record(data: bytes, shape: tuple[int, int], mode: str) -> np.ndarray:
        calls.append(mode)
        return real(data, shape, mode)

    monkeypatch.setattr(png, "_load_kornia", lambda: record)
    return calls


def every_filter(samples: int) -> bytes:
    """45 x 50 pixels of noise, 8 bits per sample, in rows that use the five filters in turn."""
    rows = np.random.default_rng(samples).integers(0, 256, (50, 45 * samples), dtype=np.uint8)
    filtered = b"".join(bytes([at % 5]) + row.tobytes() for at, row in enumerate(rows))
    return assembled(header(45, 50, 8, {1: 0, 2: 4, 3: 2, 4: 6}[samples]), zlib.compress(filtered))


BY_PILLOW = (every_filter(2), interlaced_png(ramp()), png_of(ramp(), "P"), raw_png(4, 0, bytes(range(16))))


@pytest.mark.parametrize(
    ("data", "modes"),
    [
        *((every_filter(samples), [mode]) for samples, mode in ((1, "mono"), (3, "rgb"), (4, "rgba"))),
        *((data, []) for data in (*BY_PILLOW, png_of(ramp().astype(np.uint16)))),
    ],
)
def test_both_decoders_give_the_same_pixels(data: bytes, modes: list[str], decode_with_pillow, quick_calls) -> None:
    image = decode(data)
    assert quick_calls == modes
    np.testing.assert_array_equal(image, decode_with_pillow(data))
    assert image.flags.c_contiguous
    assert image.flags.writeable


def test_pillow_decodes_what_kornia_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[BaseException] = []

    def refuse(*args: Any) -> np.ndarray:
        raise raised[0]

    monkeypatch.setattr(png, "_load_kornia", lambda: refuse)
    for error in (Exception("Doe^Jane"), MemoryError(), PanicException("Doe^Jane")):
        raised[:] = [error]
        np.testing.assert_array_equal(decode(png_of(ramp())), ramp())
    raised[:] = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        decode(png_of(ramp()))


def test_pillow_decodes_very_large_images_and_without_kornia(monkeypatch, quick_calls: list[str]) -> None:
    for limit in (1600, 1599):
        monkeypatch.setattr(png, "_KORNIA_PIXELS", limit)
        decode(png_of(ramp(40, 40)))
    assert quick_calls == ["mono"]
    monkeypatch.undo()
    png._load_kornia.cache_clear()
    monkeypatch.setitem(sys.modules, "kornia_rs", None)
    try:
        assert png._load_kornia() is None
        np.testing.assert_array_equal(decode(png_of(ramp())), ramp())
    finally:
        png._load_kornia.cache_clear()


@pytest.mark.parametrize("samples", [1, 3, 4])
def test_both_decoders_refuse_the_same(samples: int, decode_with_pillow: Callable[[bytes], np.ndarray]) -> None:
    whole = every_filter(samples)
    head, stream = whole[16:29], whole[41:-16]
    rows, line = zlib.decompress(stream), 1 + 45 * samples
    for broken in (
        b"",
        stream[: len(stream) // 2],
        zlib.compress(b""),
        zlib.compress(rows[:-line]),
        zlib.compress(rows[:-1]),
        zlib.compress(b"\5" + rows[1:]),  # an unknown filter
        b"\x13\x37" * 50,
    ):
        errors = []
        for decoder in (decode, decode_with_pillow):
            with pytest.raises(ImageError) as caught:
                decoder(assembled(head, broken))
            errors.append((caught.value.code, caught.value.message))
        assert errors[0] == errors[1]
        assert errors[0][0] == "corrupt"
    expected = decode_with_pillow(whole)
    for parts in (
        (stream[:1], b"", stream[1:50], stream[50:]),
        (stream[:-4],),  # no checksum
        (stream + b"more",),
        (zlib.compress(rows + rows),),
    ):
        for decoder in (decode, decode_with_pillow):
            np.testing.assert_array_equal(decoder(assembled(head, *parts)), expected)


def test_both_decoders_give_the_same_pixels_of_real_files(shared: Path, decode_with_pillow) -> None:
    large, small = (sorted((shared / "nih" / name).glob("*.png"))[::40] for name in ("images1024", "images256"))
    assert large
    for path in [*large, *small, shared / "nih" / "images1024" / "00000100_000.png"]:  # the last one is RGBA
        data = path.read_bytes()
        np.testing.assert_array_equal(decode(data), decode_with_pillow(data), err_msg=path.name)


def test_jpeg() -> None:
    for progressive in (False, True):
        gray = decode(jpeg_of(ramp(), progressive=progressive))
        assert np.abs(gray.astype(int) - ramp()).max() <= 3
        np.testing.assert_array_equal(decode(jpeg_of(ramp(), "RGB", progressive=progressive)), gray)
    for mode, upper, lower, expected, tolerance in (
        ("L", 40, 200, (40, 200), 0),
        ("RGB", (255, 0, 0), (0, 0, 255), (76, 29), 2),
        ("CMYK", (0, 0, 0, 0), (0, 0, 0, 255), (255, 0), 0),
    ):
        image = Image.new(mode, (32, 32), upper)
        image.paste(lower, (0, 16, 32, 32))
        gray = decode(saved(image, "JPEG", quality=100, subsampling=0))
        assert (int(gray[0, 0]), int(gray[31, 0])) == pytest.approx(expected, abs=tolerance)


def test_orientation_previews_and_comments_of_a_jpeg_are_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 1000
    preview = jpeg_of(ramp(32, 32))
    data = jpeg_of(ramp(), exif=exif, comment=b"\xff\xd9\xff\xd8")
    data = data[:2] + b"\xff\xe5" + struct.pack(">H", len(preview) + 2) + preview + data[2:] + b"after the end"
    np.testing.assert_array_equal(decode(data), decode(jpeg_of(ramp())))


def test_other_files_are_no_image_and_every_cut_is_truncated() -> None:
    for start in (b"text", b"\x89PNG", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 ", b"II*\0", b""):
        assert code_of(start + bytes(1000)) == "not_an_image"
    assert code_of(b"") == "empty"
    for data, first in ((png_of(ramp()), 8), (jpeg_of(ramp()), 3)):
        for end in range(first, len(data)):
            assert code_of(data[:end]) == "truncated", end


PIXEL_STREAM = zlib.compress(bytes(41 * 40))
DAMAGED_PNGS = {
    "depth 3": assembled(header(40, 40, 3), PIXEL_STREAM),
    "colour 5": assembled(header(40, 40, 8, 5), PIXEL_STREAM),
    "compression 1": assembled(header(40, 40, rest=(1, 0, 0)), PIXEL_STREAM),
    "filter 1": assembled(header(40, 40, rest=(0, 1, 0)), PIXEL_STREAM),
    "interlace 2": assembled(header(40, 40, rest=(0, 0, 2)), PIXEL_STREAM),
    "no width": assembled(header(0, 40), PIXEL_STREAM),
    "no palette": assembled(header(40, 40, 8, 3), PIXEL_STREAM),
    "short header": assembled(header(40, 40)[:8], PIXEL_STREAM),
    "no pixel data": assembled(header(40, 40)),
    "unknown critical chunk": assembled(header(40, 40), PIXEL_STREAM)[:-12] + chunk(b"ABCD", b"") + chunk(b"IEND", b""),
    "wrong checksum": png_of(ramp())[:-16] + bytes(4) + chunk(b"IEND", b""),
}


@pytest.mark.parametrize("data", DAMAGED_PNGS.values(), ids=DAMAGED_PNGS)
def test_damaged_png_is_corrupt(data: bytes) -> None:
    assert code_of(data) == "corrupt"


def test_interlaced_png_without_its_last_rows_and_damaged_jpeg_are_corrupt() -> None:
    # Every checksum is right and the compressed stream ends properly; Pillow alone would add black.
    rows = zlib.decompress(interlaced_png(ramp(40, 40))[41:-16])
    for length in (0, len(rows) // 2, len(rows) - 1):
        assert code_of(assembled(header(40, 40, rest=(0, 0, 1)), zlib.compress(rows[:length]))) == "corrupt", length
    damaged_table = bytearray(jpeg_of(ramp()))
    at = damaged_table.index(b"\xff\xc4")
    damaged_table[at + 5 : at + 21] = b"\xff" * 16
    for data in (
        bytes(damaged_table),
        b"\xff\xd8\xff\xd9" + bytes(200),
        b"\xff\xd8\xff\xdb\x00\x01" + bytes(200),
        b"\xff\xd8\xff\xfe\x00\x04ab" + b"no marker" * 30,
    ):
        assert code_of(data) == "corrupt"


def test_limits_of_size_and_blank_images() -> None:
    for make in (png_of, jpeg_of):
        assert code_of(make(ramp()), max_pixels=1919) == "too_large"
        assert decode(make(ramp()), max_pixels=1920).shape == (40, 48)
        for height, width in ((31, 400), (400, 31)):
            assert code_of(make(ramp(height, width))) == "too_small"
        assert decode(make(ramp(32, 32))).shape == (32, 32)
    image = np.full((40, 40), 9, np.uint8)
    assert code_of(png_of(image)) == "blank"
    image[39, 39] = 10
    assert decode(png_of(image))[39, 39] == 10


def test_pixel_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_of(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header(100_000, 100_000))) == "too_large"
    jpeg = bytearray(jpeg_of(ramp()))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    assert code_of(bytes(jpeg)) == "too_large"
    # Pillow's own limit does not count: it warns above it, and raises above twice as many.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for data in (png_of(ramp().astype(np.uint16)), jpeg_of(ramp())):
        assert decode(data).shape == (40, 48)


def test_memory_and_foreign_errors_become_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: BaseException) -> str:
        def broken(image: Any) -> np.ndarray:
            raise error

        monkeypatch.setattr(png, "to_gray", broken)
        return code_of(png_of(ramp().astype(np.uint16)))

    assert failing(MemoryError()) == "too_large"
    assert {failing(error) for error in (RecursionError(), SyntaxError("Doe^Jane"), PanicException())} == {"corrupt"}
    with pytest.raises(KeyboardInterrupt):
        failing(KeyboardInterrupt())


def test_threads_decode_the_same() -> None:
    files = [png_of(ramp()), jpeg_of(ramp()), png_of(COLOURS)]
    expected = [decode(data) for data in files] * 40
    with ThreadPoolExecutor(4) as pool:
        for image, result in zip(expected, pool.map(decode, files * 40), strict=True):
            np.testing.assert_array_equal(result, image)


def test_resize_by_hand() -> None:
    image = np.zeros((64, 64), np.uint8)
    image[:2, :2] = [[10, 20], [30, 40]]
    assert resize(image, InputSpec(size=32))[0, :2].tolist() == [25, 0]
    wide = np.zeros((64, 128), np.uint8)
    wide[:, 64:] = 200
    assert resize(wide, InputSpec(size=32, aspect="stretch")).tolist() == [[0] * 16 + [200] * 16] * 32
    for interpolation in ("area", "linear", "cubic", "lanczos"):
        flat = resize(np.full((50, 70), 123, np.uint8), InputSpec(size=96, interpolation=interpolation))
        assert np.unique(flat).tolist() == [123]
    # The same size is a copy, and a square has no other aspect.
    image = ramp(32, 32)
    same = resize(image, InputSpec(size=32, interpolation="lanczos"))
    np.testing.assert_array_equal(same, image)
    assert not np.shares_memory(same, image)
    for aspect in ("pad", "crop"):
        square = resize(ramp(77, 77), InputSpec(size=48, aspect=aspect))
        np.testing.assert_array_equal(square, resize(ramp(77, 77), InputSpec(size=48)))


@pytest.mark.parametrize(
    ("height", "width", "before", "rows"),
    [(64, 128, 8, 16), (58, 64, 1, 29), (1, 500, 15, 1)],  # an odd remainder goes below; one row is the least
)
def test_pad_centres_on_black(height: int, width: int, before: int, rows: int) -> None:
    image, expected = np.full((height, width), 200, np.uint8), [0] * before + [200] * rows + [0] * (32 - before - rows)
    assert resize(image, InputSpec(size=32, aspect="pad"))[:, 5].tolist() == expected
    assert resize(image.T, InputSpec(size=32, aspect="pad"))[5].tolist() == expected


@pytest.mark.parametrize(("longer", "start"), [(38, 3), (35, 1)])  # an odd remainder is lost at the end
def test_crop_takes_the_centre(longer: int, start: int) -> None:
    image = np.tile(np.arange(longer, dtype=np.uint8), (32, 1))
    np.testing.assert_array_equal(resize(image, InputSpec(size=32, aspect="crop"))[0], np.arange(start, start + 32))
    np.testing.assert_array_equal(resize(image.T, InputSpec(size=32, aspect="crop")).T[0], np.arange(start, start + 32))


def test_resize_refuses_other_arrays() -> None:
    shapes = [np.zeros(shape, np.uint8) for shape in ((40, 40, 3), (40,), (0, 40))]
    for image in (np.zeros((40, 40), np.uint16), [[0, 0], [0, 0]], *shapes):
        with pytest.raises(ValueError, match="image must"):
            resize(image, InputSpec())


@settings(max_examples=60, derandomize=True)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    size=st.integers(32, 100),
    aspect=st.sampled_from(["stretch", "pad", "crop"]),
    interpolation=st.sampled_from(["area", "linear", "cubic", "lanczos"]),
)
def test_resize_gives_the_requested_square(height: int, width: int, size: int, aspect: Any, interpolation: Any) -> None:
    image = ramp(height, width)[:, ::-1]  # not contiguous
    before = image.copy()
    result = resize(image, InputSpec(size=size, aspect=aspect, interpolation=interpolation))
    assert (result.shape, result.dtype) == ((size, size), np.uint8)
    assert result.flags.c_contiguous
    assert not np.shares_memory(result, image)
    np.testing.assert_array_equal(image, before)


def test_load_is_read_decode_resize(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"  # the name does not matter
    file.write_bytes(png_of(ramp(64, 64)))
    np.testing.assert_array_equal(load_image(str(file)), ramp(64, 64))
    np.testing.assert_array_equal(load_image(str(file), InputSpec(size=32)), resize(ramp(64, 64), InputSpec(size=32)))
    with pytest.raises(ImageError, match="too_large"):
        load_image(str(file), max_pixels=4095)
