"""`score`: from a manifest or a folder to one Parquet row per image, through Ray Data.

    SCORES/settings.json          settings that a later run must match
    SCORES/input.parquet          the manifest or the listing, frozen at the first run, in the order of reading
    SCORES/scores/part-00000.parquet, ...   fixed names, one file per range of the input, complete or missing
    SCORES/model.json, split.parquet        copied from the bundle
    SCORES/heatmaps/              if requested: see `heatmaps`
    SCORES/features/              if requested: see `data.features`
    SCORES/run.json               counts, versions, digests, settings, seconds
    SCORES/_SUCCESS               last, once all rows were counted from the files themselves

`actors.ScoreWriter.flush` writes the rows of a range. Ranges without an output file are pending. A killed run loses at
most the ranges in progress. A repeated range writes a file of the same name.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr import cluster
from ray_cxr.data import manifest as manifests
from ray_cxr.data.features import FEATURES
from ray_cxr.errors import ErrorRateExceeded, OutputError
from ray_cxr.evaluation import usability
from ray_cxr.imaging.overlays import HEATMAPS
from ray_cxr.progress import Stage
from ray_cxr.scoring import heatmaps, inputs, ranges
from ray_cxr.scoring.actors import ModelActor, ScoreActor, decode_task
from ray_cxr.scoring.heatmaps import HeatMapActor, HeatMapReport
from ray_cxr.scoring.plan import KIND, REMEDY, ScorePlan, ScoreReport, ScoreRequest, plan_run
from ray_cxr.scoring.pool import ActorPlan, build_dataset, plan_drawing, plan_scoring, run_tasks, show_files
from ray_cxr.scoring.ranges import INPUT, SCORES, ScoreJob, TaskResult
from ray_cxr.storage import atomic, remote, run_folder
from ray_cxr.storage.pacs_workers import PacsAccess, open_access
from ray_cxr.storage.paths import is_system_file
from ray_cxr.versions import versions

logger = logging.getLogger(__name__)

#: Images per forward pass, without and with a GPU. A batch of 16 overflows the caches of a CPU: DenseNet121 in bfloat16
#: takes 33 ms of a core per image in a batch of 16, and 22 ms in a batch of 4.
BATCH_SIZE = {False: 4, True: 64}
#: Settings that run.json has in its entry `heatmaps`.
_DRAWING_SETTINGS = {"heatmap_method", "heatmap_pixels", "heatmap_images"}

StartRay = Callable[[], contextlib.AbstractContextManager[Any]]


def score(request: ScoreRequest, start_ray: StartRay = contextlib.nullcontext) -> ScoreReport:
    """Score every image of a manifest or folder; continue where an earlier run stopped.

    Args:
        start_ray: returns a context in which Ray runs. It is entered after all checks that need no Ray, and only if
            rows are pending.

    Raises:
        InputError: the bundle, the input or a setting is wrong, or `out` holds or is used by another run.
        ErrorRateExceeded: all rows are written, and more of them failed than `max_error_rate` allows.
    """
    started = time.monotonic()
    times = {"command": request.started_at or time.time()}
    with Stage("checking the model and the images"):
        plan = plan_run(request)
    for warning in usability.warn_of_model(plan.bundle.info):
        logger.warning("WARNING: %s", warning.describe())
    times["checks"] = time.time()
    report = ScoreReport(rows=plan.settings["rows"], notes=plan.rows.notes, selection=plan.rows.selection)
    if plan.is_empty:
        return report
    if not plan.has_work and not request.fresh and run_folder.is_complete(plan.out):
        report.counts = _count_rows(plan, run_folder.digest_settings(plan.out))
        if plan.drawing is not None:
            report.heatmaps = heatmaps.count_maps(plan.out, plan.ranges, plan.bundle)
    else:
        with run_folder.lock(plan.out, "score"):
            with start_ray() if plan.has_work else contextlib.nullcontext():
                times["Ray"] = time.time()
                _execute(plan, report, times, started)
            _finalise(plan, report)
    _check_error_rate(report, request.settings.max_error_rate)
    return report


def _execute(plan: ScorePlan, report: ScoreReport, times: dict[str, float], started: float) -> None:
    """Score and draw the pending ranges, then count all files.

    `times` is when the command started, then when each stage of the start-up ended, seconds since 1970. `started` is a
    result of `time.monotonic()`.
    """
    request, drawing_pool = plan.request, None
    if (note := plan.bundle.rules.ranked.note) is not None:
        logger.warning("%s", note)
    if plan.has_work:
        if plan.tasks:
            decodes = plan.prepared is None
            report.pool = plan_scoring(request.settings, len(plan.tasks), use_gpu=request.use_gpu, decodes=decodes)
        if plan.drawing:
            drawing_pool = plan_drawing(request.settings, len(plan.units), use_gpu=request.use_gpu)
        cluster.require_shared(plan.out, {"BUNDLE": request.model, "an image at": plan.first_image})
    with contextlib.ExitStack() as stack:
        access = None
        if plan.has_work:
            if plan.rows.in_pacs is not None:
                access = stack.enter_context(open_access(request.pacs, plan.rows.in_pacs))
            stack.enter_context(cluster.log_node_changes("score"))
        job = _open_folder(plan, access)
        # From here on only the ids of the input are needed.
        plan.rows.release()
        if report.pool is not None:
            _score_ranges(plan, job, report, report.pool, times)
        report.counts = _count_rows(plan, job.run_digest)
        if job.features:
            _check_features(plan, job.run_digest)
        report.seconds = time.monotonic() - started
        if plan.drawing is not None:
            report.heatmaps = _draw_maps(plan, job, drawing_pool)
        if access is not None:
            report.pacs = access.read_totals()


def _open_folder(plan: ScorePlan, access: PacsAccess | None) -> ScoreJob:
    """Prepare `out` for this run: with --fresh, remove an earlier run; then write the settings and freeze the input."""
    request, out = plan.request, plan.out
    if request.fresh:
        _remove_run(out)
    if not run_folder.has_settings(out):
        # Before the settings: a run that is killed in between starts over, and lists the images again.
        (out / INPUT).unlink(missing_ok=True)
        _freeze_input(plan)
    run_folder.create_run(out, plan.settings)
    # Another command may have started here in the meantime.
    run_folder.check_run(out, plan.settings, remedy=REMEDY)
    run = run_folder.digest_settings(out)
    run_folder.clear_complete(out)
    for folder in (SCORES, FEATURES) if plan.has_features else (SCORES,):
        (out / folder).mkdir(exist_ok=True)
    if not (out / INPUT).exists():  # started by an earlier version
        _freeze_input(plan)
    return ScoreJob(
        bundle=remote.to_address(remote.to_path(request.model)),
        out=remote.to_address(out),
        digest=plan.bundle.digest,
        precision=plan.settings["precision"],
        settings=request.settings,
        spec=plan.bundle.input_spec,
        use_gpu=request.use_gpu,
        batch_size=request.settings.batch_size or BATCH_SIZE[request.use_gpu],
        key=plan.key,
        run_digest=run,
        prepared=plan.prepared,
        features=plan.has_features,
        pacs=access,
    )


def _freeze_input(plan: ScorePlan) -> None:
    """Write the whole input, including rows beyond the limit."""
    out, rows = plan.out, plan.rows
    rows.freeze(out / INPUT, inputs.group_rows(len(rows), plan.request.settings.rows_per_file))
    if inputs.read_manifest(out / INPUT).digest != rows.digest:
        (out / INPUT).unlink()
        raise OutputError(f"{plan.request.origin}: changed while the run started; run the command again")


def _remove_run(out: Path) -> None:
    """Remove the files of an earlier run, and no other files."""
    # A kill during the removal must not leave a folder that looks complete, so _SUCCESS goes first. Then write
    # settings that match no run, so that old workers stop and only --fresh accepts the folder.
    run_folder.clear_complete(out)
    if run_folder.has_settings(out):
        run_folder.replace_settings(out, {"kind": KIND, "removing": True})
    for folder, pattern in itertools.product((SCORES, FEATURES), ("part-*.parquet", ".part-*.part")):
        remote.remove_files((out / folder).glob(pattern))
    heatmaps.remove_maps(out)
    for name in ("run.json", "model.json", "split.parquet", INPUT):
        (out / name).unlink(missing_ok=True)
    run_folder.remove_settings(out)


def _score_ranges(
    plan: ScorePlan, job: ScoreJob, report: ScoreReport, pool: ActorPlan, times: dict[str, float]
) -> None:
    times["plan"] = time.time()
    folder, written = plan.out / SCORES, plan.written
    build = functools.partial(
        build_dataset,
        actor=ModelActor if pool.decode_apart else ScoreActor,
        arguments={"job": job},
        plan=pool,
        decode=decode_task if pool.decode_apart else None,
    )
    retried = {range_.index for task in plan.tasks if task.retry for range_ in task.ranges}
    with show_files("score", folder, plan.ranges, written - retried, _count_errors):
        for result in run_tasks(plan.tasks, build, job.has_written):
            report.scored_now += result.images
            report.usage = report.usage.plus(result.usage)
            if result.first_at and not report.start_up:
                report.start_up = _split_start_up(result, times)
                logger.debug("seconds to the first scored image: %s", report.start_up)
    # A lost worker can have written files that no result reported.
    new = ranges.list_parts(folder) - written
    report.scored_now = max(report.scored_now, sum(range_.rows for range_ in plan.ranges if range_.index in new))


def _split_start_up(result: TaskResult, times: dict[str, float]) -> dict[str, float]:
    """Return the seconds of each stage between the start of the command and the first scored image."""
    ends = {**times, "actor": result.created_at, "network": result.ready_at, "first pictures": result.first_at}
    stages = {name: end - start for (_, start), (name, end) in itertools.pairwise(ends.items())}
    return {"all": result.first_at - times["command"], **stages}


def _count_errors(part: pa.NativeFile | None) -> int | None:
    metadata = ranges.read_metadata(part)
    return None if metadata is None else int(metadata.get(ranges.ERRORS_KEY, 0))


def _draw_maps(plan: ScorePlan, job: ScoreJob, pool: ActorPlan | None) -> HeatMapReport:
    """Run the tasks that draw heat maps of the scored images."""
    assert plan.drawing is not None
    started = time.monotonic()
    out, request, retry = plan.out, plan.drawing, plan.request.retry_errors
    indices = {range_.index for range_ in plan.ranges}
    find_pending = functools.partial(heatmaps.find_pending, out, run=job.run_digest, request=request)
    pending = find_pending(indices, retry=retry)
    request = heatmaps.widen_request(out, pending, job.run_digest, request)
    tasks = ranges.make_tasks(plan.units, pending, retry=retry)
    drawn = 0
    if tasks and pool is not None:
        (out / HEATMAPS).mkdir(exist_ok=True)
        before = heatmaps.list_overlays(out)
        pool = replace(pool, actors=min(pool.actors, len(tasks)))
        job = replace(job, batch_size=job.settings.batch_size or heatmaps.BATCH_SIZE[job.use_gpu])
        arguments = {"job": job, "request": request}
        build = functools.partial(build_dataset, actor=HeatMapActor, arguments=arguments, plan=pool)
        results = run_tasks(tasks, build, lambda index: not find_pending({index}, retry=False))
        done = indices - pending
        with show_files("heat maps", out / HEATMAPS, plan.ranges, done, heatmaps.count_failures, "score --heatmaps"):
            drawn = sum(result.images for result in results)
        heatmaps.remove_orphans(out, before, plan.ranges)
    report = heatmaps.count_maps(out, plan.ranges, plan.bundle)
    report.drawn_now, report.seconds = drawn, time.monotonic() - started
    return report


def _count_rows(plan: ScorePlan, run: str) -> Counter[str]:
    """Count rows by status from the files, and check that they are the rows of the input, in order, by this model."""
    with Stage("checking the scores"):
        return _count_codes(plan, run)


def _count_codes(plan: ScorePlan, run: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    folder, ids = plan.out / SCORES, plan.rows.ids
    parts = [ranges.part_path(plan.out, range_.index) for range_ in plan.ranges]
    for range_, part, file in zip(plan.ranges, parts, remote.read_files(parts), strict=True):
        table = ranges.read_part(part, file, ["image_id", "error_code", "model_digest"])
        expected = ids.slice(range_.start, range_.rows)
        models = set(pc.unique(table["model_digest"]).to_pylist()) - {None}
        same = len(table) == range_.rows and pc.all(pc.equal(table["image_id"], expected), skip_nulls=False).as_py()
        written_by = (table.schema.metadata or {}).get(ranges.RUN_KEY, b"").decode()
        if not same or models - {plan.bundle.digest} or written_by != run:
            raise OutputError(f"{part}: does not hold the rows of this run; remove it and run score again")
        counts.update("ok" if code is None else code for code in table["error_code"].to_pylist())
    found = {path.name for path in folder.glob("*.parquet") if not is_system_file(path.name)}
    if extra := found - {part.name for part in parts}:
        raise OutputError(f"{folder}: holds {min(extra)}, which does not belong to this run; remove it")
    return counts


def _check_features(plan: ScorePlan, run: str) -> None:
    """Check that every range has a file of features of this run, with as many rows."""
    parts = [ranges.part_path(plan.out, range_.index, FEATURES) for range_ in plan.ranges]
    for range_, part, file in zip(plan.ranges, parts, remote.read_files(parts), strict=True):
        table = ranges.read_part(part, file, ["image_id"])
        expected = plan.rows.ids.slice(range_.start, range_.rows)
        written_by = (table.schema.metadata or {}).get(ranges.RUN_KEY, b"").decode()
        if written_by != run or not table["image_id"].equals(expected):
            raise OutputError(f"{part}: does not hold the rows of this run; remove it and run score again")


def _finalise(plan: ScorePlan, report: ScoreReport) -> None:
    """Write the files next to the rows; `_SUCCESS` last."""
    out, bundle = plan.out, plan.bundle
    for folder in (SCORES, FEATURES):
        remote.remove_files((out / folder).glob(".part-*.part"))  # left by killed workers
    heatmaps.remove_partial_files(out)
    atomic.write_json(out / "model.json", bundle.model_json())
    atomic.write_bytes(out / "split.parquet", (bundle.path / "split.parquet").read_bytes())
    atomic.write_json(out / "run.json", _make_record(plan, report))
    run_folder.mark_complete(out)


def _make_record(plan: ScorePlan, report: ScoreReport) -> dict[str, Any]:
    """Return the contents of run.json."""
    request, pool, ranked = plan.request, report.pool, plan.bundle.rules.ranked
    before = run_folder.read_json(plan.out / "run.json")
    kept = {name: value for name, value in before.items() if name == HEATMAPS and (plan.out / HEATMAPS).is_dir()}
    if plan.drawing is not None and report.heatmaps is not None:
        kept = {HEATMAPS: report.heatmaps.to_record(plan.drawing)}
        if pool is None:  # nothing was scored now, so the entries about scoring stay
            kept |= {name: before[name] for name in ("actors", "cpus_per_actor", "last_run") if name in before}
    rate = report.images_per_second
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "rows": report.rows,
        "ok": report.counts["ok"],
        "errors": report.errors,
        "by_code": {code: n for code, n in sorted(report.counts.items()) if code != "ok"},
        "model": str(request.model),
        "model_digest": plan.settings["model_digest"],
        "input": request.origin,
        "input_digest": plan.settings["input_digest"],
        "split": manifests.split_info(pq.read_schema(plan.out / INPUT).empty_table()),
        "settings": request.settings.model_dump(mode="json", exclude=_DRAWING_SETTINGS),
        "use_gpu": request.use_gpu,
        "precision": plan.settings["precision"],
        "ranking": {
            "probabilities": "calibrated" if ranked.is_calibrated else "uncalibrated",
            "weights": ranked.list_weights(request.settings.weights),
            "left_out": list(ranked.left_out),
        },
        "notes": report.notes,
        **({} if report.selection is None else {"selection": asdict(report.selection)}),
        # When the command that scored the last row ended. Later commands that only draw heat maps do not change it.
        "finished": (before.get("finished") if pool is None else None) or now,
        # A report over several nights dates a night by it, which a later retry does not move.
        "first_finished": before.get("first_finished") or before.get("finished") or now,
        "actors": pool.actors if pool else None,
        "cpus_per_actor": pool.cpus if pool else None,
        "last_run": {
            "rows_scored": report.scored_now,
            "seconds": round(report.seconds, 3),
            "images_per_second": None if rate is None else round(rate, 3),
            "start_up": {name: round(seconds, 3) for name, seconds in report.start_up.items()},
            "waits": {name: round(share, 3) for name, share in report.usage.shares().items()},
            **({"pacs": {name: round(amount, 3) for name, amount in report.pacs.items()}} if report.pacs else {}),
        },
        **kept,
        "versions": versions(),
    }


def _check_error_rate(report: ScoreReport, allowed: float) -> None:
    rate = report.errors / report.rows
    if rate > allowed:
        codes = ", ".join(f"{code} {n:,}" for code, n in report.counts.most_common() if code != "ok")
        failed = f"{report.errors:,} of {report.rows:,} images failed ({rate:.1%}, allowed {allowed:.1%}): {codes}"
        raise ErrorRateExceeded(f"{failed}; all rows are written; see their error_code", report)
