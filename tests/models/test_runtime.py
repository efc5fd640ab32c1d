"""Which device and precision a process takes; the GPU's part with TensorFlow's answers made up, for want of one."""

from __future__ import annotations

import pytest
import tensorflow as tf

from ray_cxr.errors import ConfigError
from ray_cxr.models import runtime


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
