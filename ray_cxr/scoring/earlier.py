"""What earlier runs of `score` scored: read from their SCORES folders, to leave these images out of a new run.

An image is known by its SOP Instance UID or by the digest of its file (`predictions.MARKS`).
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr.errors import RETRYABLE_CODES, ConfigError
from ray_cxr.models import predictions
from ray_cxr.progress import Stage
from ray_cxr.scoring.ranges import INPUT, SCORES, read_part
from ray_cxr.storage import contents, remote, run_folder

_log = logging.getLogger(__name__)

UID, DIGEST = predictions.MARKS
#: Settings that must be those of the earlier runs, with the values of folders that lack them: with another model or
#: number of copies the probabilities are others, and with another key the same image has other marks. Precision may
#: differ, as between the machines of one run: all precisions agree within the tolerances of the bundle.
_SAME = {"model_digest": None, "tta": 1, "pseudonyms": None}
_REMEDY = "pass folders that `ray-cxr score` wrote with this model"


@dataclass(frozen=True)
class EarlierScores:
    """Rows of earlier runs.

    Attributes:
        folders: the SCORES folders.
        rows: columns sop_instance_uid, content_digest, study_id, and error_code (null if scored); first the scored
            rows, then errors that would be the same again, then errors of which a retry can succeed.
    """

    folders: list[str]
    rows: pa.Table

    @property
    def has_digests(self) -> bool:
        return bool(self.rows[DIGEST].null_count < len(self.rows))

    def find(self, column: str, values: pa.Array) -> pa.Array:
        """Return the row of each value in a column, int32; null if no row has it."""
        return pc.index_in(values, value_set=self.rows[column].combine_chunks(), skip_nulls=True)

    def list_ambiguous_uids(self) -> set[tuple[str, str | None]]:
        """Return each SOP Instance UID and study that files of different contents have: it identifies no image."""
        counts = self.rows.group_by([UID, "study_id"]).aggregate([(DIGEST, "count_distinct")])
        counts = counts.filter(pc.greater(counts[f"{DIGEST}_count_distinct"], 1))
        return set(zip(counts[UID].to_pylist(), counts["study_id"].to_pylist(), strict=True))


def read_earlier(patterns: Sequence[str], out: Path, settings: Mapping[str, Any]) -> EarlierScores:
    """Read the rows of finished SCORES folders; a folder that is `out` itself is ignored.

    Args:
        patterns: folders, or patterns of folders such as `nights/*`.
        settings: model_digest, tta, pseudonyms and max_pixels of the new run.

    Raises:
        InputError: a pattern matches nothing, a folder holds no finished scores of this model, or cannot be compared.
    """
    folders = [folder for pattern in patterns for folder in _expand(pattern) if folder.resolve() != out.resolve()]
    if not folders:
        raise ConfigError(
            f"--skip-scored {' '.join(patterns)}: names no scores, except those in --out; pass folders of earlier runs"
        )
    tables: list[pa.Table] = []
    with Stage("reading earlier scores") as stage:
        for folder in dict.fromkeys(folders):
            stage.update(f"reading earlier scores in {folder}")
            tables += _read_folder(folder, settings)
    rows = pa.concat_tables(tables)
    ranks = pc.add(pc.is_valid(rows["error_code"]).cast("int8"), _is_retryable(rows["error_code"]).cast("int8"))
    order = pc.sort_indices(pa.table({"rank": ranks}), sort_keys=[("rank", "ascending")])
    return EarlierScores([str(folder) for folder in dict.fromkeys(folders)], rows.take(order).combine_chunks())


def _is_retryable(codes: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_in(codes, value_set=pa.array(sorted(RETRYABLE_CODES), pa.string()))


def _expand(pattern: str) -> list[Path]:
    """Return the folders that a pattern names, or the folder that it is.

    A folder of a pattern in which a run was killed before it had settings holds no rows, and is ignored. What else
    matches a pattern and is no folder of scores, such as a report, is left out with a warning.
    """
    path = remote.to_path(pattern)
    if path.exists() or not set(pattern) & set("*?["):
        return [path]
    if remote.as_store_path(path) is None:
        found = [Path(name) for name in sorted(glob.glob(pattern))]
    else:
        found = list(path.parent.glob(path.name))
    if not found:
        raise ConfigError(f"--skip-scored {pattern}: matches no folder; correct it, or leave it out on the first night")
    scores = [path for path in found if _holds_scores(path)]
    if others := [path.name for path in found if path not in scores and not _is_unused(path)]:
        _log.warning("--skip-scored %s: left out, because no folders of scores: %s", pattern, ", ".join(others))
    return scores


def _holds_scores(folder: Path) -> bool:
    """Whether `score` wrote a folder; true as well for one that has lost its settings, which is an error later."""
    return folder.is_dir() and (run_folder.read_settings(folder).get("kind") == "score" or (folder / SCORES).exists())


def _is_unused(folder: Path) -> bool:
    return folder.is_dir() and all(path.name == INPUT or path.name.startswith(".") for path in folder.iterdir())


def _read_folder(folder: Path, settings: Mapping[str, Any]) -> list[pa.Table]:
    """Check a folder of scores and return its rows, a table per file."""
    where = f"--skip-scored {folder}"
    started_with = run_folder.read_settings(folder)
    if started_with.get("kind") != "score":
        raise ConfigError(f"--skip-scored {contents.explain(folder, 'a score folder', _REMEDY)}")
    for name, default in _SAME.items():
        if (there := started_with.get(name, default)) != (here := settings.get(name, default)):
            shown = "" if name == "pseudonyms" else f" {str(there)[:12]} (now {str(here)[:12]})"
            raise ConfigError(
                f"{where}: scored with another {name}{shown}, so its images must be scored again; {_REMEDY}"
            )
    if not run_folder.is_complete(folder):
        # Its pending images would be lost if they were left out, and scored twice if they were not.
        raise ConfigError(f"{where}: score did not finish there; run its command again first, which continues")
    if started_with.get("prepared"):
        raise ConfigError(
            f"{where}: scores of a prepared set, which have neither SOP Instance UIDs nor digests; leave it out"
        )
    parts = sorted((folder / SCORES).glob("part-*.parquet"))
    tables = []
    for part, file in zip(parts, remote.read_files(parts), strict=True):
        table = read_part(part, file, [UID, DIGEST, "study_id", "error_code"])
        if {UID, DIGEST} - set(table.column_names):
            raise ConfigError(
                f"{where}: written by an earlier version, without SOP Instance UIDs and digests; leave it out, or run "
                "its command again with --fresh"
            )
        table = table.select([UID, DIGEST, "study_id", "error_code"]).replace_schema_metadata(None)
        if settings["max_pixels"] > started_with.get("max_pixels", 0):  # a larger limit can help
            table = table.filter(pc.fill_null(pc.not_equal(table["error_code"], "too_large"), True))
        tables.append(table)
    return tables
