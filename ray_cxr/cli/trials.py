"""The table of trials that `tune` prints."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from ray_cxr.cli.output import find_width, print_table
from ray_cxr.reporting.html import format_setting

_PARAM = "param_"
_ROWS = 15


def print_trials(rows: pd.DataFrame) -> None:
    """Print the best trials with the values that were searched.

    Columns that do not fit the terminal follow in further tables, each of which starts with the trial's number.
    """
    best = rows.sort_values("val_auroc", ascending=False).head(_ROWS).to_dict("records")
    columns = {
        "trial": [str(row["number"]) for row in best],
        "backbone": [str(row["backbone"]) for row in best],
        # The table is printed when no trial runs any more.
        "state": ["waiting" if row["state"] == "running" else str(row["state"]) for row in best],
        "epochs": [str(row["epochs"]) for row in best],
        "AUROC": ["none" if pd.isna(row["val_auroc"]) else f"{row['val_auroc']:.4f}" for row in best],
        "seconds": ["" if pd.isna(row["seconds"]) else f"{row['seconds']:,.0f}" for row in best],
    }
    for name in (name for name in rows.columns if name.startswith(_PARAM)):
        values = [row[name] for row in best]
        missing = [not isinstance(value, (list, tuple)) and pd.isna(value) for value in values]
        if not all(missing):
            cells = ["" if lacks else format_setting(value) for value, lacks in zip(values, missing, strict=True)]
            columns[name.removeprefix(_PARAM)] = cells
    title: str | None = "Trials, the best first" if len(rows) <= _ROWS else f"The best {_ROWS} of {len(rows):,} trials"
    (key, numbers), *others = columns.items()
    while others:
        shown = [(key, numbers)]
        # A cell has a space on each side and a line on its right.
        width = 1 + _measure(key, numbers)
        while others and (len(shown) == 1 or width + _measure(*others[0]) <= find_width()):
            width += _measure(*others[0])
            shown.append(others.pop(0))
        table = Table(*(name for name, _ in shown), title=title)
        for row in zip(*(cells for _, cells in shown), strict=True):
            table.add_row(*row)
        print_table(table)
        title = "Their settings" if title and "backbone" in dict(shown) else None


def _measure(name: str, cells: list[str]) -> int:
    return 3 + max(map(len, [name, *cells]))
