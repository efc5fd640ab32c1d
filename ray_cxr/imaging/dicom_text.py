"""Lossless ids and text from DICOM headers.

Headers often declare another character set than that of their bytes. pydicom then writes replacement characters:
`MÜ-17` and `MÄ-17` in Latin-1, declared as UTF-8, become the same id. An id that cannot be decoded is therefore written
from its bytes, with `\\xNN` for everything except printable ASCII: `M\\xdc-17`. DICOM separates values by backslashes,
so no decoded id has one; in such an id it is written as `\\x5c`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydicom.charset import decode_bytes
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag
from pydicom.valuerep import STR_VR, TEXT_VR_DELIMS

#: Characters that show failed decoding, or that an id may not have: control characters, which unknown escape sequences
#: leave; backslashes; surrogates, which no table can hold; replacement characters.
_UNFIT = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff\ufffd]")
#: Padding and ASCII blanks only: the last byte of UTF-8, read as Latin-1, can be another blank.
_BLANK = b" \0\t\n\v\f\r"


def read_identity(ds: Dataset, keyword: str) -> str:
    """Return an id as text, distinct for distinct bytes, empty if absent. Call it before any other access to the
    element, which would decode the bytes.
    """
    element = ds.get_item(keyword) if keyword in ds else None
    if not isinstance(element, RawDataElement) or not _is_text(element):
        value = ds.get(keyword)
        return "" if value is None else str(value).strip()
    return _decode_id((element.value or b"").strip(_BLANK), ds.original_character_set)


def _is_text(element: RawDataElement) -> bool:
    return element.VR in (None, "UN") or element.VR in STR_VR


def _decode_id(raw: bytes, encodings: Any) -> str:
    try:
        text = decode_bytes(raw, [encodings] if isinstance(encodings, str) else encodings, TEXT_VR_DELIMS)
    except (ValueError, LookupError):  # LookupError: the declared codec of Python is not a character set
        text = "\ufffd"
    if not _UNFIT.search(text):
        return text
    return "".join(chr(byte) if 32 <= byte < 127 and byte != 0x5C else f"\\x{byte:02x}" for byte in raw)


def writes_ascii(ds: Dataset) -> bool:
    """Whether the declared character set keeps ASCII unchanged, as all of DICOM's do."""
    encodings = ds.original_character_set
    first = encodings if isinstance(encodings, str) else encodings[0]
    try:
        return "Aa1".encode(first) == b"Aa1"
    except (UnicodeError, LookupError):
        return False


def copy_elements(ds: Dataset, tags: Iterable[str | BaseTag]) -> Dataset:
    """Copy elements of a data set as read from a file, text byte for byte; absent tags are left out.

    pydicom writes the result in Explicit VR Little Endian without decoding the text. Include Specific Character Set to
    keep the meaning of the bytes.
    """
    encodings = ds.original_character_set
    copied = Dataset(parent_encoding=encodings)
    for tag in map(Tag, tags):
        if tag in ds:
            copied[tag] = _copy_element(ds, tag)
    copied.set_original_encoding(False, True, encodings)
    return copied


def add_elements(ds: Dataset, copied: Dataset) -> None:
    """Add the elements of `copy_elements` to a data set whose other text is ASCII; they may have been written and read
    in between. The data set gets the character set of the copied elements, so that pydicom writes them unchanged.
    """
    ds.pop("SpecificCharacterSet", None)
    for tag in list(copied.keys()):
        ds[tag] = copied.get_item(tag)
    ds.set_original_encoding(False, True, copied.original_character_set)


def _copy_element(ds: Dataset, tag: BaseTag) -> DataElement | RawDataElement:
    """Return an element that pydicom writes with its original bytes, for any byte order and VR."""
    element = ds.get_item(tag)
    if isinstance(element, RawDataElement) and _is_text(element):
        vr = element.VR if element.VR in STR_VR else _lookup_vr(tag)
        if vr in STR_VR or vr == "UN":
            value = element.value or b""
            value += (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
            return RawDataElement(tag, vr, len(value), value, 0, False, True)
    element = ds[tag]
    if element.VR == "SQ":
        return DataElement(tag, "SQ", Sequence([copy_elements(item, item.keys()) for item in element.value]))
    return element


def _lookup_vr(tag: BaseTag) -> str:
    try:
        return dictionary_VR(tag)
    except KeyError:  # a private element
        return "UN"
