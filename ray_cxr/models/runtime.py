"""Running a network over batches of images, the same way for a laptop's `predict` and a cluster's `score`.

Two engines give the same answers: OpenVINO, from the graph that a bundle carries, on CPUs; and Keras, from the weights,
on GPUs and for bundles without such a graph. A bundle also carries a few synthetic radiographs with the
probabilities that Keras gave for them in float32: whoever opens a runtime compares first, and one whose answers
are further off than `TOLERANCE` is refused.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ray_cxr.errors import BundleError, ConfigError

if TYPE_CHECKING:
    import keras

    from ray_cxr.models.bundle import Bundle

#: Files of a bundle, beside its weights. The graphs hold numbers and names of operations, nothing that runs code.
GRAPH = "openvino"
GOLDEN, GOLDEN_INT8 = "golden.npz", "golden-int8.npz"
#: The largest difference from Keras in float32, in any probability, that a runtime may show on the golden images. int8
#: is compared with int8 as it was made; what quantisation itself changes is checked on validation images.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.02, "int8": 0.02}
#: Names of a graph's two outputs, in the order of `Outputs`.
OUTPUTS = ("probabilities", "features")
#: Some golden images and some statistics are a few MiB; a small zip file can unpack to any size.
_MAX_UNPACKED = 256 * 1024**2


class Outputs(NamedTuple):
    """What a network says of N images.

    Attributes:
        probabilities: float32 [N,F].
        features: float32 [N,C], pooled, the input of the last layer.
    """

    probabilities: np.ndarray
    features: np.ndarray


class Runtime(Protocol):
    """A network ready to run."""

    def submit(self, images: np.ndarray) -> Future[Outputs]:
        """Score up to a batch of images, uint8 [n,S,S], n at most the batch size; may wait for room. Thread-safe.

        The array is copied or used up before this returns.
        """

    def predict(self, images: np.ndarray) -> Outputs:
        """Score any number of images, uint8 [N,S,S]."""


def graph_file(precision: str) -> str:
    """Name of the graph for a precision: fp32 and bf16 share one."""
    return f"{GRAPH}-int8.xml" if precision == "int8" else f"{GRAPH}.xml"


def openvino() -> Any:
    """The module, without its telemetry: `import openvino` and a conversion would report to its makers."""
    if sys.modules.get("openvino_telemetry") is None:
        # With None there its import fails, and OpenVINO and NNCF take the stubs that they bring for this case.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    else:
        # Somebody imported OpenVINO before us. Every report of it and of NNCF goes through this one method.
        sender: Any = importlib.import_module("openvino_telemetry.utils.sender")
        sender.TelemetrySender.send = _send_nothing
    import openvino as module

    return module


def _send_nothing(*_: Any, **__: Any) -> None:
    pass


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU computes in bfloat16 (AVX512_BF16, AMX)."""
    return "BF16" in openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def threads_here() -> int:
    """CPU threads for a network that has this machine to itself; more than 8 would cost memory and gain little."""
    return min(8, os.cpu_count() or 1)


def choose_precision(info: Mapping[str, Any], wanted: str, *, gpu: bool) -> str:
    """The precision to run a bundle in: `fp32`, `bf16` or `int8`.

    Args:
        info: the bundle's `bundle.json`.
        wanted: `auto`: on a CPU bf16 where it has that and the bundle was found to hold its tolerance in it, else fp32;
            on a GPU bf16, which one without it computes in fp32. Or one of the three.

    Raises:
        ConfigError: the bundle or this machine cannot run in what is wanted; says what to do.
    """
    graphs = info.get("runtimes", {})
    if gpu:
        if wanted == "int8":
            raise ConfigError("--precision int8: runs on CPUs only; leave --gpu out, or say --precision bf16")
        return "bf16" if wanted == "auto" else wanted
    if wanted == "int8" and not graphs.get("int8", {}).get("accepted"):
        raise ConfigError(
            "--precision int8: the bundle has no int8 weights; `ray-cxr quantize BUNDLE PREPARED` adds them"
        )
    half = graphs.get("bf16", {})
    if wanted == "auto":
        return "bf16" if half.get("accepted") and cpu_has_bf16() else "fp32"
    if wanted == "bf16":
        if not graphs:
            reason = info.get("runtimes_refused", "it is of an older ray-cxr")
            raise ConfigError(f"--precision bf16: the bundle has no OpenVINO graph ({reason}); say fp32 or auto")
        if half.get("accepted") is False:
            raise ConfigError(
                f"--precision bf16: this bundle's probabilities move by {half['largest_drift']:.3f} in bf16, "
                f"more than {TOLERANCE['bf16']}; say fp32"
            )
        if not cpu_has_bf16():
            raise ConfigError("--precision bf16: this CPU does not compute in bf16; say fp32 or auto")
    return wanted


def open_runtime(bundle: Bundle, precision: str, *, batch_size: int, threads: int, gpu: bool = False) -> Runtime:
    """A bundle's network, compiled, and compared with the bundle's golden images.

    Args:
        precision: of `choose_precision`.
        threads: CPU threads it may use.

    Raises:
        ConfigError: this machine cannot run it so.
        BundleError: its answers on the golden images are not those that the bundle states.
    """
    runtime: Runtime
    if not gpu and "runtimes" in bundle.info:
        if precision == "bf16" and not cpu_has_bf16():
            raise ConfigError("this node's CPU does not compute in bf16, as the run began with; use --precision fp32")
        runtime = OpenVinoRuntime(bundle.path / graph_file(precision), precision, batch_size, threads)
    else:
        policy = "float32"
        if gpu:
            if not use_gpu_memory_as_needed():
                raise ConfigError("--gpu: this actor sees no GPU; is requirements-gpu.lock installed there?")
            if precision == "bf16" and _gpu_capability() >= (8, 0):
                policy = "mixed_bfloat16"
            else:
                import tensorflow as tf

                tf.config.experimental.enable_tensor_float_32_execution(False)  # 10 bits of 23: not what fp32 means
        elif "keras" not in sys.modules:
            limit_threads(threads)
        runtime = KerasRuntime(bundle.model(policy=policy), batch_size)
    check(bundle, runtime, precision)
    return runtime


def check(bundle: Bundle, runtime: Runtime, precision: str) -> None:
    """Compare a runtime with the bundle's golden images; a bundle without them is older and passes.

    Raises:
        BundleError: further off than `TOLERANCE`, or the golden images are damaged.
    """
    if GOLDEN not in bundle.files:
        return
    with arrays_of(bundle.path / GOLDEN) as arrays:
        images, expected = arrays["images"], arrays["fp32"]
    if precision == "int8":
        with arrays_of(bundle.path / GOLDEN_INT8) as arrays:
            expected = arrays["int8"]
    size = bundle.input_spec.size
    if images.dtype != np.uint8 or images.shape[1:] != (size, size) or not len(images):
        raise BundleError(f"{bundle.path / GOLDEN}: is damaged: images are {images.dtype} {images.shape}")
    if expected.dtype != np.float32 or expected.shape != (len(images), len(bundle.findings)):
        raise BundleError(f"{bundle.path / GOLDEN}: is damaged: probabilities are {expected.dtype} {expected.shape}")
    drift = np.abs(runtime.predict(images).probabilities - expected).max()
    if not drift <= TOLERANCE[precision]:  # NaN is refused too
        raise BundleError(
            f"{bundle.path}: in {precision} on this machine its probabilities for the golden images are off by "
            f"{drift:.3g}, more than {TOLERANCE[precision]:g}; use another --precision"
        )


@contextlib.contextmanager
def arrays_of(path: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Open an `.npz` file of a bundle; what is wrong with it or said of it in the block is a BundleError."""
    try:
        with zipfile.ZipFile(path) as packed:
            if sum(item.file_size for item in packed.infolist()) > _MAX_UNPACKED:
                raise ValueError(f"unpacks to more than {_MAX_UNPACKED >> 20} MiB")
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, EOFError, KeyError, MemoryError, ValueError, zipfile.BadZipFile) as error:
        raise BundleError(f"{path}: is damaged ({reason(error)}); copy the bundle again") from None


_FIRST_LOOK = threading.Lock()


class OpenVinoRuntime:
    """A graph of OpenVINO on CPU threads, several batches in flight.

    Args:
        graph: the `.xml` file, its `.bin` beside it.
        precision: `fp32`, `bf16` or `int8` (the last is in the graph itself).
        batch_size: every batch is padded to it, so that an image's answer does not depend on its company.
        threads: one stream, and so one batch at a time, for each.

    Raises:
        BundleError: not a graph as `exports` writes it.
    """

    def __init__(self, graph: Path, precision: str, batch_size: int, threads: int) -> None:
        core = openvino().Core()
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
                    # What int8 leaves is quicker in bf16 too, where the CPU has it.
                    "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" or not cpu_has_bf16() else "bf16",
                    "INFERENCE_NUM_THREADS": threads,
                    "NUM_STREAMS": threads,
                    # Pinned threads of two processes would share one core and leave another idle.
                    "ENABLE_CPU_PINNING": False,
                },
            )
        except (RuntimeError, IndexError) as error:
            raise BundleError(f"{graph}: OpenVINO cannot run it: {reason(error)}") from None
        self._shape = (batch_size, size, size, 1)
        # One more request than streams, so that a stream never waits for its next batch.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests = [compiled.create_infer_request() for _ in range(threads + 1)]
        # The first look at an element type, or at a tensor's data, makes a table in OpenVINO's C++. Two threads that
        # take it together can wait for ever, one for Python's lock while it holds the table's, one the other way round.
        with _FIRST_LOOK:
            compiled.input(0).get_element_type().to_dtype()
            for name in OUTPUTS:
                requests[0].get_tensor(name).data  # noqa: B018
        for request in requests:
            self._idle.put(request)
        # A thread waits for each. OpenVINO's own queue calls nobody back for a batch that fails, and is never freed.
        self._waiting = ThreadPoolExecutor(threads + 1, thread_name_prefix="openvino")

    def submit(self, images: np.ndarray) -> Future[Outputs]:
        n = len(images)
        batch = np.zeros(self._shape, np.uint8)
        batch[:n, ..., 0] = images
        return self._waiting.submit(self._run, self._idle.get(), batch, n)

    def _run(self, request: Any, batch: np.ndarray, n: int) -> Outputs:
        try:
            # Started and waited for: `infer` would run in this thread, beside the streams.
            request.start_async({0: batch}, share_inputs=True)
            request.wait()
            return Outputs(*(request.get_tensor(name).data[:n].copy() for name in OUTPUTS))
        finally:
            self._idle.put(request)

    def predict(self, images: np.ndarray) -> Outputs:
        return _in_batches(self, images, self._shape[0])


class KerasRuntime:
    """A Keras model, of any backend, behind the same calls.

    Every batch is padded to one size, so that a graph is traced once and a picture's probabilities do not depend
    on how many others came with it.
    """

    def __init__(self, model: keras.Model, batch_size: int) -> None:
        import keras

        self._model = keras.Model(model.input, [model.output, model.get_layer("logits").input])
        self._batch_size = batch_size
        self._turn = threading.Lock()

    def submit(self, images: np.ndarray) -> Future[Outputs]:
        n = len(images)
        batch = np.zeros((self._batch_size, *images.shape[1:], 1), np.uint8)
        batch[:n, ..., 0] = images
        future: Future[Outputs] = Future()
        with self._turn:
            found = self._model.predict_on_batch(batch)
        future.set_result(Outputs(*(np.asarray(array, dtype=np.float32)[:n] for array in found)))
        return future

    def predict(self, images: np.ndarray) -> Outputs:
        return _in_batches(self, images, self._batch_size)


def _in_batches(runtime: Runtime, images: np.ndarray, step: int) -> Outputs:
    # An empty batch, where there are no images at all, has the right shapes.
    parts = [runtime.submit(images[start : start + step]) for start in range(0, max(len(images), 1), step)]
    return Outputs(*(np.concatenate(arrays) for arrays in zip(*(part.result() for part in parts), strict=True)))


def limit_threads(threads: int) -> None:
    """Give TensorFlow so many threads in this process; must come before its first operation.

    Without it every process takes a thread per core of the machine, and the actors of one node fight for them.
    """
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def use_gpu_memory_as_needed() -> int:
    """Stop TensorFlow from taking a whole GPU at its first use; returns how many GPUs this process sees."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    return len(gpus)


def prepare_device(gpu: bool, precision: str) -> str:
    """Choose where this process computes; must come before TensorFlow's first operation.

    Args:
        gpu: on its GPU; else on the CPU, also where GPUs are visible.
        precision: `auto`, or a Keras dtype policy.

    Returns:
        The Keras dtype policy: for `auto` float32 on CPUs, mixed_bfloat16 on GPUs that have it (compute capability
        8.0), mixed_float16 on those with tensor cores (7.0), float32 on older ones.

    Raises:
        ConfigError: a GPU is wanted and none is seen.
    """
    import tensorflow as tf

    if not gpu:
        tf.config.set_visible_devices([], "GPU")
        # Grappler takes 8 s over DenseNet121's training graph, and on a CPU the steps are no faster for it.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
        return "float32" if precision == "auto" else precision
    if not use_gpu_memory_as_needed():
        raise ConfigError("--gpu: this worker sees no GPU; install requirements-gpu.lock there, or leave --gpu out")
    if precision != "auto":
        return precision
    capability = _gpu_capability()
    if capability >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if capability >= (7, 0) else "float32"


def _gpu_capability() -> tuple[int, int]:
    """CUDA's compute capability of the first GPU, (0, 0) where it is not known."""
    import tensorflow as tf

    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    major, minor = details.get("compute_capability") or (0, 0)
    return int(major), int(minor)


def make_deterministic() -> None:
    """The same bits on every run: TensorFlow then picks only kernels that add in a fixed order."""
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()


def reason(error: BaseException) -> str:
    """One line of an error's text: the first that does not only name a line of OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith("Exception from")]
    return (told or lines or [type(error).__name__])[0][:200]
