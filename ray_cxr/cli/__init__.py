"""`ray-cxr`: parse arguments, call the package, print results. Every error is one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray_cxr
from ray_cxr import errors, limits
from ray_cxr.cli import benchmark, bundles, data, reports, review, scoring, training
from ray_cxr.cli.arguments import PATH_TYPES, CommandParser, add_command, local_output, wrap
from ray_cxr.cli.next_step import JOB_FOLDER, hide_next, print_next
from ray_cxr.cli.output import LogFormatter, describe_error, print_line, report_lost_output
from ray_cxr.errors import EXIT_INTERRUPTED, RayCxrError
from ray_cxr.storage import remote

#: Groups of the commands in the overview. The commands of the workflow read each other's output, in this order.
_GROUPS = {
    "first steps": ("demo",),
    "workflow, each step reads what the step before wrote": ("manifest", "prepare", "train", "score", "report"),
    "other ways to a bundle (the folder of a model)": ("tune", "import-weights"),
    "from bundles to a new bundle": ("recalibrate", "probe", "quantize", "ensemble"),
    "reading by people": ("review", "reviews"),
    "speed of this machine": ("benchmark",),
    "exports": ("export-onnx", "export-sr"),
    "shell": ("completion",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (0 done, 1 failed, 2 wrong input, 3 too many errors)."""
    command, arguments = "ray-cxr", argparse.Namespace()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        # TensorFlow's C++ code reads this on import.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LogFormatter("%(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("ray_cxr").setLevel(logging.INFO)
        parser = _build_parser()
        arguments = parser.parse_args(argv)
        arguments.words = (
            parser.commands.choices[arguments.command].use_new_names(words) if arguments.command else words
        )
        command = f"ray-cxr {arguments.command or ''}".rstrip()
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
        text = _name_argument(cause, arguments) or cause
        print(f"{command}: {describe_error(text, words)}", file=sys.stderr)
        return cause.exit_code if isinstance(cause, RayCxrError) else 1
    return report_lost_output(command)


def _check_working_directory(out: str) -> None:
    """Refuse a working directory that was removed, and an output in the copy of the folder that a job runs in."""
    try:
        here = os.getcwd()
    except OSError:
        raise errors.InputError("the working directory was removed; change to an existing folder") from None
    if out and not remote.is_address(out) and JOB_FOLDER in os.path.join(here, out):
        raise errors.OutputError(
            f"--out {out}: is in the working directory of a job, which Ray removes later; pass an absolute path "
            "outside of it"
        )


def _name_argument(error: Exception, arguments: argparse.Namespace) -> str | None:
    """Return the message of a bucket's error with the argument of the command that holds the path; None without one."""
    if not isinstance(error, RayCxrError) or error.place is None:
        return None
    found: dict[str, str] = {}
    options = {word.partition("=")[0] for word in arguments.words}
    for action in _build_parser().commands.choices[arguments.command]._actions:
        values = getattr(arguments, action.dest, None) if action.type in PATH_TYPES else None
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str) and value.lower().startswith("s3://"):
                path = remote.to_path(value)
                if message := remote.describe_in(error, path):
                    # An option may set the same argument as a word without one.
                    used = options.intersection(action.option_strings)
                    if used or (not action.option_strings and str(path) not in found):
                        found[str(path)] = f"{min(used, default=action.metavar)} {message}"
    # Of nested folders, the inner one.
    return found[max(found, key=len)] if found else None


def _describe_ray_error(error: Exception) -> RayCxrError | None:
    """Return a one-line error for an exception of Ray; None for any other exception."""
    # Importing Ray takes seconds. If the command has not imported it, the exception is not Ray's.
    ray_errors = sys.modules.get("ray.exceptions")
    if ray_errors is None or not isinstance(error, ray_errors.RayError):
        return None
    shortage = limits.explain_loss(error, "lower ray.num_cpus, or end other programs")
    reason = shortage or f"{type(error).__name__}: {errors.last_line(error)}"
    return RayCxrError(f"Ray failed ({reason}); see Ray's log folder, then run it again")


class _Program(CommandParser):
    """The parser of `ray-cxr`, whose help is an overview of the commands."""

    commands: argparse._SubParsersAction[CommandParser]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse all arguments; `help` and `help COMMAND` mean `--help`."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([*words[1:2], "--help"] if words[:1] == ["help"] else words, namespace)

    def format_help(self) -> str:
        lines = ["usage: ray-cxr COMMAND [options], or ray-cxr --version", "", wrap(str(self.description))]
        for title, names in _GROUPS.items():
            lines += ["", f"{title}:"]
            lines += [wrap(self.commands.choices[name].summary, " " * 18, f"  {name:<16}") for name in names]
        end = "Start with `ray-cxr demo --out demo`. `ray-cxr COMMAND --help` explains options, with examples."
        return "\n".join([*lines, "", wrap(end), ""])


def _build_parser() -> _Program:
    parser = _Program(prog="ray-cxr", description=ray_cxr.__doc__)
    parser.add_argument("--version", action="version", version=f"ray-cxr {ray_cxr.__version__}")
    parser.set_defaults(run=lambda arguments: print_line(parser.format_help().rstrip("\n")))
    parser.commands = commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=CommandParser)
    for module in (data, training, scoring, reports, review, bundles, benchmark):
        module.add_commands(commands)
    demo = add_command(
        commands,
        "demo",
        _demo,
        "run every step on synthetic radiographs, in minutes",
        ["--out demo", "--out demo-search --tune"],
    )
    demo.add_argument("--out", required=True, type=local_output, metavar="DIR", help="folder for all files of the demo")
    demo.add_argument("--tune", action="store_true", help="also run a small search before the training")
    completion = add_command(
        commands,
        "completion",
        lambda arguments: _print_completion(parser, arguments.shell),
        "print a script for completion with the Tab key",
        ["bash > ~/.local/share/bash-completion/completions/ray-cxr", "fish > ~/.config/fish/completions/ray-cxr.fish"],
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
    for command in commands.choices.values():
        command.siblings = commands.choices
    return parser


def _print_completion(parser: _Program, shell: str) -> None:
    import shtab

    for command in parser.commands.choices.values():
        for action in command._actions:
            if action.type in PATH_TYPES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print_line(shtab.complete(parser, shell))


def _demo(arguments: argparse.Namespace) -> None:
    from ray_cxr import demo

    out = Path(arguments.out)
    with hide_next():
        demo.run_demo(out, main, print_line, tune=arguments.tune)
    # Score the images again as new ones, without labels.
    print_next("score", out / "run" / "bundle", "--images", out / "phantoms" / "images", "--out", out / "screened")
