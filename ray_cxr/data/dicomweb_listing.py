"""List the radiographs that a search of a PACS finds, as a manifest (QIDO-RS, DICOM PS3.18, 10.6).

The rows are sorted by study, series, instance number and instance, so that equal answers give equal manifests. Other
objects of the studies are left out and counted by kind. So are Secondary Captures by default, because heat maps that
were stored in the PACS are some.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.data.manifest import CAPTURES, LISTING_KEY, SCHEMA, format_counts
from ray_cxr.errors import InputError
from ray_cxr.imaging.demographics import parse_sex
from ray_cxr.imaging.dicom_attributes import DEFINED_MODALITIES, DX_FOR_PROCESSING, RADIOGRAPH_MODALITIES
from ray_cxr.imaging.dicom_demographics import read_age, read_view
from ray_cxr.imaging.dicom_elements import read_text
from ray_cxr.progress import Stage
from ray_cxr.storage import dicomweb
from ray_cxr.storage.paths import redact

#: SOP Classes of radiographs (PS3.4, B.5): Computed Radiography, and Digital X-Ray for presentation.
_RADIOGRAPHS = frozenset({"1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1"})
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_PROCESSING, _UNKNOWN = "DX for processing", "of unknown kind"
#: Rows that become an Arrow batch at a time, which takes a third of the memory of Python objects.
_BATCH_ROWS = 8192
_COLUMNS = ("image_id", "path", "patient_id", "study_id", "age", "sex", "view")
_ORDER = pa.schema([*(SCHEMA.field(name) for name in _COLUMNS), ("series", pa.string()), ("number", pa.float64())])


class _Header:
    """The elements of an instance in the DICOM JSON model (PS3.18, F), as `dicom_elements` reads those of a file."""

    def __init__(self, elements: Mapping[str, Any]) -> None:
        self._elements = elements

    def get(self, keyword: str) -> list[Any] | None:
        """Return the values of an element, items of a sequence as headers; None if it is absent or of another form."""
        from pydicom.datadict import tag_for_keyword  # slow to import

        element = self._elements.get(f"{tag_for_keyword(keyword):08X}")
        values = element.get("Value") if isinstance(element, dict) else None
        if not isinstance(values, list):
            return None
        if keyword.endswith("Sequence"):
            return [_Header(item) for item in values if isinstance(item, dict)]
        return [value if isinstance(value, (str, int, float)) else None for value in values]


def list_radiographs(
    address: str,
    *,
    limit: int | None = None,
    captures: bool = False,
    replace_id: Callable[[str], str] | None = None,
    allow_empty: bool = False,
) -> pa.Table:
    """Return a manifest of the radiographs that a search finds, without labels and split.

    `image_id` is the SOP Instance UID, `study_id` the Study Instance UID. Images with the same SOP Instance UID, as
    faulty anonymisers write them, have `STUDY/SERIES/INSTANCE` as `image_id`. Other columns are null where the PACS
    sends no value. `manifest.listing_notes` describes what was left out.

    Args:
        address: of a search, `dicomweb+https://HOST/ROOT?KEYWORD=VALUE&...`.
        limit: maximum number of rows: those that the PACS sends first. The search stops there.
        captures: include Secondary Captures.
        replace_id: makes pseudonyms of patient and study ids.
        allow_empty: return no rows if the search finds no radiograph.

    Raises:
        InputError: the address is wrong, the PACS cannot be searched, or it has no radiograph for this search.
        RayCxrError: the PACS does not answer.
    """
    left_out: Counter[str] = Counter()
    gaps: Counter[str] = Counter()
    shown = f"listing images in {redact(address)}"
    with Stage(shown) as stage:
        batches: list[pa.RecordBatch] = []
        rows: list[tuple[Any, ...]] = []
        for count, row in enumerate(_iter_rows(address, left_out, gaps, captures, replace_id), 1):
            rows.append(row)
            if len(rows) == _BATCH_ROWS:
                batches.append(_to_batch(rows))
                rows.clear()
            if count % 100 == 0:
                stage.update(f"{shown}: {count:,} found")
            if count == limit:
                break
        table = pa.Table.from_batches([*batches, _to_batch(rows)])
    if not len(table) and not allow_empty:
        others = f" (left out: {format_counts(left_out + gaps)})" if left_out + gaps else ""
        raise InputError(
            f"{redact(address)}: the search finds no radiographs{others}; check its dates and other keys, and whether "
            "this account may see the studies"
        )
    order = [(name, "ascending") for name in ("study_id", "series", "number", "image_id", "path")]
    table = table.take(pc.sort_indices(table, sort_keys=order))
    table, repeats = _name_repeats(table)
    notes = json.dumps({"kinds": dict(left_out.most_common()), "gaps": dict(gaps), "repeats": repeats}, sort_keys=True)
    nulls = {field.type: pa.nulls(len(table), field.type) for field in SCHEMA}
    columns = {field.name: nulls[field.type] for field in SCHEMA} | {name: table[name] for name in _COLUMNS}
    return pa.table(columns, schema=SCHEMA.with_metadata({LISTING_KEY: notes.encode()}))


def _name_repeats(table: pa.Table) -> tuple[pa.Table, int]:
    """Replace each image_id that several rows have by `STUDY/SERIES/INSTANCE`; return the number of these rows too."""
    counts = pc.value_counts(table["image_id"])
    repeated = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    is_repeated = pc.is_in(table["image_id"], value_set=repeated)
    pattern = r"^.*/studies/([^/]+)/series/([^/]+)/instances/([^/]+)$"
    names = pc.replace_substring_regex(table["path"], pattern, r"\1/\2/\3")
    ids = pc.if_else(is_repeated, names, table["image_id"])
    count = pc.sum(is_repeated, min_count=0).as_py()
    return table.set_column(table.column_names.index("image_id"), "image_id", ids), count


def _iter_rows(
    address: str,
    left_out: Counter[str],
    gaps: Counter[str],
    captures: bool,
    replace_id: Callable[[str], str] | None,
) -> Iterator[tuple[Any, ...]]:
    """Yield a row of `_ORDER` for each radiograph, and count other objects."""
    for elements in dicomweb.search(address, gaps):
        header = _Header(elements)
        uids = [read_text(header, f"{level}InstanceUID") for level in ("Study", "Series", "SOP")]
        study, series, instance = uids
        if (kind := find_kind(header, captures)) is not None:
            left_out[kind] += 1
            continue
        patient = read_text(header, "PatientID") or None
        if replace_id is not None:
            patient, study = patient and replace_id(patient), replace_id(study)
        path = dicomweb.make_instance_path(address, *uids)
        view, sex = read_view(header), parse_sex(read_text(header, "PatientSex"))
        yield instance, path, patient, study, read_age(header), sex, view, series, _read_number(header)


def find_kind(header: Any, captures: bool) -> str | None:
    """Return the kind of an object that is not a radiograph, for example `SR`; None for a radiograph.

    Objects without a SOP Class are judged by their modality.
    """
    sop_class, modality = read_text(header, "SOPClassUID"), read_text(header, "Modality").upper()
    is_capture = sop_class == _SECONDARY_CAPTURE or sop_class.startswith(f"{_SECONDARY_CAPTURE}.")
    if is_capture and not captures:
        return CAPTURES
    if sop_class == DX_FOR_PROCESSING:
        return _PROCESSING
    is_image = sop_class in _RADIOGRAPHS or is_capture
    if modality in RADIOGRAPH_MODALITIES and (is_image or (not sop_class and modality != "SC")):
        return None
    if modality in DEFINED_MODALITIES and not (modality in RADIOGRAPH_MODALITIES and sop_class):
        return modality
    from pydicom.uid import UID, UID_dictionary

    return UID(sop_class).name if sop_class in UID_dictionary else _UNKNOWN


def _read_number(header: Any) -> float | None:
    """Return Instance Number, None if it is absent or no number."""
    try:
        return float(int(read_text(header, "InstanceNumber")))
    except (ValueError, OverflowError):
        return None


def _to_batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) or [()] * len(_ORDER)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, _ORDER, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_ORDER)
