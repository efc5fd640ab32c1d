"""Measure size, time and memory of features, of a probe on them, and of a search for similar images.

    .venv/bin/python benchmarks/features.py --bundle BUNDLE --work DIR --out features.json

The features are random numbers, as many per image as the bundle has, for as many images and patients as ChestX-ray14,
with labels for 14 findings as rare as there that depend on them. The search is compared with scikit-learn's
`NearestNeighbors` (brute force, cosine) on the same features in float32, in the same process, in turns; both must find
the same images. Memory is the largest resident set of the process.

Exit codes: 0 done; 1 the two disagree, or a command failed; 2 wrong arguments.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from harness import POSITIVE, log

from ray_cxr.data import features
from ray_cxr.labels import FINDINGS
from ray_cxr.models.bundle import load_bundle

#: Share of images with each finding in ChestX-ray14, in the order of `FINDINGS`.
PREVALENCE = (0.103, 0.025, 0.042, 0.021, 0.119, 0.022, 0.015, 0.002, 0.177, 0.052, 0.056, 0.030, 0.013, 0.047)
ROWS, PATIENTS, PART = 112_120, 30_805, 1000
QUERIES, NEAREST = 5, 10


def main() -> int:
    """Run the measurements and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", required=True, type=Path, help="any bundle; its number of features is used")
    parser.add_argument("--work", required=True, type=Path, help="folder for the files")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--rows", default=ROWS, help=f"images ({ROWS})", **POSITIVE)
    arguments = parser.parse_args()
    folder = arguments.work / "scores"
    shutil.rmtree(arguments.work / "probe", ignore_errors=True)
    found: dict[str, Any] = {"rows": arguments.rows} | write_folder(arguments, folder)
    command = ["probe", str(folder), "--labels", str(arguments.work / "labels.parquet")]
    found |= run_probe([*command, "--out", str(arguments.work / "probe")])
    found |= compare_search(folder)
    for name, value in found.items():
        print(f"{name:<28} {value:,.3f}" if isinstance(value, float) else f"{name:<28} {value:,}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1))
    return 0


def write_folder(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write a finished score folder with features, and its labels; return size and seconds of the features."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("scores", features.FEATURES):
        (folder / name).mkdir(parents=True)
    bundle = load_bundle(arguments.bundle)
    size = bundle.input_spec.size
    opened = bundle.open_runtime("fp32", batch_size=1, threads=1)
    width = opened.predict(np.zeros((1, size, size), np.uint8)).features.shape[1]
    rng, n = np.random.default_rng(0), arguments.rows
    weights = rng.normal(size=(width, len(FINDINGS))) / np.sqrt(width)
    ids = [f"{i:08d}.png" for i in range(n)]
    patients = np.sort(rng.integers(0, min(PATIENTS, n), n)).astype(str)
    truth, seconds = np.empty((n, len(FINDINGS)), np.int8), 0.0
    for start in range(0, n, PART):
        rows = slice(start, min(start + PART, n))
        values = rng.gamma(1.0, 1.0, (rows.stop - start, width)).astype(np.float32)
        logits = (values - 1.0) @ weights * 2 + rng.logistic(size=(len(values), len(FINDINGS)))
        truth[rows] = logits > np.quantile(logits, 1 - np.array(PREVALENCE), axis=0).diagonal()
        name = f"part-{start // PART:05d}.parquet"
        started = time.monotonic()
        chosen = pa.array(ids[rows])
        features.write_features(folder / features.FEATURES / name, chosen, values, np.zeros(len(values), bool), {})
        seconds += time.monotonic() - started
        pq.write_table(pa.table({"image_id": chosen, "patient_id": patients[rows]}), folder / "scores" / name)
    settings = {"kind": "score", "features": True, "model_digest": bundle.digest}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "run.json").write_text(json.dumps({"model": str(arguments.bundle.resolve())}))
    (folder / "_SUCCESS").touch()
    numbers = np.unique(patients, return_inverse=True)[1]
    split = np.array(["train", "val", "test"])[np.digitize(numbers % 10, [7, 8])]
    table = pd.DataFrame({"image_id": ids, "patient_id": patients, "split": split})
    table.join(pd.DataFrame(truth, columns=list(FINDINGS))).to_parquet(arguments.work / "labels.parquet")
    written = sum(path.stat().st_size for path in (folder / features.FEATURES).iterdir())
    return {"values per image": width, "features on disk, MB": written / 1e6, "write features, s": seconds}


def run_probe(command: list[str]) -> dict[str, Any]:
    """Run `ray-cxr probe`; return its seconds and largest resident set."""
    log("probe ...")
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "ray_cxr.cli", *command], check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"probe, s": seconds, "probe, memory, MB": memory}


def compare_search(folder: Path) -> dict[str, Any]:
    """Time a search for the nearest images, ours and scikit-learn's in turns; raise ValueError if they disagree."""
    from sklearn.neighbors import NearestNeighbors

    started = time.monotonic()
    loaded = features.load_features(folder)
    load = time.monotonic() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    loaded.find_nearest(loaded.image_ids[0], NEAREST)  # converts the vectors
    wide = loaded.vectors.astype(np.float32)
    rival = NearestNeighbors(n_neighbors=NEAREST, metric="cosine", algorithm="brute").fit(wide)
    ours, theirs = [], []
    for query in np.linspace(0, len(loaded) - 1, QUERIES).astype(int):
        started = time.monotonic()
        nearest = loaded.find_nearest(loaded.vectors[query], NEAREST)
        ours.append(time.monotonic() - started)
        started = time.monotonic()
        distances, _ = rival.kneighbors(wide[query : query + 1])
        theirs.append(time.monotonic() - started)
        if not np.allclose(1 - distances[0], nearest["similarity"], atol=1e-3):
            raise ValueError(f"image {query}: the nearest images of scikit-learn have other similarities")
    one, two = statistics.median(ours), statistics.median(theirs)
    return {
        "load features, s": load,
        "load features, memory, MB": memory,
        "nearest, ours, s": one,
        "nearest, scikit-learn, s": two,
        "ratio": two / one,
    }


if __name__ == "__main__":
    raise SystemExit(main())
