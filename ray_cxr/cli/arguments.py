"""Arguments of the commands: the parser, argument types, and settings that options override."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from ray_cxr import config, environment, errors, labels
from ray_cxr.cli.output import describe_error, report_lost_output
from ray_cxr.errors import ConfigError
from ray_cxr.storage import remote
from ray_cxr.storage.paths import is_dicomweb, redact

#: Words for commands that other programs use.
_SAME = {"evaluate": "report", "eval": "report", "predict": "score", "infer": "score"}

_Settings = TypeVar("_Settings", bound=config.Settings)
_Number = TypeVar("_Number", int, float)


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the word that was probably meant."""

    def __init__(self, **options: Any) -> None:
        # Without abbreviations, an option of a later version cannot change what an old command means.
        options = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options}
        super().__init__(**options)
        #: Sections of the settings that `--set` changes, the command's own first.
        self.sections: Sequence[str] = ()
        #: What the command does, without a full stop.
        self.summary = ""
        #: All commands, this one too: an unknown option may belong to another one.
        self.siblings: Mapping[str, CommandParser] = {}
        self._inputs: list[tuple[argparse.Action, argparse.Action]] = []
        self._choices: list[argparse._MutuallyExclusiveGroup] = []
        self._words: list[str] = []

    def add_input(
        self, *names: str, metavar: str, dest: str, text: str, nargs: str | None = None, kind: Any = None
    ) -> None:
        """Add an argument that is passed by its place, or by one of its names; `kind` is its type, None for a path."""
        kind = kind or any_path
        place = self.add_argument(dest, type=kind, metavar=metavar, nargs=nargs, help=text)
        named = self.add_argument(
            *names, dest=dest, type=kind, metavar=metavar, nargs=nargs, default=argparse.SUPPRESS,
            help=f"another way to pass {metavar}",
        )  # fmt: skip
        self._inputs.append((place, named))

    def add_choice(self) -> argparse._MutuallyExclusiveGroup:
        """Add a group of options one of which must be passed."""
        self._choices.append(self.add_mutually_exclusive_group())
        return self._choices[-1]

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse all arguments; refuse an unknown one before a missing one, which is often its consequence."""
        self._words = words = list(sys.argv[1:] if args is None else args)
        options = list(itertools.takewhile(lambda word: word != "--", words))
        if self._subparsers is not None:  # the other words belong to the command
            options = list(itertools.takewhile(lambda word: word.startswith("-"), options))
        if not {"-h", "--help"} & set(options):
            for index, word in enumerate(options):
                if word.startswith("--") and " " not in word and word.partition("=")[0] not in self._options():
                    self._refuse_option(word, *options[index + 1 : index + 2])
        self._refuse_repeats(options)
        for place, named in self._inputs:
            if any(word.partition("=")[0] in named.option_strings for word in options):
                self._remove_action(place)
        found, rest = super().parse_known_args(words, namespace)
        if rest and rest[0].startswith("-"):
            self._refuse_option(*rest[:2])
        names = [[str(action.option_strings[0]) for action in group._group_actions] for group in self._choices]
        passed = [any(getattr(found, action.dest) for action in group._group_actions) for group in self._choices]
        missing = next((options for options, is_passed in zip(names, passed, strict=True) if not is_passed), None)
        if rest and missing:
            self.error(f"unexpected argument {rest[0]!r}; pass it after {', '.join(missing[:-1])} or {missing[-1]}")
        elif rest:
            self.error(f"unexpected argument {rest[0]!r}")
        elif missing:
            self.error(f"one of the arguments {' '.join(missing)} is required")
        return found, []

    def format_help(self) -> str:
        """Return the help, with a usage line that leaves the options to their list."""
        places = [(str(action.metavar), action.nargs) for action in self._get_positional_actions()]
        parts = [f"{name} [{name} ...]" if nargs else name for name, nargs in places]
        parts += [_show(action) for action in self._actions if action.option_strings and action.required]
        parts += [f"({' | '.join(map(_show, group._group_actions))})" for group in self._choices]
        self.usage = wrap(" ".join(["usage:", self.prog, *parts, "[options]"]), " " * 9, "").removeprefix("usage: ")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        self._stop(f"{message}; see {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        environment.write_output("", end="")  # the help may still be in the buffer
        super().exit(status or report_lost_output(self.prog), message)

    def _stop(self, message: str) -> NoReturn:
        print(f"{self.prog}: {describe_error(message, self._words)}", file=sys.stderr)
        raise SystemExit(2)

    def _options(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def _refuse_repeats(self, words: Sequence[str]) -> None:
        """Refuse an input that is passed twice, also by two names: argparse would use the last one only."""
        for action in self._actions:
            names = [name for word in words if (name := word.partition("=")[0]) in action.option_strings]
            if len(names) > 1 and action.type in PATH_TYPES:
                same = "" if len(set(names)) == 1 else f"; {' and '.join(dict.fromkeys(names))} mean the same"
                self._stop(f"{action.option_strings[0]}: passed {len(names)} times{same}")

    def use_new_names(self, words: Sequence[str]) -> list[str]:
        """Return the words of a command with the first name of each option, for a command to suggest."""
        first = {name: action.option_strings[0] for action in self._actions for name in action.option_strings}
        end = words.index("--") if "--" in words else len(words)
        parts = [word.partition("=") for word in words[:end]]
        return [*(first.get(name, name) + equals + value for name, equals, value in parts), *words[end:]]

    def _refuse_option(self, word: str, following: str = "") -> NoReturn:
        """Report an unknown option, with the option or the setting that was probably meant."""
        option, equals, value = word.partition("=")
        plain, options = option.replace("_", "-"), self._options()
        settings = {f"--{name.split('.')[-1].replace('_', '-')}": name for name in reversed(self._name_settings())}
        settings = {name: key for name, key in settings.items() if name not in options}
        near = difflib.get_close_matches(plain, options, n=1, cutoff=0.9)
        if not near and plain in settings:
            near = [plain]
        others = [name for name, parser in self.siblings.items() if not near and plain in parser._options()]
        if others:
            self.error(f"unknown option {option}, which {_join(others)} {'have' if others[1:] else 'has'}")
        near = near or [name for name in options if len(plain) > 3 and name.startswith(plain)]
        near = near or difflib.get_close_matches(plain, [*options, *settings], n=1)
        if near and near[0] in settings:
            value = value if equals else following if following and not following.startswith("--") else "VALUE"
            use = "use {}" if near == [plain] else "did you mean {}?"
            self._stop(f"unknown option {option}; " + use.format(f"--set {settings[near[0]]}={shlex.quote(value)}"))
        if near:
            self._stop(f"unknown option {option}; did you mean {self.use_new_names(near)[0]}?")
        self.error(f"unknown option {option}")

    def _name_settings(self) -> list[str]:
        """Return the names of the settings in `--set NAME=VALUE`, the command's own first."""
        own, *others = [*self.sections, ""]
        return [*list_keys(own), *(f"{section}.{key}" for section in others for key in list_keys(section))]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        near = labels.suggest(str(value), names) or f"; use {', '.join(names)}"
        if action.dest == "command":
            near = f"; did you mean {_SAME[value]!r}?" if value in _SAME else near
            self._stop(f"unknown command {value!r}{near}")
        self._stop(f"{'/'.join(action.option_strings) or action.metavar}: unknown value {value!r}{near}")


def _join(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _show(action: argparse.Action) -> str:
    return f"{action.option_strings[0]} {action.metavar}"


def any_path(text: str) -> str:
    """Argument type: a path on this machine, or `s3://BUCKET/...`."""
    try:
        remote.to_path(text)
    except errors.InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def path_or_search(text: str) -> str:
    """Argument type: as `any_path`, or a search of a PACS."""
    return text if is_dicomweb(text) else any_path(_refuse_http(text))


def any_address(text: str) -> str:
    """Argument type: a folder, any address that pyarrow opens, or one of a PACS."""
    return _refuse_http(text)


def _refuse_http(text: str) -> str:
    if text.lower().startswith(("http://", "https://")):
        shown = redact(text)
        pacs = f"dicomweb+https://{shown.partition('://')[2]}"
        raise argparse.ArgumentTypeError(f"{shown}: web pages are not read; for a PACS write {pacs}")
    return text


def local_input(text: str, remedy: str = "copy it to this machine") -> str:
    """Argument type: a file or folder on this machine; refuse `s3://`, which would otherwise name a local folder."""
    if remote.is_address(text):
        raise argparse.ArgumentTypeError(f"{redact(text)}: needs a local path; {remedy}")
    return text


#: Argument type: a file or folder to write on this machine.
local_output = functools.partial(local_input, remedy="write to a folder and copy that")


def label_table(text: str) -> str:
    """Argument type: a table, or `train=TABLE`, `val=TABLE`, `test=TABLE`."""
    any_path(re.sub("^(train|val|test)=", "", text))
    return text


#: Argument types whose values a shell completes as files.
PATH_TYPES = (any_path, any_address, path_or_search, local_input, local_output, label_table)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, examples: Sequence[str]
) -> CommandParser:
    """Add a command, the function that runs it, the sentence that describes it, and examples."""
    parser: CommandParser = commands.add_parser(
        name,
        help=text,
        description=wrap(text[0].upper() + text[1:] + "."),
        epilog="\n".join(["examples:", *(f"  ray-cxr {name} {example}" for example in examples)]),
    )
    parser.summary = text
    parser.set_defaults(run=run)
    return parser


def wrap(text: str, indent: str = "", first: str | None = None) -> str:
    """Wrap a text at the width of the terminal, as argparse wraps help texts."""
    width = max(40, shutil.get_terminal_size().columns - 2)
    start = indent if first is None else first
    return textwrap.fill(text, width, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def add_settings(parser: CommandParser, *sections: str, gpu: bool = False) -> None:
    """Add the options that change settings of these sections, the command's own first."""
    parser.sections = sections
    keys = list_keys(sections[0])
    parser.add_argument("--config", type=local_input, metavar="F.toml", help="file of settings, see docs/settings.md")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="key=value",
        help="change one setting (keys below); repeat it for others",
    )  # fmt: skip
    if "seed" in keys:
        parser.add_argument(
            "--seed", dest="overrides", action="append", metavar="N", type=lambda text: f"seed={text}",
            help="seed of random choices (0); as --set seed=N",
        )  # fmt: skip
    if gpu:
        parser.add_argument("--gpu", action="store_true", help="use one GPU per worker or actor")
    others = "".join(f" {name}.KEY" for name in sections[1:])
    listed = wrap(", ".join([*keys, *others.split()]), "  ")
    purpose = " for the connection to a PACS" if sections[0] == "pacs" else ""
    heading = wrap(f"keys of --set{purpose}, explained in docs/settings.md:")
    parser.epilog = f"{parser.epilog}\n\n{heading}\n{listed}"


def list_keys(section: str) -> list[str]:
    """Return the keys of a section of the settings; none of an unknown section."""
    return list(type(getattr(config.Config(), section)).model_fields) if section else []


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
