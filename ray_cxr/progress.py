"""Progress on stderr: a spinner, bar or table on a terminal; one line per event elsewhere, as in the log of a job."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

#: Without a terminal, seconds between two lines about the same work; after `_LONG_S` seconds of it, a longer time.
LINE_EVERY_S, _LONG_S, _LONG_EVERY_S = 15.0, 300.0, 60.0
#: Without a terminal, the longest silence before a line says what the command does. Wrong arguments end it earlier.
SILENT_S = 1.2
#: A stage that is shorter is not worth a line or a spinner.
_SHORT_S = 0.2
#: A rate is measured over at least this time: the items that were finished during the wait arrive at once.
_RATE_S = 1.0
_WIDEST_BAR = 30
#: Without a terminal, seconds between two lines about a search.
TRIALS_EVERY_S = 60.0
_RUNNING = ("waits", "trains")

#: When this process printed its last line of progress.
_printed_at = time.monotonic()
#: Copies of the stderr that `silence_stderr` has replaced.
_silenced: list[int] = []


def is_live() -> bool:
    """Return whether stderr is a terminal that can redraw lines."""
    # Not `Console.is_terminal`, which FORCE_COLOR turns on for a file too.
    is_terminal = os.isatty(_silenced[0]) if _silenced else sys.stderr.isatty()
    return is_terminal and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


@functools.cache
def _open_console() -> Console:
    """Return the console of all live displays, which may overlap; `silence_stderr` does not silence it."""
    number = os.dup(_silenced[0] if _silenced else sys.stderr.fileno())
    stream = open(number, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    return Console(file=stream, force_terminal=True)


def _start_live(get_renderable: Callable[[], RenderableType], *, transient: bool = False) -> Live:
    # If stdout is a pipe, redirecting it would print its lines above the display and not into the pipe.
    redirect = sys.stdout.isatty()
    live = Live(
        get_renderable=get_renderable,
        console=_open_console(),
        refresh_per_second=5,
        transient=transient,
        redirect_stdout=redirect,
    )
    before = sys.stderr
    live.start()
    live.refresh()  # also if it is drawn below another one
    _redirect_logging(before, sys.stderr)
    return live


def _stop_live(live: Live) -> None:
    before = sys.stderr
    live.stop()
    _redirect_logging(before, sys.stderr)


def _redirect_logging(before: TextIO, after: TextIO) -> None:
    """Let log lines appear above a live display, not in it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is before:
            handler.setStream(after)


def _print_line(line: str) -> None:
    global _printed_at
    _printed_at = time.monotonic()
    with contextlib.suppress(OSError):  # a log on a full disk does not end the command
        if _silenced:
            os.write(_silenced[0], f"{line}\n".encode())
        else:
            print(line, file=sys.stderr, flush=True)


def format_duration(seconds: float) -> str:
    """Format a duration: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _line_interval(seconds: float) -> float:
    """Return the seconds between two lines about work that has run for `seconds`."""
    return LINE_EVERY_S if seconds < _LONG_S else _LONG_EVERY_S


class Stage:
    """Show what a command does while a block runs: a spinner on a terminal, elsewhere a line if it takes long.

    Args:
        text: The work, such as `starting Ray`.
        at_once: Whether the work always takes long, so that its line does not wait.
        in_log: Whether there is a line without a terminal. Imports have none, because a wrong argument that is found
            after them must remain one line.
    """

    def __init__(self, text: str, *, at_once: bool = False, in_log: bool = True) -> None:
        self._text, self._at_once, self._in_log = text, at_once, in_log
        self._lock, self._has_ended = threading.Lock(), False
        self._timer: threading.Timer | None = None
        self._live: Live | None = None
        self._spinner = Spinner("dots")

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        if self._at_once:
            self._show()
        elif self._in_log or is_live():
            self._schedule(self._find_delay())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:
            self._has_ended = True
            if self._timer is not None:
                self._timer.cancel()
        if self._live is not None:
            _stop_live(self._live)

    def update(self, text: str) -> None:
        """Replace the text, for example to show a count; a log has no line for it."""
        self._text = text

    def change(self, text: str) -> None:
        """Show what the command does next."""
        with self._lock:
            self._text, self._start = text, time.monotonic()
            if self._live is None and self._timer is not None:
                self._timer.cancel()
                self._schedule(self._find_delay())

    def _find_delay(self) -> float:
        return _SHORT_S if is_live() else max(_SHORT_S, SILENT_S - (self._start - _printed_at))

    def _schedule(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._show)
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        with self._lock:
            if self._has_ended:
                return
            if is_live():
                self._live = _start_live(self._render, transient=True)
                return
            seconds = time.monotonic() - self._start
            _print_line(f"{self._text} …" + (f" ({format_duration(seconds)})" if seconds >= LINE_EVERY_S / 2 else ""))
            self._schedule(_line_interval(seconds))

    def _render(self) -> RenderableType:
        self._spinner.update(text=Text(f"{self._text} …"))
        return self._spinner


class Progress:
    """Show the progress of a known amount of work.

    Args:
        what: Name of the work, such as `score`.
        total: Number of items, including `done`.
        done: Number of items that an earlier run finished.
        unit: Name of the items.
        waiting: What happens before the first item is finished, such as `loading the model`.
        last_line: Without a terminal, whether to print a line at the end.
    """

    def __init__(
        self, what: str, total: int, *, done: int = 0, unit: str = "images", waiting: str = "", last_line: bool = True
    ) -> None:
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._waiting, self._last_line = waiting, last_line
        self._first, self._note = done, ""
        self._printed_count: int | None = None
        self._start = self._printed_at = self._advanced_at = time.monotonic()
        self._lock, self._stack, self._stage = threading.Lock(), contextlib.ExitStack(), contextlib.ExitStack()
        self._live: Live | None = None
        self._spinner = Spinner("dots")

    def __enter__(self) -> Self:
        if self._done >= self._total:
            return self
        if is_live():
            self._live = _start_live(self._render)
            return self
        if self._first:
            self._print_line()
        if self._waiting:
            self._stage.enter_context(Stage(f"{self._what}: {self._waiting}"))
        self._stack.enter_context(run_periodically(self._print_if_due, 1.0, "progress"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()
        self._stage.close()
        if self._live is not None:
            _stop_live(self._live)
        elif kind is None and self._last_line and self._printed_count != self._done:
            self._print_line()

    def advance(self, count: int, note: str = "") -> None:
        """Add finished items, and show a note next to the count, such as the number of errors."""
        self._done += count
        self._note = note
        if count:
            self._advanced_at = time.monotonic()
            if self._waiting and self._done < self._total:  # the rate does not include the wait
                self._start, self._first = self._advanced_at, self._done
            self._waiting = ""
            self._stage.close()
        if self._live is None:
            self._print_if_due()

    def _print_if_due(self) -> None:
        with self._lock:
            now = time.monotonic()
            # Lines with the same count become rare.
            interval = max(_line_interval(now - self._start), (now - self._advanced_at) / 2)
            if not self._waiting and now - self._printed_at >= interval:
                self._print_line()

    def _print_line(self) -> None:
        self._printed_at = time.monotonic()
        self._printed_count = self._done
        details = ", ".join(self._list_details())
        _print_line(
            f"{self._what}: {self._done:,} of {self._total:,} {self._unit}" + (f" ({details})" if details else "")
        )

    def _list_details(self) -> list[str]:
        """Return the rate, the time left and the note."""
        now, new = time.monotonic(), self._done - self._first
        seconds, details = now - self._start, []
        if new > 0 and seconds >= _RATE_S:
            details.append(f"{new / seconds:.1f} {self._unit}/s")
            if self._done < self._total:
                details.append(f"{format_duration((self._total - self._done) * seconds / new)} left")
        if self._note:
            details.append(self._note)
        if (idle := now - self._advanced_at) >= LINE_EVERY_S and self._done < self._total:
            details.append(f"none finished for {format_duration(idle)}")
        return details

    def _render(self) -> RenderableType:
        if self._waiting:
            self._spinner.update(text=Text(f"{self._what}: {self._waiting} …"))
            return self._spinner
        details = ", ".join([f"{self._done:,} of {self._total:,}", *self._list_details()])
        space = _open_console().width - len(self._what) - len(details) - 3
        bar = ProgressBar(self._total, max(0, self._done), width=max(4, min(_WIDEST_BAR, space)))
        grid = Table.grid(padding=(0, 1, 0, 0))
        for _ in range(3):
            grid.add_column(no_wrap=True, overflow="ellipsis")
        grid.add_row(self._what, bar, Text(details))
        return grid


class TrialTable:
    """Show the trials of a search as a live table; without a terminal, as a line every minute.

    Each event of a search has its own line, which the caller prints.
    """

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._rows: dict[int, dict[str, str]] = {}
        self._live: Live | None = None
        self._printed = ""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if is_live():
            self._live = _start_live(self._build)
        else:
            self._stack.enter_context(run_periodically(self._print_state, TRIALS_EVERY_S, "trials"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()
        if self._live is not None:
            _stop_live(self._live)

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
            self._live.refresh()

    def _print_state(self) -> None:
        running = [
            f"trial {number} ({row['epoch'] and 'epoch '}{row['epoch'] or 'before its first epoch'})"
            for number, row in sorted(self._rows.items())
            if row["state"] in _RUNNING
        ]
        line = f"tune: {self._done} of {self._total} trials have ended; running: {', '.join(running) or 'none'}"
        if line != self._printed:
            self._printed = line
            _print_line(line)

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
    _silenced.append(saved)
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        _silenced.pop()
        os.dup2(saved, 2)
        os.close(saved)
