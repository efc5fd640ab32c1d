"""A bundle as an ONNX file gives the same probabilities in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pytest

from ray_cxr.cli import main
from ray_cxr.models import runtime
from ray_cxr.models.bundle import Bundle


@pytest.mark.slow
def test_an_error_of_the_converter_is_one_line(
    tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tf2onnx.convert.from_function", Mock(side_effect=ValueError("no such op\nand a trace")))
    assert main(["export-onnx", str(tiny_bundle.path), "--out", str(tmp_path / "model.onnx")]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "TinyCNN" in last
    assert "no such op" in last
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_probabilities_and_metadata(tiny_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.onnx"
    assert main(["export-onnx", str(tiny_bundle.path), "--out", str(out)]) == 0
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    size = tiny_bundle.input_spec.size
    images = np.random.default_rng(0).integers(0, 256, (3, size, size, 1), dtype=np.uint8)
    expected = tiny_bundle.open_runtime("fp32", batch_size=3, threads=1).predict(images[..., 0])
    found = session.run(list(runtime.OUTPUTS), {"image": images})
    np.testing.assert_allclose(found[0], expected.probabilities, atol=1e-5)
    np.testing.assert_allclose(found[1], expected.features, rtol=1e-4, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["ray_cxr.findings"]) == list(tiny_bundle.findings)
    assert json.loads(about["ray_cxr.digest"]) == tiny_bundle.digest
    assert json.loads(about["ray_cxr.calibration"]) == tiny_bundle.info["calibration"]
    capsys.readouterr()
    assert main(["export-onnx", str(tiny_bundle.path), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
