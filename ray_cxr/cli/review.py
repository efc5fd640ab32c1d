"""`review` and `reviews`."""

from __future__ import annotations

import argparse
import getpass
from typing import Any

from ray_cxr import extras
from ray_cxr.cli.arguments import add_command, any_path
from ray_cxr.cli.output import print_line
from ray_cxr.errors import ConfigError
from ray_cxr.progress import Stage


def add_commands(commands: Any) -> None:
    review = add_command(
        commands,
        "review",
        _review,
        "open a page to read the images of a score run and record verdicts",
        ["scores", "scores --blind --reader anna"],
    )
    review.add_argument("scores", type=any_path, metavar="SCORES", help="folder from score")
    labels_help = "manifest whose labels the page shows on request"
    review.add_argument("--manifest", "--labels", dest="labels", type=any_path, metavar="M.parquet", help=labels_help)
    review.add_argument("--port", type=int, metavar="PORT", help="port on this machine (8000, or a free one)")
    review.add_argument("--blind", action="store_true", help="hide the model's output of an image until it is decided")
    review.add_argument("--reader", metavar="NAME", help="name in the verdicts (your user name)")


def _review(arguments: argparse.Namespace) -> None:
    extras.require("starlette", "review")
    extras.require("uvicorn", "review")
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise ConfigError(f"--port {arguments.port}: must be from 1 to 65535")
    reader = _check_reader(arguments.reader or getpass.getuser())
    with Stage("reading the scores", in_log=False):
        from ray_cxr.review import server

        listener = server.open_socket(arguments.port)
        session = server.open_review(arguments.scores, reader, arguments.labels, is_blind=arguments.blind)
    print_line(f"{len(session.index):,} studies, reader {reader}; Ctrl-C ends the page")
    try:
        server.serve(session, listener, lambda address: print_line(f"review: {address}"))
    finally:
        count = session.close()
    print_line(f"verdicts of this session: {count:,}{f' in {session.path}' if count else ''}")


def _check_reader(name: str) -> str:
    if not name.isprintable() or not 1 <= len(name.strip()) <= 64:
        raise ConfigError("--reader: must be 1 to 64 printable characters")
    return name.strip()
