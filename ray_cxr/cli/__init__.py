"""`ray-cxr`: parse arguments, call the package, print results. Every error is one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import ray_cxr
from ray_cxr import errors, limits
from ray_cxr.cli import bundles, data, reports, scoring, training
from ray_cxr.cli.arguments import CommandParser, add_command, local_output
from ray_cxr.cli.output import print_line, report_lost_output
from ray_cxr.errors import EXIT_INTERRUPTED, RayCxrError, one_line
from ray_cxr.storage import remote

#: Part of the path of a job's working directory, a copy in Ray's session folder that is removed with the session.
_JOB_FOLDER = "/runtime_resources/working_dir_files/"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (0 done, 1 failed, 2 wrong input, 3 too many errors)."""
    command, arguments = "ray-cxr", argparse.Namespace()
    try:
        # TensorFlow's C++ code reads this on import.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("ray_cxr").setLevel(logging.INFO)
        arguments = _build_parser().parse_args(argv)
        command = f"ray-cxr {arguments.command}"
        _check_working_directory(getattr(arguments, "out", ""))
        arguments.run(arguments)
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        again = "the same command without --fresh" if getattr(arguments, "fresh", False) else "the same command again"
        print(f"{command}: stopped; run {again} to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        cause = error if isinstance(error, RayCxrError) else errors.own_error(error) or _describe_ray_error(error)
        if cause is None:
            raise
        print(f"{command}: {one_line(cause)}", file=sys.stderr)
        return cause.exit_code if isinstance(cause, RayCxrError) else 1
    return report_lost_output(command)


def _check_working_directory(out: str) -> None:
    """Refuse a working directory that was removed, and an output in the copy of the folder that a job runs in."""
    try:
        here = os.getcwd()
    except OSError:
        raise errors.InputError("the working directory was removed; change to an existing folder") from None
    if out and not remote.is_address(out) and _JOB_FOLDER in os.path.join(here, out):
        raise errors.OutputError(
            f"--out {out}: is in the working directory of a job, which Ray removes later; pass an absolute path "
            "outside of it"
        )


def _describe_ray_error(error: Exception) -> RayCxrError | None:
    """Return a one-line error for an exception of Ray; None for any other exception."""
    # Importing Ray takes seconds. If the command has not imported it, the exception is not Ray's.
    ray_errors = sys.modules.get("ray.exceptions")
    if ray_errors is None or not isinstance(error, ray_errors.RayError):
        return None
    shortage = limits.explain_loss(error, "lower ray.num_cpus, or end other programs")
    reason = shortage or f"{type(error).__name__}: {errors.last_line(error)}"
    return RayCxrError(f"Ray failed ({reason}); see Ray's log folder, then run it again")


def _build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="ray-cxr", description=ray_cxr.__doc__)
    parser.add_argument("--version", action="version", version=f"ray-cxr {ray_cxr.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=CommandParser)
    for module in (data, training, scoring, reports, bundles):
        module.add_commands(commands)
    demo = add_command(commands, "demo", _demo, "run every step on synthetic radiographs, on a laptop, in minutes")
    demo.add_argument("--out", required=True, type=local_output, metavar="DIR")
    demo.add_argument("--tune", action="store_true", help="also run a small search before the training")
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from ray_cxr import demo

    demo.run_demo(Path(arguments.out), main, print_line, tune=arguments.tune)
