"""Predict time and cost of a cluster, and measure the driver's part with a model that costs next to nothing.

    .venv/bin/python benchmarks/scaling.py                                    the tables of docs/scaling.md
    .venv/bin/python benchmarks/scaling.py --work DIR --rows 1000000          run the command on a million rows
    .venv/bin/python benchmarks/scaling.py --work DIR --listing 100000        list a folder of 100,000 files

`predict` below is the formula, and each of its figures is an argument; set those that do not depend on this program
(prices, speed of the storage) yourself. With --rows, `ray-cxr score` runs as users run it, except for the smallest
possible model and eight PNGs of 64 x 64, which the manifest names again and again. Workers then need little time per
row, which makes the driver's time visible. The memory of all its processes is sampled every second. The same command
runs before with --dry-run, and afterwards once more, when it only counts all rows: the difference is the time to count.

--rows needs Linux. All files remain in DIR and are used again. Exit codes: 0 done; 1 the command failed, or a row is
missing or doubled; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import scoring
from harness import (
    POSITIVE,
    BenchmarkError,
    MemorySampler,
    Process,
    ask_child,
    create_console,
    create_parser,
    format_number,
    log,
    read_name,
    read_status,
    run_command,
    run_script,
)

from ray_cxr.storage.files import find_images

SAMPLE_S = 1.0
#: Runs a command without the estimate of `--dry-run`.
PLAN = """
from ray_cxr.cli import main
from ray_cxr.costs import Cost
from ray_cxr.scoring import cost
cost.estimate_score = lambda *_: Cost("", {}, None, {})
raise SystemExit(main())
"""
#: Number of images that all rows share, and their side in pixels.
SHARED_IMAGES, SIDE = 8, 64
#: Side of the stub model's input, pixels.
STUB_SIZE = 32
LIMIT_S = 6 * 3600.0
#: Rows of the tables: NIH's archive, a hospital's, a country's.
IMAGES = (112_120, 1_000_000, 100_000_000)
NODES = (1, 4, 16, 64)
#: Maximum number of names in one answer of S3 (ListObjectsV2).
NAMES_PER_REQUEST = 1000


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Figures:
    """The figures of the formula. The first ones were measured with this program; set the last ones yourself.

    Attributes:
        rate: images per second of one core.
        start_s: from the command to the first prediction.
        plan_row_s: to read, check and freeze a row of the manifest.
        count_file_s: to count one file of scores at the end.
        driver_bytes, driver_row_bytes, driver_range_bytes: memory of the driver: at rest, per row, per file.
        driver_range_s: processor seconds of the driver per file, while workers score.
        rows_per_file: the setting; a range of the input is one file and one task.
        cpus_per_actor: as `score` chooses it on nodes with 4 CPUs or more.
        image_bytes: of a stored image.
        cores: of a node.
        storage: throughput of the shared storage for all nodes together, bytes/s; None: unlimited.
        ready_s: until the machines are up and set up.
        price, head_price: of a node and of the head per hour, in any currency; None: not computed.
    """

    rate: float = 25.4
    start_s: float = 14.0
    plan_row_s: float = 7e-6
    count_file_s: float = 0.0075
    driver_bytes: float = 312 * 2**20
    driver_row_bytes: float = 236.0
    driver_range_bytes: float = 11_700.0
    driver_range_s: float = 0.014
    rows_per_file: int = 256
    cpus_per_actor: int = 4
    image_bytes: float = 375_000.0
    cores: int = 16
    storage: float | None = None
    ready_s: float = 0.0
    price: float | None = None
    head_price: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Time, cost and memory of a run.

    Attributes:
        parts: seconds of each part, in order.
        limit: the bottleneck of the part `work`: `workers`, `storage` or `driver`.
        node_hours: of the nodes that score; the head works as long as the whole run.
        cost: in the currency of the prices; None without a price.
        needed: bytes/s that the workers read from the storage.
        driver_bytes: peak memory of the driver.
    """

    images: int
    nodes: int
    parts: dict[str, float]
    limit: str
    node_hours: float
    cost: float | None
    needed: float
    driver_bytes: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def predict(images: int, nodes: int, figures: Figures) -> Prediction:
    """Apply the formula: a fixed start, shared work, and what the driver does alone before and after.

        T = ready + start + plan n + max(n / (N c r), n b / S, f d) + 2 R / (r a) + count f

    with n images on N nodes of c cores, r images/s per core, b bytes per image, S the storage's bytes/s, files of R
    rows, f = n / R files, d driver seconds per file, a cores per actor. The last but one term is the end of the run,
    when one actor may have two files left while the others are idle.
    """
    speed = nodes * figures.cores * figures.rate
    files = math.ceil(images / figures.rows_per_file)
    work = {
        "workers": images / speed,
        "storage": images * figures.image_bytes / figures.storage if figures.storage else 0.0,
        "driver": files * figures.driver_range_s,
    }
    limit = max(work, key=work.__getitem__)
    actor = figures.rate * min(figures.cpus_per_actor, figures.cores)
    parts = {
        "ready": figures.ready_s,
        "start": figures.start_s,
        "plan": images * figures.plan_row_s,
        "work": work[limit],
        "last files": min(2 * figures.rows_per_file, images) / actor,
        "count": files * figures.count_file_s,
    }
    hours = sum(parts.values()) / 3600
    return Prediction(
        images=images,
        nodes=nodes,
        parts=parts,
        limit=limit,
        node_hours=nodes * hours,
        cost=None if figures.price is None else hours * (nodes * figures.price + figures.head_price),
        needed=images * figures.image_bytes / work[limit],
        driver_bytes=figures.driver_bytes + images * figures.driver_row_bytes + files * figures.driver_range_bytes,
    )


def compute_saturation(images: int, figures: Figures) -> dict[str, float | None]:
    """Return how many nodes the storage and the driver can feed, and the costs that depend on the images alone."""
    node = figures.cores * figures.rate
    return {
        "node_bytes_per_second": node * figures.image_bytes,
        "nodes_that_storage_feeds": None if figures.storage is None else figures.storage / (node * figures.image_bytes),
        "nodes_that_the_driver_feeds": figures.rows_per_file / (figures.driver_range_s * node),
        "list_requests": math.ceil(images / NAMES_PER_REQUEST),
        "driver_bytes": predict(images, 1, figures).driver_bytes,
    }


def show_model(console: Any, figures: Figures, images: Sequence[int], nodes: Sequence[int]) -> dict[str, Any]:
    """Print the tables of docs/scaling.md, as Markdown."""
    priced = figures.price is not None
    names = ["images", "nodes", "time", "driver alone", "node-hours", *(["cost"] if priced else [])]
    names += ["limit", "read from storage", "driver's memory"]
    console.print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    found = []
    for count in images:
        for n in nodes:
            one = predict(count, n, figures)
            found.append(one)
            alone = one.parts["start"] + one.parts["plan"] + one.parts["count"]
            cells = [
                f"{count:,}",
                str(n),
                format_duration(one.seconds),
                format_duration(alone),
                f"{one.node_hours:,.1f}",
            ]
            cells += [f"{one.cost:,.2f}"] if one.cost is not None else []
            cells += [one.limit, f"{one.needed / 1e9:.2f} GB/s", f"{one.driver_bytes / 2**30:.1f} GiB"]
            console.print("| " + " | ".join(cells) + " |")
    console.print()
    for count in images:
        at = compute_saturation(count, figures)
        feeds = at["nodes_that_storage_feeds"]
        parts = [
            f"a node reads {at['node_bytes_per_second'] / 1e6:.0f} MB/s",
            f"the driver feeds {at['nodes_that_the_driver_feeds']:.0f} nodes",
            *([] if feeds is None else [f"the storage {feeds:.0f}"]),
            f"a listing in S3 is {at['list_requests']:,} requests",
            f"the driver takes {at['driver_bytes'] / 2**30:.1f} GiB",
        ]
        console.print(f"{count:,} images in files of {figures.rows_per_file}: " + "; ".join(parts))
    return {"figures": asdict(figures), "predictions": [{**asdict(one), "seconds": one.seconds} for one in found]}


def format_duration(seconds: float) -> str:
    """Return seconds in the largest suitable unit: 45 s, 12 min, 3.4 h, 2.1 days."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if unit == "min" else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------- the run


def write_images(folder: Path) -> list[str]:
    """Write a few tiny images of noise; a blank one would be an error row."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(SHARED_IMAGES)]
    for path in paths:
        pixels = rng.integers(0, 256, (SIDE, SIDE), np.uint8)
        if not path.exists():
            Image.fromarray(pixels).save(path)
    return [str(path.resolve()) for path in paths]


class RunSampler(MemorySampler):
    """Sample the memory and processor time of the command's processes.

    Attributes:
        driver_peak: peak resident memory of the command's own process, bytes.
        samples: (seconds, files written, bytes of the driver, bytes of all).
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver_peak = 0
        self.samples: list[tuple[float, int, int, int]] = []
        self._cpu: dict[int, tuple[str, float]] = {}

    def sample_run(self, process: Process, files: int) -> None:
        total = self.sample(process)
        driver = process.process.pid
        status = read_status(driver)
        self.driver_peak = max(self.driver_peak, status.get("VmHWM", 0))
        for pid in process.list_pids():
            with contextlib.suppress(OSError, ValueError, IndexError):
                words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
                # Ray's workers append their current task to their name.
                name = "driver" if pid == driver else read_name(pid).partition(").")[0]
                self._cpu[pid] = name, (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
        self.samples.append((time.monotonic() - process.started, files, status.get("VmRSS", 0), total))

    def sum_cpu_seconds(self) -> dict[str, float]:
        """Return processor seconds by kind of process, the largest first."""
        sums: Counter[str] = Counter()
        for name, seconds in self._cpu.values():
            sums[name] += seconds  # type: ignore[assignment]
        return dict(sums.most_common())


def measure_run(rows: int, work: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Score `rows` rows with the stub model.

    Raises:
        BenchmarkError: the command failed, or a row is missing, doubled or an error.
    """
    logs, out = work / "logs", work / "scores"
    logs.mkdir(parents=True, exist_ok=True)
    bundle, manifest = work / f"bundle-{STUB_SIZE}", work / f"manifest-{rows}.parquet"
    if not bundle.exists():
        log("making the stub model")
        spec = {"kind": "bundle", "out": str(bundle), "backbone": "TinyCNN", "size": STUB_SIZE}
        ask_child(scoring.__file__, spec, logs / "bundle.log")
    paths = write_images(work / "images")
    names = [f"{i // 10:08d}_{i % 10:03d}.png" for i in range(rows)]
    if not manifest.exists():
        log(f"making a manifest of {rows:,} rows")
        scoring.write_manifest(manifest, names, [paths[i % SHARED_IMAGES] for i in range(rows)])
    scoring.remove_scores(out)
    command = ["score", "--model", str(bundle), "--manifest", str(manifest), "--out", str(out), *settings]
    log("ray-cxr " + " ".join(command))
    cpus = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"rows": rows, "cpus": cpus, "load_before": os.getloadavg(), "settings": list(settings)}
    sampler = RunSampler()
    with Process([sys.executable, "-m", "ray_cxr.cli", *command], logs / "score.log") as process:
        logged = 0
        while process.process.poll() is None:
            files = _count_files(out)
            sampler.sample_run(process, files)
            seconds, *_, total = sampler.samples[-1]
            if files // 256 > logged:
                logged = files // 256
                log(f"{seconds:.0f} s: {files:,} files, all processes together {total / 2**30:.2f} GiB")
            if seconds > LIMIT_S:
                raise BenchmarkError(f"score: not finished after {LIMIT_S / 3600:.0f} hours")
            time.sleep(SAMPLE_S)
        result["wall_s"] = time.monotonic() - process.started
        if process.process.returncode:
            raise BenchmarkError(f"score: {process.describe_end()}")
    found = scoring.read_scores(out, process.started_at)
    result |= {"start_up": found["stages"], "steady": scoring.steady(found["marks"]), "files": len(found["marks"])}
    result["last_file_s"] = found["marks"][-1][0]
    result["dry_run_s"] = _time_command([*command, "--dry-run"], logs / "dry.log", ("-c", PLAN))
    result["again_s"] = _time_command(command, logs / "again.log")
    result["count_s"] = result["again_s"] - result["dry_run_s"]
    result["driver_peak_bytes"], result["all_peak_bytes"] = sampler.driver_peak, sampler.peak
    result["at_the_peak"], result["parts_text"] = sampler.parts, sampler.describe_parts()
    result["cpu_s"] = sampler.sum_cpu_seconds()
    result["samples"] = sampler.samples[:: max(1, len(sampler.samples) // 200)]
    result["load_after"] = os.getloadavg()
    result["checks"] = scoring.check_scores(out, names)
    return result


def _time_command(command: Sequence[str], path: Path, program: Sequence[str] = ("-m", "ray_cxr.cli")) -> float:
    process = run_command(command, path, program=program)
    return time.monotonic() - process.started


def _count_files(out: Path) -> int:
    with contextlib.suppress(FileNotFoundError), os.scandir(out / "scores") as entries:
        return sum(entry.name.startswith("part-") for entry in entries)
    return 0


def show_run(console: Any, result: dict[str, Any]) -> None:
    rows, start = result["rows"], result["start_up"]
    console.print(
        f"{rows:,} rows in {result['wall_s']:.0f} s, {rows / result['wall_s']:.0f} rows/s; "
        f"steady {format_number(result['steady'])} rows/s; {result['files']:,} files"
    )
    if result["expected"]:
        console.print(
            f"predicted with this rate and start: {result['expected']['seconds']:.0f} s, "
            f"driver {result['expected']['driver_bytes'] / 2**20:.0f} MiB"
        )
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.items() if name != "all")
    console.print(f"first prediction after {start.get('all', math.nan):.1f} s: {parts}")
    console.print(
        f"--dry-run {result['dry_run_s']:.1f} s; again {result['again_s']:.1f} s; counting {result['count_s']:.1f} s"
    )
    console.print(
        f"driver at its peak {result['driver_peak_bytes'] / 2**20:.0f} MiB; "
        f"all processes together {result['all_peak_bytes'] / 2**30:.2f} GiB"
    )
    console.print(f"MiB at that peak: {result['parts_text']}")
    cpu = ", ".join(f"{name} {1e6 * seconds / rows:.0f}" for name, seconds in result["cpu_s"].items())
    console.print(f"processor microseconds a row: {cpu}")
    console.print(f"rows: {result['checks']}")
    console.print(f"load before {result['load_before'][0]:.1f}, after {result['load_after'][0]:.1f}")


def predict_run(result: dict[str, Any], figures: Figures) -> dict[str, float]:
    """Predict a run of the stub model from its start and its steady rate."""
    here = replace(
        figures,
        rate=result["steady"] / result["cpus"],
        cores=result["cpus"],
        start_s=result["start_up"]["all"] - result["start_up"]["checks"],
    )
    one = predict(result["rows"], 1, here)
    return {"seconds": one.seconds, "driver_bytes": one.driver_bytes}


# ---------------------------------------------------------------- listing


def measure_listing(files: int, work: Path) -> dict[str, Any]:
    """List a folder of empty files as `score --images` does."""
    folder = work / f"listing-{files}"
    for i in range(files):
        if i % 10_000 == 0:
            (folder / f"{i // 10_000:05d}").mkdir(parents=True, exist_ok=True)
        (folder / f"{i // 10_000:05d}" / f"{i:08d}.png").touch()
    started = time.monotonic()
    found = find_images(str(folder))
    return {"files": len(found.paths), "seconds": time.monotonic() - started}


# ---------------------------------------------------------------- the script


def parse() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="folder for the stub model, manifests and scores; kept"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--rows", help="run the command on N rows with the stub model", **POSITIVE)
    modes.add_argument("--listing", help="list a folder of N files", **POSITIVE)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value", help="for score")
    parser.add_argument("--images", nargs="+", default=list(IMAGES), help="of the table", **POSITIVE)
    parser.add_argument("--nodes", nargs="+", default=list(NODES), help="of the table", **POSITIVE)
    for one in fields(Figures):
        kind = int if one.type == "int" else float
        name = "--" + one.name.replace("_", "-")
        default = "none" if one.default is None else f"{one.default:g}"
        parser.add_argument(
            name, type=kind, default=one.default, metavar="X", help=f"a figure of the formula ({default})"
        )
    arguments = parser.parse_args()
    arguments.figures = Figures(**{one.name: getattr(arguments, one.name) for one in fields(Figures)})
    if (arguments.rows or arguments.listing) and arguments.work is None:
        parser.error("--rows and --listing need --work DIR")
    if arguments.rows and sys.platform != "linux":
        parser.error("--rows runs on Linux only: it finds processes and their memory in /proc")
    return arguments


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    console = create_console(10_000)  # tables of Markdown must not wrap
    if arguments.rows:
        settings = [word for text in arguments.overrides for word in ("--set", text)]
        result["run"] = run = measure_run(arguments.rows, arguments.work, settings)
        run["expected"] = predict_run(run, arguments.figures) if run["steady"] else None
        show_run(console, run)
    elif arguments.listing:
        result["listing"] = measure_listing(arguments.listing, arguments.work)
        console.print(f"{result['listing']['files']:,} files listed in {result['listing']['seconds']:.1f} s")
    else:
        result["model"] = show_model(console, arguments.figures, arguments.images, arguments.nodes)


if __name__ == "__main__":
    sys.exit(run_script(parse, measure))
