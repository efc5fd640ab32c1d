"""`benchmark`: images per second on this machine, with the actors of `score` and without Ray.

    one process per actor and precision: ray_cxr.scoring.actors.ScoreActor, with its decoders and its model
      decode   the reader alone
      model    the model alone, on images decoded before, with the files of scores
      both     as in a run
    rounds of about two seconds: each part in turn, then all again

A round starts and ends with idle decoders or an idle model, for about 0.1 s, so its rate is a little too low.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import platform
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr import costs
from ray_cxr.config import ScoreSettings
from ray_cxr.errors import ConfigError, RayCxrError
from ray_cxr.imaging.demographics import count_of
from ray_cxr.imaging.sandbox import DecodedImage, Failure
from ray_cxr.models import runtime
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.progress import Progress, Stage, silence_stderr
from ray_cxr.scoring import inputs
from ray_cxr.scoring.actors import ScoreActor
from ray_cxr.scoring.pipeline import BATCH_SIZE
from ray_cxr.scoring.pool import fit_actors
from ray_cxr.scoring.ranges import COLUMNS, INPUT, SCORES, RangeState, RowLocation, ScoreJob
from ray_cxr.storage import atomic, remote, run_folder
from ray_cxr.storage.paths import is_dicomweb, redact, split_member
from ray_cxr.versions import versions

DECODE, MODEL, BOTH = "decode", "model", "both"
PRECISIONS = ("fp32", "bf16", "int8")
#: Duration of a round, seconds, and the minimum number of rounds.
ROUND_S, MIN_ROUNDS = 2.0, 3
#: Maximum number of different images; a round repeats them.
DIFFERENT = 64
#: Patients whose phantoms are drawn, with about 2.5 images each.
_PATIENTS, _PHANTOM_SIZE = 12, 1024
#: A part that takes at least this share of the work limits the rate.
_LIMITING = 0.6
FORMAT = 1
#: What limits the rate, and what helps, by part and whether a GPU runs the model.
_REMEDIES = {
    (MODEL, False): "the model limits the rate: use {}a smaller model, a GPU or more cores",
    (DECODE, False): "decoding limits the rate: use more cores, or `prepare` once and `score --prepared`",
    (None, False): "both limit the rate: more cores help",
    (MODEL, True): "the GPU limits the rate: more cores do not help",
    (DECODE, True): "decoding limits the rate: use more cores per GPU, or `prepare` once and `score --prepared`",
    (None, True): "decoders and GPU fit each other",
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class BenchmarkRequest:
    """One call of `benchmark`.

    Attributes:
        settings: those of `score`; `precision` auto measures all that bundle and machine support.
        cpus: number of CPUs to use.
        images: folder or URI of images; None: phantoms.
        seconds: about how long to measure, without the start.
    """

    model: str
    settings: ScoreSettings
    cpus: int
    images: str | None = None
    use_gpu: bool = False
    seconds: float = 40.0

    def __post_init__(self) -> None:
        if self.images is not None and is_dicomweb(self.images):
            raise ConfigError(f"--images {redact(self.images)}: a PACS is not measured; pass a folder of files")
        if self.settings.decode == "apart" and not self.use_gpu:
            raise ConfigError("decode=apart: is not measured on CPUs; remove it")
        self.settings.check_device(use_gpu=self.use_gpu)


class Round(NamedTuple):
    """What a process did in a round; memory in bytes, with its decoders, and of the GPU."""

    images: int
    cpu_s: float
    memory: int
    gpu_memory: int


@dataclass
class Measurement:
    """A part in one precision: images per second of each round, CPU seconds per image, and memory in bytes.

    `precision` is None for decoding. Memory is the largest of all rounds. `last_rate` is that of the last round, also
    of the first one, which does not count; 0 before that.
    """

    part: str
    precision: str | None
    images: int = 0
    cpu_s: float = 0.0
    rates: list[float] = field(default_factory=list)
    last_rate: float = 0.0
    memory: int = 0
    gpu_memory: int = 0

    def predict_hours(self, count: int) -> float | None:
        """Return the hours of `score` for a number of images; None for a part of its work."""
        return count / self.rate / 3600 if self.part == BOTH else None

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def range(self) -> tuple[float, float]:
        return min(self.rates), max(self.rates)

    @property
    def cpu_ms(self) -> float:
        return 1000 * self.cpu_s / max(1, self.images)

    def add(self, rounds: list[Round], seconds: float, *, is_first: bool) -> None:
        images = sum(done.images for done in rounds)
        self.last_rate = images / seconds
        if is_first:
            return
        self.rates.append(self.last_rate)
        self.images += images
        self.cpu_s += sum(done.cpu_s for done in rounds)
        self.memory = max(self.memory, sum(done.memory for done in rounds))
        self.gpu_memory = max(self.gpu_memory, sum(done.gpu_memory for done in rounds))

    def to_record(self, count: int) -> dict[str, Any]:
        lowest, highest = self.range
        spread = {"median": self.rate, "lowest": lowest, "highest": highest, "rounds": self.rates}
        return {
            "part": self.part,
            "precision": self.precision,
            "images": self.images,
            "images_per_second": spread,
            "cpu_ms_per_image": self.cpu_ms,
            "hours": self.predict_hours(count),
            "memory_bytes": self.memory,
            "gpu_memory_bytes": self.gpu_memory or None,
        }


@dataclass(frozen=True)
class ImageSource:
    """The images that were measured: where they are, how many, mean size of a file, and failures by error code."""

    origin: str
    images: int
    mean_bytes: int | None
    failures: dict[str, int]


@dataclass(frozen=True)
class Benchmark:
    """The result of `run_benchmark`.

    Attributes:
        load: load average of the last minute before the start.
        cpus: number of CPUs that were used.
        refused: reason by precision that was not measured.
        lower: how to score in each lower precision than fp32 that this bundle allows here, measured or not.
        actors, cpus_per_actor, batch_size: as `score` chooses them.
    """

    device: dict[str, Any]
    model: dict[str, Any]
    source: ImageSource
    load: float
    cpus: int
    use_gpu: bool
    actors: int
    cpus_per_actor: int
    batch_size: int
    refused: dict[str, str]
    lower: dict[str, str]
    measurements: list[Measurement]
    versions: dict[str, str]

    def find(self, part: str, precision: str | None = None) -> Measurement:
        return next(found for found in self.measurements if (found.part, found.precision) == (part, precision))

    @property
    def fastest(self) -> str | None:
        """The precision in which images are decoded and scored fastest; None if the choice makes no clear difference.

        That is so where decoding limits the rate, and where the rounds of two precisions overlap.
        """
        runs = [found for found in self.measurements if found.part == BOTH]
        first, *others = sorted(runs, key=lambda found: found.rate, reverse=True)
        is_clear = all(found.range[1] < first.range[0] for found in others)
        return first.precision if is_clear and self.find_limit(str(first.precision)) != DECODE else None

    def compute_share(self, precision: str) -> float:
        """Return the model's share of the CPU time per image, or on a GPU, of the seconds per image of both parts."""
        decode, model = self.find(DECODE), self.find(MODEL, precision)
        if self.use_gpu:
            return decode.rate / (decode.rate + model.rate)
        # CPU times have steps of 10 ms: in very short rounds both can be 0.
        return model.cpu_ms / max(1e-9, decode.cpu_ms + model.cpu_ms)

    def describe_load(self) -> str | None:
        """Return a warning if other programs used the machine before the start; None if it was idle enough."""
        if self.load <= (cores := self.device["cores"]):
            return None
        return (
            f"the load average before the start was {self.load:.1f} on {cores} cores: other programs run, and the "
            "rates are too low; repeat on an idle machine"
        )

    def list_conditions(self) -> list[str]:
        """Return sentences on the machine, the model, the images, and how they were measured."""
        device, source = self.device, self.source
        gpu = f", {device['gpus']} x {device['gpu']}" if device["gpu"] else ""
        size = "" if source.mean_bytes is None else f", {costs.format_size(source.mean_bytes)} each"
        unread = ", ".join(f"{code} {n}" for code, n in source.failures.items())
        used = f"{count_of(self.actors, 'actor')}, {count_of(self.cpus_per_actor, 'decoder')} per actor"
        used += f", on {count_of(self.cpus, 'CPU')}{' and one GPU' if self.use_gpu else ''}"
        names = ("ray-cxr", "python", "tensorflow" if self.use_gpu else "openvino")
        return [
            f"machine: {device['cpu']}, {count_of(device['cores'], 'core')}, "
            f"{costs.format_size(device['memory_bytes'])} of memory{gpu}, {device['system']}",
            f"versions: {', '.join(f'{name} {self.versions[name]}' for name in names)}",
            f"model: {self.model['backbone']} at {self.model['size']} pixels",
            f"images: {source.images} from {source.origin}{size}" + (f"; not read: {unread}" if unread else ""),
            f"measured: {used}, batches of {self.batch_size}, {len(self.measurements[0].rates)} rounds per part",
            *(f"{precision}: not measured: {reason}" for precision, reason in self.refused.items()),
        ]

    def list_findings(self) -> list[str]:
        """Return sentences on what limits each precision, and on what a run of `score` adds."""
        lines = []
        for both in (found for found in self.measurements if found.part == BOTH and found.precision):
            decode, model = self.find(DECODE), self.find(MODEL, both.precision)
            if self.use_gpu:
                work = f"the decoders reach {decode.rate:,.0f} images/s, the GPU {model.rate:,.0f}"
            else:
                work = f"decoding takes {decode.cpu_ms:.1f} ms of a core per image, the model {model.cpu_ms:.1f}"
            limit = self.find_limit(str(both.precision))
            lower = PRECISIONS[PRECISIONS.index(str(both.precision)) + 1 :]
            remedy = _REMEDIES[limit, self.use_gpu].format(
                "".join(f"{self.lower[p]}, " for p in lower if p in self.lower)
            )
            lines.append(f"{both.precision}: {work}; {remedy}")
        lines.append(
            f"score adds the start of Ray, about {costs.RAY_S:.0f} s per run; on a cluster, divide the time by the "
            "number of such machines (docs/speed.md)"
        )
        return lines

    def find_limit(self, precision: str) -> str | None:
        """Return the part that limits the rate; None if neither does."""
        share = self.compute_share(precision)
        return MODEL if share >= _LIMITING else DECODE if share <= 1 - _LIMITING else None

    def to_record(self, count: int) -> dict[str, Any]:
        """Return everything as JSON values; `count` is the number of images to predict hours for."""
        plain = {name: value for name, value in vars(self).items() if name not in ("source", "measurements")}
        precisions = [found.precision for found in self.measurements if found.part == BOTH and found.precision]
        return {
            "format": FORMAT,
            **plain,
            "images": asdict(self.source),
            "count": count,
            "limits": {precision: self.find_limit(precision) for precision in precisions},
            "measurements": [found.to_record(count) for found in self.measurements],
        }


def run_benchmark(request: BenchmarkRequest) -> Benchmark:
    """Measure the parts of `score` on this machine; write only to a temporary folder.

    Raises:
        ConfigError: the bundle or this machine does not support the precision, or no image can be read.
        BundleError: not a bundle, or a damaged one.
    """
    load = os.getloadavg()[0]
    with Stage("checking the model"):
        bundle = load_bundle(request.model)
        precisions, refused = _list_precisions(bundle, request)
    actors, cpus = 1, request.cpus
    if request.use_gpu:
        with silence_stderr():  # TensorFlow prints
            runtime.require_gpu()
    else:
        actors, cpus = fit_actors([request.cpus], request.settings.cpus_per_actor, request.cpus)
    with tempfile.TemporaryDirectory(prefix="ray_cxr-benchmark-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        with Stage("listing the images" if request.images else "drawing phantoms"):
            origin, rows = _list_images(request.images, folder)
        pools = {}
        for precision in precisions:
            jobs = [_make_job(bundle, request, precision, folder / f"{precision}-{i}", rows) for i in range(actors)]
            pools[precision] = stack.enter_context(_Pool(jobs, cpus))
        with Stage("starting the workers, loading the model"):
            waits = [pool.submit(_open) for pool in pools.values()]
            opened, *_ = itertools.chain.from_iterable([wait() for wait in waits])
        if not opened.readable:
            codes = ", ".join(f"{code} {n}" for code, n in opened.failures.items())
            raise ConfigError(f"--images {origin}: none of {len(rows)} images could be read ({codes})")
        parts = [(pools[precisions[0]], Measurement(DECODE, None))]
        for precision, pool in pools.items():
            parts += [(pool, Measurement(part, precision)) for part in (MODEL, BOTH)]
        _measure_parts(parts, request.seconds)
        size = _mean_size(rows["path"].to_pylist())
    return Benchmark(
        device=_describe_device(opened.gpu),
        model={
            "path": request.model,
            "digest": bundle.digest,
            "backbone": bundle.architecture.backbone,
            "size": bundle.input_spec.size,
        },
        source=ImageSource(origin, opened.readable, size, opened.failures),
        load=load,
        cpus=request.cpus,
        use_gpu=request.use_gpu,
        actors=actors,
        cpus_per_actor=cpus,
        batch_size=_choose_batch(request),
        refused=refused,
        lower={} if request.use_gpu else _list_lower(bundle),
        measurements=[measured for _, measured in parts],
        versions={**versions(), "openvino": metadata.version("openvino")},
    )


def _list_precisions(bundle: Bundle, request: BenchmarkRequest) -> tuple[list[str], dict[str, str]]:
    """Return the precisions to measure, and the reasons why others are not; raise for one that was requested."""
    wanted, reasons = request.settings.precision, {}
    if wanted != "auto":
        return [runtime.choose_precision(bundle.info, wanted, gpu=request.use_gpu)], {}
    found = []
    for precision in PRECISIONS:
        try:
            found.append(runtime.choose_precision(bundle.info, precision, gpu=request.use_gpu))
        except ConfigError as error:
            reasons[precision] = str(error).removeprefix(f"--precision {precision}: ")
    return found, reasons


def _list_lower(bundle: Bundle) -> dict[str, str]:
    """Return how to score in each lower precision than fp32 on this CPU, if the bundle allows it."""
    found = {}
    for precision in PRECISIONS[1:]:
        with contextlib.suppress(ConfigError):
            found[precision] = f"--precision {runtime.choose_precision(bundle.info, precision, gpu=False)}"
    runtimes = bundle.info.get("runtimes", {})
    if runtimes and "int8" not in runtimes and not bundle.input_spec.tiles:  # as `quantize` requires
        found["int8"] = "int8 (add it with `ray-cxr quantize`)"
    return found


def _choose_batch(request: BenchmarkRequest) -> int:
    return request.settings.batch_size or BATCH_SIZE[request.use_gpu]


def _list_images(location: str | None, folder: Path) -> tuple[str, pa.Table]:
    """Return the origin and the rows of at most `DIFFERENT` images from all parts of a folder, or of phantoms."""
    origin = redact(location or "")
    if location is None:
        from ray_cxr.imaging.phantoms import write_phantoms

        side = _PHANTOM_SIZE
        location = str(write_phantoms(folder / "phantoms", patients=_PATIENTS, size=side, broken=False).images)
        origin = f"phantoms of {side} x {side} pixels, drawn for this measurement"
    table = inputs.list_folder(location).read_table()
    table = table.filter(pa.array(split_member(path) is None for path in table["path"].to_pylist()))
    if not len(table):
        raise ConfigError(f"--images {origin}: holds only archives; unpack some of their images into a folder")
    chosen = np.unique(np.linspace(0, len(table) - 1, DIFFERENT).astype(int))
    return origin, table.select(COLUMNS).take(pa.array(chosen))


def _make_job(bundle: Bundle, request: BenchmarkRequest, precision: str, out: Path, rows: pa.Table) -> ScoreJob:
    """Create the folder of an actor, with the rows of the images, and return its settings."""
    run_folder.create_run(out, {"kind": "benchmark"})
    (out / SCORES).mkdir()
    atomic.write_parquet(rows, out / INPUT)
    return ScoreJob(
        bundle=remote.to_address(remote.to_path(request.model)),
        out=str(out),
        digest=bundle.digest,
        precision=precision,
        settings=request.settings,
        spec=bundle.input_spec,
        use_gpu=request.use_gpu,
        batch_size=_choose_batch(request),
        key=None,
        run_digest=run_folder.digest_settings(out),
    )


def _measure_parts(parts: Sequence[tuple[_Pool, Measurement]], seconds: float) -> None:
    """Measure each part in turn, several times; a first round of each part only determines the images per round."""
    rounds = max(MIN_ROUNDS, int(seconds / len(parts) / ROUND_S))
    round_s = seconds / len(parts) / rounds
    with Progress("benchmark", len(parts) * (rounds + 1), unit="rounds") as progress:
        for number in range(rounds + 1):
            for pool, measured in parts:
                images = max(pool.minimum, round(measured.last_rate * round_s / len(pool)))
                started = time.monotonic()
                done = pool.submit(_run_round, measured.part, images)()
                measured.add(done, time.monotonic() - started, is_first=not number)
                progress.advance(1)


def _mean_size(paths: Sequence[str]) -> int | None:
    """Return the mean size of files, bytes; None if they are in a bucket."""
    sizes = [os.path.getsize(path) for path in paths if not remote.is_address(path) and os.path.exists(path)]
    return round(statistics.mean(sizes)) if sizes else None


def _describe_device(gpu: runtime.GpuInfo | None) -> dict[str, Any]:
    core = runtime.import_openvino().Core()
    return {
        "cpu": str(core.get_property("CPU", "FULL_DEVICE_NAME")),
        "cores": costs.count_cpus(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": gpu and gpu.name,
        "gpus": gpu.gpus if gpu else 0,
        "system": f"{platform.system()} {platform.machine()}",
    }


class _Pool:
    """One process per job; the processes stay open until the block ends."""

    def __init__(self, jobs: Sequence[ScoreJob], cpus: int) -> None:
        self._jobs, self._cpus = jobs, cpus
        #: Images per actor that keep all its decoders and requests busy for a moment.
        self.minimum = 2 * max(jobs[0].batch_size, cpus) * (1 if jobs[0].use_gpu else cpus)
        # Not one pool of several processes: each call must reach a certain process.
        context = multiprocessing.get_context("spawn")
        self._executors = [ProcessPoolExecutor(1, mp_context=context, initializer=_watch_parent) for _ in jobs]

    def __len__(self) -> int:
        return len(self._jobs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:  # not after their round, or after they have loaded the model
            for process in multiprocessing.active_children():
                process.terminate()
        for executor in self._executors:
            executor.shutdown(cancel_futures=True)

    def submit(self, function: Callable[..., _T], *arguments: Any) -> Callable[[], list[_T]]:
        """Call a function with each actor; return a function that waits for the results."""
        calls = zip(self._executors, self._jobs, strict=True)
        # The first call starts the process, which inherits the mask: on Ctrl-C this process ends it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [executor.submit(function, job, self._cpus, *arguments) for executor, job in calls]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

        def wait() -> list[_T]:
            try:
                return [future.result() for future in futures]
            except BrokenProcessPool:
                raise RayCxrError(
                    "benchmark: a worker process died. The usual cause is too little memory; measure one --precision "
                    "at a time, or lower --set ray.num_cpus"
                ) from None

        return wait


# ---------------------------------------------------------------- in the processes


def _watch_parent() -> None:
    """End this process when its parent has been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


class _Opened(NamedTuple):
    """Number of images that could be read, failures by error code, and the GPU."""

    readable: int
    failures: dict[str, int]
    gpu: runtime.GpuInfo | None


class _Actor(ScoreActor):
    """An actor of `score` outside of Ray, whose parts can run alone."""

    def __init__(self, job: ScoreJob, cpus: int) -> None:
        self.open(job, cpus)  # unlike in Ray, errors are raised
        rows = pq.read_table(job.folder / INPUT)
        outcomes = [outcome for _, outcome in self._reader.iter_images([RangeState(0, rows)])]
        self._images = [outcome for outcome in outcomes if isinstance(outcome, DecodedImage)]
        self._rows = rows.filter(pa.array(isinstance(outcome, DecodedImage) for outcome in outcomes))
        codes = Counter(outcome.code for outcome in outcomes if isinstance(outcome, Failure))
        self.opened = _Opened(len(self._rows), dict(codes), runtime.describe_gpu() if job.use_gpu else None)

    def run_part(self, part: str, images: int) -> None:
        """Read and score this number of images, which repeat."""
        step = self.job.settings.rows_per_file
        rows = self._rows.take(pa.array(np.arange(images) % len(self._rows)))
        states = [RangeState(i, rows.slice(start, step)) for i, start in enumerate(range(0, images, step))]
        if part == DECODE:
            for _ in self._reader.iter_images(states):
                pass
        elif part == MODEL:
            decoded = itertools.cycle(self._images)
            self.score(states, ((RowLocation(*divmod(i, step)), next(decoded)) for i in range(images)))
        else:
            self.score(states, self._reader.iter_images(states))


@functools.lru_cache(maxsize=1)
def _open_actor(job: ScoreJob, cpus: int) -> _Actor:
    with silence_stderr():  # TensorFlow prints
        return _Actor(job, cpus)


def _open(job: ScoreJob, cpus: int) -> _Opened:
    return _open_actor(job, cpus).opened


def _run_round(job: ScoreJob, cpus: int, part: str, images: int) -> Round:
    actor, before = _open_actor(job, cpus), _count_cpu_s()
    actor.run_part(part, images)
    used = _count_cpu_s() - before
    processes = [psutil.Process(), *psutil.Process().children()]
    memory = sum(_measure_memory(process) for process in processes)
    return Round(images, used, memory, runtime.describe_gpu().peak_bytes if job.use_gpu else 0)


def _count_cpu_s() -> float:
    """Return the CPU seconds of this process and its decoders."""
    times = [process.cpu_times() for process in (psutil.Process(), *psutil.Process().children())]
    return sum(spent.user + spent.system for spent in times)


def _measure_memory(process: psutil.Process) -> int:
    """Return the memory of a process, bytes; on Linux, shared pages are divided among their processes."""
    info = process.memory_full_info()
    return int(getattr(info, "pss", info.uss))
