"""Actor pools of Ray Data: their size, the errors of their actors, and the retry of ranges that an actor lost."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ray_cxr import cluster, ray_api
from ray_cxr.config import ScoreSettings
from ray_cxr.data.partition import Range
from ray_cxr.errors import ConfigError, RayCxrError
from ray_cxr.progress import Progress
from ray_cxr.scoring.ranges import ProgressFile, ScoreTask, TaskResult, list_parts, part_name
from ray_cxr.storage import remote
from ray_cxr.tasks import MAX_LOST_PER_WORKER, Task, map_once, poll, run_with_retries, sanitize_error

#: Maximum by default: further actors speed up a run more than further CPUs per actor.
MAX_CPUS_PER_ACTOR = 4
#: Tasks in flight per GPU. Simulated with a model of 3,200 images/s, and 0.12 s for the files of a task as on a shared
#: file system: 2 tasks reach 2,320 images/s, 3 reach 2,900, and 4 reach 2,990.
GPU_TASKS = 4
#: Maximum number of restarts per actor.
MAX_RESTARTS = 30


@dataclass(frozen=True)
class ActorPlan:
    """Number of actors in a pool, and their resources.

    Attributes:
        cpus, gpus: CPUs and GPUs per actor.
        in_flight: tasks that an actor works on at a time. With 2, it reads the images of the next task while it scores
            the last images of the current task.
        decode_apart: whether other Ray tasks, of one CPU each, decode the images.
    """

    actors: int
    cpus: int
    gpus: int = 0
    in_flight: int = 2
    decode_apart: bool = False


def plan_scoring(settings: ScoreSettings, n_tasks: int, *, use_gpu: bool, decodes: bool = True) -> ActorPlan:
    """Return a pool for scoring that fits the CPUs and GPUs of the running cluster.

    Without `decodes`, the actors read prepared images themselves.
    """
    cpus, gpus = _list_resource("CPU"), _list_resource("GPU")
    if not decodes:
        if not use_gpu:
            return ActorPlan(*fit_actors(cpus, settings.cpus_per_actor, n_tasks))
        _require_gpu(gpus)
        return ActorPlan(int(sum(gpus)), cpus=0, gpus=1, in_flight=GPU_TASKS)
    if use_gpu:
        _require_gpu(gpus)
        if sum(cpus) < 1:
            raise ConfigError("--gpu: Ray has no CPU to decode images; add one to the cluster")
        # Actors without CPUs leave all CPUs to the tasks that decode.
        return ActorPlan(int(sum(gpus)), cpus=0, gpus=1, in_flight=GPU_TASKS, decode_apart=True)
    if settings.decode == "apart":
        if sum(cpus) < 2:
            raise ConfigError("decode=apart: needs 2 CPUs, one for the model and one to decode; use decode=inside")
        return ActorPlan(1, cpus=1, decode_apart=True)
    return ActorPlan(*fit_actors(cpus, settings.cpus_per_actor, n_tasks))


def plan_drawing(settings: ScoreSettings, n_tasks: int, *, use_gpu: bool) -> ActorPlan:
    """Return a pool for drawing heat maps, whose actors also decode."""
    cpus, gpus = _list_resource("CPU"), _list_resource("GPU")
    if not use_gpu:
        return ActorPlan(*fit_actors(cpus, settings.cpus_per_actor, n_tasks), in_flight=1)
    _require_gpu(gpus)
    per_gpu = min(int(cpu // gpu) for cpu, gpu in zip(cpus, gpus, strict=True) if gpu >= 1)
    return ActorPlan(min(int(sum(gpus)), n_tasks), min(MAX_CPUS_PER_ACTOR, per_gpu), gpus=1, in_flight=1)


def _list_resource(name: str) -> list[float]:
    return [float(node["Resources"].get(name, 0)) for node in cluster.list_nodes()]


def _require_gpu(gpus: Sequence[float]) -> None:
    if sum(gpus) < 1:
        hint = cluster.hint_at_unused("GPU")
        raise ConfigError(f"--gpu: Ray has no GPU; remove --gpu, or connect to a cluster with GPUs{hint}")


def fit_actors(node_cpus: Sequence[float], cpus_per_actor: int | None, n_tasks: int) -> tuple[int, int]:
    """Return the number of actors that fit on the nodes, and the CPUs per actor; both at least 1.

    Actors may hold all CPUs: the driver reads the list of tasks itself, so no Ray task has to wait for a free CPU.
    """
    sizes = [int(cpus) for cpus in node_cpus if cpus >= 1]
    if not sizes:
        raise ConfigError("score: Ray has no node with a CPU")
    cpus_per_actor = cpus_per_actor or min(MAX_CPUS_PER_ACTOR, *sizes)
    fitting = sum(cpus // cpus_per_actor for cpus in sizes)
    if not fitting:
        raise ConfigError(f"score: cpus_per_actor={cpus_per_actor}: the largest node has {max(sizes)} CPUs; lower it")
    return max(1, min(fitting, n_tasks)), cpus_per_actor


class PoolActor:
    """Base class of actors. A task that fails returns its exception; if `open` fails, all tasks return that exception.

    Subclasses implement `open`, which gets the arguments of the constructor, and `run`, which executes a task.
    """

    command = "score"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._created_at = time.time()
        self._error: RayCxrError | None = None
        try:
            self.open(*arguments, **options)
        except Exception as error:
            self._error = sanitize_error(error, self.command)
        self._ready_at = time.time()

    def open(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError

    def run(self, row: dict[str, Any]) -> TaskResult:
        raise NotImplementedError

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._error is not None:
                raise self._error
            result = replace(self.run(row), created_at=self._created_at, ready_at=self._ready_at)
        except Exception as error:
            result = TaskResult(error=sanitize_error(error, self.command))
        return result.to_row()


def build_dataset(
    rows: list[Task],
    actor: type[PoolActor],
    arguments: dict[str, Any],
    plan: ActorPlan,
    decode: Callable[..., Any] | None = None,
) -> Any:
    """Return a Ray dataset that sends tasks, as rows, through a pool of actors.

    Args:
        arguments: the arguments of the actor's `open`, without `cpus`.
        decode: if given, Ray tasks of one CPU each call it on every row before the actors. Ray Data runs as many of
            these tasks as the model needs.
    """
    import ray

    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    if decode is not None:
        options = {"fn_kwargs": {"job": arguments["job"]}, "num_cpus": 1, **cluster.placement.options}
        dataset = map_once(dataset, decode, flat=True, **options)
    mapped = ray_api.map_rows(
        dataset.map,
        actor,
        # By default Ray Data restarts an actor without limit, and repeats a lost task only on that same actor. Such a
        # task could wait forever, because the actor's node may never come back. So a lost task is not repeated here;
        # `run_with_retries` submits it again, and any actor can take it.
        {"max_restarts": MAX_RESTARTS, "max_task_retries": 0},
        fn_constructor_kwargs={**arguments, "cpus": max(1, plan.cpus)},
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            initial_size=plan.actors,
            max_size=max(plan.actors, len(rows)),  # when nodes join
            max_tasks_in_flight_per_actor=plan.in_flight,
            max_concurrent_calls_per_actor=plan.in_flight,
            enable_true_multi_threading=True,
        ),
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
        **cluster.placement.options,
    )
    # Ray Data skips up to this many lost tasks; one more ends the dataset. `run_with_retries` retries them either way.
    mapped.context.max_errored_blocks = MAX_LOST_PER_WORKER * plan.actors
    # The pool grows when its actors are busy and a node has joined. It never shrinks.
    scaling = mapped.context.autoscaling_config
    scaling.actor_pool_util_upscaling_threshold, scaling.actor_pool_util_downscaling_threshold = 0.9, 0.0
    return mapped


def run_tasks(
    tasks: Sequence[ScoreTask], build: Callable[[list[Task]], Any], is_done: Callable[[int], bool]
) -> Iterator[TaskResult]:
    """Yield the results of tasks, and submit ranges again that were lost with an actor.

    Args:
        build: makes a Ray dataset of `ScoreTask` rows, whose output are `TaskResult` rows.
        is_done: returns whether a range has its file. It is called for ranges that no result reported, because an actor
            can be lost after it wrote a file. Files of tasks with `retry` exist anyway, so it is not called for these.
    """

    def find_pending(rows: list[Task], done: set[int]) -> list[Task]:
        pending = []
        for task in map(ScoreTask.from_row, rows):
            lost = (range_ for range_ in task.ranges if range_.index not in done)
            if left := tuple(range_ for range_ in lost if task.retry or not is_done(range_.index)):
                pending.append(replace(task, ranges=left).to_row())
        return pending

    for row in run_with_retries([task.to_row() for task in tasks], build, find_pending):
        yield TaskResult.from_row(row)


@contextlib.contextmanager
def show_files(
    title: str,
    folder: Path,
    ranges: Sequence[Range],
    finished: set[int],
    count_errors: Callable[[pa.NativeFile | None], int | None],
    command: str = "score",
) -> Iterator[None]:
    """Show the progress of a run while the block runs: the rows of the output files that exist, and their errors.

    Rows that workers have done for files not yet written count too, see `ProgressFile`.

    Args:
        finished: numbers of the ranges whose files this run does not write.
        count_errors: returns the number of errors in a file; None if the file is incomplete.
    """
    rows, seen = {range_.index: range_.rows for range_ in ranges}, set(finished)

    def read_files(indices: set[int]) -> Iterator[tuple[int, int | None]]:
        files = remote.read_files(folder / part_name(index) for index in indices)
        return zip(indices, map(count_errors, files), strict=True)

    # With a retry, the output file already exists. It counts as finished only after this run has replaced it.
    stamps = {index: _read_stamp(folder / part_name(index)) for index in list_parts(folder) - seen}
    total = sum(count or 0 for _, count in read_files(finished))
    done = sum(rows[index] for index in finished)
    progress = Progress(title, sum(rows.values()), done=done, waiting="starting the workers, loading the model")
    #: Rows shown of ranges without an output file.
    partial: Counter[int] = Counter()
    ProgressFile.remove_all(folder)

    def update() -> bool:
        nonlocal total
        moved = False
        known, found = len(seen), (list_parts(folder) - seen) & rows.keys()
        new = {i for i in found if i not in stamps or stamps[i] != _read_stamp(folder / part_name(i))}
        for index, count in read_files(new):
            if count is not None:
                total += count
                seen.add(index)
                progress.advance(rows[index] - partial.pop(index, 0), f"{total:,} errors")
        for index, count in ProgressFile.read_all(folder).items():
            more = min(count, rows.get(index, 0)) - partial[index]
            if index not in seen and more > 0:
                partial[index] += more
                progress.advance(more, f"{total:,} errors")
                moved = True
        return moved or len(seen) > known

    with progress, poll(update, command):
        yield


def _read_stamp(path: Path) -> tuple[int, float] | None:
    """Return inode and modification time, which change when a file is replaced; None if there is no file."""
    with contextlib.suppress(OSError):
        info = path.stat()
        return info.st_ino, info.st_mtime
    return None
