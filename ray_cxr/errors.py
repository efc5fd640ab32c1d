"""Every failure this package raises on purpose. A message is one line: what is wrong, where, what to do.

    RayCxrError                   exit 1
    ├── InputError                exit 2   the input or the arguments are wrong
    │   ├── ConfigError                    a setting: unknown, or out of its range
    │   ├── TableError                     a table: columns, labels, duplicate images
    │   ├── LeakError                      a patient (or a training image) where it must not be
    │   ├── BundleError                    a bundle: missing or changed files, another format
    │   └── OutputError                    the output folder belongs to another run
    ├── DivergedError             exit 1   a loss or a weight is not finite; carries its `reason`
    ├── ErrorRateExceeded         exit 3   done, but more images failed than was allowed
    └── ImageError                one image that cannot be used; carries its `code`

Messages end up in logs and reports. They can name a DICOM element of the pixel description and quote the characters of
numbers in it. Otherwise they quote only terms that the DICOM standard defines and UIDs of transfer syntaxes, never
other text of a header, which could name a patient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

#: The shell's exit code for a program that Ctrl-C ended.
EXIT_INTERRUPTED = 130

#: The codes of an `ImageError`, and so of the column `error_code` of a score table.
ERROR_CODES: tuple[str, ...] = (
    "missing",
    "permission",
    "storage",
    "empty",
    "truncated",
    "corrupt",
    "not_an_image",
    "not_a_radiograph",
    "unsupported_transfer_syntax",
    "too_large",
    "too_small",
    "blank",
    "decode_timeout",
    "decoder_crash",
)

#: Codes of faults that may be temporary: `score --retry-errors` reads these files again.
RETRYABLE_CODES: frozenset[str] = frozenset({"missing", "permission", "storage", "decode_timeout", "decoder_crash"})


class RayCxrError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        exit_code: exit code of the command line.
        fields: names of attributes that `to_record` keeps in addition to the message.
        place: the path in a bucket that could not be used, with which the message starts; None for other errors.
    """

    exit_code = 1
    fields: ClassVar[tuple[str, ...]] = ()
    place: Any = None

    def __init__(self, message: str) -> None:
        super().__init__(message)


class InputError(RayCxrError):
    """The user's input or arguments are wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown or out of its range."""


class TableError(InputError):
    """A table lacks columns, holds unknown labels, or names an image twice."""


class LeakError(InputError):
    """A patient is in two splits, or a training image in an evaluation."""


class BundleError(InputError):
    """A bundle is incomplete, changed, or of a format that this version cannot read."""


class OutputError(InputError):
    """The output folder already holds the work of another model, manifest or setting."""


class ErrorRateExceeded(RayCxrError):
    """All rows were written, but more of them failed than `--max-error-rate` allows.

    Its `report`, the ScoreReport of the run, is not part of a record.
    """

    exit_code = 3

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class DivergedError(RayCxrError):
    """A loss or a weight is not finite; `reason` names it, its epoch and its step."""

    fields = ("reason",)

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class ImageError(RayCxrError):
    """One image cannot be used; `code` is one of `ERROR_CODES`."""

    fields = ("code",)

    def __init__(self, code: str, message: str) -> None:
        if code not in ERROR_CODES:
            raise ValueError(f"unknown image error code {code!r}")
        super().__init__(message)
        self.args = (code, message)  # so that it survives pickling between processes
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


def to_record(error: RayCxrError) -> dict[str, Any]:
    """Return an error as JSON data, to carry it to another process or into a file."""
    message = error.message if isinstance(error, ImageError) else str(error)
    details = {name: getattr(error, name) for name in error.fields}
    return {"type": type(error).__name__, "message": message, "details": details}


def from_record(record: Mapping[str, Any]) -> RayCxrError:
    """Rebuild the error of a record; a record of an unknown type becomes a RayCxrError."""
    kind = globals().get(record["type"])
    if not (isinstance(kind, type) and issubclass(kind, RayCxrError)):
        return RayCxrError(record["message"])
    return kind(message=record["message"], **record["details"])


def own_error(error: BaseException) -> RayCxrError | OSError | None:
    """Return the error of this package or of the operating system that Ray has wrapped, or None."""
    for current in list_causes(error):
        # Ray's wrapper is also an instance of the class of the wrapped error, but its message is a traceback.
        wrapped = getattr(current, "cause", None)
        # A lost connection to Ray is an OSError too.
        is_rays = isinstance(wrapped, BaseException) or isinstance(current, (ConnectionError, TimeoutError))
        if isinstance(current, (RayCxrError, OSError)) and not is_rays:
            return current
    return None


def list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it, also those that Ray wraps."""
    queue: list[object] = [error]
    seen: set[int] = set()
    while queue:
        current = queue.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        # Not __context__: an error raised while another was handled is not caused by it.
        # Ray Train keeps the errors of its controller and of lost workers in attributes.
        queue += [getattr(current, name, None) for name in ("cause", "controller_failure", "health_check_failure")]
        queue.append(current.__cause__)
        if isinstance(failures := getattr(current, "worker_failures", None), dict):
            queue += failures.values()


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, at most 300 characters; its type's name if it has none."""
    return _nonempty_lines(error)[0][:300]


def last_line(error: BaseException) -> str:
    """Return the last line of an exception's message, at most 300 characters; its type's name if it has none."""
    return _nonempty_lines(error)[-1][:300]


def _nonempty_lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


def one_line(value: object) -> str:
    """Return a text, or an exception's message, with every run of whitespace as one space."""
    return " ".join(str(value).split())
