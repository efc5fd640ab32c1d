"""`report` and `export-sr`."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from ray_cxr import config
from ray_cxr.cli.arguments import add_command, add_settings, any_address, any_path, pick
from ray_cxr.cli.next_step import list_pacs_options, place_next_to, print_next, suggest_after_report
from ray_cxr.cli.output import explain_write_errors, format_number, print_line, print_table, print_warnings
from ray_cxr.errors import ConfigError
from ray_cxr.imaging.demographics import PatientCount, count_of
from ray_cxr.progress import Stage
from ray_cxr.storage import remote


def add_commands(commands: Any) -> None:
    report = add_command(
        commands,
        "report",
        _report,
        "make a report of scores, with metrics if there are labels",
        [
            "scores --manifest m.parquet --split test --out report",
            "'nights/*' --out report",
        ],
    )
    scores_help = "folder from score, several of one model (nights), or a Parquet with image_id and p_<Finding>"
    report.add_argument("scores", type=any_path, metavar="SCORES", nargs="+", help=scores_help)
    report.add_argument("--out", required=True, type=any_path, metavar="REPORT", help="folder to write")
    labels_help = "manifest with labels, to evaluate the scores"
    report.add_argument("--manifest", "--labels", dest="labels", type=any_path, metavar="M.parquet", help=labels_help)
    split_help = "evaluate this split (without: all images, if none trained the model); external: of another hospital"
    report.add_argument("--split", choices=["train", "val", "test", "external"], help=split_help)
    report.add_argument("--consensus", type=any_path, metavar="TABLE", help="labels of readers, CSV or from reviews")
    boxes_help = "compare heat maps with boxes as in BBox_List_2017, in pixels of the original images"
    report.add_argument("--boxes", type=any_path, metavar="CSV", help=boxes_help)
    report.add_argument("--compare", type=any_path, metavar="SCORES2", help="other scores of the same images")
    prevalence_help = "lines such as Effusion = 0.12, for PPV and NPV"
    report.add_argument("--prevalence", type=any_path, metavar="F.toml", help=prevalence_help)
    csv_help = "also write REPORT/scores.csv: one row per image with scores, flags and labels, for spreadsheets"
    report.add_argument("--csv", action="store_true", help=csv_help)
    add_settings(report, "pacs")

    export = add_command(
        commands,
        "export-sr",
        _export_sr,
        "write DICOM Structured Reports, one per study, and send them to a PACS",
        ["scores --out reports --heatmaps", "scores --out reports --send dimse://PACS@10.0.0.7:104"],
    )
    export.add_argument("scores", type=any_path, metavar="SCORES", help="folder from score; reads its DICOM files")
    export.add_argument("--out", required=True, type=any_path, metavar="DIR", help="holds patients' names and ids")
    export.add_argument(
        "--replaces",
        type=any_path,
        metavar="DIR2",
        help="earlier export whose documents the new ones replace",
    )
    maps_help = "also export the heat maps of flagged findings, as Secondary Captures"
    export.add_argument("--heatmaps", action="store_true", help=maps_help)
    send_help = "store the documents in a PACS: dicomweb+https://HOST/ROOT or dimse://AET@HOST:PORT"
    export.add_argument("--send", type=any_address, metavar="PACS", help=send_help)
    export.add_argument("--resend", action="store_true", help="also send what the PACS has stored already")
    add_settings(export, "pacs")


def _report(arguments: argparse.Namespace) -> None:
    pacs = config.load(arguments.config, arguments.overrides, section="pacs").pacs
    with Stage("reading the scores", in_log=False):
        from ray_cxr.data.review_facts import read_caveats
        from ray_cxr.evaluation import usability
        from ray_cxr.reporting import report
        from ray_cxr.reporting.flagged import FlagCount

    with explain_write_errors(arguments.out):
        options = pick(arguments, "labels", "split", "consensus", "boxes", "compare", "prevalence", "csv")
        metrics = report.write_report(arguments.scores, arguments.out, pacs=pacs, **options)
    macro = metrics["macro"]
    print_warnings(usability.Warned(**warning).describe() for warning in metrics["warnings"])
    if metrics["images_not_read"]:
        print_warnings([metrics["images_not_read"]])
    for labels in filter(None, (arguments.labels, arguments.consensus)):
        print_warnings(read_caveats(labels))
    if macro and macro["auroc"] is not None and macro["headline_reason"] is None:
        low, high = (format_number(macro[f"auroc_interval_{end}"]) for end in ("low", "high"))
        print_line(
            f"macro AUROC {macro['auroc']:.3f} ({low} to {high}) "
            f"over {len(macro['findings'])} findings, "
            f"{PatientCount(metrics['n_patients'], metrics['images_without_patient']).describe(metrics['n_images'])}"
        )
    flagged = metrics["flagged"]
    counted = FlagCount.from_json(flagged["any_finding"]).describe() if flagged["any_finding"] else None
    print_line(f"flagged: {counted or 'unknown, because ' + flagged['reason']}")
    look = f"{flagged['need_look']:,} of {count_of(flagged['images'], 'image')}"
    print_line(f"need a look: {look} (flagged, with a quality flag, or not scored)")
    if metrics["nights"]:
        print_line(metrics["nights"]["words"])
    print_line(f"report: {remote.to_path(arguments.out) / 'report.html'}")
    nights = [night["source"] for night in metrics["nights"]["by_night"]] if metrics["nights"] else []
    suggest_after_report(arguments, nights or arguments.scores, list_pacs_options(pacs))


def _export_sr(arguments: argparse.Namespace) -> None:
    if not arguments.out:
        raise ConfigError("--out: is empty; name a folder to write")
    if arguments.resend and not arguments.send:
        raise ConfigError("--resend: needs --send PACS")
    settings = config.load(arguments.config, arguments.overrides, section="pacs").pacs
    with Stage("reading the scores", in_log=False):
        from ray_cxr.reporting import dicom_sr, sending

    if arguments.send:
        sending.check_destination(arguments.send)
    export = dicom_sr.export_sr(
        arguments.scores, arguments.out, arguments.replaces, with_heatmaps=arguments.heatmaps, pacs=settings
    )
    for outcome, text in dicom_sr.OUTCOME_TEXTS.items():
        if export.outcomes[outcome]:
            print_line(f"{export.outcomes[outcome]:,} {text}")
    partial = f", {export.partial:,} of them without an image of their study" if export.partial else ""
    print_line(f"reports: {export.reports:,} in {arguments.out}{partial}; {export.written:,} written now")
    if arguments.replaces or export.replacing:
        print_line(f"replaced: {export.replacing:,} of the reports name an earlier report of their study")
    for outcome, text in dicom_sr.CAPTURE_TEXTS.items():
        if export.captures and export.captures[outcome]:
            print_line(f"heat maps: {export.captures[outcome]:,} {text}")
    if export.captures is not None and not export.captures:
        print_line("heat maps: 0, because no finding is flagged")
    lost = _send(arguments, settings) if arguments.send else []
    export.raise_for_failures(*lost)
    scores = remote.to_path(arguments.scores)
    print_next("report", scores, "--out", place_next_to(scores, "report"), *list_pacs_options(settings))


def _send(arguments: argparse.Namespace, settings: config.PacsSettings) -> list[str]:
    """Send the documents, and print what the PACS did with them; return a sentence if it did not store all."""
    from ray_cxr.reporting import sending

    sent = sending.send(
        remote.to_path(arguments.out),
        arguments.send,
        settings,
        with_heatmaps=arguments.heatmaps,
        resend=arguments.resend,
    )
    table = Table("documents", *sending.STATUSES, "stored earlier", title=f"Sent to {sent.destination}")
    for kind in (sending.REPORT, sending.HEAT_MAP)[: 1 + arguments.heatmaps]:
        counts = [sent.counts[kind, status] for status in sending.STATUSES]
        table.add_row(f"{kind}s", *(f"{count:,}" for count in [*counts, sent.earlier[kind]]))
    print_table(table)
    for (status, message), count in sorted(sent.messages.items()):
        print_line(f"{count:,} {status}: {message}")
    if sent.unsent_predecessors:
        print_line(
            f"{sent.unsent_predecessors:,} reports name an earlier report that was not sent there from "
            f"{arguments.replaces or arguments.out}"
        )
    if not (lost := sent.count_lost()):
        return []
    return [f"{lost:,} of {sent.total:,} documents are not stored in {sent.destination}; {sending.TABLE} lists them"]
