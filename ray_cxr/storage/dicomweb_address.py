"""Check addresses of a PACS before anything is sent: `dicomweb+https://HOST[:PORT]/ROOT`.

No message quotes the query or a part of an address that can be a password, because messages end up in logs.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

from ray_cxr import labels
from ray_cxr.errors import ImageError, InputError
from ray_cxr.storage.paths import redact

_SCHEMES = {"dicomweb+https": "https", "dicomweb+http": "http"}
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_INSTANCE = re.compile(r"(?P<root>.*?)/studies/(?P<study>[^/]*)/series/(?P<series>[^/]*)/instances/(?P<instance>[^/]*)")
_TAG = re.compile(r"[0-9A-Fa-f]{8}")
#: Keys that a search for studies understands; servers ignore them, or find nothing, in a search for instances. Other
#: keys select among the instances of each study.
_STUDY_KEYWORDS = """
    StudyDate StudyTime StudyInstanceUID StudyID StudyDescription AccessionNumber ModalitiesInStudy SOPClassesInStudy
    ReferringPhysicianName PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex OtherPatientIDs
    NumberOfStudyRelatedSeries NumberOfStudyRelatedInstances
"""
_SET_BY_PROGRAM = frozenset({"limit", "offset", "includefield"})


@dataclass(frozen=True)
class Search:
    """A checked search; the query can name a patient, so it is left out of `repr`."""

    root: str  # `https://host/dicom-web`
    study_filters: dict[str, str] = field(repr=False)  # by keyword or tag
    instance_filters: dict[str, str] = field(repr=False)
    is_fuzzy: bool | None = None  # `fuzzymatching` of the query; None if it has none


def is_uid(text: object) -> bool:
    """Whether a value is a DICOM UID: components of digits, at most 64 characters."""
    return isinstance(text, str) and len(text) <= 64 and _UID.fullmatch(text) is not None


def parse_root(address: str) -> str:
    """Return the http(s) root of an address without a query; the errors are those of `parse_search`."""
    root, query = _split(address)
    if query:
        raise InputError(f"{redact(address)}: has a query; pass only dicomweb+https://HOST/ROOT")
    return root


def parse_search(address: str) -> Search:
    """Return the parts of the address of a search.

    Raises:
        InputError: The scheme is unknown, or http to another host than loopback; the address contains credentials, a
            fragment or no host; or a key of the query is no keyword or tag of DICOM, or occurs twice.
    """
    root, query = _split(address)
    shown = redact(address)
    if re.search(r"/studies(/|$)", root):
        raise InputError(f"{shown}: names a study; write dicomweb+https://HOST/ROOT?StudyInstanceUID=UID")
    studies: dict[str, str] = {}
    instances: dict[str, str] = {}
    is_fuzzy = None
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query), errors="strict")
    except ValueError:
        raise InputError(f"{shown}: the query cannot be read; write it as ?KEYWORD=VALUE&KEYWORD=VALUE") from None
    for key, value in pairs:
        if key == "fuzzymatching" and value in ("true", "false"):
            is_fuzzy = value == "true"
            continue
        filters = studies if _find_keyword(key, shown) in _STUDY_KEYWORDS.split() else instances
        if key in filters:
            raise InputError(f"{shown}: the query names {key} twice; run one search for each value")
        _check_date(key, value, shown)
        filters[key] = value
    return Search(root, studies, instances, is_fuzzy)


def _find_keyword(key: str, shown: str) -> str:
    """Return the keyword of a key of a query; `""` for a tag that has none, such as a private one."""
    from pydicom import datadict  # slow to import

    if _TAG.fullmatch(key):
        return datadict.keyword_for_tag(int(key, 16))
    if key in _SET_BY_PROGRAM:
        raise InputError(f"{shown}: the query names {key}, which this program sets; use --limit for fewer images")
    if datadict.tag_for_keyword(key) is None:
        # A long or odd key can be a value or a secret at the wrong place.
        is_word = re.fullmatch("[A-Za-z]{1,40}", key) is not None
        shown_key = f": {key!r}{labels.suggest(key, datadict.keyword_dict)}" if is_word else "; an example is StudyDate"
        raise InputError(f"{shown}: a key of the query is no DICOM keyword or 8-digit tag{shown_key}")
    return key


def _check_date(key: str, value: str, shown: str) -> None:
    """Refuse a date in another form than DICOM's (PS3.18 8.3.4 and PS3.4 C.2.2.2.5): a PACS would find nothing."""
    from pydicom import datadict

    tag = int(key, 16) if _TAG.fullmatch(key) else datadict.tag_for_keyword(key)
    if tag is None or not datadict.dictionary_has_tag(tag) or datadict.dictionary_VR(tag) != "DA":
        return
    first, dash, last = value.partition("-")
    dates = [date for date in (first, last) if date] or ([""] if dash else [])
    try:
        for date in dates:
            if not re.fullmatch("[0-9]{8}", date):
                raise ValueError
            datetime.datetime.strptime(date, "%Y%m%d")
        is_valid = not (first and last) or first <= last
    except ValueError:
        is_valid = False
    if not is_valid:
        raise InputError(f"{shown}: {key} is no DICOM date; write 20260105, 20260101-20260131, 20260101- or -20260131")


def make_instance_path(address: str, study: str, series: str, instance: str) -> str:
    """Return the path of an instance, from the address of a search and three UIDs.

    Raises:
        InputError: The address is wrong.
        ImageError: `corrupt`: a UID is longer than 64 characters or has other characters than digits and dots.
    """
    if not (is_uid(study) and is_uid(series) and is_uid(instance)):
        raise ImageError("corrupt", "a UID has other characters than digits and dots, or more than 64")
    root, _ = _split(address)
    return f"dicomweb+{root}/studies/{study}/series/{series}/instances/{instance}"


def parse_instance(path: str) -> tuple[str, str]:
    """Return the http(s) address of an instance, and its SOP Instance UID.

    Raises:
        ImageError: `missing`: the path is not one of an instance.
    """
    try:
        location, query = _split(path)
    except InputError as error:
        raise ImageError("missing", str(error).partition(": ")[2]) from None
    match = _INSTANCE.fullmatch(location)
    if query or not match or not all(map(is_uid, match.group("study", "series", "instance"))):
        raise ImageError("missing", "the address is not one of an instance: ROOT/studies/UID/series/UID/instances/UID")
    return location, match["instance"]


def _split(address: str) -> tuple[str, str]:
    """Return the http(s) root of an address, without a final `/`, and the query."""
    shown = redact(address)
    if any(char <= " " or char == "\x7f" or char == "\\" for char in address):
        raise InputError(f"{shown}: has blanks, control characters or backslashes; write them as %20 or %5C")
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise InputError(f"{shown}: not an address; write dicomweb+https://HOST[:PORT]/ROOT") from None
    scheme = _SCHEMES.get(parts.scheme)
    if scheme is None:
        raise InputError(f"{shown}: unknown scheme; write dicomweb+https://, or dicomweb+http:// for this machine")
    if "@" in address.partition("?")[0]:
        raise InputError(f"{shown}: contains credentials; remove them, and set pacs.credentials or pacs.token_file")
    if "#" in address:
        raise InputError(f"{shown}: contains a fragment; remove the part from # on, or write # as %23")
    if not host or port == 0:
        raise InputError(f"{shown}: names no host; write dicomweb+https://HOST[:PORT]/ROOT")
    if scheme == "http" and not _is_loopback(host):
        raise InputError(f"{shown}: http is for the loopback interface only; use dicomweb+https://")
    path = parts.path.rstrip("/")
    if any(part in ("", ".", "..") for part in path.split("/")[1:]) or re.search("%(2e|2f|5c)", path, re.IGNORECASE):
        raise InputError(f"{shown}: the path has an empty part, or dots; write dicomweb+https://HOST[:PORT]/ROOT")
    return f"{scheme}://{parts.netloc}{path}", parts.query


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
