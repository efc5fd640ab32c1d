"""Stored values of DICOM files to gray: steps 2 to 6 of the pipeline that `dicom` describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from pydicom.sequence import Sequence

from ray_cxr.errors import ImageError
from ray_cxr.imaging import dicom_elements as elements

_SAMPLE_SIDE = 128  # rows and columns, at least, of the pixels that decide whether a window shows the image
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


def display_gray(codes: np.ndarray, ds: Any, bits: int, *, inverted: bool) -> tuple[np.ndarray, bool]:
    """Return uint8[H, W] for codes [H, W], through a table with one entry per possible stored value, and whether a
    value of the header that hides the image was replaced.
    """
    signed = ds.PixelRepresentation == 1
    values = np.arange(1 << bits, dtype=np.int64)
    if signed:
        values[values >= 1 << (bits - 1)] -= 1 << bits
    padding = _find_padding(ds, values, signed)
    rows, columns = (max(1, side // _SAMPLE_SIDE) for side in codes.shape)
    everything = codes[::rows, ::columns].ravel()
    sample = everything[~padding[everything]]
    replaced = not len(sample)
    if replaced:
        padding[:], sample = False, everything
    modality, is_replaced = _apply_modality(ds, values, signed, sample)
    replaced |= is_replaced
    gray, is_replaced = _choose_gray(ds, modality, sample, signed)
    replaced |= is_replaced
    if gray is None:
        visible = modality
        if bits > 8:
            is_used = np.zeros(1 << bits, dtype=bool)
            for row in range(0, len(codes), _ROWS_AT_ONCE):
                is_used[codes[row : row + _ROWS_AT_ONCE]] = True
            visible = modality[is_used & ~padding]
        gray = _scale_to_range(modality, visible)
    if inverted:
        gray = 255 - gray
    gray[padding] = 0
    return _apply_table(codes, gray), replaced


def _choose_gray(ds: Any, modality: np.ndarray, sample: np.ndarray, signed: bool) -> tuple[np.ndarray | None, bool]:
    """Return the table of the first VOI LUT or window that shows the sampled codes, uint8, one per stored value. It is
    None if the image's own range has to be used. Also return whether a VOI LUT or window was skipped.

    In a uniform image nothing can be shown, and the first VOI LUT or window is used.
    """
    first: np.ndarray | None = None
    skipped = False
    for table in _iter_voi_tables(ds, modality, signed):
        if table is not None:
            gray = np.floor(table * 255.0 + 0.5).astype(np.uint8)
            if _shows(gray, sample):
                return gray, skipped
            first = gray if first is None else first
        skipped = True
    if first is not None and not _shows(_scale_to_range(modality, modality[sample]), sample):
        return first, False
    return None, skipped


def _shows(gray: np.ndarray, sample: np.ndarray) -> bool:
    """Whether the sampled codes do not all have one gray, apart from 1 in 1000, such as those of a marker."""
    counts = np.bincount(gray[sample])
    return bool(counts.max() < 0.999 * len(sample))


def _scale_to_range(modality: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Scale the range of the visible values to 0..255: uint8, one per stored value."""
    low, high = (float(visible.min()), float(visible.max())) if len(visible) else (0.0, 0.0)
    table = np.zeros(len(modality)) if high <= low else np.clip((modality - low) / (high - low), 0.0, 1.0)
    return np.floor(table * 255.0 + 0.5).astype(np.uint8)


def _find_padding(ds: Any, values: np.ndarray, signed: bool) -> np.ndarray:
    """Return which stored values are padding: bool, one per value. Every value of Pixel Padding Value counts."""
    keyword = "PixelPaddingValue"
    starts = [elements.to_integer(item, keyword) for item in elements.read_values(ds, keyword) if item is not None]
    padding = np.zeros(len(values), dtype=bool)
    for start in starts:
        limit = elements.read_integer(ds, "PixelPaddingRangeLimit", start)
        low, high = sorted(_fix_sign(value, signed) for value in (start, limit))
        padding |= (values >= low) & (values <= high)
    return padding


def _fix_sign(value: int, signed: bool) -> int:
    """Correct a header value with the wrong VR: US and SS share their bits, and writers confuse them."""
    if signed and value >= 1 << 15:
        return value - (1 << 16)
    if not signed and value < 0:
        return value + (1 << 16)
    return value


def _apply_modality(ds: Any, values: np.ndarray, signed: bool, sample: np.ndarray) -> tuple[np.ndarray, bool]:
    """Apply the Modality LUT or rescale (PS3.3, C.11.1): float64, one per stored value.

    A slope of 0 counts as 1, as in DCMTK, and a LUT with one output for all sampled codes as none. Also return whether
    one of them was replaced.
    """
    lut = _find_lut(ds, "ModalityLUTSequence", signed)
    if lut is not None:
        outputs = lut.entries[np.clip(values - lut.first, 0, len(lut.entries) - 1)].astype(np.float64)
        if np.ptp(outputs[sample]) > 0 or np.ptp(sample) == 0:
            return outputs, False
        return values.astype(np.float64), True
    slope = elements.read_float(ds, "RescaleSlope", 1.0)
    intercept = elements.read_float(ds, "RescaleIntercept", 0.0)
    return values * (slope or 1.0) + intercept, slope == 0.0


def _iter_voi_tables(ds: Any, modality: np.ndarray, signed: bool) -> Iterator[np.ndarray | None]:
    """Yield the result of the VOI LUT, then of each window (PS3.3, C.11.2): float64 in 0..1, one per stored value;
    None for a window with a forbidden width.
    """
    lut = _find_lut(ds, "VOILUTSequence", signed or bool(modality.min() < 0))
    if lut is not None:
        index = np.clip(np.floor(modality + 0.5) - lut.first, 0, len(lut.entries) - 1).astype(np.int64)
        yield np.minimum(lut.entries[index] / ((1 << _count_bits(lut)) - 1), 1.0)
    name = elements.read_text(ds, "VOILUTFunction").upper()
    keywords = ("WindowCenter", "WindowWidth")
    for pair in zip(*(elements.read_values(ds, keyword) for keyword in keywords), strict=False):
        if None not in pair:
            centre, width = map(elements.to_float, pair, keywords)
            usable = width > 0 if name in _WINDOWS else width >= 1
            yield _WINDOWS.get(name, window_linear)(modality, centre, width) if usable else None


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
