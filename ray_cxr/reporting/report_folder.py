"""The folder of a report: which files are its own."""

from __future__ import annotations

from pathlib import Path

from ray_cxr.errors import OutputError
from ray_cxr.reporting.figure_set import NAMES
from ray_cxr.storage import run_folder
from ray_cxr.storage.paths import is_system_file

_PAGES = ("report.html", "report.md", "checklist.md", "worklist.csv", "scores.csv")
_NUMBERS = ("metrics.json", "metrics.parquet")
_FIGURES = tuple(f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg"))
FILES = frozenset((*_PAGES, *_NUMBERS, *_FIGURES, run_folder.LOCK))


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
