"""Send exported documents to a PACS, and record what it did with each.

    OUT/sent.parquet    `SCHEMA`: the latest answer of each destination for each document

A document that a destination accepted, also with a warning, is not sent again, unless its file has changed or all are
requested again. All others are sent by every run. The table is also written while documents are sent: after a kill, the
documents of the last seconds are sent twice, and the PACS keeps one, because UID and content are the same.

Many PACSs accept a changed file under a known UID, and keep the first. So a changed file counts as accepted only if it
can be read back; C-STORE has no way to read.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr import extras
from ray_cxr.config import PacsSettings
from ray_cxr.errors import InputError, OutputError, TableError
from ray_cxr.progress import Progress
from ray_cxr.storage import atomic, dicomweb, dimse, remote, run_folder
from ray_cxr.storage.paths import is_dicomweb

TABLE = "sent.parquet"
SCHEMA = pa.schema(
    [
        ("destination", pa.string()),
        ("sop_instance_uid", pa.string()),
        ("kind", pa.string()),  # report or heat map
        ("status", pa.string()),  # one of `STATUSES`
        ("reason", pa.int32()),  # code of the PACS, such as 0xA900; null if it gave none
        ("message", pa.string()),
        ("sha256", pa.string()),  # of the file that was sent
        ("kept_sha256", pa.string()),  # of the file that the destination is known to have; null if it has none
        ("time", pa.timestamp("s", "UTC")),
    ]
)
#: unavailable: no answer, or not tried because the PACS did not answer for others.
STATUSES = ("accepted", "warned", "refused", "unavailable")
_STORED = STATUSES[:2]
REPORT, HEAT_MAP = "report", "heat map"
_MAY_KEEP_EARLIER = "the PACS may keep the earlier version of this document"
#: Number of documents in a row without an answer after which the others are not tried.
_MAX_UNANSWERED = 3
#: Seconds between two writes of the table.
_FLUSH_S = 2.0


@dataclass(frozen=True)
class Document:
    """A file to send."""

    uid: str
    kind: str
    path: Path
    sha256: str


@dataclass
class Sent:
    """What a destination did with the documents.

    Attributes:
        counts: number of documents by kind and status, of this run.
        earlier: number of documents by kind that an earlier run stored there.
        messages: number of documents by status and message, without accepted ones.
        unsent_predecessors: number of documents that name an earlier one which is not known to be stored there.
    """

    destination: str
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    earlier: Counter[str] = field(default_factory=Counter)
    messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    unsent_predecessors: int = 0

    @property
    def total(self) -> int:
        return self.counts.total() + self.earlier.total()

    def count_lost(self) -> int:
        """Return the number of documents that are not stored."""
        return sum(count for (_, status), count in self.counts.items() if status not in _STORED)


def check_destination(address: str) -> str:
    """Return an address as the table names it; raise InputError if it is none, ConfigError if a package is missing."""
    if address.startswith(dimse.SCHEME):
        extras.require("pynetdicom", "export-sr --send")
        return str(dimse.parse_address(address))
    if is_dicomweb(address):
        dicomweb.check_root(address)
        return address.rstrip("/")
    raise InputError("--send: unknown scheme; pass dicomweb+https://HOST/ROOT or dimse://AET@HOST:PORT")


def send(out: Path, address: str, settings: PacsSettings, *, with_heatmaps: bool = False, resend: bool = False) -> Sent:
    """Send the documents in the folder of an export, and write `sent.parquet`.

    Args:
        address: `dicomweb+https://HOST/ROOT` (STOW-RS) or `dimse://AET@HOST:PORT` (C-STORE).
        with_heatmaps: also send the captures of heat maps.
        resend: also send what the destination has stored already.

    Raises:
        InputError: the address is wrong, or `out` holds no export.
        ConfigError: a setting is wrong, or a package is missing.
        OutputError: `out` cannot be written, or another command writes there.
    """
    sent = Sent(check_destination(address))
    if is_dicomweb(address):
        dicomweb.configure(settings)
    with run_folder.lock(out, "export-sr --send"):
        documents = _list_documents(out, with_heatmaps=with_heatmaps)
        record = _Record(out, sent.destination)
        stored = record.find_stored()
        pending = []
        for document in documents:
            if not resend and stored.get(document.uid) == document.sha256:
                sent.earlier[document.kind] += 1
            else:
                pending.append(document)
        sent.unsent_predecessors = _count_unsent_predecessors(out, sent.destination, pending, set(stored))
        try:
            _send_pending(sent, record, pending, address, settings)
        finally:
            record.write()
    return sent


def _send_pending(sent: Sent, record: _Record, pending: list[Document], address: str, settings: PacsSettings) -> None:
    unanswered = 0
    done = sent.earlier.total()
    with (
        Progress("send", done + len(pending), done=done, unit="documents") as progress,
        contextlib.closing(_store(address, pending, settings)) as answers,
    ):
        for number, (document, stored) in enumerate(zip(pending, answers, strict=True), 1):
            if stored.status in _STORED and record.has_other_version(document) and not _is_kept(address, document):
                stored = replace(stored, status="warned", message=_MAY_KEEP_EARLIER)
            record.add(document, stored)
            sent.counts[document.kind, stored.status] += 1
            if stored.status != "accepted":
                sent.messages[stored.status, stored.message] += 1
            progress.advance(1, f"{sent.count_lost():,} not stored")
            unanswered = unanswered + 1 if stored.status == "unavailable" else 0
            if unanswered >= _MAX_UNANSWERED and number < len(pending):
                break
        else:
            return
    message = f"not tried, after {unanswered} documents in a row without an answer"
    for document in pending[number:]:
        record.add(document, dicomweb.Stored(document.uid, "unavailable", None, message))
        sent.counts[document.kind, "unavailable"] += 1
        sent.messages["unavailable", message] += 1


def _store(address: str, documents: list[Document], settings: PacsSettings) -> Generator[dicomweb.Stored]:
    files = (document.path.read_bytes() for document in documents)
    yield from dicomweb.store(address, files) if is_dicomweb(address) else dimse.store(address, files, settings)


def _is_kept(address: str, document: Document) -> bool:
    """Return whether the destination is known to have the current version of a document."""
    return is_dicomweb(address) and dicomweb.has_version(address, document.path.read_bytes()) is True


def _list_documents(out: Path, *, with_heatmaps: bool) -> list[Document]:
    """Return the documents of an export in the order of the scores, reports first."""
    columns = [("images.parquet", "report", REPORT, out)]
    if with_heatmaps:
        columns.append(("heatmaps.parquet", "capture", HEAT_MAP, out / "heatmaps"))
    documents = []
    for table, column, kind, folder in columns:
        name = table
        try:
            if (file := remote.read_file(out / table)) is None:
                raise FileNotFoundError
            uids = list(dict.fromkeys(filter(None, pq.read_table(file, columns=[column])[column].to_pylist())))
            paths = [folder / f"{uid}.dcm" for uid in uids]
            for uid, path, file in zip(uids, paths, remote.read_files(paths), strict=True):
                name = path.name
                if file is None:
                    raise FileNotFoundError
                documents.append(Document(uid, kind, path, hashlib.sha256(file.read_buffer()).hexdigest()))
        except FileNotFoundError:
            raise InputError(f"{out}: has no {name}; remove _SUCCESS there and run export-sr again") from None
        except (OSError, KeyError, pa.ArrowException):
            raise TableError(f"{out / table}: damaged; remove it and _SUCCESS, and run export-sr again") from None
    return documents


def _count_unsent_predecessors(out: Path, destination: str, pending: list[Document], stored: set[str]) -> int:
    """Count documents that name an earlier one which neither this folder nor that of `--replaces` has stored there."""
    if not run_folder.read_json(out / "export.json").get("replacing"):
        return 0
    from ray_cxr.reporting.dicom_sr import read_documents

    if former := run_folder.read_settings(out).get("replaces"):
        stored = stored | set(_Record(remote.to_path(former), destination).find_stored())
    named = read_documents([document.path for document in pending if document.kind == REPORT])
    return sum(
        any(before.instance not in stored for before in replaced)
        for documents in named.values()
        for replaced in documents.values()
    )


class _Record:
    """The rows of `sent.parquet`, of all destinations."""

    def __init__(self, out: Path, destination: str) -> None:
        self._path, self._destination = out / TABLE, destination
        self._rows: dict[tuple[str, str], dict[str, object]] = {}
        self._is_changed, self._written_at = False, time.monotonic()
        if (file := remote.read_file(self._path)) is not None:
            try:
                rows = pq.read_table(file, schema=SCHEMA).to_pylist()
            except (OSError, ValueError, pa.ArrowException):
                raise OutputError(f"{self._path}: damaged; remove it, and all documents are sent again") from None
            self._rows = {(row["destination"], row["sop_instance_uid"]): row for row in rows}

    def find_stored(self) -> dict[str, str]:
        """Return the SHA-256 of each document that the destination has stored, by UID."""
        return {
            uid: str(row["sha256"])
            for (destination, uid), row in self._rows.items()
            if destination == self._destination and row["status"] in _STORED
        }

    def has_other_version(self, document: Document) -> bool:
        """Return whether the destination is known to have another version of a document than the current one."""
        return self._get_kept(document) not in (None, document.sha256)

    def _get_kept(self, document: Document) -> object:
        return self._rows.get((self._destination, document.uid), {}).get("kept_sha256")

    def add(self, document: Document, stored: dicomweb.Stored) -> None:
        """Add an answer, and write the table if the last write is some seconds ago."""
        is_kept = stored.status in _STORED and stored.message != _MAY_KEEP_EARLIER
        self._rows[self._destination, document.uid] = {
            "destination": self._destination,
            "sop_instance_uid": document.uid,
            "kind": document.kind,
            "status": stored.status,
            "reason": stored.reason,
            "message": stored.message or None,
            "sha256": document.sha256,
            "kept_sha256": document.sha256 if is_kept else self._get_kept(document),
            "time": datetime.datetime.now(datetime.UTC),
        }
        self._is_changed = True
        if time.monotonic() - self._written_at > _FLUSH_S:
            self.write()

    def write(self) -> None:
        if not self._is_changed:
            return
        try:
            atomic.write_parquet(pa.Table.from_pylist(list(self._rows.values()), SCHEMA), self._path)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written: {error.strerror or error}") from None
        self._is_changed, self._written_at = False, time.monotonic()
