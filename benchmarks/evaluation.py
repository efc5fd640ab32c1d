"""How fast the intervals of a report are beside the loop that one would write oneself, in the same process and hour.

    .venv/bin/python benchmarks/evaluation.py --out speed.json

Both take the same drawn images: as many as the official test set of ChestX-ray14 has, of as many patients, 14 findings
as rare as there, half of the scores rounded so that some are tied. Both give, for each finding, 95% intervals of AUROC,
average precision, the ROC curve at 101 false positive rates, sensitivity, specificity, PPV, NPV, F1, flag rate, PPV and
NPV at an assumed prevalence, Brier score and expected calibration error, from resampled patients.

    ours      `bootstrap_findings`, all resamples, with its default number of threads
    sklearn   a plain loop on one thread: for each resample the rows of the drawn patients, for each finding
              scikit-learn's functions on them; few resamples, and its time for all is extrapolated from their mean
    areas     what the same loop spends on roc_auc_score and average_precision_score alone, and on picking the rows

They take turns, and every round begins with the other. Before they are timed both compute a small case, where their
intervals must be the same: a rival that computes something else is none. Memory is what the process holds at most
during the first timed run of ours, less what it held before.

With --report it also times `ray-cxr report` as a command, on as many drawn rows with labels, sex, age, view and
follow-up, and 1024 x 1024 radiographs to show: everything from the start of Python to the last file.

Exit codes: 0 done, whether or not a bar is met; 1 the two disagree, or the report failed; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn import metrics as sklearn_metrics

from ray_cxr.data import manifest
from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.bootstrap import THREADS, BootstrapFindings, DerivedOutputs, bootstrap_findings
from ray_cxr.labels import FINDINGS
from ray_cxr.storage import atomic
from ray_cxr.versions import versions

#: Seconds that all intervals of the official test set may take.
BAR_S = 60.0
#: Seconds that a whole report of the same images may take.
REPORT_BAR_S = 90.0
#: Largest difference between the two that rounding explains.
SAME = 1e-9
PREVALENCE = 0.05
GRID = 101
SCALARS = tuple(metric.key for metric in metrics.METRICS)


class BenchmarkError(Exception):
    """The contestants disagree; the message says where."""


@dataclass(frozen=True)
class Images:
    """What both contestants are given: [n, F] each, and the patient of each image [n]."""

    labels: np.ndarray
    scores: np.ndarray
    flags: np.ndarray
    calibrated: np.ndarray
    patients: np.ndarray


def draw(images: int, patients: int, findings: int, seed: int = 0) -> Images:
    """Images of patients with few and with many, findings from 24% down to 0.3%, an AUROC of about 0.76."""
    rng = np.random.default_rng(seed)
    share = rng.gamma(0.7, size=patients)
    codes = np.concatenate([np.arange(patients), rng.choice(patients, images - patients, p=share / share.sum())])
    prevalence = np.geomspace(0.24, 0.003, findings)
    labels = (rng.random((images, findings)) < prevalence).astype(np.int8)
    x = labels + rng.normal(size=(patients, findings))[codes] * 0.6 + rng.normal(size=labels.shape) * 0.8
    scores = (1.0 / (1.0 + np.exp(2.0 - x))).astype(np.float32)
    scores[:, ::2] = scores[:, ::2].round(3)
    flags = (scores >= np.quantile(scores, 0.8, axis=0)).astype(np.int8)
    # As float64: scikit-learn would square the errors of float32 in float32.
    return Images(labels, scores, flags, scores.astype(np.float64), codes)


def ours(images: Images, n_resamples: int, seed: int = 0) -> BootstrapFindings:
    return bootstrap_findings(
        images.labels,
        images.scores,
        images.patients,
        DerivedOutputs(images.flags, images.calibrated, np.full(images.labels.shape[1], PREVALENCE)),
        roc_grid=GRID,
        n_resamples=n_resamples,
        seed=seed,
    )


def rival(images: Images, n_resamples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """The plain loop.

    Returns:
        Scalars float64 [n_resamples, F, quantities], sensitivities float64 [n_resamples, F, GRID], and the seconds
        that went into the two areas and the rows.
    """
    rng = np.random.default_rng(seed)
    count = int(images.patients.max()) + 1
    rows_of = [np.flatnonzero(images.patients == patient) for patient in range(count)]
    findings = images.labels.shape[1]
    scalars = np.full((n_resamples, findings, len(SCALARS)), np.nan)
    curves = np.full((n_resamples, findings, GRID), np.nan)
    spent = 0.0
    for number in range(n_resamples):
        began = time.perf_counter()
        rows = np.concatenate([rows_of[patient] for patient in rng.integers(0, count, count)])
        spent += time.perf_counter() - began
        for f in range(findings):
            y, s = images.labels[rows, f], images.scores[rows, f]
            if y.min() != y.max():
                began = time.perf_counter()
                scalars[number, f, 0] = sklearn_metrics.roc_auc_score(y, s)
                scalars[number, f, 1] = sklearn_metrics.average_precision_score(y, s)
                spent += time.perf_counter() - began
                fpr, tpr, _ = sklearn_metrics.roc_curve(y, s)
                curves[number, f] = np.interp(np.linspace(0, 1, GRID), fpr, tpr)
            scalars[number, f, 2:] = rates(y, images.flags[rows, f], images.calibrated[rows, f])
    return scalars, curves, spent


def rates(y: np.ndarray, flags: np.ndarray, p: np.ndarray) -> list[float]:
    """What is left of `SCALARS` after the areas; NaN where undefined."""
    tn, fp, fn, tp = sklearn_metrics.confusion_matrix(y, flags, labels=[0, 1]).ravel().tolist()

    def over(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    sensitivity, specificity = over(tp, tp + fn), over(tn, tn + fp)
    hits, alarms = PREVALENCE * sensitivity, (1 - PREVALENCE) * (1 - specificity)
    misses, passes = PREVALENCE * (1 - sensitivity), (1 - PREVALENCE) * specificity
    error = metrics.expected_calibration_error(y, p)
    return [
        sensitivity,
        specificity,
        over(tp, tp + fp),
        over(tn, tn + fn),
        sklearn_metrics.f1_score(y, flags, zero_division=np.nan),
        over(tp + fp, len(y)),
        over(hits, hits + alarms),
        over(passes, passes + misses),
        sklearn_metrics.brier_score_loss(y, p),
        float("nan") if error is None else error,
    ]


def check(n_resamples: int = 60) -> float:
    """The largest difference between the two on a small case.

    The curve is left out at rates that it passes straight upwards, where either end is as good.

    Raises:
        BenchmarkError: it is more than `SAME`.
    """
    images = draw(600, 150, 3, seed=1)
    mine = ours(images, n_resamples)
    scalars, _, _ = rival(images, n_resamples)
    worst = 0.0
    for f, finding in enumerate(mine.findings):
        for k, name in enumerate(SCALARS):
            column = scalars[:, f, k]
            usable = column[~np.isnan(column)]
            interval = finding[name]
            if interval.undefined != len(column) - len(usable):
                raise BenchmarkError(f"{name}: undefined in {interval.undefined}, and in {len(column) - len(usable)}")
            if interval.low is not None and interval.high is not None:
                theirs = np.percentile(usable, [2.5, 97.5])
                worst = max(worst, float(np.abs(theirs - [interval.low, interval.high]).max()))
    if worst > SAME:
        raise BenchmarkError(f"the two differ by {worst:.2g}")
    return worst


def bootstrap(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both; seconds, medians and ratios."""
    worst = check()
    images = draw(arguments.images, arguments.patients, arguments.findings)
    few, many = arguments.rival_resamples, arguments.resamples
    taken: dict[str, list[float]] = {"ours": [], "sklearn": [], "areas": []}
    cpu: list[float] = []
    memory: float | None = None

    def run_ours() -> None:
        nonlocal memory
        before, held = time.process_time(), _held_mib()
        began = time.perf_counter()
        ours(images, many)
        taken["ours"].append(time.perf_counter() - began)
        cpu.append(time.process_time() - before)
        if memory is None:
            memory = max(0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - held)

    def run_rival() -> None:
        began = time.perf_counter()
        _, _, areas = rival(images, few)
        taken["sklearn"].append((time.perf_counter() - began) / few * many)
        taken["areas"].append(areas / few * many)

    for number in range(arguments.rounds):
        for run in (run_ours, run_rival) if number % 2 == 0 else (run_rival, run_ours):
            run()
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {
        "settings": {
            name: getattr(arguments, name)
            for name in ("images", "patients", "findings", "resamples", "rival_resamples", "rounds")
        },
        "threads": THREADS,
        "largest_difference": worst,
        "seconds": taken,
        "medians": medians,
        "ours_cpu_seconds": cpu,
        "ours_extra_mib": memory,
        "ratios": {f"{name}/ours": medians[name] / medians["ours"] for name in ("sklearn", "areas")},
        "bar_s": BAR_S,
        "met": medians["ours"] <= BAR_S,
    }


def show_bootstrap(console: Console, result: dict[str, Any]) -> None:
    given = result["settings"]
    table = Table(
        title=f"{given['images']:,} images of {given['patients']:,} patients, {given['findings']} findings, "
        f"{given['resamples']:,} resamples: {given['rounds']} rounds"
    )
    table.add_column("contestant", no_wrap=True)
    for name in ("median, s", "min", "max", "by ours"):
        table.add_column(name, justify="right")
    titles = {
        "ours": f"ours, all intervals, {result['threads']} threads",
        "sklearn": f"loop with scikit-learn, all intervals, from {given['rival_resamples']} resamples",
        "areas": "of it AUROC, average precision and rows",
    }
    for name, title in titles.items():
        seconds = result["seconds"][name]
        ratio = result["ratios"].get(f"{name}/ours")
        table.add_row(
            title,
            f"{result['medians'][name]:.2f}",
            f"{min(seconds):.2f}",
            f"{max(seconds):.2f}",
            f"{ratio:.0f}x" if ratio else "",
        )
    console.print(table)
    console.print(
        f"ours: {statistics.median(result['ours_cpu_seconds']):.2f} s of processor time, "
        f"{result['ours_extra_mib']:.0f} MiB more at the peak; largest difference of the two on a small case: "
        f"{result['largest_difference']:.1g}\n"
        f"bar: {result['medians']['ours']:.2f} s <= {result['bar_s']:.0f} s: {'met' if result['met'] else 'NOT met'}"
    )


def report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds of the whole command.

    Raises:
        BenchmarkError: the command failed.
    """
    images = draw(arguments.images, arguments.patients, min(arguments.findings, len(FINDINGS)))
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder:
        home = Path(folder)
        _write_tables(images, home)
        command = [sys.executable, "-m", "ray_cxr.cli", "report", str(home / "scores.parquet")]
        command += ["--labels", str(home / "labels.parquet"), "--split", "test", "--out", str(home / "report")]
        for _ in range(arguments.rounds):
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds.append(time.perf_counter() - began)
            if done.returncode:
                raise BenchmarkError(f"report ended with {done.returncode}: {done.stderr.strip()}")
        pictures = len(list((home / "report").glob("*.png")))
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "median": median,
        "pictures": pictures,
        "bar_s": REPORT_BAR_S,
        "met": median <= REPORT_BAR_S,
    }


def _write_tables(images: Images, home: Path) -> None:
    """Scores of another system, a manifest, and a few radiographs that all rows share."""
    rng = np.random.default_rng(2)
    n, count = images.labels.shape
    shown = []
    for number in range(24):
        path = home / f"{number}.png"
        noise = rng.integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(noise).resize((1024, 1024), Image.Resampling.BICUBIC).save(path)
        shown.append(str(path))
    ids = pa.array([f"{row:08d}_000.png" for row in range(n)])
    columns: dict[str, Any] = {"image_id": ids}
    labels: dict[str, Any] = {
        "image_id": ids,
        "path": [shown[row % len(shown)] for row in range(n)],
        "patient_id": [str(code) for code in images.patients],
        "age": rng.integers(1, 95, n).astype(np.float64),
        "sex": rng.choice(["F", "M"], n),
        "view": rng.choice(["PA", "AP"], n),
        "follow_up": rng.integers(0, 4, n),
        "split": ["test"] * n,
    }
    columns["path"] = labels["path"]
    for f in range(count):
        columns[f"p_{FINDINGS[f]}"] = images.scores[:, f]
        columns[f"c_{FINDINGS[f]}"] = images.calibrated[:, f]
        columns[f"flag_{FINDINGS[f]}"] = images.flags[:, f].astype(bool)
        labels[FINDINGS[f]] = images.labels[:, f]
    pq.write_table(pa.table(columns), home / "scores.parquet")
    arrays = {
        item.name: pa.array(labels[item.name] if item.name in labels else [None] * n, item.type)
        for item in manifest.SCHEMA
    }
    info = {manifest.SPLIT_KEY: json.dumps({"kind": "official", "seed": 0}).encode()}
    pq.write_table(pa.table(arrays).replace_schema_metadata(info), home / "labels.parquet")


def show_report(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"whole report with {result['pictures']} pictures: {result['median']:.1f} s, median of "
        f"{len(result['seconds'])} ({min(result['seconds']):.1f} to {max(result['seconds']):.1f})\n"
        f"bar: {result['median']:.1f} s <= {result['bar_s']:.0f} s: {'met' if result['met'] else 'NOT met'}"
    )


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    return {"system": platform.platform(), "cpu": model, "cpus": os.cpu_count(), "load": load}


def _held_mib() -> float:
    """Memory of this process now; where the system does not say, its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    whole: dict[str, Any] = {"type": _positive, "metavar": "N"}
    parser.add_argument("--images", default=25_596, help="(25596)", **whole)
    parser.add_argument("--patients", default=2_797, help="(2797)", **whole)
    parser.add_argument("--findings", default=14, help="(14)", **whole)
    parser.add_argument(
        "--resamples", default=1_000, help="of ours, and what the loop is extrapolated to (1000)", **whole
    )
    parser.add_argument("--rival-resamples", default=3, help="that the loop computes in a round (3)", **whole)
    parser.add_argument("--rounds", default=3, help="(3)", **whole)
    parser.add_argument("--report", action="store_true", help="also time the whole report")
    parser.add_argument("--out", type=Path, metavar="F.json", help="where all numbers go")
    arguments = parser.parse_args(argv)
    if arguments.images < arguments.patients:
        parser.error(f"{arguments.images} images are too few for {arguments.patients} patients")
    return arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    result: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["benchmarks/evaluation.py", *(sys.argv[1:] if argv is None else argv)],
        "machine": machine(),
        "versions": versions(),
    }
    try:
        result["bootstrap"] = bootstrap(arguments)
        show_bootstrap(console, result["bootstrap"])
        if arguments.report:
            result["report"] = report(arguments)
            show_report(console, result["report"])
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if arguments.out:
        atomic.write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
