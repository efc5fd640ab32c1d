"""How long a cluster needs and what it costs, computed; and the driver's side of it, run for real with a stub network.

    .venv/bin/python benchmarks/scaling.py                                    the tables of docs/scaling.md
    .venv/bin/python benchmarks/scaling.py --work DIR --rows 1000000          the command, a million rows
    .venv/bin/python benchmarks/scaling.py --work DIR --listing 100000        a folder of so many files, listed

The model is `predict`, below; every figure in it is an argument here, and what is no property of this program (prices,
the storage's speed) is the reader's to set. With --rows, `ray-cxr score` runs as a user runs it, all of it real but the
network, which is the smallest there is, and the pictures, a handful of 64 x 64 PNGs that the manifest names over and
over: then the workers take little for each row, and what the driver takes shows. Once a second the memory of all its
processes is sampled. Before it the same command with --dry-run, after it the same once more, which counts all rows and
does nothing else: their difference is what counting takes.

Linux only with --rows. What is made for it stays in DIR and is used again. Exit codes: 0 done; 1 the command failed,
or a row is missing or doubled; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import scoring  # beside this file: how processes are started, watched and ended, and what is scored
from rich.console import Console

from ray_cxr.storage import atomic
from ray_cxr.storage.files import find_images
from ray_cxr.versions import versions

SAMPLE_S = 1.0
#: Pictures that all rows point at, and their side in pixels.
PICTURES, SIDE = 8, 64
#: Side of the stub's input, pixels.
STUB_SIZE = 32
LIMIT_S = 6 * 3600.0
#: What the tables are made for: NIH's archive, a hospital's, a country's.
IMAGES = (112_120, 1_000_000, 100_000_000)
NODES = (1, 4, 16, 64)
#: Names that S3 gives for one request at most (its ListObjectsV2).
NAMES_PER_REQUEST = 1000


# ---------------------------------------------------------------- the model


@dataclass(frozen=True)
class Figures:
    """What the model computes with. The first ones were measured with this program, the last are the reader's.

    Attributes:
        rate: images per second of one core.
        start_s: from the command to the first image out of the network.
        plan_row_s: reading, checking and freezing a row of the manifest.
        count_file_s: counting one file of scores at the end.
        driver_bytes, driver_row_bytes, driver_range_bytes: memory of the driver: at rest, for each row, for each file.
        driver_range_s: processor seconds of the driver for each file, while workers score.
        rows_per_file: the setting; a range of the input is one file and one task.
        cpus_per_actor: as `score` chooses it on nodes of 4 CPUs and more.
        image_bytes: of a picture as it is stored.
        cores: of a node.
        storage: what the shared storage gives to all nodes together, bytes/s; None: as much as is asked.
        ready_s: until the machines are up and set up.
        price, head_price: of a node and of the head, an hour, in any money; None: not computed.
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
    """What a run takes.

    Attributes:
        parts: seconds of each part of it, one after the other.
        limit: what the middle part waits for: `workers`, `storage` or `driver`.
        node_hours: of the nodes that score; the head's hours are those of the whole.
        cost: in the money of the prices; None without a price.
        needed: what the workers ask of the storage, bytes/s.
        driver_bytes: the driver at its highest.
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
    """The model: a fixed start, work that is shared, and what the driver does alone before and after.

        T = ready + start + plan n + max(n / (N c r), n b / S, f d) + 2 R / (r a) + count f

    with n images on N nodes of c cores, r images/s of a core, b bytes an image, S the storage's bytes/s, files of R
    rows, f = n / R of them, d driver seconds a file, a cores an actor. The term before the last is the end, when an
    actor may have two files to finish while others have none; at most all that there is to do.
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


def saturation(images: int, figures: Figures) -> dict[str, float | None]:
    """From how many nodes on something else than their cores is the limit, and what grows with the images alone."""
    node = figures.cores * figures.rate
    return {
        "node_bytes_per_second": node * figures.image_bytes,
        "nodes_that_storage_feeds": None if figures.storage is None else figures.storage / (node * figures.image_bytes),
        "nodes_that_the_driver_feeds": figures.rows_per_file / (figures.driver_range_s * node),
        "list_requests": math.ceil(images / NAMES_PER_REQUEST),
        "driver_bytes": predict(images, 1, figures).driver_bytes,
    }


def show_model(console: Any, figures: Figures, images: Sequence[int], nodes: Sequence[int]) -> dict[str, Any]:
    """The tables of docs/scaling.md, as Markdown."""
    priced = figures.price is not None
    names = ["images", "nodes", "time", "of it alone on the driver", "node-hours", *(["cost"] if priced else [])]
    names += ["limit", "asked of the storage", "driver's memory"]
    console.print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    found = []
    for count in images:
        for n in nodes:
            one = predict(count, n, figures)
            found.append(one)
            alone = one.parts["start"] + one.parts["plan"] + one.parts["count"]
            cells = [f"{count:,}", str(n), duration(one.seconds), duration(alone), f"{one.node_hours:,.1f}"]
            cells += [f"{one.cost:,.2f}"] if one.cost is not None else []
            cells += [one.limit, f"{one.needed / 1e9:.2f} GB/s", f"{one.driver_bytes / 2**30:.1f} GiB"]
            console.print("| " + " | ".join(cells) + " |")
    console.print()
    for count in images:
        at = saturation(count, figures)
        feeds = at["nodes_that_storage_feeds"]
        parts = [
            f"a node asks for {at['node_bytes_per_second'] / 1e6:.0f} MB/s",
            f"the driver feeds {at['nodes_that_the_driver_feeds']:.0f} nodes",
            *([] if feeds is None else [f"the storage {feeds:.0f}"]),
            f"a listing in S3 is {at['list_requests']:,} requests",
            f"the driver takes {at['driver_bytes'] / 2**30:.1f} GiB",
        ]
        console.print(f"{count:,} images in files of {figures.rows_per_file}: " + "; ".join(parts))
    return {"figures": asdict(figures), "predictions": [{**asdict(one), "seconds": one.seconds} for one in found]}


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3.4 h, 2.1 days."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}" if unit == "min" else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


# ---------------------------------------------------------------- the run


def pictures(folder: Path) -> list[str]:
    """A handful of tiny radiograph-like PNGs; none is blank, which would be an error row."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    found = []
    for i in range(PICTURES):
        path = folder / f"{i}.png"
        if not path.exists():
            Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8)).save(path)
        found.append(str(path.resolve()))
    return found


class Watch(scoring.Memory):
    """What the command's processes take, sampled.

    Attributes:
        driver_peak: the command's own process, resident, at its highest, bytes.
        samples: (seconds, files written, bytes of the driver, bytes of all).
    """

    def __init__(self) -> None:
        super().__init__()
        self.driver_peak = 0
        self.samples: list[tuple[float, int, int, int]] = []
        self._cpu: dict[int, tuple[str, float]] = {}

    def look(self, running: scoring.Running, files: int) -> None:
        """One sample."""
        before, self.peak = self.peak, 0
        parts, self.parts = self.parts, {}
        self.sample(running)
        together = self.peak
        if before > together:
            self.peak, self.parts = before, parts
        driver = 0
        with contextlib.suppress(OSError, ValueError, KeyError):  # it has not begun, or has ended
            status = Path(f"/proc/{running.process.pid}/status").read_text(encoding="ascii")
            fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            driver = int(fields["VmRSS"].split()[0]) * 1024
            self.driver_peak = max(self.driver_peak, int(fields["VmHWM"].split()[0]) * 1024)
        for pid in running.all():
            with contextlib.suppress(OSError, ValueError, IndexError):
                words = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
                # Ray's workers say in their name what they do at the moment; what they are stands before it.
                name = scoring._process_name(pid).partition(").")[0]
                name = "driver" if pid == running.process.pid else name
                self._cpu[pid] = name, (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")
        self.samples.append((time.monotonic() - running.began, files, driver, together))

    def cpu_seconds(self) -> dict[str, float]:
        """Processor seconds by kind of process, as last seen; the most first."""
        found: Counter[str] = Counter()
        for name, seconds in self._cpu.values():
            found[name] += seconds  # type: ignore[assignment]
        return dict(found.most_common())


def run(rows: int, work: Path, settings: Sequence[str], say: Any) -> dict[str, Any]:
    """Score so many rows with the stub, watched.

    Raises:
        BenchmarkError: it failed, or a row is missing, doubled or an error.
    """
    (work / "logs").mkdir(parents=True, exist_ok=True)
    bundle, manifest, out = work / f"bundle-{STUB_SIZE}", work / f"manifest-{rows}.parquet", work / "scores"
    if not bundle.exists():
        say("making the stub")
        spec = {"kind": "bundle", "out": str(bundle), "backbone": "TinyCNN", "size": STUB_SIZE}
        scoring.ask(spec, work / "logs" / "bundle.log")
    few = pictures(work / "pictures")
    names = [f"{i // 10:08d}_{i % 10:03d}.png" for i in range(rows)]
    if not manifest.exists():
        say(f"making a manifest of {rows:,} rows")
        scoring.write_manifest(manifest, names, [few[i % PICTURES] for i in range(rows)])
    scoring.remove_scores(out)
    words = ["score", "--model", str(bundle), "--manifest", str(manifest), "--out", str(out), *settings]
    say("ray-cxr " + " ".join(words))
    cpus = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {"rows": rows, "cpus": cpus, "load_before": os.getloadavg(), "settings": list(settings)}
    watch = Watch()
    with scoring.Running([sys.executable, "-m", "ray_cxr.cli", *words], work / "logs" / "score.log") as running:
        told = 0
        while running.process.poll() is None:
            files = _files(out)
            watch.look(running, files)
            if files // 256 > told:
                told = files // 256
                seconds, *_, together = watch.samples[-1]
                say(f"{seconds:.0f} s: {files:,} files, all processes together {together / 2**30:.2f} GiB")
            if time.monotonic() - running.began > LIMIT_S:
                raise scoring.BenchmarkError(f"score: no end after {LIMIT_S / 3600:.0f} hours")
            time.sleep(SAMPLE_S)
        result["wall_s"] = time.monotonic() - running.began
        if running.process.returncode:
            raise scoring.BenchmarkError(f"score: ended with code {running.process.returncode}\n{running.said()}")
    found = scoring.read_scores(out, running.began_at)
    result |= {"start_up": found["stages"], "steady": scoring.steady(found["marks"]), "files": len(found["marks"])}
    result["last_file_s"] = found["marks"][-1][0]
    result["dry_run_s"] = _timed([*words, "--dry-run"], work / "logs" / "dry.log")
    result["again_s"] = _timed(words, work / "logs" / "again.log")
    result["count_s"] = result["again_s"] - result["dry_run_s"]
    result["driver_peak_bytes"], result["all_peak_bytes"] = watch.driver_peak, watch.peak
    result["at_the_peak"] = watch.parts
    result["cpu_s"] = watch.cpu_seconds()
    every = max(1, len(watch.samples) // 200)
    result["samples"] = watch.samples[::every]
    result["load_after"] = os.getloadavg()
    result["checks"] = scoring.check_scores(out, names)
    return result


def _timed(words: Sequence[str], log: Path) -> float:
    running = scoring.command(words, log)
    return time.monotonic() - running.began


def _files(out: Path) -> int:
    with contextlib.suppress(FileNotFoundError), os.scandir(out / "scores") as entries:
        return sum(entry.name.startswith("part-") for entry in entries)
    return 0


def show_run(console: Any, result: dict[str, Any]) -> None:
    rows, start = result["rows"], result["start_up"]
    console.print(
        f"{rows:,} rows in {result['wall_s']:.0f} s, {rows / result['wall_s']:.0f} rows/s; "
        f"steady {scoring._text(result['steady'])} rows/s; {result['files']:,} files"
    )
    if result["expected"]:
        console.print(
            f"by the model, with this rate and start: {result['expected']['seconds']:.0f} s, "
            f"driver {result['expected']['driver_bytes'] / 2**20:.0f} MiB"
        )
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.items() if name != "all")
    console.print(f"to the first image {start.get('all', math.nan):.1f} s: {parts}")
    console.print(
        f"--dry-run {result['dry_run_s']:.1f} s; again {result['again_s']:.1f} s; counting {result['count_s']:.1f} s"
    )
    console.print(
        f"driver at its peak {result['driver_peak_bytes'] / 2**20:.0f} MiB; "
        f"all processes together {result['all_peak_bytes'] / 2**30:.2f} GiB"
    )
    peak = ", ".join(f"{name} x {n} {size / 2**20:.0f}" for name, (size, n) in result["at_the_peak"].items())
    console.print(f"MiB at that peak: {peak}")
    cpu = ", ".join(f"{name} {1e6 * seconds / rows:.0f}" for name, seconds in result["cpu_s"].items())
    console.print(f"processor microseconds a row: {cpu}")
    console.print(f"rows: {result['checks']}")
    console.print(f"load before {result['load_before'][0]:.1f}, after {result['load_after'][0]:.1f}")


def expected(result: dict[str, Any], figures: Figures) -> dict[str, float]:
    """What the model says of a run of the stub, given its start and its steady rate."""
    here = replace(
        figures,
        rate=result["steady"] / result["cpus"],
        cores=result["cpus"],
        start_s=result["start_up"]["all"] - result["start_up"]["checks"],
    )
    one = predict(result["rows"], 1, here)
    return {"seconds": one.seconds, "driver_bytes": one.driver_bytes}


# ---------------------------------------------------------------- listing


def listing(files: int, work: Path) -> dict[str, Any]:
    """A folder of so many empty files, listed as `score --images` lists it."""
    folder = work / f"listing-{files}"
    for i in range(files):
        if i % 10_000 == 0:
            (folder / f"{i // 10_000:05d}").mkdir(parents=True, exist_ok=True)
        (folder / f"{i // 10_000:05d}" / f"{i:08d}.png").touch()
    began = time.monotonic()
    found = find_images(str(folder))
    return {"files": len(found.paths), "seconds": time.monotonic() - began}


# ---------------------------------------------------------------- the script


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    whole: dict[str, Any] = {"type": scoring._positive, "metavar": "N"}
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the stub, manifests and scores go, and stay")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--rows", help="run the command on so many rows with the stub", **whole)
    modes.add_argument("--listing", help="list a folder of so many files", **whole)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value", help="for score")
    parser.add_argument("--images", nargs="+", default=list(IMAGES), help="of the table", **whole)
    parser.add_argument("--nodes", nargs="+", default=list(NODES), help="of the table", **whole)
    for one in fields(Figures):
        kind = int if one.type == "int" else float
        name = "--" + one.name.replace("_", "-")
        default = "none" if one.default is None else f"{one.default:g}"
        parser.add_argument(
            name, type=kind, default=one.default, metavar="X", help=f"a figure of the model ({default})"
        )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the raw numbers there")
    arguments = parser.parse_args(argv)
    arguments.figures = Figures(**{one.name: getattr(arguments, one.name) for one in fields(Figures)})
    if (arguments.rows or arguments.listing) and arguments.work is None:
        parser.error("--rows and --listing want --work DIR")
    if arguments.rows and sys.platform != "linux":
        parser.error("--rows runs on Linux only: it finds processes and their memory in /proc")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    say = functools.partial(print, file=sys.stderr, flush=True)
    console = Console(highlight=False, soft_wrap=True)
    result: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["benchmarks/scaling.py", *(sys.argv[1:] if argv is None else argv)],
        "machine": scoring.machine(),
        "versions": versions(),
    }
    try:
        if arguments.rows:
            settings = [word for text in arguments.overrides for word in ("--set", text)]
            result["run"] = run(arguments.rows, arguments.work, settings, say)
            result["run"]["expected"] = expected(result["run"], arguments.figures) if result["run"]["steady"] else None
            show_run(console, result["run"])
        elif arguments.listing:
            result["listing"] = listing(arguments.listing, arguments.work)
            console.print(f"{result['listing']['files']:,} files listed in {result['listing']['seconds']:.1f} s")
        else:
            result["model"] = show_model(console, arguments.figures, arguments.images, arguments.nodes)
    except scoring.BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if arguments.out:
        atomic.write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
