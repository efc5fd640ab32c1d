"""`ray-cxr`: the commands. Arguments become calls, and errors become one line."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import psutil
from rich.console import Console
from rich.table import Table

import ray_cxr
from ray_cxr import config
from ray_cxr.errors import ConfigError, ErrorRateExceeded, OutputError, RayCxrError, own_error
from ray_cxr.progress import silence_stderr
from ray_cxr.session import start_ray
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.paths import redact

#: What the shell reports for a program that Ctrl-C ended.
EXIT_INTERRUPTED = 130


#: Arguments that name a file or folder, with what the command calls them, and those of them that may lie in a bucket.
#: (`--images` is not among them: `data.storage` says what it takes.)
_PLACES = {
    "tables": "TABLE",
    "train_val_list": "--train-val-list",
    "test_list": "--test-list",
    "manifest": "M.parquet",
    "prepared": "PREPARED",
    "model": "--model",
    "bundle": "BUNDLE",
    "weights": "F.h5|F.keras",
    "scores": "SCORES",
    "labels": "--labels",
    "consensus": "--consensus",
    "boxes": "--boxes",
    "compare": "--compare",
    "prevalence": "--prevalence",
    "config": "--config",
    "out": "--out",
}
_IN_BUCKETS = {
    "manifest": {"out"},
    "prepare": {"manifest", "out"},
    "train": {"prepared", "out"},
    "tune": {"prepared"},
    "score": {"model", "manifest", "out"},
    "report": {"scores", "labels", "compare", "out"},
    "quantize": {"bundle", "prepared", "out"},
    "recalibrate": {"bundle", "scores", "labels", "out"},
    "import-weights": {"out"},
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0 done, 1 failed, 2 wrong input, 3 too many errors)."""
    # Before anything imports TensorFlow: its C++ start-up lines are no news to anybody.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("ray_cxr").setLevel(logging.INFO)
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = arguments.run
    try:
        _refuse_addresses(arguments)
        run(arguments)
    except RayCxrError as error:
        print(f"ray-cxr {arguments.command}: {_flat(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        again = "the same command without --fresh" if getattr(arguments, "fresh", False) else "the same command"
        print(f"ray-cxr {arguments.command}: stopped; {again} continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 1
    except Exception as error:
        inner = own_error(error) or _describe_ray_error(error)
        if inner is None:
            raise
        print(f"ray-cxr {arguments.command}: {_flat(inner)}", file=sys.stderr)
        return inner.exit_code if isinstance(inner, RayCxrError) else 1
    return 0


def _describe_ray_error(error: Exception) -> RayCxrError | None:
    """Return one line about an exception of Ray; None for any other exception."""
    # Importing Ray takes seconds; a command that never imported it has none of its exceptions.
    ray_errors = sys.modules.get("ray.exceptions")
    if ray_errors is None or not isinstance(error, ray_errors.RayError):
        return None
    reason = (str(error).strip().splitlines() or [""])[-1][:300]
    return RayCxrError(f"Ray failed ({type(error).__name__}: {reason}); see Ray's log folder, then run it again")


def _refuse_addresses(arguments: argparse.Namespace) -> None:
    """Refuse `s3://...` where a command can only use files of this machine, and other addresses everywhere.

    Raises:
        ConfigError, InputError: such an argument. As a local path it would be a folder `s3:`.
    """
    allowed = _IN_BUCKETS.get(arguments.command, set())
    for name, words in _PLACES.items():
        given = getattr(arguments, name, None)
        for one in given if isinstance(given, list) else [given]:
            text = (one or "").partition("=")[2] if name == "tables" and "=" in (one or "") else one
            if not text or not remote.is_address(text):
                continue
            if name in allowed:
                remote.path(text)
                continue
            here = "write to a folder and copy that" if name == "out" else "copy it to this machine and name the copy"
            raise ConfigError(f"{words} {redact(text)}: {arguments.command} takes a local path there; {here}")


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ray-cxr", description=ray_cxr.__doc__)
    parser.add_argument("--version", action="version", version=f"ray-cxr {ray_cxr.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    one = commands.add_parser("manifest", help="tables and a folder of pictures to one manifest")
    one.add_argument(
        "tables", nargs="+", metavar="TABLE", help="CSV (.gz allowed); or train=A.csv val=B.csv test=C.csv"
    )
    one.add_argument("--out", required=True, metavar="M.parquet")
    one.add_argument("--images", metavar="DIR_OR_URI", help="where the pictures are, in any layout")
    one.add_argument("--found-only", action="store_true", help="leave out rows whose picture is not there")
    one.add_argument("--split", choices=["official", "patient"])
    one.add_argument("--train-val-list", metavar="F")
    one.add_argument("--test-list", metavar="F")
    one.add_argument("--fractions", default="0.7,0.1,0.2", help="train,val,test for --split patient (%(default)s)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--on-leak", choices=["error", "drop"], default="error", help="a patient in two splits")
    one.set_defaults(run=_manifest)

    one = commands.add_parser("prepare", help="decode and resize every picture once, into Parquet")
    one.add_argument("manifest", metavar="M.parquet")
    one.add_argument("--out", required=True, metavar="PREPARED")
    one.add_argument("--size", metavar="224[,320...]", help="sides in pixels; one set each")
    _settings(one)
    one.set_defaults(run=_prepare)

    one = commands.add_parser("train", help="train a network with Ray Train; leaves RUN/bundle")
    one.add_argument("prepared", metavar="PREPARED")
    one.add_argument("--out", required=True, metavar="RUN")
    one.add_argument("--workers", type=int, metavar="N")
    _settings(one, gpu=True)
    one.set_defaults(run=_train)

    one = commands.add_parser("tune", help="search backbones and settings with Ray Tune and Optuna")
    one.add_argument("prepared", metavar="PREPARED")
    one.add_argument("--out", required=True, metavar="STUDY")
    one.add_argument("--trials", type=int, metavar="N", help="in all, those of earlier runs included (20)")
    one.add_argument("--workers", type=int, metavar="N", help="of each trial")
    one.add_argument(
        "--resume", action="store_true", help="continue the search in STUDY, with the settings that it was begun with"
    )
    _settings(one, gpu=True)
    one.set_defaults(run=_tune)

    one = commands.add_parser("score", help="score pictures with Ray Data into Parquet, one row each")
    one.add_argument("--model", required=True, metavar="BUNDLE")
    one.add_argument("--out", required=True, metavar="SCORES")
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", metavar="M.parquet")
    source.add_argument("--images", metavar="DIR_OR_URI")
    one.add_argument("--fresh", action="store_true", help="start over: removes an earlier run's files in SCORES")
    one.add_argument("--retry-errors", action="store_true", help="read files again whose error may have passed")
    one.add_argument("--max-error-rate", type=float, metavar="R", help="exit with 3 when more than this failed (0.5)")
    one.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16", "int8"],
        help="auto: bf16 where the CPU has it and the bundle holds its tolerance in it",
    )
    one.add_argument(
        "--heatmaps", type=int, metavar="K", help="pictures of where it sees each image's K highest-ranked findings"
    )
    one.add_argument("--limit", type=int, metavar="N", help="the first N rows only")
    one.add_argument("--dry-run", action="store_true", help="check everything, count, write nothing")
    _settings(one, gpu=True)
    one.set_defaults(run=_score)

    one = commands.add_parser("report", help="scores (and labels) to report.html, metrics.json and pictures")
    one.add_argument("scores", metavar="SCORES", help="what score left; or any Parquet with image_id and p_<Finding>")
    one.add_argument("--out", required=True, metavar="REPORT")
    one.add_argument("--labels", metavar="M.parquet")
    one.add_argument("--split", choices=["train", "val", "test"])
    one.add_argument("--consensus", metavar="CSV", help="radiologists' labels: an image column and one per finding")
    one.add_argument("--boxes", metavar="CSV", help="boxes as in BBox_List_2017, for heat maps that score drew")
    one.add_argument("--compare", metavar="SCORES2", help="other scores of the same images")
    one.add_argument("--prevalence", metavar="F.toml", help="lines such as Effusion = 0.12, to give PPV and NPV for")
    one.set_defaults(run=_report)

    one = commands.add_parser("export-sr", help="DICOM Structured Reports of what was found, one per study")
    one.add_argument("scores", metavar="SCORES", help="what score left; its DICOM files are read again")
    one.add_argument("--out", required=True, metavar="DIR", help="holds patients' names and ids afterwards")
    one.set_defaults(run=_export_sr)

    one = commands.add_parser("quantize", help="a bundle with 8-bit weights, too, for `score --precision int8`")
    one.add_argument("bundle", metavar="BUNDLE")
    one.add_argument("prepared", metavar="PREPARED", help="what prepare left; its train and val images are used")
    one.add_argument("--out", required=True, metavar="BUNDLE2")
    _settings(one)
    one.set_defaults(run=_quantize)

    one = commands.add_parser("recalibrate", help="calibration and operating points from a site's own labels")
    one.add_argument("bundle", metavar="BUNDLE")
    one.add_argument("scores", metavar="SCORES", help="what score left, with this BUNDLE")
    one.add_argument("--labels", required=True, metavar="M.parquet")
    one.add_argument("--out", required=True, metavar="BUNDLE2")
    _settings(one)
    one.set_defaults(run=_recalibrate)

    one = commands.add_parser("import-weights", help="somebody else's Keras weights as a bundle")
    one.add_argument("weights", metavar="F.h5|F.keras")
    one.add_argument("--backbone", required=True, metavar="NAME")
    one.add_argument("--out", required=True, metavar="BUNDLE")
    one.add_argument(
        "--findings", metavar="LIST", help="names of its outputs in their order, by commas; or 14, 15: alphabetical"
    )
    one.add_argument("--size", type=int, default=224, help="side of its input, pixels (%(default)s)")
    one.set_defaults(run=_import_weights)

    one = commands.add_parser("demo", help="synthetic radiographs through every step, on a laptop, in minutes")
    one.add_argument("--out", required=True, metavar="DIR")
    one.add_argument("--tune", action="store_true", help="with a small search before the training")
    one.set_defaults(run=_demo)
    return parser


def _settings(parser: argparse.ArgumentParser, *, gpu: bool = False) -> None:
    parser.add_argument("--config", metavar="F.toml", help="settings; see docs/settings.md")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value")
    if gpu:
        parser.add_argument("--gpu", action="store_true", help="one GPU per worker or actor")


def _manifest(arguments: argparse.Namespace) -> None:
    from ray_cxr.data.manifest import write_manifest
    from ray_cxr.data.manifest_builder import build_manifest

    try:
        fractions = [float(part) for part in arguments.fractions.split(",")]
    except ValueError:
        raise ConfigError(f"--fractions {arguments.fractions}: give three numbers, such as 0.7,0.1,0.2") from None
    table, report = build_manifest(
        arguments.tables,
        images=arguments.images,
        split=arguments.split,
        train_val_list=arguments.train_val_list,
        test_list=arguments.test_list,
        fractions=fractions,
        seed=arguments.seed,
        on_leak=arguments.on_leak,
        found_only=arguments.found_only,
    )
    with _writing(arguments.out):
        write_manifest(table, arguments.out)
    for line in report.lines():
        _say(line)
    _say(f"manifest: {arguments.out}")


def _prepare(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides, section="prepare")
    chosen = settings.prepare
    if arguments.size is not None:
        try:
            sizes = tuple(int(part) for part in arguments.size.split(","))
        except ValueError:
            raise ConfigError(f"--size {arguments.size}: give pixels, such as 224 or 224,320") from None
        chosen = chosen.replace(sizes=sizes)
    from ray_cxr.data import prepared

    prepared.check(arguments.manifest, remote.path(arguments.out), chosen)  # before Ray takes its seconds to start
    with start_ray(settings.ray):
        counts = prepared.prepare(arguments.manifest, arguments.out, chosen)
    for size, codes in counts.items():
        failed = codes.total() - codes["ok"]
        detail = ", ".join(f"{code} {count:,}" for code, count in codes.most_common() if code != "ok")
        _say(f"size {size}: {codes['ok']:,} images, {failed:,} failed" + (f": {detail}" if detail else ""))
    _say(f"prepared: {arguments.out}")


def _train(arguments: argparse.Namespace) -> None:
    started = time.time()
    settings = config.load(arguments.config, arguments.overrides, section="train")
    chosen = settings.train
    if arguments.workers is not None:
        chosen = chosen.replace(workers=arguments.workers)
    from ray_cxr.training import trainer

    bundle = trainer.train(
        arguments.prepared,
        arguments.out,
        chosen,
        use_gpu=arguments.gpu,
        started=started,
        on_event=_say,
        start_ray=lambda: start_ray(settings.ray),
    )
    table = Table("finding", "val images", "positives", "AUROC", "calibrated", "operating point", title="Validation")
    metrics = bundle.info["provenance"]["validation"]["findings"]
    for name in bundle.findings:
        row, point = metrics[name], bundle.info["operating_points"][name]
        table.add_row(
            name,
            f"{row['n']:,}",
            f"{row['positives']:,}",
            _number(row["auroc"]),
            "yes" if bundle.info["calibration"][name] else "no",
            _number(point["threshold"] if point else None),
        )
    _console().print(table)
    macro = bundle.info["provenance"]["validation"]["macro_auroc"]
    for name, reason in bundle.info.get("rule_notes", {}).items():
        if reason:
            _say(f"{name}: {reason}")
    _say(f"validation macro AUROC {_number(macro)}, epoch {bundle.info['provenance']['best_epoch']}")
    out = remote.path(arguments.out)
    _say(f"learning curves: {out / trainer.CURVES}")
    _say(f"bundle: {out / 'bundle'}")


def _tune(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    loaded = config.load(arguments.config, arguments.overrides, section="tune")
    from ray_cxr.tuning import study as studies

    out, base, chosen = Path(arguments.out), loaded.train, loaded.tune
    if arguments.resume and not studies.begun(out):
        raise OutputError(f"--resume: {out} holds no search; leave --resume out to begin one there")
    if arguments.resume and arguments.config is None:
        # What is said again must agree with what the search was begun with; what is not said is as it was.
        base, chosen = studies.resumed(out, arguments.overrides)
    if arguments.workers is not None:
        base = base.replace(workers=arguments.workers)
    if arguments.trials is not None:
        chosen = chosen.replace(trials=arguments.trials)
    plan = studies.Plan(arguments.prepared, out, base, chosen)
    if plan.done():
        _say(f"tune: {out} is finished already; --trials N asks for more than {chosen.trials} trials")
        return
    # The dashboard answers Ray Train's question whether a stopped trial's run still lives.
    with start_ray(loaded.ray, dashboard=True):
        from ray_cxr.tuning import search  # with Ray, whose environment is set by now

        outcome = search.search(plan, use_gpu=arguments.gpu, on_event=_say)
    from ray_cxr.reporting import study as page

    with _writing(arguments.out):
        page.write_study(out, outcome.study, outcome.rows, outcome.facts, outcome.comparison)
        atomic.write_json(out / studies.SUMMARY, {**outcome.facts, "comparison": outcome.comparison})
    table = Table("trial", "backbone", "state", "epochs", "AUROC", "seconds", title="Trials, the best first")
    ranked = outcome.rows.sort_values("val_auroc", ascending=False, na_position="last") if len(outcome.rows) else None
    for row in [] if ranked is None else ranked.head(15).to_dict("records"):
        auroc, seconds = row["val_auroc"], row["seconds"]
        table.add_row(
            str(row["number"]),
            row["backbone"],
            row["state"],
            str(row["epochs"]),
            "none" if pd.isna(auroc) else f"{auroc:.4f}",
            "" if pd.isna(seconds) else f"{seconds:.0f}",
        )
    _console().print(table)
    for row in outcome.rows.to_dict("records"):
        if row["state"] == "failed":
            _say(f"trial {row['number']} failed: {row['reason']}")
    if outcome.comparison is not None:
        _say(outcome.comparison["verdict"]["headline"])
    states = Counter(outcome.rows["state"])
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common()) or "none"
    _say(f"trials: {counts}; {outcome.epochs} epochs trained, {time.monotonic() - began:.0f} s")
    _say(f"report: {out / 'report.html'}")
    if outcome.interrupted and outcome.bundle is None:
        raise KeyboardInterrupt
    if outcome.bundle is None:
        raise RayCxrError(
            outcome.gave_up or f"{out}: no trial came to the end of an epoch, so there is no bundle; the table says why"
        )
    _say(f"best trial: {outcome.best}, settings in {out / 'best.toml'}")
    _say(f"bundle: {outcome.bundle.path}")
    if outcome.gave_up is not None:
        raise RayCxrError(outcome.gave_up)
    if outcome.interrupted:
        raise KeyboardInterrupt


def _score(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides, section="score")
    chosen = settings.score
    if arguments.max_error_rate is not None:
        chosen = chosen.replace(max_error_rate=arguments.max_error_rate)
    if arguments.precision is not None:
        chosen = chosen.replace(precision=arguments.precision)
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: give at least 1")
    from ray_cxr.scoring import pipeline

    call: dict[str, Any] = {
        "manifest": arguments.manifest,
        "images": arguments.images,
        "retry_errors": arguments.retry_errors,
        "limit": arguments.limit,
        "use_gpu": arguments.gpu,
        "heatmaps": arguments.heatmaps,
    }
    too_many: ErrorRateExceeded | None = None
    try:
        report = pipeline.score(
            arguments.model,
            arguments.out,
            chosen,
            fresh=arguments.fresh,
            dry_run=arguments.dry_run,
            start=lambda: start_ray(settings.ray),
            began=psutil.Process().create_time(),  # what was imported before this line counts, too
            **call,
        )
    except ErrorRateExceeded as error:
        if not isinstance(error.report, pipeline.ScoreReport):
            raise
        too_many, report = error, error.report
    for note in report.notes:
        _say(f"{arguments.images}: {note}")
    if arguments.dry_run:
        drawn = "" if report.heatmaps is None else f", heat maps of up to {report.heatmaps.to_draw:,} to draw"
        _say(f"{report.rows:,} rows, {report.counts['to score']:,} of them to score{drawn}; nothing was written")
        return
    table = Table("result", "rows", title="Scores")
    for code, count in report.counts.most_common():
        table.add_row(code, f"{count:,}")
    _console().print(table)
    if report.images_per_second is None:
        _say(f"scores: {arguments.out} is finished; nothing was left to do")
    else:
        _say(
            f"scored {report.scored_now:,} images in {report.seconds:.0f} s "
            f"({report.images_per_second:.1f} images/s, start-up included)"
        )
        _say(f"scores: {arguments.out}")
    if report.heatmaps is not None:
        for line in report.heatmaps.lines():
            _say(line)
    if too_many is not None:
        raise too_many


def _report(arguments: argparse.Namespace) -> None:
    from ray_cxr.reporting import report

    with _writing(arguments.out):
        metrics = report.write_report(
            arguments.scores,
            arguments.out,
            labels=arguments.labels,
            split=arguments.split,
            consensus=arguments.consensus,
            boxes=arguments.boxes,
            compare=arguments.compare,
            prevalence=arguments.prevalence,
        )
    macro = metrics["macro"]
    if macro and macro["auroc"] is not None:
        _say(
            f"macro AUROC {macro['auroc']:.3f} ({_number(macro['auroc_low'])} to {_number(macro['auroc_high'])}) "
            f"over {len(macro['findings'])} findings, {metrics['n_images']:,} images of "
            f"{metrics['n_patients']:,} patients"
        )
    _say(f"report: {remote.path(arguments.out) / 'report.html'}")


def _export_sr(arguments: argparse.Namespace) -> None:
    if not arguments.out:
        raise ConfigError("--out: is empty; name where to write")
    from ray_cxr.reporting import dicom_sr

    export = dicom_sr.export_sr(arguments.scores, arguments.out)
    for outcome, words in dicom_sr.WORDS.items():
        if export.outcomes[outcome]:
            _say(f"{export.outcomes[outcome]:,} {words}")
    partial = f", {export.partial:,} of them without an image of their study" if export.partial else ""
    _say(f"reports: {export.reports:,} in {arguments.out}{partial}; {export.written:,} written now")
    export.raise_for_failures()


def _quantize(arguments: argparse.Namespace) -> None:
    chosen = config.load(arguments.config, arguments.overrides, section="quantize").quantize
    from ray_cxr.models import quantization

    with _writing(arguments.out):
        bundle = quantization.quantize(arguments.bundle, arguments.prepared, arguments.out, chosen, on_event=_say)
    _say(f"bundle: {bundle.place}")


def _recalibrate(arguments: argparse.Namespace) -> None:
    chosen = config.load(arguments.config, arguments.overrides, section="recalibrate").recalibrate
    from ray_cxr.models import recalibration

    bundle = recalibration.recalibrate(
        arguments.bundle, arguments.scores, arguments.labels, arguments.out, chosen, on_event=_say
    )
    made, points = bundle.info["provenance"]["recalibrated"], bundle.info["operating_points"]
    names = ("finding", "images", "positives", "flags above", "before", "flag rate", "before", "Brier", "before")
    table = Table(*names, title="Recalibration, on the images that it was fitted on")
    for name in bundle.findings:
        row, point, old = made["findings"][name], points[name], made["before"]["operating_points"][name]
        table.add_row(
            name,
            f"{row['n']:,}",
            f"{row['positives']:,}",
            *(_none_or(one and one["threshold"], 4) for one in (point, old)),
            *(_none_or(row[key]) for key in ("flag_rate", "flag_rate_before", "brier", "brier_before")),
        )
    _console().print(table)
    for name, reason in bundle.info["rule_notes"].items():
        if reason:
            _say(f"{name}: {reason}")
    _say(
        f"calibration by {made['method']} and operating points by {made['rule']}, from {made['images']:,} images of "
        f"{made['patients']:,} patients: report on others"
    )
    _say(f"bundle: {bundle.place}")


def _none_or(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _import_weights(arguments: argparse.Namespace) -> None:
    if arguments.findings is None:
        raise ConfigError(
            "--findings: say what the outputs are, in their order, separated by commas "
            "(or 14, 15 for alphabetical order); a wrong order could not be noticed later"
        )
    with silence_stderr():
        from ray_cxr.models import importing

    bundle = importing.import_weights(
        arguments.weights,
        arguments.out,
        backbone=arguments.backbone,
        findings=importing.parse_findings(arguments.findings),
        size=arguments.size,
    )
    _say(f"outputs: {', '.join(bundle.findings)}")
    _say("no calibration and no operating points: those columns of a score table will be null")
    _say(f"bundle: {bundle.place}")


def _demo(arguments: argparse.Namespace) -> None:
    from ray_cxr import demo

    demo.run(Path(arguments.out), main, _say, tune=arguments.tune)


@contextlib.contextmanager
def _writing(out: str) -> Iterator[None]:
    if not out:
        raise ConfigError("--out: is empty; name where to write")
    try:
        yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename and str(error.filename) != out else ""
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}{at}") from None


def _console() -> Console:
    # A pipe has no width; without one rich would fold tables at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 110)


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
