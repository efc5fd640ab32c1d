"""Numbers and text of a DICOM header, with tolerance for absent and empty elements."""

from __future__ import annotations

from typing import Any

from pydicom.multival import MultiValue

from ray_cxr.errors import ImageError

#: Defaults of header numbers that decoding needs.
_DEFAULTS = {"NumberOfFrames": 1, "SamplesPerPixel": 1, "PixelRepresentation": 0, "PlanarConfiguration": 0}


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
    value = ds.get(keyword)
    several = isinstance(value, (list, tuple, MultiValue))
    return [None if is_empty(item) else item for item in (value if several else [value])]


def read_first(ds: Any, keyword: str) -> Any:
    """Return the first value of an element that is not empty, or None."""
    return next((item for item in read_values(ds, keyword) if item is not None), None)


def read_integer(ds: Any, keyword: str, default: int | None = None) -> int:
    """Return the first value of an element as an integer, or the default; without either it is `corrupt`."""
    value = read_first(ds, keyword)
    if value is not None:
        return int(value)
    if default is None:
        raise ImageError("corrupt", f"the DICOM file has no {keyword}")
    return default


def read_floats(ds: Any, keyword: str) -> list[float | None]:
    return [None if item is None else float(item) for item in read_values(ds, keyword)]


def read_float(ds: Any, keyword: str, default: float) -> float:
    value = read_first(ds, keyword)
    return default if value is None else float(value)
