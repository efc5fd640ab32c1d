"""`score`."""

from __future__ import annotations

import argparse
from typing import Any, get_args

import psutil
import pyarrow.dataset
from rich.table import Table

from ray_cxr import config, costs, session
from ray_cxr.cli.arguments import add_command, add_settings, any_address, any_path, override_settings, pick
from ray_cxr.cli.dry_run import add_dry_run, print_cost
from ray_cxr.cli.next_step import list_pacs_options, suggest_after_nothing, suggest_report
from ray_cxr.cli.output import print_line, print_table, print_warnings
from ray_cxr.errors import RETRYABLE_CODES, ConfigError, ErrorRateExceeded
from ray_cxr.labels import NO_FINDING
from ray_cxr.progress import Stage
from ray_cxr.storage import remote, run_folder


def add_commands(commands: Any) -> None:
    score = add_command(
        commands,
        "score",
        _score,
        "score images into a Parquet table, one row per image",
        ["run/bundle --images images --out scores", "run/bundle --manifest m.parquet --out scores --heatmaps 3"],
    )
    score.add_input("--bundle", "--model", metavar="BUNDLE", dest="model", text="model, such as RUN/bundle of train")
    score.add_argument("--out", required=True, type=any_path, metavar="SCORES", help="folder to write")
    source = score.add_choice()
    source.add_argument("--manifest", type=any_path, metavar="M.parquet", help="score the images of a manifest")
    images_help = "score all images below a folder or URI, or those that a search of a PACS finds"
    source.add_argument("--images", type=any_address, metavar="DIR_OR_URI", help=images_help)
    source.add_argument("--prepared", type=any_path, metavar="PREPARED", help="folder from prepare; decodes nothing")
    score.add_argument("--fresh", action="store_true", help="start over; removes an earlier run's files in SCORES")
    score.add_argument("--retry-errors", action="store_true", help="read files again that failed temporarily")
    score.add_argument("--max-error-rate", type=float, metavar="R", help="exit with 3 if a larger share fails (0.5)")
    precisions = get_args(config.Precision)
    score.add_argument("--precision", choices=precisions, help="auto: bf16 if CPU and bundle support it, else fp32")
    maps_help = "also draw heat maps: of the K highest findings of each image and of all flagged ones"
    score.add_argument("--heatmaps", type=int, metavar="K", help=maps_help)
    score.add_argument("--features", action="store_true", help="also write each image's pooled features, for probe")
    score.add_argument("--limit", type=int, metavar="N", help="score only the first N rows")
    skip_help = "leave out images with scores of the same model in earlier folders, or patterns such as 'nights/*'"
    score.add_argument("--skip-scored", type=any_path, nargs="+", default=[], metavar="SCORES", help=skip_help)
    add_dry_run(score)
    add_settings(score, "score", "ray", "pacs", gpu=True)


def _score(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides, section="score")
    chosen = override_settings(settings.score, arguments, "max_error_rate", "precision")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: must be at least 1")
    with Stage("checking the model and the input", in_log=False):
        from ray_cxr.scoring.pipeline import score
        from ray_cxr.scoring.plan import ScoreRequest, plan_run

    request = ScoreRequest(
        settings=chosen,
        use_gpu=arguments.gpu,
        started_at=psutil.Process().create_time(),  # includes the imports before this line
        **pick(arguments, "model", "out", "manifest", "images", "prepared", "fresh", "retry_errors"),
        **pick(arguments, "limit", "heatmaps", "features"),
        skip_scored=tuple(arguments.skip_scored),
        pacs=settings.pacs,
    )
    if arguments.dry_run:
        with Stage("measuring with some of the images", in_log=False):
            from ray_cxr.evaluation import usability
            from ray_cxr.scoring.cost import estimate_score

            plan = plan_run(request)
            cost = estimate_score(plan, costs.count_cpus(settings.ray.num_cpus))
        for note in plan.rows.notes:
            print_line(f"{request.origin}: {note}")
        for line in plan.rows.selection.list_lines() if plan.rows.selection else ():
            print_line(line)
        print_warnings(warning.describe() for warning in usability.warn_of_model(plan.bundle.info))
        print_cost(cost, arguments)
        return
    if arguments.gpu:
        session.require_gpu(settings.ray)
    too_many: ErrorRateExceeded | None = None
    try:
        report = score(request, start_ray=lambda: session.start_ray(settings.ray))
    except ErrorRateExceeded as error:
        too_many, report = error, error.report
    for note in report.notes:
        print_line(f"{request.origin}: {note}")
    left_out = report.selection.list_lines() if report.selection else []
    if not report.rows:
        print_line(f"nothing to score, and nothing was written to {arguments.out}: {'; '.join(left_out)}")
        folders = report.selection.skip_scored if report.selection else []
        suggest_after_nothing(arguments, folders, list_pacs_options(settings.pacs))
        return
    for line in left_out:
        print_line(line)
    table = Table("result", "rows", title="Scores")
    for code, count in report.counts.most_common():
        table.add_row(code, f"{count:,}")
    print_table(table)
    if report.images_per_second is not None:
        what = "scored {:,} images" if report.counts["ok"] else "tried {:,} images, and scored none,"
        print_line(
            f"{what.format(report.scored_now)} in {report.seconds:.0f} s "
            f"({report.images_per_second:.1f} images/s, start-up included)"
        )
    if (waits := report.describe_waits(jit_compile=chosen.jit_compile)) is not None:
        print_line(waits)
    temporary = sum(report.counts[code] for code in RETRYABLE_CODES)
    if temporary and arguments.prepared is None:
        print_line(f"{temporary:,} rows have errors that can pass; to read these images again, add --retry-errors")
    if report.heatmaps is not None:
        for line in report.heatmaps.lines():
            print_line(line)
    _print_flagged(arguments.out)
    if report.heatmaps is not None:
        from ray_cxr.evaluation.usability import warn_of_empty_maps

        drawn = report.heatmaps.flagged - report.heatmaps.flagged_without_map
        method = settings.score.heatmap_method
        print_warnings(w.describe() for w in warn_of_empty_maps(report.heatmaps.flagged_empty, drawn, method))
    has_changed = report.scored_now or (report.heatmaps is not None and report.heatmaps.drawn_now)
    print_line(f"scores: {arguments.out}" + ("" if has_changed else " is already complete"))
    if too_many is not None:
        raise too_many
    labels = arguments.manifest or (arguments.prepared and str(remote.to_path(arguments.prepared) / "manifest.parquet"))
    suggest_report(arguments.out, labels, report.rows, list_pacs_options(settings.pacs))


def _print_flagged(out: str) -> None:
    """Print how many images, studies and patients are flagged for any finding."""
    with Stage("counting flagged images"):
        from ray_cxr.evaluation import usability
        from ray_cxr.reporting.flagged import FlagCount, explain_no_flags, identify_studies
        from ray_cxr.reporting.leakage import count_shared, warn_of_training
        from ray_cxr.reporting.scores import Location, read_training_images

        store, _ = remote.to_arrow(remote.to_path(out))
        parts = [remote.to_arrow(part)[1] for part in (remote.to_path(out) / "scores").glob("part-*.parquet")]
        data = pyarrow.dataset.dataset(parts, format="parquet", filesystem=store)
        names = [name for name in data.schema.names if name.startswith("flag_") and name != f"flag_{NO_FINDING}"]
        table = data.to_table(columns=["image_id", "patient_id", "study_id", "status", *names])
        flags = {name.removeprefix("flag_"): table[name].cast("int8").fill_null(-1).to_numpy() for name in names}
        any_flag = usability.flag_any(flags, len(table))
        patients, studies, status = (table[name].to_numpy() for name in ("patient_id", "study_id", "status"))
        found = FlagCount.count(any_flag, identify_studies(studies, patients), patients)
        ok = status == "ok"
        training = read_training_images(Location.of(str(remote.to_path(out) / "split.parquet")))
        ids, flagged = table["image_id"].to_numpy(), any_flag == 1
        shared = count_shared(training, ids[ok], patients[ok], patients[ok], flagged[ok], is_complete=True)
    if found.n:
        print_line(f"flagged: {found.describe()}")
    else:
        print_line(f"flagged: unknown, because {explain_no_flags(int((status == 'ok').sum()))}")
    print_warnings(warning.describe() for warning in warn_of_training(shared, int(ok.sum())))
    points = run_folder.read_json(remote.to_path(out) / "model.json").get("operating_points") or {}
    rules = {point.get("rule") for point in points.values() if point}
    rule = rules.pop() if len(rules) == 1 else None
    print_warnings(warning.describe() for warning in usability.warn_of_flags(flags, rule))
