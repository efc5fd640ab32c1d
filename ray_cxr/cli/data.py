"""`manifest` and `prepare`."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from ray_cxr import config, session
from ray_cxr.cli.arguments import add_command, add_settings, any_path, local_input, parse_numbers, pick
from ray_cxr.cli.output import explain_write_errors, print_line


def add_commands(commands: Any) -> None:
    manifest = add_command(commands, "manifest", _manifest, "combine tables and a folder of images into one manifest")
    manifest.add_argument("tables", nargs="+", type=_table, metavar="TABLE", help="CSV, or train=A.csv test=B.csv.gz")
    manifest.add_argument("--out", required=True, type=any_path, metavar="M.parquet")
    manifest.add_argument("--images", metavar="DIR_OR_URI", help="location of the images, in any layout")
    manifest.add_argument("--found-only", action="store_true", help="drop rows without an image file")
    manifest.add_argument("--split", choices=["official", "patient"])
    manifest.add_argument("--train-val-list", type=local_input, metavar="F")
    manifest.add_argument("--test-list", type=local_input, metavar="F")
    manifest.add_argument("--fractions", default="0.7,0.1,0.2", help="train,val,test for --split patient (%(default)s)")
    manifest.add_argument("--seed", type=int, default=0)
    manifest.add_argument("--on-leak", choices=["error", "drop"], default="error", help="for patients in two splits")

    prepare = add_command(commands, "prepare", _prepare, "decode and resize every image once, into Parquet")
    prepare.add_argument("manifest", type=any_path, metavar="M.parquet")
    prepare.add_argument("--out", required=True, type=any_path, metavar="PREPARED")
    prepare.add_argument("--size", metavar="224[,320...]", help="sides in pixels; one prepared set each")
    add_settings(prepare)


def _table(text: str) -> str:
    """Argument type: a table on this machine, or `train=TABLE`, `val=TABLE`, `test=TABLE`."""
    local_input(text.partition("=")[2] or text)
    return text


def _manifest(arguments: argparse.Namespace) -> None:
    from ray_cxr.data.manifest import write_manifest
    from ray_cxr.data.manifest_builder import build_manifest

    fractions = parse_numbers(float, arguments.fractions, "--fractions", "three numbers, such as 0.7,0.1,0.2")
    table, report = build_manifest(
        arguments.tables,
        fractions=fractions,
        **pick(arguments, "images", "split", "train_val_list", "test_list", "seed", "on_leak", "found_only"),
    )
    with explain_write_errors(arguments.out):
        write_manifest(table, arguments.out)
    for line in report.lines():
        print_line(line)
    print_line(f"manifest: {arguments.out}")


def _prepare(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config, arguments.overrides, section="prepare")
    chosen = settings.prepare
    if arguments.size is not None:
        chosen = chosen.replace(sizes=parse_numbers(int, arguments.size, "--size", "pixels, such as 224 or 224,320"))
    from ray_cxr.data import prepared

    start = functools.partial(session.start_ray, settings.ray)
    counts = prepared.prepare(arguments.manifest, arguments.out, chosen, start_ray=start)
    for size, found in counts.items():
        codes = found.codes
        failed = codes.total() - codes["ok"]
        errors = ", ".join(f"{code} {count:,}" for code, count in codes.most_common() if code != "ok")
        flags = ", ".join(f"{flag} {count:,}" for flag, count in found.flags.most_common())
        detail = (f": {errors}" if errors else "") + (f"; flags: {flags}" if flags else "")
        print_line(f"size {size}: {codes['ok']:,} images, {failed:,} failed{detail}")
    print_line(f"prepared: {arguments.out}")
