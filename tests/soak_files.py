"""Damaged files by the thousand, for `ray-cxr score --images OUT`: every one must become a row.

    python tests/soak_files.py OUT --files 10000 --seed 0

Seeds are generated PNG, JPEG and DICOM files of every kind that is read, and a few real ones from ../shared where
that is at hand. A file depends on the seed and its number alone, so one that breaks something can be made again:
`--only 1234` writes that one.
"""

from __future__ import annotations

import argparse
import functools
import io
import random
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).with_name("data")))
import test_dicom

SHARED = Path(__file__).resolve().parents[2] / "shared"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


class Seed(NamedTuple):
    name: str
    suffix: str
    data: bytes


def picture(height: int = 72, width: int = 64) -> np.ndarray:
    """uint8[H, W] with slopes, noise and a black border, so that every PNG filter and JPEG table is used."""
    noise = np.random.default_rng(0).integers(0, 9, (height, width))
    image = (np.arange(height)[:, None] * 2 + np.arange(width)[None, :] + noise).astype(np.uint8)
    image[:4] = image[:, :4] = 0
    return image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@functools.cache
def generated() -> tuple[Seed, ...]:
    gray = picture()
    whole = Image.fromarray(gray)
    rgb = Image.fromarray(np.stack([gray, gray[::-1], 255 - gray], axis=-1))
    wide = gray.astype(np.uint16) * 16
    frame = saved(whole, "JPEG", quality=90)
    j2k = saved(whole, "JPEG2000", no_jp2=True, irreversible=False)
    rle = test_dicom.dataset(wide, 12)
    rle.compress("1.2.840.10008.1.2.5")
    eight, sixteen = test_dicom.golden(np.uint8), test_dicom.golden(np.uint16)
    pngs = {
        "gray": saved(whole, "PNG"),
        "rgb": saved(rgb, "PNG"),
        "rgba": saved(rgb.convert("RGBA"), "PNG"),
        "gray_alpha": saved(whole.convert("LA"), "PNG"),
        "palette": saved(rgb.quantize(16), "PNG"),
        "16_bit": saved(Image.fromarray(wide), "PNG"),
        "1_bit": saved(whole.point(lambda value: 255 * (value > 90)).convert("1"), "PNG"),
        "text": saved(whole, "PNG", dpi=(72, 72), exif=b"Exif\0\0" + bytes(20)),
    }
    jpegs = {
        "gray": frame,
        "colour": saved(rgb, "JPEG"),
        "progressive": saved(rgb, "JPEG", progressive=True),
        "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "restart": saved(whole, "JPEG", restart_marker_blocks=4),
    }
    dicoms = {
        "8_bit": test_dicom.file_of(gray),
        "12_bit": test_dicom.file_of(wide, 12, WindowCenter="1000", WindowWidth="2000", RescaleSlope="1"),
        "rgb": test_dicom.file_of(np.asarray(rgb)),
        "implicit": test_dicom.file_of(wide, 12, "1.2.840.10008.1.2"),
        "big_endian": test_dicom.file_of(wide, 12, "1.2.840.10008.1.2.2"),
        "deflated": test_dicom.file_of(wide, 12, "1.2.840.10008.1.2.1.99"),
        "jpeg": test_dicom.encapsulated(gray, "1.2.840.10008.1.2.4.50", frame),
        "jpeg_2000": test_dicom.encapsulated(gray, "1.2.840.10008.1.2.4.90", j2k),
        "rle": test_dicom.written(rle),
        "jpeg_ls": test_dicom.encapsulated(eight, "1.2.840.10008.1.2.4.80", test_dicom.LS_8),
        "jpeg_ls_16": test_dicom.encapsulated(sixteen, "1.2.840.10008.1.2.4.80", test_dicom.LS_16),
        "lossless": test_dicom.encapsulated(eight, "1.2.840.10008.1.2.4.70", test_dicom.LOSSLESS_8),
        "lossless_16": test_dicom.encapsulated(sixteen, "1.2.840.10008.1.2.4.57", test_dicom.LOSSLESS_16),
    }
    return tuple(
        Seed(f"{suffix}_{name}", suffix, data)
        for suffix, group in (("png", pngs), ("jpg", jpegs), ("dcm", dicoms))
        for name, data in group.items()
    )


@functools.cache
def real() -> tuple[Seed, ...]:
    """Small NIH files, one large one and the DICOM files of ../shared; none where that is not at hand."""
    paths = sorted(SHARED.glob("nih/images256/*.png"))[::60]
    paths += sorted(SHARED.glob("nih/images1024/*.png"))[:1] + sorted(SHARED.glob("dicom/*.dcm"))
    return tuple(Seed(f"real_{path.stem}", path.suffix[1:], path.read_bytes()) for path in paths)


# ---------------------------------------------------------------- blind to the format


def flipped(data: bytearray, draw: random.Random) -> bytearray:
    # Half of the time near the start, where the headers are.
    end = len(data) if draw.random() < 0.5 else min(len(data), 600)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        data[draw.randrange(end)] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
    return data


def cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data))]


def hole(data: bytearray, draw: random.Random) -> bytearray:
    at, length = draw.randrange(len(data)), draw.choice((1, 4, 64, 4096))
    kind = draw.randrange(4)
    if kind == 0:
        del data[at : at + length]
    elif kind == 1:
        data[at:at] = draw.randbytes(length)
    elif kind == 2:
        data[at:at] = data[at : at + length]
    else:
        data[at : at + length] = bytes(len(data[at : at + length]))
    return data


def spliced(data: bytearray, draw: random.Random) -> bytearray:
    other = draw.choice(generated()).data
    return data[: draw.randrange(len(data))] + other[draw.randrange(len(other)) :]


def other_head(data: bytearray, draw: random.Random) -> bytearray:
    other = draw.choice(generated()).data
    length = draw.choice((2, 8, 33, 132, 300))
    return bytearray(other[:length]) + data[length:]


# ---------------------------------------------------------------- PNG


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Type and contents of the chunks of a whole PNG."""
    found, at = [], len(PNG_MAGIC)
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    return found


def png(parts: list[tuple[bytes, bytes]]) -> bytearray:
    """A PNG whose checksums are right, so that what is wrong in it reaches the decoder."""
    out = bytearray(PNG_MAGIC)
    for kind, body in parts:
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


def png_header(data: bytearray, draw: random.Random) -> bytearray:
    parts = chunks(bytes(data))
    values = list(struct.unpack(">IIBBBBB", parts[0][1]))
    which = draw.randrange(7)
    sizes = (0, 1, 31, values[0] + 1, values[1] - 1, 9_000, 65_536, 2**31 - 1, 2**32 - 1)
    values[which] = draw.choice(sizes) if which < 2 else draw.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    parts[0] = (b"IHDR", struct.pack(">IIBBBBB", *values))
    return png(parts)


def png_pixels(data: bytearray, draw: random.Random) -> bytearray:
    """Damage below right checksums: to the compressed stream, or to the rows inside it."""
    parts = chunks(bytes(data))
    stream = b"".join(body for kind, body in parts if kind == b"IDAT")
    if draw.random() < 0.5:
        changed = bytes(flipped(bytearray(stream), draw))
    else:
        rows = bytearray(zlib.decompress(stream))
        changed = zlib.compress(draw.choice((flipped, cut, hole))(rows, draw), draw.choice((0, 1, 9)))
    others = [part for part in parts if part[0] != b"IDAT"]
    at = draw.randrange(len(changed) + 1)
    return png([*others[:-1], (b"IDAT", changed[:at]), (b"IDAT", changed[at:]), others[-1]])


def png_chunks(data: bytearray, draw: random.Random) -> bytearray:
    parts = chunks(bytes(data))
    at, to = draw.randrange(len(parts)), draw.randrange(len(parts))
    kind = draw.randrange(5)
    if kind == 0:
        parts.insert(to, parts[at])
    elif kind == 1:
        parts.insert(to, parts.pop(at))
    elif kind == 2:
        del parts[at]
    elif kind == 3:
        parts[at] = (draw.choice((b"IDAT", b"PLTE", b"tRNS", b"acTL", b"fdAT", b"ABCD", b"IEND")), parts[at][1])
    else:
        parts.insert(to, (draw.choice((b"iCCP", b"zTXt", b"tRNS", b"PLTE", b"eXIf")), draw.randbytes(30)))
    return png(parts)


def png_length(data: bytearray, draw: random.Random) -> bytearray:
    at = len(PNG_MAGIC)
    for _ in range(draw.randrange(len(chunks(bytes(data))))):
        at += int.from_bytes(data[at : at + 4], "big") + 12
    length = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = struct.pack(">I", draw.choice((0, length + 1, max(0, length - 1), 2**31 - 1, 2**31, 2**32 - 1)))
    return data


# ---------------------------------------------------------------- JPEG and DICOM


def jpeg_segment(data: bytearray, draw: random.Random) -> bytearray:
    """A length, a table or the frame header of a JPEG, in a file or inside a DICOM."""
    start = data.find(b"\xff\xd8\xff")
    found, at = [], start + 2
    while start >= 0 and at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((at, length))
        at += 2 + length
    if not found:
        return flipped(data, draw)
    at, length = draw.choice(found)
    if draw.random() < 0.3:
        data[at + 2 : at + 4] = struct.pack(">H", draw.choice((0, 1, 2, length - 1 & 0xFFFF, length + 1, 0xFFFF)))
    else:
        for _ in range(draw.choice((1, 3))):
            data[min(at + 4 + draw.randrange(max(1, length - 2)), len(data) - 1)] = draw.randrange(256)
    return data


#: Rows, Columns, samples, bits, frames, photometric, planar, window, rescale, padding, LUTs, pixel data.
TAGS = (
    (0x28, 0x10), (0x28, 0x11), (0x28, 0x02), (0x28, 0x100), (0x28, 0x101), (0x28, 0x102), (0x28, 0x103),
    (0x28, 0x08), (0x28, 0x04), (0x28, 0x06), (0x28, 0x1050), (0x28, 0x1051), (0x28, 0x1052), (0x28, 0x1053),
    (0x28, 0x120), (0x28, 0x3000), (0x28, 0x3010), (0x08, 0x60), (0x02, 0x00), (0x02, 0x10), (0x7FE0, 0x10),
)  # fmt: skip
SYNTAXES = tuple(
    f"1.2.840.10008.1.2{end}"
    for end in ("", ".1", ".2", ".1.99", ".5", ".4.50", ".4.51", ".4.57", ".4.70", ".4.80", ".4.81", ".4.90", ".4.91")
)


def dicom_element(data: bytearray, draw: random.Random) -> bytearray:
    """The kind, the length or the value of an element that says how pixels are to be read."""
    present = [at for tag in TAGS if (at := data.find(struct.pack("<HH", *tag))) > 0]
    if not present:
        return flipped(data, draw)
    at = draw.choice(present)
    kind = draw.randrange(4)
    if kind == 0:
        data[at + 4 : at + 6] = draw.choice((b"US", b"SS", b"OW", b"OB", b"SQ", b"UN", b"DS", b"??"))
    elif kind == 1:
        data[at + 6 : at + 8] = struct.pack("<H", draw.choice((0, 1, 2, 3, 4, 255, 0xFFFE, 0xFFFF)))
    else:
        data[at + 8 : at + 10] = struct.pack(
            "<H", draw.choice((0, 1, 2, 7, 8, 12, 15, 16, 17, 32, 255, 0x7FFF, 0xFFFF))
        )
    return data


def dicom_syntax(data: bytearray, draw: random.Random) -> bytearray:
    """Another transfer syntax than the one in which the pixel data are."""
    at = data.find(b"\x02\0\x10\0UI")
    if at < 0:
        return flipped(data, draw)
    length = int.from_bytes(data[at + 6 : at + 8], "little")
    uid = draw.choice(SYNTAXES).encode()
    uid += b"\0" * (len(uid) % 2)
    data[at + 6 : at + 8 + length] = struct.pack("<H", len(uid)) + uid
    return data


Mutation = Callable[[bytearray, random.Random], bytearray]
BLIND: tuple[Mutation, ...] = (flipped, cut, hole, spliced, other_head)
OWN: dict[str, tuple[Mutation, ...]] = {
    "png": (png_header, png_pixels, png_pixels, png_chunks, png_length),
    "jpg": (jpeg_segment, jpeg_segment),
    "dcm": (dicom_element, dicom_element, dicom_syntax, jpeg_segment),
}


def mutated(seed: int, number: int, *, with_real: bool = True) -> tuple[str, bytes]:
    """Name and contents of one damaged file."""
    draw = random.Random(f"{seed}/{number}")
    seeds = real() if with_real and real() and draw.random() < 0.1 else generated()
    source = draw.choice(seeds)
    mutation = draw.choice(BLIND + OWN[source.suffix])
    data = mutation(bytearray(source.data), draw)
    names = [mutation.__name__]
    if draw.random() < 0.2 and data:
        again = draw.choice((flipped, hole, cut))
        data = again(data, draw)
        names.append(again.__name__)
    return f"{number:06d}_{source.name}_{'_'.join(names)}.{source.suffix}", bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of the one file to write")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    size, kinds = 0, Counter()
    for number in range(arguments.files) if arguments.only is None else [arguments.only]:
        name, data = mutated(arguments.seed, number)
        (arguments.out / name).write_bytes(data)
        size += len(data)
        kinds[Path(name).suffix] += 1
    print(f"{sum(kinds.values())} files, {size / 1e6:.0f} MB: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))


if __name__ == "__main__":
    main()
