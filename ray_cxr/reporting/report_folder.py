"""The folder of a report: which files are its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_cxr.errors import OutputError
from ray_cxr.reporting.figure_set import NAMES
from ray_cxr.storage import run_folder
from ray_cxr.storage.paths import is_system_file

_PAGES = ("report.html", "report.md", "checklist.md", "worklist.csv", "scores.csv")
_NUMBERS = ("metrics.json", "metrics.parquet")
_FIGURES = tuple(f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg"))
FILES = frozenset((*_PAGES, *_NUMBERS, *_FIGURES, run_folder.LOCK))


def check_replaced(out: Path, digests: Mapping[str, Any]) -> None:
    """Raise OutputError if a folder holds an evaluation, and the new report is of other scores or has no labels.

    Args:
        digests: of the new report, as in metrics.json.
    """
    try:
        old = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        labels = old["digests"]["labels"]
        same = all(old["digests"][key] == digests[key] for key in ("input", "model"))
    except (OSError, ValueError, TypeError, KeyError):
        return
    if labels is not None and not (same and digests["labels"]):
        what = "other scores" if digests["labels"] else "scores with labels"
        raise OutputError(f"--out {out}: holds the evaluation of {what}; name a new folder, or remove this one")


def check_folder(out: Path) -> None:
    """Raise OutputError if a folder holds files of something else, and no report.

    A report whose page is missing, because the command was stopped, is one.
    """
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if all(name in names for name in ("metrics.json", "worklist.csv")):
        return
    others = [name for name in names if name not in FILES and not is_system_file(name)]
    if others:
        raise OutputError(f"--out {out}: holds other files, such as {others[0]}, and no report; name a new folder")
