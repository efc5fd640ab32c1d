"""Damaged files for the decoders and `score`: each must give an image or an error code, and one row.

Sources are generated PNG, JPEG and DICOM files of every supported kind, and a few real ones from ../shared if it
exists. A file depends only on the seed and its number: `mutated(seed, number)`.
"""

from __future__ import annotations

import functools
import io
import random
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).with_name("imaging")))
import test_dicom

SHARED = Path(__file__).resolve().parents[2] / "shared"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
UIDS = "1.2.840.10008.1.2"


class Seed(NamedTuple):
    name: str
    suffix: str
    data: bytes


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@functools.cache
def generated() -> tuple[Seed, ...]:
    """Return images with gradients, noise and a black border, which use every PNG filter and JPEG table."""
    noise = np.random.default_rng(0).integers(0, 9, (72, 64))
    gray = (np.arange(72)[:, None] * 2 + np.arange(64)[None, :] + noise).astype(np.uint8)
    gray[:4] = gray[:, :4] = 0
    whole = Image.fromarray(gray)
    rgb = Image.fromarray(np.stack([gray, gray[::-1], 255 - gray], axis=-1))
    wide = gray.astype(np.uint16) * 16
    frame = saved(whole, "JPEG", quality=90)
    j2k = saved(whole, "JPEG2000", no_jp2=True, irreversible=False)
    eight, sixteen = test_dicom.golden(np.uint8), test_dicom.golden(np.uint16)
    window = {"WindowCenter": "1000", "WindowWidth": "2000", "RescaleSlope": "1"}
    files = {
        "gray.png": saved(whole, "PNG"),
        "rgb.png": saved(rgb, "PNG"),
        "rgba.png": saved(rgb.convert("RGBA"), "PNG"),
        "gray_alpha.png": saved(whole.convert("LA"), "PNG"),
        "palette.png": saved(rgb.quantize(16), "PNG"),
        "16_bit.png": saved(Image.fromarray(wide), "PNG"),
        "1_bit.png": saved(whole.point(lambda value: 255 * (value > 90)).convert("1"), "PNG"),
        "text.png": saved(whole, "PNG", dpi=(72, 72), exif=b"Exif\0\0" + bytes(20)),
        "gray.jpg": frame,
        "colour.jpg": saved(rgb, "JPEG"),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True),
        "cmyk.jpg": saved(rgb.convert("CMYK"), "JPEG"),
        "restart.jpg": saved(whole, "JPEG", restart_marker_blocks=4),
        "8_bit.dcm": test_dicom.file_of(gray),
        "12_bit.dcm": test_dicom.file_of(wide, 12, **window),
        "rgb.dcm": test_dicom.file_of(np.asarray(rgb)),
        "implicit.dcm": test_dicom.file_of(wide, 12, UIDS),
        "big_endian.dcm": test_dicom.file_of(wide, 12, f"{UIDS}.2"),
        "deflated.dcm": test_dicom.file_of(wide, 12, f"{UIDS}.1.99"),
        "jpeg.dcm": test_dicom.encapsulated(gray, f"{UIDS}.4.50", frame),
        "jpeg_2000.dcm": test_dicom.encapsulated(gray, f"{UIDS}.4.90", j2k),
        "rle.dcm": test_dicom.compressed(wide, f"{UIDS}.5"),
        "jpeg_ls.dcm": test_dicom.encapsulated(eight, f"{UIDS}.4.80", test_dicom.LS_8),
        "jpeg_ls_16.dcm": test_dicom.encapsulated(sixteen, f"{UIDS}.4.80", test_dicom.LS_16),
        "lossless.dcm": test_dicom.encapsulated(eight, f"{UIDS}.4.70", test_dicom.LOSSLESS_8),
        "lossless_16.dcm": test_dicom.encapsulated(sixteen, f"{UIDS}.4.57", test_dicom.LOSSLESS_16),
    }
    return tuple(Seed(name.replace(".", "_"), name[-3:], data) for name, data in files.items())


@functools.cache
def real() -> tuple[Seed, ...]:
    paths = sorted(SHARED.glob("nih/images256/*.png"))[::60]
    paths += sorted(SHARED.glob("nih/images1024/*.png"))[:1] + sorted(SHARED.glob("dicom/*.dcm"))
    return tuple(Seed(f"real_{path.stem}", path.suffix[1:], path.read_bytes()) for path in paths)


def flip(data: bytearray, draw: random.Random) -> bytearray:
    # Half of the changes hit the headers at the start.
    end = len(data) if draw.random() < 0.5 else min(len(data), 600)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        data[draw.randrange(end)] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
    return data


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def replace(data: bytearray, draw: random.Random) -> bytearray:
    """Delete, insert, repeat or clear some bytes."""
    at, length = draw.randrange(len(data)), draw.choice((1, 4, 64, 4096))
    old = data[at : at + length]
    data[at : at + length] = draw.choice((b"", draw.randbytes(length) + old, old + old, bytes(len(old))))
    return data


def splice(data: bytearray, draw: random.Random) -> bytearray:
    """Join two files, at any place or after the headers."""
    other = draw.choice(generated()).data
    if draw.random() < 0.5:
        return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]
    length = draw.choice((2, 8, 33, 132, 300))
    return bytearray(other[:length]) + data[length:]


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return type and contents of all chunks of a PNG."""
    found, at = [], len(PNG_MAGIC)
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    return found


def png(parts: list[tuple[bytes, bytes]]) -> bytearray:
    """Write a PNG with valid checksums, so that the damage reaches the decoder."""
    out = bytearray(PNG_MAGIC)
    for kind, body in parts:
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def png_header(data: bytearray, draw: random.Random) -> bytearray:
    parts = chunks(bytes(data))
    values = list(struct.unpack(">IIBBBBB", parts[0][1]))
    which = draw.randrange(7)
    sizes = (0, 1, 31, values[0] + 1, values[1] - 1, 9_000, 65_536, 2**31 - 1, 2**32 - 1)
    values[which] = draw.choice(sizes if which < 2 else (0, 1, 2, 3, 4, 6, 8, 16, 255))
    return png([(b"IHDR", struct.pack(">IIBBBBB", *values)), *parts[1:]])


def png_pixels(data: bytearray, draw: random.Random) -> bytearray:
    """Damage the compressed stream, or the rows inside it."""
    parts = chunks(bytes(data))
    stream = b"".join(body for kind, body in parts if kind == b"IDAT")
    if draw.random() < 0.5:
        changed = bytes(flip(bytearray(stream), draw))
    else:
        rows = bytearray(zlib.decompress(stream))
        changed = zlib.compress(draw.choice((flip, cut, replace))(rows, draw), draw.choice((0, 1, 9)))
    *others, end = [part for part in parts if part[0] != b"IDAT"]
    at = draw.randrange(len(changed) + 1)
    return png([*others, (b"IDAT", changed[:at]), (b"IDAT", changed[at:]), end])


def png_chunks(data: bytearray, draw: random.Random) -> bytearray:
    """Repeat, move, rename or insert a chunk, or give it a wrong length."""
    parts = chunks(bytes(data))
    at, to, change = draw.randrange(len(parts)), draw.randrange(len(parts)), draw.randrange(5)
    if change == 0:
        parts.insert(to, parts[at])
    elif change == 1:
        parts.insert(to, parts.pop(at))
    elif change == 2:
        parts[at] = (draw.choice((b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fdAT", b"ABCD", b"IEND")), parts[at][1])
    elif change == 3:
        parts.insert(to, (draw.choice((b"iCCP", b"zTXt", b"tRNS", b"PLTE", b"eXIf")), draw.randbytes(30)))
    else:
        start, length = len(png(parts[:at])), len(parts[at][1])
        wrong = draw.choice((0, length + 1, max(0, length - 1), 2**31 - 1, 2**31, 2**32 - 1))
        return data[:start] + struct.pack(">I", wrong) + data[start + 4 :]
    return png(parts)


def jpeg_segment(data: bytearray, draw: random.Random) -> bytearray:
    """Change a length, a table or the frame header of a JPEG, in a file or inside a DICOM."""
    start = data.find(b"\xff\xd8\xff")
    found, at = [], start + 2
    while start >= 0 and at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((at, length))
        at += 2 + length
    if not found:
        return flip(data, draw)
    at, length = draw.choice(found)
    if draw.random() < 0.3:
        data[at + 2 : at + 4] = struct.pack(">H", draw.choice((0, 1, 2, length - 1 & 0xFFFF, length + 1, 0xFFFF)))
    else:
        for _ in range(draw.choice((1, 3))):
            data[min(at + 4 + draw.randrange(max(1, length - 2)), len(data) - 1)] = draw.randrange(256)
    return data


#: Group 0028: samples, photometric, planar, frames, rows, columns, bits, padding, window, rescale and LUTs.
IMAGE_TAGS = (2, 4, 6, 8, 0x10, 0x11, 0x100, 0x101, 0x102, 0x103, 0x120, 0x1050, 0x1051, 0x1052, 0x1053, 0x3000, 0x3010)
TAGS = (*((0x28, element) for element in IMAGE_TAGS), (0x08, 0x60), (0x02, 0x00), (0x02, 0x10), (0x7FE0, 0x10))
SYNTAXES = ("", ".1", ".2", ".1.99", ".5", *(f".4.{end}" for end in (50, 51, 57, 70, 80, 81, 90, 91)))


def dicom_element(data: bytearray, draw: random.Random) -> bytearray:
    """Change the type, length or value of an element that describes the pixels."""
    present = [at for tag in TAGS if (at := data.find(struct.pack("<HH", *tag))) > 0]
    if not present:
        return flip(data, draw)
    offset, values = draw.choice(
        (
            (4, (b"US", b"SS", b"OW", b"OB", b"SQ", b"UN", b"DS", b"??")),
            (6, (0, 1, 2, 3, 4, 255, 0xFFFE, 0xFFFF)),
            (8, (0, 1, 2, 7, 8, 12, 15, 16, 17, 32, 255, 0x7FFF, 0xFFFF)),
        )
    )
    value, at = draw.choice(values), draw.choice(present) + offset
    data[at : at + 2] = value if isinstance(value, bytes) else struct.pack("<H", value)
    return data


def dicom_syntax(data: bytearray, draw: random.Random) -> bytearray:
    """Declare another transfer syntax than that of the pixels."""
    at = data.find(b"\x02\0\x10\0UI")
    if at < 0:
        return flip(data, draw)
    length = int.from_bytes(data[at + 6 : at + 8], "little")
    uid = f"{UIDS}{draw.choice(SYNTAXES)}".encode()
    uid += b"\0" * (len(uid) % 2)
    data[at + 6 : at + 8 + length] = struct.pack("<H", len(uid)) + uid
    return data


Mutation = Callable[[bytearray, random.Random], bytearray]
BLIND: tuple[Mutation, ...] = (flip, cut, replace, splice)
OWN: dict[str, tuple[Mutation, ...]] = {
    "png": (png_header, png_pixels, png_pixels, png_chunks),
    "jpg": (jpeg_segment, jpeg_segment),
    "dcm": (dicom_element, dicom_element, dicom_syntax, jpeg_segment),
}


def mutated(seed: int, number: int, *, with_real: bool = True) -> tuple[str, bytes]:
    """Return name and contents of one damaged file."""
    draw = random.Random(f"{seed}/{number}")
    source = draw.choice(real() if with_real and real() and draw.random() < 0.1 else generated())
    mutations = [draw.choice(BLIND + OWN[source.suffix])]
    if draw.random() < 0.2:
        mutations.append(draw.choice((flip, replace, cut)))
    data = bytearray(source.data)
    for mutation in mutations:
        data = mutation(data, draw) if data else data
    name = "_".join([f"{number:06d}", source.name, *(mutation.__name__ for mutation in mutations)])
    return f"{name}.{source.suffix}", bytes(data)
