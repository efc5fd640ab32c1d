"""Score tables, ours or another system's, in memory and checked."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ray_cxr.data import identity
from ray_cxr.errors import ImageError, InputError, TableError
from ray_cxr.evaluation import calibration, intervals
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING, canonical
from ray_cxr.storage import remote
from ray_cxr.storage.paths import redact
from ray_cxr.storage.stores import describe_error, is_access_denied, open_uri


@dataclass(frozen=True, eq=False)
class Trained:
    """The images that fitted a model's weights or chose its epoch and thresholds: object arrays [n] of str.

    Attributes:
        images, patients: ids; a patient that is not known is None.
        parts: `train` or `val`, None where the bundle does not say.
    """

    images: np.ndarray
    patients: np.ndarray
    parts: np.ndarray


@dataclass(frozen=True)
class Scores:
    """A score table in memory, one entry per row in every array [n].

    Attributes:
        ids, paths, patients, studies, codes, top_findings, quality_flags: object arrays of str or None.
        ok: bool; False on error rows.
        p, c: per finding, raw and calibrated probability, float64 with NaN for null.
        flags: per finding, int8 with -1 for null.
        priority: float64, NaN for null.
        own: written by `ray-cxr score`, not by another system.
        folder: where its Parquet files were looked for, with all folders below, as `remote.path` takes it; None for a
            file, and for stores that are only read.
        home: the SCORES folder, likewise; None where there is none.
        model, run: `model.json` and `run.json`, or empty.
        trained: the images that trained the model; None where they are not known.
    """

    source: str
    own: bool
    folder: str | None
    home: str | None
    ids: np.ndarray
    paths: np.ndarray
    patients: np.ndarray
    studies: np.ndarray
    ok: np.ndarray
    codes: np.ndarray
    top_findings: np.ndarray
    priority: np.ndarray
    quality_flags: np.ndarray
    model_digests: tuple[str, ...]
    findings: tuple[str, ...]
    p: dict[str, np.ndarray]
    c: dict[str, np.ndarray]
    flags: dict[str, np.ndarray]
    ignored: tuple[str, ...]
    model: dict[str, Any]
    run: dict[str, Any]
    trained: Trained | None


def read_scores(path: str | Path) -> Scores:
    """A SCORES folder, or another system's predictions.

    Raises:
        InputError: nothing there, a run of `ray-cxr score` that did not finish, or no Parquet files.
        TableError: no image_id or p_<Finding> column, an image named twice, a value that cannot be.
    """
    place = Place.of(str(path))
    home = place.home()
    if home is not None:
        if not home.has("_SUCCESS"):
            raise InputError(f"{path}: score did not finish; run it again to continue")
        # Naming the folder's inside must not slip past the leak guard.
        place = place if place.is_file else home.child("scores")
    table = place.read_parquet(str(path))
    trained = None
    if home is not None and home.has("split.parquet"):
        trained = _trained(home.child("split.parquet"))
    return _parse(
        table,
        source=str(path),
        own=home is not None,
        folder=None if place.is_file else place.address(str(path)),
        home=None if home is None else home.address(str(path)),
        model=home.json("model.json") if home else {},
        run=home.json("run.json") if home else {},
        trained=trained,
    )


@dataclass(frozen=True)
class Place:
    """A file or folder, local or behind a URI that Arrow knows."""

    fs: pafs.FileSystem
    path: str
    is_file: bool

    @classmethod
    def of(cls, text: str) -> Place:
        shown = redact(text)
        try:
            fs, path = open_uri(text) if "://" in text else (pafs.LocalFileSystem(), os.path.realpath(text))
            info = fs.get_file_info(path)
        except ImageError as error:
            raise InputError(f"{shown}: {error.message}") from None
        except Exception as error:  # each store has its own, and their texts can hold what the address holds
            reason = "the access is not allowed" if is_access_denied(error) else describe_error(error)
            raise InputError(f"{shown}: cannot be opened ({reason}); check the path and the permissions") from None
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"{shown}: no such file or folder; name what `ray-cxr score` wrote, or a Parquet file")
        return cls(fs, path.rstrip("/"), info.type == pafs.FileType.File)

    def child(self, name: str) -> Place:
        path = f"{self.path}/{name}"
        return Place(self.fs, path, self.fs.get_file_info(path).type == pafs.FileType.File)

    def address(self, given: str) -> str | None:
        """It as `remote.path` takes it, where this was opened as `given`; None of another store."""
        if isinstance(self.fs, pafs.LocalFileSystem):
            return self.path
        there = remote.stored(remote.path(given)) if given.lower().startswith("s3://") else None
        return None if there is None else str(there.at(self.path))

    def has(self, name: str) -> bool:
        return bool(self.fs.get_file_info(f"{self.path}/{name}").type != pafs.FileType.NotFound)

    def home(self) -> Place | None:
        """The SCORES folder that this is, or is inside of."""
        if not self.is_file and any(self.has(name) for name in ("run.json", "model.json", "scores")):
            return self
        inside = self.parent() if self.is_file else self
        if inside.path.rpartition("/")[2] == "scores":
            above = inside.parent()
            # settings.json: an unfinished run's rows are no other system's predictions either.
            if any(above.has(name) for name in ("run.json", "model.json", "settings.json")):
                return above
        return None

    def parent(self) -> Place:
        return Place(self.fs, self.path.rpartition("/")[0] or "/", False)

    def bytes(self) -> bytes:
        with self.fs.open_input_stream(self.path) as stream:
            return bytes(stream.read())

    def json(self, name: str) -> dict[str, Any]:
        if not self.has(name):
            return {}
        try:
            value = json.loads(self.child(name).bytes())
        except ValueError:
            raise InputError(f"{self.path}/{name}: not JSON; run score again") from None
        return value if isinstance(value, dict) else {}

    def read_parquet(self, shown: str) -> pa.Table:
        if self.is_file:
            files = [self.path]
        else:
            found = self.fs.get_file_info(pafs.FileSelector(self.path, recursive=True, allow_not_found=True))
            files = sorted(
                item.path
                for item in found
                if item.type == pafs.FileType.File
                and item.path.endswith(".parquet")
                and not item.base_name.startswith((".", "_"))
            )
        if not files:
            raise InputError(f"{shown}: holds no Parquet files; name what `ray-cxr score` wrote")

        def read(name: str) -> pa.Table:
            try:
                with self.fs.open_input_file(name) as stream:
                    file = pq.ParquetFile(stream, pre_buffer=True)
                    return file.read(columns=[column for column in file.schema_arrow.names if _wanted(column)])
            except (OSError, pa.ArrowInvalid):
                raise TableError(f"{name}: not a readable Parquet file") from None

        # Several at a time: of what a bucket takes to answer, nearly all is waiting.
        with ThreadPoolExecutor(remote.THREADS, thread_name_prefix="scores") as pool:
            parts = list(pool.map(read, files))
        try:
            return pa.concat_tables(parts, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise TableError(f"{shown}: its Parquet files do not fit together: {str(error).splitlines()[0]}") from None


_TEXT = ("image_id", "path", "patient_id", "study_id", "status", "error_code", "top_finding", "quality_flag")


def _wanted(column: str) -> bool:
    # Embeddings and whatever else a table holds would only cost memory.
    return column in (*_TEXT, "priority", "model_digest") or column.startswith(("p_", "c_", "flag_"))


def _parse(
    table: pa.Table,
    *,
    source: str,
    own: bool,
    folder: str | None,
    home: str | None,
    model: dict[str, Any],
    run: dict[str, Any],
    trained: Trained | None,
) -> Scores:
    if "image_id" not in table.column_names:
        raise TableError(f"{source}: has no column image_id")
    if len(table) == 0:
        raise TableError(f"{source}: holds no rows")
    text = {name: strings(table, name, source) for name in _TEXT}
    ids = text["image_id"]
    if any(name is None for name in ids):
        raise TableError(f"{source}: {sum(name is None for name in ids):,} rows have no image_id")
    repeated = [name for name, n in Counter(ids).items() if n > 1]
    if repeated:
        raise TableError(
            f"{source}: {len(repeated):,} images have more than one row, such as {repeated[0]!r}; "
            "each image may be scored once"
        )

    columns: dict[str, dict[str, str]] = {"p_": {}, "c_": {}, "flag_": {}}
    ignored: list[str] = []
    for name in table.column_names:
        for prefix, known in columns.items():
            if not name.startswith(prefix):
                continue
            finding = canonical(name.removeprefix(prefix))
            if finding is None:
                ignored.append(name)
            elif finding in known:
                raise TableError(f"{source}: the columns {known[finding]} and {name} are the same finding")
            else:
                known[finding] = name
    findings = tuple(label for label in LABELS if label in columns["p_"])
    if not findings:
        raise TableError(f"{source}: has no column p_<Finding>, such as p_{FINDINGS[0]}")
    p = {finding: _probabilities(table, columns["p_"][finding], source) for finding in findings}
    c = {f: _probabilities(table, name, source) for f, name in columns["c_"].items() if f in findings}
    flags = {f: _flags(table, name, source) for f, name in columns["flag_"].items() if f in findings}
    points = model.get("operating_points") or {}
    for finding in findings:
        if finding not in flags and points.get(finding):
            flagged = calibration.flags(p[finding], points[finding]["threshold"]).astype(np.int8)
            flags[finding] = np.where(np.isnan(p[finding]), np.int8(-1), flagged)

    if "status" in table.column_names:
        status = text["status"]
        wrong = sorted({str(value) for value in status} - {"ok", "error"})
        if wrong:
            raise TableError(f"{source}: status is {wrong[0]!r} in some rows; use ok or error")
        ok = status == "ok"
    else:
        ok = np.ones(len(ids), dtype=bool)
    priority = floats(table, "priority", source)
    top = text["top_finding"]
    if "priority" not in table.column_names:
        priority, top = _priority(p, ok)
    digests = strings(table, "model_digest", source)
    return Scores(
        source=source,
        own=own,
        folder=folder,
        home=home,
        ids=ids,
        paths=text["path"],
        patients=text["patient_id"],
        studies=text["study_id"],
        ok=ok,
        codes=text["error_code"],
        top_findings=top,
        priority=np.where(ok, priority, np.nan),
        quality_flags=text["quality_flag"],
        model_digests=tuple(sorted({digest for digest in digests if digest is not None})),
        findings=findings,
        p={f: np.where(ok, values, np.nan) for f, values in p.items()},
        c={f: np.where(ok, values, np.nan) for f, values in c.items()},
        flags={f: np.where(ok, values, np.int8(-1)) for f, values in flags.items()},
        ignored=tuple(ignored),
        model=model,
        run=run,
        trained=trained,
    )


def strings(table: pa.Table, name: str, source: str) -> np.ndarray:
    """A column as an object array of str or None; all None where there is no such column."""
    if name not in table.column_names:
        return np.full(len(table), None, dtype=object)
    try:
        ids = name in identity.COLUMNS
        text = identity.read_ids(table[name], name, source) if ids else pc.cast(table[name], pa.string())
        values = text.to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TableError(f"{source}: column {name} is {table[name].type}, not text") from None
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out


def floats(table: pa.Table, name: str, source: str) -> np.ndarray:
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    try:
        values = pc.cast(table[name], pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TableError(f"{source}: column {name} is {table[name].type}, not numbers") from None
    return np.asarray(pc.fill_null(values, float("nan")).combine_chunks().to_numpy(zero_copy_only=False))


def _probabilities(table: pa.Table, name: str, source: str) -> np.ndarray:
    values = floats(table, name, source)
    bad = (values < 0) | (values > 1)
    if bad.any():
        raise TableError(
            f"{source}: {int(bad.sum()):,} values of {name} are outside 0..1, such as {values[bad][0]:g}; "
            "the column must hold probabilities"
        )
    return values


def _flags(table: pa.Table, name: str, source: str) -> np.ndarray:
    """bool|null as int8 with -1 for null."""
    values = floats(table, name, source)
    if not (np.isnan(values) | (values == 0) | (values == 1)).all():
        raise TableError(f"{source}: column {name} must hold true, false or null")
    return np.where(np.isnan(values), -1, values).astype(np.int8)


def _priority(p: Mapping[str, np.ndarray], ok: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Highest raw probability and its finding, for tables that bring no priority; No_Finding never counts."""
    names = [finding for finding in p if finding != NO_FINDING]
    top = np.full(len(ok), None, dtype=object)
    if not names:
        return np.full(len(ok), np.nan), top
    stacked = np.column_stack([p[finding] for finding in names])
    filled = np.where(np.isnan(stacked), -1.0, stacked)
    highest = filled.max(axis=1)
    known = ok & (highest >= 0)
    top[known] = np.array(names, dtype=object)[filled.argmax(axis=1)[known]]
    return np.where(known, highest, np.nan), top


def _trained(place: Place) -> Trained | None:
    """What trained the model; None where the file names none, as an imported model's."""
    with place.fs.open_input_file(place.path) as stream:
        table = pq.read_table(stream)
    used = strings(table, "split", place.path)
    kept = np.isin(used, ("train", "val")) if "split" in table.column_names else np.ones(len(table), dtype=bool)
    if not kept.any():
        return None
    ids, patients = (strings(table, name, place.path)[kept] for name in ("image_id", "patient_id"))
    return Trained(ids, patients, used[kept])


def n_patients(patients: np.ndarray) -> int:
    return intervals.patient_codes(patients)[1]


def number(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def provenance(table: Scores) -> Mapping[str, Any]:
    value = table.model.get("provenance")
    return value if isinstance(value, Mapping) else {}
