"""Fetch instances of a PACS (WADO-RS, DICOM PS3.18 10.4), and hold this process's connection to it.

`stores` reads `dicomweb+https://` paths with this module, so it imports nothing that is slow.
"""

from __future__ import annotations

import email.message
import json
import os
import re
import threading
from typing import TYPE_CHECKING, Any

from ray_cxr.config import PacsSettings
from ray_cxr.errors import ImageError
from ray_cxr.storage.dicomweb_access import Access, Limiter, ProcessLimiter
from ray_cxr.storage.dicomweb_address import parse_instance
from ray_cxr.storage.paths import MAX_BYTES

if TYPE_CHECKING:
    from ray_cxr.storage.dicomweb_http import PacsSession

#: Any transfer syntax, so that the PACS sends the stored bytes and does not transcode (PS3.18 8.7.3.5.2).
_ACCEPT = 'multipart/related; type="application/dicom"; transfer-syntax=*'
JSON = "application/dicom+json"
#: Of a page of a listing, of a header, or of the answer to a document, bytes.
MAX_JSON_BYTES = 64 << 20
#: The SOP Instance UID is at the start of a file.
_HEAD = 1 << 16
#: Media Storage SOP Instance UID (0002,0003), and SOP Instance UID (0008,0018) with or without a VR and in either byte
#: order. All elements before them are short and hold no such bytes; values start after the match.
_MEDIA_UID = re.compile(rb"\x02\x00\x03\x00UI[\x00-\x40]\x00")
_DATA_UID = re.compile(
    rb"\x08\x00\x18\x00(?:UI[\x00-\x40]\x00|[\x00-\x40]\x00\x00\x00)|\x00\x08\x00\x18UI\x00[\x00-\x40]"
)
_NOT_A_FILE = "the PACS sent no DICOM file; check that the address is the root of DICOMweb"


class _Connection:
    """Settings of this process, and the session that they lead to; a forked process opens its own."""

    def __init__(self) -> None:
        self.settings, self.limiter, self.access = PacsSettings(), None, Access(PacsSettings())
        self.reset()

    settings: PacsSettings
    limiter: Limiter | None
    access: Access

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._session: PacsSession | None = None

    def open(self) -> PacsSession:
        from ray_cxr.storage.dicomweb_http import PacsSession

        with self._lock:
            if self._session is None:
                limiter = self.limiter or ProcessLimiter(self.settings.parallel, self.settings.per_second)
                self._session = PacsSession(self.settings, self.access, limiter)
            return self._session


_connection = _Connection()
os.register_at_fork(after_in_child=_connection.reset)


def configure(settings: PacsSettings, limiter: Limiter | None = None) -> None:
    """Set credentials and limits for this process, and check the files that the settings name.

    Args:
        limiter: Grants the requests of all processes of a run; None: one of this process with `settings.parallel` and
            `settings.per_second`.

    Raises:
        ConfigError: A file is missing, open to other users, or not of its kind. No message quotes the file.
    """
    access = Access(settings)
    _connection.settings, _connection.access, _connection.limiter = settings, access, limiter
    _connection.reset()


def get_settings() -> PacsSettings:
    return _connection.settings


def open_session() -> PacsSession:
    """Return the session of this process; threads share it."""
    return _connection.open()


def fetch_instance(path: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the DICOM file of one instance as the PACS has it (WADO-RS).

    The request accepts any transfer syntax (`transfer-syntax=*`), so the PACS has no reason to transcode. Nothing is
    parsed except the multipart envelope and the SOP Instance UID, which must be the one of the path.

    Raises:
        ImageError: `missing` (404, 410, or not the path of an instance), `permission` (401, 403), `too_large`, `empty`,
            or `storage` (no answer after all attempts, another answer than this DICOM file). The message omits the
            path.
    """
    url, uid = parse_instance(path)
    body, content_type = _get(url, _ACCEPT, max_bytes)
    data = _extract_file(body, content_type)
    if len(data) > max_bytes:
        raise ImageError("too_large", f"more than {max_bytes} bytes")
    if not data:
        raise ImageError("empty", "the file has 0 bytes")
    if _find_uid(data) != uid:
        raise ImageError("storage", "the PACS sent another object than the instance that was requested")
    return data


def _find_uid(data: bytes) -> str | None:
    """Return the SOP Instance UID of a DICOM file by its meta information, or else by its data set."""
    head = data[:_HEAD]
    found = (_MEDIA_UID.search(head, 132) if head[128:132] == b"DICM" else None) or _DATA_UID.search(head)
    value = re.compile(rb"[0-9.]*").match(head, found.end()) if found else None
    return value[0].decode() if value else None


def fetch_metadata(path: str) -> dict[str, Any]:
    """Return the header of one instance in the DICOM JSON model (PS3.18 F), with the errors of `fetch_instance`."""
    url, _ = parse_instance(path)
    body, _ = _get(f"{url}/metadata", JSON, MAX_JSON_BYTES)
    rows = parse_rows(body)
    if len(rows) != 1:
        raise ImageError("storage", f"the PACS sent {len(rows)} headers instead of 1")
    return rows[0]


def parse_rows(body: bytes) -> list[dict[str, Any]]:
    """Return the objects of an answer in the DICOM JSON model; the error `storage` if it is anything else."""
    try:
        rows = json.loads(body or b"[]")
    except (ValueError, RecursionError):
        rows = None
    if isinstance(rows, dict):  # some servers send one object without the list
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ImageError("storage", "the answer is not DICOM JSON; check that the address is the root of DICOMweb")
    return rows


def _get(url: str, accept: str, max_bytes: int) -> tuple[bytes, str]:
    """Return the body of an answer, and its media type."""
    from ray_cxr.storage.dicomweb_http import check_status

    # The envelope of one part is small; a larger body than this cannot hold an allowed file.
    answer = open_session().exchange("GET", url, {"Accept": accept}, max_bytes=max_bytes + _HEAD)
    check_status(answer, {401: open_session().explain_refusal(url)})
    return answer.body, answer.headers.get("Content-Type", "")


def _extract_file(body: bytes, content_type: str) -> bytes:
    """Return the one DICOM file of a `multipart/related` answer, or an answer that is the file itself."""
    header = email.message.Message()
    header["Content-Type"] = content_type
    kind = header.get_content_type()
    if kind == "application/dicom":
        return body
    boundary = header.get_boundary()
    if kind != "multipart/related" or not boundary:
        raise ImageError("storage", _NOT_A_FILE)
    parts = _find_parts(body, b"--" + boundary.encode("latin-1", "replace"))
    if len(parts) != 1:
        raise ImageError("storage", f"the PACS sent {len(parts)} files instead of 1")
    start, end = parts[0]
    blank = body.find(b"\r\n\r\n", start, end)
    found = re.search(rb"(?im)^content-type:[ \t]*([^\s;]*)", body[start : max(blank, start)])
    if blank < 0 or (found and found[1].lower() != b"application/dicom"):
        raise ImageError("storage", _NOT_A_FILE)
    return body[blank + 4 : end]


def _find_parts(body: bytes, mark: bytes) -> list[tuple[int, int]]:
    """Return start and end of the parts of a multipart body; the error `storage` if its last boundary is missing."""
    parts = []
    start = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    if start == 1:
        raise ImageError("storage", _NOT_A_FILE)
    start += len(mark)
    while body[start : start + 2] != b"--":
        end = body.find(b"\r\n" + mark, start)
        if end < 0:
            raise ImageError("storage", "the answer of the PACS ends early")
        parts.append((start, end))
        start = end + 2 + len(mark)
    return parts
