"""Ids in DICOM headers: undecodable ones stay distinct, and are copied byte for byte."""

from __future__ import annotations

import io
import struct
import warnings

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_cxr.imaging import dicom_text
from ray_cxr.imaging.dicom import read_tags

ONE = b"ISO_IR 6,ISO_IR 13,ISO_IR 100,ISO_IR 109,ISO_IR 166,ISO_IR 192,ISO-IR 192,ISO 2022 IR 87,GB18030,GBK,hex"
SEVERAL = rb"ISO_IR 192\ISO 2022 IR 87,\ISO 2022 IR 87,\ISO 2022 IR 149,ISO 2022 IR 6\ISO 2022 IR 87\ISO 2022 IR 159"
CHARSETS = [None, b"", b"no such term", *ONE.split(b","), *SEVERAL.split(b",")]


def element(group: int, number: int, vr: str, value: bytes, *, implicit: bool = False, big: bool = False) -> bytes:
    value += b" " * (len(value) % 2)
    order = ">" if big else "<"
    if implicit:
        return struct.pack(order + "HHI", group, number, len(value)) + value
    if vr in ("SQ", "UN"):
        return struct.pack(order + "HH2sHI", group, number, vr.encode(), 0, len(value)) + value
    return struct.pack(order + "HH2sH", group, number, vr.encode(), len(value)) + value


def header(patient: bytes, charset=b"ISO_IR 192", *, study=b"1.2.3", syntax="1.2.840.10008.1.2.1", vr="LO") -> bytes:
    """A DICOM file that ends where its pixels would start."""
    kind = {"implicit": syntax == "1.2.840.10008.1.2", "big": syntax == "1.2.840.10008.1.2.2"}
    body = b"" if charset is None else element(8, 5, "CS", charset, **kind)
    body += element(0x10, 0x20, vr, patient, **kind) + element(0x20, 0xD, "UI", study, **kind)
    for number in (0x10, 0x11):
        body += element(0x28, number, "US", struct.pack(">H" if kind["big"] else "<H", 64), **kind)
    return bytes(128) + b"DICM" + element(2, 0x10, "UI", syntax.encode() + b"\0" * (len(syntax) % 2)) + body


def patient(raw: bytes, charset: bytes | None = b"ISO_IR 192", **more: str) -> str | None:
    return read_tags(header(raw, charset, **more))["patient_id"]


def test_undecodable_ids_are_written_with_escapes() -> None:
    assert patient(b"M\xdc-17") == r"M\xdc-17"
    assert patient(b"M\xc4-17") == r"M\xc4-17"
    assert patient("MÜ-17".encode()) == "MÜ-17"
    assert patient("Ü".encode() + b"\xdc") == r"\xc3\x9c\xdc"
    # A replacement character that a file brings is the sign of an earlier loss, and stays apart as well.
    assert patient("M\ufffd-17".encode()) == r"M\xef\xbf\xbd-17"


@pytest.mark.parametrize(
    ("raw", "charset", "expected"),
    [
        (b"M\xdc-17", None, "MÜ-17"),
        (b"M\xdc-17", b"ISO_IR 100", "MÜ-17"),
        (b"M\xdc-17", b"no such term", "MÜ-17"),
        (b"M\xdc-17", b"ISO-IR 192", r"M\xdc-17"),
        (b"M\xa5-17", b"ISO_IR 109", r"M\xa5-17"),
        ("张-17".encode("gb18030"), b"GB18030", "张-17"),
        (b"\x8d\x5c-17", b"GB18030", b"\x8d\x5c".decode("gb18030") + "-17"),  # its second byte is that of a backslash
        (b"\xff-17", b"GB18030", r"\xff-17"),
        (b"\x1b$B;3\x1b(B-17", b"\\ISO 2022 IR 87", "山-17"),
        (b"\x1b$Z;3\x1b(B-17", b"\\ISO 2022 IR 87", r"\x1b$Z;3\x1b(B-17"),
        (b"\x1b$B;\x1b(B-17", b"\\ISO 2022 IR 87", r"\x1b$B;\x1b(B-17"),
        (b"\x1b$B;3\x1b(B-17", None, r"\x1b$B;3\x1b(B-17"),
        (b"HOSP\\17", b"ISO_IR 192", r"HOSP\x5c17"),
        (b"17\0\0 ", b"ISO_IR 192", "17"),
        (b" 17", b"ISO_IR 192", "17"),
        (b"1\x007", b"ISO_IR 192", r"1\x007"),
        ("Jà".encode(), None, "JÃ\xa0"),
        (b"", b"ISO_IR 192", None),
    ],
)
def test_ids_in_other_character_sets(raw: bytes, charset: bytes | None, expected: str | None) -> None:
    for syntax in ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"):
        assert patient(raw, charset, syntax=syntax) == expected
    assert patient(raw, charset, vr="SH") == patient(raw, charset, vr="UN") == expected


PAIRS = [
    (b"M\xdc-17", b"M\xc4-17"),
    (b"M\xdc\\17", b"M\xdc\\18"),
    (b"HOSP\\17", b"HOSP\\18"),
    (b"A\\xdc", b"A\xdc"),
    (b"1\x007", b"17"),
    ("Jà".encode(), "JÅ".encode()),
    (b"\x1b$Z;3-17", b"\x1b$Z;4-17"),
    (b"\x1b$B\xb0\x1b(B", b"\x1b$B\xb1\x1b(B"),
    (b"\xff\xff", b"\xfe\xff"),
]


@pytest.mark.parametrize("charset", CHARSETS)
def test_two_patients_never_become_one(charset: bytes | None) -> None:
    for one, other in PAIRS:
        assert patient(one, charset) != patient(other, charset), (one, other)
    assert len({patient(bytes([65, i, 65]), charset) for i in range(256)}) == 256


@given(st.lists(st.binary(min_size=1, max_size=6), min_size=2, max_size=2), st.sampled_from([b"ISO_IR 192", None]))
def test_ids_are_distinct_for_any_bytes(raw: list[bytes], charset: bytes | None) -> None:
    one, other = (value.strip(b" \0\t\r\n\v\f") for value in raw)
    assert (patient(one, charset) == patient(other, charset)) == (one == other)


def test_study_ids_are_distinct_too() -> None:
    studies = (b"1.2\xdc", b"1.2\xc4", b"1.2\\1", b"1.2\\2")
    assert len({read_tags(header(b"1", study=study))["study_id"] for study in studies}) == 4


def test_nothing_is_warned_of_or_logged(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        for charset in CHARSETS:
            patient(b"M\xdc\x1b$Z-17", charset)
    texts = [str(one.message) for one in caught] + [caplog.text, *capfd.readouterr()]
    assert not [text for text in texts if "M\\xdc" in text or "-17" in text]


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
def test_elements_are_copied_byte_for_byte(syntax: str) -> None:
    kind = {"implicit": syntax == "1.2.840.10008.1.2", "big": syntax == "1.2.840.10008.1.2.2"}
    item = element(0x10, 0x20, "LO", b"N\xe9-1", **kind) + element(0x10, 0x22, "CS", b"TEXT", **kind)
    order = ">" if kind["big"] else "<"
    item = struct.pack(order + "HHI", 0xFFFE, 0xE000, len(item)) + item
    data = header(b"M\xdc-17\\x", syntax=syntax)
    at = data.index(b"1.2.3") - 8
    data = data[:at] + element(0x10, 0x1002, "SQ", item, **kind) + data[at:]
    source = pydicom.dcmread(io.BytesIO(data))
    keywords = ("SpecificCharacterSet", "PatientID", "OtherPatientIDsSequence", "PatientName")
    copied = dicom_text.copy_elements(source, keywords)
    target = pydicom.Dataset()
    target.Manufacturer = "ray-cxr"
    dicom_text.add_elements(target, copied)
    written = io.BytesIO()
    target.save_as(written, implicit_vr=False, little_endian=True)
    found = pydicom.dcmread(io.BytesIO(written.getvalue()), force=True)
    assert found.get_item("PatientID").value == b"M\xdc-17\\x "
    assert found.get_item("PatientID").VR == "LO"
    (other,) = found.OtherPatientIDsSequence
    assert other.get_item("PatientID").value == b"N\xe9-1"
    assert other.TypeOfPatientID == "TEXT"
    assert (found.SpecificCharacterSet, found.Manufacturer) == ("ISO_IR 192", "ray-cxr")
    assert "PatientName" not in found
