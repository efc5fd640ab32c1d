"""Arguments of the commands: the parser, argument types, and settings that options override."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from ray_cxr import config, environment, errors
from ray_cxr.cli.output import report_lost_output
from ray_cxr.errors import ConfigError, one_line
from ray_cxr.storage import remote
from ray_cxr.storage.paths import redact

_Settings = TypeVar("_Settings", bound=config.Settings)
_Number = TypeVar("_Number", int, float)


class CommandParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        environment.write_output("", end="")  # the help may still be in the buffer
        super().exit(status or report_lost_output(self.prog), message)


def any_path(text: str) -> str:
    """Argument type: a path on this machine, or `s3://BUCKET/...`."""
    try:
        remote.to_path(text)
    except errors.InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def local_input(text: str, remedy: str = "copy it to this machine") -> str:
    """Argument type: a file or folder on this machine; refuse `s3://`, which would otherwise name a local folder."""
    if remote.is_address(text):
        raise argparse.ArgumentTypeError(f"{redact(text)}: needs a local path; {remedy}")
    return text


#: Argument type: a file or folder to write on this machine.
local_output = functools.partial(local_input, remedy="write to a folder and copy that")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> CommandParser:
    """Add a command, the function that runs it, and its help text."""
    parser: CommandParser = commands.add_parser(name, help=text)
    parser.set_defaults(run=run)
    return parser


def add_settings(parser: argparse.ArgumentParser, *, gpu: bool = False) -> None:
    parser.add_argument("--config", type=local_input, metavar="F.toml", help="settings; see docs/settings.md")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value")
    if gpu:
        parser.add_argument("--gpu", action="store_true", help="use one GPU per worker or actor")


def parse_numbers(kind: type[_Number], text: str, option: str, what: str) -> list[_Number]:
    """Return comma-separated numbers; the error states what the option needs."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: needs {what}") from None


def pick(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the named arguments, to pass them on as keyword arguments."""
    return {name: getattr(arguments, name) for name in names}


def override_settings(settings: _Settings, arguments: argparse.Namespace, *names: str) -> _Settings:
    """Return the settings with the values of the named arguments that the command line contains."""
    return settings.replace(**{name: value for name, value in pick(arguments, *names).items() if value is not None})
