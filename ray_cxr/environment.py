"""Settings of the user's environment under which Python, Ray or matplotlib cannot run a command.

Only modules of the standard library are imported at the top: a command calls this module before all other imports.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings

from ray_cxr.errors import InputError, last_line

logger = logging.getLogger(__name__)

_TRAIN_V2 = "RAY_TRAIN_V2_ENABLED"
#: Categories of warnings that Python does not show by default.
_HIDDEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)

#: Whether this process runs a command, and not a user's program that imports this package.
is_command = False
#: Why standard output could not be written; None as long as it can.
output_error: str | None = None


def open_closed_streams() -> None:
    """Open those of standard input, output and error on the null device that are closed, as under some schedulers.

    Files that are opened later would otherwise get their numbers, and output of libraries would go into these files.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # It gets this number, because lower ones are open.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def write_output(text: str, end: str = "\n") -> None:
    """Write a line to standard output. If that fails, as on a full disk, discard it and all later ones.

    A command does not end for that, because its results lie in files.
    """
    global output_error
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        raise
    except OSError as error:
        output_error = error.strerror or type(error).__name__
        discard_output()


def discard_output() -> None:
    """Send standard output, with the lines in its buffer, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def configure_command() -> None:
    """Make this process independent of settings for the user's other programs; call it before other imports."""
    global is_command
    is_command = True
    open_closed_streams()
    # Child processes, such as those of export-sr, do not import a user's own modules from the working directory.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    # In a cell of Jupyter it names a module that only Jupyter's environment has, and matplotlib cannot be imported.
    os.environ["MPLBACKEND"] = "agg"
    report_keras_backend()
    os.environ.pop("KERAS_BACKEND", None)  # a line from every process would repeat this one
    _ignore_strict_warnings()


def report_keras_backend() -> None:
    """Log that KERAS_BACKEND is ignored if it names another backend than TensorFlow."""
    if (backend := os.environ.get("KERAS_BACKEND") or "tensorflow") != "tensorflow":
        logger.warning("KERAS_BACKEND=%s is ignored: ray_cxr runs Keras on TensorFlow", backend)


def _ignore_strict_warnings() -> None:
    """Restore Python's default treatment of warnings if the user has turned warnings into errors.

    Any library, also in child processes, would otherwise end a command with a warning that is meant for developers.
    """
    actions = [option.partition(":")[0].strip().lower() for option in sys.warnoptions]
    # Python accepts abbreviations, such as `-W e`.
    if not any(action and "error".startswith(action) for action in actions):
        return
    logger.warning(
        "PYTHONWARNINGS or -W %s is ignored: warnings of libraries would end the command", ",".join(sys.warnoptions)
    )
    os.environ.pop("PYTHONWARNINGS", None)
    sys.warnoptions.clear()
    warnings.resetwarnings()
    for category in _HIDDEN:
        warnings.simplefilter("ignore", category)


def count_gpus() -> int:
    """Return the number of GPUs that CUDA's driver lets this process use, in milliseconds and without TensorFlow."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver
        return 0
    # CUDA_VISIBLE_DEVICES applies. Both functions return 0 if they succeed.
    return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


def prepare_for_ray() -> None:
    """Set what Ray needs in this process and its children; call it before Ray is imported.

    Raises:
        InputError: Python runs without docstrings, from which Ray builds its documentation on import.
    """
    if sys.flags.optimize >= 2:
        raise InputError(
            "Python runs without docstrings, which Ray needs: unset PYTHONOPTIMIZE, or set it to 1 (and omit -OO)"
        )
    if os.environ.get(_TRAIN_V2, "1") != "1":
        logger.warning("RAY_TRAIN_V2_ENABLED=%s is ignored: ray_cxr trains with version 2", os.environ[_TRAIN_V2])
        os.environ[_TRAIN_V2] = "1"


def import_ray() -> None:
    """Import Ray and Ray Data; raise InputError if a variable of the user has a value that they cannot read."""
    try:
        import ray.data  # noqa: F401
    except (OSError, ValueError) as error:
        raise InputError(
            f"Ray cannot be imported ({type(error).__name__}: {last_line(error)}), because a variable has a value that "
            "it cannot read; see `env | grep RAY_`"
        ) from None


def count_cpus() -> int:
    """Return the number of CPUs of a local Ray, at least 1, where Ray would round a smaller quota down to none."""
    from ray_cxr import ray_api
    from ray_cxr.progress import silence_stderr

    with silence_stderr():  # Ray warns that it rounds fractions
        count = int(ray_api.count_cpus())
    if count < 1:
        logger.warning("the quota of this machine or container is below one CPU; Ray counts it as one")
    return max(1, count)
