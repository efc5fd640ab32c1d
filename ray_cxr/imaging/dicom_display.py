"""Stored values of DICOM files to gray: steps 2 to 6 of the pipeline that `dicom` describes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from pydicom.sequence import Sequence

from ray_cxr.errors import ImageError
from ray_cxr.imaging import dicom_elements as elements

_ROWS_AT_ONCE = 256  # numpy widens table indices to 64 bits, which takes too much memory for a whole large image


def scale_to_8_bits(samples: np.ndarray, bits: int) -> np.ndarray:
    """Scale unsigned samples of `bits` bits to 0..255; 8 bits stay unchanged."""
    if bits == 8:
        return samples.astype(np.uint8)
    top = (1 << bits) - 1
    table = ((np.arange(top + 1) * 510 + top) // (2 * top)).astype(np.uint8)
    return _apply_table(samples, table)


def _apply_table(codes: np.ndarray, table: np.ndarray) -> np.ndarray:
    out = np.empty(codes.shape, dtype=table.dtype)
    for row in range(0, len(codes), _ROWS_AT_ONCE):
        out[row : row + _ROWS_AT_ONCE] = table[codes[row : row + _ROWS_AT_ONCE]]
    return out


def display_gray(codes: np.ndarray, ds: Any, bits: int, *, inverted: bool) -> np.ndarray:
    """Return uint8[H, W] for codes [H, W], through a table with one entry per possible stored value."""
    signed = ds.PixelRepresentation == 1
    values = np.arange(1 << bits, dtype=np.int64)
    if signed:
        values[values >= 1 << (bits - 1)] -= 1 << bits
    padding = _find_padding(ds, values, signed)
    modality = _apply_modality(ds, values, signed)
    table = _apply_voi(ds, modality, signed)
    if table is None:
        visible = modality
        if bits > 8:
            is_used = np.zeros(1 << bits, dtype=bool)
            for row in range(0, len(codes), _ROWS_AT_ONCE):
                is_used[codes[row : row + _ROWS_AT_ONCE]] = True
            visible = modality[is_used & ~padding]
        low, high = (float(visible.min()), float(visible.max())) if len(visible) else (0.0, 0.0)
        table = np.zeros(1 << bits) if high <= low else np.clip((modality - low) / (high - low), 0.0, 1.0)
    gray = np.floor(table * 255.0 + 0.5).astype(np.uint8)
    if inverted:
        gray = 255 - gray
    gray[padding] = 0
    return _apply_table(codes, gray)


def _find_padding(ds: Any, values: np.ndarray, signed: bool) -> np.ndarray:
    """Return which stored values are padding: bool, one per value."""
    if elements.read_first(ds, "PixelPaddingValue") is None:
        return np.zeros(len(values), dtype=bool)
    padding = elements.read_integer(ds, "PixelPaddingValue")
    limit = elements.read_integer(ds, "PixelPaddingRangeLimit", padding)
    low, high = sorted(_fix_sign(value, signed) for value in (padding, limit))
    return (values >= low) & (values <= high)


def _fix_sign(value: int, signed: bool) -> int:
    """Correct a header value with the wrong VR: US and SS share their bits, and writers confuse them."""
    if signed and value >= 1 << 15:
        return value - (1 << 16)
    if not signed and value < 0:
        return value + (1 << 16)
    return value


def _apply_modality(ds: Any, values: np.ndarray, signed: bool) -> np.ndarray:
    """Apply the Modality LUT or rescale (PS3.3, C.11.1): float64, one per stored value."""
    lut = _find_lut(ds, "ModalityLUTSequence", signed)
    if lut is not None:
        return lut.entries[np.clip(values - lut.first, 0, len(lut.entries) - 1)].astype(np.float64)
    slope = elements.read_float(ds, "RescaleSlope", 1.0)
    intercept = elements.read_float(ds, "RescaleIntercept", 0.0)
    if not (math.isfinite(slope) and math.isfinite(intercept)):
        raise ImageError("corrupt", "the rescale values of the DICOM file are not finite")
    return values * slope + intercept


def _apply_voi(ds: Any, modality: np.ndarray, signed: bool) -> np.ndarray | None:
    """Apply the VOI LUT or window (PS3.3, C.11.2): float64 in 0..1, one per stored value; None without either."""
    lut = _find_lut(ds, "VOILUTSequence", signed or bool(modality.min() < 0))
    if lut is not None:
        index = np.clip(np.floor(modality + 0.5) - lut.first, 0, len(lut.entries) - 1).astype(np.int64)
        return np.minimum(lut.entries[index] / ((1 << _count_bits(lut)) - 1), 1.0)
    pairs = zip(elements.read_floats(ds, "WindowCenter"), elements.read_floats(ds, "WindowWidth"), strict=False)
    window = next(((centre, width) for centre, width in pairs if centre is not None and width is not None), None)
    if window is None:
        return None
    name = elements.read_text(ds, "VOILUTFunction").upper()
    centre, width = window
    usable = width > 0 if name in _WINDOWS else width >= 1
    if not (usable and math.isfinite(centre) and math.isfinite(width)):
        return None
    return _WINDOWS.get(name, window_linear)(modality, centre, width)


def window_linear(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    """Apply PS3.3, C.11.2.1.2.1: black (0) up to c - 0.5 - (w - 1) / 2, white (1) above c - 0.5 + (w - 1) / 2."""
    if width == 1:  # a threshold without a ramp
        return (x > centre - 0.5).astype(np.float64)
    return np.clip((x - (centre - 0.5)) / (width - 1) + 0.5, 0.0, 1.0)


def window_linear_exact(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    """Apply PS3.3, C.11.2.1.3.2: black up to c - w / 2, white above c + w / 2; as 0..1."""
    return np.clip((x - centre) / width + 0.5, 0.0, 1.0)


def window_sigmoid(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    """Apply PS3.3, C.11.2.1.3.1: 1 / (1 + exp(-4 (x - c) / w)), in 0..1."""
    # Clipped, because exp overflows for larger values, which do not change the result.
    return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (x - centre) / width, -700.0, 700.0)))


_WINDOWS: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "LINEAR_EXACT": window_linear_exact,
    "SIGMOID": window_sigmoid,
}


class _Lut(NamedTuple):
    """A lookup table (PS3.3, C.11.1.1 and C.11.2.1.1)."""

    entries: np.ndarray  # int64[N], unsigned 16-bit values
    first: int  # stored value of the first entry
    bits: int  # per entry, as declared


def _find_lut(ds: Any, keyword: str, signed: bool) -> _Lut | None:
    """Return the first LUT of a sequence with a descriptor and data; some devices write items without them."""
    sequence = ds.get(keyword)
    for item in sequence if isinstance(sequence, Sequence) else ():
        descriptor = _read_descriptor(item)  # first, because pydicom needs it to convert the data
        if descriptor is not None and not elements.is_empty(item.get("LUTData")):
            return _read_lut(item.LUTData, descriptor, ds, signed)
    return None


def _read_descriptor(item: Any) -> tuple[int, int, int] | None:
    """Return the number of entries, the first value mapped and the bits per entry, as stored; None if the descriptor
    is absent or empty.
    """
    try:
        values = elements.read_values(item, "LUTDescriptor")
        if all(value is None for value in values):
            return None
        count, first, bits = (int(value) for value in values[:3])
    except Exception:  # pydicom raises its own for a length that is not a multiple of a value's
        raise ImageError("corrupt", "a LUTDescriptor of the DICOM file does not have three numbers") from None
    if not 8 <= bits <= 16:
        raise ImageError("corrupt", f"a LUTDescriptor of the DICOM file has {bits} bits per entry instead of 8 to 16")
    return count, first, bits


def _read_lut(raw: Any, descriptor: tuple[int, int, int], ds: Any, signed: bool) -> _Lut:
    count = (descriptor[0] & 0xFFFF) or 65536  # the field has 16 bits, so 65536 is written as 0
    if isinstance(raw, (bytes, bytearray)):
        little = ds.original_encoding[1] is not False
        packed = len(raw) in (count, count + count % 2)  # 8-bit entries without padding bytes
        whole = raw if packed else raw[: len(raw) // 2 * 2]
        entries = np.frombuffer(whole, dtype=np.uint8 if packed else "<u2" if little else ">u2")
    else:
        entries = np.atleast_1d(np.asarray(raw, dtype=np.int64)) & 0xFFFF
    if len(entries) < count:
        raise ImageError("corrupt", "a LUT of the DICOM file is shorter than its descriptor states")
    return _Lut(entries[:count].astype(np.int64), _fix_sign(descriptor[1], signed), descriptor[2])


def _count_bits(lut: _Lut) -> int:
    """Return the bits per entry whose largest value is white: the declared bits unless the entries contradict them.

    Some vendors declare 16 bits for entries of 12 or 14, and other viewers show such images at full brightness. Entries
    of 15 bits are a dark table of 16. Entries above the declared bits would make most of the image white. A single step
    above white is a rounding error.
    """
    largest = int(lut.entries.max())
    needed = max(8, largest.bit_length())
    if needed < lut.bits:
        return needed if needed <= 14 else lut.bits
    return needed if largest > 1 << lut.bits else lut.bits
