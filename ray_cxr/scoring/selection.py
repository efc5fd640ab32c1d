"""Choose which rows of a manifest or listing are scored, before they are frozen as the input of a run.

    listing -> one frontal image per study (`score.select`) -> images without earlier scores (`--skip-scored`) -> input

Both need facts that a listing can lack. They are read from DICOM headers and files here, in decoder processes, and only
for the rows that need them; the input keeps its columns as they were. The counts are kept in the metadata of the input.
"""

from __future__ import annotations

import json
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from ray_cxr import costs
from ray_cxr.errors import RETRYABLE_CODES, ConfigError, ImageError
from ray_cxr.imaging.demographics import count_of
from ray_cxr.imaging.sandbox import Decoder, Failure
from ray_cxr.imaging.views import parse_view
from ray_cxr.progress import Progress
from ray_cxr.scoring.actors import make_pseudonym
from ray_cxr.scoring.earlier import DIGEST, UID, EarlierScores
from ray_cxr.scoring.reader import ImageSource, iter_sources
from ray_cxr.storage.paths import file_name, find_instance_uid, is_dicomweb
from ray_cxr.storage.remote import map_concurrently

#: Entry in the metadata of the frozen input.
KEY = b"ray_cxr.selection"
#: Frontal views, the preferred first, and views that are frontal in an unusual position.
_FRONTAL, _UNUSUAL = ("PA", "AP", "FRONTAL"), ("AXIAL", "DECUBITUS")
#: Files with these suffixes have no DICOM header.
_WITHOUT_HEADER = (".png", ".jpg", ".jpeg")
_MAX_READERS = 8


@dataclass
class Selection:
    """Counts of the listed images that are not scored, and why.

    Attributes:
        listed: number of images before the selection.
        select: the setting score.select.
        not_selected: number of images that score.select left out, by reason.
        unknown_view: number of images that it kept although no view is known, and of their studies.
        studies_without_frontal: number of studies of which it left out all images.
        skip_scored: the folders whose images were left out.
        by_uid, by_digest: number of images that have scores there, by what was equal.
        failed_before: number of images that failed there and would fail again, by error code.
        retried: number of images that are scored again because their earlier error can pass.
    """

    listed: int
    select: str = "all"
    not_selected: dict[str, int] = field(default_factory=dict)
    unknown_view: tuple[int, int] = (0, 0)
    studies_without_frontal: int = 0
    skip_scored: list[str] = field(default_factory=list)
    by_uid: int = 0
    by_digest: int = 0
    failed_before: dict[str, int] = field(default_factory=dict)
    retried: int = 0

    def to_metadata(self) -> dict[bytes, bytes]:
        return {KEY: json.dumps(asdict(self)).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None) -> Selection | None:
        """Return the selection that made an input; None if there was none."""
        found = (metadata or {}).get(KEY)
        return None if found is None else cls(**json.loads(found))

    def list_lines(self) -> list[str]:
        """Return sentences about the images that are not scored."""
        lines = []
        if self.select != "all":
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.not_selected.items())
            left_out = sum(self.not_selected.values())
            lines.append(
                f"left out by score.select={self.select}: {left_out:,} of {count_of(self.listed, 'image')}"
                + (f" ({reasons})" if reasons else "")
            )
            if self.studies_without_frontal:
                lines.append(
                    f"not scored at all: {count_of(self.studies_without_frontal, 'study')} without a frontal image"
                )
            images, studies = self.unknown_view
            if images:
                lines.append(
                    f"kept without a known view: {count_of(images, 'image')} of {count_of(studies, 'study')}, in "
                    "which no image is known to be frontal"
                )
        if self.skip_scored:
            scored, failed = self.by_uid + self.by_digest, sum(self.failed_before.values())
            codes = ", ".join(f"{code} {count:,}" for code, count in self.failed_before.items())
            lines.append(
                f"left out: {scored:,} scored before ({self.by_uid:,} by SOP Instance UID, {self.by_digest:,} by "
                f"digest), {failed:,} that failed before and would again" + (f" ({codes})" if codes else "")
            )
            if self.retried:
                lines.append(f"scored again: {count_of(self.retried, 'image')} whose earlier error can pass")
        return lines


class Marks:
    """Facts about the images of a table that are in its columns, or that are read from the files when needed.

    Args:
        table: columns path, patient_id, study_id and view.
        timeout_s: maximum time per file.
    """

    def __init__(self, table: pa.Table, timeout_s: float) -> None:
        self.paths: list[str | None] = table["path"].to_pylist()
        self._columns = {name: table[name].to_pylist() for name in ("patient_id", "study_id", "view")}
        self._timeout_s = timeout_s
        self._tags: dict[int, Mapping[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def get(self, row: int, name: str) -> Any:
        """Return a value of the column, or else of the header, if `read_headers` read it."""
        value = self._columns[name][row]
        return value if value is not None else self._tags.get(row, {}).get(name)

    def get_study(self, row: int) -> tuple[str | None, str] | None:
        """Return patient and study, both from the columns or both from the header; None without a study."""
        patient, study = (self._columns[name][row] for name in ("patient_id", "study_id"))
        if study is None:
            patient, study = (self._tags.get(row, {}).get(name) for name in ("patient_id", "study_id"))
        return None if study is None else (patient, study)

    def get_uid(self, row: int) -> str | None:
        """Return the SOP Instance UID, by the path in a PACS or by the header."""
        return find_instance_uid(self.paths[row]) or self._tags.get(row, {}).get(UID)

    def get_digest(self, row: int) -> str | None:
        return self._tags.get(row, {}).get(DIGEST)

    def lacks(self, row: int, *names: str) -> bool:
        return any(self._columns[name][row] is None for name in names)

    def read_headers(self, rows: Sequence[int]) -> None:
        """Read the DICOM headers of files that may have one."""
        self._read([row for row in rows if self._has_header(row)], "read headers", digest=False)

    def read_digests(self, rows: Sequence[int]) -> None:
        """Compute the digests of files; an instance of a PACS has none before it is fetched."""
        paths = {row: self.paths[row] for row in rows if self.get_digest(row) is None}
        self._read([row for row, path in paths.items() if path and not is_dicomweb(path)], "compare files", digest=True)

    def _has_header(self, row: int) -> bool:
        path = self.paths[row]
        if path is None or row in self._tags or is_dicomweb(path):
            return False
        return not file_name(path).lower().endswith(_WITHOUT_HEADER)

    def _read(self, rows: Sequence[int], what: str, *, digest: bool) -> None:
        if not rows:
            return
        worker, decoders = threading.local(), []

        def identify(item: tuple[int, ImageSource]) -> tuple[int, Mapping[str, Any]]:
            row, source = item
            if isinstance(source, ImageError):
                return row, {}
            if not hasattr(worker, "decoder"):
                worker.decoder = Decoder([], timeout_s=self._timeout_s)
                decoders.append(worker.decoder)
            # A member of an archive is not read twice.
            outcome = worker.decoder.identify(source, header=not digest, digest=digest or isinstance(source, bytes))
            # A file that cannot be read is reported by the run.
            return row, (outcome.tags or {}) if isinstance(outcome, Failure) else outcome

        threads = min(_MAX_READERS, costs.count_cpus(), len(rows))
        try:
            with Progress(what, len(rows), unit="files", last_line=False) as progress:
                sources = iter_sources((row, self.paths[row]) for row in rows)
                for row, tags in map_concurrently(identify, sources, threads=threads):
                    self._tags[row] = {**self._tags.get(row, {}), **tags}
                    progress.advance(1)
        finally:
            for decoder in decoders:
                decoder.close()


def select_frontal(marks: Marks, selection: Selection) -> np.ndarray:
    """Return which rows to score, bool [n]: one frontal image of each study.

    PA is preferred to AP, and AP to FRONTAL, then the order of the paths. In a study without one of these, all images
    of unknown view are kept, and the first that is frontal in an unusual position. An image without a study is its own
    study.

    Raises:
        ConfigError: no image has a study, so there is nothing to choose from.
    """
    marks.read_headers([row for row in range(len(marks)) if marks.lacks(row, "study_id", "view")])
    studies: dict[Any, list[int]] = defaultdict(list)
    for row in range(len(marks)):
        study = marks.get_study(row)
        studies[row if study is None else study].append(row)
    if all(isinstance(study, int) for study in studies):
        raise ConfigError(
            "score.select=frontal: no image has a study, neither in a DICOM header nor in a column study_id; pass a "
            "--manifest with study_id and view, or use select=all"
        )
    kept, reasons = np.zeros(len(marks), bool), Counter[str]()
    unknown_images = unknown_studies = 0
    for rows in studies.values():
        views = {row: parse_view(marks.get(row, "view") or "") for row in rows}
        frontal, unusual = (
            sorted(
                (row for row in rows if views[row] in order),
                key=lambda row: (order.index(str(views[row])), marks.paths[row] or ""),
            )
            for order in (_FRONTAL, _UNUSUAL)
        )
        unknown = [row for row in rows if views[row] is None]
        chosen = frontal[:1] or [*unknown, *unusual[:1]]
        kept[chosen] = True
        if unknown and not frontal:
            unknown_images, unknown_studies = unknown_images + len(unknown), unknown_studies + 1
        selection.studies_without_frontal += not chosen
        reasons.update(_name_reason(views[row]) for row in rows if row not in chosen)
    selection.not_selected = dict(reasons.most_common())
    selection.unknown_view = (unknown_images, unknown_studies)
    return kept


def _name_reason(view: str | None) -> str:
    if view in ("LATERAL", "OBLIQUE"):
        return view.lower()
    return "unknown view, next to a frontal image" if view is None else "another frontal image of the study"


def leave_out_scored(
    marks: Marks, kept: np.ndarray, earlier: EarlierScores, selection: Selection, key: bytes | None
) -> None:
    """Clear the rows of `kept` that earlier runs scored, or that failed there in a way that would be the same again.

    An image of the same SOP Instance UID and study is the same image, unless several files have both, as faulty
    anonymisers write them. All other files are compared by digest.
    """
    rows = np.flatnonzero(kept).tolist()
    marks.read_headers(rows)
    uids = _hide([marks.get_uid(row) for row in rows], key)
    own = list(zip(uids.to_pylist(), (marks.get(row, "study_id") for row in rows), strict=True))
    counts = Counter(own)
    found = earlier.find(UID, uids)
    studies = earlier.rows["study_id"].take(found).to_pylist()
    ambiguous = earlier.list_ambiguous_uids()
    matches: dict[int, int] = {}
    to_compare = []
    for row, (uid, study), match, before in zip(rows, own, found.to_pylist(), studies, strict=True):
        is_clear = counts[uid, study] == 1 and (uid, before) not in ambiguous
        if match is not None and is_clear and _is_same_study(before, study, key):
            matches[row] = match
        elif uid is None or match is not None:
            to_compare.append(row)
        # A file with a UID that no earlier row has is not one of their files.
    selection.by_uid = _clear(kept, matches, earlier, selection)
    if earlier.has_digests:
        marks.read_digests(to_compare)
        found = earlier.find(DIGEST, _hide([marks.get_digest(row) for row in to_compare], key))
        equal = zip(to_compare, found.to_pylist(), strict=True)
        matches = {row: match for row, match in equal if match is not None}
        selection.by_digest = _clear(kept, matches, earlier, selection)


def _clear(kept: np.ndarray, matches: Mapping[int, int], earlier: EarlierScores, selection: Selection) -> int:
    """Clear and count rows by the earlier row of each; return how many of them were scored."""
    codes = earlier.rows["error_code"].take(pa.array(list(matches.values()), pa.int64())).to_pylist()
    failed = Counter(selection.failed_before)
    for row, code in zip(matches, codes, strict=True):
        if code in RETRYABLE_CODES:
            selection.retried += 1
        else:
            kept[row] = False
            failed.update([code] if code else [])
    selection.failed_before = dict(failed.most_common())
    return codes.count(None)


def _is_same_study(earlier: str | None, study: str | None, key: bytes | None) -> bool:
    """Whether two study ids, of which a key may have hidden the earlier one, do not contradict each other."""
    if earlier is None or study is None:
        return True
    return earlier == study or (key is not None and earlier == make_pseudonym(key, study))


def _hide(values: Sequence[str | None], key: bytes | None) -> pa.Array:
    """Return marks as a score table holds them: as they are, or as pseudonyms."""
    hidden = values if key is None else [None if value is None else make_pseudonym(key, value) for value in values]
    return pa.array(hidden, pa.string())
