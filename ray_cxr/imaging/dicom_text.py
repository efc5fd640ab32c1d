"""Ids and other text of a DICOM header, without the loss of decoding.

Headers often declare another character set than their bytes are in. pydicom then puts a replacement character for what
it cannot decode: `MÜ-17` and `MÄ-17` in Latin-1, declared as UTF-8, become one id. Here an id that cannot be decoded is
written from its bytes, with `\\xNN` for all that are not printable ASCII: `M\\xdc-17`. A backslash separates values in
DICOM, so that no decoded id holds one, and it is written as `\\x5c` itself.
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

#: What ends up in decoded text where bytes did not fit, or must not stand in an id: control characters, as those of
#: escape sequences that are not known; backslashes; surrogates, which no table can hold; replacement characters.
_UNFIT = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff\ufffd]")
#: Padding, and what else of ASCII is blank. Not more: the last byte of UTF-8, read as Latin-1, can be a blank.
_BLANK = b" \0\t\n\v\f\r"


def read_identity(ds: Dataset, keyword: str) -> str:
    """Return an element that identifies something as text, distinct for distinct bytes; empty where there is none.

    Args:
        ds: as read from a file, this element not yet accessed.
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
    except (UnicodeError, LookupError, ValueError):  # a Python codec that is no character set, declared as one
        text = "\ufffd"
    if not _UNFIT.search(text):
        return text
    return "".join(chr(byte) if 32 <= byte < 127 and byte != 0x5C else f"\\x{byte:02x}" for byte in raw)


def writes_ascii(ds: Dataset) -> bool:
    """Whether text in ASCII stays as it is under the character set that a header declares, as in all of DICOM's."""
    encodings = ds.original_character_set
    first = encodings if isinstance(encodings, str) else encodings[0]
    try:
        return "Aa1".encode(first) == b"Aa1"
    except (UnicodeError, LookupError):
        return False


def copy_elements(ds: Dataset, tags: Iterable[str | BaseTag]) -> Dataset:
    """Return a data set with these elements of another, text byte for byte.

    Args:
        ds: as read from a file.
        tags: those that it lacks are left out. With Specific Character Set among them the bytes keep their meaning.

    Returns:
        What pydicom writes in Explicit VR Little Endian without decoding the text.
    """
    encodings = ds.original_character_set
    copied = Dataset(parent_encoding=encodings)
    for tag in map(Tag, tags):
        if tag in ds:
            copied[tag] = _copy_element(ds, tag)
    copied.set_original_encoding(False, True, encodings)
    return copied


def add_elements(ds: Dataset, copied: Dataset) -> None:
    """Add the elements of `copy_elements`, written and read again or not, to a data set whose other text is ASCII.

    The character set becomes that of the copied elements, so that pydicom writes them as they are.
    """
    ds.pop("SpecificCharacterSet", None)
    for tag in list(copied.keys()):
        ds[tag] = copied.get_item(tag)
    ds.set_original_encoding(False, True, copied.original_character_set)


def _copy_element(ds: Dataset, tag: BaseTag) -> DataElement | RawDataElement:
    """Return an element that is written with the bytes it has in the file, from any byte order and VR."""
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
