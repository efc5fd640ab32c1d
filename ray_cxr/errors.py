"""Every failure this package raises on purpose.

    RayCxrError                   exit 1
    ├── InputError                exit 2   the input or the arguments are wrong
    │   ├── ConfigError                    a setting: unknown, or out of its range
    │   ├── TableError                     a table: columns, labels, duplicate images
    │   ├── LeakError                      a patient (or a training image) where it must not be
    │   ├── BundleError                    a bundle: missing or changed files, another format
    │   └── OutputError                    the output folder belongs to another run
    ├── ErrorRateExceeded         exit 3   done, but more images failed than was allowed
    └── ImageError                one image that cannot be used; carries its `code`

Every message is one line that says what, where and what to do. None of them quotes a DICOM field or a
patient's name: messages end up in logs and reports.
"""

from __future__ import annotations

#: The codes an `ImageError`, and so the column `error_code` of a score table, can hold.
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

#: Codes whose cause may have gone away: `score --retry-errors` reads these files again.
RETRYABLE_CODES: frozenset[str] = frozenset({"missing", "permission", "storage", "decode_timeout", "decoder_crash"})


class RayCxrError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line exits with."""

    exit_code = 1


class InputError(RayCxrError):
    """The user's input or arguments are wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A setting is unknown or out of its range."""


class TableError(InputError):
    """A table lacks columns, holds unknown labels, or names an image twice."""


class LeakError(InputError):
    """A patient stands in two splits, or a training image in an evaluation."""


class BundleError(InputError):
    """A bundle is incomplete, changed, or of a format that this version cannot read."""


class OutputError(InputError):
    """The output folder already holds the work of another model, manifest or setting."""


class ErrorRateExceeded(RayCxrError):
    """All rows were written, but more of them failed than `--max-error-rate` allows.

    Args:
        message: one line.
        report: what the run found, which is no less wanted for this.
    """

    exit_code = 3

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class ImageError(RayCxrError):
    """One image cannot be used.

    Args:
        code: one of `ERROR_CODES`.
        message: one line, without any patient field.

    Raises:
        ValueError: the code is not in `ERROR_CODES`.
    """

    def __init__(self, code: str, message: str) -> None:
        if code not in ERROR_CODES:
            raise ValueError(f"unknown image error code {code!r}")
        super().__init__(code, message)  # both in args, so that it survives pickling between processes
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


#: Errors of the operating system that mean a lost connection to Ray, and not a file.
_OF_RAY_ITSELF = (ConnectionError, TimeoutError)


def own_error(error: BaseException) -> RayCxrError | OSError | None:
    """Return the error of ours, or of the operating system, that Ray has wrapped; None if there is none."""
    queue: list[object] = [error]
    seen: set[int] = set()
    while queue:
        one = queue.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        # Ray's wrapper is an instance of the class that it wraps as well, and its message is a traceback.
        wrapped = getattr(one, "cause", None)
        is_wrapper = isinstance(wrapped, BaseException)
        if isinstance(one, (RayCxrError, OSError)) and not (is_wrapper or isinstance(one, _OF_RAY_ITSELF)):
            return one
        # Not __context__: an error that merely happened while another was handled is another error.
        queue += [wrapped, one.__cause__]
        failures = getattr(one, "worker_failures", None)
        if isinstance(failures, dict):
            queue += list(failures.values())
    return None
