"""DICOM headers that hide an image, hold no numbers, or say that it should not be used as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from test_dicom import EXACT, INPUT, LINEAR, SYNTAXES, dataset, file_of, lut, ramp, tile, voi, window, without, written

from ray_cxr.errors import ImageError
from ray_cxr.imaging.decode import decode
from ray_cxr.imaging.dicom import decode_dicom, read_image
from ray_cxr.imaging.sandbox import DecodedImage, Decoder

U8, U16 = np.uint8, np.uint16
OUTSIDE = window(60000, 1000)
WINDOW = window(50, 100)
OWN_RANGE = [0, 26, 51, 64, 77, 128, 255]  # of `INPUT`, 0 to 200
ZEROS = voi([3, 0, 16], [0, 0, 0])


@pytest.fixture
def write_anything() -> Iterator[None]:
    """Let pydicom write values that the standard forbids."""
    before = pydicom.config.settings.writing_validation_mode
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    yield
    pydicom.config.settings.writing_validation_mode = before


#: Bits stored, header fields, first stored values, and their gray values.
HIDDEN: dict[str, tuple[int, dict[str, Any], tuple[int, ...], list[int]]] = {
    "window above the image": (12, OUTSIDE, INPUT, OWN_RANGE),
    "window below the image": (12, {**window(-60000, 1000), "RescaleIntercept": "0"}, INPUT, OWN_RANGE),
    "window above, exact": (12, {**OUTSIDE, "VOILUTFunction": "LINEAR_EXACT"}, INPUT, OWN_RANGE),
    "window above, sigmoid": (12, {**OUTSIDE, "VOILUTFunction": "SIGMOID"}, INPUT, OWN_RANGE),
    "window above, inverted": (
        12,
        {**OUTSIDE, "PhotometricInterpretation": "MONOCHROME1"},
        (0, 60, 200),
        [255, 178, 0],
    ),
    "window above 8 bits": (8, OUTSIDE, INPUT, list(INPUT)),
    "window that shows padding alone": (
        12,
        {**OUTSIDE, "PixelPaddingValue": 4000},
        (0, 4000, 60, 200),
        [0, 0, 77, 255],
    ),
    "second window": (
        12,
        {"WindowCenter": ["60000", "50"], "WindowWidth": ["1000", "100"]},
        INPUT,
        LINEAR,
    ),
    "window of no width, then another": (12, {"WindowCenter": ["5", "50"], "WindowWidth": ["0", "100"]}, INPUT, LINEAR),
    "window of no width": (12, window(50, 0), INPUT, OWN_RANGE),
    "VOI LUT of zeros": (12, ZEROS, (0, 1, 2), [0, 128, 255]),
    "VOI LUT of zeros, then a window": (12, {**ZEROS, **WINDOW}, INPUT, LINEAR),
    # A slope of 0 counts as 1, and intercept and window apply.
    "slope 0": (12, {**WINDOW, "RescaleSlope": "0", "RescaleIntercept": "0"}, INPUT, LINEAR),
    "slope 0 and an intercept": (
        12,
        {**EXACT, "RescaleSlope": "0.0", "RescaleIntercept": "-10"},
        (10, 30, 50, 60, 110),
        [0, 51, 102, 128, 255],
    ),
    "modality LUT of one value": (12, {**WINDOW, "ModalityLUTSequence": [lut([2, 0, 12], [7, 7])]}, INPUT, LINEAR),
    "modality LUT beyond the image": (
        12,
        {**WINDOW, "ModalityLUTSequence": [lut([2, 3000, 12], [0, 9])]},
        INPUT,
        LINEAR,
    ),
    "everything is padding": (12, {**WINDOW, "PixelPaddingValue": 0, "PixelPaddingRangeLimit": 4095}, INPUT, LINEAR),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_header_that_hides_the_image_is_replaced_and_flagged(name: str) -> None:
    bits, fields, stored, gray = HIDDEN[name]
    image, flags = read_image(file_of(tile(*stored, dtype=U8 if bits == 8 else U16), bits, **fields))
    assert image[0, : len(gray)].tolist() == gray
    assert flags == ("display_fallback",)


def test_header_that_shows_the_image_is_not_flagged() -> None:
    for fields in ({}, WINDOW, EXACT, voi([4, 0, 8], [0, 10, 200, 255]), {"RescaleSlope": "-1"}):
        assert read_image(file_of(tile(*INPUT), 12, **fields))[1] == ()
    # A threshold, an empty window, and a marker of 1 pixel in 1024 that the own range would show no better.
    for data in (
        file_of(tile(49, 50, 51, dtype=U8), **window(50, 1)),
        file_of(tile(*INPUT), 12, WindowCenter="", WindowWidth=None),
        file_of(tile(50, 51, dtype=U8), **window(50.5, 1)),
    ):
        assert read_image(data)[1] == ()


def test_large_image_with_nothing_but_a_marker_in_its_window_is_shown() -> None:
    image = np.tile(np.arange(300, 900, dtype=U16), (500, 1))
    image[:10, :20] = 4000  # 200 of 300,000 pixels
    found, flags = read_image(file_of(image, 12, **window(3900, 200)))
    assert flags == ("display_fallback",)
    assert found[499, [0, 300, 599]].tolist() == [0, 21, 41]  # x -> (x - 300) / 3700 * 255


def test_uniform_images_stay_blank() -> None:
    for fields in ({}, OUTSIDE, WINDOW, {"RescaleSlope": "0"}, {"PixelPaddingValue": 7}):
        with pytest.raises(ImageError, match="blank"):
            decode(file_of(tile(7), 12, **fields))


#: Keyword of an element, a value that is no number, and how the message quotes it: only the characters of numbers.
UNREADABLE = {
    "WindowCenter": ("2048,5", "'2048,5'"),
    "WindowWidth": ("MRN 00123456", ""),
    "RescaleSlope": ("1,0", "'1,0'"),
    "RescaleIntercept": ("Doe Jane 1970", ""),
    "NumberOfFrames": ("1 frame", ""),
    "Rows": ("48,0", "'48,0'"),
    "Columns": ("Doe Jane", ""),
    "BitsAllocated": ("1e", ""),
    "BitsStored": ("8.5", "'8.5'"),
    "HighBit": ("7.5", "'7.5'"),
    "SamplesPerPixel": ("AB00123456", ""),
    "PixelRepresentation": ("2e-1", "'2e-1'"),
    "PlanarConfiguration": ("?", ""),
    "PixelPaddingValue": ("-1,0", "'-1,0'"),
    "PixelPaddingRangeLimit": ("Doe^Jane", ""),
}


@pytest.mark.usefixtures("write_anything")
@pytest.mark.parametrize("keyword", UNREADABLE)
def test_unreadable_number_is_named_with_its_value(keyword: str) -> None:
    value, quoted = UNREADABLE[keyword]
    ds = dataset(ramp(), **{**WINDOW, "PixelPaddingValue": 0})
    ds[keyword] = DataElement(keyword, "LO", value)
    with pytest.raises(ImageError) as caught:
        decode_dicom(written(ds))
    expected = rf"corrupt: {keyword} of the DICOM file is not a (whole )?number" + (f": {quoted}" if quoted else "")
    assert re.fullmatch(expected, str(caught.value))


@pytest.mark.usefixtures("write_anything")
def test_numbers_of_other_types_are_read() -> None:
    for keyword, vr, value in (
        ("WindowCenter", "FD", 50.0),
        ("WindowWidth", "LO", " 1.0E2"),
        ("BitsStored", "LO", "8.0"),
        ("Rows", "UL", 32),
        ("NumberOfFrames", "DS", "1.0"),
        ("PixelPaddingValue", "SS", [200, 200]),
        ("PixelPaddingValue", "LO", "200"),
    ):
        ds = dataset(tile(*INPUT, dtype=U8), **WINDOW)
        ds[keyword] = DataElement(keyword, vr, value)
        expected = [*LINEAR[:-1], 0] if keyword == "PixelPaddingValue" else LINEAR
        assert decode_dicom(written(ds))[0, :7].tolist() == expected, (keyword, vr)


@pytest.mark.usefixtures("write_anything")
def test_second_window_that_is_not_needed_may_be_unreadable() -> None:
    ds = dataset(tile(*INPUT), 12)
    for keyword, value in (("WindowCenter", "50\\1,5"), ("WindowWidth", "100\\x")):
        ds[keyword] = DataElement(keyword, "LO", value.split("\\"))
    assert decode_dicom(written(ds))[0, :7].tolist() == LINEAR


def test_each_of_several_padding_values_is_black() -> None:
    for syntax in SYNTAXES:
        for values, gray in (([4000, 4000], [0, 0, 128, 255]), ([4000, 100], [0, 0, 0, 255]), ([], [255, 0, 33, 65])):
            data = file_of(tile(4000, 100, 600, 1100), 12, syntax, PixelPaddingValue=values)
            assert decode_dicom(data)[0, :4].tolist() == gray


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"SamplesPerPixel": 2}, "SamplesPerPixel of the DICOM file is 2, not 1 for MONOCHROME2"),
        ({"BitsAllocated": 12}, "BitsAllocated of the DICOM file is 12, not 1, 8 or 16"),
        ({"BitsStored": 20}, "BitsStored of the DICOM file is 20, not 1 to 8"),
        ({"BitsStored": 0}, "BitsStored of the DICOM file is 0, not 1 to 8"),
        ({"PixelRepresentation": 2}, "PixelRepresentation of the DICOM file is 2, not 0 or 1"),
        ({"PhotometricInterpretation": None}, "the DICOM file has no PhotometricInterpretation"),
        ({"NumberOfFrames": -1}, "NumberOfFrames of the DICOM file is -1, not 1"),
        ({"HighBit": 20}, "HighBit of the DICOM file is 20, which contradicts BitsStored 8 and BitsAllocated 8"),
        ({"HighBit": 3}, "HighBit of the DICOM file is 3, which contradicts BitsStored 8 and BitsAllocated 8"),
        ({"RescaleSlope": "nan"}, "RescaleSlope of the DICOM file is not a finite number"),
        ({"RescaleIntercept": "1e999"}, "RescaleIntercept of the DICOM file is not a finite number: '1e999'"),
        ({**WINDOW, "WindowCenter": "inf"}, "WindowCenter of the DICOM file is not a finite number"),
        ({**WINDOW, "WindowWidth": "-inf"}, "WindowWidth of the DICOM file is not a finite number"),
    ],
)
@pytest.mark.usefixtures("write_anything")
def test_impossible_number_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_dicom(file_of(ramp(), **fields))
    assert str(caught.value) == f"corrupt: {message}"


def test_colour_needs_no_samples_per_pixel_and_a_valid_planar_configuration() -> None:
    colour = np.stack([ramp()] * 3, axis=-1)
    for keyword in ("SamplesPerPixel", "PlanarConfiguration"):
        np.testing.assert_array_equal(decode_dicom(without(dataset(colour), keyword)), ramp())
    with pytest.raises(ImageError, match="PlanarConfiguration of the DICOM file is 5, not 0 or 1"):
        decode_dicom(file_of(colour, PlanarConfiguration=5))


def test_modality_dr_is_a_radiograph() -> None:
    for modality in ("DR", "XR"):
        np.testing.assert_array_equal(decode_dicom(file_of(ramp(), Modality=modality)), ramp())


def test_image_for_processing_is_refused() -> None:
    raw = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.1.1"}
    for fields in ({"PresentationIntentType": "FOR PROCESSING"}, raw):
        with pytest.raises(ImageError, match=r"not_a_radiograph: .*FOR PROCESSING.*FOR PRESENTATION"):
            decode_dicom(file_of(ramp(), **fields))
    decode_dicom(file_of(ramp(), **raw, PresentationIntentType="FOR PRESENTATION"))


def region(meaning: str) -> dict[str, list[Dataset]]:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "1", "SCT", meaning
    return {"AnatomicRegionSequence": [item]}


OTHER_PART, BURNED_IN = ("not_frontal_chest",), ("burned_in_annotation",)


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"BodyPartExamined": "KNEE"}, OTHER_PART),
        ({"BodyPartExamined": "hands"}, OTHER_PART),
        ({"BodyPartExamined": "L SHOULDER AP"}, OTHER_PART),
        ({"BodyPartExamined": "PELVIS"}, OTHER_PART),
        ({"BodyPartExamined": "ABDOMEN"}, OTHER_PART),
        ({"BodyPartExamined": "CHEST"}, ()),
        ({"BodyPartExamined": "CHEST_ABDOMEN"}, ()),
        ({"BodyPartExamined": "PORT CHEST"}, ()),
        ({"BodyPartExamined": "RIBS"}, ()),
        ({"BodyPartExamined": "BRUSTKORB"}, ()),
        ({"BodyPartExamined": ""}, ()),
        (region("Knee"), OTHER_PART),
        (region("Cervical spine"), OTHER_PART),
        (region("Thorax"), ()),
        ({**region("Knee"), "BodyPartExamined": "CHEST"}, ()),
        ({"AnatomicRegionSequence": []}, ()),
        ({"QualityControlImage": "YES"}, OTHER_PART),
        ({"BurnedInAnnotation": "YES"}, BURNED_IN),
        ({"BurnedInAnnotation": "NO"}, ()),
        ({"BodyPartExamined": "SKULL", "BurnedInAnnotation": "YES"}, OTHER_PART + BURNED_IN),
    ],
)
def test_attributes_that_flag(fields: dict[str, Any], flags: tuple[str, ...]) -> None:
    image, found = read_image(file_of(ramp(), **fields))
    assert found == flags
    np.testing.assert_array_equal(image, ramp())


UPRIGHT = ramp()
ORIENTATIONS = {
    r"L\F": UPRIGHT,
    r"R\F": UPRIGHT[:, ::-1],
    r"L\H": UPRIGHT[::-1],
    r"R\H": UPRIGHT[::-1, ::-1],
    r"F\L": UPRIGHT.T,
    r"F\R": UPRIGHT[:, ::-1].T,
    r"H\L": UPRIGHT[::-1].T,
    r"H\R": UPRIGHT[::-1, ::-1].T,
    r"RA\FP": UPRIGHT[:, ::-1],
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_frontal_image_is_put_upright_by_its_patient_orientation(orientation: str) -> None:
    stored = np.ascontiguousarray(ORIENTATIONS[orientation])
    image, flags = read_image(file_of(stored, PatientOrientation=orientation.split("\\")))
    np.testing.assert_array_equal(image, UPRIGHT)
    assert image.flags.c_contiguous
    assert flags == (() if orientation == r"L\F" else ("reoriented",))


@pytest.mark.parametrize("orientation", ["A\\F", "P\\F", "", "R", "R\\L", "R\\", "X\\Y", "R\\F\\H"])
def test_other_patient_orientations_change_nothing(orientation: str) -> None:
    image, flags = read_image(file_of(UPRIGHT, PatientOrientation=orientation.split("\\")))
    np.testing.assert_array_equal(image, UPRIGHT)
    assert flags == ()


@pytest.mark.usefixtures("write_anything")
@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"PixelAspectRatio": ["2", "1"]}, (96, 40)),
        ({"PixelAspectRatio": ["1", "2"]}, (48, 80)),
        ({"PixelAspectRatio": ["1", "1"]}, (96, 80)),
        ({"ImagerPixelSpacing": ["0.4", "0.2"]}, (96, 40)),
        ({"PixelSpacing": ["0.2", "0.2"], "PixelAspectRatio": ["1", "2"]}, (96, 80)),
        ({"PixelSpacing": ["0.143", "0.1431"]}, (96, 80)),
        ({"PixelSpacing": ["0,1", "0.2"]}, (96, 80)),
        ({"PixelSpacing": ["0", "0"], "NominalScannedPixelSpacing": ["0.2", "0.4"]}, (48, 80)),
        ({"PixelAspectRatio": ["9", "1"]}, (96, 80)),  # impossible
        ({"PixelAspectRatio": ["", "2"]}, (96, 80)),
    ],
)
def test_pixels_become_square(fields: dict[str, list[str]], shape: tuple[int, int]) -> None:
    ds = dataset(np.kron(ramp(), np.ones((2, 2), U8)))
    for keyword, value in fields.items():
        ds[keyword] = DataElement(keyword, "LO", value)
    image, flags = read_image(written(ds))
    assert (image.shape, flags) == (shape, ())
    # Every second row or column is a copy of the one before it.
    np.testing.assert_array_equal(image[:: shape[0] // 48, :: shape[1] // 40], ramp())


def test_flags_come_with_the_image_of_a_child_process(tmp_path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(file_of(ramp(), PatientOrientation=["R", "F"], BurnedInAnnotation="YES"))
    with Decoder([None]) as decoder:
        found = decoder.load(str(path))
    assert isinstance(found, DecodedImage)
    assert found.flags == ("burned_in_annotation", "reoriented")
    np.testing.assert_array_equal(found.images[0], ramp()[:, ::-1])
