"""Verdicts of readers: `SCORES/reviews/SESSION.jsonl`, one JSON object per line, one file per session of a reader.

A session only appends to its own file, and a record is on the disk before the reader sees it accepted. So several
readers can work at once, nothing is overwritten, and a crash loses no accepted record: only the last line of a file can
be incomplete, and it lacks its line break. In a bucket, a session's file is uploaded whole with each record.

Columns of a record: `FIELDS`. Undo appends a record with the verdict `undone`; the last record of a reader on a finding
of an image counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_cxr.errors import InputError, OutputError, RayCxrError
from ray_cxr.storage import atomic, remote

REVIEWS = "reviews"
VERDICTS = ("agree", "disagree", "unsure", "undone")


@dataclass(frozen=True)
class Verdict:
    """What a reader decided on a finding of an image.

    Attributes:
        time: UTC, ISO 8601 with milliseconds.
        verdict: one of `VERDICTS`; None where the model has no flag to agree with.
        present: 1 or 0, whether the reader sees the finding; None for `unsure` and `undone`.
        flag: the model's flag, 1 or 0; None without an operating point.
        blind: the reader had not been shown the model's output for this image.
        sample: the random sample that the session showed, as text; None for all studies.
        heatmap, labels: a heat map, or the labels of a table, were visible.
    """

    session: str
    reader: str
    time: str
    model_digest: str | None
    image_id: str
    study_id: str | None
    finding: str
    verdict: str | None
    present: int | None
    flag: int | None
    blind: bool
    sample: str | None
    heatmap: bool
    labels: bool
    note: str


FIELDS = tuple(Verdict.__dataclass_fields__)


class VerdictLog:
    """The verdicts of one session, and of earlier and parallel sessions of the same reader."""

    def __init__(self, scores: Path, reader: str) -> None:
        self._folder, self.reader = scores / REVIEWS, reader
        now = datetime.now(UTC)
        self.session = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        self.path = self._folder / f"{self.session}.jsonl"
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self.count = 0
        self._size = 0
        self._descriptor: int | None = None
        self._own = [verdict for verdict in read_verdicts(scores) if verdict.reader == reader]

    def read(self) -> list[Verdict]:
        """Return the reader's records, oldest first."""
        with self._lock:
            return list(self._own)

    def append(self, verdicts: Iterable[Verdict]) -> None:
        """Write records; when this returns, they are on the disk or in the bucket.

        Raises:
            OutputError: they cannot be written; none of them counts.
        """
        verdicts = list(verdicts)
        data = b"".join(json.dumps(asdict(verdict), ensure_ascii=False).encode() + b"\n" for verdict in verdicts)
        with self._lock:
            try:
                if remote.as_store_path(self.path) is not None:
                    atomic.write_bytes(self.path, b"".join([*self._lines, data]))
                else:
                    self._append_local(data)
            except (OSError, RayCxrError) as error:  # a bucket raises the latter
                reason = getattr(error, "strerror", None) or error
                raise OutputError(
                    f"{self.path}: the verdict cannot be written: {reason}; it was not recorded"
                ) from None
            self._lines.append(data)
            self.count += len(verdicts)
            self._own.extend(verdicts)

    def _append_local(self, data: bytes) -> None:
        if self._descriptor is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            for folder in (self._folder, self._folder.parent):
                _sync_folder(folder)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError:
            # Half a line must not become part of the next record.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a new file survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_verdicts(scores: Path) -> list[Verdict]:
    """Return the records of all sessions, ordered by time.

    Raises:
        InputError: a line before the last one of a file is damaged.
    """
    folder = scores / REVIEWS
    files = sorted(folder.glob("*.jsonl")) if folder.exists() else []
    found = [verdict for path in files for verdict in _read_file(path)]
    return sorted(found, key=lambda verdict: verdict.time)


def _read_file(path: Path) -> Iterator[Verdict]:
    lines = path.read_bytes().split(b"\n")
    # The last part is empty, or a record whose writing was interrupted before it was accepted.
    for number, line in enumerate(lines[:-1], 1):
        try:
            values: dict[str, Any] = json.loads(line)
            yield Verdict(**{name: values[name] for name in FIELDS})
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: not a verdict; restore the file, or move it away") from None
