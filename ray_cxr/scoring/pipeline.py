"""`score`: a manifest or a folder in, one Parquet row per picture out, through Ray Data.

    SCORES/settings.json          what another run must agree with to continue here
    SCORES/input.parquet          the manifest or the listing, frozen at the first run
    SCORES/scores/part-00000.parquet, ...   fixed names, one per range of the input, whole or absent
    SCORES/model.json, split.parquet        copied from the bundle
    SCORES/run.json               counts, versions, digests, settings, seconds
    SCORES/_SUCCESS               last, once all rows were counted from the files themselves

What remains to be done is what has no file. A killed run loses at most the ranges in work; a repeated range
writes the same name.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr.config import ScoreSettings
from ray_cxr.data import atomic, imaging, storage
from ray_cxr.data import manifest as manifests
from ray_cxr.data.prepared import SETTINGS, agree, begin, rows_in
from ray_cxr.errors import (
    RETRYABLE_CODES,
    ConfigError,
    ErrorRateExceeded,
    ImageError,
    OutputError,
    RayCxrError,
)
from ray_cxr.models import predictions
from ray_cxr.models.bundle import load_bundle
from ray_cxr.progress import Work
from ray_cxr.versions import versions

logger = logging.getLogger(__name__)

KIND = "score"
INPUT = "input.parquet"
#: An actor with more CPUs than this gains little; several actors gain more.
MAX_CPUS_PER_ACTOR = 4
#: Batches decoded ahead of the network, so that neither waits for the other and memory stays bounded.
BATCHES_AHEAD = 3


@dataclass
class ScoreReport:
    """What a run found and did.

    Attributes:
        rows: rows of the input.
        counts: rows by status: `ok` or an error code; of all the files, also those of earlier runs.
        scored_now: rows written by this run.
        seconds: this run's wall time.
        images_per_second: scored_now over seconds.
    """

    rows: int
    counts: Counter[str] = field(default_factory=Counter)
    scored_now: int = 0
    seconds: float = 0.0

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

    Raises:
        InputError: the bundle, the manifest or the folder cannot be used, or `out` is another run's.
        ErrorRateExceeded: all rows are there, and more of them failed than `max_error_rate` allows.
    """
    started = time.monotonic()
    out = Path(out)
    if (manifest is None) == (images is None):
        raise ConfigError("score: name one of --manifest and --images")
    bundle = load_bundle(bundle_path)
    frozen = out / INPUT
    place = None if images is None else storage.absolute(images)
    table = _input_table(manifest, images, place, None if fresh else out)
    n_rows = len(table) if limit is None else min(limit, len(table))
    if not n_rows:
        raise ConfigError(f"score: {manifest or images} holds no row to score")
    wanted = {
        "kind": KIND,
        "format": 1,
        "model_digest": bundle.digest,
        "images": place,
        "input_digest": manifests.digest(table),
        "rows": n_rows,
        "rows_per_file": settings.rows_per_file,
        "max_pixels": settings.max_pixels,
    }
    if fresh:
        _refuse_to_remove(out)
    else:
        agree(out, wanted, remedy="use --fresh to start over, or name another --out")
    table = table.slice(0, n_rows)
    report = ScoreReport(rows=n_rows)
    parts = [out / "scores" / _part_name(index) for index in range(-(-n_rows // settings.rows_per_file))]
    here = [not fresh and part.exists() for part in parts]
    todo = [{"index": i, "retry": False} for i, exists in enumerate(here) if not exists]
    if retry_errors:
        todo += [{"index": i, "retry": True} for i, exists in enumerate(here) if exists and _retryable(parts[i])]
    for task in todo:
        task["rows"] = rows_in(task["index"], n_rows, settings.rows_per_file)
    if dry_run:
        report.counts["to score"] = sum(task["rows"] for task in todo)
        return report
    if not todo and (out / "_SUCCESS").exists():
        report.counts = _count(parts, table, bundle.digest)
        _judge(report, settings)
        return report

    # Everything that can be refused has been by now: only then may an earlier run go.
    plan = _plan(settings, len(todo), use_gpu=use_gpu) if todo else None
    if fresh:
        _remove_run(out)
    begin(out, wanted)
    (out / "_SUCCESS").unlink(missing_ok=True)
    (out / "scores").mkdir(exist_ok=True)
    if not frozen.exists():
        # A row group per output file: an actor reads its own rows and nothing else. All rows, also beyond a limit:
        # it is the listing that is frozen.
        whole = _input_table(manifest, images, place, out)
        if manifests.digest(whole) != wanted["input_digest"]:
            raise OutputError(f"{manifest or images}: changed while the job began; run it again")
        atomic.write_parquet(whole, frozen, row_group_size=settings.rows_per_file)
    if plan is not None:
        _run(Path(bundle_path), bundle.digest, out, todo, settings, report, plan, use_gpu=use_gpu)

    report.counts = _count(parts, table, bundle.digest)
    report.seconds = time.monotonic() - started
    atomic.write_json(out / "model.json", bundle.model_json())
    atomic.write(out / "split.parquet", lambda part: _copy(bundle.path / "split.parquet", part))
    _write_run_json(out, report, wanted, settings, bundle_path, manifest or images, plan, use_gpu)
    atomic.write_text(out / "_SUCCESS", "")
    _judge(report, settings)
    return report


def _part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


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
    # _SUCCESS first: a kill in the midst of this must not leave a folder that looks whole. The settings last: until
    # all rows of the old model are gone, no other model may continue here.
    (out / "_SUCCESS").unlink(missing_ok=True)
    for pattern in ("part-*.parquet", ".part-*.part"):
        for part in (out / "scores").glob(pattern):
            part.unlink()
    for name in ("run.json", "model.json", "split.parquet", INPUT, SETTINGS):
        (out / name).unlink(missing_ok=True)


def _input_table(manifest: str | None, images: str | None, place: str | None, out: Path | None) -> pa.Table:
    if manifest is not None:
        return manifests.read_manifest(manifest)
    assert images is not None
    if out is not None and (out / INPUT).exists() and _began_with(out) == place:
        # Files may have come or gone since; the run goes on over the pictures it began with.
        return manifests.read_manifest(out / INPUT)
    return manifests.manifest_of_images(images)


def _began_with(out: Path) -> str | None:
    try:
        value = json.loads((out / SETTINGS).read_text(encoding="utf-8")).get("images")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


def _retryable(part: Path) -> bool:
    codes = pq.read_table(part, columns=["error_code"])["error_code"].to_pylist()
    return any(code in RETRYABLE_CODES for code in codes)


def actor_plan(node_cpus: list[float], cpus_per_actor: int | None, n_files: int) -> tuple[int, int]:
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
    return max(1, min(fitting, n_files)), cpus_per_actor


@dataclass(frozen=True)
class ActorPlan:
    """How many actors of how many CPUs."""

    actors: int
    cpus: int


def _plan(settings: ScoreSettings, n_files: int, *, use_gpu: bool) -> ActorPlan:
    """What fits the Ray that runs.

    Raises:
        ConfigError: nothing does.
    """
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    if use_gpu and not gpus:
        raise ConfigError("--gpu: Ray has no GPU; leave --gpu out, or connect to a cluster that has one")
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    actors, cpus = actor_plan(nodes, settings.cpus_per_actor, n_files)
    return ActorPlan(min(actors, gpus) if use_gpu else actors, cpus)


def _run(
    bundle_path: Path,
    digest: str,
    out: Path,
    todo: list[dict[str, Any]],
    settings: ScoreSettings,
    report: ScoreReport,
    plan: ActorPlan,
    *,
    use_gpu: bool,
) -> None:
    import ray

    done = report.rows - sum(task["rows"] for task in todo)
    work = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
        ScoreActor,
        fn_constructor_kwargs={
            "bundle_path": str(bundle_path.absolute()),
            "digest": digest,
            "out": str(out.absolute()),
            "settings": settings,
            "cpus": plan.cpus,
            "use_gpu": use_gpu,
        },
        compute=ray.data.ActorPoolStrategy(size=plan.actors),
        num_cpus=plan.cpus,
        num_gpus=1 if use_gpu else 0,
    )
    errors = 0
    with Work("score", report.rows, done=done) as progress:
        for row in work.iter_rows():
            errors += row["errors"]
            report.scored_now += row["scored"]
            progress.advance(row["rows"], f"{errors:,} errors")


class ScoreActor:
    """Decodes and scores one range after another; decoding in threads, the network in the caller's thread."""

    def __init__(
        self, bundle_path: str, digest: str, out: str, settings: ScoreSettings, cpus: int, use_gpu: bool
    ) -> None:
        import os

        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        from ray_cxr.models import runtime

        if use_gpu and not runtime.use_gpu_memory_as_needed():
            raise ConfigError("--gpu: this actor sees no GPU; is tensorflow[and-cuda] installed there?")
        runtime.limit_threads(cpus)
        cv2.setNumThreads(1)  # the decoding threads are the parallelism
        bundle = load_bundle(bundle_path)
        if bundle.digest != digest:
            raise RayCxrError(f"{bundle_path}: changed since the job began")
        self._out = Path(out)
        self._settings = settings
        self._spec, self._rules = bundle.input_spec, bundle.rules
        self._runtime = runtime.KerasRuntime(bundle.model(), settings.batch_size)
        self._pool = ThreadPoolExecutor(max(1, cpus), thread_name_prefix="decode")

    def __call__(self, task: dict[str, Any]) -> dict[str, int]:
        rows = pq.ParquetFile(self._out / INPUT).read_row_group(task["index"]).slice(0, task["rows"])
        part = self._out / "scores" / _part_name(task["index"])
        if not task["retry"]:
            result = self._score(rows)
            scored = len(rows)
        else:
            old = pq.read_table(part)
            again = np.array([code in RETRYABLE_CODES for code in old["error_code"].to_pylist()])
            new = self._score(rows.filter(pa.array(again)))
            # Each row keeps its place: take it from the old table, or from the new one behind it.
            position = np.arange(len(old))
            position[again] = len(old) + np.arange(len(new))
            result = pa.concat_tables([old, new]).take(pa.array(position))
            scored = len(new)
        atomic.write_parquet(result, part, compression="zstd")
        errors = sum(code is not None for code in result["error_code"].to_pylist())
        return {"rows": len(rows), "scored": scored, "errors": errors}

    def _score(self, rows: pa.Table) -> pa.Table:
        size = self._spec.size
        probabilities = np.zeros((len(rows), len(self._rules.findings)), dtype=np.float32)
        failures: dict[int, tuple[str, str]] = {}
        batch = np.empty((self._settings.batch_size, size, size), dtype=np.uint8)
        members: list[int] = []
        for i, outcome in enumerate(self._decoded(rows["path"].to_pylist())):
            if isinstance(outcome, ImageError):
                failures[i] = (outcome.code, outcome.message)
                continue
            batch[len(members)] = outcome
            members.append(i)
            if len(members) == len(batch):
                probabilities[members] = self._runtime.predict(batch)
                members = []
        if members:
            probabilities[members] = self._runtime.predict(batch[: len(members)])
        return predictions.assemble(rows, probabilities, failures, self._rules)

    def _decoded(self, paths: list[str | None]) -> Iterator[np.ndarray | ImageError]:
        """Pictures in order, decoded ahead by a bounded number."""
        ahead: deque[Future[np.ndarray | ImageError]] = deque()
        for path in paths:
            ahead.append(self._pool.submit(self._decode, path))
            if len(ahead) > BATCHES_AHEAD * self._settings.batch_size:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _decode(self, path: str | None) -> np.ndarray | ImageError:
        try:
            return imaging.load(path or "", self._spec, max_pixels=self._settings.max_pixels)
        except ImageError as error:
            return error


def _count(parts: list[Path], table: pa.Table, digest: str) -> Counter[str]:
    """Count the rows from the files, and check that they are the input's, each once, in order, by this model.

    Raises:
        OutputError: they are not.
    """
    counts: Counter[str] = Counter()
    position = 0
    for part in parts:
        found = pq.read_table(part, columns=["image_id", "error_code", "model_digest"])
        expected = table["image_id"].slice(position, len(found))
        models = set(found["model_digest"].to_pylist()) - {None}
        if found["image_id"].to_pylist() != expected.to_pylist() or models - {digest}:
            raise OutputError(f"{part}: does not hold the rows it should; remove it and run score again")
        position += len(found)
        counts.update("ok" if code is None else code for code in found["error_code"].to_pylist())
    if position != len(table):
        raise OutputError(f"{parts[0].parent}: holds {position:,} rows for an input of {len(table):,}; use --fresh")
    extra = {path.name for path in parts[0].parent.glob("*.parquet")} - {part.name for part in parts}
    if extra:
        raise OutputError(f"{parts[0].parent}: holds {min(extra)}, which is not of this run; remove it")
    return counts


def _write_run_json(
    out: Path,
    report: ScoreReport,
    wanted: dict[str, Any],
    settings: ScoreSettings,
    bundle_path: str | Path,
    source: str | None,
    plan: ActorPlan | None,
    use_gpu: bool,
) -> None:
    split = manifests.split_info(pq.read_table(out / INPUT, columns=["image_id"]))
    rate = report.images_per_second
    value = {
        "rows": report.rows,
        "ok": report.counts["ok"],
        "errors": report.errors,
        "by_code": {code: n for code, n in sorted(report.counts.items()) if code != "ok"},
        "model": str(bundle_path),
        "model_digest": wanted["model_digest"],
        "input": source,
        "input_digest": wanted["input_digest"],
        "split": split,
        "settings": settings.model_dump(mode="json"),
        "use_gpu": use_gpu,
        "precision": "fp32",
        "actors": plan.actors if plan else None,
        "cpus_per_actor": plan.cpus if plan else None,
        "last_run": {
            "rows_scored": report.scored_now,
            "seconds": round(report.seconds, 3),
            "images_per_second": None if rate is None or math.isinf(rate) else round(rate, 3),
        },
        "versions": versions(),
    }
    atomic.write_json(out / "run.json", value)


def _judge(report: ScoreReport, settings: ScoreSettings) -> None:
    rate = report.errors / report.rows
    if rate > settings.max_error_rate:
        parts = ", ".join(f"{code} {n:,}" for code, n in report.counts.most_common() if code != "ok")
        raise ErrorRateExceeded(
            f"{report.errors:,} of {report.rows:,} images failed ({rate:.1%}, allowed {settings.max_error_rate:.1%}): "
            f"{parts}; all rows are written; see their error_code"
        )
