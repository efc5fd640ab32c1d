"""Run tasks of Ray Data: carry errors in rows, retry lost tasks a limited number of times, watch their output.

If a task raises an exception, Ray Data keeps only its text, and may skip the task. So a task catches its exceptions and
returns them in the column `error`: a record of `errors.to_record` as JSON, or an empty text.

If the worker of a task dies, Ray Data silently retries the task without limit. So tasks of this package request no
retries, and `run_with_retries` submits lost tasks again until two whole rounds make no progress.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_cxr import limits, ray_api
from ray_cxr.errors import ImageError, RayCxrError, from_record, one_line, own_error, to_record
from ray_cxr.progress import run_periodically

logger = logging.getLogger(__name__)

Task = dict[str, Any]

#: Lost tasks per worker after which a round ends and the remaining tasks are submitted again.
MAX_LOST_PER_WORKER = 4
#: Consecutive rounds without a finished file after which the command fails.
MAX_IDLE_ROUNDS = 2
#: Seconds between two checks of the output folder.
POLL_S = 1.0
#: Seconds without a finished file after which a warning is logged, and between such warnings.
STALL_S = 600.0

#: What lowers the use of memory and processes, by command.
REMEDIES: Mapping[str, str] = {
    "prepare": "lower rows_per_shard, or run fewer tasks at a time: --set ray.num_cpus=N",
    "score": "lower batch_size and rows_per_file, or run fewer actors: raise cpus_per_actor, or --set ray.num_cpus=N",
}

#: The column `error` of a task that succeeded.
SUCCESS: Mapping[str, str] = {"error": ""}


def configure() -> None:
    """Set the options of Ray Data for all later datasets of this process."""
    from ray.data import DataContext

    context = DataContext.get_current()
    # By default Ray Data ends a dataset that returns nothing for 30 minutes. But an archive is one task, which may take
    # longer, and so may the wait for spot machines. `poll` reports a stall instead.
    context.execution_no_progress_timeout_s = -1
    # Otherwise an exception that a task does not catch arrives without its type.
    context.raise_original_map_exception = True
    context.enable_progress_bars = False  # the commands show the progress of images, not of blocks
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger(ray_api.PROGRESS_LOGGER).setLevel(logging.ERROR)
    # These loggers print tracebacks of exceptions, which become one line, and of lost tasks, which are retried.
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)
    lost = logging.getLogger(ray_api.LOSS_LOGGER)
    lost.handlers, lost.propagate = [_losses], False


class _LossRecorder(logging.Handler):
    """Keeps the exception of the last lost task, which Ray Data skips and only logs."""

    last: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.last = record.exc_info[1]


_losses = _LossRecorder()


def sanitize_error(error: Exception, command: str) -> RayCxrError:
    """Return an error whose message may be shown: our own error unchanged, any other as its type and its location.

    The message of another exception can quote the contents of a file, and so a patient's id.
    """
    if isinstance(error, ImageError):
        return RayCxrError(error.message)  # about an archive or a table, so it ends the command
    if isinstance(error, RayCxrError):
        return error
    if shortage := limits.explain_loss(error, REMEDIES.get(command, REMEDIES["score"])):
        return RayCxrError(f"{command}: {shortage}; then run the same command again to continue")
    if isinstance(error, OSError):
        where = error.filename or command
        return RayCxrError(f"{where}: {error.strerror or error}; fix this, then run the same command again to continue")
    trace = traceback.extract_tb(error.__traceback__)
    logger.error("%s\n%s", type(error).__name__, "".join(trace.format()))
    where = f"{Path(trace[-1].filename).name}, line {trace[-1].lineno}" if trace else "an unknown place"
    reason = f"{command} failed with {type(error).__name__} in {where}"
    return RayCxrError(f"{reason}; see the worker's log in Ray's log folder")


def encode_error(error: RayCxrError) -> dict[str, str]:
    """Return the column `error` with a sanitized error, for the driver."""
    return {"error": json.dumps(to_record(error))}


def read_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset; raise the error that a row carries, or RayError when a worker was lost."""
    from ray.exceptions import RayError, RayTaskError

    try:
        for row in dataset.iter_rows():
            if row["error"]:
                raise from_record(json.loads(row["error"]))
            yield row
    except RayError as error:
        if (own := own_error(error)) is not None:
            record = to_record(sanitize_error(own, "Ray Data"))
            record["message"] = record["message"].splitlines()[0]  # Ray Data appends lines to it
            raise from_record(record) from None
        if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
            raise RayCxrError(f"a task failed with {type(error.cause).__name__}; see Ray's log folder") from error
        raise
    except RayCxrError:
        raise
    except Exception as error:  # Ray Data's exceptions share no base class
        reason = one_line(error)[:300]
        raise RayCxrError(
            f"Ray Data failed ({type(error).__name__}: {reason}); run the same command again to continue"
        ) from error


def run_with_retries(
    tasks: list[Task],
    build_dataset: Callable[[list[Task]], Any],
    find_pending: Callable[[list[Task], set[int]], list[Task]],
    command: str = "score",
) -> Iterator[dict[str, Any]]:
    """Yield the rows of all tasks; tasks that were lost with a worker are submitted again.

    Args:
        tasks: Tasks, each with `indices`, the numbers of the output files that it writes.
        build_dataset: Makes a Ray dataset of tasks. Its rows have `done`, the numbers of finished files, and `error`.
        find_pending: Returns the tasks that are still pending, given tasks and the numbers of finished files.
        command: The command, whose settings an error about memory names.

    Raises:
        RayCxrError: If a row carries an error, or two rounds in a row finish no file.
    """
    from ray.exceptions import RayError

    configure()
    idle = 0
    while tasks:
        done: set[int] = set()
        lost: BaseException | None = None
        _losses.last = None
        try:
            for row in read_rows(build_dataset(tasks)):
                done.update(row["done"])
                yield row
        except RayError as error:
            lost = error
        left = find_pending(tasks, done)
        files, before = (sum(len(task["indices"]) for task in group) for group in (left, tasks))
        idle = idle + 1 if files == before else 0
        lost = lost or _losses.last
        reason = limits.explain_loss(lost, REMEDIES[command])
        if left and idle == MAX_IDLE_ROUNDS:
            last = f", last with {type(lost).__name__}" if lost else ""
            cause = reason or f"the usual cause is too little memory; {REMEDIES[command]}"
            raise RayCxrError(
                f"workers keep dying ({files:,} output files pending{last}): {cause}. Ray's log "
                "folder has the workers' logs. Finished files stay; run the same command again to continue"
            ) from lost
        if left:
            why = f" ({reason})" if reason else ""
            logger.warning(
                "WARNING: workers were lost%s; %s files that they had in progress are retried", why, f"{files:,}"
            )
        tasks = left


def map_once(dataset: Any, function: Callable[..., Any], *, flat: bool = False, **options: Any) -> Any:
    """Map the rows of a dataset with tasks that Ray does not retry, for `run_with_retries`.

    With `flat`, the function returns several rows for each row.
    """
    transform = dataset.flat_map if flat else dataset.map
    return ray_api.map_rows(transform, function, {"max_retries": 0}, **options)


@contextlib.contextmanager
def poll(look: Callable[[], bool], command: str) -> Iterator[None]:
    """Call `look` every second while the block runs and once after it; warn if no file appears for `STALL_S` seconds.

    `look` shows the files that appeared since its last call, and returns whether there are any. A task returns only at
    its end, which can take hours for an archive, while its files appear one by one.
    """
    last = time.monotonic()

    def check() -> None:
        nonlocal last
        with contextlib.suppress(OSError, RayCxrError):  # a bucket may answer the next time
            if look():
                last = time.monotonic()
        if time.monotonic() - last >= STALL_S:
            logger.warning(
                "%s: WARNING: no file finished for %.0f minutes; storage may be slow, or Ray waits for CPUs or "
                "GPUs that other jobs hold (see `ray status`)",
                command,
                STALL_S / 60,
            )
            last = time.monotonic()

    with run_periodically(check, POLL_S, "poll"):
        yield
    look()
