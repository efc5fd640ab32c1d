"""The finished SCORES folders of several nights as one table, and what each night held."""

from __future__ import annotations

import glob
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_cxr.errors import InputError
from ray_cxr.imaging.demographics import count_of
from ray_cxr.reporting.scores import (
    CONTENT,
    Location,
    Night,
    Scores,
    build_scores,
    open_scores,
    read_scores,
    read_texts,
)
from ray_cxr.storage import remote
from ray_cxr.storage.paths import is_uri

_log = logging.getLogger(__name__)

#: Two rows of one image differ by less in any probability; the nights may differ in precision.
_MAX_DIFFERENCE = 0.25
_DIGITS = 12


@dataclass(frozen=True, eq=False)
class NightTable:
    """A night with all of its rows; `replaced` of them do not count in the table of all nights."""

    night: Night
    table: Scores
    replaced: int


def list_folders(scores: str | Path | Sequence[str | Path]) -> list[str]:
    """Return the score tables that a report reads; a pattern such as `nights/*/scores` stands for what matches it.

    If folders of `score` match a pattern, everything else that matches, such as a report, is left out with a warning.

    Raises:
        InputError: nothing matches a pattern, or a table is listed twice.
    """
    texts = [scores] if isinstance(scores, (str, Path)) else scores
    found = [path for text in texts for path in _expand(str(text))]
    if not found:
        raise InputError("no scores; pass a folder that `ray-cxr score` wrote")
    repeated = [path for path, n in Counter(found).items() if n > 1]
    if repeated:
        raise InputError(f"{repeated[0]}: passed twice; pass each folder of scores once")
    return found


def _expand(text: str) -> list[str]:
    if is_uri(text) and not remote.is_address(text):
        return [text]
    node, names = remote.to_path(text), list[str]()
    while node.name:
        names.insert(0, node.name)
        node = node.parent
    if not any(map(glob.has_magic, names)) or remote.to_path(text).exists():
        return [text]
    found = [node]
    for name in names:
        if glob.has_magic(name):
            found = [path for folder in found for path in sorted(folder.glob(name))]
        else:
            found = [path / name for path in found]
    found = [path for path in found if path.exists()]
    if not found:
        raise InputError(f"{text}: matches nothing; pass folders that `ray-cxr score` wrote")
    own = [path for path in found if Location.of(str(path)).find_run() is not None]
    if own and (others := [path.name for path in found if path not in own]):
        _log.warning("%s: left out, because not written by `ray-cxr score`: %s", text, ", ".join(others))
    return list(map(str, own or found))


def read_nights(scores: str | Path | Sequence[str | Path]) -> tuple[Scores, list[NightTable]]:
    """Read one score table; or several finished SCORES folders of one model as one table.

    A night is a folder, and its date is the day (UTC) on which its scoring ended first. Of an image in several nights,
    the latest row with status ok counts, else the latest row.

    Returns:
        The table, and its nights, the oldest first; none for one score table.

    Raises:
        InputError: a folder is not finished; of several, one is not written by `score`, or listed twice; their models
            differ; or an image id names different images.
    """
    sources = list_folders(scores)
    if len(sources) == 1:
        return read_scores(sources[0]), []
    opened = list(remote.map_concurrently(open_scores, sources))
    _check_folders(sources, [origin for _, origin in opened])
    times = [_find_time(origin["run"]) for _, origin in opened]
    order = sorted(range(len(sources)), key=lambda i: (times[i] is not None, times[i] or ""))
    parts, tables, nights = [], list[Scores](), list[Night]()
    for i, name in zip(order, _name_nights([sources[i] for i in order], [times[i] for i in order]), strict=True):
        table, origin = opened[i]
        parts.append(table)
        tables.append(build_scores(table, sources[i], origin))
        nights.append(Night(name, sources[i], origin["run_folder"], times[i], hash_run(sources[i])))
    _check_models(tables)
    night = np.repeat(np.arange(len(tables)), [len(table.ids) for table in tables])
    joined_rows = pa.concat_tables(parts, promote_options="permissive")
    kept, pairs = _choose_rows(tables)
    if len(pairs):
        _check_images(tables, joined_rows, night, pairs)
    rows = joined_rows.take(pa.array(kept))
    source = f"{len(nights)} nights, {nights[0].name} to {nights[-1].name}"
    joined = _rank_alike(build_scores(rows, source, _join_origins(tables)), tables)
    counted = np.bincount(night[kept], minlength=len(tables))
    joined = replace(joined, nights=tuple(nights), night=night[kept])
    return joined, [NightTable(*found) for found in zip(nights, tables, _count_replaced(tables, counted), strict=True)]


def _count_replaced(tables: Sequence[Scores], counted: np.ndarray) -> list[int]:
    return [len(table.ids) - int(n) for table, n in zip(tables, counted, strict=True)]


def list_night_notes(nights: Sequence[NightTable]) -> list[str]:
    """Return what a reader must know of a table of these nights."""
    notes = []
    replaced = sum(night.replaced for night in nights)
    if replaced:
        notes.append(
            f"{count_of(replaced, 'row')} of images that several nights hold {'does' if replaced == 1 else 'do'} not "
            "count in the table of all nights: of each image the latest row with a score counts, else the latest row."
        )
    for name, read in (("precision", lambda run: run.get("precision")), ("tta", _read_tta)):
        values = sorted({str(read(night.table.run)) for night in nights})
        if len(values) > 1:
            notes.append(f"The nights differ in {name}: {', '.join(values)}.")
    return notes


def _read_tta(run: dict[str, Any]) -> Any:
    return (run.get("settings") or {}).get("tta", 1)


def hash_run(source: str) -> str | None:
    """Return the SHA-256 of the run.json of a SCORES folder; None if it has none."""
    run = Location.of(source).find_run()
    return hashlib.sha256(run.child("run.json").read_bytes()).hexdigest() if run and run.has("run.json") else None


def _check_folders(sources: Sequence[str], origins: Sequence[dict[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for source, origin in zip(sources, origins, strict=True):
        if not origin["is_own"]:
            raise InputError(
                f"{source}: not a folder that `ray-cxr score` wrote; only such folders are read together. Pass other "
                "tables one at a time; a quoted pattern, such as 'nights/*', leaves them out."
            )
        folder = origin["run_folder"] or source
        if folder in seen:
            raise InputError(f"{source}: is the same folder as {seen[folder]}; pass each folder of scores once")
        seen[folder] = source


def _check_models(tables: Sequence[Scores]) -> None:
    first = tables[0]
    for table in tables[1:]:
        known = [_find_model(one) for one in (first, table)]
        if known[0] != known[1]:
            shown = [(model or "unknown")[:_DIGITS] for model in known]
            found = f"scored with model {shown[1]}, but {first.source} with {shown[0]}"
            raise InputError(f"{table.source}: {found}; make a report for the nights of each model")
        if table.findings != first.findings:
            raise InputError(f"{table.source}: its findings differ from those of {first.source}; make two reports")


def _find_model(table: Scores) -> str | None:
    digest = table.model.get("digest") or next(iter(table.model_digests), None)
    return None if digest is None else str(digest)


def _find_time(run: dict[str, Any]) -> str | None:
    value = run.get("first_finished") or run.get("finished")
    return value if isinstance(value, str) else None


def _name_nights(sources: Sequence[str], times: Sequence[str | None]) -> list[str]:
    """Name nights by date, or by date and time if a date repeats, and by folder too if that repeats."""
    folders = [remote.to_path(source).name or source for source in sources]
    names = [folder if time is None else time[:10] for folder, time in zip(folders, times, strict=True)]
    repeated = {name for name, n in Counter(names).items() if n > 1}
    names = [
        time[:16].replace("T", " ") if time is not None and name in repeated else name
        for name, time in zip(names, times, strict=True)
    ]
    repeated = {name for name, n in Counter(names).items() if n > 1}
    names = [
        f"{name} {source if name == folder else folder}" if name in repeated else name
        for name, folder, source in zip(names, folders, sources, strict=True)
    ]
    repeated = {name for name, n in Counter(names).items() if n > 1}
    return [f"{name} {place}" if name in repeated else name for place, name in enumerate(names, 1)]


def _choose_rows(tables: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the nights, one after another, that count: int64 [n] ascending; and pairs of rows, [k,2].

    The pairs have one image id each.
    """
    ids, ok = (np.concatenate([getattr(table, name) for table in tables]) for name in ("ids", "ok"))
    chosen: dict[str, int] = {}
    pairs = []
    for row, image_id in enumerate(ids):
        before = chosen.setdefault(image_id, row)
        if before != row:
            if ok[row] or not ok[before]:
                chosen[image_id] = row
            pairs.append((before, row))
    return np.sort(np.fromiter(chosen.values(), dtype=np.int64, count=len(chosen))), np.array(pairs, dtype=np.int64)


def _check_images(tables: Sequence[Scores], rows: pa.Table, night: np.ndarray, pairs: np.ndarray) -> None:
    """Refuse image ids that name different images; `rows` are those of all nights, `pairs` those of equal ids [k,2]."""
    differ = np.zeros(len(pairs), dtype=bool)
    for name in ("patient_id", "study_id", *CONTENT):
        first, second = (read_texts(rows.take(pa.array(side)), name, "") for side in pairs.T)
        known = np.array([None not in pair for pair in zip(first, second, strict=True)], dtype=bool)
        differ |= known & (first != second)
    for finding in tables[0].findings:
        p = np.concatenate([table.p[finding] for table in tables])
        differ |= np.abs(p[pairs[:, 0]] - p[pairs[:, 1]]) > _MAX_DIFFERENCE  # NaN, of an image without a score, is not
    if differ.any():
        found = int(np.flatnonzero(differ)[0])
        old, new = (tables[night[row]].source for row in pairs[found])
        name = rows["image_id"][int(pairs[found, 1])].as_py()
        raise InputError(
            f"{new}: {count_of(int(differ.sum()), 'image')} with ids that other images have in {old}, such "
            f"as {name!r}; score with ids that are unique over all nights (image_id of a manifest), or "
            "make a report per night"
        )


def _join_origins(tables: Sequence[Scores]) -> dict[str, Any]:
    """Return what the latest night states, without what holds for one folder only."""
    latest = tables[-1]
    run = {name: value for name, value in latest.run.items() if name in ("finished", "versions", "ranking")}
    if all(table.run.get("split") == latest.run.get("split") for table in tables):
        run["split"] = latest.run.get("split")
    return {
        "is_own": True,
        "folder": None,
        "run_folder": None,
        "model": latest.model,
        "run": run,
        "training": latest.training,
    }


def _rank_alike(joined: Scores, tables: Sequence[Scores]) -> Scores:
    """Return the table with all rows ranked by the weights of the latest night, if the nights have different ones."""
    weights = [table.run.get("ranking") for table in tables]
    if all(ranking == weights[-1] for ranking in weights):
        return joined
    abnormality, priority, top = joined.ranking.rank(joined.ranking.values)
    note = (
        "The nights were scored with different weights of findings; all rows are ranked by those of the latest night."
    )
    ranking = replace(joined.ranking, notes=(*joined.ranking.notes, note))
    return replace(joined, abnormality=abnormality, priority=priority, top_findings=top, ranking=ranking)
