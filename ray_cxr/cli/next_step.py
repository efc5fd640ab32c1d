"""The last line of a command: the command that comes next, with real paths.

Words in capitals, such as IMAGES, stand for data that the command does not know.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from ray_cxr import labels
from ray_cxr.cli.output import print_line
from ray_cxr.config import PacsSettings, ScoreSettings
from ray_cxr.data import manifest as manifests
from ray_cxr.storage import remote, run_folder
from ray_cxr.storage.files import hash_file
from ray_cxr.storage.paths import hide_search

#: Part of the path of a job's working directory, a copy in Ray's session folder that is removed with the session.
JOB_FOLDER = "/runtime_resources/working_dir_files/"
#: Stands for images that are new to the model.
IMAGES = "IMAGES"

_is_hidden = False


@contextlib.contextmanager
def hide_next() -> Iterator[None]:
    """Print no next command while the block runs, because the caller prints a later one."""
    global _is_hidden
    before, _is_hidden = _is_hidden, True
    try:
        yield
    finally:
        _is_hidden = before


def print_next(*words: str | Path) -> None:
    """Print the command that comes next; a path is printed so that the command works in this folder.

    The query of a PACS, which can name a patient, is left out.
    """
    line = f"next: {shlex.join(['ray-cxr', *map(_format_word, words)])}"
    if not _is_hidden and line.isprintable():  # a path with a line break cannot be copied
        print_line(line)


def _format_word(word: str | Path) -> str:
    if isinstance(word, str):
        return hide_search(word)
    with contextlib.suppress(FileNotFoundError):  # Ray has removed the job's folder already
        # It removes that folder after the job, so a path must not be relative to it.
        if JOB_FOLDER in f"{os.getcwd()}/":
            return remote.to_address(word)
    return str(word)


def list_pacs_options(settings: PacsSettings) -> list[str]:
    """Return the options that reach the same PACS: names of files, and the host for which they are; no secret."""
    names = ("host", "credentials", "token_file", "client_certificate", "client_key", "ca_file")
    found = {name: getattr(settings, name) for name in names}
    shown = {name: _shorten(value) if name != "host" else value for name, value in found.items() if value}
    return [word for name, value in shown.items() for word in ("--set", f"pacs.{name}={value}")]


def _shorten(path: str) -> str:
    """Return a path below this folder relative to it, unless the folder is that of a job."""
    here = Path.cwd()
    is_below = Path(path).is_relative_to(here) and JOB_FOLDER not in f"{here}/"
    return str(Path(path).relative_to(here)) if is_below else path


def place_next_to(path: str | Path, name: str) -> Path:
    """Return a path for a new folder or file next to another one: `name`, or with a number if that exists.

    For scores of a night, whose folder is named by its date, it is next to the folder of all nights, which patterns
    such as `nights/*` match.
    """
    folder = remote.to_path(path).parent
    if re.fullmatch(r"\d{4}-?\d\d-?\d\d.*", remote.to_path(path).name) and not remote.is_address(folder):
        folder = folder.parent
    target, number = folder / name, 1
    while not remote.is_address(target) and target.exists():
        number += 1
        target = (folder / name).with_name(f"{Path(name).stem}-{number}{Path(name).suffix}")
    return target


def suggest_after_manifest(arguments: Any, *, has_images: bool, has_split: bool) -> None:
    """Suggest `prepare`, or the same command with what the manifest lacks for training."""
    out = remote.to_path(arguments.out)
    missing = [*(["--images", IMAGES] if not has_images else []), *(["--split", "patient"] if not has_split else [])]
    if missing:
        print_next(*arguments.words, *missing)
    else:
        print_next("prepare", out, "--out", place_next_to(out, "prepared"))


def suggest_score(bundle: str | Path, prepared: str | Path | None, *more: str) -> None:
    """Suggest to score with a new bundle: the images of a prepared set, or images that the user chooses."""
    bundle = remote.to_path(bundle)
    source: list[str | Path] = ["--images", IMAGES]
    near = bundle.parent if bundle.name == "bundle" else bundle
    if prepared is not None:
        source = ["--manifest", remote.to_path(prepared) / "manifest.parquet"]
    print_next("score", bundle, *source, "--out", place_next_to(near, "scores"), *more)


def suggest_report(scores: str | Path, manifest: str | None, rows: int, pacs: Sequence[str] = ()) -> None:
    """Suggest a report of scores, with labels if their manifest has any in the first `rows` rows.

    Args:
        pacs: options that reach the PACS of the images.
    """
    scores = remote.to_path(scores)
    options: list[str | Path] = []
    if manifest is not None and (split := find_evaluated_split(scores / "input.parquet", rows)) is not None:
        options = ["--manifest", remote.to_path(manifest), *(["--split", split] if split else [])]
    print_next("report", scores, *options, "--out", place_next_to(scores, "report"), *pacs)


def suggest_after_nothing(arguments: Any, folders: Sequence[str], pacs: Sequence[str] = ()) -> None:
    """Suggest a report of the latest earlier scores, or without any, the same command with all images."""
    if folders:
        suggest_report(folders[-1], None, 0, pacs)
    else:
        print_next(*arguments.words, "--set", "score.select=all")


def find_evaluated_split(path: Path, rows: int) -> str | None:
    """Return the split to evaluate: the first of test, val and train that has rows; `""` without splits.

    Returns None if no row has a label.
    """
    with manifests.open_manifest(path) as file:
        columns = (file.column(name).slice(0, rows) for name in labels.LABELS)
        if all(column.null_count == len(column) for column in columns):
            return None
        splits = pc.unique(file.column("split").slice(0, rows)).to_pylist()
    return next((name for name in reversed(manifests.SPLITS) if name in splits), "")


def suggest_after_report(arguments: Any, folders: Sequence[str], pacs: Sequence[str] = ()) -> None:
    """Suggest what to do with a model that was evaluated, or with the scores of new images.

    Args:
        folders: the score tables of the report, the latest night last.
        pacs: options that reach the PACS of the images.
    """
    from ray_cxr.models.bundle import WEIGHTS

    scores, out = remote.to_path(folders[-1]), remote.to_path(arguments.out)
    report: list[str | Path] = ["report", *map(remote.to_path, arguments.scores)]
    record = run_folder.read_json(scores / "run.json") if scores.is_dir() else {}
    bundle = _find_bundle(scores, record)
    has_layers = bundle is not None and not remote.is_address(bundle) and (bundle / WEIGHTS).exists()
    draw = ["--heatmaps", "3"] if has_layers else []
    if arguments.labels is None and (scores / "input.parquet").exists() and _has_dicom(scores / "input.parquet"):
        print_next("export-sr", scores, "--out", place_next_to(scores, "sr"), *pacs)
    elif (
        arguments.labels is None and len(folders) == 1 and bundle and draw and (source := _repeat_input(scores, record))
    ):
        print_next("score", bundle, *source, "--out", scores, *draw)
    elif arguments.labels is None and not arguments.csv:
        print_line("--csv also writes scores.csv, one row per image, for spreadsheets")
        print_next(*report, "--csv", "--out", out, *pacs)
    elif arguments.labels is None:
        print_next(*report, "--manifest", "M.parquet", "--out", place_next_to(out, "report"), *pacs)
    elif arguments.split is None and bundle and len(folders) == 1:
        labels = remote.to_path(arguments.labels)
        new = place_next_to(scores, "recalibrated")
        print_next("recalibrate", bundle, scores, "--manifest", labels, "--out", new)
    else:
        screened = place_next_to(scores, "screened")
        print_next("score", bundle or "BUNDLE", "--images", IMAGES, "--out", screened, *draw)


def _find_bundle(scores: Path, record: dict[str, Any]) -> Path | None:
    """Return the model that run.json names; None if it is not there any more."""
    if str(record.get("model")).startswith("s3://"):
        return remote.to_path(record["model"])
    for path in _list_paths(scores, record.get("model")):
        sums = path / "SHA256SUMS"
        if sums.exists() and hash_file(sums) == record.get("model_digest"):
            return path
    return None


def _list_paths(scores: Path, name: Any) -> list[Path]:
    """Return a path in run.json as it is, and below each folder that SCORES is in: `score` may have run there."""
    if not name or remote.is_address(str(name)):
        return []
    folders = [Path(), *([] if remote.is_address(scores) else scores.absolute().parents)]
    return [folder / name for folder in folders if (folder / name).exists()]


def _repeat_input(scores: Path, record: dict[str, Any]) -> list[str | Path]:
    """Return the options that score the same images into SCORES again; none if that is unknown, or maps are there."""
    from ray_cxr.imaging.overlays import HEATMAPS

    shared = {"rows_per_file", "max_pixels", "tta", "pseudonym_key", "weights"}
    plain, used = ScoreSettings().model_dump(mode="json", include=shared), record.get("settings", {})
    path = next(iter(_list_paths(scores, record.get("input"))), None)
    is_plain = {name: used.get(name, plain[name]) for name in shared} == plain
    is_plain = is_plain and not {"prepared", "features", "select"} & run_folder.read_settings(scores).keys()
    if path is None or not is_plain or (scores / HEATMAPS).exists():
        return []
    with manifests.open_manifest(scores / "input.parquet") as file:
        limit = [] if len(file.column("image_id")) == record.get("rows") else ["--limit", str(record.get("rows"))]
    gpu = ["--gpu"] if record.get("use_gpu") else []
    return ["--images" if path.is_dir() else "--manifest", path, *limit, *gpu]


def _has_dicom(path: Path) -> bool:
    with manifests.open_manifest(path) as file:
        names = pc.utf8_lower(file.column("path"))
    return bool(pc.any(pc.match_substring_regex(names, r"\.(dcm|dicom)$|^dicomweb\+")).as_py())
