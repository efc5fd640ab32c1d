"""`manifest` and `prepare`."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from ray_cxr import config, costs, session
from ray_cxr.cli.arguments import (
    add_command,
    add_settings,
    any_address,
    any_path,
    label_table,
    parse_numbers,
    path_or_search,
    pick,
)
from ray_cxr.cli.dry_run import add_dry_run, print_cost
from ray_cxr.cli.next_step import place_next_to, print_next, suggest_after_manifest
from ray_cxr.cli.output import explain_write_errors, print_line
from ray_cxr.progress import Stage
from ray_cxr.storage import remote
from ray_cxr.storage.paths import is_dicomweb, redact


def add_commands(commands: Any) -> None:
    manifest = add_command(
        commands,
        "manifest",
        _manifest,
        "combine tables and a folder of images into one manifest",
        [
            "labels.csv --images images --split patient --out m.parquet",
            "train=a.csv val=b.csv test=c.csv --images images --out m.parquet",
        ],
    )
    tables_help = "CSV file of labels, .gz allowed; train=A.csv val=B.csv test=C.csv give the split by file"
    manifest.add_argument("tables", nargs="+", type=label_table, metavar="TABLE", help=tables_help)
    manifest.add_argument("--out", required=True, type=any_path, metavar="M.parquet", help="manifest to write")
    images_help = "location of the images, in any layout, or a search of a PACS"
    manifest.add_argument("--images", type=any_address, metavar="DIR_OR_URI", help=images_help)
    manifest.add_argument("--found-only", action="store_true", help="drop rows without an image file")
    split_help = "official: by NIH's two lists; patient: at random, by patient. Training needs a split"
    manifest.add_argument("--split", choices=["official", "patient"], help=split_help)
    lists = {"--train-val-list": "NIH's list of train and val images", "--test-list": "NIH's list of test images"}
    for option, text in lists.items():
        manifest.add_argument(option, type=any_path, metavar="F", help=f"{text}, for --split official")
    fractions_help = "train,val,test for --split patient (%(default)s)"
    manifest.add_argument("--fractions", default="0.7,0.1,0.2", metavar="X,Y,Z", help=fractions_help)
    manifest.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the split (0)")
    leak_help = "for patients in two splits: error (default), or drop their rows from train, then val"
    manifest.add_argument("--on-leak", choices=["error", "drop"], default="error", help=leak_help)
    add_settings(manifest, "pacs")

    prepare = add_command(
        commands,
        "prepare",
        _prepare,
        "decode and resize every image once, into Arrow files",
        ["m.parquet --out prepared", "m.parquet --out prepared --size 224,320"],
    )
    manifest_help = "manifest from ray-cxr manifest, or a search of a PACS"
    prepare.add_input("--manifest", metavar="M.parquet", dest="manifest", text=manifest_help, kind=path_or_search)
    prepare.add_argument("--out", required=True, type=any_path, metavar="PREPARED", help="folder to write")
    prepare.add_argument("--size", metavar="224[,320...]", help="sides in pixels; one prepared set each (224)")
    add_dry_run(prepare)
    add_settings(prepare, "prepare", "ray", "pacs")


def _manifest(arguments: argparse.Namespace) -> None:
    with Stage("reading the tables", in_log=False):
        from ray_cxr.data.manifest import write_manifest
        from ray_cxr.data.manifest_builder import build_manifest

    settings = config.load(arguments.config, arguments.overrides, section="pacs")
    fractions = parse_numbers(float, arguments.fractions, "--fractions", "three numbers, such as 0.7,0.1,0.2")
    with Stage("reading the tables"):
        table, report = build_manifest(
            arguments.tables,
            fractions=fractions,
            pacs=settings.pacs,
            **pick(arguments, "images", "split", "train_val_list", "test_list", "seed", "on_leak", "found_only"),
        )
    with explain_write_errors(arguments.out), Stage(f"writing {arguments.out}"):
        write_manifest(table, arguments.out)
    for line in report.lines():
        print_line(line)
    if warning := report.describe_missing_split():
        print_line(warning)
    print_line(f"manifest: {arguments.out}")
    suggest_after_manifest(
        arguments, has_images=bool(report.images_found), has_split="train" in report.by_split or not report.can_split
    )


def _prepare(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides, section="prepare")
    chosen = settings.prepare
    if arguments.size is not None:
        chosen = chosen.replace(sizes=parse_numbers(int, arguments.size, "--size", "pixels, such as 224 or 224,320"))
    with Stage("checking the manifest", in_log=False):
        from ray_cxr.data import manifest as manifests
        from ray_cxr.data import prepare_cost, prepared

    is_search = is_dicomweb(arguments.manifest)
    has_training_images = not is_search and manifests.has_split(arguments.manifest, "train")
    if not (has_training_images or is_search):
        remedy = "make it again with --split patient, or with train=, val= and test= tables"
        print_line(f"{arguments.manifest}: no images of split train, which training needs: {remedy}")
    if arguments.dry_run:
        with Stage("measuring with some of the images", in_log=False):
            cpus = costs.count_cpus(settings.ray.num_cpus)
            cost = prepare_cost.estimate_prepare(arguments.manifest, arguments.out, chosen, cpus, settings.pacs)
        print_cost(cost, arguments)
        return
    start = functools.partial(session.start_ray, settings.ray)
    out = remote.to_path(arguments.out)
    counts = prepared.prepare(arguments.manifest, arguments.out, chosen, start_ray=start, pacs=settings.pacs)
    for size, found in counts.items():
        codes = found.codes
        failed = codes.total() - codes["ok"]
        errors = ", ".join(f"{code} {count:,}" for code, count in codes.most_common() if code != "ok")
        flags = ", ".join(f"{flag} {count:,}" for flag, count in found.flags.most_common())
        detail = (f": {errors}" if errors else "") + (f"; flags: {flags}" if flags else "")
        print_line(f"size {size}: {codes['ok']:,} images, {failed:,} failed{detail}")
    written = sum(path.stat().st_size for size in counts for path in (out / str(size)).glob("part-*.arrow"))
    print_line(f"prepared: {arguments.out} ({costs.format_size(written)})")
    sizes = ["--set", f"size={min(counts)}"] if len(prepared.complete_sizes(out)) > 1 else []
    if is_search:
        with manifests.open_manifest(out / "manifest.parquet") as file:
            for note in manifests.describe_notes(file.metadata):
                print_line(f"{redact(arguments.manifest)}: {note}")
        print_next("score", "BUNDLE", "--prepared", out, "--out", place_next_to(out, "scores"))
    elif has_training_images:
        print_next("train", out, "--out", place_next_to(out, "run"), *sizes)
    else:
        print_next("manifest", "TABLE", "--out", remote.to_path(arguments.manifest), "--split", "patient")
