"""Store documents in a PACS by C-STORE (DICOM PS3.4, annex B), at `dimse://AET@HOST:PORT`.

One association takes all documents; after an abort there is a new one. Nothing is encrypted, so the PACS must be in a
network that only the hospital reads.
"""

from __future__ import annotations

import io
import logging
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    ComprehensiveSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)

from ray_cxr.config import PacsSettings
from ray_cxr.errors import ConfigError, InputError
from ray_cxr.storage.dicomweb import DUPLICATE, Stored
from ray_cxr.storage.dicomweb_access import ProcessLimiter

SCHEME = "dimse://"
#: Seconds until a connection exists, and until a PACS has answered the request for an association.
_CONNECT_S, _ASSOCIATE_S = 10.0, 30.0
#: Wait after the first attempt, seconds; each later one is twice as long, up to the maximum.
_BACKOFF_S, _MAX_WAIT_S = 1.0, 60.0
#: Failures of C-STORE that can pass: out of resources (PS3.4, table B.2-1).
_BUSY = range(0xA700, 0xA800)
#: Diagnostics of a rejection by the service user (PS3.8, table 9-21).
_UNKNOWN_CALLING, _UNKNOWN_CALLED = 3, 7
#: A title is at most 16 characters of ASCII without control characters and backslash (PS3.5, 6.2).
_TITLE = re.compile(r"[ -\[\]-~]{1,16}")


class AssociationError(Exception):
    """No association; the text is for users. `is_temporary`: another attempt may succeed."""

    def __init__(self, message: str, *, is_temporary: bool = False) -> None:
        super().__init__(message)
        self.is_temporary = is_temporary


@dataclass(frozen=True)
class DimseAddress:
    """A PACS that speaks DIMSE."""

    title: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}{self.title}@{host}:{self.port}"


def parse_address(address: str) -> DimseAddress:
    """Return the parts of an address; raise InputError if it is not `dimse://AET@HOST:PORT`."""
    form = f"write {SCHEME}AET@HOST:PORT, such as {SCHEME}PACS@10.0.0.7:104"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        raise InputError(f"--send: not an address of a PACS; {form}") from None
    if not address.startswith(SCHEME) or not parts.hostname or not port or not parts.username:
        raise InputError(f"--send: the AE title, the host or the port is missing; {form}")
    if parts.password is not None or parts.path.strip("/") or parts.query or parts.fragment:
        raise InputError(f"--send: has more than an AE title, a host and a port; {form}")
    title = unquote(parts.username).strip()
    if not _TITLE.fullmatch(title):
        raise InputError(f"--send: the AE title must have 1 to 16 characters of ASCII, without a backslash; {form}")
    return DimseAddress(title, parts.hostname, port)


def store(address: str, documents: Iterable[bytes], settings: PacsSettings) -> Iterator[Stored]:
    """Store DICOM files, and yield what the PACS did with each, in order.

    Args:
        address: `dimse://AET@HOST:PORT`.
        documents: complete DICOM files (PS3.10), Comprehensive SR or Secondary Captures, not compressed.

    Raises:
        InputError: the address or the calling AE title is wrong. All other failures are yielded.
    """
    limiter = ProcessLimiter(1, settings.per_second)
    client = _Client(parse_address(address), settings)
    try:
        for data in documents:
            document = pydicom.dcmread(io.BytesIO(data))
            wait = _BACKOFF_S
            for attempt in range(1, settings.attempts + 1):
                with limiter.slot():
                    stored = client.send(document)
                if stored.status != "unavailable" or client.is_hopeless or attempt == settings.attempts:
                    break
                time.sleep(wait)
                wait = min(_MAX_WAIT_S, 2 * wait)
            yield stored
    finally:
        client.close()


class _Client:
    """Sends documents over an association, which it opens when one is needed.

    Attributes:
        is_hopeless: no further attempt can succeed, such as with an unknown AE title.
    """

    def __init__(self, address: DimseAddress, settings: PacsSettings) -> None:
        from pynetdicom import AE

        # Their lines repeat what a Stored states, and some quote the data set.
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL + 1)
        if not _TITLE.fullmatch(settings.calling_aet.strip()):
            raise ConfigError("pacs.calling_aet: must have 1 to 16 characters of ASCII, without a backslash")
        self.is_hopeless = False
        self._address, self._calling = address, settings.calling_aet.strip()
        self._entity = AE(ae_title=self._calling)
        self._entity.connection_timeout = min(_CONNECT_S, settings.timeout_s)
        self._entity.acse_timeout = min(_ASSOCIATE_S, settings.timeout_s)
        self._entity.dimse_timeout = self._timeout_s = settings.timeout_s
        self._entity.network_timeout = None  # a document may take long to come
        for sop_class in (ComprehensiveSRStorage, SecondaryCaptureImageStorage):
            self._entity.add_requested_context(sop_class, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        self._association: Any = None
        self._refused: set[str] = set()
        self._reason = ""
        self._message_id = 0

    def send(self, document: Dataset) -> Stored:
        uid, sop_class = str(document.SOPInstanceUID), UID(document.SOPClassUID)
        if self.is_hopeless:
            return Stored(uid, "unavailable", None, self._reason)
        try:
            if sop_class not in self._refused:
                self._open()
        except AssociationError as error:
            self._reason, self.is_hopeless = str(error), not error.is_temporary
            return Stored(uid, "unavailable", None, self._reason)
        if sop_class in self._refused:
            return Stored(uid, "refused", None, f"the PACS accepts no {sop_class.name} (presentation context refused)")
        self._message_id = self._message_id % 65_535 + 1
        try:
            with self._limit():
                answer = self._association.send_c_store(document, msg_id=self._message_id)
        except (RuntimeError, ValueError, OSError):  # the association broke before it was used
            answer = Dataset()
        if "Status" not in answer:
            self._abort()
            return Stored(uid, "unavailable", None, "the PACS broke the association, or did not answer in time")
        return _judge(uid, int(answer.Status))

    @contextmanager
    def _limit(self) -> Iterator[None]:
        """Shut the connection down after the time limit: pynetdicom's limits do not end a send to a peer that stops
        reading, and its abort waits behind all data that is still to be sent."""

        def shut_down(wrapped: Any = self._association.dul.socket) -> None:
            with suppress(OSError, AttributeError):  # it is closed already
                wrapped.socket.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self._timeout_s, shut_down)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def close(self) -> None:
        """Release the association."""
        if self._association is not None and self._association.is_established:
            with suppress(OSError, RuntimeError), self._limit():
                self._association.release()
        self._association = None

    def _abort(self) -> None:
        if self._association.is_established:
            with suppress(OSError, RuntimeError), self._limit():
                self._association.abort()
        self._association = None

    def _open(self) -> None:
        """Open an association, unless there is one; remember SOP classes that the PACS refuses."""
        if self._association is not None and self._association.is_established:
            return
        association = self._associate()
        self._refused = {str(context.abstract_syntax) for context in association.rejected_contexts}
        if association.is_established:
            self._association = association
        elif association.is_rejected:
            raise self._explain_rejection(association.acceptor.primitive)
        elif not self._refused:
            raise AssociationError(
                f"{self._address.host}:{self._address.port} does not answer as a DICOM server does (no A-ASSOCIATE); "
                "check the port, or whether it needs TLS"
            )

    def _associate(self) -> Any:
        """Return the first association for which a connection exists, established or not."""
        from pynetdicom import evt

        host, port = self._address.host, self._address.port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise AssociationError(f"the host {host} is unknown; check the name") from None
        for place in dict.fromkeys(info[4][0] for info in found):
            connected: list[Any] = []
            association = self._entity.associate(
                str(place), port, ae_title=self._address.title, evt_handlers=[(evt.EVT_CONN_OPEN, connected.append)]
            )
            if connected:
                return association
        try:
            socket.create_connection((host, port), timeout=self._entity.connection_timeout).close()
            reason = "the connection broke"
        except TimeoutError:
            reason = "no answer"
        except OSError as error:
            reason = (error.strerror or type(error).__name__).lower()
        raise AssociationError(f"{host}:{port} cannot be reached ({reason}); check host and port", is_temporary=True)

    def _explain_rejection(self, answer: Any) -> AssociationError:
        source, diagnostic = answer.result_source, answer.diagnostic
        if source == 1 and diagnostic == _UNKNOWN_CALLED:
            return AssociationError(f"the PACS has no AE title {self._address.title}; correct --send")
        if source == 1 and diagnostic == _UNKNOWN_CALLING:
            return AssociationError(
                f"the PACS does not know this program's AE title {self._calling}; register it in the PACS, or set "
                "pacs.calling_aet"
            )
        return AssociationError(
            f"the PACS rejects the association ({answer.reason_str.lower()})", is_temporary=answer.result == 2
        )


def _judge(uid: str, status: int) -> Stored:
    """Return what a status of C-STORE means (PS3.4, table B.2-1; PS3.7, annex C)."""
    from pynetdicom.status import STORAGE_SERVICE_CLASS_STATUS, code_to_category

    kind = code_to_category(status)
    if kind == "Success":
        return Stored(uid, "accepted", None, "stored")
    if status == DUPLICATE:
        return Stored(uid, "accepted", status, "the PACS has it already")
    _, meaning = STORAGE_SERVICE_CLASS_STATUS.get(status, ("", "unknown status"))
    text = f"0x{status:04X} {meaning}"
    if kind == "Warning":
        return Stored(uid, "warned", status, text)
    outcome: Literal["unavailable", "refused"] = "unavailable" if status in _BUSY else "refused"
    return Stored(uid, outcome, status, text)
