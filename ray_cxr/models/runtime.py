"""Run a model over batches of images; `Bundle.predict` and the cluster's `score` share this code.

On CPUs OpenVINO runs the graph of the bundle. Keras runs the model on GPUs, and for bundles without a graph. A bundle
also holds golden images: synthetic radiographs with the probabilities that Keras gave for them in float32.
`Bundle.open_runtime` compares a runtime's probabilities with these and refuses a difference above `TOLERANCE`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import queue
import sys
import threading
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ray_cxr.errors import BundleError, ConfigError, RayCxrError

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


class Usage(NamedTuple):
    """Seconds of a model's work, and of the time in which it waited or others waited for it."""

    seconds: float = 0.0  # since the first batch
    model_wait_s: float = 0.0  # without a batch; with several lanes, their mean
    reader_wait_s: float = 0.0  # a caller of `submit` waited for a free slot

    def plus(self, other: Usage) -> Usage:
        return Usage(*(a + b for a, b in zip(self, other, strict=True)))

    def shares(self) -> dict[str, float]:
        """Return both waits as shares of the time, 0 to 1; {} if no batch ran."""
        waits = {"model_waited_for_images": self.model_wait_s, "images_waited_for_model": self.reader_wait_s}
        return {name: wait / self.seconds for name, wait in waits.items()} if self.seconds else {}


class UsageMeter:
    """Measures a model that runs at most `lanes` batches at the same time; thread-safe."""

    def __init__(self, lanes: int) -> None:
        self._lock, self._lanes = threading.Lock(), lanes
        self._running = self._waiting = 0
        self.reset()

    def reset(self) -> None:
        """Forget the measured time; the next batch starts the clock."""
        self._total, self._updated_at = Usage(), 0.0

    def add(self, *, running: int = 0, waiting: int = 0) -> None:
        """Change the number of batches that run, and of callers that wait."""
        with self._lock:
            self._update()
            self._running += running
            self._waiting += waiting

    def take(self) -> Usage:
        """Return the usage since the previous call, or since the first batch."""
        with self._lock:
            if self._updated_at:
                self._update()
            total, self._total = self._total, Usage()
            return total

    def _update(self) -> None:
        now = time.monotonic()
        passed = now - self._updated_at if self._updated_at else 0.0
        idle = passed * max(0, self._lanes - self._running) / self._lanes
        blocked = passed if self._waiting else 0.0
        self._total = self._total.plus(Usage(passed, idle, blocked))
        self._updated_at = now


class ThreadedRuntime(Runtime):
    """A runtime with several batches in flight: each has one of the `slots`, and a thread that waits for its results.

    `close` ends the threads; they also end when nothing refers to the runtime.
    """

    def __init__(self, slots: Iterable[Any], lanes: int) -> None:
        self.usage = UsageMeter(lanes)
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for slot in slots:
            self._idle.put(slot)
        self._pool = ThreadPoolExecutor(self._idle.qsize(), thread_name_prefix="model")

    def close(self) -> None:
        """Wait for the batches in flight and end the threads; later calls of `submit` raise RuntimeError."""
        self._pool.shutdown()

    def _submit_batch(self, batch: np.ndarray, n: int) -> Future[Outputs]:
        try:
            slot = self._idle.get_nowait()
        except queue.Empty:
            self.usage.add(waiting=1)
            try:
                slot = self._idle.get()
            finally:
                self.usage.add(waiting=-1)
        try:
            return self._pool.submit(self._run, slot, batch, n)
        except RuntimeError:  # after `close`; others that wait for a slot must get this error too
            self._idle.put(slot)
            raise

    def _run(self, slot: Any, batch: np.ndarray, n: int) -> Outputs:
        self.usage.add(running=1)
        try:
            return self._compute(slot, batch, n)
        finally:
            self.usage.add(running=-1)
            self._idle.put(slot)

    @abstractmethod
    def _compute(self, slot: Any, batch: np.ndarray, n: int) -> Outputs:
        """Return the first n results of a padded batch, in a thread of the pool."""


_FIRST_ACCESS = threading.Lock()


class OpenVinoRuntime(ThreadedRuntime):
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
        requests = [compiled.create_infer_request() for _ in range(threads + 1)]
        # The first access to an element type, or to a tensor's data, fills a table in OpenVINO's C++. Two threads that
        # do so at the same time can deadlock: each holds either the table's lock or Python's and waits for the other.
        with _FIRST_ACCESS:
            compiled.input(0).get_element_type().to_dtype()
            for name in self._outputs:
                requests[0].get_tensor(name).data  # noqa: B018
        # One waiting thread per request. OpenVINO's AsyncInferQueue does not report failed batches and is never freed.
        super().__init__(requests, lanes=threads)

    def _compute(self, slot: Any, batch: np.ndarray, n: int) -> Outputs:
        # Not `infer`, which would run in this thread instead of a stream.
        slot.start_async({0: batch}, share_inputs=True)
        slot.wait()
        return Outputs(*(slot.get_tensor(name).data[:n].copy() for name in self._outputs))


#: Batches of a Keras model in flight: one computes, one waits on the GPU, and the results of one are copied.
_KERAS_BATCHES = 3


class KerasRuntime(ThreadedRuntime):
    """A Keras model with several batches in flight, so that a GPU has its next batch when it ends one.

    TensorFlow returns from a call when the GPU has the work, not when it has done it. So one thread at a time starts
    batches, while others copy results. TensorFlow copies through pinned memory itself. Batches on a CPU run one by one.

    Args:
        jit_compile: compile with XLA, at the first batch.
    """

    def __init__(self, model: keras.Model, batch_size: int, *, jit_compile: bool = False) -> None:
        from ray_cxr.models.keras_setup import keras, tf

        self._model = both = keras.Model(model.input, [model.output, model.get_layer("logits").input])
        self.batch_shape = (batch_size, *model.input_shape[1:])
        self._jit_compile = jit_compile
        self._device = "GPU:0" if tf.config.list_logical_devices("GPU") else "CPU:0"
        # Traced here and once: two threads at the first batch could each trace it.
        traced = tf.function(lambda images: both(images, training=False), autograph=False, jit_compile=jit_compile)
        self._start = traced.get_concrete_function(tf.TensorSpec(self.batch_shape, tf.uint8))
        self._turn = threading.Lock()
        super().__init__(range(_KERAS_BATCHES), lanes=1)

    def _compute(self, slot: Any, batch: np.ndarray, n: int) -> Outputs:
        from ray_cxr.models.keras_setup import tf

        try:
            with tf.device(self._device):
                images = tf.convert_to_tensor(batch)
            with self._turn:
                arrays = self._start(images)
            return Outputs(*(np.asarray(array, dtype=np.float32)[:n] for array in arrays))
        except tf.errors.OpError as error:
            raise self._explain(error, isinstance(error, tf.errors.ResourceExhaustedError)) from None

    def _explain(self, error: Exception, is_out_of_memory: bool) -> RayCxrError:
        size, device, cause = self.batch_shape[0], self._device, summarize_error(error)
        if is_out_of_memory:
            return RayCxrError(
                f"{device} is out of memory for {size} images; use --set score.batch_size={size // 2 or 1}"
            )
        if self._jit_compile:
            return RayCxrError(f"XLA cannot run the model ({cause}); use --set score.jit_compile=false")
        return RayCxrError(f"{device} cannot run the model: {cause}")


def limit_threads(threads: int) -> None:
    """Limit TensorFlow's threads in this process; call it before the first operation.

    By default each process starts one thread per core, so the actors of a node would compete for the cores.
    """
    from ray_cxr.models.keras_setup import tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def require_gpu() -> None:
    """Stop TensorFlow from reserving a whole GPU at its first use; raise ConfigError if it sees no GPU."""
    from ray_cxr.models.keras_setup import tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        raise ConfigError(
            f"--gpu: TensorFlow sees no GPU on {platform.node()}; install requirements-gpu.lock there, or omit --gpu"
        )
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)


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
    require_gpu()
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
    require_gpu()
    if precision == "bf16" and _gpu_capability() >= (8, 0):
        return "mixed_bfloat16"
    from ray_cxr.models.keras_setup import tf

    tf.config.experimental.enable_tensor_float_32_execution(False)  # TF32 keeps 10 of 23 bits
    return "float32"


class GpuInfo(NamedTuple):
    """Name of the first GPU, number of GPUs of this process, and the most bytes that TensorFlow used on the first."""

    name: str
    gpus: int
    peak_bytes: int


def describe_gpu() -> GpuInfo:
    from ray_cxr.models.keras_setup import tf

    gpus = tf.config.list_physical_devices("GPU")
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    return GpuInfo(str(name), len(gpus), int(tf.config.experimental.get_memory_info("GPU:0")["peak"]))


def make_deterministic() -> None:
    """Restrict TensorFlow to kernels that add in a fixed order, so that every run gives the same bits."""
    from ray_cxr.models.keras_setup import tf

    tf.config.experimental.enable_op_determinism()


def summarize_error(error: BaseException) -> str:
    """Return the first line of an error that is more than a location in OpenVINO's source; at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith("Exception from")]
    return (useful or lines or [type(error).__name__])[0][:200]
