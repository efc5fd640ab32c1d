"""Lines and tables that commands print."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from ray_cxr import environment
from ray_cxr.errors import ConfigError

print_line = environment.write_output


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
def explain_write_errors(out: str) -> Iterator[None]:
    if not out:
        raise ConfigError("--out: is empty; name a file or folder to write")
    try:
        yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename and str(error.filename) != out else ""
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}{at}") from None


def print_rule_notes(reasons: dict[str, str | None]) -> None:
    for name, reason in reasons.items():
        if reason:
            print_line(f"{name}: {reason}")


def print_table(table: Table) -> None:
    # Without a terminal, rich would fold tables at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 110)
    with console.capture() as captured:
        console.print(table)
    print_line(captured.get().rstrip("\n"))


def format_number(value: float | None, digits: int = 3, missing: str = "undefined") -> str:
    return missing if value is None else f"{value:.{digits}f}"
