"""How long work shows itself: a live bar on a terminal, one line now and then where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Seconds between lines where no terminal is attached, as under `ray job submit` or cron.
LINE_EVERY_S = 15.0


class Work:
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
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
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
