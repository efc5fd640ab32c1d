"""Numbers and text of a DICOM header, with tolerance for absent and empty elements.

A value that is present but no number is `corrupt`: the message names the element, and quotes the value if it has only
the characters of numbers. No other number is used for it, because a guess could change pixels unnoticed.
"""

from __future__ import annotations

import math
import re
from typing import Any

from pydicom.dataelem import RawDataElement
from pydicom.multival import MultiValue

from ray_cxr.errors import ImageError

#: Header numbers that decoding needs and their values if absent or empty (PS3.3, C.7.6.3; NumberOfFrames: C.7.6.6).
_DEFAULTS = {"NumberOfFrames": 1, "PixelRepresentation": 0, "PlanarConfiguration": 0}
#: The characters of numbers, up to the 16 bytes of a Decimal String (PS3.5, 6.2); an `e` only inside a number.
_QUOTABLE = re.compile(r"(?=.{1,16}\Z)(?:[0-9.,+-]|(?<=[0-9])[eE](?=[+-]?[0-9]))+")


def read_text(ds: Any, keyword: str) -> str:
    """Return the first value of an element as text without outer blanks; empty if there is none."""
    value = next(iter(read_values(ds, keyword)), None)
    return "" if value is None else str(value).replace("\0", "").strip()


def set_defaults(ds: Any) -> None:
    """Set the header numbers that are absent or empty, because pydicom raises on them."""
    for keyword, default in _DEFAULTS.items():
        setattr(ds, keyword, read_integer(ds, keyword, default))


def is_empty(value: Any) -> bool:
    if isinstance(value, str):
        value = value.strip("\0 ")
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def read_values(ds: Any, keyword: str) -> list[Any]:
    """Return the values of an element, None for empty ones; `[None]` if the element is absent."""
    value = _get_value(ds, keyword)
    several = isinstance(value, (list, tuple, MultiValue))
    return [None if is_empty(item) else item for item in (value if several else [value])]


def read_first(ds: Any, keyword: str) -> Any:
    """Return the first value of an element that is not empty, or None."""
    return next((item for item in read_values(ds, keyword) if item is not None), None)


def read_integer(ds: Any, keyword: str, default: int | None = None) -> int:
    """Return the first value of an element as an integer, or the default; without either it is `corrupt`."""
    value = read_first(ds, keyword)
    if value is not None:
        return to_integer(value, keyword)
    if default is None:
        raise ImageError("corrupt", f"the DICOM file has no {keyword}")
    return default


def read_float(ds: Any, keyword: str, default: float) -> float:
    value = read_first(ds, keyword)
    return default if value is None else to_float(value, keyword)


def to_float(value: Any, keyword: str) -> float:
    """Convert a value of an element; text that is no finite number is `corrupt`, for example `1,5` or `nan`."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ImageError("corrupt", f"{keyword} of the DICOM file is not a number{_quote(value)}") from None
    if not math.isfinite(number):
        raise ImageError("corrupt", f"{keyword} of the DICOM file is not a finite number{_quote(value)}")
    return number


def to_integer(value: Any, keyword: str) -> int:
    number = to_float(value, keyword)
    if not number.is_integer():
        raise ImageError("corrupt", f"{keyword} of the DICOM file is not a whole number{_quote(value)}")
    return int(number)


def _get_value(ds: Any, keyword: str) -> Any:
    """Return the value of an element; the text of each value if pydicom cannot convert it to the declared type."""
    try:
        return ds.get(keyword)
    except Exception:  # pydicom and the codecs of Python raise many
        element = ds.get_item(keyword)
        if not isinstance(element, RawDataElement) or not element.value:
            raise
        return [text.strip("\0 ") for text in bytes(element.value).decode("latin-1").split("\\")]


def _quote(value: Any) -> str:
    """Return a value for a message; nothing if it has other characters, which could name a patient."""
    text = str(value)
    return f": '{text}'" if _QUOTABLE.fullmatch(text) else ""
