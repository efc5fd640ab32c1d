"""Run a model over batches of images; `Bundle.predict` and the cluster's `score` share this code.

On CPUs OpenVINO runs the graph of the bundle. Keras runs the weights on GPUs, and for bundles without a graph. A bundle
also holds a few synthetic radiographs with the probabilities that Keras gave for them in float32. Opening a runtime
(`Bundle.open_runtime`) compares its answers with these and refuses a difference above `TOLERANCE`.
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
    import keras

#: Files of a bundle. The graphs hold numbers and names of operations, nothing that runs code.
GRAPH = "openvino"
GOLDEN, GOLDEN_INT8 = "golden.npz", "golden-int8.npz"
#: Largest accepted difference of any probability on the golden images, from Keras in float32. int8 is compared with the
#: int8 of `quantize`; the effect of quantisation itself is checked on validation images.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.02, "int8": 0.02}
#: Names of a graph's two outputs, in the order of `Outputs`.
OUTPUTS = ("probabilities", "features")
#: Golden images and statistics take a few MiB; a small zip file can unpack to any size.
_MAX_UNPACKED = 256 * 1024**2


class Outputs(NamedTuple):
    """Results for N images: probabilities float32 [N,F], and the pooled input of the last layer, features float32
    [N,C].
    """

    probabilities: np.ndarray
    features: np.ndarray


class Runtime(ABC):
    """A model that is ready to run.

    `batch_shape` is (batch size, S, S, 1). Every batch is padded to it, so that no image's result depends on others.
    """

    batch_shape: tuple[int, int, int, int]

    def submit(self, images: np.ndarray) -> Future[Outputs]:
        """Score one batch, uint8 [n,S,S] with n up to the batch size. Thread-safe; blocks while no slot is free.

        The caller may reuse the array once this returns.
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
        return Outputs(*(np.concatenate(arrays) for arrays in zip(*(part.result() for part in parts), strict=True)))


def graph_file(precision: str) -> str:
    """Return the name of the graph for a precision; fp32 and bf16 share one."""
    return f"{GRAPH}-int8.xml" if precision == "int8" else f"{GRAPH}.xml"


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would report each import and each conversion to its vendor."""
    if sys.modules.get("openvino_telemetry") is None:
        # With None there the import fails, and OpenVINO and NNCF use the stubs that they ship for this case.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    else:
        # Another module imported OpenVINO first. All reports of OpenVINO and NNCF go through this one method.
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
    """Return the CPU threads for one model per machine: at most 8, since more cost memory and gain little."""
    return min(8, os.cpu_count() or 1)


def choose_precision(info: Mapping[str, Any], requested: str, *, gpu: bool) -> str:
    """Return the precision to run a bundle in: `fp32`, `bf16` or `int8`; `info` is its `bundle.json`.

    On a CPU `auto` is bf16 if the CPU supports it and the bundle passed its tolerance, else fp32. On a GPU it is bf16;
    GPUs without bfloat16 then compute in float32. Raises ConfigError if the requested precision is not supported.
    """
    runtimes = info.get("runtimes", {})
    if gpu:
        if requested == "int8":
            raise ConfigError("--precision int8: runs on CPUs only; omit --gpu, or use --precision bf16")
        return "bf16" if requested == "auto" else requested
    if requested == "int8" and not runtimes.get("int8", {}).get("accepted"):
        raise ConfigError(
            "--precision int8: the bundle has no int8 graph; add one with `ray-cxr quantize BUNDLE PREPARED`"
        )
    bf16 = runtimes.get("bf16", {})
    if requested == "auto":
        return "bf16" if bf16.get("accepted") and cpu_has_bf16() else "fp32"
    if requested == "bf16":
        if not runtimes:
            reason = info.get("runtimes_refused", "an older ray-cxr wrote it")
            raise ConfigError(f"--precision bf16: the bundle has no OpenVINO graph ({reason}); use fp32 or auto")
        if bf16.get("accepted") is False:
            raise ConfigError(
                f"--precision bf16: changes probabilities of this bundle by up to {bf16['largest_drift']:.3f}, "
                f"{TOLERANCE['bf16']} is allowed; use fp32"
            )
        if not cpu_has_bf16():
            raise ConfigError("--precision bf16: this CPU does not compute in bfloat16; use fp32 or auto")
    return requested


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Open an `.npz` file of a bundle. An error of the file, or in the block that uses it, becomes a BundleError."""
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
            model.reshape([batch_size, size, size, 1])
            compiled = core.compile_model(
                model,
                "CPU",
                {
                    # On CPUs with bf16, the operations that int8 leaves in float are faster in it too.
                    "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" or not cpu_has_bf16() else "bf16",
                    "INFERENCE_NUM_THREADS": threads,
                    "NUM_STREAMS": threads,
                    # Pinned threads of two processes would share one core and leave another idle.
                    "ENABLE_CPU_PINNING": False,
                },
            )
        except (RuntimeError, IndexError) as error:
            raise BundleError(f"{graph}: OpenVINO cannot run it: {summarize_error(error)}") from None
        self.batch_shape = (batch_size, size, size, 1)
        # One more request than streams, so that a stream never waits for its next batch.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests = [compiled.create_infer_request() for _ in range(threads + 1)]
        # The first access to an element type, or to a tensor's data, fills a table in OpenVINO's C++. Two threads that
        # do so at once can deadlock: one holds the table's lock and waits for Python's, the other the reverse.
        with _FIRST_ACCESS:
            compiled.input(0).get_element_type().to_dtype()
            for name in OUTPUTS:
                requests[0].get_tensor(name).data  # noqa: B018
        for request in requests:
            self._idle.put(request)
        # One waiting thread per request. OpenVINO's own queue has no callback for failed batches and is never freed.
        self._pool = ThreadPoolExecutor(threads + 1, thread_name_prefix="openvino")

    def _submit_batch(self, batch: np.ndarray, n: int) -> Future[Outputs]:
        return self._pool.submit(self._run, self._idle.get(), batch, n)

    def _run(self, request: Any, batch: np.ndarray, n: int) -> Outputs:
        try:
            # Not `infer`, which would run in this thread instead of a stream.
            request.start_async({0: batch}, share_inputs=True)
            request.wait()
            return Outputs(*(request.get_tensor(name).data[:n].copy() for name in OUTPUTS))
        finally:
            self._idle.put(request)


class KerasRuntime(Runtime):
    """A Keras model of any backend; batches of one shape are traced once."""

    def __init__(self, model: keras.Model, batch_size: int) -> None:
        import keras

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

    By default every process starts one thread per core, and the actors of one node compete for the cores.
    """
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def use_gpu_memory_as_needed() -> int:
    """Stop TensorFlow from reserving a whole GPU at its first use; return the number of visible GPUs."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return len(gpus)


def prepare_device(gpu: bool, precision: str) -> str:
    """Select the device of this process; call it before TensorFlow's first operation.

    Without `gpu` it is the CPU, even if GPUs are visible. The result is the Keras dtype policy. For `auto`: float32 on
    CPUs, mixed_bfloat16 on GPUs of compute capability 8.0 or more, mixed_float16 from 7.0 (tensor cores), float32 on
    older GPUs.
    """
    import tensorflow as tf

    if not gpu:
        tf.config.set_visible_devices([], "GPU")
        # Grappler takes 8 s for DenseNet121's training graph, and does not make steps on a CPU faster.
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
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    major, minor = details.get("compute_capability") or (0, 0)
    return int(major), int(minor)


def prepare_gpu(precision: str) -> str:
    """Prepare this process to score on its GPU; return the Keras dtype policy for `fp32` or `bf16`."""
    if not use_gpu_memory_as_needed():
        raise ConfigError("--gpu: this actor sees no GPU; check that requirements-gpu.lock is installed there")
    if precision == "bf16" and _gpu_capability() >= (8, 0):
        return "mixed_bfloat16"
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)  # TF32 keeps 10 of 23 bits
    return "float32"


def make_deterministic() -> None:
    """Restrict TensorFlow to kernels that add in a fixed order, so that every run gives the same bits."""
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()


def summarize_error(error: BaseException) -> str:
    """Return the first line of an error that is more than a location in OpenVINO's source; at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith("Exception from")]
    return (useful or lines or [type(error).__name__])[0][:200]
