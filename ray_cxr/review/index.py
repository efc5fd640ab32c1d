"""The studies of a score run in memory: what the list filters, searches and sorts.

A row is a line of the score table, 0..n-1 in the order of its files. A study has a number, 1..m in the order of the
worklist. For readers who must not see the model, the numbers follow the hash of the ids instead, because the worklist's
order is a prediction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.data import identity, manifest
from ray_cxr.errors import InputError
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.reporting.ranking import find_highest
from ray_cxr.reporting.scores import Location, Scores, read_scores
from ray_cxr.reporting.worklist import order_studies
from ray_cxr.storage import remote

PAGE_SIZE = 50
#: Columns of text of a row that the pages show, in addition to those of `Scores`.
_DETAILS = ("error", "age", "sex", "view", "model_digest")


@dataclass(frozen=True)
class Query:
    """What the list shows. Every text may come from a browser; unknown values match nothing.

    Attributes:
        q: a part of an image, study or patient id, in any case.
        finding: with `flag`, `label` or `sort`; empty for any finding.
        flag: `yes` or `no`, at the operating point.
        label: `yes` or `no`, in the labels that were passed.
        quality, code: a value, or `any`.
        split, sex, view: a value.
        reviewed: `yes`, `partly` or `no`, by this reader.
        sort: `priority`, `probability` (of `finding`) or `id`.
    """

    q: str = ""
    finding: str = ""
    flag: str = ""
    label: str = ""
    quality: str = ""
    code: str = ""
    split: str = ""
    sex: str = ""
    view: str = ""
    reviewed: str = ""
    sort: str = "priority"
    page: int = 1


def parse_query(values: dict[str, str]) -> Query:
    """Return the query of a list; unknown parameters and a page that is not a number are ignored."""
    known = {field.name: values[field.name][:200] for field in fields(Query) if field.name in values}
    page = known.pop("page", "1")
    return Query(**known, page=max(1, int(page)) if page.isdecimal() and len(page) < 10 else 1)


def format_query(query: Query, **changes: Any) -> str:
    """Return the query string of a list, "" or "?...", without parameters that have their default."""
    default = asdict(Query())
    values = {**asdict(query), **changes}
    return "".join(["?", urlencode(chosen)]) if (chosen := {k: v for k, v in values.items() if v != default[k]}) else ""


@dataclass(frozen=True, eq=False)
class Category:
    """A column with few values: `codes` int16 [n], -1 for null, into the sorted `names`."""

    names: tuple[str, ...]
    codes: np.ndarray

    @classmethod
    def build(cls, values: Sequence[Any] | np.ndarray) -> Category:
        codes, names = pd.factorize(np.asarray(values, dtype=object), sort=True)
        return cls(tuple(map(str, names)), codes.astype(np.int16))

    def get(self, row: int) -> str | None:
        return None if self.codes[row] < 0 else self.names[self.codes[row]]

    def match(self, value: str) -> np.ndarray:
        """Return which rows have a value, bool [n]; `any`: not null."""
        if value == "any":
            return np.asarray(self.codes >= 0)
        found = self.names.index(value) if value in self.names else -2
        return np.asarray(self.codes == found)


@dataclass(frozen=True, eq=False)
class ReviewIndex:
    """The columns of a score run that the pages need; arrays [n] have an entry per row, m is the number of studies.

    Attributes:
        scores: the SCORES folder.
        ids, studies, patients, paths, errors: Arrow strings [n].
        p, c, flags: per finding, raw and calibrated probability, float32 [n] with NaN, and the flag, int8 [n] with -1.
        categories: `quality`, `code`, `split`, `sex` and `view`.
        labels: per finding, int8 [n] with -1 for null; empty without labels.
        thresholds: the operating point of each finding on the raw probability, None without one.
        study_of: the study's number minus 1 of each row, int64 [n].
        study_priority, study_top: priority, float32 [m] with NaN, and top finding of each study, as in worklist.csv.
        rows_of: the rows of each study: those with a flag, then the others; the highest priority first (by id if the
            order is blind).
    """

    scores: Path
    findings: tuple[str, ...]
    ids: pa.Array
    studies: pa.Array
    patients: pa.Array
    paths: pa.Array
    errors: pa.Array
    digests: Category
    ages: np.ndarray
    ok: np.ndarray
    priority: np.ndarray
    p: dict[str, np.ndarray]
    c: dict[str, np.ndarray]
    flags: dict[str, np.ndarray]
    categories: dict[str, Category]
    labels: dict[str, np.ndarray]
    thresholds: dict[str, float | None]
    study_of: np.ndarray
    study_priority: np.ndarray
    study_top: Category
    rows_of: list[list[int]]
    model: dict[str, Any] = field(repr=False)
    run: dict[str, Any] = field(repr=False)
    is_blind: bool = False

    def __len__(self) -> int:
        """Return the number of studies."""
        return len(self.rows_of)

    def select(self, query: Query, reviewed: np.ndarray, decided: np.ndarray) -> np.ndarray:
        """Return the numbers of the studies that match a query, in its order, int64 [k].

        A study matches if one of its images fulfils all conditions; `reviewed` is a condition on the study.

        Args:
            reviewed, decided: rows with a verdict, and rows with a verdict on every finding, bool [n].
        """
        mask = self._match_rows(query)
        chosen = np.bincount(self.study_of[mask], minlength=len(self)) > 0
        if query.reviewed:
            some = np.bincount(self.study_of[reviewed], minlength=len(self)) > 0
            # An image that cannot be read needs no verdict.
            open_rows = np.bincount(self.study_of[self.ok & ~decided], minlength=len(self)) > 0
            states = {"no": ~some, "partly": some & open_rows, "yes": some & ~open_rows}
            chosen &= states.get(query.reviewed, np.zeros(len(self), dtype=bool))
        numbers = np.flatnonzero(chosen)
        if query.sort == "id":
            first = pa.array([rows[0] for rows in (self.rows_of[number] for number in numbers)], pa.int64())
            numbers = numbers[np.asarray(pc.sort_indices(self.ids.take(first)))]
        elif query.sort == "probability" and query.finding in self.p and not self.is_blind:
            highest = find_highest(self.get_probability(query.finding)[0], self.study_of, len(self))[numbers]
            numbers = numbers[np.argsort(-np.nan_to_num(highest, nan=-1.0), kind="stable")]
        return numbers + 1

    def _match_rows(self, query: Query) -> np.ndarray:
        """Return the rows that fulfil the conditions on images, bool [n]."""
        mask = np.ones(len(self.ids), dtype=bool)
        for name in ("code", "split", "sex", "view", "quality"):
            value = getattr(query, name)
            if value and not (self.is_blind and name == "quality"):
                mask &= self.categories[name].match(value)
        if query.q:
            found = np.zeros(len(mask), dtype=bool)
            for column in (self.ids, self.studies, self.patients):
                matched = pc.match_substring(column, query.q, ignore_case=True)
                found |= np.asarray(pc.fill_null(matched, False))
            mask &= found
        if query.flag and not self.is_blind:
            mask &= _match_values(self.flags, query.finding, query.flag)
        if query.label:
            mask &= _match_values(self.labels, query.finding, query.label) if self.labels else False
        return mask

    def get_probability(self, finding: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the probability that the pages show, float [n], and where it is calibrated, bool [n]."""
        p, c = self.p[finding], self.c.get(finding)
        if c is None or (self.model.get("calibration") or {}).get(finding) is None:
            return p, np.zeros(len(p), dtype=bool)
        return np.where(np.isnan(c), p, c), ~np.isnan(c)

    def find_neighbours(self, number: int) -> tuple[int | None, int | None]:
        """Return the numbers of the study before and the study after."""
        return (number - 1 if number > 1 else None), (number + 1 if number < len(self) else None)

    def find_patient(self, row: int) -> list[int]:
        """Return the rows of the other images of a row's patient, by id; none if the patient is unknown."""
        patient = self.patients[row]
        if not patient.is_valid:
            return []
        rows = np.flatnonzero(np.asarray(pc.fill_null(pc.equal(self.patients, patient), False)))
        return sorted((int(other) for other in rows if other != row), key=lambda other: self.ids[other].as_py())


def _match_values(columns: dict[str, np.ndarray], finding: str, value: str) -> np.ndarray:
    """Return the rows whose flag or label of a finding, or of any finding, is 1 (`yes`) or 0 (`no`), bool [n]."""
    names = [finding] if finding else list(columns)
    rows = np.stack(
        [columns[name] for name in names if name in columns] or [np.full(len(next(iter(columns.values()))), -1)]
    )
    if value == "yes":
        return np.asarray((rows == 1).any(axis=0))
    return np.asarray((rows == 0).any(axis=0) & ~(rows == 1).any(axis=0)) & (value == "no")


@dataclass(frozen=True)
class Sample:
    """A random sample of studies: with one seed, a larger sample contains a smaller one."""

    size: int
    seed: int = 0

    def choose(self, table: Scores) -> np.ndarray:
        """Return the rows of the sample, int64 [k]; studies without a readable image are not drawn."""
        codes, rows_of, _ = order_studies(table)
        names = {
            study: min(table.ids[row] for row in rows) for study, rows in enumerate(rows_of) if table.ok[rows].any()
        }
        drawn = sorted(names, key=lambda study: _hash_id(f"{self.seed} {names[study]}"))[: self.size]
        return np.flatnonzero(np.isin(codes, drawn))


def read_index(
    scores: str | Path, labels: str | Path | None = None, *, is_blind: bool = False, sample: Sample | None = None
) -> ReviewIndex:
    """Read a finished SCORES folder, and the labels of a manifest.

    Args:
        is_blind: number the studies in an order that is independent of the model.
        sample: only these studies.

    Raises:
        InputError: the run did not finish, or it is not a run of `score`.
    """
    table = read_scores(scores)
    if not table.is_own or table.run_folder is None:
        raise InputError(f"{scores}: not a folder that `ray-cxr score` wrote; pass its --out")
    folder = remote.to_path(table.run_folder)
    location = Location.of(str(scores))
    details = (location.find_run() or location).child("scores").read_parquet(str(scores), lambda name: name in _DETAILS)
    if sample is not None:
        chosen = sample.choose(table)
        table, details = table.select(chosen), details.take(pa.array(chosen))
    codes, rows_of, order = order_studies(table)
    study_priority, top = _rank_studies(table, codes, rows_of)
    if is_blind:
        rows_of = [sorted(rows, key=lambda row: table.ids[row]) for rows in rows_of]
        order = sorted(order, key=lambda study: _hash_id(table.ids[rows_of[study][0]]))
    else:
        rows_of = _put_flagged_first(table, rows_of)
    number_of = np.empty(len(order), dtype=np.int64)
    number_of[order] = np.arange(len(order))
    split, label_columns = _join_labels(table, folder, labels)
    categories = {
        "quality": Category.build(table.quality_flags),
        "code": Category.build(table.codes),
        "split": Category.build(split),
        **{name: Category.build(_read_detail(details, name)) for name in ("sex", "view")},
    }
    return ReviewIndex(
        scores=folder,
        findings=table.findings,
        ids=pa.array(table.ids, pa.string()),
        studies=pa.array(table.studies, pa.string()),
        patients=pa.array(table.patients, pa.string()),
        paths=pa.array(table.paths, pa.string()),
        errors=pa.array(_read_detail(details, "error"), pa.string()),
        digests=Category.build(_read_detail(details, "model_digest")),
        ages=np.asarray(_read_detail(details, "age"), dtype=np.float32),
        ok=table.ok,
        priority=table.priority.astype(np.float32),
        p={name: values.astype(np.float32) for name, values in table.p.items()},
        c={name: values.astype(np.float32) for name, values in table.c.items()},
        flags=table.flags,
        categories=categories,
        labels=label_columns,
        thresholds={name: table.threshold(name) for name in table.findings},
        study_of=number_of[codes],
        study_priority=study_priority[order].astype(np.float32),
        study_top=Category.build(np.asarray(top, dtype=object)[order]),
        rows_of=[rows_of[study] for study in order],
        model=table.model,
        run=table.run,
        is_blind=is_blind,
    )


def _rank_studies(
    table: Scores, codes: np.ndarray, rows_of: list[list[int]]
) -> tuple[np.ndarray, Sequence[str | None] | np.ndarray]:
    """Return the priority and the top finding of each study, as worklist.csv has them."""
    ranking = table.ranking
    _, priority, top = ranking.rank_groups(codes, len(rows_of), np.arange(len(codes)), table.priority)
    return priority, top if ranking.weights is not None else [table.top_findings[rows[0]] for rows in rows_of]


def _put_flagged_first(table: Scores, rows_of: list[list[int]]) -> list[list[int]]:
    """Order the rows of each study: those with a flag first, and both parts by priority, the highest first."""
    flags = [values == 1 for name, values in table.flags.items() if name != NO_FINDING]
    flagged = np.any(flags, axis=0) if flags else np.zeros(len(table.ids), dtype=bool)
    urgency = -np.nan_to_num(table.priority, nan=-1.0)
    # The first of `rows` has the highest priority, also among equal numbers.
    return [sorted(rows, key=lambda row: (not flagged[row], row != rows[0], urgency[row])) for rows in rows_of]


def _hash_id(image_id: str) -> bytes:
    return hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()


def _read_detail(details: pa.Table, name: str) -> list[Any]:
    return details[name].to_pylist() if name in details.column_names else [None] * len(details)


def _join_labels(table: Scores, folder: Path, labels: str | Path | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the split of each row, str or None [n], and per finding the labels, int8 [n] with -1 for null."""
    split = np.full(len(table.ids), None, dtype=object)
    found: dict[str, np.ndarray] = {}
    sources = [path for path in (folder / "input.parquet",) if path.exists()] + ([labels] if labels else [])
    for source in sources:
        with manifest.open_manifest(source) as file:
            rows = identity.find_ids(table.ids, file.column("image_id").to_pylist())
            if source is labels and not (rows >= 0).any():
                raise InputError(f"{labels} and {table.source} have no image in common; compare their image_id")
            values = np.array([*file.column("split").to_pylist(), None], dtype=object)[rows]
            split = np.where(values == None, split, values)  # noqa: E711
            if source is labels:
                for name in (name for name in LABELS if name in table.findings):
                    column = pc.fill_null(file.column(name), -1).to_numpy()
                    found[name] = np.where(rows >= 0, column[rows], -1).astype(np.int8)
    return split, found
