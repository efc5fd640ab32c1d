"""From tables and folders to one manifest: who, which picture, which labels, which split.

Tables come in two forms. NIH's `Data_Entry` has one text column of findings; its header breaks bracketed names
at the comma, and its copies differ in the names of columns, in ages (`058Y` or `58`) and in patient ids
(`00000001` or `1`). One-hot tables have a 0/1 column per finding; blank means not labelled.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr import labels
from ray_cxr.data import identity, splits
from ray_cxr.errors import ConfigError, TableError
from ray_cxr.imaging import demographics
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.files import Listing, find_images
from ray_cxr.storage.paths import file_names, format_suffixes, make_absolute, plain_path, plain_paths, redact

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("patient_id", pa.string()),
        ("study_id", pa.string()),
        ("age", pa.float64()),
        ("sex", pa.string()),
        ("view", pa.string()),
        ("follow_up", pa.int32()),
        ("split", pa.string()),
        *((label, pa.int8()) for label in labels.LABELS),
    ]
)
SPLIT_KEY = b"ray_cxr.split"
#: What a folder held besides the images of a listing.
LISTING_KEY = b"ray_cxr.listing"
SPLITS = ("train", "val", "test")

#: Older than this is a slip of the pen: NIH's first table holds ages such as 411.
MAX_AGE_YEARS = 120.0
_NIH_NAME = re.compile(r"^\d{8}_\d{3}\.png$")

# Header words, compared in lower case without anything but letters and digits.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "image_id": ("imageindex", "image", "imageid", "imagename", "filename"),
    "labels": ("findinglabels",),
    "patient_id": ("patientid", "patient"),
    "study_id": ("studyid", "studyinstanceuid"),
    "age": ("patientage", "age"),
    "sex": ("patientgender", "patientsex", "sex", "gender"),
    "view": ("viewposition", "view"),
    "follow_up": ("followup",),
}


@dataclass
class ManifestReport:
    """What was found while a manifest was made; every number is a count of rows, files or patients."""

    rows: int = 0
    patients: int = 0
    by_split: dict[str, int] = field(default_factory=dict)
    absurd_ages: int = 0
    unreadable_ages: int = 0
    unlabelled_rows: int = 0
    dropped_rows: int = 0
    dropped_by_split: dict[str, int] = field(default_factory=dict)
    images_found: int | None = None
    images_missing: int | None = None
    files_not_in_table: int | None = None
    not_images: dict[str, int] = field(default_factory=dict)
    unpacked_members: int = 0
    listed_not_in_table: int = 0
    in_neither_list: int = 0
    left_out: int = 0
    unguarded: int = 0
    ignored_columns: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as sentences, those with nothing to say left out."""
        parts = ", ".join(f"{name} {count:,}" for name, count in self.by_split.items())
        out = [f"{self.rows:,} images of {self.patients:,} patients" + (f": {parts}" if parts else "")]
        if self.images_found is not None:
            out.append(
                f"pictures: {self.images_found:,} found, {self.images_missing:,} in the table but not on disk, "
                f"{self.files_not_in_table:,} on disk but not in the table"
            )
        out += listing_lines(self.not_images, self.unpacked_members)
        for count, text in (
            (self.absurd_ages, f"ages over {MAX_AGE_YEARS:.0f} years made null"),
            (self.unreadable_ages, "ages that cannot be read made null"),
            (self.unlabelled_rows, "rows without any label"),
            (self.unguarded, "rows have a split but no patient id: a leak among them cannot be seen"),
            (self.left_out, "rows left out, having no picture (--found-only)"),
            (self.listed_not_in_table, "names in the split lists that no table has"),
            (self.in_neither_list, "images in neither split list (split is null)"),
        ):
            if count:
                out.append(f"{count:,} {text}")
        if self.dropped_rows:
            parts = ", ".join(f"{name} {count:,}" for name, count in self.dropped_by_split.items())
            out.append(f"{self.dropped_rows:,} rows removed, their patients being in a more protected split: {parts}")
        if self.ignored_columns:
            out.append(f"columns not used: {', '.join(self.ignored_columns)}")
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
) -> tuple[pa.Table, ManifestReport]:
    """Read tables, find pictures, assign splits.

    Args:
        tables: paths of CSV files, `.gz` allowed; or `train=A.csv`, `val=B.csv`, `test=C.csv`.
        images: a folder or URI with the pictures, in any layout, also inside tar archives; None leaves `path` null.
        split: `official` (needs both lists), `patient`, or None.
        fractions: train, val, test shares of patients for `patient`.
        on_leak: `error` or `drop`.
        found_only: leave out rows whose picture is not in `images`; they are counted.

    Returns:
        The manifest as an Arrow table of `SCHEMA`, the split's description in its metadata; and the counts.

    Raises:
        TableError, LeakError, ConfigError: see the messages.
    """
    report = ManifestReport()
    named = [_split_prefix(text) for text in tables]
    given = any(name for name, _ in named)
    if given and not all(name for name, _ in named):
        raise ConfigError("tables: either every table has a prefix (train=, val=, test=) or none has")
    if given and split:
        raise ConfigError(f"--split {split}: the tables' prefixes give the split already; leave one of them out")
    if found_only and images is None:
        raise ConfigError("--found-only: needs --images, the folder to find them in")
    if split == "official" and not (train_val_list and test_list):
        raise ConfigError("--split official: needs --train-val-list and --test-list")
    if split != "official" and (train_val_list or test_list):
        raise ConfigError("--train-val-list and --test-list belong to --split official")

    frames = []
    for name, path in named:
        frame = read_table(path, report)
        frame["split"] = name
        frame["_table"] = Path(path).name
        frames.append(frame)
    data = pd.concat(frames, ignore_index=True)
    if not given:
        _refuse_repeats(data)

    info: dict[str, Any] = {
        "kind": {"official": "official", "patient": "patient"}.get(split or "", "given" if given else None),
        "seed": seed if split else None,
        "fractions": list(fractions) if split == "patient" else None,
        "tables": _digests([path for _, path in named]),
    }
    if split == "patient":
        data["split"] = splits.patient_split(data["patient_id"], fractions, seed)
    elif split == "official":
        assert train_val_list
        assert test_list
        train_val, test = (frozenset(_read_list(path)) for path in (train_val_list, test_list))
        report.listed_not_in_table = len((train_val | test) - set(data["image_id"]))
        data["split"] = splits.official_split(data["image_id"], data["patient_id"], train_val, test, seed)
        report.in_neither_list = int(data["split"].isna().sum())
        if report.in_neither_list == len(data):
            raise TableError(f"no image of the tables stands in {train_val_list} or {test_list}; are they NIH's lists?")
        info["lists"] = _digests([train_val_list, test_list])

    keep = splits.resolve_leaks(data["patient_id"], data["split"], on_leak)
    if not keep.all():
        gone = data.loc[~keep, "split"].value_counts()
        report.dropped_by_split = {name: int(gone[name]) for name in SPLITS if name in gone}
        report.dropped_rows = int((~keep).sum())
        info["dropped_by_split"] = report.dropped_by_split
        data = data[keep].reset_index(drop=True)
    # After the leaks: an image named in two splits' tables is first of all its patient in two splits.
    _refuse_repeats(data)

    data["path"] = None
    if images is not None:
        data["path"] = _find_images(data["image_id"], images, report)
        if found_only:
            report.left_out = report.images_missing or 0
            info["rows_without_picture_left_out"] = report.left_out
            data = data[data["path"].notna()].reset_index(drop=True)

    report.rows = len(data)
    report.unguarded = int((data["split"].notna() & data["patient_id"].isna()).sum())
    report.patients = int(data["patient_id"].nunique())
    counts = data["split"].value_counts()
    report.by_split = {name: int(counts[name]) for name in SPLITS if name in counts}
    table = pa.table({name: pa.array(data[name], type=kind, from_pandas=True) for name, kind in _fields()})
    return table.replace_schema_metadata({SPLIT_KEY: json.dumps(info, sort_keys=True).encode()}), report


def read_table(path: str, report: ManifestReport | None = None) -> pd.DataFrame:
    """One CSV file of either form, with a manifest's columns (all but `path` and `split`).

    Raises:
        TableError: no such file, no image column, no labels, unknown findings, bad values; each with its place.
    """
    report = report if report is not None else ManifestReport()
    raw = _read_csv(path)
    columns = _identify(raw, path)
    if not len(raw):
        raise TableError(f"{path}: the table has a header but no rows")
    out = pd.DataFrame(index=raw.index)
    out["image_id"] = raw[columns["image_id"]].str.strip()
    blank = out["image_id"] == ""
    if blank.any():
        raise TableError(f"{path}: line {_line(blank)} has no image name")
    for name in identity.COLUMNS:
        if name in columns:
            identity.check_series(raw[columns[name]], path, images=name == "image_id")

    nih = "labels" in columns
    out["patient_id"] = _patients(raw, columns, out["image_id"])
    for name in ("study_id",):
        out[name] = _nullable(raw[columns[name]]) if name in columns else None
    out["age"] = _ages(raw[columns["age"]], report) if "age" in columns else np.nan
    for name, parsed in (("sex", demographics.parse_sex), ("view", demographics.parse_view)):
        out[name] = raw[columns[name]].map(parsed).astype("object") if name in columns else None
    out["follow_up"] = pd.array([None] * len(raw), dtype="Int32")
    if "follow_up" in columns:
        visits = pd.to_numeric(raw[columns["follow_up"]], errors="coerce").round()
        out["follow_up"] = visits.where(visits.abs() < 2**31).astype("Int32")
    values = _nih_labels(raw[columns["labels"]], out["image_id"], path) if nih else _one_hot(raw, path)
    report.unlabelled_rows += int(values.isna().all(axis=1).sum())
    report.ignored_columns += [name for name in _unused(raw, columns, nih=nih) if name not in report.ignored_columns]
    return pd.concat([out, values], axis=1)


def write_manifest(table: pa.Table, out: str | Path) -> None:
    """Write a manifest atomically: a reader sees the old file or the new one, never a half."""
    out = remote.path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Small row groups let a scoring task read its own rows and not the table.
    atomic.write_parquet(table, out, row_group_size=8192)


def read_manifest(path: str | Path) -> pa.Table:
    """A manifest's columns in `SCHEMA` order, absent ones (but image_id) filled with nulls.

    Raises:
        TableError: no such file, not Parquet, no `image_id`, a column of a wrong kind, a repeated image_id.
    """
    with open_manifest(path) as file:
        return file.read()


class ManifestFile:
    """A manifest that is read column by column, or in batches: a million rows at once are not small.

    Attributes:
        metadata: of its schema, or None.
    """

    def __init__(self, path: str | Path, file: pq.ParquetFile) -> None:
        self._path, self._file = path, file
        self.metadata: dict[bytes, bytes] | None = file.schema_arrow.metadata
        if "image_id" not in file.schema_arrow.names:
            raise TableError(f"{path}: has no column image_id; make it with `ray-cxr manifest`")
        twice = sorted(name for name, count in Counter(file.schema_arrow.names).items() if count > 1)
        if twice:
            raise TableError(f"{path}: has two columns {twice[0]}; keep one")

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of `SCHEMA`, checked.

        Raises:
            TableError: it is of a wrong kind, holds values that it cannot, or names an image twice.
        """
        kind = SCHEMA.field(name).type
        if name not in self._file.schema_arrow.names:
            return pa.chunked_array([pa.nulls(len(self), kind)], kind)
        column = self._read(name)
        if name in identity.COLUMNS:
            return self._ids(name, column)
        column = self._cast(name, column, kind)
        allowed = SPLITS if name == "split" else (0, 1) if name in labels.LABELS else None
        if allowed is not None:
            odd = [value for value in column.unique().to_pylist() if value is not None and value not in allowed]
            if odd:
                words = ", ".join(map(str, allowed))
                raise TableError(f"{self._path}: column {name} holds {odd[:5]}; use {words} and null only")
        return column

    def _ids(self, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        ids = identity.read_ids(column, name, str(self._path))
        if name == "image_id":
            if ids.null_count:
                raise TableError(f"{self._path}: {ids.null_count:,} rows have no image_id")
            repeated = len(ids) - pc.count_distinct(ids).as_py()
            if repeated:
                raise TableError(
                    f"{self._path}: {repeated:,} rows repeat an image_id; each image stands in a manifest once"
                )
        return ids

    def read(self) -> pa.Table:
        """All of it."""
        columns = [self.column(name) for name in SCHEMA.names]
        return pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(self.metadata))

    def digest(self, known: Mapping[str, pa.ChunkedArray]) -> str:
        """`digest` of the table, one column in memory at a time beside those that are at hand already."""
        return _digest(lambda name: known[name] if name in known else self.column(name))

    def copy(self, target: Path, row_group_size: int) -> None:
        """Write its columns of `SCHEMA` as a Parquet file, a row group in memory at a time."""
        schema = SCHEMA.with_metadata(self.metadata)
        present = [name for name in SCHEMA.names if name in self._file.schema_arrow.names]
        with pq.ParquetWriter(target, schema) as writer:
            for batch in self._file.iter_batches(batch_size=row_group_size, columns=present):
                arrays = [
                    _cast_batch(batch.column(name), name, kind) if name in present else pa.nulls(len(batch), kind)
                    for name, kind in _fields()
                ]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema), row_group_size=row_group_size)

    def _read(self, name: str) -> pa.ChunkedArray:
        try:
            return self._file.read(columns=[name], use_threads=False)[name]
        except (OSError, pa.ArrowException):
            raise TableError(f"{self._path}: is damaged; make it again with `ray-cxr manifest`") from None

    def _cast(self, name: str, column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
        try:
            return column.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise TableError(f"{self._path}: column {name} is {column.type}, not {kind}") from None


@contextmanager
def open_manifest(path: str | Path) -> Iterator[ManifestFile]:
    """Open a manifest to read of it what is needed.

    Raises:
        TableError: no such file, not Parquet, or no `image_id`.
    """
    try:
        file = pq.ParquetFile(remote.path(path))
    except FileNotFoundError:
        raise TableError(f"{path}: no such file; make it with `ray-cxr manifest`") from None
    except (OSError, pa.ArrowInvalid):
        raise TableError(f"{path}: not a Parquet file; make it with `ray-cxr manifest`") from None
    with file:
        yield ManifestFile(path, file)


def digest(table: pa.Table) -> str:
    """SHA-256 over a manifest's values, hex: the same however the file was written."""
    return _digest(lambda name: table[name])


def _digest(column_of: Callable[[str], pa.ChunkedArray]) -> str:
    sink = hashlib.sha256()
    for name, kind in _fields():
        column = column_of(name)
        # Only values: how a null's place is filled, and how a file was cut into row groups, is nobody's choice.
        sink.update(np.packbits(_numpy(column.is_valid(), bool)).tobytes())
        if pa.types.is_string(kind):
            # Chunk by chunk: the texts of a million paths are not copied as a whole.
            sink.update(_numpy(pc.fill_null(pc.binary_length(column), 0), np.int32).tobytes())
            for chunk in column.chunks:
                texts = chunk.fill_null("")
                if len(texts):
                    ends = np.frombuffer(texts.buffers()[1], np.int32)
                    first, last = int(ends[texts.offset]), int(ends[texts.offset + len(texts)])
                    sink.update(memoryview(texts.buffers()[2] or b"")[first:last])
        else:
            sink.update(_numpy(column.fill_null(0), kind.to_pandas_dtype()).tobytes())
    return sink.hexdigest()


def _cast_batch(column: pa.Array, name: str, kind: pa.DataType) -> pa.Array:
    """A batch of a column that was checked as a whole, as `SCHEMA` has it."""
    return identity.to_text(column) if name in identity.COLUMNS else column.cast(kind)


def _numpy(column: pa.ChunkedArray, dtype: Any) -> np.ndarray:
    """A column without nulls, its chunks joined."""
    chunks = [np.asarray(chunk.to_numpy(zero_copy_only=False), dtype) for chunk in column.chunks]
    return np.concatenate([np.empty(0, dtype), *chunks])


def split_info(table: pa.Table) -> dict[str, Any]:
    """What the manifest's metadata says of its split; an empty dict where it says nothing.

    Raises:
        TableError: the entry is not JSON.
    """
    text = (table.schema.metadata or {}).get(SPLIT_KEY)
    if text is None:
        return {}
    try:
        info = json.loads(text)
    except ValueError:
        raise TableError("the manifest's metadata entry ray_cxr.split is not JSON") from None
    return info if isinstance(info, dict) else {}


def manifest_of_images(location: str) -> pa.Table:
    """A manifest of every picture in a folder, an archive or a URI, without labels.

    A file's name is its image_id where names are unique; where any name repeats, all ids are paths below the folder
    (`sub/a.png`, `images_001.tar.gz::images/a.png`). What the folder held besides is told by `listing_notes`.

    Raises:
        InputError: no such folder, or no pictures in it.
    """
    found = find_images(location)
    ids = file_names(found.paths)
    if pc.count_distinct(ids).as_py() < len(ids):
        ids = pc.binary_replace_slice(plain_paths(found.paths), 0, len(plain_path(found.root).encode()), "")
    # Columns of a kind share their nulls, which saves 30 bytes a row.
    nulls = {kind: pa.nulls(len(ids), kind) for _, kind in _fields()}
    columns: dict[str, Any] = {name: nulls[kind] for name, kind in _fields()}
    columns["image_id"] = ids
    columns["path"] = _absolute(found)
    notes = json.dumps({"left_out": found.left_out, "unpacked": found.unpacked}, sort_keys=True)
    return pa.table(columns, schema=SCHEMA.with_metadata({LISTING_KEY: notes.encode()}))


def listing_notes(table: pa.Table) -> list[str]:
    """What the folder of `manifest_of_images` held besides its images, as sentences; none for another manifest."""
    try:
        notes = json.loads((table.schema.metadata or {}).get(LISTING_KEY, b"{}"))
        return listing_lines(notes.get("left_out", {}), notes.get("unpacked", 0))
    except (ValueError, AttributeError, TypeError):
        return []


def listing_lines(left_out: dict[str, int], unpacked: int) -> list[str]:
    """`Listing.left_out` and `Listing.unpacked` as sentences, those with nothing to say left out."""
    lines = []
    if left_out:
        lines.append(f"files left out, not being images: {format_suffixes(left_out)}")
    if unpacked:
        lines.append(f"{unpacked:,} members of archives not taken, their files lying unpacked beside the archive")
    return lines


def _absolute(found: Listing) -> pa.ChunkedArray:
    """The paths of a listing as `storage.absolute` gives them."""
    root = make_absolute(found.root.removesuffix("/"))
    if found.root.endswith("/"):
        root = root.rstrip("/") + "/"
    return pc.binary_replace_slice(found.paths, 0, len(found.root.encode()), root)


def _fields() -> list[tuple[str, pa.DataType]]:
    return [(item.name, item.type) for item in SCHEMA]


def _split_prefix(text: str) -> tuple[str | None, str]:
    name, equals, path = text.partition("=")
    return (name, path) if equals and name in SPLITS else (None, text)


def _word(header: str) -> str:
    return re.sub(r"[^a-z0-9]", "", header.lower())


def _identify(raw: pd.DataFrame, path: str) -> dict[str, str]:
    columns: dict[str, str] = {}
    words = {_word(str(name)): str(name) for name in reversed(list(raw.columns))}
    for name, known in _COLUMNS.items():
        for word in known:
            if word in words:
                columns[name] = words[word]
                break
    one_hot = [str(name) for name in raw.columns if labels.canonical(str(name))]
    if "image_id" not in columns:
        raise TableError(
            f"{path}: has no image column ('Image Index' or 'Image'); its columns are: {_shown(raw.columns)}"
        )
    if "labels" in columns and one_hot:
        raise TableError(
            f"{path}: has 'Finding Labels' and also columns for {', '.join(one_hot)}; remove one of the two"
        )
    if "labels" not in columns and not one_hot:
        raise TableError(
            f"{path}: has neither 'Finding Labels' nor a column for any finding; its columns are: {_shown(raw.columns)}"
        )
    canonical = [labels.canonical(name) for name in one_hot]
    twice = {str(label) for label in canonical if canonical.count(label) > 1}
    if twice:
        raise TableError(f"{path}: two columns spell the same finding: {', '.join(sorted(twice))}")
    return columns


def _shown(columns: pd.Index) -> str:
    names = [str(name) for name in columns]
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")


def _unused(raw: pd.DataFrame, columns: dict[str, str], *, nih: bool) -> list[str]:
    used = set(columns.values())
    names = [str(name) for name in raw.columns if str(name) not in used and not str(name).startswith("Unnamed")]
    if nih:
        # NIH's own four size columns, under whichever of their names, are known and not needed.
        return [name for name in names if not re.search(r"OriginalImage|Height|Width|^[xy]\]?$|Spacing", name)]
    return [name for name in names if not labels.canonical(name)]


def _nullable(text: pd.Series) -> pd.Series:
    stripped = text.str.strip().astype("object")
    return stripped.where(stripped != "", None)


def _patients(raw: pd.DataFrame, columns: dict[str, str], image_ids: pd.Series) -> pd.Series:
    if "patient_id" not in columns:
        return pd.Series([None] * len(raw), index=raw.index, dtype="object")
    ids = _nullable(raw[columns["patient_id"]].str.strip().str.replace(r"^(\d+)\.0+$", r"\1", regex=True))
    # NIH's copies write one patient as 1 or 00000001; elsewhere 007 and 7 may be two people. A picture of NIH's begins
    # with its patient's number, which tells the two cases apart row by row.
    named = image_ids.where(image_ids.str.match(_NIH_NAME)).str.slice(0, 8)
    same = named.notna() & ids.notna() & (ids.astype("string").str.zfill(8) == named)
    return ids.mask(same.fillna(False).astype(bool), ids.astype("string").str.lstrip("0").astype("object"))


def _ages(text: pd.Series, report: ManifestReport) -> pd.Series:
    unique = {value: demographics.parse_age(value) for value in text.unique()}
    ages = text.map(unique).astype(float)
    blank = text.str.strip() == ""
    absurd = ages > MAX_AGE_YEARS
    report.unreadable_ages += int((ages.isna() & ~blank).sum())
    report.absurd_ages += int(absurd.sum())
    return ages.mask(absurd)


def _nih_labels(text: pd.Series, image_ids: pd.Series, path: str) -> pd.DataFrame:
    codes, unique = pd.factorize(text)
    rows = np.zeros((len(unique), len(labels.LABELS)), dtype=float)
    for position, value in enumerate(unique):
        if not value.strip():
            rows[position] = np.nan  # not labelled
            continue
        try:
            rows[position] = labels.encode(labels.parse(value))
        except TableError as error:
            first = int(np.argmax(codes == position))
            raise TableError(f"{path}: line {text.index[first]} ({image_ids.iloc[first]}): {error}") from None
    return pd.DataFrame(rows[codes], columns=list(labels.LABELS), index=text.index).astype("Int8")


def _one_hot(raw: pd.DataFrame, path: str) -> pd.DataFrame:
    out = pd.DataFrame({label: pd.array([None] * len(raw), dtype="Int8") for label in labels.LABELS}, index=raw.index)
    words = {"0": 0, "0.0": 0, "1": 1, "1.0": 1}
    for column in raw.columns:
        label = labels.canonical(str(column))
        if label is None:
            continue
        text = raw[column].str.strip()
        bad = ~text.isin([*words, ""])
        if bad.any():
            raise TableError(
                f"{path}: line {_line(bad)}: {column} is {text[bad].iloc[0]!r}; use 0, 1 or blank (not labelled)"
            )
        out[label] = text.map(words).astype("Int8")
    present = out[list(labels.FINDINGS)]
    if not any(labels.canonical(str(column)) == labels.NO_FINDING for column in raw.columns):
        # 1 where all 14 are present and 0; null where any is null.
        none_of_them = (present.fillna(0).sum(axis=1) == 0).astype("Int8")
        out[labels.NO_FINDING] = none_of_them.mask(present.isna().any(axis=1))
        return out
    clash = (out[labels.NO_FINDING] == 1).fillna(False) & (present.fillna(0).sum(axis=1) > 0)
    if clash.any():
        raise TableError(f"{path}: line {_line(clash)}: No Finding is 1 together with a finding; mend the row")
    return out


def _line(bad: pd.Series) -> int:
    """The line of the file that the first bad row is on."""
    return int(bad.index[int(np.argmax(bad.to_numpy()))])


def _refuse_repeats(data: pd.DataFrame) -> None:
    repeated = data[data.duplicated("image_id", keep=False)]
    if len(repeated):
        first = repeated["image_id"].iloc[0]
        tables = sorted(set(repeated.loc[repeated["image_id"] == first, "_table"]))
        raise TableError(
            f"{repeated['image_id'].nunique():,} images are named more than once, such as {first!r} "
            f"in {' and '.join(tables)}; each image may stand in the tables once"
        )


def _read_csv(path: str) -> pd.DataFrame:
    """A table as text, its index being the lines of the file. Rows that are cut off or too long are refused."""
    # strict: a quotation mark that is never closed would otherwise swallow the rest of the table.
    reader = csv.reader(io.StringIO(_read_text(path, "CSV table"), newline=""), strict=True)
    rows: dict[int, list[str]] = {}
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows[reader.line_num] = row
    except csv.Error as error:
        raise TableError(f"{path}: line {reader.line_num}: cannot be read as CSV: {error}") from None
    if not rows:
        raise TableError(f"{path}: the table is empty")
    header = rows.pop(next(iter(rows)))
    named = max(i for i, name in enumerate(header) if name.strip()) + 1
    for line, row in rows.items():
        if len(row) < named or any(cell.strip() for cell in row[len(header) :]):
            raise TableError(f"{path}: line {line} has {len(row)} columns, the header {len(header)}; mend the row")
        row[len(header) :] = []
        row += [""] * (len(header) - len(row))
    known = {word for words in _COLUMNS.values() for word in words}
    names: list[str] = []
    for i, name in enumerate(header):
        if name in names and (_word(name) in known or labels.canonical(name)):
            raise TableError(f"{path}: has the column {name!r} twice; remove one of them")
        names.append(f"Unnamed {i}" if not name.strip() else f"{name} ({i})" if name in names else name)
    return pd.DataFrame(list(rows.values()), columns=names, index=list(rows), dtype=str)


def _read_text(path: str, what: str) -> str:
    """A local text file, gunzipped where it is gzip by its first bytes."""
    if "://" in path:
        raise TableError(f"{path}: is a URI; copy the {what} to this machine and name the copy")
    try:
        data = Path(path).read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise TableError(f"{path}: no such file; name an existing {what}") from None
    except UnicodeDecodeError:
        raise TableError(f"{path}: is not text in UTF-8; name a {what}, or save it as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise TableError(f"{path}: is a damaged gzip file; copy it again") from None
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}; name a {what}") from None


def _read_list(path: str) -> list[str]:
    lines = [line.strip() for line in _read_text(path, "split list").splitlines()]
    named = {number: line for number, line in enumerate(lines, 1) if line}
    if not named:
        raise TableError(f"{path}: the list is empty")
    names = list(named.values())
    identity.check_names(names, list(named), path)
    return names


def _digests(paths: Sequence[str]) -> dict[str, str]:
    """SHA-256 by file name; by path as given where two files have one name."""
    names = Counter(Path(path).name for path in paths)
    return {Path(path).name if names[Path(path).name] == 1 else path: _sha256(path) for path in paths}


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _find_images(image_ids: pd.Series, location: str, report: ManifestReport) -> pd.Series:
    found = find_images(location)
    report.not_images, report.unpacked_members = found.left_out, found.unpacked
    wanted = pa.array(image_ids, pa.string())
    # For each file the row that names it; the table of a million names is built once, in Arrow.
    rows = pc.index_in(file_names(found.paths), value_set=wanted)
    files = pc.indices_nonzero(pc.is_valid(rows))
    named = rows.take(files).to_numpy()
    first = np.full(len(wanted), -1)
    first[named[::-1]] = files.to_numpy()[::-1]
    paths = _absolute(found)
    twice = np.bincount(named, minlength=len(wanted)) > 1
    if twice.any():
        row = int(np.flatnonzero(twice)[np.argmin(image_ids.to_numpy()[twice].astype(str))])
        one, other = found.paths.take(files.filter(pa.array(named == row))).slice(0, 2).to_pylist()
        raise TableError(
            f"--images {redact(location)}: {int(twice.sum()):,} names are found more than once, such as "
            f"{one} and {other}; point --images at one copy"
        )
    report.images_found = int((first >= 0).sum())
    report.images_missing = len(wanted) - report.images_found
    report.files_not_in_table = len(paths) - report.images_found
    if report.images_found == 0:
        raise TableError(
            f"--images {redact(location)}: none of its {len(paths):,} pictures is named in the tables; "
            f"the tables want names such as {image_ids.iloc[0]!r}"
        )
    picked = paths.take(pa.array(first, mask=first < 0))
    return pd.Series(picked.to_pylist(), index=image_ids.index, dtype="object")
