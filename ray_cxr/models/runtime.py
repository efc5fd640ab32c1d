"""Run a model over batches of images; `Bundle.predict` and the cluster's `score` share this code.

On CPUs OpenVINO runs the graph of the bundle. Keras runs the model on GPUs, and for bundles without a graph. A bundle
also holds golden images: synthetic radiographs with the probabilities that Keras gave for them in float32.
`Bundle.open_runtime` compares a runtime's probabilities with these and refuses a difference above `TOLERANCE`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import sys
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ray_cxr.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from ray_cxr.models.keras_setup import keras

#: Files of a bundle.
GOLDEN, GOLDEN_INT8 = "golden.npz", "golden-int8.npz"
#: Largest accepted difference of a probability of the golden images. fp32 and bf16 are compared with Keras in float32,
#: int8 with the int8 that `quantize` measured; `quantize` itself compares int8 with fp32.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.02, "int8": 0.02}
#: Names of a graph's outputs, in the order of `Outputs`; the third is missing unless several results were averaged.
OUTPUTS, SPREAD = ("probabilities", "features"), "spread"
#: Golden images and statistics take a few MiB; a small zip file can unpack to any size.
_MAX_UNPACKED = 256 * 1024**2


class Outputs(NamedTuple):
    """Results for N images, float32."""

    probabilities: np.ndarray  # [N,F]
    features: np.ndarray  # [N,C], the pooled input of the last layer
    spread: np.ndarray | None = None  # [N,F], standard deviation of the results that were averaged


class Runtime(ABC):
    """A model that is ready to run.

    Every batch is padded to `batch_shape`, (batch size, S, S, 1), so that an image's result does not depend on others.
    """

    batch_shape: tuple[int, int, int, int]
    has_spread = False  # whether `Outputs.spread` is present

    def submit(self, images: np.ndarray) -> Future[Outputs]:
        """Score one batch, uint8 [n,S,S] with n up to the batch size; the caller may reuse the array afterwards.

        Thread-safe; blocks while all slots are in use.
        """
        batch = np.zeros(self.batch_shape, np.uint8)
        batch[: len(images), ..., 0] = images
        return self._submit_batch(batch, len(images))

    @abstractmethod
    def _submit_batch(self, batch: np.ndarray, n: int) -> Future[Outputs]:
        """Score a padded batch and return the first n results."""

    def predict(self, images: np.ndarray) -> Outputs:
        """Score any number of images, uint8 [N,S,S]."""
        step = self.batch_shape[0]
        # Without images, one empty batch gives the right shapes.
        parts = [self.submit(images[start : start + step]) for start in range(0, max(len(images), 1), step)]
        results = [part.result() for part in parts]
        return Outputs(
            np.concatenate([result.probabilities for result in results]),
            np.concatenate([result.features for result in results]),
            np.concatenate([result.spread for result in results if result.spread is not None])
            if self.has_spread
            else None,
        )


def graph_file(precision: str) -> str:
    """Return the file name of the graph for a precision; fp32 and bf16 share a graph. A graph cannot run code."""
    return "openvino-int8.xml" if precision == "int8" else "openvino.xml"


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report each import and each conversion to its vendor."""
    if sys.modules.get("openvino_telemetry") is None:
        # With this None, an import raises ImportError; OpenVINO and NNCF then use the stubs that they ship.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    else:
        # Another module imported OpenVINO first. OpenVINO and NNCF send all reports through this method.
        sender: Any = importlib.import_module("openvino_telemetry.utils.sender")
        sender.TelemetrySender.send = _send_nothing
    import openvino

    return openvino


def _send_nothing(*_: Any, **__: Any) -> None:
    pass


def cpu_has_bf16() -> bool:
    """Return whether this machine's CPU computes in bfloat16 (AVX512_BF16, AMX)."""
    return "BF16" in import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def default_threads() -> int:
    """Return the number of CPU threads for the only model on a machine: at most 8; more take memory and gain little."""
    return min(8, os.cpu_count() or 1)


def choose_precision(info: Mapping[str, Any], requested: str, *, gpu: bool) -> str:
    """Return the precision to run a bundle in, `fp32`, `bf16` or `int8`, from the `info` of its bundle.json.

    On a CPU `auto` is bf16 if the CPU supports it and its drift was accepted, else fp32. On a GPU `auto` is bf16; GPUs
    without bfloat16 then compute in float32. Raises ConfigError if the requested precision is not supported.
    """
    runtimes = info.get("runtimes", {})
    bf16 = runtimes.get("bf16", {})
    if gpu and info.get("backbone") == "graph":
        raise ConfigError("--gpu: this bundle holds only an OpenVINO graph, which runs on CPUs; omit --gpu")
    if requested == "auto":
        return "bf16" if gpu or (bf16.get("accepted") and cpu_has_bf16()) else "fp32"
    problem = None
    if requested == "int8":
        if gpu:
            problem = "runs on CPUs only; omit --gpu, or use --precision bf16"
        elif not runtimes.get("int8", {}).get("accepted"):
            problem = "the bundle has no int8 graph; add one with `ray-cxr quantize BUNDLE PREPARED`"
    elif requested == "bf16" and not gpu:
        if not runtimes:
            reason = info.get("runtimes_refused", "an older ray-cxr wrote it")
            problem = f"the bundle has no OpenVINO graph ({reason}); use fp32 or auto"
        elif bf16.get("accepted") is False:
            drift, allowed = bf16["largest_drift"], TOLERANCE["bf16"]
            problem = f"changes probabilities of this bundle by up to {drift:.3f}, {allowed} is allowed; use fp32"
        elif not cpu_has_bf16():
            problem = "this CPU does not compute in bfloat16; use fp32 or auto"
    if problem is not None:
        raise ConfigError(f"--precision {requested}: {problem}")
    return requested


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Open an `.npz` file of a bundle. Raise BundleError for a damaged file, and for an error in the `with` block."""
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(item.file_size for item in packed.infolist()) > _MAX_UNPACKED:
                raise ValueError(f"unpacks to more than {_MAX_UNPACKED >> 20} MiB")
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, EOFError, KeyError, MemoryError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: damaged ({summarize_error(error)}); copy the bundle again") from None


_FIRST_ACCESS = threading.Lock()


class OpenVinoRuntime(Runtime):
    """An OpenVINO graph (`.xml`, with its `.bin` next to it) on CPU threads, with several batches in flight.

    Each thread is one stream, which runs one batch at a time.
    """

    def __init__(self, graph: Path, precision: str, batch_size: int, threads: int) -> None:
        core = import_openvino().Core()
        try:
            model = core.read_model(graph)
            size = int(model.input(0).partial_shape[1].get_length())
            for name in OUTPUTS:
                model.output(name)
            has_spread = any(SPREAD in output.get_names() for output in model.outputs)
            model.reshape([batch_size, size, size, 1])
            options = {
                # For int8 too: on CPUs with bf16, its operations in floating point are faster in bf16.
                "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" or not cpu_has_bf16() else "bf16",
                "INFERENCE_NUM_THREADS": threads,
                "NUM_STREAMS": threads,
                # Pinned threads of two processes would share one core and leave another idle.
                "ENABLE_CPU_PINNING": False,
            }
            compiled = core.compile_model(model, "CPU", options)
        except (RuntimeError, IndexError) as error:
            raise BundleError(f"{graph}: OpenVINO cannot run it: {summarize_error(error)}") from None
        self.batch_shape = (batch_size, size, size, 1)
        self._outputs, self.has_spread = (*OUTPUTS, SPREAD) if has_spread else OUTPUTS, has_spread
        # One more request than streams, so that a stream never waits for its next batch.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests = [compiled.create_infer_request() for _ in range(threads + 1)]
        # The first access to an element type, or to a tensor's data, fills a table in OpenVINO's C++. Two threads that
        # do so at the same time can deadlock: each holds either the table's lock or Python's and waits for the other.
        with _FIRST_ACCESS:
            compiled.input(0).get_element_type().to_dtype()
            for name in self._outputs:
                requests[0].get_tensor(name).data  # noqa: B018
        for request in requests:
            self._idle.put(request)
        # One waiting thread per request. OpenVINO's AsyncInferQueue does not report failed batches and is never freed.
        self._pool = ThreadPoolExecutor(threads + 1, thread_name_prefix="openvino")

    def _submit_batch(self, batch: np.ndarray, n: int) -> Future[Outputs]:
        return self._pool.submit(self._run, self._idle.get(), batch, n)

    def _run(self, request: Any, batch: np.ndarray, n: int) -> Outputs:
        try:
            # Not `infer`, which would run in this thread instead of a stream.
            request.start_async({0: batch}, share_inputs=True)
            request.wait()
            return Outputs(*(request.get_tensor(name).data[:n].copy() for name in self._outputs))
        finally:
            self._idle.put(request)


class KerasRuntime(Runtime):
    """A Keras model; batches of one shape are traced once."""

    def __init__(self, model: keras.Model, batch_size: int) -> None:
        from ray_cxr.models.keras_setup import keras

        self._model = keras.Model(model.input, [model.output, model.get_layer("logits").input])
        self.batch_shape = (batch_size, *model.input_shape[1:])
        self._lock = threading.Lock()

    def _submit_batch(self, batch: np.ndarray, n: int) -> Future[Outputs]:
        future: Future[Outputs] = Future()
        with self._lock:
            arrays = self._model.predict_on_batch(batch)
        future.set_result(Outputs(*(np.asarray(array, dtype=np.float32)[:n] for array in arrays)))
        return future


def limit_threads(threads: int) -> None:
    """Limit TensorFlow's threads in this process; call it before the first operation.

    By default each process starts one thread per core, so the actors of a node would compete for the cores.
    """
    from ray_cxr.models.keras_setup import tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def use_gpu_memory_as_needed() -> int:
    """Stop TensorFlow from reserving a whole GPU at its first use; return the number of visible GPUs."""
    from ray_cxr.models.keras_setup import tf

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return len(gpus)


def prepare_device(gpu: bool, precision: str) -> str:
    """Select the GPU or the CPU for training in this process; call it before TensorFlow's first operation.

    Returns the Keras dtype policy: `precision`, or for `auto` float32 on CPUs, mixed_bfloat16 on GPUs of compute
    capability 8.0 or more, mixed_float16 from 7.0 (tensor cores), and float32 on older GPUs.
    """
    from ray_cxr.models.keras_setup import tf

    if not gpu:
        tf.config.set_visible_devices([], "GPU")
        # Grappler takes 8 s for DenseNet121's training graph and does not speed up steps on a CPU.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        return "float32" if precision == "auto" else precision
    if not use_gpu_memory_as_needed():
        raise ConfigError("--gpu: this worker sees no GPU; install requirements-gpu.lock there, or omit --gpu")
    if precision != "auto":
        return precision
    capability = _gpu_capability()
    if capability >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if capability >= (7, 0) else "float32"


def _gpu_capability() -> tuple[int, int]:
    """Return CUDA's compute capability of the first GPU; (0, 0) if it is unknown."""
    from ray_cxr.models.keras_setup import tf

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    major, minor = details.get("compute_capability") or (0, 0)
    return int(major), int(minor)


def prepare_gpu(precision: str) -> str:
    """Select the GPU for scoring in this process; return the Keras dtype policy for `fp32` or `bf16`."""
    if not use_gpu_memory_as_needed():
        raise ConfigError("--gpu: this actor sees no GPU; check that requirements-gpu.lock is installed there")
    if precision == "bf16" and _gpu_capability() >= (8, 0):
        return "mixed_bfloat16"
    from ray_cxr.models.keras_setup import tf

    tf.config.experimental.enable_tensor_float_32_execution(False)  # TF32 keeps 10 of 23 bits
    return "float32"


def make_deterministic() -> None:
    """Restrict TensorFlow to kernels that add in a fixed order, so that every run gives the same bits."""
    from ray_cxr.models.keras_setup import tf

    tf.config.experimental.enable_op_determinism()


def summarize_error(error: BaseException) -> str:
    """Return the first line of an error that is more than a location in OpenVINO's source; at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith("Exception from")]
    return (useful or lines or [type(error).__name__])[0][:200]
