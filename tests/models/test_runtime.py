"""Choice of device and precision, and equal answers from OpenVINO and Keras. TensorFlow's GPU is simulated."""

from __future__ import annotations

import gc
import importlib
import re
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_bundle import BF16, FP32, remove_graph, reseal, writable_copy

from ray_cxr import load_bundle
from ray_cxr.errors import BundleError, ConfigError, RayCxrError
from ray_cxr.models import bundle as bundles
from ray_cxr.models import exports, runtime

BATCH = 4


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """TensorFlow reports one GPU; its memory settings are recorded under `growth`."""
    state: dict[str, Any] = {"devices": ["GPU:0"], "details": {}, "growth": []}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: state["devices"])
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda *given: state["growth"].append(given))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: state["details"])
    return state


@pytest.mark.parametrize(
    ("details", "precision", "policy"),
    [
        ({"compute_capability": (8, 0)}, "auto", "mixed_bfloat16"),
        ({"compute_capability": (7, 0)}, "auto", "mixed_float16"),
        ({"compute_capability": (6, 1)}, "auto", "float32"),
        ({}, "auto", "float32"),
        ({"compute_capability": (9, 0)}, "float32", "float32"),
    ],
)
def test_gpu_trains_in_its_best_precision(gpu, details, precision: str, policy: str) -> None:
    gpu["details"] = details
    assert runtime.prepare_device(True, precision) == policy
    assert gpu["growth"] == [("GPU:0", True)], "TensorFlow would take all of its memory"


def test_missing_gpu_or_bf16_is_refused(gpu, tiny_bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu["devices"] = []
    with pytest.raises(ConfigError, match=r"--gpu: "):
        runtime.prepare_device(True, "auto")
    with pytest.raises(ConfigError, match=r"--gpu: "):
        tiny_bundle.open_runtime("fp32", batch_size=BATCH, threads=1, gpu=True)
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    with pytest.raises(ConfigError, match=r"this node's CPU.*--precision fp32"):
        tiny_bundle.open_runtime("bf16", batch_size=BATCH, threads=1)


def test_cpu_hides_gpus_and_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[object] = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *given: hidden.append(given))
    monkeypatch.setattr(tf.config.optimizer, "set_experimental_options", lambda options: None)
    assert [runtime.prepare_device(False, given) for given in ("auto", "mixed_float16")] == ["float32", "mixed_float16"]
    assert hidden == [([], "GPU")] * 2


GOOD = {"largest_drift": 0.001, "tolerance": 0.02, "accepted": True}
FAR = {"largest_drift": 0.5, "tolerance": 0.02, "accepted": False}


def info_of(**graphs: dict[str, Any]) -> dict[str, Any]:
    return {"runtimes": {"fp32": FP32, **graphs}}


@pytest.mark.parametrize(
    ("info", "has_bf16", "wanted", "gpu", "expected"),
    [
        (info_of(bf16=GOOD), True, "auto", False, "bf16"),
        (info_of(bf16=GOOD), False, "auto", False, "fp32"),
        (info_of(bf16=BF16), True, "auto", False, "fp32"),
        ({}, True, "auto", False, "fp32"),
        (info_of(bf16=GOOD), True, "fp32", False, "fp32"),
        (info_of(bf16=BF16), True, "bf16", False, "bf16"),
        (info_of(bf16=GOOD, int8=GOOD), False, "int8", False, "int8"),
        (info_of(bf16=FAR), False, "auto", True, "bf16"),
        ({}, False, "bf16", True, "bf16"),
        (info_of(bf16=GOOD), False, "bf16", False, "--precision bf16: this CPU"),
        (info_of(bf16=FAR), True, "bf16", False, "--precision bf16: .* up to 0.500, 0.02 is allowed"),
        ({"runtimes_refused": "off by 1"}, True, "bf16", False, "--precision bf16: .*no OpenVINO graph .*off by 1"),
        (info_of(bf16=GOOD), True, "int8", False, "--precision int8: .*ray-cxr quantize"),
        (info_of(bf16=GOOD, int8=FAR), True, "int8", False, "--precision int8: .*ray-cxr quantize"),
        (info_of(bf16=GOOD, int8=GOOD), True, "int8", True, "--precision int8: .*CPUs only"),
    ],
)
def test_precision_is_chosen_or_refused(monkeypatch, info, has_bf16: bool, wanted: str, gpu: bool, expected) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: has_bf16)
    if expected in runtime.TOLERANCE:
        assert runtime.choose_precision(info, wanted, gpu=gpu) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            runtime.choose_precision(info, wanted, gpu=gpu)


@pytest.mark.parametrize(
    ("capability", "precision", "policy"),
    [((8, 0), "bf16", "mixed_bfloat16"), ((7, 5), "bf16", "float32"), ((9, 0), "fp32", "float32")],
)
def test_gpu_scores_in_bf16_or_in_full_float32(tiny_bundle, gpu, monkeypatch, capability, precision, policy) -> None:
    gpu["details"] = {"compute_capability": capability}
    calls: list[object] = []
    monkeypatch.setattr(tf.config.experimental, "enable_tensor_float_32_execution", calls.append)
    monkeypatch.setattr(bundles.Bundle, "model", lambda self, *, policy: calls.append(policy))
    monkeypatch.setattr(runtime, "KerasRuntime", lambda model, batch_size, *, jit_compile: None)
    monkeypatch.setattr(bundles.Bundle, "check_golden", lambda *_: None)
    tiny_bundle.open_runtime(precision, batch_size=BATCH, threads=1, gpu=True)
    assert calls == ([policy] if policy == "mixed_bfloat16" else [False, policy])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    return np.concatenate([exports.golden_images(bundles.InputSpec(size=64)), noise])


@pytest.fixture(scope="module")
def by_keras(tiny_bundle) -> runtime.KerasRuntime:
    return runtime.KerasRuntime(tiny_bundle.model(), BATCH)


@pytest.fixture(scope="module")
def fp32(tiny_bundle) -> runtime.Runtime:
    return tiny_bundle.open_runtime("fp32", batch_size=BATCH, threads=2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_equals_keras_in_any_batch(tiny_bundle, by_keras, fp32, images, precision: str) -> None:
    opened = fp32
    if precision == "bf16":
        if not runtime.cpu_has_bf16():
            pytest.skip("this CPU does not compute in bf16")
        opened = tiny_bundle.open_runtime("bf16", batch_size=BATCH, threads=2)
    found, expected = opened.predict(images), by_keras.predict(images)
    tolerance = 1e-5 if precision == "fp32" else runtime.TOLERANCE["bf16"]
    scale = np.abs(expected.features).max()
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.features, expected.features, rtol=0, atol=2 * scale * tolerance)
    assert {array.dtype for array in (*found[:2], *expected[:2])} == {np.dtype(np.float32)}
    assert precision == "fp32" or (found.probabilities != expected.probabilities).any(), "this was not bf16"
    # At the same position of a batch, an image has the same bits for any other images.
    replaced = images.copy()
    replaced[np.arange(len(images)) % BATCH != 0] = 7
    np.testing.assert_array_equal(opened.predict(replaced).probabilities[::BATCH], found.probabilities[::BATCH])
    np.testing.assert_allclose(opened.predict(images[::-1]).probabilities[::-1], found.probabilities, atol=tolerance)
    # Without images there are no rows.
    for engine in (opened, by_keras):
        assert [array.shape for array in engine.predict(images[:0])[:2]] == [
            (0, array.shape[1]) for array in expected[:2]
        ]
    assert len(tiny_bundle.predict([])) == 0


def test_several_threads_may_submit_and_reuse_their_arrays(fp32: runtime.Runtime, images: np.ndarray) -> None:
    expected = fp32.predict(images).probabilities

    def submit(k: int) -> Any:
        batch = images[k % 11 : k % 11 + 1].copy()
        future = fp32.submit(batch)
        batch[:] = 0
        return future

    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(submit, range(200)))
    for k, future in enumerate(futures):
        np.testing.assert_allclose(future.result(timeout=120).probabilities[0], expected[k % 11], rtol=0, atol=1e-6)


def test_failed_batch_raises_and_the_next_one_runs(tiny_bundle, images: np.ndarray) -> None:
    opened = runtime.OpenVinoRuntime(tiny_bundle.path / "openvino.xml", "fp32", BATCH, 1)
    expected = opened.predict(images[:2]).probabilities
    opened.batch_shape, shape = (BATCH, 32, 32, 1), opened.batch_shape  # OpenVINO refuses this batch
    failed = [opened.submit(images[:1, :32, :32]) for _ in range(5)]
    opened.batch_shape = shape
    for future in failed:
        with pytest.raises(RuntimeError):
            future.result(timeout=120)
    np.testing.assert_array_equal(opened.submit(images[:2]).result(timeout=120).probabilities, expected)
    with pytest.raises(ValueError, match="broadcast"):
        opened.submit(images[: BATCH + 1])


@pytest.mark.parametrize("engine", ["openvino", "keras"])
def test_unused_runtime_and_its_threads_end(tiny_bundle, images: np.ndarray, engine: str) -> None:
    opened: runtime.ThreadedRuntime = (
        runtime.KerasRuntime(tiny_bundle.model(), BATCH)
        if engine == "keras"
        else runtime.OpenVinoRuntime(tiny_bundle.path / "openvino.xml", "fp32", BATCH, 1)
    )
    opened.predict(images)
    held, threads = weakref.ref(opened), list(opened._pool._threads)
    del opened
    gc.collect()
    for thread in threads:  # each frees its last batch a moment after its result
        thread.join(60)
        assert not thread.is_alive()
    assert held() is None


@pytest.mark.parametrize("jit_compile", [False, True])
def test_keras_batches_overlap_and_equal_predict_on_batch(tiny_bundle, images: np.ndarray, jit_compile: bool) -> None:
    model = tiny_bundle.model()
    opened = runtime.KerasRuntime(model, BATCH, jit_compile=jit_compile)
    both = keras.Model(model.input, [model.output, model.get_layer("logits").input])
    both.jit_compile = jit_compile
    batches = [np.roll(images, k, axis=0)[:BATCH] for k in range(24)]
    expected = [both.predict_on_batch(batch[..., None]) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        futures = list(pool.map(opened.submit, batches))
    for future, (probabilities, features) in zip(futures, expected, strict=True):
        found = future.result(timeout=120)
        np.testing.assert_array_equal(found.probabilities, probabilities)
        np.testing.assert_array_equal(found.features, features)
    opened.close()
    for _ in range(5):  # more than there are slots
        with pytest.raises(RuntimeError):
            opened.submit(images[:1])


class OnGpu:
    """A result that the GPU has not computed yet."""

    def __init__(self, is_computed: threading.Event, values: Any) -> None:
        self._is_computed, self._values = is_computed, values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        assert self._is_computed.wait(60)
        return np.asarray(self._values, dtype)


def test_keras_starts_the_next_batch_before_results_are_there(tiny_bundle, images: np.ndarray) -> None:
    opened = runtime.KerasRuntime(tiny_bundle.model(), BATCH)
    expected, start = opened.predict(images[:BATCH]), opened._start
    started, events, names = threading.Semaphore(0), [threading.Event() for _ in range(4)], iter(range(4))

    def start_slowly(batch: Any) -> list[OnGpu]:
        is_computed = events[next(names)]
        started.release()
        return [OnGpu(is_computed, values) for values in start(batch)]

    opened._start = start_slowly
    opened.usage.reset()
    with ThreadPoolExecutor(1) as pool:
        futures = [opened.submit(images[:BATCH]) for _ in range(3)]
        for _ in futures:
            assert started.acquire(timeout=60), "the batch before it had to end first"
        fourth = pool.submit(opened.submit, images[:BATCH])
        assert not started.acquire(timeout=0.05), "more batches in flight than slots"
        for event in events:
            event.set()
        for future in (*futures, fourth.result(timeout=60)):
            np.testing.assert_array_equal(future.result(timeout=60).probabilities, expected.probabilities)
    usage = opened.usage.take()
    assert 0.04 < usage.reader_wait_s <= usage.seconds
    assert usage.model_wait_s < usage.seconds


@pytest.mark.parametrize(
    ("error", "jit_compile", "message"),
    [
        (
            tf.errors.ResourceExhaustedError(None, None, "OOM\nmore"),
            True,
            "out of memory.* score.batch_size=2",
        ),
        (tf.errors.InternalError(None, None, "libdevice not found\nat"), True, "libdevice.* score.jit_compile=false"),
        (tf.errors.InternalError(None, None, "no kernel\nat"), False, "CPU:0 cannot run the model: no kernel"),
    ],
)
def test_failed_batch_of_keras_is_one_line_and_the_next_one_runs(
    tiny_bundle, images, by_keras, error: Exception, jit_compile: bool, message: str
) -> None:
    opened = runtime.KerasRuntime(tiny_bundle.model(), BATCH)
    opened._jit_compile, start = jit_compile, opened._start

    def fail(batch: Any) -> None:
        raise error

    opened._start = fail
    for future in [opened.submit(images[:1]) for _ in range(5)]:
        with pytest.raises(RayCxrError, match=rf"^[^\n]*{message}[^\n]*$"):
            future.result(timeout=60)
    opened._start = start
    np.testing.assert_array_equal(opened.predict(images).probabilities, by_keras.predict(images).probabilities)


def test_usage_counts_idle_lanes_and_waiting_callers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now)
    meter = runtime.UsageMeter(2)

    def change(seconds: float, **counts: int) -> None:
        nonlocal now
        now += seconds
        meter.add(**counts)

    assert meter.take() == (0, 0, 0)
    change(5, running=1)  # the first batch starts the clock
    change(2, running=1)  # one of two lanes was idle
    change(1, waiting=1)
    change(4, waiting=1)
    change(4, running=1)  # a third batch in flight is not a third lane
    change(1, waiting=-2, running=-3)
    now += 3
    assert meter.take() == (15, 2 / 2 + 3, 9)
    assert meter.take() == (0, 0, 0)
    now += 2
    assert runtime.Usage(*meter.take()).shares() == {"model_waited_for_images": 1.0, "images_waited_for_model": 0.0}
    meter.reset()
    now += 2
    assert runtime.Usage(*meter.take()).shares() == {}


def test_invalid_graph_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.bin").write_bytes(b"")
    for content in (b"", b"no graph", b"<?xml version='1.0'?><net name='x' version='11'></net>"):
        (tmp_path / "g.xml").write_bytes(content)
        with pytest.raises(BundleError, match=r"g\.xml: [^\n]*$"):
            runtime.OpenVinoRuntime(tmp_path / "g.xml", "fp32", BATCH, 1)


def change_golden(bundle: Path, change: Any) -> None:
    """Replace the golden arrays by those of `change(images, probabilities)`."""
    with np.load(bundle / runtime.GOLDEN) as arrays:
        given = dict(arrays)
    np.savez(bundle / runtime.GOLDEN, **(given | change(given["images"], given["fp32"])))
    reseal(bundle)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda images, p: {"fp32": p + np.float32(0.01)}, r"off by 0\.01 .*0\.001"),
        (lambda images, p: {"fp32": p * np.nan}, "off by nan"),
        (lambda images, p: {"images": images[:, :32]}, r"golden\.npz: damaged: images"),
        (lambda images, p: {"images": images[:0], "fp32": p[:0]}, r"golden\.npz: damaged: images"),
        (lambda images, p: {"fp32": p[:, :1]}, r"golden\.npz: damaged: probabilities"),
        (lambda images, p: {"fp32": np.array([object()])}, r"golden\.npz: damaged"),
    ],
)
def test_answers_that_differ_from_the_golden_ones_are_refused(tiny_bundle, fp32, tmp_path, spoil, reason: str) -> None:
    copy = writable_copy(tiny_bundle, tmp_path / "copy")
    change_golden(copy, spoil)
    with pytest.raises(BundleError, match=reason):
        load_bundle(copy).check_golden(fp32, "fp32")


@pytest.mark.slow
def test_predict_checks_openvino_and_keras_against_the_golden_images(tiny_bundle, tmp_path: Path) -> None:
    copy = writable_copy(tiny_bundle, tmp_path / "copy")
    change_golden(copy, lambda images, p: {"fp32": 1 - p})
    with pytest.raises(BundleError, match="golden images are off by"):
        load_bundle(copy).predict(np.zeros((1, 64, 64), np.uint8), precision="fp32")
    remove_graph(copy)
    with pytest.raises(BundleError, match="golden images are off by"):
        load_bundle(copy).predict(np.zeros((1, 64, 64), np.uint8))


@pytest.mark.slow
def test_keras_in_bfloat16_stays_near_and_its_policy_does_not_leak(tiny_bundle, by_keras, images: np.ndarray) -> None:
    model = tiny_bundle.model(policy="mixed_bfloat16")
    assert keras.config.dtype_policy().name == "float32"
    half, exact = runtime.KerasRuntime(model, BATCH).predict(images), by_keras.predict(images)
    assert half.probabilities.dtype == half.features.dtype == np.float32
    np.testing.assert_allclose(half.probabilities, exact.probabilities, rtol=0, atol=runtime.TOLERANCE["bf16"])
    assert (half.probabilities != exact.probabilities).any()
    assert {layer.compute_dtype for layer in by_keras._model.layers} <= {"float32", "uint8"}


def test_openvino_is_imported_in_one_place_and_reports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in Path(runtime.__file__).parents[1].rglob("*.py")}
    found = {name for name, text in sources.items() if re.search(r"^ *(import|from) (openvino|nncf)\b", text, re.M)}
    assert found == {"runtime.py", "quantization.py"}
    module = runtime.import_openvino()
    monkeypatch.delitem(sys.modules, "openvino_telemetry")  # as where other code imports it first
    sender = importlib.import_module("openvino_telemetry.utils.sender").TelemetrySender
    monkeypatch.setattr(sender, "send", None)
    assert runtime.import_openvino() is module
    assert sender.send is runtime._send_nothing
    sender.send(object(), "event", label="x")
