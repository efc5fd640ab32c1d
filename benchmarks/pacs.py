"""Compare the speed of `ray-cxr score` from a PACS with the same files on disk, and with a bare loop. Linux only.

    .venv/bin/python benchmarks/pacs.py --work DIR --out pacs.json

The PACS is Orthanc with its DICOMweb plugin on this machine (`scripts/services pacs`), started by this script on free
ports, with its storage in DIR. Every contestant scores the same DICOM files with the same model (random weights):
radiographs of 1024 x 1024, three in ten as JPEG 2000 or RLE. In every round each contestant runs alone, in a new
process, and another contestant starts.

    pacs     score --images dicomweb+http://..., with --parallel requests at a time and no limit per second
    disk     score --images FOLDER
    loop     a bare program: dicomweb-client's `retrieve_instance`, pydicom's `pixel_array`, Keras `predict` in batches

Steady, first and whole are those of benchmarks/scoring.py. Orthanc runs on the same cores as the contestants: it serves
an image of 1 MB in about 3 ms. All files remain in DIR and are used again. Exit codes: 0 done; 1 a contestant failed,
or two of them computed different probabilities; 2 wrong arguments.
"""

# Child processes run this file: the top imports only the library and the harness.
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from harness import (
    POSITIVE,
    ROOT,
    BenchmarkError,
    Channel,
    ask_child,
    compare_rounds,
    create_console,
    create_parser,
    format_bar,
    format_spread,
    interleave,
    log,
    read_load,
    run_script,
)
from scoring import SAME, Workspace, get_first_image_seconds, run_ours, steady

sys.path.insert(0, str(ROOT / "tests"))

DATE = "20260105"
#: Images per forward pass of the loop.
BATCH = 16
TITLES = {"pacs": "ray-cxr score, PACS", "disk": "ray-cxr score, disk", "loop": "bare loop, PACS"}
#: (contestant, rival, what): ratios without bars, because a machine's disk and network differ.
PAIRS = [("pacs", "disk", "steady"), ("pacs", "disk", "whole"), ("pacs", "loop", "steady"), ("pacs", "loop", "whole")]


def score_in_loop(spec: dict[str, Any], channel: Channel) -> None:
    """Score the instances of a PACS as a short script would: one after the other, in one thread."""
    import cv2
    from dicomweb_client.api import DICOMwebClient
    from dicomweb_client.session_utils import create_session_from_user_pass

    from ray_cxr.models.bundle import load_bundle

    channel.end_stage("imports")
    bundle = load_bundle(spec["bundle"])
    model, size = bundle.model(), bundle.input_spec.size
    channel.end_stage("model")
    client = DICOMwebClient(spec["root"], session=create_session_from_user_pass(*spec["login"]))
    listed = client.search_for_instances(limit=spec["images"])
    names, found = [], []
    for start in range(0, len(listed), BATCH):
        batch = []
        for entry in listed[start : start + BATCH]:
            study, series, name = (entry[tag]["Value"][0] for tag in ("0020000D", "0020000E", "00080018"))
            # By default the client asks for uncompressed pixels, which this Orthanc cannot make of JPEG 2000.
            image = client.retrieve_instance(study, series, name, media_types=(("application/dicom", "*"),))
            batch.append(cv2.resize(image.pixel_array, (size, size), interpolation=cv2.INTER_AREA))
            names.append(name)
        found.append(model.predict(np.stack(batch), batch_size=BATCH, verbose=0))
        channel.count_images(len(batch))
    columns = [f"p_{name}" for name in bundle.findings]
    pd.DataFrame(np.concatenate(found), columns=columns).assign(image_id=names).to_parquet(spec["out"])
    channel.answer()


def prepare_files(folder: Path, images: int) -> Path:
    """Write the DICOM files once and return their folder."""
    from pacs_images import make_night

    out = folder / f"dicom-{images}"
    if len(list(out.glob("*.dcm"))) != images:
        log(f"making {out}")
        out.mkdir(parents=True, exist_ok=True)
        for instance in make_night(DATE, images, size=1024, plain=True):
            (out / f"{instance.uid}.dcm").write_bytes(instance.data)
    return out


def parse_arguments() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--work", type=Path, help="folder for the files of this benchmark")
    parser.add_argument("--images", default=400, help="images of pacs and disk (400)", **POSITIVE)
    parser.add_argument("--loop-images", default=160, help="images of the loop (160)", **POSITIVE)
    parser.add_argument("--rounds", default=3, help="rounds (3)", **POSITIVE)
    parser.add_argument("--parallel", default=4, help="requests at a time (4, the default of `score`)", **POSITIVE)
    parser.add_argument("--backbone", default="DenseNet121", help="architecture of the model (DenseNet121)")
    parser.add_argument("--size", default=224, help="side of its input in pixels (224)", **POSITIVE)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of ours; the loop has fp32")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=[*TITLES], help="contestants (all)")
    arguments = parser.parse_args()
    if not arguments.child and arguments.work is None:
        parser.error("--work is required")
    return arguments


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Run every contestant in every round, and print the speeds and their ratios."""
    from orthanc import PASSWORD, USER, is_installed, run_orthanc

    if not is_installed():
        raise BenchmarkError("Orthanc is not installed: run `scripts/services pacs` as root")
    workspace = Workspace(arguments.work, ROOT.parent / "shared", arguments.backbone, arguments.size)
    bundle, files = workspace.bundle("fp32"), prepare_files(arguments.work, arguments.images)
    (workspace.folder / "out").mkdir(exist_ok=True)
    rounds: dict[str, list[dict[str, Any]]] = {key: [] for key in arguments.only}
    result["load_before"] = read_load()
    with run_orthanc(arguments.work / "orthanc") as pacs:
        pacs.upload(path.read_bytes() for path in sorted(files.iterdir()))
        if pacs.count() != arguments.images:
            raise BenchmarkError(f"{arguments.work / 'orthanc'}: holds {pacs.count()} images; remove this folder")
        sources = {
            "bundle": str(bundle),
            "disk": str(files),
            "root": pacs.root,
            "pacs": f"dicomweb+{pacs.root}?StudyDate={DATE}&ModalitiesInStudy=DX",
            "login": (USER, PASSWORD),
            "credentials": str(pacs.write_credentials(arguments.work / "netrc")),
        }
        for number, key in interleave(arguments.only, arguments.rounds):
            measured = run_contestant(key, arguments, workspace, sources)
            rounds[key].append(measured)
            log(f"round {number + 1} of {arguments.rounds}: {key}: {measured['wall_s']:.0f} s")
    result["load_after"] = read_load()
    result["contestants"] = rounds
    result["difference"] = compare_probabilities(arguments.work / "out", arguments.only)
    result["ratios"] = []
    for ours, theirs, what in PAIRS:
        values = [[one[what] for one in rounds.get(key, [])] for key in (ours, theirs)]
        if all(values) and None not in values[0] + values[1]:
            ratio = compare_rounds(*values)
            result["ratios"].append({"contestant": ours, "rival": theirs, "what": what, **ratio})
    show(arguments, result)


def run_contestant(
    key: str, arguments: argparse.Namespace, workspace: Workspace, sources: dict[str, Any]
) -> dict[str, Any]:
    """Run one contestant once; its scores go to the folder `out` of the workspace."""
    path, out = workspace.logs / f"{key}.log", workspace.folder / "out" / key
    images = min(arguments.loop_images, arguments.images) if key == "loop" else arguments.images
    if key == "loop":
        images -= images % BATCH if images >= BATCH else 0  # whole batches, so that Keras traces its graph once
        spec = {"kind": "loop", "bundle": sources["bundle"], "root": sources["root"], "login": sources["login"]}
        answer = ask_child(__file__, {**spec, "images": images, "out": f"{out}.parquet"}, path)
    else:
        options = ["--model", sources["bundle"], "--images", sources[key], "--precision", arguments.precision]
        options += ["--set", "rows_per_file=32"]
        if key == "pacs":
            limits = (f"parallel={arguments.parallel}", "per_second=10000", f"credentials={sources['credentials']}")
            options += [word for limit in limits for word in ("--set", f"pacs.{limit}")]
        answer = run_ours(options, out, path)
    speeds = {
        "images": images,
        "first": get_first_image_seconds(answer),
        "steady": steady(answer["marks"]),
        "whole": images / answer["wall_s"],
    }
    return speeds | {name: answer[name] for name in ("wall_s", "stages", "marks") if name in answer}


def compare_probabilities(out: Path, keys: Sequence[str]) -> float:
    """Return the largest difference between two contestants in a probability of the same image.

    Raises:
        BenchmarkError: another model or other images: they differ by more than `SAME`, or have no image in common.
    """
    tables = [pd.read_parquet(out / (f"{key}.parquet" if key == "loop" else f"{key}/scores")) for key in keys]
    largest = 0.0
    for table in tables:
        table.index = table["image_id"].str.removesuffix(".dcm")
    for key, table in zip(keys[1:], tables[1:], strict=True):
        both = table.index.intersection(tables[0].index)
        names = [name for name in table.columns if name.startswith("p_")]
        largest = max(largest, float(np.abs(table.loc[both, names] - tables[0].loc[both, names]).to_numpy().max()))
        if len(both) == 0 or not largest <= SAME:
            raise BenchmarkError(f"{key}: {len(both)} images in common, a probability differs by {largest:.3g}")
    return largest


def show(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    from rich.table import Table

    console = create_console()
    title = f"{arguments.backbone} at {arguments.size}, {arguments.precision}, {arguments.rounds} rounds"
    table = Table(title=f"{title}: median (min to max)")
    table.add_column("contestant", no_wrap=True)
    for name in ("images", "steady, images/s", "first image, s", "whole, images/s", "whole, s"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, rounds in result["contestants"].items():
        spreads = [format_spread([one[name] for one in rounds]) for name in ("steady", "first", "whole", "wall_s")]
        table.add_row(TITLES[key], str(rounds[0]["images"]), *spreads)
    console.print(table)
    for one in result["ratios"]:
        spread = f"{min(one['ratios']):.2f} to {max(one['ratios']):.2f}"
        console.print(format_bar(f"{one['what']}: {one['contestant']} / {one['rival']} ({spread})", one["ratio"], None))
    console.print(
        f"largest difference in a probability: {result['difference']:.2g}; "
        f"load {result['load_before']:.1f} before and {result['load_after']:.1f} after"
    )


if __name__ == "__main__":
    sys.exit(run_script(parse_arguments, measure, {"loop": score_in_loop}))
