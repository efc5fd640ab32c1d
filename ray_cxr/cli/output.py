"""Lines and tables that commands print."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from ray_cxr import environment
from ray_cxr.errors import ConfigError, one_line
from ray_cxr.progress import is_live
from ray_cxr.storage.paths import hide_search

_UNLIMITED = 10_000


def print_line(text: str) -> None:
    """Print a line, on a terminal folded between words; a command to copy stays one line."""
    environment.write_output(_fold(text) if sys.stdout.isatty() and not text.startswith(("next: ", "$ ")) else text)


class LogFormatter(logging.Formatter):
    """Formats the lines of a log; on a terminal they are folded between words."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return _fold(text) if is_live() else text


def _fold(text: str) -> str:
    columns = shutil.get_terminal_size().columns
    if len(text) <= columns or "\n" in text:
        return text
    return textwrap.fill(text, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def report_lost_output(command: str) -> int:
    """Report that lines of a finished command could not be written; return the exit code."""
    if environment.output_error is None:
        return 0
    print(
        f"{command}: standard output: {environment.output_error}, so its last lines are missing; the command is done",
        file=sys.stderr,
    )
    return 1


@contextlib.contextmanager
def explain_write_errors(out: str, option: str = "--out") -> Iterator[None]:
    if not out:
        raise ConfigError(f"{option}: is empty; name a file or folder to write")
    try:
        yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename and str(error.filename) != out else ""
        raise ConfigError(f"{option} {out}: cannot be written: {error.strerror or error}{at}") from None


def print_rule_notes(reasons: Mapping[str, str | None]) -> None:
    """Print why findings lack a calibration or an operating point, findings with the same reason in one line."""
    for reason in dict.fromkeys(reasons.values()):
        if reason:
            print_line(f"{', '.join(name for name, own in reasons.items() if own == reason)}: {reason}")


def print_warnings(warnings: Iterable[str]) -> None:
    for text in warnings:
        print_line(f"WARNING: {text}")


def find_width() -> int:
    """Return the width of the terminal, or the variable COLUMNS; without both, as in a log, it is not limited."""
    limited = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    return Console().width if limited else _UNLIMITED


def print_table(table: Table, optional: Sequence[str] = ()) -> None:
    """Print a table without cutting or folding a cell; columns in `optional` are left out, in order, to fit."""
    console, limit = Console(width=_UNLIMITED), find_width()
    for column in table.columns:
        column.no_wrap = True
    for name in optional:
        if console.measure(table).maximum > limit:
            table.columns = [column for column in table.columns if column.header != name]
            for index, column in enumerate(table.columns):
                column._index = index  # rich finds the outer columns by it
    with console.capture() as captured:
        console.print(table)
    print_line("\n".join(line.rstrip() for line in captured.get().splitlines()))


def format_number(value: float | None, digits: int = 3, missing: str = "undefined") -> str:
    return missing if value is None else f"{value:.{digits}f}"


def describe_error(error: object, words: Sequence[str]) -> str:
    """Return an error as one line, in which no argument of the command shows a query or a password of a PACS."""
    text = one_line(error)
    for word in words:
        address = word[max(0, word.lower().find("dicomweb+")) :]
        if (shown := hide_search(address)) != address:
            for form in (address, repr(address)[1:-1]):
                text = text.replace(one_line(form), shown)
    return text
