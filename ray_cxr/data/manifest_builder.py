"""Build a manifest: read label tables, find their images, assign splits."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.config import PacsSettings
from ray_cxr.data import identity, splits
from ray_cxr.data.csv_table import read_csv, read_image_list
from ray_cxr.data.dialects import Dialect, detect_dialect
from ray_cxr.data.dicomweb_listing import list_radiographs
from ray_cxr.data.external_dialects import rewrite_external
from ray_cxr.data.manifest import SCHEMA, SPLIT_KEY, SPLITS, absolute_paths, describe_listing, listing_notes
from ray_cxr.errors import ConfigError, TableError
from ray_cxr.imaging import demographics
from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.imaging.views import choose_view, parse_view
from ray_cxr.storage import dicomweb
from ray_cxr.storage.files import Listing, find_images, hash_file
from ray_cxr.storage.paths import IMAGE_SUFFIXES, file_names, is_dicomweb, redact
from ray_cxr.storage.remote import to_path


@dataclass
class ManifestReport:
    """Result of `build_manifest`; every number counts rows, files or patients."""

    rows: int = 0
    patients: PatientCount = field(default_factory=lambda: PatientCount(0))
    by_split: dict[str, int] = field(default_factory=dict)
    absurd_ages: int = 0
    unreadable_ages: int = 0
    unknown_views: int = 0
    unlabelled_rows: int = 0
    dropped_rows: int = 0
    dropped_by_split: dict[str, int] = field(default_factory=dict)
    images_found: int | None = None
    images_missing: int | None = None
    files_not_in_table: int | None = None
    not_images: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unpacked_members: int = 0
    listed_not_in_table: int = 0
    in_neither_list: int = 0
    left_out: int = 0
    unguarded: int = 0
    ignored_columns: list[str] = field(default_factory=list)

    @property
    def can_split(self) -> bool:
        """Whether every row has a patient id, so that `--split patient` is possible."""
        return self.patients.number is not None and not self.patients.without_id

    def describe_missing_split(self) -> str | None:
        """Return a warning and its remedy if no row has a split."""
        if not self.rows or self.by_split:
            return None
        way = "add --split patient" if self.can_split else "add a column of patient ids for --split patient"
        return f"no split, which train and tune need: {way}, or pass train=, val= and test= tables"

    def lines(self) -> list[str]:
        """Return the report as sentences; counts of 0 are left out."""
        out = [self.patients.describe(self.rows)]
        if self.by_split:
            out[0] += f": {_format_counts(self.by_split)}"
        if self.images_found is not None:
            out.append(
                f"images: {self.images_found:,} found, {self.images_missing:,} in the table but not on disk, "
                f"{self.files_not_in_table:,} on disk but not in the table"
            )
        out += describe_listing(self.not_images, self.unpacked_members) + self.notes
        for count, text in (
            (self.absurd_ages, f"ages over {demographics.MAX_AGE_YEARS:.0f} years set to null"),
            (self.unreadable_ages, "unreadable ages set to null"),
            (self.unknown_views, "views that are not known or not unique set to null"),
            (self.unlabelled_rows, "rows without any label"),
            (self.unguarded, "rows have a split but no patient id: leaks among them cannot be detected"),
            (self.left_out, "rows left out because their image was not found (--found-only)"),
            (self.listed_not_in_table, "names in the split lists that no table has"),
            (self.in_neither_list, "images in neither split list (split is null)"),
        ):
            if count:
                out.append(f"{count:,} {text}")
        if self.dropped_rows:
            out.append(
                f"{self.dropped_rows:,} rows removed because their patient is also in val or test: "
                f"{_format_counts(self.dropped_by_split)}"
            )
        if self.ignored_columns:
            out.append(f"unused columns: {', '.join(self.ignored_columns)}")
        return out


def build_manifest(
    tables: Sequence[str],
    *,
    images: str | None = None,
    split: str | None = None,
    train_val_list: str | None = None,
    test_list: str | None = None,
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    on_leak: str = "error",
    found_only: bool = False,
    pacs: PacsSettings | None = None,
) -> tuple[pa.Table, ManifestReport]:
    """Read tables, find images and assign splits. Return the manifest and the report; the metadata of the manifest
    describe the split.

    Args:
        tables: paths of CSV files, `.gz` allowed; or `train=A.csv`, `val=B.csv`, `test=C.csv`.
        images: a folder or URI with the images, in any layout, also inside tar archives, or a search of a PACS, whose
            instances are found by their SOP Instance UID; None leaves `path` null.
        split: `official` (needs both lists), `patient`, or None.
        fractions: shares of patients for train, val and test, if `split` is `patient`.
        on_leak: `error` or `drop`, see `splits.resolve_leaks`.
        found_only: leave out and count the rows whose image is not in `images`.
        pacs: how to reach a PACS; None: the default settings.
    """
    report = ManifestReport()
    arguments = [_parse_table_argument(text) for text in tables]
    by_table = any(name for name, _ in arguments)
    if by_table and not all(name for name, _ in arguments):
        raise ConfigError("tables: either every table has a prefix (train=, val=, test=) or none has")
    if by_table and split:
        raise ConfigError(f"--split {split}: the tables' prefixes already define the split; drop one of the two")
    if found_only and images is None:
        raise ConfigError("--found-only: needs --images")
    if split == "official" and not (train_val_list and test_list):
        raise ConfigError("--split official: needs --train-val-list and --test-list")
    if split != "official" and (train_val_list or test_list):
        raise ConfigError("--train-val-list and --test-list: need --split official")

    frames = [read_table(path, report).assign(split=name, _table=to_path(path).name) for name, path in arguments]
    data = pd.concat(frames, ignore_index=True)
    data["_written"] = data["patient_id"]
    data["patient_id"] = identity.unify_patients(data["image_id"], data["patient_id"])
    if not by_table:
        _refuse_repeats(data)
    info: dict[str, Any] = {
        "kind": "given" if by_table else split,
        "seed": seed if split else None,
        "fractions": list(fractions) if split == "patient" else None,
        "tables": _hash_files([path for _, path in arguments]),
    }
    if split == "patient":
        data["split"] = splits.patient_split(data["patient_id"], fractions, seed)
    elif train_val_list and test_list:
        data["split"] = _read_official_split(data, train_val_list, test_list, seed, report)
        info["lists"] = _hash_files([train_val_list, test_list])

    keep = splits.resolve_leaks(data["patient_id"], data["split"], on_leak)
    if not keep.all():
        report.dropped_by_split = _count_by_split(data.loc[~keep, "split"])
        report.dropped_rows = int((~keep).sum())
        info["dropped_by_split"] = report.dropped_by_split
        data = data[keep].reset_index(drop=True)
    # After the check for leaks: an image in the tables of two splits is reported as a patient in two splits.
    _refuse_repeats(data)

    data["path"] = None
    if images is not None:
        data["path"] = _find_paths(data["image_id"], images, report, pacs or PacsSettings())
        if found_only:
            report.left_out = report.images_missing or 0
            info["rows_without_picture_left_out"] = report.left_out
            data = data[data["path"].notna()].reset_index(drop=True)

    report.rows = len(data)
    report.unguarded = int((data["split"].notna() & data["patient_id"].isna()).sum())
    report.patients = PatientCount.of(data["patient_id"])
    report.by_split = _count_by_split(data["split"])
    # One spelling per patient: that with zeros, if any row of the patient has it.
    padded = data[data["patient_id"] != data["_written"]].dropna(subset="patient_id")
    spellings = dict(zip(padded["patient_id"], padded["_written"], strict=True))
    data["patient_id"] = [spellings.get(patient, patient) for patient in data["patient_id"]]
    table = pa.table({field.name: pa.array(data[field.name], type=field.type, from_pandas=True) for field in SCHEMA})
    return table.replace_schema_metadata({SPLIT_KEY: json.dumps(info, sort_keys=True).encode()}), report


def read_table(path: str, report: ManifestReport | None = None) -> pd.DataFrame:
    """Read a CSV file of any dialect into a manifest's columns, without `path` and `split`; errors name the line."""
    report = report or ManifestReport()
    given = read_csv(path)
    table = rewrite_external(given) or given
    dialect = detect_dialect(table)
    rows, columns = table.rows, table.find_columns(dialect.columns)
    image_ids = table.read_image_ids(columns)
    out = pd.DataFrame(index=rows.index)
    out["image_id"] = image_ids
    out["patient_id"] = table.read_patient_ids(columns.get("patient_id"))
    out["study_id"] = table.read_optional(columns.get("study_id"))
    out["age"] = _read_ages(table.read_numbers(columns["age"]), dialect, report) if "age" in columns else np.nan
    out["sex"] = rows[columns["sex"]].map(demographics.parse_sex).astype("object") if "sex" in columns else None
    views = table.find_all(dialect.columns["view"])
    out["view"] = _read_views(rows[views], report)
    follow_up = table.read_numbers(columns["follow_up"]) if "follow_up" in columns else table.read_optional(None)
    visits = pd.to_numeric(follow_up, errors="coerce").astype(float).round()
    out["follow_up"] = visits.where(visits.abs() < 2**31).astype("Int32")
    values = dialect.read_labels(table, image_ids)
    report.unlabelled_rows += int(values.isna().all(axis=1).sum())
    used = {*columns.values(), *views, *dialect.find_label_columns(table), *report.ignored_columns}
    report.ignored_columns += [
        name
        for name in table.headers
        if name not in used and not name.startswith("Unnamed") and not dialect.is_redundant(name)
    ]
    return pd.concat([out, values], axis=1)


def _parse_table_argument(text: str) -> tuple[str | None, str]:
    """Split `train=A.csv` into split and path; a plain path has no split."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and name in SPLITS else (None, text)


def _read_ages(text: pd.Series, dialect: Dialect, report: ManifestReport) -> pd.Series:
    ages = text.map({value: dialect.parse_age(value) for value in text.unique()}).astype(float)
    refused = text[ages.isna() & (text.str.strip() != "")]
    absurd = sum(demographics.convert_age(value) is not None for value in refused)
    report.absurd_ages += absurd
    report.unreadable_ages += len(refused) - absurd
    return ages


def _read_views(text: pd.DataFrame, report: ManifestReport) -> pd.Series:
    """Return the view of each row from its view columns, None if unknown."""
    rows = list(text.itertuples(index=False, name=None))
    view_of = {row: choose_view(map(parse_view, row)) for row in set(rows)}
    report.unknown_views += sum(view_of[row] is None and any(cell.strip() for cell in row) for row in rows)
    return pd.Series([view_of[row] for row in rows] or None, index=text.index, dtype="object")


def _refuse_repeats(data: pd.DataFrame) -> None:
    repeats = data[data.duplicated("image_id", keep=False)]
    if len(repeats):
        image = repeats["image_id"].iloc[0]
        tables = sorted(set(repeats.loc[repeats["image_id"] == image, "_table"]))
        raise TableError(
            f"{repeats['image_id'].nunique():,} images occur more than once, such as {image!r} "
            f"in {' and '.join(tables)}; keep one row per image"
        )


def _read_official_split(
    data: pd.DataFrame, train_val_list: str, test_list: str, seed: int, report: ManifestReport
) -> pd.Series:
    ids = data["image_id"].tolist()
    lists = [read_image_list(path) for path in (train_val_list, test_list)]
    # Replace listed names by the table's ids, which may be in another Unicode form.
    rows = [identity.find_ids(names, ids).tolist() for names in lists]
    train_val, test = (
        frozenset(ids[row] if row >= 0 else name for name, row in zip(*pair, strict=True))
        for pair in zip(lists, rows, strict=True)
    )
    report.listed_not_in_table = len((train_val | test) - set(ids))
    result = splits.official_split(data["image_id"], data["patient_id"], train_val, test, seed)
    report.in_neither_list = int(result.isna().sum())
    if report.in_neither_list == len(data):
        raise TableError(f"no image of the tables is in {train_val_list} or {test_list}; are they NIH's lists?")
    return result


def _count_by_split(column: pd.Series) -> dict[str, int]:
    counts = column.value_counts()
    return {name: int(counts[name]) for name in SPLITS if name in counts}


def _format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _hash_files(paths: Sequence[str]) -> dict[str, str]:
    """Return SHA-256 by file name, or by path where two files have the same name."""
    names = Counter(to_path(path).name for path in paths)
    return {to_path(path).name if names[to_path(path).name] == 1 else path: hash_file(path) for path in paths}


def _match_files(image_ids: pd.Series, paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the row of each file, or null.

    An id with folders, such as `study1/view1.jpg`, is compared with as many folders of a path, and an id without the
    suffix of an image with the name without it. Tables of several hospitals can have ids of several forms.
    """
    folders = image_ids.str.count("/").to_numpy()
    bare = ~image_ids.str.lower().str.endswith(IMAGE_SUFFIXES).to_numpy(bool)
    found: pa.ChunkedArray | None = None
    for form in sorted({*zip(folders.tolist(), bare.tolist(), strict=True)}):
        rows = np.flatnonzero((folders == form[0]) & (bare == form[1]))
        names = _name_like(paths, form[0], bare=form[1])
        wanted = image_ids.iloc[rows]
        matches = pc.index_in(names, value_set=pa.array(wanted, pa.string()))
        if pc.any(pc.and_(pc.is_null(matches), pc.invert(pc.string_is_ascii(names)))).as_py():
            row_of_file = identity.find_ids(names.to_pylist(), wanted.tolist())  # also in another Unicode form
            matches = pa.chunked_array([pa.array(row_of_file, mask=row_of_file < 0)])
        places = pa.chunked_array([pa.array(rows)]).take(matches)
        found = places if found is None else pc.coalesce(found, places)
    assert found is not None
    return found


def _name_like(paths: pa.ChunkedArray, folders: int, *, bare: bool) -> pa.ChunkedArray:
    """Return the name of each file with a number of folders before it; `bare`: without the suffix of an image."""
    names = file_names(paths)
    if folders:
        parts = (path.replace("::", "/").rsplit("/", folders + 1)[-folders - 1 :] for path in paths.to_pylist())
        names = pa.chunked_array([pa.array(["/".join(part) for part in parts], pa.string())])
    if bare:
        names = pc.replace_substring_regex(names, rf"(?i)({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", "")
    return names


def _search(address: str, pacs: PacsSettings, report: ManifestReport) -> Listing:
    """List the radiographs that a search of a PACS finds."""
    dicomweb.configure(pacs)
    table = list_radiographs(address, captures=pacs.captures)
    report.notes = listing_notes(table)
    return Listing(f"{redact(address).rstrip('/')}/", table["path"])


def _find_paths(image_ids: pd.Series, location: str, report: ManifestReport, pacs: PacsSettings) -> pd.Series:
    """Return for each image the path of its file below `location`, or None; refuse names that several files share."""
    found = _search(location, pacs, report) if is_dicomweb(location) else find_images(location)
    report.not_images, report.unpacked_members = found.left_out, found.unpacked
    n_rows = len(image_ids)
    # Arrow builds one hash table of the image ids for all files.
    matches = _match_files(image_ids, found.paths)
    files = pc.indices_nonzero(pc.is_valid(matches))
    rows = matches.take(files).to_numpy()
    file_of_row = np.full(n_rows, -1)
    file_of_row[rows] = files.to_numpy()
    is_ambiguous = np.bincount(rows, minlength=n_rows) > 1
    if is_ambiguous.any():
        row = int(np.flatnonzero(is_ambiguous)[np.argmin(image_ids.to_numpy()[is_ambiguous].astype(str))])
        copies = found.paths.take(files.filter(pa.array(rows == row))).slice(0, 2).to_pylist()
        raise TableError(
            f"--images {redact(location)}: {int(is_ambiguous.sum()):,} names occur more than once, such as "
            f"{' and '.join(copies)}; point --images at one copy"
        )
    report.images_found = int((file_of_row >= 0).sum())
    report.images_missing = n_rows - report.images_found
    report.files_not_in_table = len(found.paths) - report.images_found
    if report.images_found == 0:
        raise TableError(
            f"--images {redact(location)}: none of its {len(found.paths):,} images is in the tables, "
            f"which name images such as {image_ids.iloc[0]!r}; check --images"
        )
    paths = absolute_paths(found).take(pa.array(file_of_row, mask=file_of_row < 0))
    return pd.Series(paths.to_pylist(), index=image_ids.index, dtype="object")
