"""The report: reads a score table, joins labels, guards against leaks, writes numbers, pictures and a page.

Nothing is lost on the way: every row of either table ends in a count of `metrics.json`, and every image, the
failed ones too, in `worklist.csv`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from ray_cxr.data import atomic, imaging, manifest
from ray_cxr.errors import ERROR_CODES, ImageError, InputError, LeakError, OutputError, TableError
from ray_cxr.evaluation import calibration, intervals, metrics
from ray_cxr.labels import FINDINGS, LABELS, NO_FINDING, canonical
from ray_cxr.reporting import html, plots

_log = logging.getLogger(__name__)

#: With fewer positive (or negative) patients than this the bootstrap's interval is too narrow to trust.
FEW_PATIENTS = 10
_EXAMPLES = 4
UNKNOWN_TRAINING = "not all images that trained the model are known"
#: What a report consists of; an older report's pictures must not survive into a newer one.
_PICTURES = (
    "auroc",
    "roc",
    "precision_recall",
    "examples",
    "learning_curves",
    "prevalence",
    "priority",
)
#: A spreadsheet takes a cell that begins so for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


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
        model, run: `model.json` and `run.json`, or empty.
        trained: image_id and patient_id of the images that trained the model; None where that is not known.
    """

    source: str
    own: bool
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
    trained: tuple[np.ndarray, np.ndarray] | None


@dataclass(frozen=True)
class Evaluated:
    """The images with both scores and labels, in the labels' order; `rows` are their rows in `Scores`."""

    rows: np.ndarray
    labels: dict[str, np.ndarray]
    patients: np.ndarray


def write_report(
    scores: str | Path,
    out: str | Path,
    *,
    labels: str | Path | None = None,
    split: str | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Write metrics.json, pictures (PNG and SVG), worklist.csv and, last, report.html into `out`.

    Args:
        scores: what `ray-cxr score` wrote; or Parquet, a file or a folder, with image_id and p_<Finding>.
        out: the folder for the report; an older report in it is replaced.
        labels: a manifest with labels; None reports what was found without saying how well.
        split: evaluate only the labels' rows of `train`, `val` or `test`; None takes all rows.
        n_resamples: patient-bootstrap resamples.
        seed: of the bootstrap and of the choice of examples.

    Returns:
        What was written to metrics.json: float64 unrounded; what is undefined is None, with its reason.

    Raises:
        InputError: the scores are unfinished, are none, or share no image with the labels; `split` without
            labels.
        TableError: a table names an image twice or holds values that it cannot hold.
        LeakError: an image or patient that trained the model is in an evaluation of `test` or of no named
            split.
        OutputError: `out` is a file.
    """
    if split is not None and split not in manifest.SPLITS:
        raise InputError(f"--split {split}: use train, val or test")
    if split is not None and labels is None:
        raise InputError(f"--split {split}: needs --labels, whose rows it chooses")
    if n_resamples < 1:
        raise InputError(f"n_resamples is {n_resamples}; it must be at least 1")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: is a file; name a folder")

    table = read_scores(scores)
    _log.debug("%s: %d rows, %d errors", table.source, len(table.ids), int((~table.ok).sum()))
    result: dict[str, Any] = {
        "split": split,
        "split_label": None,
        "split_kind": None,
        "split_seed": None,
        "n_images": int(table.ok.sum()),
        "n_patients": _n_patients(table.patients[table.ok]),
        "findings": {},
        "macro": None,
        "counts": _counts(table),
        "flag_rates": _flag_rates(table),
        "digests": _digests(table),
        "intervals": None,
        "leak_check": None,
        "notes": _notes(table),
    }
    figures: dict[str, Figure] = {}
    if labels is not None:
        evaluated = _evaluate(table, labels, split, result, n_resamples, seed)
        figures.update(_evaluation_figures(table, evaluated, result, seed))
    priority = table.priority[np.isfinite(table.priority)]
    if labels is None and len(priority):
        figures["priority"] = plots.priority_histogram(priority)
    epochs = table.model.get("curves") or []
    if epochs:
        figures["learning_curves"] = plots.learning_curves(epochs)
    return _write(out, table, result, figures)


def read_scores(path: str | Path) -> Scores:
    """A SCORES folder, or another system's predictions.

    Raises:
        InputError: nothing there, a run of `ray-cxr score` that did not finish, or no Parquet files.
        TableError: no image_id or p_<Finding> column, an image named twice, a value that cannot be.
    """
    place = _Place.of(str(path))
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
        model=home.json("model.json") if home else {},
        run=home.json("run.json") if home else {},
        trained=trained,
    )


@dataclass(frozen=True)
class _Place:
    """A file or folder, local or behind a URI that Arrow knows."""

    fs: pafs.FileSystem
    path: str
    is_file: bool

    @classmethod
    def of(cls, text: str) -> _Place:
        try:
            fs, path = (
                pafs.FileSystem.from_uri(text) if "://" in text else (pafs.LocalFileSystem(), os.path.abspath(text))
            )
            info = fs.get_file_info(path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{text}: cannot be opened ({reason}); check the path and the permissions") from None
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"{text}: no such file or folder; name what `ray-cxr score` wrote, or a Parquet file")
        return cls(fs, path.rstrip("/"), info.type == pafs.FileType.File)

    def child(self, name: str) -> _Place:
        path = f"{self.path}/{name}"
        return _Place(self.fs, path, self.fs.get_file_info(path).type == pafs.FileType.File)

    def has(self, name: str) -> bool:
        return bool(self.fs.get_file_info(f"{self.path}/{name}").type != pafs.FileType.NotFound)

    def home(self) -> _Place | None:
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

    def parent(self) -> _Place:
        return _Place(self.fs, self.path.rpartition("/")[0] or "/", False)

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
        parts = []
        for name in files:
            try:
                with self.fs.open_input_file(name) as stream:
                    file = pq.ParquetFile(stream)
                    wanted = [column for column in file.schema_arrow.names if _wanted(column)]
                    parts.append(file.read(columns=wanted))
            except (OSError, pa.ArrowInvalid):
                raise TableError(f"{name}: not a readable Parquet file") from None
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
    model: dict[str, Any],
    run: dict[str, Any],
    trained: tuple[np.ndarray, np.ndarray] | None,
) -> Scores:
    if "image_id" not in table.column_names:
        raise TableError(f"{source}: has no column image_id")
    if len(table) == 0:
        raise TableError(f"{source}: holds no rows")
    text = {name: _strings(table, name, source) for name in _TEXT}
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
    priority = _floats(table, "priority", source)
    top = text["top_finding"]
    if "priority" not in table.column_names:
        priority, top = _priority(p, ok)
    digests = _strings(table, "model_digest", source)
    return Scores(
        source=source,
        own=own,
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


def _strings(table: pa.Table, name: str, source: str) -> np.ndarray:
    """A column as an object array of str or None; all None where there is no such column."""
    if name not in table.column_names:
        return np.full(len(table), None, dtype=object)
    try:
        values = pc.cast(table[name], pa.string()).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TableError(f"{source}: column {name} is {table[name].type}, not text") from None
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out


def _floats(table: pa.Table, name: str, source: str) -> np.ndarray:
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    try:
        values = pc.cast(table[name], pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise TableError(f"{source}: column {name} is {table[name].type}, not numbers") from None
    return np.asarray(pc.fill_null(values, float("nan")).combine_chunks().to_numpy(zero_copy_only=False))


def _probabilities(table: pa.Table, name: str, source: str) -> np.ndarray:
    values = _floats(table, name, source)
    bad = (values < 0) | (values > 1)
    if bad.any():
        raise TableError(
            f"{source}: {int(bad.sum()):,} values of {name} are outside 0..1, such as {values[bad][0]:g}; "
            "the column must hold probabilities"
        )
    return values


def _flags(table: pa.Table, name: str, source: str) -> np.ndarray:
    """bool|null as int8 with -1 for null."""
    values = _floats(table, name, source)
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


def _trained(place: _Place) -> tuple[np.ndarray, np.ndarray] | None:
    """image_id and patient_id of what trained the model; None where the file names none, as an imported model's."""
    with place.fs.open_input_file(place.path) as stream:
        table = pq.read_table(stream)
    used = _strings(table, "split", place.path)
    kept = np.isin(used, ("train", "val")) if "split" in table.column_names else np.ones(len(table), dtype=bool)
    if not kept.any():
        return None
    return _strings(table, "image_id", place.path)[kept], _strings(table, "patient_id", place.path)[kept]


def _n_patients(patients: np.ndarray) -> int:
    return intervals.patient_codes(patients)[1]


def _counts(table: Scores) -> dict[str, Any]:
    codes = Counter(code or "unknown" for code in table.codes[~table.ok])
    ordered = [*ERROR_CODES, *sorted(set(codes) - set(ERROR_CODES))]
    return {
        "rows": len(table.ids),
        "scored": int(table.ok.sum()),
        "errors": int((~table.ok).sum()),
        "by_code": {code: codes[code] for code in ordered if codes[code]},
        "quality_flags": dict(sorted(Counter(flag for flag in table.quality_flags if flag).items())),
    }


def _flag_rates(table: Scores) -> dict[str, Any]:
    """Share of scored images flagged, and the share that the operating point led to expect."""
    expected = table.model.get("expected_flag_rates") or {}
    rates: dict[str, Any] = {}
    for finding in table.findings:
        flags = table.flags.get(finding)
        known = flags[flags >= 0] if flags is not None else np.zeros(0)
        rates[finding] = {
            "observed": float(known.mean()) if len(known) else None,
            "expected": _number(expected.get(finding)),
            "n": len(known),
        }
    return rates


def _number(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def _digests(table: Scores) -> dict[str, Any]:
    return {
        "model": list(table.model_digests) or [digest for digest in [table.model.get("digest")] if digest],
        "input": table.run.get("input_digest"),
        "labels": None,
        "tables": None,
    }


def _provenance(table: Scores) -> Mapping[str, Any]:
    value = table.model.get("provenance")
    return value if isinstance(value, Mapping) else {}


def _notes(table: Scores) -> list[str]:
    """What a reader must know to read the rest rightly."""
    notes = []
    if not table.own:
        notes.append(
            "These are another system's predictions. Nothing tells which images trained it, so a leak "
            "between its training and this evaluation cannot be ruled out here."
        )
    if len(table.model_digests) > 1:
        notes.append(f"The rows come from {len(table.model_digests)} different models; the numbers mix them.")
    provenance = _provenance(table)
    if provenance.get("initial_weights") == "random" and not table.model.get("curves"):
        notes.append("The model starts from random weights and has no learning curve: it may never have been trained.")
    if table.own and (table.trained is None or provenance.get("lineage") == "unknown"):
        notes.append(
            "Not all images that trained this model are known, so a leak between its training and this evaluation "
            "cannot be ruled out here."
        )
    if table.ignored:
        shown = ", ".join(table.ignored[:8]) + (" …" if len(table.ignored) > 8 else "")
        notes.append(f"Columns that name no known finding were not used: {shown}.")
    return notes


def _evaluate(
    table: Scores, path: str | Path, split: str | None, result: dict[str, Any], n_resamples: int, seed: int
) -> Evaluated:
    """Join, guard, measure; fills `result`."""
    labelled = manifest.read_manifest(path)
    info = manifest.split_info(labelled)
    evaluated = _join(table, labelled, path, split, result["counts"])
    result["split_label"] = describe_split(split, info)
    result["split_kind"] = info.get("kind")
    result["split_seed"] = info.get("seed")
    place = _Place.of(str(path))
    result["digests"]["labels"] = hashlib.sha256(place.bytes()).hexdigest() if place.is_file else None
    result["digests"]["tables"] = info.get("tables") or info.get("digests")
    result["leak_check"] = _guard(table, evaluated, split)
    if split in ("train", "val"):
        use = "fitted its weights" if split == "train" else "chose its best epoch, calibration and operating points"
        result["notes"].insert(
            0,
            f"This is the {split} split, which, if the model was trained on this manifest, {use}: the "
            "numbers say how well it fits and not how well it will do on new patients.",
        )
    result["n_images"] = len(evaluated.rows)
    result["n_patients"] = _n_patients(evaluated.patients)
    result["intervals"] = {
        "method": "percentile bootstrap over patients",
        "level": 0.95,
        "n_resamples": n_resamples,
        "seed": seed,
        "delong": "logit scale, images taken as independent",
    }
    _measure(table, evaluated, result, n_resamples, seed)
    return evaluated


def describe_split(split: str | None, info: Mapping[str, Any]) -> str:
    """The split in words, for every place where a number stands.

    Args:
        split: the evaluated part, or None for all rows.
        info: what the manifest's metadata says: kind and seed.
    """
    if split is None:
        return "all labelled images, whatever their split"
    kind = info.get("kind")
    if kind == "official":
        return f"official {split} split"
    if kind == "patient":
        return f"{split} split of a random patient split, seed {info.get('seed')}"
    if kind == "given":
        return f"{split} split as the tables gave it"
    return f"{split} split of unknown origin"


def _join(table: Scores, labelled: pa.Table, path: str | Path, split: str | None, counts: dict[str, Any]) -> Evaluated:
    ids = _strings(labelled, "image_id", str(path))
    splits = _strings(labelled, "split", str(path))
    chosen = np.ones(len(ids), dtype=bool)
    if split is not None:
        if all(value is None for value in splits):
            raise InputError(f"--split {split}: {path} has no splits; leave --split out, or give it splits")
        chosen = splits == split
        if not chosen.any():
            there = ", ".join(sorted({value for value in splits if value is not None}))
            raise InputError(f"--split {split}: {path} has no such rows; its splits are {there}")
    rows = pd.Index(table.ids).get_indexer(pd.Index(ids[chosen]))
    both = rows >= 0
    if not both.any():
        where = f"the {split} split of {path}" if split else str(path)
        raise InputError(
            f"{table.source} and {where} have no image in common; "
            f"compare their image_id, such as {table.ids[0]!r} and {ids[chosen][0]!r}"
        )
    failed = np.zeros(len(rows), dtype=bool)
    failed[both] = ~table.ok[rows[both]]
    elsewhere = np.isin(table.ids, ids[~chosen])
    counts.update(
        labelled=int(chosen.sum()),
        evaluated=int((both & ~failed).sum()),
        labelled_not_scored=int((~both).sum()),
        labelled_errors=int(failed.sum()),
        scored_not_labelled=int((~np.isin(table.ids, ids)).sum()),
        scored_other_split=int(elsewhere.sum()),
    )
    kept = both & ~failed
    rows = rows[kept]
    values = {}
    for finding in LABELS:
        known = labelled[finding].drop_null().unique().to_pylist()
        if not {0, 1}.issuperset(known):
            raise TableError(f"{path}: column {finding} holds {sorted(known)}; use 0, 1 and null (not labelled)")
        values[finding] = pc.fill_null(labelled[finding], -1).to_numpy()[chosen][kept]
    patients = _strings(labelled, "patient_id", str(path))[chosen][kept]
    # Where the labels do not know the patient, the score table may.
    patients = np.where([patient is None for patient in patients], table.patients[rows], patients)
    return Evaluated(rows, values, patients)


def _guard(table: Scores, evaluated: Evaluated, split: str | None) -> dict[str, Any]:
    if table.trained is None:
        return {"checked": False, "reason": UNKNOWN_TRAINING}
    images, patients = table.trained
    same_images = int(np.isin(table.ids[evaluated.rows], images).sum())
    known = {patient for patient in patients if patient is not None}
    shared = {patient for patient in evaluated.patients if patient in known}
    if split not in ("train", "val") and (same_images or shared):
        among = "the test split" if split else "the labels"
        remedy = (
            "use a manifest whose test split excludes them"
            if split
            else "add `--split test`, or use a manifest that excludes them"
        )
        raise LeakError(
            f"{same_images:,} images and {len(shared):,} patients of {among} trained this model; {remedy} "
            "(`--split train` or `--split val` evaluates training images as such)"
        )
    known_all = _provenance(table).get("lineage") != "unknown"
    return {
        "checked": known_all,
        "reason": None if known_all else UNKNOWN_TRAINING,
        "training_images": len(images),
        "training_patients": len(known),
        "shared_images": same_images,
        "shared_patients": len(shared),
    }


def _measure(table: Scores, evaluated: Evaluated, result: dict[str, Any], n_resamples: int, seed: int) -> None:
    rows = evaluated.rows
    names = [f for f in LABELS if f in table.findings or (evaluated.labels[f] >= 0).any()]
    shared = [finding for finding in names if finding in table.findings]
    y = np.column_stack([evaluated.labels[f] for f in shared]) if shared else np.zeros((len(rows), 0))
    s = np.column_stack([table.p[f][rows] for f in shared]) if shared else np.zeros((len(rows), 0))
    _log.debug("bootstrap: %d resamples of %d images", n_resamples, len(rows))
    boot = intervals.bootstrap_auroc(
        y,
        s,
        evaluated.patients,
        n_resamples=n_resamples,
        seed=seed,
        macro=np.array([finding != NO_FINDING for finding in shared], dtype=bool),
    )
    flags = np.column_stack(
        [table.flags[f][rows] if f in table.flags else np.full(len(rows), -1) for f in shared]
        or [np.zeros((len(rows), 0))]
    )
    judged = (y >= 0) & (flags >= 0)
    positive, negative = judged & (y == 1), judged & (y == 0)
    rates = intervals.bootstrap_ratios(
        np.hstack([positive & (flags == 1), negative & (flags == 0)]),
        np.hstack([positive, negative]),
        evaluated.patients,
        n_resamples=n_resamples,
        seed=seed,
    )
    points = table.model.get("operating_points") or {}
    expected = table.model.get("expected_flag_rates") or {}
    for finding in names:
        labels = evaluated.labels[finding]
        entry = _empty_entry()
        result["findings"][finding] = entry
        if finding not in table.findings:
            entry["n"], entry["positives"] = int((labels >= 0).sum()), int((labels == 1).sum())
            entry["unscored"] = entry["n"]
            entry["reason"] = "labelled, but the scores have no column for it"
            continue
        column = shared.index(finding)
        p = table.p[finding][rows]
        usable = (labels >= 0) & ~np.isnan(p)
        entry["unscored"] = int(((labels >= 0) & np.isnan(p)).sum())
        _measure_one(entry, labels[usable], p[usable], evaluated.patients[usable])
        entry["auroc_low"], entry["auroc_high"] = boot.findings[column].low, boot.findings[column].high
        entry["auroc_undefined_resamples"] = boot.findings[column].undefined
        if entry["auroc"] is not None and boot.findings[column].low is None:
            entry["caution"] = f"no interval: {boot.findings[column].reason}"
        point = points.get(finding) or {}
        entry["threshold"], entry["rule"] = _number(point.get("threshold")), point.get("rule")
        entry["expected_flag_rate"] = _number(expected.get(finding))
        if judged[:, column].any():
            seen = judged[:, column]
            cells = metrics.confusion(labels[seen], flags[seen, column] == 1)
            low_high = {"sensitivity": rates[column], "specificity": rates[len(shared) + column]}
            for name, interval in low_high.items():
                entry[name] = getattr(cells, name)
                entry[f"{name}_low"], entry[f"{name}_high"] = interval.low, interval.high
            entry["ppv"], entry["npv"], entry["flag_rate"] = cells.ppv, cells.npv, cells.flag_rate
        if finding in table.c:
            c = table.c[finding][rows]
            known = (labels >= 0) & ~np.isnan(c)
            if known.any():
                entry["brier"] = metrics.brier(labels[known], c[known])
                entry["mean_calibrated"] = float(c[known].mean())
    defined = [f for f, e in result["findings"].items() if e["auroc"] is not None and f != NO_FINDING]
    result["macro"] = {
        "auroc": float(np.mean([result["findings"][f]["auroc"] for f in defined])) if defined else None,
        "auroc_low": boot.macro.low,
        "auroc_high": boot.macro.high,
        "undefined_resamples": boot.macro.undefined if defined else n_resamples,
        "findings": defined,
        "reason": None if defined else "no finding has a defined AUROC",
    }


def _empty_entry() -> dict[str, Any]:
    numbers = (
        "auroc auroc_low auroc_high auroc_undefined_resamples auroc_delong_low auroc_delong_high "
        "average_precision threshold rule sensitivity sensitivity_low sensitivity_high specificity "
        "specificity_low specificity_high ppv npv flag_rate expected_flag_rate brier mean_calibrated reason "
        "caution"
    )
    return {
        "n": 0,
        "positives": 0,
        "positive_patients": 0,
        "prevalence": None,
        "unscored": 0,
        **dict.fromkeys(numbers.split()),
    }


def _measure_one(entry: dict[str, Any], y: np.ndarray, p: np.ndarray, patients: np.ndarray) -> None:
    entry["n"], entry["positives"] = len(y), int(y.sum())
    entry["positive_patients"] = _n_patients(patients[y == 1])
    entry["prevalence"] = float(y.mean()) if len(y) else None
    entry["reason"] = metrics.undefined_reason(y)
    if entry["reason"] is not None:
        return
    entry["auroc"] = metrics.auroc(y, p)
    entry["average_precision"] = metrics.average_precision(y, p)
    pair = intervals.delong(y, p)
    bounds = intervals.delong_interval(*pair) if pair else None
    if bounds:
        entry["auroc_delong_low"], entry["auroc_delong_high"] = bounds
    negative_patients = _n_patients(patients[y == 0])
    few, kind = min((entry["positive_patients"], "positive"), (negative_patients, "negative"))
    if few < FEW_PATIENTS:
        who = f"only {few} {kind} patients" if few > 1 else f"only one {kind} patient"
        entry["caution"] = f"{who}: the interval is narrower than the truth"
    elif entry["auroc"] in (0.0, 1.0):
        entry["caution"] = "the classes separate fully here: the bootstrap cannot see beyond that"


def _evaluation_figures(table: Scores, evaluated: Evaluated, result: dict[str, Any], seed: int) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    panels = []
    for finding, entry in result["findings"].items():
        if entry["auroc"] is None:
            continue
        labels, p = evaluated.labels[finding], table.p[finding][evaluated.rows]
        usable = (labels >= 0) & ~np.isnan(p)
        panels.append(
            plots.Panel(
                finding=finding,
                y=labels[usable],
                s=p[usable],
                auroc=entry["auroc"],
                low=entry["auroc_low"],
                high=entry["auroc_high"],
                average_precision=entry["average_precision"],
                at=(entry["sensitivity"], entry["specificity"], entry["ppv"]),
            )
        )
    if panels:
        figures["auroc"] = plots.auroc_overview(panels, result["macro"])
        figures["roc"] = plots.roc(panels)
        figures["precision_recall"] = plots.precision_recall(panels)
    present = [
        (finding, entry["prevalence"], entry["positives"], entry["flag_rate"])
        for finding, entry in result["findings"].items()
        if entry["prevalence"] is not None
    ]
    if present:
        figures["prevalence"] = plots.prevalence(present)
    groups = _examples(table, evaluated, seed)
    if any(tiles for _, tiles in groups):
        figures["examples"] = plots.examples(groups)
    return figures


def _examples(table: Scores, evaluated: Evaluated, seed: int) -> list[tuple[str, list[plots.Example]]]:
    """A seeded random draw of hits, misses and false alarms: typical ones, not the prettiest or the worst.

    A band goes round the findings, one image of each, before a second of any; no image is shown twice.
    """
    rng = np.random.default_rng(seed)
    names = [f for f in table.findings if f != NO_FINDING]
    kinds = (("True positives", 1, 1), ("Missed", 1, 0), ("False alarms", 0, 1))
    called = {f: table.flags[f][evaluated.rows] for f in names if f in table.flags}
    if not any((flags >= 0).any() for flags in called.values()):
        # No operating points: the outer tenths of each finding's scores stand for called and not called.
        kinds = (
            ("Positives that score high", 1, 1),
            ("Positives that score low", 1, 0),
            ("Negatives that score high", 0, 1),
        )
        called = {f: _tenths(table.p[f][evaluated.rows]) for f in names}
    names = [f for f in names if f in called]
    shown: set[int] = set()
    groups = []
    for title, label, flag in kinds:
        queues: list[tuple[str, list[int]]] = []
        for position in rng.permutation(len(names)):
            finding = names[position]
            cases = np.flatnonzero((evaluated.labels[finding] == label) & (called[finding] == flag))
            queues.append((finding, [int(case) for case in rng.permutation(cases)[:50]]))
        chosen: list[tuple[str, int]] = []
        while len(chosen) < _EXAMPLES and any(queue for _, queue in queues):
            for finding, queue in queues:
                while queue and queue[0] in shown:
                    queue.pop(0)
                if queue and len(chosen) < _EXAMPLES:
                    case = queue.pop(0)
                    shown.add(case)
                    chosen.append((finding, case))
        groups.append((title, [_example(table, evaluated, finding, case) for finding, case in chosen]))
    return groups


def _tenths(p: np.ndarray) -> np.ndarray:
    """1 for the highest tenth of the scores, 0 for the lowest, -1 between and where there is no score."""
    known = p[~np.isnan(p)]
    if not known.size:
        return np.full(len(p), -1)
    low, high = np.quantile(known, [0.1, 0.9])
    return np.where(p >= high, 1, np.where(p <= low, 0, -1))


def _example(table: Scores, evaluated: Evaluated, heading: str, case: int) -> plots.Example:
    row = evaluated.rows[case]
    picture, code = _picture(table.paths[row])
    points = table.model.get("operating_points") or {}
    ranked = sorted(
        ((f, float(table.p[f][row])) for f in table.findings if f != NO_FINDING and not np.isnan(table.p[f][row])),
        key=lambda pair: -pair[1],
    )
    return plots.Example(
        picture=picture,
        code=code,
        heading=heading,
        true=tuple(f for f in FINDINGS if evaluated.labels[f][case] == 1),
        flagged=tuple(f for f in FINDINGS if f in table.flags and table.flags[f][row] == 1),
        bars=tuple((f, p, _number((points.get(f) or {}).get("threshold"))) for f, p in ranked[:3]),
    )


def _picture(path: str | None) -> tuple[np.ndarray | None, str | None]:
    if path is None:
        return None, "missing"
    try:
        return imaging.load(path), None
    except ImageError as error:
        return None, error.code


def worklist(table: Scores) -> list[dict[str, str]]:
    """One row per study (per image without one), highest priority first; failures last, never left out."""
    studies: dict[tuple[str, ...], list[int]] = {}
    for row, study in enumerate(table.studies):
        key = ("image", table.ids[row]) if study is None else ("study", table.patients[row] or "", study)
        studies.setdefault(key, []).append(row)
    names = [f for f in table.findings if f in table.flags and f != NO_FINDING]
    lines = []
    for rows in studies.values():
        ranked = sorted(rows, key=lambda row: (-_or_lowest(float(table.priority[row])), table.ids[row]))
        best = ranked[0]
        priority = float(table.priority[best])
        lines.append(
            (
                (
                    -_or_lowest(priority),
                    table.patients[best] or "",
                    table.studies[best] or "",
                    table.ids[best],
                ),
                {
                    "priority": "" if np.isnan(priority) else str(np.float32(priority)),
                    "top_finding": table.top_findings[best] or "",
                    "flagged": "|".join(f for f in names if any(table.flags[f][row] == 1 for row in rows)),
                    "patient_id": table.patients[best] or "",
                    "study_id": table.studies[best] or "",
                    "image_id": table.ids[best],
                    "n_images": str(len(rows)),
                    "n_errors": str(sum(not table.ok[row] for row in rows)),
                    "errors": _joined(table.codes[row] or "unknown" for row in rows if not table.ok[row]),
                    "quality_flags": _joined(table.quality_flags[row] for row in rows),
                },
            )
        )
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def _or_lowest(priority: float) -> float:
    return float("-inf") if np.isnan(priority) else priority


def _joined(values: Any) -> str:
    return "|".join(sorted({value for value in values if value}))


def _worklist_csv(lines: Sequence[Mapping[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        # Numbers stay numbers; a text that a spreadsheet would run gets an apostrophe.
        writer.writerow({k: f"'{v}" if k != "priority" and v.startswith(_FORMULA) else v for k, v in line.items()})
    return buffer.getvalue()


def _write(out: Path, table: Scores, result: dict[str, Any], figures: Mapping[str, Figure]) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", *(f"{picture}.{kind}" for picture in _PICTURES for kind in ("png", "svg"))):
        (out / name).unlink(missing_ok=True)
    pictures: dict[str, bytes] = {}
    for name in _PICTURES:
        if name in figures:
            _log.debug("drawing %s", name)
            pictures[name], vector = plots.encode(figures[name])
            (out / f"{name}.png").write_bytes(pictures[name])
            (out / f"{name}.svg").write_bytes(vector)
    lines = worklist(table)
    atomic.write_text(out / "worklist.csv", _worklist_csv(lines))
    atomic.write_json(out / "metrics.json", result)
    view = {
        "m": result,
        "source": table.source,
        "own": table.own,
        "has_priority": bool(np.isfinite(table.priority).any()),
        "model": _model_facts(table),
        "summary": _summary(result),
        "pictures": pictures,
        "worklist": lines[:25],
        "worklist_total": len(lines),
        "remarks": _remarks(result["findings"]),
    }
    atomic.write_text(out / "report.html", html.render(view))
    _log.debug("report in %s", out)
    return result


def _model_facts(table: Scores) -> list[tuple[str, str]]:
    """What is known of the model, as rows of two texts."""
    model = table.model
    spec = model.get("input_spec") or {}
    facts = [
        ("Backbone", model.get("backbone")),
        (
            "Input",
            f"{spec['size']} × {spec['size']} pixels, {spec.get('aspect')}" if spec.get("size") else None,
        ),
        ("Findings", ", ".join(plots.spaced(finding) for finding in table.findings)),
        ("Model digest", ", ".join(table.model_digests) or model.get("digest")),
    ]
    provenance = model.get("provenance")
    for name, value in sorted(provenance.items()) if isinstance(provenance, Mapping) else ():
        if isinstance(value, (str, int, float)):
            facts.append((str(name).replace("_", " ").capitalize(), value))
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _remarks(findings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What must be said of a finding's numbers beside the numbers."""
    remarks = {}
    for finding, entry in findings.items():
        parts = []
        if entry["reason"]:
            parts.append(f"undefined: {entry['reason']}")
        if entry["caution"]:
            parts.append(entry["caution"])
        if entry["unscored"] and entry["auroc"] is not None:
            parts.append(f"{entry['unscored']:,} labelled images have no score for it")
        if parts:
            remarks[finding] = "; ".join(parts)
    return remarks


def _summary(result: Mapping[str, Any]) -> list[str]:
    """The report in a few sentences."""
    counts, macro = result["counts"], result["macro"]
    out = []
    if macro is None:
        out.append(
            f"{counts['scored']:,} of {counts['rows']:,} images were scored, of {result['n_patients']:,} "
            "patients. There are no labels, so this report says what was found, not how well."
        )
    else:
        out.append(
            f"{result['n_images']:,} images of {result['n_patients']:,} patients were evaluated: "
            f"{result['split_label']}."
        )
        if macro["auroc"] is None:
            out.append(f"There is no macro AUROC: {macro['reason']}.")
        else:
            found = result["findings"]
            between = (
                f" (95% interval {macro['auroc_low']:.3f} to {macro['auroc_high']:.3f})"
                if macro["auroc_low"] is not None
                else " (no interval)"
            )
            of = f"{len(macro['findings'])} findings" if len(macro["findings"]) > 1 else "one finding"
            out.append(f"Macro AUROC is {macro['auroc']:.3f}{between} over {of}.")
            ranked = sorted(macro["findings"], key=lambda f: found[f]["auroc"])
            if len(ranked) > 1:
                weak = ranked[: min(3, len(ranked) // 2)]
                out.append(
                    "Weakest: "
                    + ", ".join(f"{plots.spaced(f)} {found[f]['auroc']:.3f}" for f in weak)
                    + f". Strongest: {plots.spaced(ranked[-1])} {found[ranked[-1]]['auroc']:.3f}."
                )
            chance = [f for f in ranked if found[f]["auroc_low"] is not None and found[f]["auroc_low"] <= 0.5]
            if chance:
                out.append(f"Not told apart from chance: {', '.join(map(plots.spaced, chance))}.")
        unsure = [f for f, entry in result["findings"].items() if entry["caution"]]
        if unsure:
            out.append(f"Do not lean on the intervals of {', '.join(map(plots.spaced, unsure))}: see the remarks.")
        undefined = [f for f, entry in result["findings"].items() if entry["auroc"] is None]
        if undefined:
            out.append(f"No AUROC can be given for {', '.join(map(plots.spaced, undefined))}; the table says why.")
    if counts["errors"]:
        parts = ", ".join(f"{code} {n:,}" for code, n in counts["by_code"].items())
        out.append(
            f"{counts['errors']:,} of {counts['rows']:,} images "
            f"({html.percent(counts['errors'] / counts['rows'], 2)}) could not be scored: {parts}. "
            "They are at the end of the worklist and in no number above."
        )
    else:
        out.append("No image failed.")
    if macro is not None and counts["labelled_not_scored"]:
        out.append(f"{counts['labelled_not_scored']:,} labelled images have no row in the scores.")
    return out
