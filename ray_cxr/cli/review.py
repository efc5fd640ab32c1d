"""`review` and `reviews`."""

from __future__ import annotations

import argparse
import getpass
from collections import Counter
from typing import Any

from rich.table import Table

from ray_cxr import config, extras
from ray_cxr.cli.arguments import add_command, add_settings, any_path
from ray_cxr.cli.next_step import find_evaluated_split, list_pacs_options, place_next_to, print_next
from ray_cxr.cli.output import explain_write_errors, format_number, print_line, print_table, print_warnings
from ray_cxr.errors import ConfigError
from ray_cxr.progress import Stage
from ray_cxr.storage import remote


def add_commands(commands: Any) -> None:
    review = add_command(
        commands,
        "review",
        _review,
        "open a page to read the images of a score run and record verdicts",
        ["scores", "scores --blind --reader anna"],
    )
    review.add_argument("scores", type=any_path, metavar="SCORES", help="folder from score")
    labels_help = "manifest whose labels the page shows on request"
    review.add_argument("--manifest", "--labels", dest="labels", type=any_path, metavar="M.parquet", help=labels_help)
    boxes_help = "boxes that the page shows on request, as for report"
    review.add_argument("--boxes", type=any_path, metavar="CSV", help=boxes_help)
    review.add_argument("--port", type=int, metavar="PORT", help="port on this machine (8000, or a free one)")
    review.add_argument("--blind", action="store_true", help="hide the model's output of an image until it is decided")
    sample_help = "read N studies drawn at random, blind, for labels without selection"
    review.add_argument("--sample", type=int, metavar="N", help=sample_help)
    review.add_argument("--seed", type=int, default=0, metavar="N", help="seed of --sample (0)")
    review.add_argument("--reader", metavar="NAME", help="name in the verdicts (your user name)")
    add_settings(review, "pacs")

    reviews = add_command(
        commands,
        "reviews",
        _reviews,
        "make labels from the verdicts of a score run",
        ["scores --out labels.parquet", "scores --out labels.parquet --rule unanimous"],
    )
    reviews.add_argument("scores", type=any_path, metavar="SCORES", help="folder from score, with verdicts")
    reviews.add_argument(
        "--out", required=True, type=any_path, metavar="M.parquet", help="manifest with labels to write"
    )
    rule_help = "label if several readers differ: the value of most, or none unless all agree (majority)"
    reviews.add_argument("--rule", choices=["majority", "unanimous"], default="majority", help=rule_help)


def _review(arguments: argparse.Namespace) -> None:
    extras.require("starlette", "review")
    extras.require("uvicorn", "review")
    if arguments.port is not None and not 1 <= arguments.port <= 65535:
        raise ConfigError(f"--port {arguments.port}: must be from 1 to 65535")
    if arguments.sample is not None and arguments.sample < 1:
        raise ConfigError(f"--sample {arguments.sample}: must be at least 1")
    reader = _check_reader(arguments.reader or getpass.getuser())
    pacs = config.load(arguments.config, arguments.overrides, section="pacs").pacs
    with Stage("reading the scores", in_log=False):
        from ray_cxr.review import server
        from ray_cxr.review.index import Sample

        listener = server.open_socket(arguments.port)
        sample = None if arguments.sample is None else Sample(arguments.sample, arguments.seed)
        options: dict[str, Any] = {"is_blind": arguments.blind, "sample": sample}
        options |= {"boxes": arguments.boxes, "pacs": pacs}
        session = server.open_review(arguments.scores, reader, arguments.labels, **options)
        warning = server.check_images(session.index)
    print_warnings([warning] if warning else [])
    blind = ", blind" if session.is_blind else ""
    print_line(f"{session.sample or f'{len(session.index):,} studies'}, reader {reader}{blind}; Ctrl-C ends the page")
    try:
        server.serve(session, listener, lambda address: print_line(f"review: {address}"))
    finally:
        count = session.close()
    print_line(f"verdicts of this session: {count:,}{f' in {session.path}' if count else ''}")
    scores = remote.to_path(arguments.scores)
    if count:
        print_next("reviews", scores, "--out", place_next_to(scores, "labels.parquet"))
    else:
        print_next("review", scores, *list_pacs_options(pacs))


def _reviews(arguments: argparse.Namespace) -> None:
    with Stage("reading the verdicts", in_log=False):
        from ray_cxr.review.consensus import DISAGREEMENTS, write_reviews

    with explain_write_errors(arguments.out):
        reviews = write_reviews(arguments.scores, arguments.out, arguments.rule)
    table = Table(box=None, header_style="")
    for name in ("finding", "labels", "present", "undecided", "against model", "kappa", "pairs"):
        table.add_column(name, justify="left" if name == "finding" else "right")
    for name, found in reviews.findings.items():
        kappa = format_number(found.kappa, 2, "-")
        against = f"{found.against_model} of {found.compared}" if found.compared else "-"
        counts = (found.labels, found.present, found.undecided)
        table.add_row(name, *map(str, counts), against, kappa, str(found.pairs))
    print_table(table, optional=("pairs", "undecided"))
    print_warnings(reviews.facts.describe())
    if reviews.not_in_run:
        print_line(f"{reviews.not_in_run:,} verdicts left out: their image is not in {arguments.scores}")
    out = remote.to_path(arguments.out)
    kinds = Counter(found.kind for found in reviews.disagreements)
    print_line(
        f"disagreements: {kinds['model']:,} with the model, {kinds['readers']:,} between readers, "
        f"in {out.with_name(DISAGREEMENTS)}"
    )
    facts = reviews.facts
    print_line(
        f"labels: {facts.labels:,} of {facts.images:,} images by {facts.readers} readers ({facts.rule}), in {out}"
    )
    scores = remote.to_path(arguments.scores)
    split = find_evaluated_split(out, facts.images)
    options = ["--split", split] if split else []
    print_next("report", scores, "--manifest", out, *options, "--out", place_next_to(scores, "report"))


def _check_reader(name: str) -> str:
    if not name.isprintable() or not 1 <= len(name.strip()) <= 64:
        raise ConfigError("--reader: must be 1 to 64 printable characters")
    return name.strip()
