"""`score`."""

from __future__ import annotations

import argparse
from typing import Any, get_args

import psutil
from rich.table import Table

from ray_cxr import config, session
from ray_cxr.cli.arguments import add_command, add_settings, any_address, any_path, override_settings, pick
from ray_cxr.cli.output import print_line, print_table
from ray_cxr.errors import ConfigError, ErrorRateExceeded


def add_commands(commands: Any) -> None:
    score = add_command(
        commands,
        "score",
        _score,
        "score images with Ray Data into a Parquet table, one row per image",
        ["run/bundle --images images --out scores", "run/bundle --manifest m.parquet --out scores --heatmaps 3"],
    )
    score.add_input("--bundle", "--model", metavar="BUNDLE", dest="model", text="model, such as RUN/bundle of train")
    score.add_argument("--out", required=True, type=any_path, metavar="SCORES", help="folder to write")
    source = score.add_mutually_exclusive_group(required=True)
    source.add_argument("--manifest", type=any_path, metavar="M.parquet", help="score the images of a manifest")
    images_help = "score all images below a folder or URI"
    source.add_argument("--images", type=any_address, metavar="DIR_OR_URI", help=images_help)
    score.add_argument("--fresh", action="store_true", help="start over; removes an earlier run's files in SCORES")
    score.add_argument("--retry-errors", action="store_true", help="read files again that failed temporarily")
    score.add_argument("--max-error-rate", type=float, metavar="R", help="exit with 3 if a larger share fails (0.5)")
    precisions = get_args(config.Precision)
    score.add_argument("--precision", choices=precisions, help="auto: bf16 if CPU and bundle support it, else fp32")
    score.add_argument("--heatmaps", type=int, metavar="K", help="also draw heat maps of each image's top K findings")
    score.add_argument("--limit", type=int, metavar="N", help="score only the first N rows")
    score.add_argument("--dry-run", action="store_true", help="check everything, count, write nothing")
    add_settings(score, "score", "ray", gpu=True)


def _score(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides, section="score")
    chosen = override_settings(settings.score, arguments, "max_error_rate", "precision")
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit}: must be at least 1")
    from ray_cxr.scoring.pipeline import score
    from ray_cxr.scoring.plan import ScoreRequest

    request = ScoreRequest(
        settings=chosen,
        use_gpu=arguments.gpu,
        started_at=psutil.Process().create_time(),  # includes the imports before this line
        **pick(
            arguments, "model", "out", "manifest", "images", "fresh", "retry_errors", "limit", "dry_run", "heatmaps"
        ),
    )
    too_many: ErrorRateExceeded | None = None
    try:
        report = score(request, start_ray=lambda: session.start_ray(settings.ray))
    except ErrorRateExceeded as error:
        too_many, report = error, error.report
    for note in report.notes:
        print_line(f"{arguments.images}: {note}")
    if arguments.dry_run:
        drawn = "" if report.heatmaps is None else f", heat maps of up to {report.heatmaps.to_draw:,} to draw"
        print_line(f"{report.rows:,} rows, {report.counts['to score']:,} of them to score{drawn}; nothing was written")
        return
    table = Table("result", "rows", title="Scores")
    for code, count in report.counts.most_common():
        table.add_row(code, f"{count:,}")
    print_table(table)
    if report.images_per_second is None:
        print_line(f"scores: {arguments.out} is already complete")
    else:
        print_line(
            f"scored {report.scored_now:,} images in {report.seconds:.0f} s "
            f"({report.images_per_second:.1f} images/s, start-up included)"
        )
        print_line(f"scores: {arguments.out}")
    if report.heatmaps is not None:
        for line in report.heatmaps.lines():
            print_line(line)
    if too_many is not None:
        raise too_many
