"""Score tables in memory, from `ray-cxr score` or another system, with their values checked."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_cxr.data import identity
from ray_cxr.errors import ImageError, InputError, TableError, first_line
from ray_cxr.evaluation import calibration
from ray_cxr.labels import FINDINGS, LABELS, SPREAD_PREFIX, canonicalize
from ray_cxr.reporting.ranking import Ranking
from ray_cxr.storage import contents, remote
from ray_cxr.storage.paths import is_uri, redact
from ray_cxr.storage.stores import describe_error, is_access_denied, open_uri

#: Columns of text by the field of `Scores` that holds them.
_TEXT = {"ids": "image_id", "paths": "path", "patients": "patient_id", "studies": "study_id", "codes": "error_code"}
_TEXT |= {"top_findings": "top_finding", "quality_flags": "quality_flag", "views": "view"}
#: Columns that identify the content of an image; tables of earlier versions lack them.
CONTENT = ("sop_instance_uid", "content_digest")


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """The images that fitted a model's weights or chose its epoch and thresholds: object arrays [n] of str.

    A patient may be None. `parts` holds `train` or `val`, or None if the bundle does not record the part.
    """

    images: np.ndarray
    patients: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True)
class Night:
    """A finished SCORES folder of several that are read as one table.

    Attributes:
        name: its date, for readers; see `nights.read_nights`.
        source, folder: `Scores.source` and `Scores.run_folder` of its table.
        finished: when its scoring ended first, ISO 8601; None if unknown.
        digest: SHA-256 of its run.json.
    """

    name: str
    source: str
    folder: str | None
    finished: str | None
    digest: str | None


@dataclass(frozen=True)
class Scores:
    """A score table in memory, one entry per row in every array [n].

    Attributes:
        is_own: `ray-cxr score` wrote the table, not another system.
        folder: the folder with the Parquet files, as `remote.to_path` takes it; None for files and read-only stores.
        run_folder: the SCORES folder, as `remote.to_path` takes it; None for another system's table.
        ids, paths, patients, studies, codes, top_findings, quality_flags, views: object arrays of str or None.
        ok: False on error rows.
        abnormality, priority, p, c: float64 with NaN for null; p is raw and c calibrated, per finding.
        ranking: how images and studies are ranked.
        spread: per finding, how much the probabilities differ that were averaged; empty without an average.
        flags: per finding, int8 with -1 for null.
        ignored: columns named like predictions of an unknown finding.
        model, run: `model.json` and `run.json`, or empty.
        nights: the folders of a table of several nights, oldest first; empty for one folder or file.
        night: the number of the night of each row, int64; None for one folder or file.
    """

    source: str
    is_own: bool
    folder: str | None
    run_folder: str | None
    ids: np.ndarray
    paths: np.ndarray
    patients: np.ndarray
    studies: np.ndarray
    ok: np.ndarray
    codes: np.ndarray
    top_findings: np.ndarray
    abnormality: np.ndarray
    priority: np.ndarray
    ranking: Ranking
    quality_flags: np.ndarray
    views: np.ndarray
    model_digests: tuple[str, ...]
    findings: tuple[str, ...]
    p: dict[str, np.ndarray]
    c: dict[str, np.ndarray]
    spread: dict[str, np.ndarray]
    flags: dict[str, np.ndarray]
    ignored: tuple[str, ...]
    model: dict[str, Any]
    run: dict[str, Any]
    training: TrainingImages | None
    nights: tuple[Night, ...] = ()
    night: np.ndarray | None = None

    @property
    def folders(self) -> list[str]:
        """The SCORES folders, as `remote.to_path` takes them."""
        known = [night.folder for night in self.nights] or [self.run_folder]
        return [folder for folder in known if folder is not None]

    def group_by_folder(self, image_ids: Collection[str]) -> dict[str, set[str]]:
        """Return the SCORES folders that hold the rows of these images, each with the ids of its images."""
        if self.night is None:
            return {folder: set(image_ids) for folder in self.folders}
        ids = np.array([*image_ids], dtype=object)
        rows = identity.find_ids(ids, self.ids)
        nights = np.where(rows < 0, -1, self.night[rows])
        grouped = {night.folder: set(ids[nights == number]) for number, night in enumerate(self.nights)}
        return {folder: found for folder, found in grouped.items() if folder is not None and found}

    @property
    def provenance(self) -> Mapping[str, Any]:
        value = self.model.get("provenance")
        return value if isinstance(value, Mapping) else {}

    @property
    def operating_points(self) -> Mapping[str, Any]:
        return self.model.get("operating_points") or {}

    def threshold(self, finding: str) -> float | None:
        return finite_or_none((self.operating_points.get(finding) or {}).get("threshold"))

    def select(self, rows: np.ndarray) -> Scores:
        """Return the table with these rows only, int [m], in their order."""
        changes: dict[str, Any] = {"ranking": replace(self.ranking, values=self.ranking.values[rows])}
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if isinstance(value, np.ndarray):
                changes[name] = value[rows]
            elif name in ("p", "c", "spread", "flags"):
                changes[name] = {finding: column[rows] for finding, column in value.items()}
        return replace(self, **changes)


def read_scores(path: str | Path) -> Scores:
    """Read a SCORES folder, or the Parquet file or folder of another system's predictions."""
    table, origin = open_scores(path)
    return build_scores(table, str(path), origin)


def build_scores(table: pa.Table, source: str, origin: Mapping[str, Any]) -> Scores:
    """Check a table of scores; `origin` is that of `open_scores`."""
    return _Columns(table, source).to_scores(**origin)


def open_scores(path: str | Path) -> tuple[pa.Table, dict[str, Any]]:
    """Read the files of `read_scores`, and return the fields of `Scores` that are not in the table."""
    location = Location.of(str(path))
    run = location.find_run()
    if run is not None:
        if not run.has("_SUCCESS"):
            raise InputError(f"{path}: score did not finish; run it again to continue")
        # A path inside a SCORES folder must not bypass the leak check.
        location = location if location.is_file else run.child("scores")
    return location.read_parquet(str(path)), {
        "is_own": run is not None,
        "folder": None if location.is_file else location.address(str(path)),
        "run_folder": None if run is None else run.address(str(path)),
        "model": run.read_json("model.json") if run else {},
        "run": run.read_json("run.json") if run else {},
        "training": read_training_images(run.child("split.parquet")) if run and run.has("split.parquet") else None,
    }


def read_score_table(table: pa.Table, name: str) -> Scores:
    """Check a table of predictions in memory, whose training images are unknown; `name` starts messages."""
    origin: dict[str, Any] = {"is_own": False, "folder": None, "run_folder": None, "training": None}
    return _Columns(table, name).to_scores(**origin, model={}, run={})


@dataclass(frozen=True)
class Location:
    """A file or folder, local or behind a URI that Arrow can open."""

    fs: pafs.FileSystem
    path: str
    is_file: bool

    @classmethod
    def of(cls, text: str) -> Location:
        shown = redact(text)
        try:
            fs, path = open_uri(text) if is_uri(text) else (pafs.LocalFileSystem(), os.path.realpath(text))
            info = fs.get_file_info(path)
        except ImageError as error:
            raise InputError(f"{shown}: {error.message}") from None
        except Exception as error:  # each store raises its own types, whose texts may repeat credentials of the address
            reason = "access denied" if is_access_denied(error) else describe_error(error)
            raise InputError(f"{shown}: cannot be opened ({reason}); check the path and the permissions") from None
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"{shown}: not found. Pass the folder that `ray-cxr score` wrote, or a Parquet file.")
        return cls(fs, path.rstrip("/"), info.type == pafs.FileType.File)

    def child(self, name: str) -> Location:
        path = f"{self.path}/{name}"
        return Location(self.fs, path, self.fs.get_file_info(path).type == pafs.FileType.File)

    def address(self, opened_as: str) -> str | None:
        """Return the location as `remote.to_path` takes it; None in a store other than S3."""
        if isinstance(self.fs, pafs.LocalFileSystem):
            return self.path
        store = remote.as_store_path(remote.to_path(opened_as)) if opened_as.lower().startswith("s3://") else None
        return None if store is None else str(store.from_inner(self.path))

    def has(self, *names: str) -> bool:
        """Return whether any of these is in the folder."""
        infos = self.fs.get_file_info([f"{self.path}/{name}" for name in names])
        return any(info.type != pafs.FileType.NotFound for info in infos)

    def find_run(self) -> Location | None:
        """Return the SCORES folder at or above this location."""
        if not self.is_file and self.has("run.json", "model.json", "scores"):
            return self
        folder = self.path.rpartition("/")[0] if self.is_file else self.path
        above, _, name = folder.rpartition("/")
        run = Location(self.fs, above or "/", False)
        # settings.json: rows of an incomplete run must not pass as another system's predictions.
        return run if name == "scores" and run.has("run.json", "model.json", "settings.json") else None

    def read_bytes(self) -> bytes:
        with self.fs.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> dict[str, Any]:
        if not self.has(name):
            return {}
        try:
            value = json.loads(self.child(name).read_bytes())
        except ValueError:
            raise InputError(f"{self.path}/{name}: not JSON; run score again") from None
        return value if isinstance(value, dict) else {}

    def read_parquet(self, shown: str, is_used: Callable[[str], bool] | None = None) -> pa.Table:
        """Read columns, by default those that reports use, from one file or from all files below a folder."""
        is_used = is_used or _is_used
        files = [self.path]
        if not self.is_file:
            entries = self.fs.get_file_info(pafs.FileSelector(self.path, recursive=True, allow_not_found=True))
            visible = [entry for entry in entries if not entry.base_name.startswith((".", "_"))]
            files = sorted(entry.path for entry in visible if entry.is_file and entry.path.endswith(".parquet"))
        if not files:
            raise InputError(_explain(shown, "it has no Parquet files"))

        def read(name: str) -> pa.Table:
            try:
                with self.fs.open_input_file(name) as stream:
                    file = pq.ParquetFile(stream, pre_buffer=True)
                    return file.read(columns=[column for column in file.schema_arrow.names if is_used(column)])
            except (OSError, pa.ArrowInvalid):
                address = shown + name.removeprefix(self.path)
                raise TableError(_explain(address, "not a readable Parquet file")) from None

        # In parallel, because reading from a bucket is mostly waiting.
        with ThreadPoolExecutor(remote.THREADS, thread_name_prefix="scores") as pool:
            parts = list(pool.map(read, files))
        try:
            return pa.concat_tables(parts, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise TableError(f"{shown}: its Parquet files do not fit together: {first_line(error)}") from None


def _explain(source: str, problem: str) -> str:
    """Return the message for a source that is not scores; a local one is described."""
    remedy = f"{problem}; pass the folder that `ray-cxr score` wrote, or a Parquet file with image_id and p_<Finding>"
    return f"{redact(source)}: {remedy}" if is_uri(source) else contents.explain(source, "scores", remedy)


def _is_used(column: str) -> bool:
    numbers = ("abnormality", "priority")
    texts = (*_TEXT.values(), *CONTENT, "status", "model_digest")
    return column in (*texts, *numbers) or column.startswith(("p_", "c_", "flag_"))


class _Columns:
    """Checked access to the columns of a score table."""

    def __init__(self, table: pa.Table, source: str) -> None:
        self.table, self.source = table, source
        if "image_id" not in table.column_names:
            raise TableError(_explain(source, "it has no column image_id"))
        if len(table) == 0:
            raise TableError(f"{source}: holds no rows")

    def to_scores(self, **origin: Any) -> Scores:
        """Build the score table; `origin` holds the fields that are not in the Parquet files."""
        text: dict[str, Any] = {field: read_texts(self.table, name, self.source) for field, name in _TEXT.items()}
        ok = self._read_ok()
        self._check_ids(text["ids"])
        columns, ignored = self._name_columns()
        findings = tuple(label for label in LABELS if label in columns["p_"])
        if not findings:
            raise TableError(_explain(self.source, f"it has no column p_<Finding>, such as p_{FINDINGS[0]}"))
        p = {f: self._probabilities(columns["p_"][f]) for f in findings}
        c = {f: self._probabilities(name) for f, name in columns["c_"].items() if f in findings}
        flags = {f: self._flags(name) for f, name in columns["flag_"].items() if f in findings}
        points = origin["model"].get("operating_points") or {}
        for finding in findings:
            if finding not in flags and points.get(finding):
                flagged = calibration.apply_threshold(p[finding], points[finding]["threshold"]).astype(np.int8)
                flags[finding] = np.where(np.isnan(p[finding]), np.int8(-1), flagged)
        p = {finding: np.where(ok, values, np.nan) for finding, values in p.items()}
        c = {finding: np.where(ok, values, np.nan) for finding, values in c.items()}
        names = frozenset(self.table.column_names)
        ranking = Ranking.build(p, c, origin["run"], columns=names, is_own=origin["is_own"])
        abnormality, priority, top = ranking.rank(ranking.values)
        if "priority" in names:
            priority = np.where(ok, read_floats(self.table, "priority", self.source), np.nan)
        else:
            text["top_findings"] = top
        if "abnormality" in names and origin["is_own"]:
            abnormality = np.where(ok, read_floats(self.table, "abnormality", self.source), np.nan)
        digests = read_texts(self.table, "model_digest", self.source)
        return Scores(
            source=self.source,
            **text,
            ok=ok,
            abnormality=abnormality,
            priority=priority,
            ranking=ranking,
            model_digests=tuple(sorted({digest for digest in digests if digest is not None})),
            findings=findings,
            p=p,
            c=c,
            spread={
                finding: np.where(ok, read_floats(self.table, f"{SPREAD_PREFIX}{finding}", self.source), np.nan)
                for finding in findings
                if f"{SPREAD_PREFIX}{finding}" in names
            },
            flags={finding: np.where(ok, values, np.int8(-1)) for finding, values in flags.items()},
            ignored=tuple(ignored),
            **origin,
        )

    def _check_ids(self, ids: np.ndarray) -> None:
        if any(name is None for name in ids):
            raise TableError(f"{self.source}: {sum(name is None for name in ids):,} rows have no image_id")
        repeated = [name for name, n in Counter(ids).items() if n > 1]
        if repeated:
            found = f"{len(repeated):,} images have more than one row, such as {repeated[0]!r}"
            raise TableError(f"{self.source}: {found}; keep one row per image")

    def _read_ok(self) -> np.ndarray:
        if "status" not in self.table.column_names:
            return np.ones(len(self.table), dtype=bool)
        status = read_texts(self.table, "status", self.source)
        wrong = sorted({str(value) for value in status} - {"ok", "error"})
        if wrong:
            raise TableError(f"{self.source}: status is {wrong[0]!r} in some rows; use ok or error")
        return np.asarray(status == "ok")

    def _name_columns(self) -> tuple[dict[str, dict[str, str]], list[str]]:
        """Return the columns' names by prefix and finding, and the columns of unknown findings."""
        columns: dict[str, dict[str, str]] = {"p_": {}, "c_": {}, "flag_": {}}
        ignored: list[str] = []
        for name in self.table.column_names:
            for prefix, known in columns.items():
                if not name.startswith(prefix) or name.startswith(SPREAD_PREFIX):
                    continue
                finding = canonicalize(name.removeprefix(prefix))
                if finding is None:
                    ignored.append(name)
                elif finding in known:
                    raise TableError(f"{self.source}: the columns {known[finding]} and {name} are the same finding")
                else:
                    known[finding] = name
        return columns, ignored

    def _probabilities(self, name: str) -> np.ndarray:
        values = read_floats(self.table, name, self.source)
        bad = (values < 0) | (values > 1)
        if bad.any():
            found = f"{int(bad.sum()):,} values of {name} are outside 0..1, such as {values[bad][0]:g}"
            raise TableError(f"{self.source}: {found}; the column must hold probabilities")
        return values

    def _flags(self, name: str) -> np.ndarray:
        values = read_floats(self.table, name, self.source)
        if not (np.isnan(values) | (values == 0) | (values == 1)).all():
            raise TableError(f"{self.source}: column {name} must hold true, false or null")
        return np.where(np.isnan(values), -1, values).astype(np.int8)


def read_texts(table: pa.Table, name: str, source: str) -> np.ndarray:
    """Return a column as an object array of str or None; all None if the column is missing."""
    if name not in table.column_names:
        return np.full(len(table), None, dtype=object)
    try:
        is_id = name in identity.COLUMNS
        text = identity.read_ids(table[name], name, source) if is_id else pc.cast(table[name], pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TableError(f"{source}: column {name} is {table[name].type}, not text") from None
    return np.array(text.to_pylist(), dtype=object)


def read_floats(table: pa.Table, name: str, source: str) -> np.ndarray:
    """Return a column as float64 with NaN for null; all NaN if the column is missing."""
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    try:
        values = pc.cast(table[name], pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TableError(f"{source}: column {name} is {table[name].type}, not numbers") from None
    return np.asarray(pc.fill_null(values, float("nan")).combine_chunks().to_numpy(zero_copy_only=False))


def read_training_images(location: Location) -> TrainingImages | None:
    """Read `split.parquet` of a bundle; return None if the file names no training image, as for an imported model."""
    with location.fs.open_input_file(location.path) as stream:
        table = pq.read_table(stream)
    parts = read_texts(table, "split", location.path)
    kept = np.isin(parts, ("train", "val")) if "split" in table.column_names else np.ones(len(table), dtype=bool)
    if not kept.any():
        return None
    ids, patients = (read_texts(table, name, location.path)[kept] for name in ("image_id", "patient_id"))
    return TrainingImages(ids, identity.unify_patients(ids, patients), parts[kept])


def finite_or_none(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None
