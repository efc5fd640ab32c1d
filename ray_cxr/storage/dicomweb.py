"""Read images of a PACS, and store documents in it, over DICOMweb (DICOM PS3.18).

An address is `dicomweb+https://HOST[:PORT]/ROOT`; `dicomweb+http` is for the loopback interface only.

    dicomweb+https://host/dicom-web?StudyDate=20260101-&ModalitiesInStudy=DX      a search: `search`
    dicomweb+https://host/dicom-web/studies/S/series/E/instances/I                an instance: `fetch_instance`
    dicomweb+https://host/dicom-web                                               `store`

`configure` sets credentials and limits once per process, before the first request. Without it the defaults of
`PacsSettings` hold, which have no credentials. Nothing that is open is pickled or survives a fork.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal
from urllib.parse import urlencode

from ray_cxr.errors import ImageError, InputError, RayCxrError
from ray_cxr.storage.dicomweb_access import Unavailable
from ray_cxr.storage.dicomweb_address import Search, is_uid, make_instance_path, parse_root, parse_search
from ray_cxr.storage.dicomweb_retrieve import (
    JSON,
    MAX_JSON_BYTES,
    configure,
    fetch_instance,
    fetch_metadata,
    get_settings,
    open_session,
    parse_rows,
)
from ray_cxr.storage.paths import is_dicomweb, redact
from ray_cxr.storage.remote import map_concurrently

__all__ = [
    "DUPLICATE",
    "UNLISTED",
    "Stored",
    "check_root",
    "configure",
    "fetch_instance",
    "fetch_metadata",
    "get_text",
    "has_version",
    "is_dicomweb",
    "make_instance_path",
    "search",
    "store",
]

#: Attributes that a listing asks for, besides those that every PACS returns.
FIELDS = (
    "PatientAge",
    "PatientSex",
    "PatientBirthDate",
    "StudyDate",
    "Modality",
    "SOPClassUID",
    "InstanceNumber",
    "SeriesDescription",
    "ProtocolName",
    "AcquisitionDeviceProcessingDescription",
    "ViewPosition",
    "ViewCodeSequence",
    "PatientPosition",
    "PatientOrientation",
    "BodyPartExamined",
    "ImageType",
    "NumberOfFrames",
)
#: A listing with more instances, or studies, is an error: a server that repeats itself would never end.
MAX_LISTED = 10_000_000
#: Reason of gaps in a listing: the number of instances of a study is larger than the number of those listed.
UNLISTED = "instances that the PACS counts but does not list (raise its limit of results; Orthanc: LimitFindResults 0)"
_SOP_INSTANCE, _STUDY, _SERIES = "00080018", "0020000D", "0020000E"
_COUNT = "00201208"  # NumberOfStudyRelatedInstances
_FAILED, _FAILURE_REASON = "00081198", "00081197"
_STORED, _WARNING_REASON = "00081199", "00081196"
_REFERENCED_INSTANCE = "00081155"
#: Failure of a document whose UID the PACS has already (PS3.7, annex C.5.6), also of C-STORE.
DUPLICATE = 0x0111
_CHECK_ROOT = "check that the address is the root of DICOMweb"
#: Remedies for answers of STOW-RS.
_HINTS = {
    401: "; set pacs.credentials or pacs.token_file, or check them",
    403: "; this account may not store documents",
    404: f"; {_CHECK_ROOT}",
}
#: PS3.18 table I.2-1 and PS3.7 annex C.
_REASONS = {
    0x0110: "processing failure",
    0x0117: "invalid SOP Instance UID",
    0x0122: "SOP class not supported",
    0x0124: "not authorized",
    0xA700: "out of resources",
    0xA900: "data set does not match its SOP class",
    0xB000: "elements were coerced",
    0xB006: "elements were discarded",
    0xB007: "data set does not match its SOP class",
    0xC000: "data set cannot be understood",
    0xC122: "transfer syntax not supported",
}


@dataclass(frozen=True)
class Stored:
    """What a PACS did with one document."""

    sop_instance_uid: str
    status: Literal["accepted", "warned", "refused", "unavailable"]  # unavailable: not processed, send it again later
    reason: int | None  # warning or failure reason (PS3.18 table I.2-1), such as 0x0122; None if the PACS gave none
    message: str  # one line, without the address


def check_root(address: str) -> None:
    """Raise InputError if an address is not one to store at: `dicomweb+https://HOST/ROOT`, without a query."""
    parse_root(address)


def get_text(row: Mapping[str, Any], tag: str) -> str:
    """Return the first value of a tag in the DICOM JSON model as text; `""` if it is missing or of another kind."""
    element = row.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    value = values[0] if isinstance(values, list) and values else None
    if isinstance(value, dict):  # a person's name
        value = value.get("Alphabetic")
    return str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""


def search(address: str, gaps: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield each instance that a search finds once, in the DICOM JSON model (QIDO-RS).

    The search lists all studies page by page, then the instances of each study: PACSs ignore keys of studies, such as
    ModalitiesInStudy, when they are asked for instances. The values of a study, such as PatientID, are in its instances
    too. Keys are tags as in `"00080018"`. Study, series and SOP Instance UID are valid, and together unique; other
    values can be missing or of any type.

    Args:
        gaps: Receives the numbers by reason of objects that are not yielded: those without valid UIDs, studies that
            were deleted meanwhile, and instances that the PACS counts in a study but does not list (`UNLISTED`).

    Raises:
        InputError: The address is wrong, the PACS cannot be searched, or it reports that the listing is cut.
        RayCxrError: The PACS does not answer; a later search can succeed.
    """
    return _search(parse_search(address), redact(address), gaps)


def _search(parsed: Search, shown: str, gaps: Counter[str]) -> Iterator[dict[str, Any]]:
    listing = _Listing(parsed)
    count = 0
    try:
        # All studies before the first instance, since studies that are deleted meanwhile shift the pages. As text, they
        # take a tenth of the memory.
        studies = [json.dumps(row) for row in listing.list_studies() if _is_kept(row, [_STUDY], gaps, "studies")]
        rows = map_concurrently(listing.list_instances, map(json.loads, studies), threads=get_settings().parallel)
        for study, instances, missing in rows:
            if instances is None:
                gaps["studies that were deleted while they were listed"] += 1
            if missing:
                gaps[UNLISTED] += missing
            for row in instances or ():
                merged = {
                    **study,
                    **{tag: value for tag, value in row.items() if tag not in study or _has_value(value)},
                }
                # The path of an instance is made of the study that was asked for.
                merged[_STUDY] = study[_STUDY]
                if not _is_kept(merged, [_SERIES, _SOP_INSTANCE], gaps, "instances"):
                    continue
                count += 1
                if count > MAX_LISTED:
                    raise ImageError("storage", f"it lists more than {MAX_LISTED:,} instances; narrow the search")
                yield merged
    except Unavailable as error:
        raise RayCxrError(f"{shown}: the PACS cannot be searched: {error.message}; run the command again") from None
    except ImageError as error:
        raise InputError(f"{shown}: the PACS cannot be searched: {error.message}") from None


def _is_kept(row: Mapping[str, Any], tags: list[str], gaps: Counter[str], kind: str) -> bool:
    if all(is_uid(get_text(row, tag)) for tag in tags):
        return True
    gaps[f"{kind} without a valid UID"] += 1
    return False


def _has_value(element: Any) -> bool:
    return isinstance(element, dict) and bool(element.get("Value"))


class _Listing:
    """Runs the queries of one search."""

    def __init__(self, parsed: Search) -> None:
        self._parsed, self._page = parsed, get_settings().page

    def list_studies(self) -> Iterator[dict[str, Any]]:
        params = {**self._parsed.study_filters, "includefield": "NumberOfStudyRelatedInstances"}
        if self._parsed.is_fuzzy is not None:
            params["fuzzymatching"] = str(self._parsed.is_fuzzy).lower()
        return self._list_pages(f"{self._parsed.root}/studies", params, (_STUDY,))

    def list_instances(self, study: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]] | None, int]:
        """Return a study with its instances, and the number of instances that the PACS counts but does not list.

        The instances are None if the PACS does not have the study any more.
        """
        url = f"{self._parsed.root}/studies/{get_text(study, _STUDY)}/instances"
        params = {**self._parsed.instance_filters, "includefield": FIELDS}
        # The number spares one request per study, which would return an empty page.
        count = get_text(study, _COUNT)
        expected = int(count) if re.fullmatch("[0-9]{1,9}", count) and not self._parsed.instance_filters else None
        try:
            # In poorly anonymised studies, instances of several series can have the same UID.
            rows = list(self._list_pages(url, params, (_SERIES, _SOP_INSTANCE), expected))
        except ImageError as error:
            if error.code != "missing":
                raise
            return study, None, 0
        return study, rows, max(0, (expected or 0) - len(rows))

    def _list_pages(
        self, url: str, params: Mapping[str, Any], key: tuple[str, ...], expected: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield each object of all pages once, until a page is empty or the expected number is reached.

        Pages overlap when new images arrive. A PACS can ignore the offset and repeat its page; then the listing ends
        if the page is shorter than requested and the PACS does not report that it has more results. A PACS can also cut
        to the limit before it applies the offset (Orthanc 1.10 for some keys), so that all pages but the first are
        empty; then the limit includes the objects before the offset.
        """
        seen: set[str] = set()
        offset = 0
        has_long_limits = False
        while True:
            limit = self._page + offset if has_long_limits else self._page
            rows, has_more = _query(url, {**params, "limit": limit, "offset": offset})
            if not rows and offset >= self._page and not has_long_limits:
                has_long_limits = True
                continue
            if not rows:
                return
            new = {name: row for row in rows if (name := _name_object(row, key)) not in seen}
            if not new:
                if has_more or len(rows) >= self._page:
                    raise ImageError("storage", "it repeats the same page, so the listing would not be complete")
                return
            seen.update(new)
            if len(seen) > MAX_LISTED:
                raise ImageError("storage", f"it lists more than {MAX_LISTED:,} objects; narrow the search")
            yield from new.values()
            if len(seen) == expected and not has_more:
                return
            offset += len(rows)


def _name_object(row: Mapping[str, Any], key: tuple[str, ...]) -> str:
    """Return a text that only the same object has: its UIDs, or all values if it lacks one."""
    uids = [get_text(row, tag) for tag in key]
    return "/".join(uids) if all(uids) else json.dumps(row)


def _query(url: str, params: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """Return one page of a listing, and whether the PACS reports that it has more results (Warning 299)."""
    from ray_cxr.storage.dicomweb_http import check_status

    query = urlencode(params, doseq=True)
    answer = open_session().exchange("GET", f"{url}?{query}", {"Accept": JSON}, max_bytes=MAX_JSON_BYTES)
    remedies = {401: open_session().explain_refusal(url)}
    if url.endswith("/studies"):
        remedies |= dict.fromkeys((400, 404, 405), "check the root, such as /dicom-web in Orthanc")
    check_status(answer, remedies)
    # The same code reports that fuzzymatching is not supported, which leaves the number of results open.
    return parse_rows(answer.body), re.search(r"\b299\b", answer.headers.get("Warning", "")) is not None


def store(address: str, documents: Iterable[bytes]) -> Iterator[Stored]:
    """Store DICOM files, one request each (STOW-RS), and yield what the PACS did with each, in order.

    A document counts as stored only if the answer names its SOP Instance UID, as stored or as a duplicate (failure
    reason 0x0111). Otherwise it is read back; if it cannot be, or differs, it is unavailable.

    Args:
        address: `dicomweb+https://HOST/ROOT`.
        documents: Complete DICOM files (PS3.10).

    Raises:
        InputError: The address is wrong. All other failures are yielded.
    """
    url = f"{parse_root(address)}/studies"
    return (_store(address, url, document) for document in documents)


def has_version(address: str, document: bytes) -> bool | None:
    """Return whether the PACS has this version of a document (WADO-RS); None if it cannot be read.

    The data set is compared, without its file meta information, which a PACS may write again. A PACS that changes
    values, or the transfer syntax, has another version.

    Args:
        address: `dicomweb+https://HOST/ROOT`.
        document: A complete DICOM file (PS3.10).
    """
    from pydicom import dcmread

    header = dcmread(BytesIO(document), specific_tags=["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
    try:
        kept = fetch_instance(
            make_instance_path(address, header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID)
        )
    except ImageError:
        return None
    return _skip_meta(kept) == _skip_meta(document)


def _skip_meta(file: bytes) -> bytes:
    """Return a DICOM file without preamble and file meta information, whose length is in (0002,0000) (PS3.10, 7.1)."""
    return file[144 + int.from_bytes(file[140:144], "little") :]


def _store(address: str, url: str, document: bytes) -> Stored:
    from pydicom import dcmread

    from ray_cxr.storage.dicomweb_http import describe_status

    uid = str(dcmread(BytesIO(document), specific_tags=["SOPInstanceUID"]).SOPInstanceUID)
    mark = uuid.uuid4().hex.encode()
    body = b"--%b\r\nContent-Type: application/dicom\r\n\r\n%b\r\n--%b--\r\n" % (mark, document, mark)
    kind = f'multipart/related; type="application/dicom"; boundary={mark.decode()}'
    try:
        answer = open_session().exchange(
            "POST", url, {"Accept": JSON, "Content-Type": kind}, max_bytes=MAX_JSON_BYTES, body=body
        )
    except ImageError as error:
        return Stored(uid, "unavailable", None, error.message)
    status = describe_status(answer.status)
    if answer.status not in (200, 202, 409):
        is_refused = 400 <= answer.status < 500 and answer.status not in (401, 403, 404, 408)
        hint = _HINTS.get(answer.status, "")
        return Stored(uid, "refused" if is_refused else "unavailable", None, f"the PACS answers {status}{hint}")
    if outcome := _read_outcome(uid, answer.status, answer.body):
        return outcome
    if has_version(address, document):
        return Stored(uid, "accepted", None, "stored, read back")
    return Stored(uid, "unavailable", None, f"the answer {status} does not confirm that it is stored; {_CHECK_ROOT}")


def _read_outcome(uid: str, status: int, body: bytes) -> Stored | None:
    """Return the outcome of a document from the answer to it (PS3.18 10.5.3 and table I.2-1); None if it has none."""
    try:
        rows = parse_rows(body)
    except ImageError:
        rows = []
    failures, outcomes = _find_items(rows, _FAILED), _find_items(rows, _STORED)
    if failures or status == 409:
        failure = _find_reason(failures, _FAILURE_REASON)
        if failure == DUPLICATE and _names(failures, uid):
            return Stored(uid, "accepted", failure, "the PACS has it already")
        return Stored(uid, "refused", failure, _describe_reason(failure))
    if not _names(outcomes, uid):
        return None
    warning = _find_reason(outcomes, _WARNING_REASON)
    if warning is not None or status == 202:
        return Stored(uid, "warned", warning, _describe_reason(warning))
    return Stored(uid, "accepted", None, "stored")


def _find_items(rows: list[dict[str, Any]], sequence: str) -> list[dict[str, Any]]:
    return [
        item
        for row in rows
        if isinstance(element := row.get(sequence), dict) and isinstance(element.get("Value"), list)
        for item in element["Value"]
        if isinstance(item, dict)
    ]


def _names(items: list[dict[str, Any]], uid: str) -> bool:
    return any(get_text(item, _REFERENCED_INSTANCE) == uid for item in items)


def _find_reason(items: list[dict[str, Any]], tag: str) -> int | None:
    """Return the first reason in the items of a sequence."""
    reasons = (int(text) for item in items if re.fullmatch("[0-9]{1,5}", text := get_text(item, tag)))
    return next(reasons, None)


def _describe_reason(reason: int | None) -> str:
    if reason is None:
        return "without a reason"
    name = _REASONS.get(reason) or next((_REASONS[group] for group in (0xA700, 0xA900) if reason & 0xFF00 == group), "")
    name = name or (_REASONS[0xC000] if reason & 0xF000 == 0xC000 else "")
    return f"reason {reason:#06x}{f', {name}' if name else ''}"
