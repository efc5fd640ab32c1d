"""Which device and precision a process takes, and that all of them give Keras' answers.

The GPU's part has TensorFlow's answers made up, for want of one.
"""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_exports import write

from ray_cxr.errors import BundleError, ConfigError
from ray_cxr.models import bundle as bundles
from ray_cxr.models import exports, runtime

BATCH = 4
needs_bf16 = pytest.mark.skipif(not runtime.cpu_has_bf16(), reason="this CPU does not compute in bf16")
PRECISIONS = ["fp32", pytest.param("bf16", marks=needs_bf16)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A process that seems to see one GPU; what is asked of TensorFlow is written down."""
    state: dict[str, object] = {"devices": ["GPU:0"], "capability": (9, 0), "growth": []}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: state["devices"])
    monkeypatch.setattr(
        tf.config.experimental, "set_memory_growth", lambda device, on: state["growth"].append((device, on))
    )
    monkeypatch.setattr(
        tf.config.experimental,
        "get_device_details",
        lambda device: {"compute_capability": state["capability"]} if state["capability"] else {},
    )
    return state


@pytest.mark.parametrize(
    ("capability", "policy"),
    [
        ((9, 0), "mixed_bfloat16"),
        ((8, 0), "mixed_bfloat16"),
        ((7, 5), "mixed_float16"),
        ((6, 1), "float32"),
        (None, "float32"),
    ],
)
def test_a_gpu_gets_the_mixed_precision_that_it_has(gpu, capability, policy: str) -> None:
    gpu["capability"] = capability
    assert runtime.prepare_device(True, "auto") == policy
    assert gpu["growth"] == [("GPU:0", True)], "else TensorFlow takes all of its memory"


def test_a_precision_that_is_asked_for_is_taken(gpu) -> None:
    assert runtime.prepare_device(True, "float32") == "float32"
    assert gpu["growth"] == [("GPU:0", True)]


def test_a_gpu_that_is_asked_for_and_not_seen_is_one_line(gpu) -> None:
    gpu["devices"] = []
    with pytest.raises(ConfigError, match=r"sees no GPU; install requirements-gpu\.lock there, or leave --gpu out"):
        runtime.prepare_device(True, "auto")


def test_a_cpu_hides_the_gpus_and_computes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden: list[tuple[list[str], str]] = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: hidden.append((devices, kind)))
    monkeypatch.setattr(tf.config.optimizer, "set_experimental_options", lambda options: None)
    assert runtime.prepare_device(False, "auto") == "float32"
    assert runtime.prepare_device(False, "mixed_bfloat16") == "mixed_bfloat16"
    assert hidden == [([], "GPU")] * 2


# ---------------------------------------------------------------- which precision

FP32 = {"largest_drift": 1e-7, "tolerance": 1e-3, "accepted": True}
GOOD = {"largest_drift": 0.001, "tolerance": 0.02, "accepted": True}
FAR = {"largest_drift": 0.5, "tolerance": 0.02, "accepted": False}
OPEN = {"largest_drift": None, "tolerance": 0.02, "accepted": None}


@pytest.mark.parametrize(
    ("runtimes", "has_bf16", "wanted", "gpu", "expected"),
    [
        ({"fp32": FP32, "bf16": GOOD}, True, "auto", False, "bf16"),
        ({"fp32": FP32, "bf16": GOOD}, False, "auto", False, "fp32"),
        ({"fp32": FP32, "bf16": FAR}, True, "auto", False, "fp32"),
        ({"fp32": FP32, "bf16": OPEN}, True, "auto", False, "fp32"),
        (None, True, "auto", False, "fp32"),
        (None, True, "fp32", False, "fp32"),
        ({"fp32": FP32, "bf16": GOOD}, True, "fp32", False, "fp32"),
        ({"fp32": FP32, "bf16": GOOD}, True, "bf16", False, "bf16"),
        ({"fp32": FP32, "bf16": OPEN}, True, "bf16", False, "bf16"),
        ({"fp32": FP32, "bf16": GOOD, "int8": GOOD}, True, "int8", False, "int8"),
        ({"fp32": FP32, "bf16": GOOD, "int8": GOOD}, False, "int8", False, "int8"),
        ({"fp32": FP32, "bf16": GOOD, "int8": GOOD}, True, "auto", False, "bf16"),
        ({"fp32": FP32, "bf16": FAR}, False, "auto", True, "bf16"),
        (None, False, "auto", True, "bf16"),
        (None, False, "fp32", True, "fp32"),
        (None, False, "bf16", True, "bf16"),
    ],
)
def test_the_precision_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch, runtimes, has_bf16: bool, wanted: str, gpu: bool, expected: str
) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: has_bf16)
    info = {} if runtimes is None else {"runtimes": runtimes}
    assert runtime.choose_precision(info, wanted, gpu=gpu) == expected


@pytest.mark.parametrize(
    ("info", "has_bf16", "wanted", "gpu", "reason"),
    [
        ({"runtimes": {"fp32": FP32, "bf16": GOOD}}, False, "bf16", False, "this CPU does not compute in bf16"),
        ({"runtimes": {"fp32": FP32, "bf16": FAR}}, True, "bf16", False, r"move by 0\.500 in bf16, more than 0\.02"),
        ({}, True, "bf16", False, "has no OpenVINO graph .*older ray-cxr"),
        ({"runtimes_refused": "it is off by 1"}, True, "bf16", False, "has no OpenVINO graph .*it is off by 1"),
        ({"runtimes": {"fp32": FP32, "bf16": GOOD}}, True, "int8", False, "ray-cxr quantize BUNDLE PREPARED"),
        ({"runtimes": {"fp32": FP32, "bf16": GOOD, "int8": FAR}}, True, "int8", False, "ray-cxr quantize"),
        ({}, True, "int8", False, "ray-cxr quantize"),
        ({"runtimes": {"fp32": FP32, "bf16": GOOD, "int8": GOOD}}, True, "int8", True, "runs on CPUs only"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, info, has_bf16: bool, wanted: str, gpu: bool, reason: str
) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: has_bf16)
    with pytest.raises(ConfigError, match=f"--precision {wanted}: .*{reason}"):
        runtime.choose_precision(info, wanted, gpu=gpu)


def test_another_node_without_bf16_stops(tiny_bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    with pytest.raises(ConfigError, match=r"this node's CPU does not compute in bf16.*--precision fp32"):
        runtime.open_runtime(tiny_bundle, "bf16", batch_size=BATCH, threads=1)


@pytest.mark.parametrize(
    ("capability", "precision", "policy"),
    [
        ((9, 0), "bf16", "mixed_bfloat16"),
        ((7, 5), "bf16", "float32"),
        (None, "bf16", "float32"),
        ((9, 0), "fp32", "float32"),
    ],
)
def test_a_gpu_computes_in_bf16_where_it_has_it_and_whole_otherwise(
    tiny_bundle, gpu, monkeypatch: pytest.MonkeyPatch, capability, precision: str, policy: str
) -> None:
    gpu["capability"] = capability
    asked: list[object] = []
    monkeypatch.setattr(tf.config.experimental, "enable_tensor_float_32_execution", asked.append)
    monkeypatch.setattr(bundles.Bundle, "model", lambda self, *, policy: asked.append(policy))
    monkeypatch.setattr(runtime, "KerasRuntime", lambda model, batch_size: None)
    monkeypatch.setattr(runtime, "check", lambda *_: None)
    runtime.open_runtime(tiny_bundle, precision, batch_size=BATCH, threads=1, gpu=True)
    assert asked == ([policy] if policy == "mixed_bfloat16" else [False, policy])


# ---------------------------------------------------------------- what they answer


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    return np.concatenate([exports.golden_images(bundles.InputSpec(size=64)), noise])


@pytest.fixture(scope="module")
def by_keras(tiny_bundle) -> runtime.KerasRuntime:
    return runtime.KerasRuntime(tiny_bundle.model(), BATCH)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_openvino_gives_what_keras_gives(tiny_bundle, by_keras, images: np.ndarray, precision: str) -> None:
    found = runtime.open_runtime(tiny_bundle, precision, batch_size=BATCH, threads=2).predict(images)
    expected = by_keras.predict(images)
    exact = precision == "fp32"
    np.testing.assert_allclose(
        found.probabilities, expected.probabilities, rtol=0, atol=1e-5 if exact else runtime.TOLERANCE["bf16"]
    )
    scale = np.abs(expected.features).max()
    np.testing.assert_allclose(found.features, expected.features, rtol=0, atol=scale * (1e-5 if exact else 0.02))
    for array in (*found, *expected):
        assert array.dtype == np.float32
    assert exact or (found.probabilities != expected.probabilities).any(), "else this was not bf16"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_its_company(tiny_bundle, images: np.ndarray, precision: str) -> None:
    network = runtime.open_runtime(tiny_bundle, precision, batch_size=BATCH, threads=2)
    together, backwards = network.predict(images), network.predict(images[::-1])
    for i in range(len(images)):
        alone = network.predict(images[i : i + 1])
        for one, all_of_them, reverse in zip(alone, together, backwards, strict=True):
            np.testing.assert_array_equal(one[0], all_of_them[i])
            np.testing.assert_array_equal(one[0], reverse[::-1][i])


def test_no_images_give_no_rows(tiny_bundle, by_keras) -> None:
    nothing = np.zeros((0, 64, 64), np.uint8)
    for network in (runtime.open_runtime(tiny_bundle, "fp32", batch_size=BATCH, threads=1), by_keras):
        found = network.predict(nothing)
        assert found.probabilities.shape == (0, len(tiny_bundle.findings))
        assert found.features.shape[0] == 0
        assert found.features.shape[1] > 1
    assert len(tiny_bundle.predict([])) == 0


def test_several_threads_may_submit_at_once(tiny_bundle, images: np.ndarray) -> None:
    network = runtime.open_runtime(tiny_bundle, "fp32", batch_size=BATCH, threads=2)
    expected = network.predict(images).probabilities
    with ThreadPoolExecutor(8) as pool:
        futures = list(pool.map(lambda k: (k % 11, network.submit(images[k % 11 : k % 11 + 1])), range(200)))
    for k, future in futures:
        np.testing.assert_array_equal(future.result(timeout=60).probabilities[0], expected[k])


def test_the_array_may_be_used_again_at_once(tiny_bundle, images: np.ndarray) -> None:
    network = runtime.open_runtime(tiny_bundle, "fp32", batch_size=BATCH, threads=1)
    expected = network.predict(images[:BATCH]).probabilities
    batch = images[:BATCH].copy()
    futures = []
    for _ in range(5):
        batch[:] = images[:BATCH]
        futures.append(network.submit(batch))
        batch[:] = 0
    for future in futures:
        np.testing.assert_array_equal(future.result().probabilities, expected)


def brittle(path: Path) -> None:
    """A graph that fails at run time where the brightest gray of a batch is not its number of images."""
    ov = runtime.openvino()
    ops = ov.opset13
    image = ops.parameter([-1, 64, 64, 1], np.uint8, name="image")
    brightest = ops.reduce_max(ops.convert(image, "i64"), np.array([0, 1, 2, 3]), keep_dims=False)
    means = ops.reduce_mean(ops.convert(image, "f32"), np.array([1, 2]), keep_dims=False)
    shape = ops.concat([ops.unsqueeze(brightest, np.array(0)), ops.constant(np.array([3], np.int64))], 0)
    three = ops.reshape(ops.tile(means, np.array([1, 3])), shape, special_zero=False)
    three.output(0).set_names({"probabilities"})
    means.output(0).set_names({"features"})
    model = ov.Model([ops.result(three), ops.result(means)], [image], "brittle")
    ov.save_model(model, path, compress_to_fp16=False)


def test_a_batch_that_fails_says_so_and_the_next_one_runs(tmp_path: Path) -> None:
    """With OpenVINO's own queue whoever waited for it would have waited for ever."""
    brittle(tmp_path / "g.xml")
    network = runtime.OpenVinoRuntime(tmp_path / "g.xml", "fp32", BATCH, 1)
    good = np.full((BATCH, 64, 64), BATCH, np.uint8)
    assert network.predict(good).probabilities.shape == (BATCH, 3)
    failed = [network.submit(good + np.uint8(k)) for k in range(1, 6)]
    for future in failed:
        with pytest.raises(RuntimeError):
            future.result(timeout=30)
    assert network.submit(good).result(timeout=30).probabilities.shape == (BATCH, 3)
    with pytest.raises(ValueError, match="broadcast"):
        network.submit(np.zeros((BATCH + 1, 64, 64), np.uint8))


def test_a_runtime_that_nobody_holds_is_freed(tiny_bundle, images: np.ndarray) -> None:
    network = runtime.OpenVinoRuntime(tiny_bundle.path / "openvino.xml", "fp32", BATCH, 2)
    network.predict(images)
    held = weakref.ref(network)
    del network
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("content", [b"", b"no graph", b"<?xml version='1.0'?><net name='x' version='11'></net>"])
def test_what_is_no_graph_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "g.xml").write_bytes(content)
    (tmp_path / "g.bin").write_bytes(b"")
    with pytest.raises(BundleError, match="OpenVINO cannot run it") as refused:
        runtime.OpenVinoRuntime(tmp_path / "g.xml", "fp32", BATCH, 1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda images, p: {"images": images, "fp32": p + np.float32(0.01)}, r"off by 0\.01, more than 0\.001"),
        (lambda images, p: {"images": images, "fp32": p * np.nan}, "off by nan"),
        (lambda images, p: {"images": images[:, :32], "fp32": p}, "is damaged: images are"),
        (lambda images, p: {"images": images[:0], "fp32": p[:0]}, "is damaged: images are"),
        (lambda images, p: {"images": images, "fp32": p[:, :1]}, "is damaged: probabilities are"),
        (lambda images, p: {"images": images}, "is damaged"),
        (lambda images, p: {"images": images, "fp32": np.array([object()])}, "is damaged"),
        (None, "is damaged"),
    ],
)
def test_answers_that_are_not_the_golden_ones_are_refused(tmp_path: Path, spoil, reason: str) -> None:
    def add(part: Path, info: dict) -> None:
        path = part / runtime.GOLDEN
        if spoil is None:
            path.write_bytes(b"no arrays")
            return
        with np.load(path) as arrays:
            np.savez(path, **spoil(arrays["images"], arrays["fp32"]))

    bundle = write(tmp_path / "b", add=add)
    with pytest.raises(BundleError, match=reason):
        bundle.predict(np.zeros((1, 64, 64), np.uint8), precision="fp32")


def test_keras_is_compared_with_the_golden_images_too(tmp_path: Path, by_keras) -> None:
    def add(part: Path, info: dict) -> None:
        del info["runtimes"]
        for name in ("openvino.xml", "openvino.bin"):
            (part / name).unlink()
        with np.load(part / runtime.GOLDEN) as arrays:
            np.savez(part / runtime.GOLDEN, images=arrays["images"], fp32=1 - arrays["fp32"])

    bundle = write(tmp_path / "b", add=add)
    with pytest.raises(BundleError, match="golden images are off by"):
        bundle.predict(np.zeros((1, 64, 64), np.uint8))


def test_keras_in_bfloat16_stays_near_and_its_policy_does_not_leak(tiny_bundle, by_keras, images: np.ndarray) -> None:
    model = tiny_bundle.model(policy="mixed_bfloat16")
    assert keras.config.dtype_policy().name == "float32"
    assert "bfloat16" in {layer.compute_dtype for layer in model.layers}
    half = runtime.KerasRuntime(model, BATCH).predict(images)
    exact = by_keras.predict(images)
    assert half.probabilities.dtype == half.features.dtype == np.float32
    np.testing.assert_allclose(half.probabilities, exact.probabilities, rtol=0, atol=runtime.TOLERANCE["bf16"])
    assert (half.probabilities != exact.probabilities).any()
    assert {layer.compute_dtype for layer in tiny_bundle.model().layers} <= {"float32", "uint8"}


def test_openvino_comes_in_by_one_door() -> None:
    """Imported elsewhere it would report to its makers."""
    found = set()
    for path in Path(runtime.__file__).parents[1].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {(path.name, name) for name in names if name.split(".")[0] in ("openvino", "nncf")}
    assert found == {("runtime.py", "openvino"), ("quantization.py", "nncf")}


@pytest.mark.long
def test_first_batches_of_two_threads_do_not_wait_for_each_other(tiny_bundle) -> None:
    """In a process of its own each time, several beside each other: one in sixteen hung so."""
    code = (
        "import numpy as np, ray_cxr\n"
        f"bundle = ray_cxr.load_bundle({str(tiny_bundle.path)!r})\n"
        "assert bundle.predict(np.zeros((20, 64, 64), 'uint8'))['status'].size == 20\n"
    )
    for _ in range(25):
        several = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
        assert [one.wait(120) for one in several] == [0] * 4
