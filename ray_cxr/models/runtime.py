"""Running a network over batches of images, the same way for a laptop's `predict` and a cluster's `score`."""

from __future__ import annotations

import keras
import numpy as np

from ray_cxr.errors import ConfigError


def limit_threads(threads: int) -> None:
    """Give TensorFlow so many threads in this process; must come before its first operation.

    Without it every process takes a thread per core of the machine, and the actors of one node fight for them.
    """
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
    details = tf.config.experimental.get_device_details(tf.config.list_physical_devices("GPU")[0])
    capability = details.get("compute_capability", (0, 0))
    if capability >= (8, 0):
        return "mixed_bfloat16"
    return "mixed_float16" if capability >= (7, 0) else "float32"


def make_deterministic() -> None:
    """The same bits on every run: TensorFlow then picks only kernels that add in a fixed order."""
    import tensorflow as tf

    tf.config.experimental.enable_op_determinism()


class KerasRuntime:
    """A Keras model behind one call.

    Every batch is padded to one size, so that a graph is traced once and a picture's probabilities do not depend
    on how many others came with it.
    """

    def __init__(self, model: keras.Model, batch_size: int) -> None:
        self._model = model
        self._batch_size = batch_size

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Probabilities of images uint8 [N,S,S], as float32 [N,F]."""
        size = self._batch_size
        results = [np.empty((0, self._model.output.shape[-1]), dtype=np.float32)]
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            n = len(batch)
            if n < size:
                batch = np.concatenate([batch, np.zeros((size - n, *batch.shape[1:]), dtype=np.uint8)])
            results.append(np.asarray(self._model.predict_on_batch(batch[..., None]), dtype=np.float32)[:n])
        return np.concatenate(results)
