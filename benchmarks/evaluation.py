"""Compare the speed of a report's intervals with a plain loop of scikit-learn, in the same process.

    .venv/bin/python benchmarks/evaluation.py --out speed.json

Both use the same simulated images: as many images and patients as the official test set of ChestX-ray14, 14 findings as
rare as there, and half of the scores rounded, so that some are tied. For each finding both compute 95% intervals of
AUROC, average precision, the ROC curve at 101 false positive rates, sensitivity, specificity, PPV, NPV, F1, flag rate,
PPV and NPV at an assumed prevalence, Brier score and expected calibration error, by resampling patients.

    ours      `bootstrap.bootstrap_findings`, all resamples, with its default number of threads
    sklearn   a plain loop on one thread: for each resample the rows of the drawn patients, and for each finding
              scikit-learn's functions on them; its time for all resamples is extrapolated from a few
    areas     the part of that loop in roc_auc_score and average_precision_score, and in selecting the rows

They alternate, and every round starts with the other one. Before the timing both compute a small case, and their
intervals must agree: a rival that computes something else does not count. Memory is the maximum during the first timed
run of ours, minus the memory before it.

With --report it also times `ray-cxr report` as a command, on as many simulated rows with labels, sex, age, view and
follow-up, and 1024 x 1024 radiographs to show: from the start of Python to the last file.

Exit codes: 0 done, whether or not a bar is met; 1 the two disagree, or the report failed; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import (
    POSITIVE,
    BenchmarkError,
    create_console,
    create_parser,
    format_bar,
    interleave,
    read_status,
    run_command,
    run_script,
)
from PIL import Image
from rich.table import Table
from sklearn import metrics as sklearn_metrics

from ray_cxr.data import manifest
from ray_cxr.evaluation import metrics
from ray_cxr.evaluation.bootstrap import ROC_GRID, THREADS, BootstrapFindings, DerivedOutputs, bootstrap_findings
from ray_cxr.labels import FINDINGS

#: Bar for all intervals of the official test set, seconds.
BAR_S = 60.0
#: Bar for the whole report of the same images, seconds.
REPORT_BAR_S = 90.0
#: Largest difference that rounding explains.
SAME = 1e-9
PREVALENCE = 0.05
#: All metrics with an interval.
SCALARS = tuple(m.key for m in metrics.METRICS if not getattr(m, "no_interval", ""))


@dataclass(frozen=True)
class Images:
    """The input of both contestants: arrays [n, F], and the patient of each image [n]."""

    labels: np.ndarray
    scores: np.ndarray
    flags: np.ndarray
    calibrated: np.ndarray
    patients: np.ndarray


def simulate(images: int, patients: int, findings: int, seed: int = 0) -> Images:
    """Simulate images of patients with few and with many, prevalences from 24% to 0.3%, and AUROCs of about 0.76."""
    rng = np.random.default_rng(seed)
    share = rng.gamma(0.7, size=patients)
    codes = np.concatenate([np.arange(patients), rng.choice(patients, images - patients, p=share / share.sum())])
    prevalence = np.geomspace(0.24, 0.003, findings)
    labels = (rng.random((images, findings)) < prevalence).astype(np.int8)
    x = labels + rng.normal(size=(patients, findings))[codes] * 0.6 + rng.normal(size=labels.shape) * 0.8
    scores = (1.0 / (1.0 + np.exp(2.0 - x))).astype(np.float32)
    scores[:, ::2] = scores[:, ::2].round(3)
    flags = (scores >= np.quantile(scores, 0.8, axis=0)).astype(np.int8)
    # In float64, because scikit-learn would square the errors of float32 in float32.
    return Images(labels, scores, flags, scores.astype(np.float64), codes)


def run_ours(images: Images, n_resamples: int, seed: int = 0) -> BootstrapFindings:
    count = images.labels.shape[1]
    return bootstrap_findings(
        images.labels,
        images.scores,
        images.patients,
        DerivedOutputs(images.flags, images.calibrated, np.full(count, PREVALENCE)),
        macro=np.ones(count, dtype=bool),
        n_resamples=n_resamples,
        seed=seed,
    )


def run_rival(images: Images, n_resamples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Run the plain loop.

    Returns:
        Scalars float64 [n_resamples, F, quantities], sensitivities float64 [n_resamples, F, ROC_GRID], and the seconds
        spent on the two areas and the rows.
    """
    rng = np.random.default_rng(seed)
    count = int(images.patients.max()) + 1
    rows_of = [np.flatnonzero(images.patients == patient) for patient in range(count)]
    findings = images.labels.shape[1]
    scalars = np.full((n_resamples, findings, len(SCALARS)), np.nan)
    curves = np.full((n_resamples, findings, ROC_GRID), np.nan)
    spent = 0.0
    for number in range(n_resamples):
        started = time.perf_counter()
        rows = np.concatenate([rows_of[patient] for patient in rng.integers(0, count, count)])
        spent += time.perf_counter() - started
        for f in range(findings):
            y, s = images.labels[rows, f], images.scores[rows, f]
            if y.min() != y.max():
                started = time.perf_counter()
                scalars[number, f, 0] = sklearn_metrics.roc_auc_score(y, s)
                scalars[number, f, 1] = sklearn_metrics.average_precision_score(y, s)
                spent += time.perf_counter() - started
                fpr, tpr, _ = sklearn_metrics.roc_curve(y, s)
                curves[number, f] = np.interp(np.linspace(0, 1, ROC_GRID), fpr, tpr)
            scalars[number, f, 2:] = compute_rates(y, images.flags[rows, f], images.calibrated[rows, f])
    return scalars, curves, spent


def compute_rates(y: np.ndarray, flags: np.ndarray, p: np.ndarray) -> list[float]:
    """Return the values of `SCALARS` after the areas; NaN if undefined."""
    tn, fp, fn, tp = sklearn_metrics.confusion_matrix(y, flags, labels=[0, 1]).ravel().tolist()

    def divide(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    sensitivity, specificity = divide(tp, tp + fn), divide(tn, tn + fp)
    hits, alarms = PREVALENCE * sensitivity, (1 - PREVALENCE) * (1 - specificity)
    misses, passes = PREVALENCE * (1 - sensitivity), (1 - PREVALENCE) * specificity
    return [
        sensitivity,
        specificity,
        divide(tp, tp + fp),
        divide(tn, tn + fn),
        sklearn_metrics.f1_score(y, flags, zero_division=np.nan),
        divide(tp + fp, len(y)),
        divide(hits, hits + alarms),
        divide(passes, passes + misses),
        sklearn_metrics.brier_score_loss(y, p),
    ]


def check_agreement(n_resamples: int = 60) -> float:
    """Return the largest difference between the two on a small case, without the curve.

    At rates where a curve is vertical, both ends are correct.

    Raises:
        BenchmarkError: it is more than `SAME`.
    """
    images = simulate(600, 150, 3, seed=1)
    mine = run_ours(images, n_resamples)
    scalars, _, _ = run_rival(images, n_resamples)
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


def measure_bootstrap(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time both in alternating rounds; return seconds, medians and ratios."""
    worst = check_agreement()
    images = simulate(arguments.images, arguments.patients, arguments.findings)
    few, many = arguments.rival_resamples, arguments.resamples
    seconds: dict[str, list[float]] = {"ours": [], "sklearn": [], "areas": []}
    cpu: list[float] = []
    memory: float | None = None
    for _, name in interleave(("ours", "sklearn"), arguments.rounds):
        if name == "sklearn":
            started = time.perf_counter()
            _, _, areas = run_rival(images, few)
            seconds["sklearn"].append((time.perf_counter() - started) / few * many)
            seconds["areas"].append(areas / few * many)
            continue
        before, held = time.process_time(), read_status().get("VmRSS", _read_peak_bytes())
        started = time.perf_counter()
        run_ours(images, many)
        seconds["ours"].append(time.perf_counter() - started)
        cpu.append(time.process_time() - before)
        if memory is None:
            memory = max(0, _read_peak_bytes() - held) / 2**20
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    options = ("images", "patients", "findings", "resamples", "rival_resamples", "rounds")
    return {
        "settings": {name: getattr(arguments, name) for name in options},
        "threads": THREADS,
        "largest_difference": worst,
        "seconds": seconds,
        "medians": medians,
        "ours_cpu_seconds": cpu,
        "ours_extra_mib": memory,
        "ratios": {f"{name}/ours": medians[name] / medians["ours"] for name in ("sklearn", "areas")},
        "bar_s": BAR_S,
        "met": medians["ours"] <= BAR_S,
    }


def _read_peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show_bootstrap(console: Any, result: dict[str, Any]) -> None:
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
        "areas": "AUROC, average precision and rows of that loop",
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
        f"{result['ours_extra_mib']:.0f} MiB more at the peak; "
        f"largest difference on a small case: {result['largest_difference']:.1g}"
    )
    console.print(format_bar("ours, s", result["medians"]["ours"], result["bar_s"], at_most=True))


def measure_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the whole command.

    Raises:
        BenchmarkError: the command failed.
    """
    images = simulate(arguments.images, arguments.patients, min(arguments.findings, len(FINDINGS)))
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder:
        home = Path(folder)
        _write_tables(images, home)
        command = ["report", str(home / "scores.parquet"), "--labels", str(home / "labels.parquet")]
        command += ["--split", "test", "--out", str(home / "report")]
        for _ in range(arguments.rounds):
            started = time.perf_counter()
            run_command(command, home / "log")
            seconds.append(time.perf_counter() - started)
        figures = len(list((home / "report").glob("*.png")))
    median = statistics.median(seconds)
    met = median <= REPORT_BAR_S
    return {"seconds": seconds, "median": median, "figures": figures, "bar_s": REPORT_BAR_S, "met": met}


def _write_tables(images: Images, home: Path) -> None:
    """Write scores of another system, a manifest, and a few radiographs that all rows share."""
    rng = np.random.default_rng(2)
    n, count = images.labels.shape
    shared = []
    for number in range(24):
        path = home / f"{number}.png"
        noise = rng.integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(noise).resize((1024, 1024), Image.Resampling.BICUBIC).save(path)
        shared.append(str(path))
    ids = pa.array([f"{row:08d}_000.png" for row in range(n)])
    columns: dict[str, Any] = {"image_id": ids}
    labels: dict[str, Any] = {
        "image_id": ids,
        "path": [shared[row % len(shared)] for row in range(n)],
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


def show_report(console: Any, result: dict[str, Any]) -> None:
    console.print(
        f"whole report with {result['figures']} figures: median {result['median']:.1f} s "
        f"of {len(result['seconds'])} runs ({min(result['seconds']):.1f} to {max(result['seconds']):.1f})"
    )
    console.print(format_bar("report, s", result["median"], result["bar_s"], at_most=True))


def parse() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--images", default=25_596, help="(25596)", **POSITIVE)
    parser.add_argument("--patients", default=2_797, help="(2797)", **POSITIVE)
    parser.add_argument("--findings", default=14, help="(14)", **POSITIVE)
    parser.add_argument(
        "--resamples", default=1_000, help="of ours; the loop is extrapolated to them (1000)", **POSITIVE
    )
    parser.add_argument("--rival-resamples", default=3, help="resamples of the loop per round (3)", **POSITIVE)
    parser.add_argument("--rounds", default=3, help="(3)", **POSITIVE)
    parser.add_argument("--report", action="store_true", help="also time the whole report")
    arguments = parser.parse_args()
    if arguments.images < arguments.patients:
        parser.error(f"{arguments.images} images are too few for {arguments.patients} patients")
    return arguments


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    console = create_console()
    result["bootstrap"] = measure_bootstrap(arguments)
    show_bootstrap(console, result["bootstrap"])
    if arguments.report:
        result["report"] = measure_report(arguments)
        show_report(console, result["report"])


if __name__ == "__main__":
    sys.exit(run_script(parse, measure))
