"""`--dry-run`: make the checks of a run, print what it would take, and write nothing."""

from __future__ import annotations

import argparse

from ray_cxr.cli.next_step import print_next
from ray_cxr.cli.output import print_line
from ray_cxr.costs import Cost
from ray_cxr.storage import remote, run_folder

OPTION = "--dry-run"


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    text = "check everything, state images, time and disk, and write nothing"
    parser.add_argument(OPTION, action="store_true", help=text)


def print_cost(cost: Cost, arguments: argparse.Namespace) -> None:
    out = remote.to_path(arguments.out)
    run_folder.check_writable(out)
    for line in cost.list_lines(out):
        print_line(line)
    print_line("nothing was written")
    print_next(*(word for word in arguments.words if word != OPTION))
