"""Compare bulk scoring of a torchxrayvision DenseNet with that library's own batch loop, on this machine. Linux only.

    .venv/bin/python benchmarks/models.py --work DIR --torch .torch/bin/python --out models.json

`--torch` names a Python with torch, torchvision and torchxrayvision; scripts/services makes one. The model has
random weights, because published ones are downloads: its speed is real, its probabilities are meaningless, but equal.

    ours, ours-bf16   `ray-cxr score` of the imported bundle, in fp32 and in the precision that it chooses
    library           torchxrayvision in float32: its steps (centre crop, resize with scikit-image), a DataLoader with
                      one process per processor, batches of 16
    ensemble          `ray-cxr score` of an ensemble of three members
    three             `ray-cxr score` of the three members, one after the other

Rates are images over the time of the whole process, start to end. Differences are those of probabilities between `ours`
in fp32 and the library, which resizes in floating point.
"""

# The child process runs this file in a Python without ray_cxr: the top imports only the library and the harness.
from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from harness import (
    POSITIVE,
    Channel,
    ask_child,
    compare_rounds,
    create_console,
    create_parser,
    format_bar,
    format_spread,
    interleave,
    log,
    run_command,
    run_script,
)

OUTPUTS = 18
BATCH = 16
#: In the work folder: the latest scores of `ours`.
FP32 = "scores-fp32"
#: Our score should not be slower than the library's loop, and an ensemble not slower than its members one by one.
BAR = 1.0


def make_models(spec: dict[str, Any], channel: Channel) -> None:
    """Save three models with random weights and BatchNorm statistics, as docs/models.md describes."""
    import safetensors.torch
    import torch
    import torchxrayvision as xrv

    about = {"source": "torchxrayvision", "outputs": xrv.models.DenseNet.targets, "size": 224}
    for number in range(3):
        torch.manual_seed(number)
        model = xrv.models.DenseNet().eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
                torch.nn.init.uniform_(module.running_var, 0.7, 1.5)
        with torch.no_grad():
            model.classifier.weight *= 0.01
        metadata = {key: json.dumps(value) for key, value in about.items()}
        safetensors.torch.save_model(model, str(Path(spec["out"]) / f"{number}.safetensors"), metadata)
    channel.answer(torch=torch.__version__)


def run_library(spec: dict[str, Any], channel: Channel) -> None:
    """Score all images as torchxrayvision's users do."""
    import os

    import numpy as np
    import safetensors.torch
    import skimage.io
    import torch
    import torchxrayvision as xrv

    steps = [xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(224)]

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(spec["paths"])

        def __getitem__(self, index: int) -> Any:
            image = skimage.io.imread(spec["paths"][index])
            image = image if image.ndim == 2 else image[:, :, 0]
            image = xrv.datasets.normalize(image, 255)[None]
            for step in steps:
                image = step(image)
            return torch.from_numpy(image)

    model = xrv.models.DenseNet().eval()
    safetensors.torch.load_model(model, spec["weights"])
    found = []
    with torch.no_grad():
        for batch in torch.utils.data.DataLoader(Images(), batch_size=BATCH, num_workers=os.cpu_count() or 1):
            found.append(torch.sigmoid(model(batch)).numpy())
            channel.count_images(len(batch))
    channel.answer(probabilities=np.concatenate(found).tolist())


def parse() -> argparse.Namespace:
    parser = create_parser(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="models and scores; kept")
    parser.add_argument("--torch", metavar="PYTHON", help="a Python with torchxrayvision")
    parser.add_argument("--images", type=Path, metavar="DIR", help="PNGs to score (48 phantoms of 1024 x 1024)")
    parser.add_argument("--limit", default=200, **POSITIVE, help="number of images (%(default)s)")
    parser.add_argument("--rounds", default=3, **POSITIVE)
    parser.add_argument("--only", nargs="+", choices=("ours", "ours-bf16", "library", "ensemble", "three"))
    arguments = parser.parse_args()
    if not arguments.child and not (arguments.work and arguments.torch):
        parser.error("--work and --torch are needed")
    return arguments


def prepare(arguments: argparse.Namespace) -> list[str]:
    """Make images, models and bundles that do not exist yet; return the paths of the images."""
    from ray_cxr.imaging.phantoms import write_phantoms

    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    images = arguments.images
    if images is None:
        images = work / "images"
        if not images.exists():
            write_phantoms(images, patients=48, size=1024, broken=False)
    if not (work / "2.safetensors").exists():
        ask_child(__file__, {"kind": "make", "out": str(work)}, work / "make.log", python=arguments.torch)
    for number in range(3):
        if not (work / f"bundle{number}").exists():
            given = ["import-weights", str(work / f"{number}.safetensors"), "--backbone", "DenseNet121"]
            run_command([*given, "--out", str(work / f"bundle{number}")], work / "import.log")
    if not (work / "ensemble").exists():
        bundles = [str(work / f"bundle{number}") for number in range(3)]
        run_command(["ensemble", *bundles, "--out", str(work / "ensemble")], work / "ensemble.log")
    paths = sorted(str(path) for path in images.rglob("*.png"))[: arguments.limit]
    chosen = work / "chosen"
    shutil.rmtree(chosen, ignore_errors=True)
    chosen.mkdir()
    for path in paths:
        (chosen / Path(path).name).symlink_to(Path(path).resolve())
    return paths


def score(work: Path, bundle: str, *more: str) -> float:
    """Run `score` in a new folder; return the seconds."""
    out = work / f"scores-{bundle}"
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    given = ["score", "--model", str(work / bundle), "--images", str(work / "chosen"), "--out", str(out)]
    run_command([*given, *more], work / f"{bundle}.log")
    return time.monotonic() - started


def compare_probabilities(work: Path, paths: list[str], theirs: list[list[float]]) -> dict[str, float]:
    """Return the median and the largest difference of a probability from the library."""
    import numpy as np
    import pandas as pd

    parts = sorted((work / FP32 / "scores").glob("*.parquet"))
    ours = pd.concat([pd.read_parquet(part) for part in parts]).set_index("image_id")
    ours = ours.loc[[Path(path).name for path in paths], [name for name in ours if name.startswith("p_")]]
    difference = np.abs(ours.to_numpy() - np.array(theirs)[:, : ours.shape[1]])
    return {"median": float(np.median(difference)), "largest": float(difference.max())}


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    paths, work = prepare(arguments), arguments.work
    names = arguments.only or ["ours", "ours-bf16", "library", "ensemble", "three"]
    rates: dict[str, list[float]] = {name: [] for name in names}
    theirs: list[list[float]] = []
    for number, name in interleave(names, arguments.rounds):
        if name == "library":
            spec = {"kind": "library", "paths": paths, "weights": str(work / "0.safetensors")}
            answer = ask_child(__file__, spec, work / "library.log", python=arguments.torch)
            seconds, theirs = answer["wall_s"], answer["probabilities"]
        elif name == "three":
            seconds = sum(score(work, f"bundle{member}") for member in range(3))
        elif name == "ensemble":
            seconds = score(work, "ensemble")
        else:
            seconds = score(work, "bundle0", *(("--precision", "fp32") if name == "ours" else ()))
            if name == "ours":
                # The next run of the same bundle replaces its scores.
                shutil.rmtree(work / FP32, ignore_errors=True)
                (work / "scores-bundle0").rename(work / FP32)
        rates[name].append(len(paths) / seconds)
        log(f"round {number + 1}: {name} {rates[name][-1]:.1f} images/s")
    result |= {"images": len(paths), "rates": rates}
    if theirs and "ours" in rates:
        result["difference"] = compare_probabilities(work, paths, theirs)
    console = create_console()
    for name, values in rates.items():
        console.print(f"{name}: {format_spread(values)} images/s, median {statistics.median(values):.1f}")
    for ours, rival in (("ours", "library"), ("ours-bf16", "library"), ("ensemble", "three")):
        if ours in rates and rival in rates:
            compared = compare_rounds(rates[ours], rates[rival])
            result[f"{ours} to {rival}"] = compared
            console.print(format_bar(f"{ours} / {rival}", compared["ratio"], BAR))
    if "difference" in result:
        found = result["difference"]
        console.print(f"probabilities differ by {found['median']:.1e} (median) and {found['largest']:.1e} (largest)")


if __name__ == "__main__":
    raise SystemExit(run_script(parse, measure, {"make": make_models, "library": run_library}))
