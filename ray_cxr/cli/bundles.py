"""Commands that make a bundle or export one: `import-weights`, `ensemble`, `quantize`, `recalibrate`, `export-onnx`."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from rich.table import Table

from ray_cxr import config
from ray_cxr.cli.arguments import add_command, add_settings, any_path, local_input
from ray_cxr.cli.next_step import suggest_score
from ray_cxr.cli.output import (
    explain_write_errors,
    format_number,
    print_line,
    print_rule_notes,
    print_table,
    print_warnings,
)
from ray_cxr.imaging.demographics import PatientCount
from ray_cxr.progress import Stage


def add_commands(commands: Any) -> None:
    quantize = add_command(
        commands,
        "quantize",
        _quantize,
        "add 8-bit weights, for `score --precision int8`",
        ["run/bundle prepared --out run/int8", "run/bundle prepared --out run/int8 --set images=500"],
    )
    bundle_help = "model, such as RUN/bundle of train"
    quantize.add_input("--bundle", metavar="BUNDLE", dest="bundle", text=bundle_help)
    prepared_help = "folder from prepare; has train and val images"
    quantize.add_argument("prepared", type=any_path, metavar="PREPARED", help=prepared_help)
    quantize.add_argument("--out", required=True, type=any_path, metavar="BUNDLE2", help="bundle to write")
    add_settings(quantize, "quantize")

    recalibrate = add_command(
        commands,
        "recalibrate",
        _recalibrate,
        "fit calibration and operating points to your own labels",
        [
            "run/bundle scores --manifest m.parquet --out local",
            "run/bundle scores --manifest m.parquet --out local2 --set min_positives=10",
        ],
    )
    recalibrate.add_input("--bundle", metavar="BUNDLE", dest="bundle", text=bundle_help)
    recalibrate.add_argument("scores", type=any_path, metavar="SCORES", help="folder from score with this BUNDLE")
    _add_labels(recalibrate)
    recalibrate.add_argument("--out", required=True, type=any_path, metavar="BUNDLE2", help="bundle to write")
    add_settings(recalibrate, "recalibrate")

    probe = add_command(
        commands,
        "probe",
        _probe,
        "fit a linear head on the features of scored images",
        ["scores --manifest m.parquet --out probe", "scores --manifest m.parquet --out probe2 --set folds=10"],
    )
    probe.add_argument("scores", type=any_path, metavar="SCORES", help="folder from score --features")
    _add_labels(probe)
    probe.add_argument("--out", required=True, type=any_path, metavar="BUNDLE2", help="bundle to write")
    probe.add_argument("--bundle", type=any_path, metavar="BUNDLE", help="model that wrote SCORES, if it has moved")
    add_settings(probe, "probe")

    ensemble = add_command(
        commands,
        "ensemble",
        _ensemble,
        "average the outputs of several bundles",
        ["run1/bundle run2/bundle --out ensemble", "run1/bundle run2/bundle run3/bundle --out ensemble3"],
    )
    ensemble.add_input("--bundle", metavar="BUNDLE", dest="bundles", text="models to average", nargs="+")
    ensemble.add_argument("--out", required=True, type=any_path, metavar="BUNDLE2", help="bundle to write")

    exporter = add_command(
        commands,
        "export-onnx",
        _export_onnx,
        "write a bundle as an ONNX file for other servers",
        ["run/bundle --out model.onnx", "--bundle study/bundle --out best.onnx"],
    )
    exporter.add_input("--bundle", metavar="BUNDLE", dest="bundle", text=bundle_help)
    exporter.add_argument("--out", required=True, type=any_path, metavar="F.onnx", help="file to write")

    importer = add_command(
        commands,
        "import-weights",
        _import_weights,
        "make a bundle of weights from Keras, PyTorch or ONNX",
        [
            "theirs.weights.h5 --backbone DenseNet121 --findings 14 --out theirs",
            "theirs.onnx --findings Mass,-,Nodule --logits --out theirs",
        ],
    )
    importer.add_argument(
        "weights", type=local_input, metavar="FILE", help="Keras, PyTorch or ONNX file, see docs/models.md"
    )
    importer.add_argument("--backbone", metavar="NAME", help="architecture of the weights; not for ONNX files")
    importer.add_argument("--out", required=True, type=any_path, metavar="BUNDLE", help="bundle to write")
    importer.add_argument(
        "--findings", metavar="LIST", help="outputs in order, comma-separated, - to leave one out; 14, 15: alphabetical"
    )
    importer.add_argument(
        "--normalization",
        metavar="RULE",
        help="of gray values: keras, imagenet, torchxrayvision, none; or MEAN,STD of gray from 0 to 1",
    )
    importer.add_argument("--size", type=int, metavar="N", help="side of its input, pixels (224)")
    importer.add_argument("--aspect", choices=("stretch", "pad", "crop"), help="for images that are not square")
    importer.add_argument(
        "--interpolation",
        choices=get_args(config.Interpolation),
        default="area",
        help="for images of another size (area)",
    )
    importer.add_argument("--input-layout", choices=("nchw", "nhwc"), help="axes of an ONNX file's input")
    importer.add_argument("--logits", action="store_true", help="the outputs of an ONNX file need a sigmoid")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    options: dict[str, Any] = {"type": any_path, "metavar": "M.parquet", "help": "manifest with the labels"}
    parser.add_argument("--manifest", "--labels", dest="labels", required=True, **options)


def _quantize(arguments: argparse.Namespace) -> None:
    chosen = config.load(arguments.config, arguments.overrides, section="quantize").quantize
    with Stage("checking the bundle", in_log=False):
        from ray_cxr.models import quantization

    with explain_write_errors(arguments.out), Stage("measuring the ranges of the layers"):
        bundle = quantization.quantize(arguments.bundle, arguments.prepared, arguments.out, chosen, on_event=print_line)
    print_line(f"bundle: {bundle.location}")
    suggest_score(arguments.out, arguments.prepared, "--precision", "int8")


def _recalibrate(arguments: argparse.Namespace) -> None:
    chosen = config.load(arguments.config, arguments.overrides, section="recalibrate").recalibrate
    with Stage("checking the bundle", in_log=False):
        from ray_cxr.evaluation import usability
        from ray_cxr.models import recalibration

    with Stage("fitting calibration and operating points"):
        bundle = recalibration.recalibrate(
            arguments.bundle, arguments.scores, arguments.labels, arguments.out, chosen, on_event=print_line
        )
    made, points = bundle.info["provenance"]["recalibrated"], bundle.info["operating_points"]
    names = ("finding", "images", "positives", "flags\nabove", "old", "flag\nrate", "old", "Brier", "old")
    title = "Recalibration, new and old, on the images that it was fitted on"
    table = Table(*names, title=title, show_edge=False, pad_edge=False)
    for name in bundle.findings:
        row, point, old = made["findings"][name], points[name], made["before"]["operating_points"][name]
        counts = f"{row['n']:,}", f"{row['positives']:,}"
        thresholds = (format_number(used and used["threshold"], 4, "none") for used in (point, old))
        rates = (
            format_number(row[key], 3, "none") for key in ("flag_rate", "flag_rate_before", "brier", "brier_before")
        )
        table.add_row(name, *counts, *thresholds, *rates)
    print_table(table, optional=("images", "positives"))
    print_rule_notes(bundle.info["rule_notes"])
    print_warnings(warning.describe() for warning in usability.warn_of_model(bundle.info))
    patients = PatientCount(made["patients"], made.get("images_without_patient", 0))
    print_line(
        f"calibration by {made['method']} and operating points by {made['rule']}, from "
        f"{patients.describe(made['images'])}: report on others"
    )
    print_line(f"bundle: {bundle.location}")
    suggest_score(arguments.out, None)


def _import_weights(arguments: argparse.Namespace) -> None:
    with Stage("reading the weights", in_log=False):
        from ray_cxr.models import importing

    options = importing.ImportOptions(
        outputs=None if arguments.findings is None else importing.parse_findings(arguments.findings),
        normalization=arguments.normalization,
        size=arguments.size,
        aspect=arguments.aspect,
        interpolation=arguments.interpolation,
        layout=arguments.input_layout,
        logits=arguments.logits,
    )
    with Stage("building and checking the model"):
        bundle = importing.import_weights(
            arguments.weights, arguments.out, backbone=arguments.backbone, options=options
        )
    print_line(f"outputs: {', '.join(bundle.findings)}")
    made = bundle.info["provenance"]
    if "dropped_names" in made:
        dropped = zip(made["dropped_outputs"], made["dropped_names"], strict=True)
        print_line(f"outputs left out: {', '.join(name or f'number {number}' for number, name in dropped)}")
    if any(bundle.info["operating_points"].values()):
        print_line(
            "operating points as in the file; no calibration, so that the columns c_ of score tables will be null"
        )
    else:
        print_line("no calibration or operating points; those columns of score tables will be null")
    print_line(f"bundle: {bundle.location}")
    suggest_score(arguments.out, None)


def _probe(arguments: argparse.Namespace) -> None:
    chosen = config.load(arguments.config, arguments.overrides, section="probe").probe
    with Stage("reading the features"):
        from ray_cxr.training import probe

    with explain_write_errors(arguments.out):
        bundle = probe.fit_probe(
            arguments.scores, arguments.labels, arguments.out, chosen, bundle=arguments.bundle, on_event=print_line
        )
    source, points = bundle.info["provenance"], bundle.info["operating_points"]
    table = Table("finding", "images", "positives", "AUROC", "strength", "operating point", title="Other patients")
    for name in bundle.findings:
        row, point = source["validation"]["findings"][name], points[name]
        counts = f"{row['n']:,}", f"{row['positives']:,}"
        strength = f"{source['probed']['strengths'][name]:g}"
        table.add_row(name, *counts, format_number(row["auroc"]), strength, format_number(point and point["threshold"]))
    print_table(table)
    print_rule_notes(bundle.info["rule_notes"])
    print_line(f"macro AUROC on other patients {format_number(source['validation']['macro_auroc'])}")
    print_line(f"bundle: {bundle.location}")
    suggest_score(arguments.out, None)


def _ensemble(arguments: argparse.Namespace) -> None:
    with Stage("checking the bundles", in_log=False):
        from ray_cxr.models import ensembles

    with Stage("building and checking the model"):
        bundle = ensembles.build_ensemble(arguments.bundles, arguments.out)
    members = bundle.info["provenance"]["ensemble"]["findings"]
    print_line(f"members per finding: {', '.join(f'{name} {count}' for name, count in members.items())}")
    print_line("no calibration or operating points; score labelled images and run `ray-cxr recalibrate`")
    print_line(f"bundle: {bundle.location}")
    suggest_score(arguments.out, None)


def _export_onnx(arguments: argparse.Namespace) -> None:
    with Stage("checking the bundle", in_log=False):
        from ray_cxr.models import onnx_export

    with explain_write_errors(arguments.out), Stage("exporting and checking the model"):
        drift = onnx_export.export_onnx(arguments.bundle, arguments.out)
    print_line(f"largest difference from Keras on the golden images, in ONNX Runtime: {drift:.1g}")
    print_line(f"model: {arguments.out}")
    suggest_score(arguments.bundle, None)
