"""Bundles of ONNX files, which hold only a graph: scoring, heat maps, and what they refuse."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ray_cxr.cli import main
from ray_cxr.config import InputSpec, ScoreSettings
from ray_cxr.errors import ConfigError
from ray_cxr.models import exports, graphs, importing, onnx_export, runtime
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


def test_the_card_compares_with_the_graph(bundle: Bundle) -> None:
    card = (bundle.path / "MODEL_CARD.md").read_text()
    assert "those of the graph itself in float32" in card
    assert "Keras in float32" not in card


def test_a_copy_needs_no_weights_either(bundle: Bundle, tmp_path: Path) -> None:
    copy = derive_bundle(bundle, tmp_path / "copy", calibration={"Mass": None, "Edema": None})
    assert copy.is_graph
    assert "model.weights.h5" not in copy.files


def test_what_a_graph_cannot_do_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only a graph"):
        bundle.model()
    with pytest.raises(ConfigError, match="export the members of an ensemble, or use the ONNX file"):
        onnx_export.export_onnx(bundle.path, tmp_path / "m.onnx")
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


#: Weights of a model [N,3,32,32] -> average -> dense [N,3].
DENSE = np.linspace(-1.0, 1.0, 9, dtype=np.float32).reshape(3, 3)


def write_onnx(path: Path, nodes: str, outputs: dict[str, list[int | str] | None], batch: int | str = "N") -> Path:
    """Write a model of `INPUTS Operation OUTPUT` per node; it has the constants W (dense), S ([1,3]) and C [1,3]."""
    made = []
    for node in nodes.split("; "):
        *inputs, operation, output = node.split()
        made.append(helper.make_node(operation, inputs, [output]))
    constants = {"W": DENSE, "S": np.array([1, 3]), "C": np.zeros((1, 3), np.float32)}
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 32, 32])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def import_onnx(path: Path, *more: str) -> Bundle:
    options = importing.ImportOptions(
        outputs=("Mass", "Edema", "Hernia"), layout="nchw", normalization="0.5,0.25", logits="--logits" in more
    )
    return importing.import_weights(path, path.with_suffix(""), backbone=None, options=options)


POOL, HEAD = "x GlobalAveragePool p", "f W MatMul z"
NF: list[int | str] = ["N", 3]


@pytest.mark.parametrize(
    ("nodes", "outputs", "logits", "reason"),
    [
        (f"{POOL}; p Squeeze f; {HEAD}; z Sigmoid y", {"y": NF}, "", "squeeze"),
        ("C Sigmoid y", {"y": [1, 3]}, "", "export it with a dynamic batch size"),
        (f"{POOL}; p Flatten f; {HEAD}; z Sigmoid y", {"y": NF}, "--logits", "omit --logits"),
        (f"{POOL}; p Flatten f; {HEAD}; z Softmax y", {"y": NF}, "", "softmax"),
        (f"{POOL}; p Flatten f; {HEAD}; z Softmax y", {"y": NF}, "--logits", "softmax"),
        (f"{POOL}; p Flatten f; {HEAD}; z Sigmoid y; f Sigmoid v", {"y": NF, "v": NF}, "", "y .*, v "),
        (f"{POOL}; p Foo f; {HEAD}; z Sigmoid y", {"y": NF}, "", "Foo"),
    ],
)
def test_models_of_another_form_are_one_line(
    nodes: str, outputs: dict[str, list[int | str] | None], logits: str, reason: str, tmp_path: Path
) -> None:
    path = write_onnx(tmp_path / "m.onnx", nodes, outputs)
    with pytest.raises(ConfigError, match=rf"^{path}: [^\n]*{reason}[^\n]*$"):
        import_onnx(path, logits)


def test_output_with_the_findings_is_chosen(tmp_path: Path) -> None:
    nodes = f"{POOL}; p Flatten f; {HEAD}; z Sigmoid y"
    outputs: dict[str, list[int | str] | None] = {"p": ["N", 3, 1, 1], "z": NF, "y": NF}
    found = [
        import_onnx(write_onnx(tmp_path / f"{number}.onnx", nodes, outputs), option)
        for number, option in enumerate(("", "--logits"))
    ]
    # The channels' means are equal, so that each logit is a mean times the sum of a column.
    logits = (100 / 255 - 0.5) / 0.25 * DENSE.sum(axis=0)
    for bundle in found:
        frame = bundle.predict([np.full((32, 32), 100, np.uint8)], precision="fp32")
        p = frame.loc[0, ["p_Mass", "p_Edema", "p_Hernia"]].to_numpy(float)
        np.testing.assert_allclose(p, 1 / (1 + np.exp(-logits)), atol=1e-6)


def test_fixed_batch_is_replaced(tmp_path: Path) -> None:
    nodes = f"{POOL}; p S Reshape f; {HEAD}; z Sigmoid y"
    bundle = import_onnx(write_onnx(tmp_path / "m.onnx", nodes, {"y": [1, 3]}, batch=1))
    assert len(bundle.predict([IMAGE, IMAGE], precision="fp32")) == 2


def test_only_onnx_files_without_others_are_read(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copy(bundle.path / "openvino.xml", tmp_path / "ir.onnx")
    shutil.copy(bundle.path / "openvino.bin", tmp_path / "ir.bin")
    with pytest.raises(ConfigError, match=r"^[^\n]*cannot read it as ONNX[^\n]*$"):
        import_onnx(tmp_path / "ir.onnx")
    path = write_onnx(tmp_path / "m.onnx", f"{POOL}; p Flatten f; {HEAD}; z Sigmoid y", {"y": NF})
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    with pytest.raises(ConfigError, match=r"^[^\n]*save it as a single file$"):
        import_onnx(path)


def test_graphs_that_do_not_run_are_one_line(tmp_path: Path) -> None:
    ops = runtime.import_openvino().opset13
    image = ops.parameter([-1, 64, 64, 1], np.uint8)
    half = ops.constant(np.full((1, 3), 0.5, np.float32))
    for value in (half, ops.reshape(ops.convert(image, "f32"), [2, 2048], False)):
        graph = exports.Graph(graphs.build_graph(image, value, value), "a file")
        with pytest.raises(ConfigError, match=r"^a file: [^\n]+dynamic[^\n]+$"):
            exports.export_graph(tmp_path, graph, InputSpec(size=64))


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
