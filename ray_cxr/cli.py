"""`ray-cxr`: parse arguments, call the package, print results. Every error is one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import pandas as pd
import psutil
from rich.console import Console
from rich.table import Table

import ray_cxr
from ray_cxr import config, environment, errors, limits
from ray_cxr.errors import EXIT_INTERRUPTED, ConfigError, ErrorRateExceeded, RayCxrError, one_line
from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.progress import silence_stderr
from ray_cxr.session import start_ray
from ray_cxr.storage import remote
from ray_cxr.storage.paths import redact

_Settings = TypeVar("_Settings", bound=config.Settings)
_Number = TypeVar("_Number", int, float)

#: Part of the path of a job's working directory, a copy in Ray's session folder that is removed with the session.
_JOB_FOLDER = "/runtime_resources/working_dir_files/"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {one_line(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        environment.write_output("", end="")  # the help may still be in the buffer
        super().exit(status or _report_lost_output(self.prog), message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (0 done, 1 failed, 2 wrong input, 3 too many errors)."""
    command, arguments = "ray-cxr", argparse.Namespace()
    try:
        # TensorFlow's C++ code reads this on import.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("ray_cxr").setLevel(logging.INFO)
        arguments = _build_parser().parse_args(argv)
        command = f"ray-cxr {arguments.command}"
        _check_working_directory(getattr(arguments, "out", ""))
        arguments.run(arguments)
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        again = "the same command without --fresh" if getattr(arguments, "fresh", False) else "the same command again"
        print(f"{command}: stopped; run {again} to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        cause = error if isinstance(error, RayCxrError) else errors.own_error(error) or _describe_ray_error(error)
        if cause is None:
            raise
        print(f"{command}: {one_line(cause)}", file=sys.stderr)
        return cause.exit_code if isinstance(cause, RayCxrError) else 1
    return _report_lost_output(command)


def _report_lost_output(command: str) -> int:
    """Report that lines of a finished command could not be written; return the exit code."""
    if environment.output_error is None:
        return 0
    print(
        f"{command}: standard output: {environment.output_error}, so its last lines are missing; the command is done",
        file=sys.stderr,
    )
    return 1


def _check_working_directory(out: str) -> None:
    """Refuse a working directory that was removed, and an output in the copy of the folder that a job runs in."""
    try:
        here = os.getcwd()
    except OSError:
        raise errors.InputError("the working directory was removed; change to an existing folder") from None
    if out and not remote.is_address(out) and _JOB_FOLDER in os.path.join(here, out):
        raise errors.OutputError(
            f"--out {out}: is in the working directory of a job, which Ray removes later; pass an absolute path "
            "outside of it"
        )


def _describe_ray_error(error: Exception) -> RayCxrError | None:
    """Return a one-line error for an exception of Ray; None for any other exception."""
    # Importing Ray takes seconds. If the command has not imported it, the exception is not Ray's.
    ray_errors = sys.modules.get("ray.exceptions")
    if ray_errors is None or not isinstance(error, ray_errors.RayError):
        return None
    shortage = limits.explain_loss(error, "lower ray.num_cpus, or end other programs")
    reason = shortage or f"{type(error).__name__}: {errors.last_line(error)}"
    return RayCxrError(f"Ray failed ({reason}); see Ray's log folder, then run it again")


def _any_path(text: str) -> str:
    """Argument type: a path on this machine, or `s3://BUCKET/...`."""
    try:
        remote.to_path(text)
    except errors.InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _local_input(text: str, remedy: str = "copy it to this machine") -> str:
    """Argument type: a file or folder on this machine; refuse `s3://`, which would otherwise name a local folder."""
    if remote.is_address(text):
        raise argparse.ArgumentTypeError(f"{redact(text)}: needs a local path; {remedy}")
    return text


#: Argument type: a file or folder to write on this machine.
_local_output = functools.partial(_local_input, remedy="write to a folder and copy that")


def _table(text: str) -> str:
    """Argument type: a table on this machine, or `train=TABLE`, `val=TABLE`, `test=TABLE`."""
    _local_input(text.partition("=")[2] or text)
    return text


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ray-cxr", description=ray_cxr.__doc__)
    parser.add_argument("--version", action="version", version=f"ray-cxr {ray_cxr.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    _add_data_commands(commands)
    _add_training_commands(commands)
    _add_score_command(commands)
    _add_report_commands(commands)
    _add_bundle_commands(commands)
    demo = _add_command(commands, "demo", _demo, "run every step on synthetic radiographs, on a laptop, in minutes")
    demo.add_argument("--out", required=True, type=_local_output, metavar="DIR")
    demo.add_argument("--tune", action="store_true", help="also run a small search before the training")
    return parser


def _add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> _Parser:
    """Add a command, the function that runs it, and its help text."""
    parser: _Parser = commands.add_parser(name, help=text)
    parser.set_defaults(run=run)
    return parser


def _add_data_commands(commands: Any) -> None:
    manifest = _add_command(commands, "manifest", _manifest, "combine tables and a folder of images into one manifest")
    manifest.add_argument("tables", nargs="+", type=_table, metavar="TABLE", help="CSV, or train=A.csv test=B.csv.gz")
    manifest.add_argument("--out", required=True, type=_any_path, metavar="M.parquet")
    manifest.add_argument("--images", metavar="DIR_OR_URI", help="location of the images, in any layout")
    manifest.add_argument("--found-only", action="store_true", help="drop rows without an image file")
    manifest.add_argument("--split", choices=["official", "patient"])
    manifest.add_argument("--train-val-list", type=_local_input, metavar="F")
    manifest.add_argument("--test-list", type=_local_input, metavar="F")
    manifest.add_argument("--fractions", default="0.7,0.1,0.2", help="train,val,test for --split patient (%(default)s)")
    manifest.add_argument("--seed", type=int, default=0)
    manifest.add_argument("--on-leak", choices=["error", "drop"], default="error", help="for patients in two splits")

    prepare = _add_command(commands, "prepare", _prepare, "decode and resize every image once, into Parquet")
    prepare.add_argument("manifest", type=_any_path, metavar="M.parquet")
    prepare.add_argument("--out", required=True, type=_any_path, metavar="PREPARED")
    prepare.add_argument("--size", metavar="224[,320...]", help="sides in pixels; one prepared set each")
    _add_settings(prepare)


def _add_training_commands(commands: Any) -> None:
    train = _add_command(commands, "train", _train, "train a model with Ray Train; writes RUN/bundle")
    train.add_argument("prepared", type=_any_path, metavar="PREPARED")
    train.add_argument("--out", required=True, type=_any_path, metavar="RUN")
    train.add_argument("--workers", type=int, metavar="N")
    _add_settings(train, gpu=True)

    tune = _add_command(commands, "tune", _tune, "search backbones and settings with Ray Tune and Optuna")
    tune.add_argument("prepared", type=_any_path, metavar="PREPARED")
    tune.add_argument("--out", required=True, type=_local_output, metavar="STUDY")
    tune.add_argument("--trials", type=int, metavar="N", help="total, including earlier runs (20)")
    tune.add_argument("--confirm", type=int, metavar="N", help="pairs of extra trainings of the best two backbones (0)")
    tune.add_argument("--workers", type=int, metavar="N", help="per trial")
    tune.add_argument("--resume", action="store_true", help="continue the search in STUDY with its settings")
    _add_settings(tune, gpu=True)


def _add_score_command(commands: Any) -> None:
    score = _add_command(commands, "score", _score, "score images with Ray Data into Parquet, one row each")
    score.add_argument("--model", required=True, type=_any_path, metavar="BUNDLE")
    score.add_argument("--out", required=True, type=_any_path, metavar="SCORES")
    source = score.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", type=_any_path, metavar="M.parquet")
    source.add_argument("--images", metavar="DIR_OR_URI")
    score.add_argument("--fresh", action="store_true", help="start over; removes an earlier run's files in SCORES")
    score.add_argument("--retry-errors", action="store_true", help="read files again that failed temporarily")
    score.add_argument("--max-error-rate", type=float, metavar="R", help="exit with 3 if a larger share fails (0.5)")
    precisions = get_args(config.Precision)
    score.add_argument("--precision", choices=precisions, help="auto: bf16 if CPU and bundle support it, else fp32")
    score.add_argument("--heatmaps", type=int, metavar="K", help="also draw heat maps of each image's top K findings")
    score.add_argument("--limit", type=int, metavar="N", help="score only the first N rows")
    score.add_argument("--dry-run", action="store_true", help="check everything, count, write nothing")
    _add_settings(score, gpu=True)


def _add_report_commands(commands: Any) -> None:
    report = _add_command(commands, "report", _report, "turn scores (and labels) into a report, metrics and figures")
    scores_help = "folder from score, or a Parquet with image_id and p_<Finding>"
    report.add_argument("scores", type=_any_path, metavar="SCORES", help=scores_help)
    report.add_argument("--out", required=True, type=_any_path, metavar="REPORT")
    report.add_argument("--labels", type=_any_path, metavar="M.parquet")
    report.add_argument("--split", choices=["train", "val", "test"])
    report.add_argument("--consensus", type=_local_input, metavar="CSV", help="radiologists' labels per finding")
    report.add_argument("--boxes", type=_local_input, metavar="CSV", help="boxes as in BBox_List_2017, for heat maps")
    report.add_argument("--compare", type=_any_path, metavar="SCORES2", help="other scores of the same images")
    prevalence_help = "lines such as Effusion = 0.12, for PPV and NPV"
    report.add_argument("--prevalence", type=_local_input, metavar="F.toml", help=prevalence_help)

    export = _add_command(commands, "export-sr", _export_sr, "write DICOM Structured Reports, one per study")
    export.add_argument("scores", type=_local_input, metavar="SCORES", help="folder from score; reads its DICOM files")
    export.add_argument("--out", required=True, type=_local_output, metavar="DIR", help="holds patients' names and ids")
    export.add_argument(
        "--replaces",
        type=_local_input,
        metavar="DIR2",
        help="earlier export whose documents the new ones replace",
    )


def _add_bundle_commands(commands: Any) -> None:
    quantize = _add_command(commands, "quantize", _quantize, "add 8-bit weights for `score --precision int8`")
    quantize.add_argument("bundle", type=_any_path, metavar="BUNDLE")
    quantize.add_argument("prepared", type=_any_path, metavar="PREPARED", help="from prepare; has train and val images")
    quantize.add_argument("--out", required=True, type=_any_path, metavar="BUNDLE2")
    _add_settings(quantize)

    recalibrate = _add_command(
        commands, "recalibrate", _recalibrate, "fit calibration and operating points to own labels"
    )
    recalibrate.add_argument("bundle", type=_any_path, metavar="BUNDLE")
    recalibrate.add_argument("scores", type=_any_path, metavar="SCORES", help="folder from score with this BUNDLE")
    recalibrate.add_argument("--labels", required=True, type=_any_path, metavar="M.parquet")
    recalibrate.add_argument("--out", required=True, type=_any_path, metavar="BUNDLE2")
    _add_settings(recalibrate)

    ensemble = _add_command(commands, "ensemble", _ensemble, "average several bundles in one")
    ensemble.add_argument("bundles", nargs="+", type=_any_path, metavar="BUNDLE")
    ensemble.add_argument("--out", required=True, type=_any_path, metavar="BUNDLE2")

    exporter = _add_command(commands, "export-onnx", _export_onnx, "write a model as an ONNX file for other servers")
    exporter.add_argument("bundle", type=_any_path, metavar="BUNDLE")
    exporter.add_argument("--out", required=True, type=_any_path, metavar="F.onnx")

    importer = _add_command(commands, "import-weights", _import_weights, "make a bundle of third-party weights")
    importer.add_argument(
        "weights", type=_local_input, metavar="FILE", help="Keras, PyTorch or ONNX, see docs/models.md"
    )
    importer.add_argument("--backbone", metavar="NAME", help="not for ONNX files")
    importer.add_argument("--out", required=True, type=_any_path, metavar="BUNDLE")
    importer.add_argument(
        "--findings", metavar="LIST", help="outputs in order, comma-separated, - to leave one out; 14, 15: alphabetical"
    )
    importer.add_argument(
        "--normalization",
        metavar="RULE",
        help="keras, imagenet, torchxrayvision, none; or MEAN,STD of gray 0 to 1",
    )
    importer.add_argument("--size", type=int, help="side of its input, pixels (224)")
    importer.add_argument("--aspect", choices=("stretch", "pad", "crop"), help="of images that are not square")
    importer.add_argument(
        "--interpolation",
        choices=get_args(config.Interpolation),
        default="area",
        help="of images of another size (area)",
    )
    importer.add_argument("--input-layout", choices=("nchw", "nhwc"), help="of an ONNX file's input")
    importer.add_argument("--logits", action="store_true", help="the outputs of an ONNX file need a sigmoid")


def _add_settings(parser: argparse.ArgumentParser, *, gpu: bool = False) -> None:
    parser.add_argument("--config", type=_local_input, metavar="F.toml", help="settings; see docs/settings.md")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="key=value")
    if gpu:
        parser.add_argument("--gpu", action="store_true", help="use one GPU per worker or actor")


def _manifest(arguments: argparse.Namespace) -> None:
    from ray_cxr.data.manifest import write_manifest
    from ray_cxr.data.manifest_builder import build_manifest

    fractions = _parse_numbers(float, arguments.fractions, "--fractions", "three numbers, such as 0.7,0.1,0.2")
    table, report = build_manifest(
        arguments.tables,
        fractions=fractions,
        **_pick(arguments, "images", "split", "train_val_list", "test_list", "seed", "on_leak", "found_only"),
    )
    with _explain_write_errors(arguments.out):
        write_manifest(table, arguments.out)
    for line in report.lines():
        _print(line)
    _print(f"manifest: {arguments.out}")


def _prepare(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides, section="prepare")
    chosen = settings.prepare
    if arguments.size is not None:
        chosen = chosen.replace(sizes=_parse_numbers(int, arguments.size, "--size", "pixels, such as 224 or 224,320"))
    from ray_cxr.data import prepared

    start = functools.partial(start_ray, settings.ray)
    counts = prepared.prepare(arguments.manifest, arguments.out, chosen, start_ray=start)
    for size, found in counts.items():
        codes = found.codes
        failed = codes.total() - codes["ok"]
        errors = ", ".join(f"{code} {count:,}" for code, count in codes.most_common() if code != "ok")
        flags = ", ".join(f"{flag} {count:,}" for flag, count in found.flags.most_common())
        detail = (f": {errors}" if errors else "") + (f"; flags: {flags}" if flags else "")
        _print(f"size {size}: {codes['ok']:,} images, {failed:,} failed{detail}")
    _print(f"prepared: {arguments.out}")


def _train(arguments: argparse.Namespace) -> None:
    started = time.time()
    settings = config.load(arguments.config, arguments.overrides, section="train")
    from ray_cxr.training import trainer

    options: dict[str, Any] = {"use_gpu": arguments.gpu, "started": started, "on_event": _print}
    chosen, start = _override(settings.train, arguments, "workers"), functools.partial(start_ray, settings.ray)
    bundle = trainer.train(arguments.prepared, arguments.out, chosen, **options, start_ray=start)
    table = Table("finding", "val images", "positives", "AUROC", "calibrated", "operating point", title="Validation")
    metrics = bundle.info["provenance"]["validation"]["findings"]
    for name in bundle.findings:
        row, point = metrics[name], bundle.info["operating_points"][name]
        calibrated, threshold = "yes" if bundle.info["calibration"][name] else "no", point and point["threshold"]
        counts = f"{row['n']:,}", f"{row['positives']:,}"
        table.add_row(name, *counts, _format(row["auroc"]), calibrated, _format(threshold))
    _print_table(table)
    macro = bundle.info["provenance"]["validation"]["macro_auroc"]
    _print_rule_notes(bundle.info.get("rule_notes", {}))
    _print(f"validation macro AUROC {_format(macro)}, epoch {bundle.info['provenance']['best_epoch']}")
    out = remote.to_path(arguments.out)
    _print(f"learning curves: {out / trainer.CURVES}")
    _print(f"bundle: {out / 'bundle'}")


def _tune(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    loaded = config.load(arguments.config, arguments.overrides, section="tune")
    from ray_cxr.tuning import plan as plans

    out, base, chosen = remote.to_path(arguments.out), loaded.train, loaded.tune
    if arguments.resume and not plans.has_search(out):
        raise errors.OutputError(f"--resume: {out} holds no search; omit --resume to start one there")
    if arguments.resume and arguments.config is None:
        # Overrides must agree with the settings of the search when it started.
        base, chosen = plans.load_start_settings(out, arguments.overrides)
    base, chosen = _override(base, arguments, "workers"), _override(chosen, arguments, "trials", "confirm")
    plan = plans.StudyPlan(arguments.prepared, out, base, chosen)
    if plan.is_finished():
        _print(f"tune: {out} is finished already; use --trials N for more than {chosen.trials} trials")
        return
    # Ray Train asks the dashboard whether a stopped trial's run is still alive.
    with start_ray(loaded.ray, dashboard=True):
        from ray_cxr.tuning import search  # imports Ray, so only after its environment is set

        outcome = search.search(plan, use_gpu=arguments.gpu, on_event=_print)
    table = Table("trial", "backbone", "state", "epochs", "AUROC", "seconds", title="Trials, the best first")
    for row in outcome.rows.sort_values("val_auroc", ascending=False).head(15).to_dict("records"):
        auroc = "none" if pd.isna(row["val_auroc"]) else f"{row['val_auroc']:.4f}"
        seconds = "" if pd.isna(row["seconds"]) else f"{row['seconds']:.0f}"
        table.add_row(str(row["number"]), row["backbone"], row["state"], str(row["epochs"]), auroc, seconds)
    _print_table(table)
    for row in outcome.rows.to_dict("records"):
        if row["state"] == "failed":
            _print(f"trial {row['number']} failed: {row['reason']}")
    if outcome.comparison is not None:
        _print(outcome.comparison["verdict"]["headline"])
        if outcome.comparison["confirmation"]:
            _print(outcome.comparison["verdict"]["details"])
    states = Counter(outcome.rows["state"])
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common()) or "none"
    epochs, extra = outcome.facts["epochs_spent"], outcome.facts["confirm_epochs"]
    more = f" and {extra} in confirming trainings" * bool(extra)
    _print(f"trials: {counts}; {epochs} epochs trained{more}, {time.monotonic() - start:.0f} s")
    _print(f"report: {out / 'report.html'}")
    if outcome.bundle is not None:
        _print(f"best trial: {outcome.facts['best_number']}, settings in {out / 'best.toml'}")
        _print(f"bundle: {outcome.bundle.path}")
    if outcome.facts["interrupted"]:
        raise KeyboardInterrupt
    if outcome.gave_up is not None:
        raise RayCxrError(outcome.gave_up)
    if outcome.bundle is None:
        raise RayCxrError(f"{out}: no trial completed an epoch, so there is no bundle; see trials.parquet")


def _score(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides, section="score")
    chosen = _override(settings.score, arguments, "max_error_rate", "precision")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: must be at least 1")
    from ray_cxr.scoring.pipeline import score
    from ray_cxr.scoring.plan import ScoreRequest

    request = ScoreRequest(
        settings=chosen,
        use_gpu=arguments.gpu,
        started_at=psutil.Process().create_time(),  # includes the imports before this line
        **_pick(
            arguments, "model", "out", "manifest", "images", "fresh", "retry_errors", "limit", "dry_run", "heatmaps"
        ),
    )
    too_many: ErrorRateExceeded | None = None
    try:
        report = score(request, start_ray=lambda: start_ray(settings.ray))
    except ErrorRateExceeded as error:
        too_many, report = error, error.report
    for note in report.notes:
        _print(f"{arguments.images}: {note}")
    if arguments.dry_run:
        drawn = "" if report.heatmaps is None else f", heat maps of up to {report.heatmaps.to_draw:,} to draw"
        _print(f"{report.rows:,} rows, {report.counts['to score']:,} of them to score{drawn}; nothing was written")
        return
    table = Table("result", "rows", title="Scores")
    for code, count in report.counts.most_common():
        table.add_row(code, f"{count:,}")
    _print_table(table)
    if report.images_per_second is None:
        _print(f"scores: {arguments.out} is already complete")
    else:
        _print(
            f"scored {report.scored_now:,} images in {report.seconds:.0f} s "
            f"({report.images_per_second:.1f} images/s, start-up included)"
        )
        _print(f"scores: {arguments.out}")
    if report.heatmaps is not None:
        for line in report.heatmaps.lines():
            _print(line)
    if too_many is not None:
        raise too_many


def _report(arguments: argparse.Namespace) -> None:
    from ray_cxr.reporting import report

    with _explain_write_errors(arguments.out):
        options = _pick(arguments, "labels", "split", "consensus", "boxes", "compare", "prevalence")
        metrics = report.write_report(arguments.scores, arguments.out, **options)
    macro = metrics["macro"]
    if macro and macro["auroc"] is not None:
        low, high = (_format(macro[f"auroc_interval_{end}"]) for end in ("low", "high"))
        _print(
            f"macro AUROC {macro['auroc']:.3f} ({low} to {high}) "
            f"over {len(macro['findings'])} findings, {metrics['n_images']:,} images of "
            f"{PatientCount(metrics['n_patients'], metrics['images_without_patient'])}"
        )
    _print(f"report: {remote.to_path(arguments.out) / 'report.html'}")


def _export_sr(arguments: argparse.Namespace) -> None:
    if not arguments.out:
        raise ConfigError("--out: is empty; name a folder to write")
    from ray_cxr.reporting import dicom_sr

    export = dicom_sr.export_sr(arguments.scores, arguments.out, arguments.replaces)
    for outcome, text in dicom_sr.OUTCOME_TEXTS.items():
        if export.outcomes[outcome]:
            _print(f"{export.outcomes[outcome]:,} {text}")
    partial = f", {export.partial:,} of them without an image of their study" if export.partial else ""
    _print(f"reports: {export.reports:,} in {arguments.out}{partial}; {export.written:,} written now")
    if arguments.replaces or export.replacing:
        _print(f"replaced: {export.replacing:,} of the reports name an earlier report of their study")
    export.raise_for_failures()


def _quantize(arguments: argparse.Namespace) -> None:
    chosen = config.load(arguments.config, arguments.overrides, section="quantize").quantize
    from ray_cxr.models import quantization

    with _explain_write_errors(arguments.out):
        bundle = quantization.quantize(arguments.bundle, arguments.prepared, arguments.out, chosen, on_event=_print)
    _print(f"bundle: {bundle.location}")


def _recalibrate(arguments: argparse.Namespace) -> None:
    chosen = config.load(arguments.config, arguments.overrides, section="recalibrate").recalibrate
    from ray_cxr.models import recalibration

    bundle = recalibration.recalibrate(
        arguments.bundle, arguments.scores, arguments.labels, arguments.out, chosen, on_event=_print
    )
    made, points = bundle.info["provenance"]["recalibrated"], bundle.info["operating_points"]
    names = ("finding", "images", "positives", "flags above", "before", "flag rate", "before", "Brier", "before")
    table = Table(*names, title="Recalibration, on the images that it was fitted on")
    for name in bundle.findings:
        row, point, old = made["findings"][name], points[name], made["before"]["operating_points"][name]
        counts = f"{row['n']:,}", f"{row['positives']:,}"
        thresholds = (_format(used and used["threshold"], 4, "none") for used in (point, old))
        rates = (_format(row[key], 3, "none") for key in ("flag_rate", "flag_rate_before", "brier", "brier_before"))
        table.add_row(name, *counts, *thresholds, *rates)
    _print_table(table)
    _print_rule_notes(bundle.info["rule_notes"])
    _print(
        f"calibration by {made['method']} and operating points by {made['rule']}, from {made['images']:,} images of "
        f"{PatientCount(made['patients'], made.get('images_without_patient', 0))}: report on others"
    )
    _print(f"bundle: {bundle.location}")


def _import_weights(arguments: argparse.Namespace) -> None:
    with silence_stderr():
        from ray_cxr.models import importing

        if not str(arguments.weights).lower().endswith(".onnx"):
            from ray_cxr.models import classifier  # noqa: F401  -- imports TensorFlow, which prints

    options = importing.ImportOptions(
        outputs=None if arguments.findings is None else importing.parse_findings(arguments.findings),
        normalization=arguments.normalization,
        size=arguments.size,
        aspect=arguments.aspect,
        interpolation=arguments.interpolation,
        layout=arguments.input_layout,
        logits=arguments.logits,
    )
    bundle = importing.import_weights(arguments.weights, arguments.out, backbone=arguments.backbone, options=options)
    _print(f"outputs: {', '.join(bundle.findings)}")
    made = bundle.info["provenance"]
    if "dropped_names" in made:
        dropped = zip(made["dropped_outputs"], made["dropped_names"], strict=True)
        _print(f"outputs left out: {', '.join(name or f'number {number}' for number, name in dropped)}")
    if any(bundle.info["operating_points"].values()):
        _print("operating points as in the file; no calibration, so that the columns c_ of score tables will be null")
    else:
        _print("no calibration or operating points; those columns of score tables will be null")
    _print(f"bundle: {bundle.location}")


def _ensemble(arguments: argparse.Namespace) -> None:
    from ray_cxr.models import ensembles

    bundle = ensembles.build_ensemble(arguments.bundles, arguments.out)
    members = bundle.info["provenance"]["ensemble"]["findings"]
    _print(f"members per finding: {', '.join(f'{name} {count}' for name, count in members.items())}")
    _print("no calibration or operating points; score labelled images and run `ray-cxr recalibrate`")
    _print(f"bundle: {bundle.location}")


def _export_onnx(arguments: argparse.Namespace) -> None:
    with silence_stderr():
        from ray_cxr.models import classifier, onnx_export  # noqa: F401  -- imports TensorFlow, which prints

    with _explain_write_errors(arguments.out):
        drift = onnx_export.export_onnx(arguments.bundle, arguments.out)
    _print(f"largest difference from Keras on the golden images, in ONNX Runtime: {drift:.1g}")
    _print(f"model: {arguments.out}")


def _demo(arguments: argparse.Namespace) -> None:
    from ray_cxr import demo

    demo.run_demo(Path(arguments.out), main, _print, tune=arguments.tune)


@contextlib.contextmanager
def _explain_write_errors(out: str) -> Iterator[None]:
    if not out:
        raise ConfigError("--out: is empty; name a file or folder to write")
    try:
        yield
    except OSError as error:
        at = f" ({error.filename})" if error.filename and str(error.filename) != out else ""
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror or error}{at}") from None


def _parse_numbers(kind: type[_Number], text: str, option: str, what: str) -> list[_Number]:
    """Return comma-separated numbers; the error states what the option needs."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: needs {what}") from None


def _print_rule_notes(reasons: dict[str, str | None]) -> None:
    for name, reason in reasons.items():
        if reason:
            _print(f"{name}: {reason}")


def _print_table(table: Table) -> None:
    # Without a terminal, rich would fold tables at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 110)
    with console.capture() as captured:
        console.print(table)
    _print(captured.get().rstrip("\n"))


def _format(value: float | None, digits: int = 3, missing: str = "undefined") -> str:
    return missing if value is None else f"{value:.{digits}f}"


def _pick(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the named arguments, to pass them on as keyword arguments."""
    return {name: getattr(arguments, name) for name in names}


def _override(settings: _Settings, arguments: argparse.Namespace, *names: str) -> _Settings:
    """Return the settings with the values of the named arguments that the command line contains."""
    return settings.replace(**{name: value for name, value in _pick(arguments, *names).items() if value is not None})


_print = environment.write_output


if __name__ == "__main__":
    environment.configure_command()
    raise SystemExit(main())
