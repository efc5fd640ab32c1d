"""How many images a second a network scores once it is exported, before anybody has trained it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.models import exports, runtime
from ray_cxr.models.architecture import Architecture

#: As `score` runs it on CPUs.
BATCH = 4
_ROUNDS, _ROUND_S = 5, 0.6


def images_per_second(architecture: Architecture, spec: InputSpec, *, threads: int) -> float:
    """The exported network's rate on CPU threads, as `score --precision auto` would run it; decoding is not in it.

    The weights are random: the time of a forward pass does not depend on them.

    Args:
        architecture: what to build.
        spec: its input.
        threads: CPU threads to use.

    Returns:
        Images a second, the median of five short rounds.
    """
    import keras

    from ray_cxr.models import classifier

    keras.utils.set_random_seed(0)
    model = classifier.build(architecture)
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as name:
        folder = Path(name)
        found = exports.export(folder, model, architecture, spec, None)
        network: runtime.Runtime
        if "runtimes" in found:
            precision = "bf16" if found["runtimes"]["bf16"]["accepted"] else "fp32"
            graph = folder / runtime.graph_file(precision)
            network = runtime.OpenVinoRuntime(graph, precision, BATCH, threads)
        else:
            network = runtime.KerasRuntime(model, BATCH)
        images = np.repeat(exports.golden_images(spec), threads, axis=0)
        network.predict(images)  # the first pass allocates
        rates = []
        for _ in range(_ROUNDS):
            start, done = time.perf_counter(), 0
            while (taken := time.perf_counter() - start) < _ROUND_S:
                network.predict(images)
                done += len(images)
            rates.append(done / taken)
    return statistics.median(rates)
