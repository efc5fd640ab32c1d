"""Progress on stderr: a live bar on a terminal, one line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import rich.progress
from rich.console import Console
from rich.live import Live
from rich.table import Table

#: Seconds between lines without a terminal, as under `ray job submit` or cron.
LINE_EVERY_S = 15.0


class Progress:
    """Show the progress of a known amount of work.

    Args:
        what: Name of the work, such as `score`.
        total: Number of items, including `done`.
        done: Number of items that an earlier run finished.
        unit: Name of the items.
        line_every: Without a terminal, seconds between two lines.
        last_line: Without a terminal, whether to print a line at the end.
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
        self._printed_count: int | None = None
        self._start = self._printed_at = time.monotonic()
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
            self._print_line()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._last_line and self._printed_count != self._done:
            self._print_line()

    def advance(self, count: int, note: str = "") -> None:
        """Add finished items, and show a note next to the count, such as the number of errors."""
        self._done += count
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._format_rate(), note=note)
        elif time.monotonic() - self._printed_at >= self._line_every:
            self._print_line()

    def _format_rate(self) -> str:
        seconds = time.monotonic() - self._start
        return f"{(self._done - self._first) / seconds:.1f}/s" if seconds > 0 else ""

    def _print_line(self) -> None:
        self._printed_at = time.monotonic()
        self._printed_count = self._done
        details = [self._format_rate()]
        new = self._done - self._first
        if new > 0 and self._done < self._total:
            seconds = (self._total - self._done) * (self._printed_at - self._start) / new
            details.append(f"{seconds:.0f} s left")
        if self._note:
            details.append(self._note)
        line = f"{self._what}: {self._done:,} of {self._total:,} {self._unit} ({', '.join(details)})"
        with contextlib.suppress(OSError):  # a log on a full disk does not end the command
            print(line, file=sys.stderr, flush=True)


class TrialTable:
    """Show the trials of a search as a live table; without a terminal, show nothing."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._rows: dict[int, dict[str, str]] = {}
        self._console = Console(stderr=True)
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # If stdout is a pipe, redirecting it would print its lines above the table and not into the pipe.
            redirect = sys.stdout.isatty()
            self._live = Live(self._build(), console=self._console, refresh_per_second=2, redirect_stdout=redirect)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def start_trial(self, number: int, backbone: str) -> None:
        """Show a trial as waiting for its workers; a restarted trial keeps its values."""
        before = self._rows.get(number, {"epoch": "", "auroc": ""})
        self._rows[number] = {**before, "backbone": backbone, "state": "waits"}
        self._show()

    def end_epoch(self, number: int, epoch: int, epochs: int, auroc: float) -> None:
        self._rows[number] |= {"state": "trains", "epoch": f"{epoch} of {epochs}", "auroc": f"{auroc:.4f}"}
        self._show()

    def end_trial(self, number: int, state: str, auroc: float | None) -> None:
        self._done += 1
        self._rows[number] |= {"state": state, "auroc": "" if auroc is None else f"{auroc:.4f}"}
        self._show()

    def _show(self) -> None:
        if self._live is not None:
            self._live.update(self._build())

    def _build(self) -> Table:
        best = max((row["auroc"] for row in self._rows.values() if row["auroc"]), default="none yet")
        table = Table(title=f"{self._done} of {self._total} trials have ended; best AUROC {best}")
        for name in ("trial", "backbone", "state", "epoch", "AUROC"):
            table.add_column(name)
        # The latest 20 trials fit on a screen.
        for number, row in sorted(self._rows.items())[-20:]:
            table.add_row(str(number), row["backbone"], row["state"], row["epoch"], row["auroc"])
        return table


@contextlib.contextmanager
def run_periodically(function: Callable[[], None], interval_s: float, name: str) -> Iterator[None]:
    """Call a function in a thread every `interval_s` seconds while the block runs; wait for its last call."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(interval_s):
            function()

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def silence_stderr() -> Iterator[None]:
    """Discard the process's stderr, C++ output included; Python exceptions still propagate."""
    sys.stderr.flush()
    saved = os.dup(2)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
