"""Bundles of ONNX files, which hold only a graph: scoring, heat maps, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ray_cxr.cli import main
from ray_cxr.config import ScoreSettings
from ray_cxr.errors import ConfigError
from ray_cxr.models import importing, runtime
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.models.bundle_writer import derive_bundle
from ray_cxr.models.occlusion import CELLS, Occlusion
from ray_cxr.scoring import heatmaps

#: Conv2d(3, 4, 3, stride=2), ReLU, average, Linear(4, 3) with random weights, as torch.onnx wrote it; no sigmoid.
SMALL = Path(__file__).parent / "small.onnx"
IMAGE = ((3 * np.arange(64)[:, None] + 5 * np.arange(64)) % 256).astype(np.uint8)
#: PyTorch's probabilities of IMAGE, normalised as for ImageNet, in float64.
EXPECTED = [0.39562283058070435, 0.4327330400017533, 0.48240643362198254]
GIVEN = ["import-weights", str(SMALL), "--input-layout", "nchw", "--normalization", "imagenet", "--logits"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("graph") / "bundle"
    assert main([*GIVEN, "--findings", "Mass,-,Edema", "--out", str(out)]) == 0
    return load_bundle(out)


def test_probabilities_equal_those_of_pytorch(bundle: Bundle) -> None:
    assert bundle.findings == ("Mass", "Edema")
    frame = bundle.predict([IMAGE, np.zeros((90, 70), np.uint8)], precision="fp32")
    np.testing.assert_allclose(frame.loc[0, ["p_Mass", "p_Edema"]].to_numpy(float), EXPECTED[::2], atol=1e-6)
    outputs = bundle.open_runtime("fp32", batch_size=2, threads=1).predict(IMAGE[None])
    assert outputs.features.shape == (1, 4)


def test_a_copy_needs_no_weights_either(bundle: Bundle, tmp_path: Path) -> None:
    copy = derive_bundle(bundle, tmp_path / "copy", calibration={"Mass": None, "Edema": None})
    assert copy.is_graph
    assert "model.weights.h5" not in copy.files


def test_what_a_graph_cannot_do_is_refused(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="only a graph"):
        bundle.model()
    with pytest.raises(ConfigError, match=r"^--gpu: .*omit --gpu$"):
        runtime.choose_precision(bundle.info, "auto", gpu=True)
    with pytest.raises(ConfigError, match="heatmap_method=occlusion"):
        heatmaps.make_request(bundle, ScoreSettings(), 1)
    assert heatmaps.make_request(bundle, ScoreSettings(heatmap_method="occlusion"), 9).count == 2


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--findings", "Mass,Edema"], "has 3 outputs, but 2 findings"),
        (["--findings", "Mass,-,Edema", "--size", "224"], "does not fit --size 224"),
        (["--findings", "Mass,-,Edema", "--input-layout", "nhwc"], "does not fit --input-layout nhwc"),
        (["--findings", "Mass,-,Edema", "--normalization", "1,0"], "MEAN,STD"),
        (["--findings", "Mass,-,Edema", "--backbone", "ResNet50"], "omit --backbone"),
        ([], "--findings: "),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    more: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*GIVEN, "--out", str(tmp_path / "b"), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "b").exists()


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    options = importing.ImportOptions(outputs=("Mass", "-", "Edema"), layout="nchw", normalization="imagenet")
    for content in (SMALL.read_bytes()[:700], b"", b"no model"):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(ConfigError, match=r"m\.onnx: [^\n]+$"):
            importing.import_weights(tmp_path / "m.onnx", tmp_path / "b", backbone=None, options=options)


class Bright(runtime.Runtime):
    """Its probabilities are the brightness of the upper left and of the lower right corner."""

    batch_shape = (8, 64, 64, 1)

    def predict(self, images: np.ndarray) -> runtime.Outputs:
        corners = images[:, :8, :8], images[:, -8:, -8:]
        p = np.stack([corner.mean(axis=(1, 2)) / 256 for corner in corners], axis=1).astype(np.float32)
        return runtime.Outputs(p, p)

    def _submit_batch(self, batch: np.ndarray, n: int) -> None:  # type: ignore[override]
        raise NotImplementedError


def test_occlusion_finds_the_region_that_a_finding_depends_on() -> None:
    image = np.full((64, 64), 100, np.uint8)
    image[:8, :8], image[-8:, -8:] = 200, 10
    maps, p = Occlusion(Bright()).explain(image[None, :, :, None], np.array([[0, 1]]))
    assert maps.shape == (1, 2, CELLS, CELLS)
    np.testing.assert_allclose(p, [[200 / 256, 10 / 256]])
    # Covering the bright corner with the mean lowers the first logit; covering the dark one raises the second.
    assert np.argwhere(maps[0, 0]).tolist() == [[0, 0]]
    assert not maps[0, 1].any()
