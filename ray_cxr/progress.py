"""How long work shows itself: a live bar on a terminal, one line now and then where there is none."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console
from rich.live import Live
from rich.table import Table

#: Seconds between lines where no terminal is attached, as under `ray job submit` or cron.
LINE_EVERY_S = 15.0


class Progress:
    """Progress of a known amount of work, on stderr.

    Args:
        what: the verb, such as `score`.
        total: how many there are in all.
        done: how many an earlier run did already.
        unit: what is counted.
        line_every: seconds between lines where there is no terminal.
        last_line: whether the end is worth a line of its own there.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        done: int = 0,
        unit: str = "images",
        line_every: float = LINE_EVERY_S,
        last_line: bool = True,
    ) -> None:
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._line_every, self._last_line = line_every, last_line
        self._first, self._note = done, ""
        self._line_at: int | None = None  # what the last line said, not to say it twice
        self._start = self._said = time.monotonic()
        self._console = Console(stderr=True)
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[rate]}"),
                rich.progress.TimeRemainingColumn(),
                rich.progress.TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, completed=self._done, rate="", note="")
        elif self._first:
            self._line()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._last_line and self._line_at != self._done:
            self._line()

    def advance(self, count: int, note: str = "") -> None:
        """Count so many more as done; `note` says what else matters, such as the errors so far."""
        self._done += count
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate(), note=note)
        elif time.monotonic() - self._said >= self._line_every:
            self._line()

    def _rate(self) -> str:
        seconds = time.monotonic() - self._start
        return f"{(self._done - self._first) / seconds:.1f}/s" if seconds > 0 else ""

    def _line(self) -> None:
        self._said = time.monotonic()
        self._line_at = self._done
        fresh = self._done - self._first
        left = ""
        if fresh > 0 and self._done < self._total:
            left = f", {(self._total - self._done) * (self._said - self._start) / fresh:.0f} s left"
        note = f", {self._note}" if self._note else ""
        print(
            f"{self._what}: {self._done:,} of {self._total:,} {self._unit} ({self._rate()}{left}{note})",
            file=sys.stderr,
            flush=True,
        )


class Trials:
    """A live table of a search's trials on a terminal; where there is none, its events' own lines are enough.

    Args:
        total: how many trials there will be.
        done: how many an earlier run brought to an end.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._rows: dict[int, dict[str, str]] = {}
        self._console = Console(stderr=True)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # Lines for a pipe go into it, and not above the table.
            to_terminal = sys.stdout.isatty()
            self._live = Live(self._table(), console=self._console, refresh_per_second=2, redirect_stdout=to_terminal)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, number: int, backbone: str) -> None:
        """A trial has a process of its own, its first or another, and waits for its workers."""
        before = self._rows.get(number, {"epoch": "", "auroc": ""})
        self._rows[number] = {**before, "backbone": backbone, "state": "waits"}
        self._show()

    def epoch(self, number: int, epoch: int, of: int, auroc: float) -> None:
        """A trial has done an epoch."""
        self._rows[number] |= {"state": "trains", "epoch": f"{epoch} of {of}", "auroc": f"{auroc:.4f}"}
        self._show()

    def end(self, number: int, state: str, auroc: float | None) -> None:
        """A trial is over, with its best AUROC."""
        self._done += 1
        self._rows[number] |= {"state": state, "auroc": "" if auroc is None else f"{auroc:.4f}"}
        self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        best = max((row["auroc"] for row in self._rows.values() if row["auroc"]), default="none yet")
        table = Table(title=f"{self._done} of {self._total} trials are over; best AUROC here {best}")
        for name in ("trial", "backbone", "state", "epoch", "AUROC"):
            table.add_column(name)
        # As many as a screen holds: the latest.
        for number, row in sorted(self._rows.items())[-20:]:
            table.add_row(str(number), row["backbone"], row["state"], row["epoch"], row["auroc"])
        return table


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Send the process's stderr nowhere, C++ included; Python errors are raised as ever."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
