"""Import of PyTorch files and `.safetensors`, without PyTorch; the long tests compare with PyTorch's own classes."""

from __future__ import annotations

import ast
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from safetensors.numpy import save_file

from ray_cxr.cli import main
from ray_cxr.errors import ConfigError
from ray_cxr.models import classifier, importing, torch_files, torch_weights
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import load_bundle

#: Names and shapes of torchvision 0.14's state dicts, with three outputs.
NAMES: dict[str, dict[str, list[int]]] = json.loads(
    gzip.decompress((Path(__file__).parent / "torchvision_names.json.gz").read_bytes())
)
#: The environment with torch, which scripts/services makes.
TORCH = Path(os.environ.get("RAY_CXR_TORCH", Path(__file__).parents[2] / ".torch")) / "bin/python"


class Storage:
    """Stands for a typed storage of torch while a file is written."""

    def __init__(self, kind: str, array: np.ndarray) -> None:
        self.kind, self.array = kind, array


class Tensor:
    """Pickles as torch's tensors do."""

    def __init__(self, storage: Storage, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> None:
        self.state = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> Any:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.state


@pytest.fixture(autouse=True)
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pickle refer to names of torch, which is not installed here."""
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    for module, name in (
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "FloatStorage"),
        ("torch", "BFloat16Storage"),
    ):
        stub = types.new_class(name)
        stub.__module__ = module
        setattr(modules[module], name, stub)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


class Pickler(pickle.Pickler):
    def __init__(self, file: Any, storages: list[Storage], legacy: bool) -> None:
        super().__init__(file, protocol=2)
        self.storages, self.legacy = storages, legacy

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Storage):
            return None
        if value not in self.storages:
            self.storages.append(value)
        kind = getattr(sys.modules["torch"], value.kind)
        key = str(self.storages.index(value))
        return ("storage", kind, key, "cpu", value.array.size, *([None] if self.legacy else []))


def write_zip(path: Path, value: Any, more: dict[str, bytes] | None = None) -> None:
    storages: list[Storage] = []
    buffer = io.BytesIO()
    Pickler(buffer, storages, legacy=False).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", buffer.getvalue())
        for number, storage in enumerate(storages):
            archive.writestr(f"model/data/{number}", storage.array.tobytes())
        for name, content in (more or {}).items():
            archive.writestr(f"model/{name}", content)


def write_legacy(path: Path, value: Any) -> None:
    storages: list[Storage] = []
    with path.open("wb") as file:
        for header in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(header, file, protocol=2)
        Pickler(file, storages, legacy=True).dump(value)
        pickle.dump([str(number) for number in range(len(storages))], file, protocol=2)
        for storage in storages:
            file.write(struct.pack("<q", storage.array.size) + storage.array.tobytes())


def state() -> dict[str, Tensor]:
    """Return two tensors that share a storage, one of them transposed, and one of bfloat16."""
    storage = Storage("FloatStorage", np.arange(10, dtype=np.float32))
    half = Storage("BFloat16Storage", np.array([0x3F80, 0xC020], np.uint16))  # 1 and -2.5
    return {
        "a": Tensor(storage, (2, 3), (1, 2)),
        "b": Tensor(storage, (4,), (1,), 6),
        "c": Tensor(half, (2,), (1,)),
    }


def assert_state(read: torch_files.TorchFile) -> None:
    assert set(read.arrays) == {"a", "b", "c"}
    np.testing.assert_array_equal(read.arrays["a"], [[0, 2, 4], [1, 3, 5]])
    np.testing.assert_array_equal(read.arrays["b"], [6, 7, 8, 9])
    np.testing.assert_array_equal(read.arrays["c"], [1.0, -2.5])


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_both_file_formats_are_read(tmp_path: Path, wrap: str | None) -> None:
    value: Any = state() if wrap is None else {"epoch": 3, "lr": [1e-3], wrap: OrderedDict(state())}
    write_zip(tmp_path / "m.pth", value)
    write_legacy(tmp_path / "m.pth.tar", value)
    assert_state(torch_files.read_torch_file(tmp_path / "m.pth"))
    assert_state(torch_files.read_torch_file(tmp_path / "m.pth.tar"))


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    write_zip(tmp_path / "m.pth", state())
    write_legacy(tmp_path / "m.pt", state())
    for name in ("m.pth", "m.pt"):
        whole = (tmp_path / name).read_bytes()
        for end in (0, 5, len(whole) // 2, len(whole) - 3):
            (tmp_path / name).write_bytes(whole[:end])
            with pytest.raises(ConfigError, match=rf"{name}: [^\n]+$"):
                torch_files.read_torch_file(tmp_path / name)
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{")
    with pytest.raises(ConfigError, match=r"m\.safetensors: "):
        torch_files.read_torch_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("shape", "strides", "offset"), [((11,), (1,), 0), ((2,), (9,), 2), ((1000, 1000), (0, 0), 0), ((2,), (-1,), 5)]
)
def test_a_tensor_outside_its_storage_is_refused(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    storage = Storage("FloatStorage", np.arange(10, dtype=np.float32))
    write_zip(tmp_path / "m.pth", {"a": Tensor(storage, shape, strides, offset), "b": Tensor(storage, (1,), (1,))})
    with pytest.raises(ConfigError, match="tensor"):
        torch_files.read_torch_file(tmp_path / "m.pth")


class Payload:
    """Runs a command when a usual unpickler reads it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> Any:
        return self.parts


def test_code_in_a_file_never_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    payloads = [
        Payload(os.system, f"touch {ran}"),
        Payload(eval, f"open({str(ran)!r}, 'w')"),
        Payload(getattr, Payload(__import__, "os"), "system"),
        Payload(open, str(ran), "w"),
    ]
    for payload in payloads:
        for write in (write_zip, write_legacy):
            write(tmp_path / "m.pth", {**state(), "epoch": payload})
            with pytest.raises(ConfigError, match="could run code"):
                torch_files.read_torch_file(tmp_path / "m.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(payloads[0]))
    with pytest.raises(ConfigError, match="could run code"):
        torch_files.read_torch_file(tmp_path / "plain.pth")
    assert not ran.exists()


def test_whole_models_are_refused_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pickled = b"\x80\x02ctorchxrayvision.models\nDenseNet\nq\x00)\x81."
    for name, content in (("m.pt", pickled), ("other.PT", pickled.replace(b"xray", b""))):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("model/data.pkl", content)
    write_zip(tmp_path / "script.pt", state(), {"code/__torch__.py": b"import os"})
    for name in ("m.pt", "script.pt", "other.PT"):
        given = ["import-weights", str(tmp_path / name), "--backbone", "DenseNet121", "--out", str(tmp_path / "b")]
        assert main([*given, "--findings", "14"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert name in lines[0]
        assert "runs code" in lines[0]
        # Only for a file of torchxrayvision, a program follows that loads this very file.
        assert ("save_model" in lines[0]) == (name == "m.pt")
        if name == "m.pt":
            program = lines[0].partition("with torchxrayvision: ")[2]
            assert f"torch.load({str(tmp_path / name)!r}, " in program
            ast.parse(program)
    assert not (tmp_path / "b").exists()


def read_pickle(path: Path, pickled: bytes) -> torch_files.TorchFile:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
    return torch_files.read_torch_file(path)


def test_a_checkpoint_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"epoch": 1}
    loop["state_dict"] = {"model": loop, "net": loop}
    with pytest.raises(ConfigError, match="has no state dict; it holds: epoch, state_dict"):
        read_pickle(tmp_path / "m.pth", pickle.dumps(loop, protocol=2))


def test_small_files_cannot_take_much_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = b"\x80\x02}r\xff\xff\xff\x7f."  # an index of the memo for which the unpickler would make 32 GiB of entries
    with pytest.raises(ConfigError, match="impossible sizes"):
        read_pickle(tmp_path / "m.pth", huge)
    (tmp_path / "old.pth").write_bytes(huge)
    with pytest.raises(ConfigError, match="impossible sizes"):
        torch_files.read_torch_file(tmp_path / "old.pth")
    with pytest.raises(ConfigError, match="more objects"):
        read_pickle(tmp_path / "m.pth", b"\x80\x02})" + 200_000 * b"\x85" + b"K\x01s.")  # the hash of a key overflows
    write_zip(tmp_path / "m.pth", state())
    with (
        zipfile.ZipFile(tmp_path / "m.pth") as source,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as sink,
    ):
        for name in source.namelist():
            sink.writestr(name, source.read(name))
    with pytest.raises(ConfigError, match="compressed zip"):
        torch_files.read_torch_file(tmp_path / "packed.pth")
    storage = Storage("FloatStorage", np.zeros(250_000, np.float32))
    write_zip(tmp_path / "m.pth", {str(number): Tensor(storage, (250_000,), (1,)) for number in range(3)})
    monkeypatch.setattr(torch_files, "_MAX_BYTES", 2 << 20)
    with pytest.raises(ConfigError, match="its tensors have more than"):
        torch_files.read_torch_file(tmp_path / "m.pth")
    monkeypatch.setattr(torch_files, "_MAX_OPCODES", 20)
    with pytest.raises(ConfigError, match="more objects"):
        torch_files.read_torch_file(tmp_path / "m.pth")


@pytest.mark.parametrize(
    "name", [b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter", b"argparse\nNamespace"]
)
@pytest.mark.parametrize("key", [b"__defaults__", b"__call__", b"__class__", b"append"])
def test_a_file_cannot_change_the_reader(tmp_path: Path, name: bytes, key: bytes) -> None:
    """The opcode BUILD sets the attributes that its second dictionary names."""
    entry = b"}U" + bytes([len(key)]) + key + b"cargparse\nNamespace\ns"
    known = dict(torch_files._KNOWN)
    for attributes in (b"(N" + entry + b"t", entry):
        with pytest.raises(ConfigError, match="not a readable PyTorch file"):
            read_pickle(tmp_path / "m.pth", b"\x80\x02c" + name + b"\n" + attributes + b"b.")
    assert known == torch_files._KNOWN
    write_zip(tmp_path / "m.pth", state())
    assert_state(torch_files.read_torch_file(tmp_path / "m.pth"))


def test_harmless_objects_beside_the_weights_are_ignored(tmp_path: Path) -> None:
    names = (
        ("torch", "float32"),
        ("numpy", "float64"),
        ("collections", "deque"),
        ("torch.optim.lr_scheduler", "StepLR"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    )
    used = b"".join(b"c%s\n%s\n" % (module.encode(), name.encode()) for module, name in names)
    with pytest.raises(ConfigError, match="has no state dict; it holds: tuple"):
        read_pickle(tmp_path / "m.pth", b"\x80\x02(" + used + b")\x81}U\x01aNsbt.")
    for module in ("lightning.pytorch.core.module", "monai.networks.nets.densenet", "models.densenet", "__main__"):
        with pytest.raises(torch_files.WholeModelError, match=f"pickled model .{module}"):
            read_pickle(tmp_path / "m.pth", f"\x80\x02c{module}\nNet\n.".encode("latin1"))
    with pytest.raises(ConfigError, match=r"refers to models2\.x\.N\\x1b; ") as caught:
        read_pickle(tmp_path / "m.pth", b"\x80\x04\x8c\x09models2.x\x8c\x02N\x1b\x93.")
    assert not isinstance(caught.value, torch_files.WholeModelError)


def make_state(name: str) -> dict[str, np.ndarray]:
    """Return weights that are a function of their position; the same function made the expected numbers below."""
    arrays = {}
    for number, (key, shape) in enumerate(NAMES[name].items()):
        wave = np.cos(0.37 * np.arange(np.prod(shape)) + number).reshape(shape)
        if key.endswith("running_var"):
            array = 1 + 0.3 * wave
        elif len(shape) == 4:
            array = wave * np.sqrt(3 / np.prod(shape[1:]))
        elif len(shape) == 2:
            array = wave * 0.0005
        else:
            array = 1 + 0.2 * wave if key.endswith("weight") else 0.1 * wave
        arrays[key] = array.astype(np.float32)
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backbone", "expected"),
    [
        # From torchvision 0.14 in float64, with the weights of `make_state`.
        ("densenet121", "DenseNet121", [0.32040277869482076, 0.7943549898487523, 0.4410971259160057]),
        ("resnet50", "ResNet50V1.5", [0.06405565874207415, 0.6438072947479604, 0.8109646110869142]),
    ],
)
def test_probabilities_equal_those_of_torchvision(name: str, backbone: str, expected: list[float]) -> None:
    weights = torch_weights.convert_weights(make_state(name), backbone, "file")
    findings = ("Edema", "Hernia", "Mass")
    scale = tuple((1 / (255 * std), -mean / std) for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225)))
    model = classifier.build(Architecture(backbone=backbone, size=64, findings=findings, normalization=scale))
    classifier.set_weights(model, weights.layers, weights.kernel, weights.bias, "file", 3, range(3))
    image = ((3 * np.arange(64)[:, None] + 5 * np.arange(64)) % 256).astype(np.uint8)
    np.testing.assert_allclose(np.asarray(model(image[None, :, :, None]))[0], expected, atol=1e-5)


def test_names_of_other_scripts_give_the_same_layers() -> None:
    plain = make_state("densenet121")
    expected = torch_weights.convert_weights(plain, "DenseNet121", "file")
    other = {}
    for key, array in plain.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.")
        other["module.densenet121." + key.replace("classifier.", "classifier.0.")] = array
    other["module.densenet121.features.norm0.num_batches_tracked"] = np.array(7)
    found = torch_weights.convert_weights(other, "DenseNet121", "file")
    assert found.layers.keys() == expected.layers.keys()
    for name, arrays in expected.layers.items():
        for one, two in zip(arrays, found.layers[name], strict=True):
            np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(found.kernel, expected.kernel)


def test_weights_of_another_model_are_refused() -> None:
    weights = make_state("densenet121")
    with pytest.raises(ConfigError, match=r"^file: is not a ResNet50V1\.5: it has no layer1\.0\.conv1\.weight"):
        torch_weights.convert_weights(weights, "ResNet50V1.5", "file")
    with pytest.raises(ConfigError, match="is not a DenseNet169"):
        torch_weights.convert_weights(weights, "DenseNet169", "file")
    with pytest.raises(ConfigError, match=r"beside the backbone it has: .*attention\.weight \[3, 3\]"):
        torch_weights.convert_weights({**weights, "attention.weight": np.eye(3)}, "DenseNet121", "file")
    weights.pop("features.norm5.bias")
    with pytest.raises(ConfigError, match=r"has no features\.norm5\.bias"):
        torch_weights.convert_weights(weights, "DenseNet121", "file")


OPTIONS = importing.ImportOptions


@pytest.mark.parametrize(
    ("text", "channels", "expected"),
    [
        (None, 3, [(1 / (255 * 0.229), -0.485 / 0.229)]),
        ("keras", 3, None),
        ("torchxrayvision", 1, [(2048 / 255, -1024.0)]),
        ("0.5,0.25", 1, [(1 / 63.75, -2.0)]),
        (None, 1, "one channel"),
        ("imagenet", 1, "three channels"),
        ("0.5", 3, "MEAN,STD"),
        ("0.5,0", 3, "MEAN,STD"),
        ("nan,1", 3, "MEAN,STD"),
    ],
)
def test_normalization_rules(text: str | None, channels: int, expected: Any) -> None:
    kernel, bias = np.zeros((1, 1)), np.zeros(1)
    source = importing._Source("DenseNet121", torch_weights.TorchWeights({}, kernel, bias, channels))
    options = OPTIONS(normalization=text)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            importing._find_normalization(options, source)
        return
    found = importing._find_normalization(options, source)
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found is not None
        assert len(found) == channels
        np.testing.assert_allclose(found[0], expected[0])


@pytest.mark.parametrize("rule", ["keras", "0.5"])
def test_rules_of_a_backbone_are_not_suggested_for_onnx(rule: str) -> None:
    with pytest.raises(ConfigError, match="use imagenet, torchxrayvision, none, or MEAN,STD"):
        importing.parse_normalization(rule, 3, onnx=True)


@pytest.mark.slow
def test_outputs_and_thresholds_come_from_the_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One-channel input, outputs that are no findings of ours, and operating points."""
    keras.utils.set_random_seed(0)
    weights = {key: array for key, array in make_state("densenet121").items() if not key.startswith("classifier")}
    weights["features.conv0.weight"] = weights["features.conv0.weight"][:, :1].copy() / 1024
    weights["classifier.weight"] = np.arange(4 * 1024, dtype=np.float32).reshape(4, 1024) * 1e-6
    weights["classifier.bias"] = np.array([-1, 0, 1, 2], np.float32)
    about = {"source": "torchxrayvision", "outputs": ["Edema", "Fracture", "", "Mass"], "size": 64}
    metadata = {key: json.dumps(value) for key, value in about.items()}
    metadata["op_threshs"] = "[0.25, 0.5, NaN, NaN]"
    save_file(weights, tmp_path / "m.SafeTensors", metadata)
    out = tmp_path / "bundle"
    command = ["import-weights", str(tmp_path / "m.SafeTensors"), "--backbone", "DenseNet121", "--out", str(out)]
    assert main([*command, "--interpolation", "linear"]) == 0
    assert "Fracture, number 3" in capsys.readouterr().out
    bundle = load_bundle(out)
    assert bundle.findings == ("Edema", "Mass")
    spec = bundle.input_spec
    assert (spec.size, spec.aspect, spec.interpolation) == (64, "crop", "linear")
    assert bundle.architecture.normalization == ((2048 / 255, -1024.0),)
    points = bundle.info["operating_points"]
    assert (points["Edema"]["threshold"], points["Mass"]) == (0.25, None)
    assert bundle.info["provenance"]["dropped_outputs"] == [2, 3]
    assert bundle.info["provenance"]["dropped_names"] == ["Fracture", ""]
    rows = bundle.predict(np.random.default_rng(0).integers(0, 256, (3, 80, 70), np.uint8), precision="fp32")
    assert (rows["flag_Edema"] == (rows["p_Edema"] >= 0.25)).all()
    assert rows[["flag_Mass", "c_Edema"]].isna().all(axis=None)
    kernel, bias = bundle.model().get_layer("logits").get_weights()
    np.testing.assert_array_equal(kernel, weights["classifier.weight"][[0, 3]].T)
    np.testing.assert_array_equal(bias, [-1, 2])


@pytest.mark.long
def test_imported_bundles_equal_pytorch(tmp_path: Path) -> None:
    """The same uint8 [S,S] arrays through PyTorch's own classes and through our bundles."""
    if not TORCH.exists():
        pytest.skip(f"no {TORCH}; scripts/services makes an environment with PyTorch and torchxrayvision")
    rng = np.random.default_rng(0)
    images = np.stack([np.add.outer(rng.uniform(0, 3, 224).cumsum(), 20 * rng.random(224)) % 256 for _ in range(3)])
    images = images.astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    script = Path(__file__).parent / "torch_reference.py"
    subprocess.run([TORCH, script, tmp_path], check=True, timeout=300)
    fourteen = importing.ImportOptions(outputs=importing.parse_findings("14"))
    for file, backbone, reference, options in (
        ("densenet121.pth", "DenseNet121", "densenet121", fourteen),
        ("chexnet.pth.tar", "DenseNet121", "densenet121", fourteen),
        ("densenet169.pth", "DenseNet169", "densenet169", fourteen),
        ("resnet50.pth", "ResNet50", "resnet50", fourteen),
        ("torchxrayvision.safetensors", "DenseNet121", "torchxrayvision", None),
    ):
        bundle = importing.import_weights(tmp_path / file, tmp_path / f"b-{file}", backbone=backbone, options=options)
        expected = np.load(tmp_path / f"{reference}.npy")[:, : len(bundle.findings)]
        assert np.ptp(expected) > 0.1
        frame = bundle.predict(list(images), precision="fp32")
        np.testing.assert_allclose(frame[[f"p_{name}" for name in bundle.findings]], expected, atol=1e-5)
        np.testing.assert_allclose(np.asarray(bundle.model()(images[..., None])), expected, atol=1e-5)
    for file in ("whole.pt", "script.pt", "torchxrayvision.pt", "transformer.pth"):
        with pytest.raises(ConfigError, match=file):
            importing.import_weights(tmp_path / file, tmp_path / "none", backbone="DenseNet121", options=fourteen)
