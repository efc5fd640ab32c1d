"""One reader's session: the studies, what the reader decided, and what may be shown to this reader."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ray_cxr.data import identity
from ray_cxr.data.boxes import read_boxes
from ray_cxr.errors import InputError
from ray_cxr.labels import NO_FINDING
from ray_cxr.review.index import ReviewIndex
from ray_cxr.review.verdicts import Verdict, VerdictLog

#: Longest note, characters.
MAX_NOTE = 2000
ImageBox = tuple[str, float, float, float, float]


@dataclass(frozen=True)
class Decision:
    """A request to record a verdict, checked against the index.

    `finding` None means all findings of the image without a decision. One of `verdict` and `present` is set, except for
    `unsure`, which is a verdict.
    """

    row: int
    finding: str | None
    verdict: str | None
    present: int | None
    note: str
    heatmap: bool
    labels: bool

    @classmethod
    def parse(cls, body: Any, index: ReviewIndex, findings: Sequence[str]) -> Decision:
        """Check the JSON body of `POST /verdicts`.

        Raises:
            InputError: a value is missing or has another type or range.
        """
        if not isinstance(body, dict):
            raise InputError("the body must be a JSON object")
        row, finding, verdict, present = (body.get(name) for name in ("row", "finding", "verdict", "present"))
        if type(row) is not int or not 0 <= row < len(index.ids):
            raise InputError(f"row: must be an integer from 0 to {len(index.ids) - 1}")
        if not index.ok[row]:
            raise InputError("row: the image could not be read, so there is nothing to decide")
        if finding is not None and finding not in findings:
            raise InputError(f"finding: must be one of {', '.join(findings)}, or null for all that are undecided")
        if (verdict is None) == (present is None):
            raise InputError("pass either verdict (agree, disagree, unsure) or present (1, 0)")
        if verdict is not None and verdict not in ("agree", "disagree", "unsure"):
            raise InputError("verdict: must be agree, disagree or unsure")
        if present is not None and (type(present) is not int or present not in (0, 1)):
            raise InputError("present: must be 1 or 0")
        note = body.get("note", "")
        if not isinstance(note, str) or len(note) > MAX_NOTE:
            raise InputError(f"note: must be text of at most {MAX_NOTE:,} characters")
        visible = [body.get(name, False) for name in ("heatmap", "labels")]
        if not all(isinstance(value, bool) for value in visible):
            raise InputError("heatmap, labels: must be true or false")
        return cls(row, finding, verdict, present, note, *visible)


def read_image_boxes(index: ReviewIndex, path: str) -> dict[int, list[ImageBox]]:
    """Return the boxes of a CSV table per row: finding, then left, top, width and height as fractions of the image.

    Raises:
        InputError: the table is damaged, or has no image of the run.
    """
    boxes = read_boxes(path)
    rows = identity.find_ids(boxes.image_ids, index.ids.to_pylist())
    if not (rows >= 0).any():
        raise InputError(f"--boxes {path}: has no image of {index.scores}; compare their image_id")
    found: dict[int, list[ImageBox]] = {}
    for row, finding, edges in zip(rows.tolist(), boxes.findings, boxes.xywh / boxes.image_side, strict=True):
        if row >= 0:
            found.setdefault(row, []).append((finding, *map(float, edges)))
    return found


class ReviewSession:
    """What one reader sees and decides.

    Attributes:
        index: the studies.
        findings: the findings to decide on, without `No_Finding`.
        is_blind: the model's output of an image is hidden until the reader has decided on every finding of it.
        sample: describes the random sample that the index holds; None for all studies.
        boxes: per row, boxes that the page shows on request, see `read_image_boxes`.
    """

    def __init__(
        self,
        index: ReviewIndex,
        log: VerdictLog,
        *,
        is_blind: bool = False,
        sample: str | None = None,
        boxes: Mapping[int, Sequence[ImageBox]] | None = None,
    ) -> None:
        self.index, self._log, self.is_blind, self.sample = index, log, is_blind, sample
        self.boxes = boxes or {}
        self.findings = tuple(name for name in index.findings if name != NO_FINDING)
        self.reader = log.reader
        self._lock = threading.RLock()
        n = len(index.ids)
        self._current: dict[tuple[int, str], Verdict] = {}
        self.decided = np.zeros(n, dtype=bool)
        self.reviewed = np.zeros(n, dtype=bool)
        self._revealed = np.zeros(n, dtype=bool)
        self._undo: list[list[tuple[int, str, Verdict | None]]] = []
        earlier = log.read()
        known = index.ids.to_pylist() if earlier else []
        rows = identity.find_ids([v.image_id for v in earlier], known)
        for verdict, row in zip(earlier, rows, strict=True):
            if row >= 0 and verdict.finding in self.findings:
                self._apply(int(row), verdict)

    @property
    def path(self) -> Path:
        """Return the file of this session's verdicts."""
        return self._log.path

    def close(self) -> int:
        """Close the file of verdicts; return the number of this session's records."""
        self._log.close()
        return self._log.count

    def is_hidden(self, row: int) -> bool:
        """Return whether the model's output of an image must not be shown yet."""
        return self.is_blind and bool(self.index.ok[row]) and not bool(self._revealed[row])

    def get_verdicts(self, row: int) -> dict[str, Verdict]:
        """Return the reader's current verdict of each finding of an image that has one."""
        with self._lock:
            found = {name: self._current.get((row, name)) for name in self.findings}
        return {name: verdict for name, verdict in found.items() if verdict is not None}

    def decide(self, decision: Decision) -> list[Verdict]:
        """Record a decision and return its records.

        Raises:
            InputError: the model has no flag to agree with, or nothing is left to decide.
            OutputError: the records cannot be written.
        """
        with self._lock:
            row, current = decision.row, self.get_verdicts(decision.row)
            names = [decision.finding] if decision.finding else [name for name in self.findings if name not in current]
            if not names:
                raise InputError("every finding of this image has a verdict already")
            hidden = self.is_hidden(row)
            if hidden and decision.verdict in ("agree", "disagree"):
                raise InputError("the model is hidden: pass present (1, 0), or the verdict unsure")
            records = [self._build(decision, name, hidden) for name in names]
            before = [(row, name, current.get(name)) for name in names]
            self._log.append(records)
            self._undo.append(before)
            for record in records:
                self._apply(row, record)
            return records

    def undo(self) -> list[tuple[int, str, Verdict | None]]:
        """Take back the last decision of this session: append what counts again, or `undone`.

        Returns:
            Row, finding and the verdict that counts now; empty if there is nothing to undo.
        """
        with self._lock:
            if not self._undo:
                return []
            before = self._undo[-1]
            records = []
            for row, name, earlier in before:
                undone = Decision(row, name, "undone", None, "", False, False)
                record = self._build(undone, name, self.is_hidden(row))
                if earlier is not None:
                    record = Verdict(**{**vars(earlier), "session": record.session, "time": record.time})
                records.append(record)
            self._log.append(records)
            self._undo.pop()
            for (row, _, _), record in zip(before, records, strict=True):
                self._apply(row, record)
            return before

    def _build(self, decision: Decision, finding: str, hidden: bool) -> Verdict:
        index, row = self.index, decision.row
        value = int(index.flags[finding][row]) if finding in index.flags else -1
        flag = None if value < 0 else value
        verdict, present = decision.verdict, decision.present
        if verdict in ("agree", "disagree"):
            if flag is None:
                raise InputError(f"{finding}: has no operating point, so the model has no flag; pass present (1, 0)")
            present = flag if verdict == "agree" else 1 - flag
        elif present is not None:
            verdict = None if flag is None else "agree" if present == flag else "disagree"
        return Verdict(
            session=self._log.session,
            reader=self.reader,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            model_digest=index.digests.get(row),
            image_id=index.ids[row].as_py(),
            study_id=index.studies[row].as_py(),
            finding=finding,
            verdict=verdict,
            present=present,
            flag=flag,
            blind=hidden,
            sample=self.sample,
            heatmap=decision.heatmap and not hidden,
            labels=decision.labels,
            note=decision.note,
        )

    def _apply(self, row: int, verdict: Verdict) -> None:
        """Let a record count, which was written already."""
        key = (row, verdict.finding)
        if verdict.verdict == "undone":
            self._current.pop(key, None)
        else:
            self._current[key] = verdict
        names = [name for name in self.findings if (row, name) in self._current]
        self.reviewed[row], self.decided[row] = bool(names), len(names) == len(self.findings)
        # Undo does not make a reader forget what was shown.
        self._revealed[row] |= self.decided[row] or not verdict.blind
