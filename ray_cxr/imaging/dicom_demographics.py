"""Age and view from the elements of a DICOM header; of the dates, only the age is returned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ray_cxr.errors import ImageError
from ray_cxr.imaging.demographics import compute_age, parse_age
from ray_cxr.imaging.dicom_elements import read_text, read_values
from ray_cxr.imaging.pixels import decoder_errors
from ray_cxr.imaging.views import choose_view, parse_view, parse_view_code, parse_view_text

#: Elements with free text that devices use for the view, after those that DICOM defines for it: Fujifilm writes it into
#: the first. The last two describe a series, which can hold several images.
_TEXTS = ("AcquisitionDeviceProcessingDescription", "SeriesDescription", "ProtocolName")
#: The body's axes by the first letter of a direction, in which `A` is anterior, `L` left and `H` the head.
_AXES = {"A": "depth", "P": "depth", "L": "width", "R": "width", "H": "height", "F": "height"}


def read_age(ds: Any) -> float | None:
    """Return Patient's Age in years, or the age on the study date, or None if both are unknown or impossible."""
    age = parse_age(read_text(ds, "PatientAge"))
    return age if age is not None else compute_age(read_text(ds, "PatientBirthDate"), read_text(ds, "StudyDate"))


def read_view(ds: Any) -> str | None:
    """Return the view by the first element that names one (`views`), or None.

    The order is View Position, View Code Sequence, Patient Position (in some converted archives PA or AP), Patient
    Orientation if lateral, `_TEXTS`, and Patient Orientation if frontal, which can be a default of the device.
    """
    return choose_view(_list_views(ds))


def _list_views(ds: Any) -> Iterator[str | None]:
    yield parse_view(read_text(ds, "ViewPosition"))
    with contextlib.suppress(ImageError), decoder_errors("DICOM"):  # a damaged sequence names no view
        for item in ds.get("ViewCodeSequence") or ():
            yield parse_view_code(read_text(item, "CodeValue")) or parse_view_text(read_text(item, "CodeMeaning"))
    yield parse_view_text(read_text(ds, "PatientPosition"))
    plane = _read_plane(ds)
    yield plane if plane == "LATERAL" else None
    for keyword in _TEXTS:
        yield parse_view_text(read_text(ds, keyword))
    yield plane


def _read_plane(ds: Any) -> str | None:
    """Return LATERAL or FRONTAL by Patient Orientation, the main directions of rows and columns (C.7.6.1.1.1)."""
    axes = {_AXES.get(str(value)[:1]) for value in read_values(ds, "PatientOrientation") if value is not None}
    return "LATERAL" if axes == {"depth", "height"} else "FRONTAL" if axes == {"width", "height"} else None
