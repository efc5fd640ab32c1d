"""The program `ray-cxr`. It handles Ctrl-C before the libraries are imported, which takes about a second."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from ray_cxr.errors import EXIT_INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare this process for a command, import the command line and run it; return its exit code."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:  # a background job ignores Ctrl-C
        signal.signal(signal.SIGINT, _stop)
    from ray_cxr import environment

    environment.configure_command()
    from ray_cxr import cli

    signal.signal(signal.SIGINT, previous)
    return cli.main(argv)


def _stop(number: int, frame: object) -> NoReturn:
    # Not an exception, which libraries may replace by another one while they are imported.
    with contextlib.suppress(OSError):
        os.write(2, b"ray-cxr: stopped; run the same command again to continue\n")
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
