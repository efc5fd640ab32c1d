"""`score`: a manifest or a folder in, one Parquet row per picture out, through Ray Data.

    SCORES/settings.json          what another run must agree with to continue here
    SCORES/input.parquet          the manifest or the listing, frozen at the first run, in the order of reading
    SCORES/scores/part-00000.parquet, ...   fixed names, one per range of the input, whole or absent
    SCORES/model.json, split.parquet        copied from the bundle
    SCORES/heatmaps/              where they were asked for: see `heatmaps`
    SCORES/run.json               counts, versions, digests, settings, seconds
    SCORES/_SUCCESS               last, once all rows were counted from the files themselves

What remains to be done is what has no file. A killed run loses at most the ranges in work; a repeated range
writes the same name. `engine` is what the workers do with a range.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr import cluster
from ray_cxr.config import ScoreSettings
from ray_cxr.data import manifest as manifests
from ray_cxr.data.ranges import Range, Unit, first_location, plan_units
from ray_cxr.errors import RETRYABLE_CODES, ConfigError, ErrorRateExceeded, OutputError
from ray_cxr.imaging.overlays import FOLDER
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.models.runtime import TOLERANCE, choose_precision
from ray_cxr.progress import Progress
from ray_cxr.scoring import heatmaps as drawing
from ray_cxr.scoring import source
from ray_cxr.scoring.engine import (
    INPUT,
    RUN_KEY,
    Job,
    NetworkActor,
    ScoreActor,
    Secret,
    decode_task,
    part_name,
    part_path,
    pseudonym,
    run_digest,
    run_of,
)
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.paths import make_absolute
from ray_cxr.storage.run_folder import SETTINGS, check_run, create_run
from ray_cxr.tasks import MAX_LOST_PER_WORKER, Task, poll, run_with_retries
from ray_cxr.versions import versions

logger = logging.getLogger(__name__)

KIND = "score"
#: Folder of the rows.
SCORES = "scores"
#: Images per forward pass, without and with a GPU. On a CPU a batch of 16 overflows its caches: DenseNet121 in bfloat16
#: takes 33 ms of a core for each image in one, 22 ms in a batch of 4.
BATCH_SIZE = {False: 4, True: 64}
#: An actor with more CPUs than this gains little; several actors gain more.
MAX_CPUS_PER_ACTOR = 4
#: Ranges that an actor has in work at once: while one drains, the next is being read.
RANGES_AT_ONCE = 2
#: So often an actor that died is started again.
MAX_RESTARTS = 30
#: Settings that stand under `heatmaps` in run.json.
_OF_HEATMAPS = {"heatmap_method", "heatmap_pixels"}


@dataclass
class ScoreReport:
    """What a run found and did.

    Attributes:
        rows: rows of the input.
        counts: rows by status: `ok` or an error code; of all the files, also those of earlier runs.
        scored_now: rows written by this run.
        seconds: this run's wall time.
        images_per_second: scored_now over seconds.
        start_up: where the seconds up to the first image scored went; empty where nothing was.
        notes: with a folder, what it holds besides its images, in sentences.
        heatmaps: where they were asked for.
    """

    rows: int
    counts: Counter[str] = field(default_factory=Counter)
    scored_now: int = 0
    seconds: float = 0.0
    start_up: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    heatmaps: drawing.HeatMapReport | None = None

    @property
    def errors(self) -> int:
        return self.counts.total() - self.counts["ok"]

    @property
    def images_per_second(self) -> float | None:
        return self.scored_now / self.seconds if self.scored_now and self.seconds else None


def score(
    bundle_path: str | Path,
    out: str | Path,
    settings: ScoreSettings,
    *,
    manifest: str | None = None,
    images: str | None = None,
    fresh: bool = False,
    retry_errors: bool = False,
    limit: int | None = None,
    dry_run: bool = False,
    use_gpu: bool = False,
    heatmaps: int | None = None,
    start: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    began: float | None = None,
) -> ScoreReport:
    """Score every picture of a manifest or folder; continues where an earlier run stopped.

    Args:
        bundle_path: a bundle, on storage that all nodes share.
        out: the folder for the scores, likewise.
        manifest, images: one of the two; with `images` the listing is frozen at the first run.
        fresh: remove what `out` holds of an earlier run first.
        retry_errors: read again the files whose error may have passed.
        limit: score the first so many rows only.
        dry_run: check everything and count, write nothing.
        use_gpu: one GPU per actor.
        heatmaps: draw so many of each image's highest-ranked findings, once all are scored.
        start: gives a context with Ray running; entered once all is checked, and only where there is work.
        began: when the command began, seconds since the epoch.

    Raises:
        InputError: the bundle, the manifest or the folder cannot be used, or `out` is another run's.
        ErrorRateExceeded: all rows are there, and more of them failed than `max_error_rate` allows.
    """
    started = time.monotonic()
    out = remote.path(out)
    if (manifest is None) == (images is None):
        raise ConfigError("score: name one of --manifest and --images")
    bundle = load_bundle(bundle_path)
    asked = None if heatmaps is None else drawing.asked_of(bundle, settings, heatmaps)
    precision = _precision(bundle, settings.precision, None if fresh else out, use_gpu=use_gpu)
    key = _secret(settings.pseudonym_key)
    place = None if images is None else make_absolute(images)
    rows = _source(manifest, images, place, None if fresh else out)
    n_rows = len(rows) if limit is None else min(limit, len(rows))
    if not n_rows:
        raise ConfigError(f"score: {manifest or images} holds no row to score")
    wanted = {
        "kind": KIND,
        "format": 2,
        "model_digest": bundle.digest,
        "precision": precision,
        "images": place,
        "input_digest": rows.digest,
        "rows": n_rows,
        "rows_per_file": settings.rows_per_file,
        "max_pixels": settings.max_pixels,
        # Tells keys apart and tells nothing of the key.
        "pseudonyms": None if key is None else pseudonym(key.value, "ray_cxr"),
    }
    if fresh:
        _refuse_to_remove(out)
    else:
        check_run(out, wanted, remedy="use --fresh to start over, or name another --out")
    report = ScoreReport(rows=n_rows, notes=rows.notes)
    units = plan_units(rows.paths.slice(0, n_rows), settings.rows_per_file)
    ranges = [one for unit in units for one in unit.ranges]
    there = set() if fresh else _written(out / SCORES)
    todo = _tasks(out, units, there, retry_errors=retry_errors)
    # Of what is scored already; what is scored now is drawn with it.
    to_draw: set[int] = set()
    if asked is not None:
        to_draw = {one.index for one in ranges}
        if not fresh and (out / SETTINGS).exists():
            run = run_digest((out / SETTINGS).read_bytes())
            to_draw = drawing.remaining(out, to_draw, run, asked, retry=retry_errors)
    if dry_run:
        report.counts["to score"] = sum(
            sum(_retryable([part_path(out, index) for index in task["indices"]]))
            if task["retry"]
            else sum(task["counts"])
            for task in todo
        )
        if asked is not None:
            anew = to_draw.union(*(task["indices"] for task in todo))
            report.heatmaps = drawing.HeatMapReport(asked.count)
            report.heatmaps.to_draw = sum(one.rows for one in ranges if one.index in anew)
        return report
    if not todo and not to_draw and (out / "_SUCCESS").exists():
        report.counts = _count(out, ranges, rows.ids, bundle.digest, run_digest((out / SETTINGS).read_bytes()))
        if asked is not None:
            report.heatmaps = drawing.count(out, ranges, asked)
        _judge(report, settings)
        return report

    # All that can be refused without Ray has been by now, before Ray takes its seconds to start.
    marks = {"command": time.time() if began is None else began, "checked": time.time()}
    with start() if todo or to_draw else contextlib.nullcontext():
        marks["ray"] = time.time()
        plan = _plan(settings, len(todo), use_gpu=use_gpu) if todo else None
        plan_to_draw = _plan_to_draw(settings, len(units), use_gpu=use_gpu) if asked and (todo or to_draw) else None
        if todo or to_draw:
            pictures = first_location(rows.paths)
            cluster.require_shared(out, **{"--model": bundle_path, "a picture at": pictures})
        # Only now may an earlier run go.
        if fresh:
            _remove_run(out)
        create_run(out, wanted)
        # Once more, now that it is written: another command may have begun here while Ray started.
        check_run(out, wanted, remedy="use --fresh to start over, or name another --out")
        settings_file = (out / SETTINGS).read_bytes()
        (out / "_SUCCESS").unlink(missing_ok=True)
        (out / SCORES).mkdir(exist_ok=True)
        if not (out / INPUT).exists():
            # All rows, also beyond a limit: it is the listing that is frozen.
            rows.freeze(out / INPUT, source.group_rows(len(rows), settings.rows_per_file))
            if source.of_manifest(out / INPUT).digest != rows.digest:
                (out / INPUT).unlink()
                raise OutputError(f"{manifest or images}: changed while the job began; run it again")
        # Of a million rows only the names are needed from here on.
        ids = rows.ids
        del rows
        job = Job(
            bundle=remote.address(remote.path(bundle_path)),
            out=remote.address(out),
            digest=bundle.digest,
            precision=precision,
            settings=settings,
            spec=bundle.input_spec,
            use_gpu=use_gpu,
            batch_size=settings.batch_size or BATCH_SIZE[use_gpu],
            key=key,
            settings_file=settings_file,
        )
        with cluster.log_node_changes("score") if todo or to_draw else contextlib.nullcontext():
            if plan is not None:
                _run(job, todo, ranges, there, report, plan, marks)
            report.counts = _count(out, ranges, ids, bundle.digest, job.run)
            report.seconds = time.monotonic() - started
            if asked is not None:
                report.heatmaps = _draw(job, asked, units, plan_to_draw, retry=retry_errors)
    _finish(out, bundle, _record(out, report, wanted, settings, bundle_path, manifest or images, plan, use_gpu, asked))
    _judge(report, settings)
    return report


def _precision(bundle: Bundle, wanted: str, out: Path | None, *, use_gpu: bool) -> str:
    """What `choose_precision` says; a run that goes on keeps, with `auto`, what it began with on whatever machine."""
    begun = _begun(out).get("precision") if out is not None and wanted == "auto" else None
    return choose_precision(bundle.info, begun if begun in TOLERANCE else wanted, gpu=use_gpu)


def _secret(path: str | None) -> Secret | None:
    """The key for pseudonyms.

    Raises:
        ConfigError: the file cannot be read, or holds too little to be secret.
    """
    if path is None:
        return None
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"pseudonym_key {path}: {error.strerror}; name a file that holds a secret") from None
    if len(key) < 16:
        raise ConfigError(f"pseudonym_key {path}: holds {len(key)} bytes; a secret of 16 or more cannot be guessed")
    return Secret(key)


def _written(folder: Path) -> set[int]:
    """Numbers of the output files that are there, by one look at their folder."""
    with contextlib.suppress(FileNotFoundError):
        names = [path.name for path in folder.iterdir()]
        return {int(name[5:-8]) for name in names if name.startswith("part-") and name[5:-8].isdecimal()}
    return set()


def _tasks(out: Path, units: list[Unit], there: set[int], *, retry_errors: bool) -> list[dict[str, Any]]:
    """What is to be done: per unit the ranges without a file, and where asked those with errors that may pass."""
    tasks = []
    written = sorted(there) if retry_errors else []
    errors = dict(zip(written, _retryable([part_path(out, index) for index in written]), strict=True))
    for retry in (False, True) if retry_errors else (False,):
        for unit in units:
            chosen = [one for one in unit.ranges if (one.index in there) == retry and (not retry or errors[one.index])]
            if chosen:
                tasks.append(
                    {
                        "indices": [one.index for one in chosen],
                        "starts": [one.start for one in chosen],
                        "counts": [one.rows for one in chosen],
                        "retry": retry,
                    }
                )
    return tasks


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _refuse_to_remove(out: Path) -> None:
    """Refuse --fresh on anything but a folder of this command's own.

    Raises:
        OutputError: a file, or a folder that holds something and was not begun by `score`.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: is a file; name another --out")
    try:
        kind = json.loads((out / SETTINGS).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        kind = None
    if kind != KIND and any(out.iterdir()):
        raise OutputError(
            f"{out}: --fresh: holds no earlier run of score, so nothing in it is removed; name another --out"
        )


def _remove_run(out: Path) -> None:
    """Remove an earlier run's files, and nothing that a run did not write."""
    # _SUCCESS first: a kill in the midst of this must not leave a folder that looks whole. Then the settings become
    # such as no run has: whatever still writes for the old run stops, and nothing continues here without --fresh.
    (out / "_SUCCESS").unlink(missing_ok=True)
    if (out / SETTINGS).exists():
        atomic.write_json(out / SETTINGS, {"kind": KIND, "removing": True})
    for pattern in ("part-*.parquet", ".part-*.part"):
        remote.remove((out / SCORES).glob(pattern))
    drawing.remove(out)
    for name in ("run.json", "model.json", "split.parquet", INPUT, SETTINGS):
        (out / name).unlink(missing_ok=True)


def _source(manifest: str | None, images: str | None, place: str | None, out: Path | None) -> source.Source:
    """The rows to score."""
    if manifest is not None:
        return source.of_manifest(manifest)
    assert images is not None
    if out is not None and (out / INPUT).exists() and _begun(out).get("images") == place:
        # Files may have come or gone since; the run goes on over the pictures it began with.
        return source.of_manifest(out / INPUT)
    return source.of_folder(images)


def _begun(out: Path) -> dict[str, Any]:
    """What a run in this folder was begun with; nothing where there is none, or it cannot be read."""
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _retryable(parts: list[Path]) -> Iterator[int]:
    """How many rows of each file have an error that may have passed.

    Raises:
        OutputError: a file is damaged.
    """
    for part, file in zip(parts, remote.contents(parts), strict=True):
        codes = _column_values(part, file, ["error_code"])["error_code"].to_pylist()
        yield sum(code in RETRYABLE_CODES for code in codes)


def _column_values(part: Path, file: pa.NativeFile | None, columns: list[str]) -> pa.Table:
    """Columns of a file of scores.

    Raises:
        OutputError: it is missing or damaged.
    """
    try:
        if file is None:
            raise FileNotFoundError
        # Not `read_table`, which costs two to three times as much for so small a file.
        with pq.ParquetFile(file) as opened:
            return opened.read(columns=columns, use_threads=False)
    except (OSError, pa.ArrowException):
        raise OutputError(f"{part}: is missing or damaged; remove it and run score again") from None


def actor_plan(node_cpus: list[float], cpus_per_actor: int | None, n_tasks: int) -> tuple[int, int]:
    """How many actors of how many CPUs fit the nodes: (actors, cpus), both at least 1.

    All CPUs may go to actors: nothing else of this job needs one, because the ranges to score come from the driver
    and not from read tasks. (Actors that take every CPU starve a pipeline that reads with tasks, for ever.)

    Raises:
        ConfigError: no node has a CPU, or none has as many as an actor was told to take.
    """
    sizes = [int(cpus) for cpus in node_cpus if cpus >= 1]
    if not sizes:
        raise ConfigError("score: Ray has no node with a CPU")
    if cpus_per_actor is None:
        cpus_per_actor = min(MAX_CPUS_PER_ACTOR, *sizes) if len(sizes) > 1 else min(MAX_CPUS_PER_ACTOR, sizes[0])
    fitting = sum(cpus // cpus_per_actor for cpus in sizes)
    if not fitting:
        raise ConfigError(
            f"score: cpus_per_actor={cpus_per_actor}, and the largest node has {max(sizes)} CPUs; lower it"
        )
    return max(1, min(fitting, n_tasks)), cpus_per_actor


@dataclass(frozen=True)
class ActorPlan:
    """How the work is laid out.

    Attributes:
        actors: how many hold the network.
        cpus: of each; 0 where they are on GPUs.
        apart: whether decoding is done in tasks of one CPU each, beside the actors.
    """

    actors: int
    cpus: int
    apart: bool


def _plan(settings: ScoreSettings, n_tasks: int, *, use_gpu: bool) -> ActorPlan:
    """What fits the Ray that runs.

    Raises:
        ConfigError: nothing does.
    """
    resources = [node["Resources"] for node in cluster.list_nodes()]
    nodes = [found.get("CPU", 0.0) for found in resources]
    gpus = int(sum(found.get("GPU", 0) for found in resources))
    if use_gpu:
        if settings.decode == "inside":
            raise ConfigError("decode=inside: with --gpu pictures are decoded apart; leave one of the two out")
        if not gpus:
            hint = cluster.hint_at_head("GPU")
            raise ConfigError(f"--gpu: Ray has no GPU; leave --gpu out, or connect to a cluster that has one{hint}")
        if not sum(nodes) >= 1:
            raise ConfigError("--gpu: Ray has no CPU that could decode the pictures")
        # Without a CPU of their own: whatever the actors hold, decoding always finds one, and nothing waits for ever.
        return ActorPlan(actors=gpus, cpus=0, apart=True)
    if settings.decode == "apart":
        if sum(nodes) < 2:
            raise ConfigError("decode=apart: needs 2 CPUs, one for the network and one to decode; say decode=inside")
        return ActorPlan(actors=1, cpus=1, apart=True)
    return ActorPlan(*actor_plan(nodes, settings.cpus_per_actor, n_tasks), apart=False)


def _plan_to_draw(settings: ScoreSettings, n_tasks: int, *, use_gpu: bool) -> ActorPlan:
    """The same for heat maps, where each actor decodes for itself."""
    nodes = [node["Resources"] for node in cluster.list_nodes()]
    if not use_gpu:
        return ActorPlan(*actor_plan([node.get("CPU", 0.0) for node in nodes], settings.cpus_per_actor, n_tasks), False)
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if not gpus:
        hint = cluster.hint_at_head("GPU")
        raise ConfigError(f"--gpu: Ray has no GPU; leave --gpu out, or connect to a cluster that has one{hint}")
    each = min(int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1)
    return ActorPlan(min(gpus, n_tasks), min(MAX_CPUS_PER_ACTOR, each), False)


def _run(
    job: Job,
    todo: list[dict[str, Any]],
    ranges: list[Range],
    there: set[int],
    report: ScoreReport,
    plan: ActorPlan,
    marks: Mapping[str, float],
) -> None:
    planned = time.time()
    out = job.folder
    given = {"job": job, "cpus": max(1, plan.cpus)}

    def build_dataset(tasks: list[Task]) -> Any:
        import ray

        work = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        if plan.apart:
            # Tasks, not actors: Ray starts as many as the free CPUs and the network's appetite allow.
            work = work.flat_map(decode_task, fn_kwargs={"job": job}, num_cpus=1)
            return _by_actors(work, NetworkActor, given, plan, RANGES_AT_ONCE, len(tasks))
        return _by_actors(work, ScoreActor, given, plan, RANGES_AT_ONCE, len(tasks))

    def is_written(task: Task, index: int) -> bool:
        return not task["retry"] and (run_of(remote.content(part_path(out, index))) or ("", 0))[0] == job.run

    def find_pending(tasks: list[Task], done: set[int]) -> list[Task]:
        return _remaining(tasks, done, is_written)

    retried = {index for task in todo if task["retry"] for index in task["indices"]}
    done = sum(one.rows for one in ranges if one.index in there and one.index not in retried)
    progress = Progress("score", report.rows, done=done)
    look = _progress_of(job.folder / SCORES, ranges, there - retried, progress, _errors_of, "errors")
    with progress, poll(look, "score"):
        for row in run_with_retries(todo, build_dataset, find_pending):
            report.scored_now += row["scored"]
            if row["first"] and not report.start_up:
                report.start_up = _start_up(row, planned, marks)
                took = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report.start_up.items() if name != "all")
                logger.info("first image scored after %.0f s (%s)", report.start_up["all"], took)
    # A worker that was lost can have written files and told nobody.
    new = _written(out / SCORES) - there
    report.scored_now = max(report.scored_now, sum(one.rows for one in ranges if one.index in new))


def _draw(
    job: Job, asked: drawing.Asked, units: list[Unit], plan: ActorPlan | None, *, retry: bool
) -> drawing.HeatMapReport:
    """The second pass: heat maps of what was scored."""
    began = time.monotonic()
    out, ranges = job.folder, [one for unit in units for one in unit.ranges]
    indices = {one.index for one in ranges}
    left = drawing.remaining(out, indices, job.run, asked, retry=retry)
    todo = drawing.tasks(units, left, retry=retry)
    drawn = 0
    if todo and plan is not None:
        import ray

        (out / FOLDER).mkdir(exist_ok=True)
        plan = replace(plan, actors=min(plan.actors, len(todo)))
        job = replace(job, batch_size=job.settings.batch_size or drawing.BATCH_SIZE[job.use_gpu])
        given = {"job": job, "asked": asked, "cpus": max(1, plan.cpus)}

        def build_dataset(tasks: list[Task]) -> Any:
            work = ray.data.from_items(tasks, override_num_blocks=len(tasks))
            return _by_actors(work, drawing.HeatMapActor, given, plan, 1, len(tasks))

        def is_drawn(task: Task, index: int) -> bool:
            return not task["retry"] and not drawing.remaining(out, {index}, job.run, asked, retry=False)

        rows = run_with_retries(todo, build_dataset, lambda tasks, done: _remaining(tasks, done, is_drawn))
        total, done = (sum(one.rows for one in ranges if one.index in some) for some in (indices, indices - left))
        progress = Progress("heat maps", total, done=done)
        look = _progress_of(out / FOLDER, ranges, indices - left, progress, drawing.failures_of, "failed")
        with progress, poll(look, "score --heatmaps"):
            drawn = sum(row["images"] for row in rows)
    report = drawing.count(out, ranges, asked)
    report.drawn_now, report.seconds = drawn, time.monotonic() - began
    return report


def _by_actors(work: Any, actor: type, given: dict[str, Any], plan: ActorPlan, at_once: int, most: int) -> Any:
    """A Ray dataset whose rows go through a pool of actors, each with so many rows in work at once.

    Args:
        most: actors, however many nodes join.
    """
    import ray

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args_fn", category=Warning)  # see below
        done = work.map(
            actor,
            fn_constructor_kwargs=given,
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=plan.actors,
                max_size=max(plan.actors, most),
                max_tasks_in_flight_per_actor=at_once,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=True,
            ),
            num_cpus=plan.cpus,
            num_gpus=1 if given["job"].use_gpu else 0,
            # Ray Data itself starts a dead actor again for ever, and says nothing. (The way to say it otherwise is
            # deprecated in 2.60 without another in its place; pyproject holds Ray below 2.61.)
            ray_remote_args_fn=_restarts,
        )
    # Lost tasks are skipped here and retried by `run_with_retries`. An actor that keeps dying ends the round.
    done.context.max_errored_blocks = MAX_LOST_PER_WORKER * plan.actors
    # Actors that are as busy as they can be are reason enough for more where a node has joined; idle ones stay.
    scaling = done.context.autoscaling_config
    scaling.actor_pool_util_upscaling_threshold, scaling.actor_pool_util_downscaling_threshold = 0.9, 0.0
    return done


def _restarts() -> dict[str, Any]:
    # A task is not done again by the actor that lost it: where its node is gone Ray would wait for another to join.
    return {"max_restarts": MAX_RESTARTS, "max_task_retries": 0}


def _remaining(tasks: list[Task], done: set[int], is_done: Callable[[Task, int], bool]) -> list[Task]:
    """Return the tasks without the ranges that are done, by a row's report or by their file.

    An entry of a task that is a list has one element per range.
    """
    left = []
    for task in tasks:
        keep = [index not in done and not is_done(task, index) for index in task["indices"]]
        if any(keep):
            left.append(
                {
                    name: list(itertools.compress(value, keep)) if isinstance(value, list) else value
                    for name, value in task.items()
                }
            )
    return left


def _start_up(row: dict[str, Any], planned: float, marks: Mapping[str, float]) -> dict[str, float]:
    """Where the seconds from the command to the first image scored went."""
    return {
        "all": row["first"] - marks["command"],
        "checks": marks["checked"] - marks["command"],
        "Ray": marks["ray"] - marks["checked"],
        "plan": planned - marks["ray"],
        "actor": row["born"] - planned,
        "network": row["ready"] - row["born"],
        "first pictures": row["first"] - row["ready"],
    }


def _progress_of(
    folder: Path,
    ranges: list[Range],
    seen: set[int],
    progress: Progress,
    errors_of: Callable[[pa.NativeFile | None], int | None],
    word: str,
) -> Callable[[], bool]:
    """Return a function that shows the files written since its last call, and returns whether there were any.

    Args:
        seen: ranges whose files stay as they are.
        errors_of: number of errors in a file; None where the file is incomplete.
        word: for these errors.
    """
    rows = {one.index: one.rows for one in ranges}
    seen = set(seen)
    # A range that is scored again has a file already; it counts once the file is another one.
    before = {index: _stamp(folder / part_name(index)) for index in _written(folder) - seen}
    errors = sum(errors_of(file) or 0 for file in remote.contents(folder / part_name(index) for index in seen))

    def look() -> bool:
        nonlocal errors
        known = len(seen)
        new = _written(folder) - seen
        new = {i for i in new if i in rows and (i not in before or before[i] != _stamp(folder / part_name(i)))}
        for index, file in zip(new, remote.contents(folder / part_name(index) for index in new), strict=True):
            found = errors_of(file)
            if found is not None:
                errors += found
                seen.add(index)
                progress.advance(rows[index], f"{errors:,} {word}")
        return len(seen) > known

    return look


def _errors_of(part: pa.NativeFile | None) -> int | None:
    found = run_of(part)
    return None if found is None else found[1]


def _stamp(path: Path) -> tuple[int, float] | None:
    with contextlib.suppress(OSError):
        info = path.stat()
        return info.st_ino, info.st_mtime
    return None


def _count(out: Path, ranges: list[Range], ids: pa.ChunkedArray, digest: str, run: str) -> Counter[str]:
    """Count the rows from the files, and check that they are the input's, each once, in order, by this model.

    Args:
        ids: image_id of the input's rows, in order.
        digest: the bundle's.
        run: of the settings, as every file carries it.

    Raises:
        OutputError: they are not.
    """
    counts: Counter[str] = Counter()
    parts = [part_path(out, one.index) for one in ranges]
    for one, part, file in zip(ranges, parts, remote.contents(parts), strict=True):
        found = _column_values(part, file, ["image_id", "error_code", "model_digest"])
        expected = ids.slice(one.start, one.rows)
        models = set(pc.unique(found["model_digest"]).to_pylist()) - {None}
        same = len(found) == one.rows and pc.all(pc.equal(found["image_id"], expected), skip_nulls=False).as_py()
        if not same or models - {digest} or (found.schema.metadata or {}).get(RUN_KEY, b"").decode() != run:
            raise OutputError(f"{part}: does not hold the rows it should; remove it and run score again")
        counts.update("ok" if code is None else code for code in found["error_code"].to_pylist())
    extra = {path.name for path in (out / SCORES).glob("*.parquet")} - {part_name(one.index) for one in ranges}
    if extra:
        raise OutputError(f"{out / SCORES}: holds {min(extra)}, which is not of this run; remove it")
    return counts


def _finish(out: Path, bundle: Bundle, record: dict[str, Any]) -> None:
    """Write what stands beside the rows; `_SUCCESS` last."""
    for left in (out / SCORES).glob(".part-*.part"):  # of workers that were killed while they wrote
        left.unlink(missing_ok=True)
    drawing.tidy(out)
    atomic.write_json(out / "model.json", bundle.model_json())
    atomic.write(out / "split.parquet", lambda part: _copy(bundle.path / "split.parquet", part))
    atomic.write_json(out / "run.json", record)
    atomic.write_text(out / "_SUCCESS", "")


def _record(
    out: Path,
    report: ScoreReport,
    wanted: dict[str, Any],
    settings: ScoreSettings,
    bundle_path: str | Path,
    origin: str | None,
    plan: ActorPlan | None,
    use_gpu: bool,
    asked: drawing.Asked | None,
) -> dict[str, Any]:
    """What `run.json` says."""
    before = _last_record(out)
    more = {name: value for name, value in before.items() if name == FOLDER and (out / FOLDER).is_dir()}
    if asked is not None and report.heatmaps is not None:
        more = {FOLDER: report.heatmaps.record(asked)}
        if plan is None:  # nothing was scored: what was said of that stays
            more |= {name: before[name] for name in ("actors", "cpus_per_actor", "last_run") if name in before}
    split = manifests.split_info(pq.read_schema(out / INPUT).empty_table())
    rate = report.images_per_second
    return {
        "rows": report.rows,
        "ok": report.counts["ok"],
        "errors": report.errors,
        "by_code": {code: n for code, n in sorted(report.counts.items()) if code != "ok"},
        "model": str(bundle_path),
        "model_digest": wanted["model_digest"],
        "input": origin,
        "input_digest": wanted["input_digest"],
        "split": split,
        "settings": settings.model_dump(mode="json", exclude=_OF_HEATMAPS),
        "use_gpu": use_gpu,
        "precision": wanted["precision"],
        "notes": report.notes,
        # When the last row was scored: heat maps that are drawn later change nothing of what was found.
        "finished": (before.get("finished") if plan is None else None)
        or datetime.now(UTC).isoformat(timespec="seconds"),
        "actors": plan.actors if plan else None,
        "cpus_per_actor": plan.cpus if plan else None,
        "last_run": {
            "rows_scored": report.scored_now,
            "seconds": round(report.seconds, 3),
            "images_per_second": None if rate is None else round(rate, 3),
            "start_up": {name: round(seconds, 3) for name, seconds in report.start_up.items()},
        },
        **more,
        "versions": versions(),
    }


def _last_record(out: Path) -> dict[str, Any]:
    """`run.json` of an earlier run; nothing where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((out / "run.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _judge(report: ScoreReport, settings: ScoreSettings) -> None:
    rate = report.errors / report.rows
    if rate > settings.max_error_rate:
        parts = ", ".join(f"{code} {n:,}" for code, n in report.counts.most_common() if code != "ok")
        raise ErrorRateExceeded(
            f"{report.errors:,} of {report.rows:,} images failed ({rate:.1%}, allowed {settings.max_error_rate:.1%}): "
            f"{parts}; all rows are written; see their error_code",
            report,
        )
