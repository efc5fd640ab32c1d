"""Measure how many images per second an untrained model scores once it is exported."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from ray_cxr.config import InputSpec
from ray_cxr.models import exports, runtime
from ray_cxr.models.architecture import Architecture

#: The batch size of `score` on CPUs.
BATCH = 4
_ROUNDS, _ROUND_S = 5, 0.6


def images_per_second(architecture: Architecture, spec: InputSpec, *, threads: int) -> float:
    """Measure the exported model on CPU threads, as `score --precision auto` runs it, without decoding.

    The weights are random: they do not affect the time of a forward pass. The result is the median of five rounds of
    0.6 s.
    """
    import keras

    from ray_cxr.models import classifier

    keras.utils.set_random_seed(0)
    model = classifier.build(architecture)
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as name:
        folder = Path(name)
        exported = exports.export(folder, model, architecture, spec, None)
        opened: runtime.Runtime
        if "runtimes" in exported:
            precision = "bf16" if exported["runtimes"]["bf16"]["accepted"] else "fp32"
            graph = folder / runtime.graph_file(precision)
            opened = runtime.OpenVinoRuntime(graph, precision, BATCH, threads)
        else:
            opened = runtime.KerasRuntime(model, BATCH)
        images = np.repeat(exports.golden_images(spec), threads, axis=0)
        opened.predict(images)  # the first pass allocates
        rates = []
        for _ in range(_ROUNDS):
            start, done = time.perf_counter(), 0
            while (seconds := time.perf_counter() - start) < _ROUND_S:
                opened.predict(images)
                done += len(images)
            rates.append(done / seconds)
    return statistics.median(rates)
