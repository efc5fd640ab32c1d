"""Graphs as models: bundles whose only runtime is an OpenVINO graph, such as an imported ONNX file.

A graph takes uint8 [N,S,S,1] and has two outputs, `probabilities` [N,F] and `features` [N,C]. It runs on CPUs only, and
has no layers that could be trained further or explained by gradients.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ray_cxr.errors import ConfigError
from ray_cxr.models import runtime

Layout = Literal["nchw", "nhwc"]
_DYNAMIC_BATCH = "export it with a dynamic batch size"


def read_onnx(
    path: Path,
    *,
    layout: Layout,
    normalization: Sequence[tuple[float, float]],
    size: int | None,
    logits: bool,
    n_outputs: int,
) -> tuple[Any, int]:
    """Read an ONNX model and wrap it as a graph that takes gray values; return the graph and its size in pixels.

    Args:
        layout: of the model's input, [N,C,S,S] or [N,S,S,C]; C is 1 or 3.
        normalization: (scale, offset) of three channels, for gray values from 0 to 255.
        size: side of the input, if the file does not fix it.
        logits: whether the outputs need a sigmoid.
        n_outputs: columns of the output with the findings.

    Raises:
        ConfigError: the file cannot be read, or its input or output has another form.
    """
    ov = runtime.import_openvino()
    ops, model = ov.opset13, _load_onnx(path)
    if len(model.inputs) != 1:
        raise ConfigError(f"{path}: has {len(model.inputs)} inputs, not one")
    channels, size = _check_input(path, model.input(0), layout, size)
    scale, offset = _expand(normalization, channels)
    try:
        # Shapes of outputs may follow from that of the input.
        model.reshape([-1, channels, size, size] if layout == "nchw" else [-1, size, size, channels])
        image = ops.parameter([-1, size, size, 1], ov.Type.u8, name="image")
        x = ops.add(ops.multiply(ops.convert(image, "f32"), scale), offset)
        if layout == "nchw":
            x = ops.transpose(x, np.array([0, 3, 1, 2]))
        wanted = model.input(0).get_element_type()
        if wanted != ov.Type.f32:
            x = ops.convert(x, wanted)
        for target in list(model.input(0).get_node().output(0).get_target_inputs()):
            target.replace_source_output(x.output(0))
        found = _choose_output(path, model.outputs, n_outputs, logits=logits)
        probabilities = ops.convert(found, "f32")
        if logits:
            probabilities = ops.sigmoid(probabilities)
        return build_graph(image, probabilities, ops.convert(_find_features(found), "f32")), size
    except RuntimeError as error:
        raise ConfigError(f"{path}: OpenVINO cannot run it: {_last_line(error)}; {_DYNAMIC_BATCH}") from None


def build_graph(image: Any, probabilities: Any, features: Any, spread: Any = None) -> Any:
    """Build a graph of an input and its outputs, named as the runtime expects."""
    ov = runtime.import_openvino()
    results = []
    nodes = {**dict(zip(runtime.OUTPUTS, (probabilities, features), strict=True)), runtime.SPREAD: spread}
    for name, node in nodes.items():
        if node is None:
            continue
        result = ov.opset13.result(node)
        result.output(0).set_names({name})
        results.append(result)
    return ov.Model(results, [image], "network")


def keep_outputs(graph: Any, kept: Sequence[int]) -> Any:
    """Return the graph with the columns `kept` of its probabilities."""
    probabilities, features = (graph.output(name).get_node().input_value(0) for name in runtime.OUTPUTS)
    if list(kept) != list(range(probabilities.partial_shape[1].get_length())):
        probabilities = runtime.import_openvino().opset13.gather(probabilities, np.array(kept), np.array(1))
    return build_graph(graph.get_parameters()[0], probabilities, features)


def check_graph(graph: Path, golden: np.ndarray, where: str) -> np.ndarray:
    """Return the probabilities of golden images in float32, float32 [N,F].

    Raises:
        ConfigError: they are no probabilities, or depend on the size of the batch.
    """
    batches = [runtime.OpenVinoRuntime(graph, "fp32", size, runtime.default_threads()) for size in (1, 4)]
    found = [opened.predict(golden) for opened in batches]
    if any(len(values) != len(golden) for result in found for values in (result.probabilities, result.features)):
        raise ConfigError(f"{where}: does not give one row per image; {_DYNAMIC_BATCH}")
    alone, together = (result.probabilities for result in found)
    if not ((together >= 0) & (together <= 1)).all():
        raise ConfigError(f"{where}: its outputs are not between 0 and 1; if they are logits, add --logits")
    if not np.abs(alone - together).max() <= runtime.TOLERANCE["fp32"]:
        raise ConfigError(f"{where}: an image's result depends on its batch; {_DYNAMIC_BATCH}")
    return together


def _load_onnx(path: Path) -> Any:
    """Read an ONNX file that holds all of its weights; raise ConfigError for any other file."""
    reader = runtime.import_openvino().frontend.FrontEndManager().load_by_framework("onnx")
    try:
        with tempfile.TemporaryDirectory(prefix="ray_cxr-") as folder:
            # From this folder, weights in other files are not found: the digest of `path` would not cover them.
            link = Path(folder) / "model.onnx"
            link.symlink_to(path.resolve())
            return reader.convert(reader.load(link))
    except Exception as error:  # OpenVINO's errors have no common class
        if "externally stored" in str(error) or "base directory" in str(error):
            raise ConfigError(f"{path}: its weights are in other files; save it as a single file") from None
        raise ConfigError(f"{path}: OpenVINO cannot read it as ONNX: {_last_line(error)}") from None


def _last_line(error: Exception) -> str:
    """Return the last line of an error of OpenVINO: the cause; lines before it name OpenVINO's source."""
    return runtime.summarize_error(RuntimeError(str(error).strip().rpartition("\n")[2]))


def _choose_output(path: Path, outputs: Sequence[Any], n_outputs: int, *, logits: bool) -> Any:
    """Return the value [N,F] that holds the findings."""
    shapes = ", ".join(f"{output.any_name} {output.partial_shape}" for output in outputs)
    flat = [output for output in outputs if output.partial_shape.rank == 2]
    if not flat:
        unknown = any(output.partial_shape.rank.is_dynamic for output in outputs)
        hint = "; in PyTorch, use .flatten(1) instead of .squeeze()" if unknown else ""
        raise ConfigError(f"{path}: no output has the shape [images, findings]; its outputs: {shapes}{hint}")
    fitting = [output for output in flat if output.partial_shape[1] == n_outputs]
    if not fitting:
        widths = " or ".join(str(output.partial_shape[1]) for output in flat)
        raise ConfigError(f"{path}: has {widths} outputs, but {n_outputs} findings were named")
    if len(fitting) > 1:
        fitting = [output for output in fitting if (_find_last(output) != "Sigmoid") == logits]
    if len(fitting) != 1:
        raise ConfigError(f"{path}: several outputs could be the findings; export only one of: {shapes}")
    value, last = fitting[0].get_node().input_value(0), _find_last(fitting[0])
    if "Softmax" in last:
        raise ConfigError(f"{path}: ends in a softmax; needs a sigmoid per finding, as several can be present")
    if last == "Sigmoid" and logits:
        raise ConfigError(f"{path}: ends in a sigmoid already; omit --logits")
    if value.partial_shape[0].is_static:
        raise ConfigError(f"{path}: its output has the shape {value.partial_shape} for any batch; {_DYNAMIC_BATCH}")
    return value


def _find_last(output: Any) -> str:
    """Return the type of the last operation that computes an output, such as `Sigmoid`."""
    node = output.get_node()
    while node.get_type_name() in ("Result", "Convert", "Reshape", "Squeeze", "Unsqueeze", "Concat", "Clamp"):
        node = node.input_value(0).get_node()
    return str(node.get_type_name())


def _check_input(path: Path, given: Any, layout: Layout, size: int | None) -> tuple[int, int]:
    """Return the channels and the size in pixels of a model's input."""
    shape = given.partial_shape
    dims = [d.get_length() if d.is_static else None for d in shape] if shape.rank.is_static else []
    if len(dims) != 4:
        raise ConfigError(f"{path}: its input has the shape {shape}; needs images, [N,C,S,S] or [N,S,S,C]")
    channels, sides = (dims[1], dims[2:]) if layout == "nchw" else (dims[3], dims[1:3])
    if channels not in (1, 3):
        raise ConfigError(f"{path}: its input has the shape {shape}, which does not fit --input-layout {layout}")
    fixed = {side for side in sides if side is not None}
    if len(fixed) > 1 or (size is not None and fixed - {size}):
        raise ConfigError(f"{path}: its input has the shape {shape}, which does not fit --size {size or 'of a square'}")
    return int(channels), int(next(iter(fixed), size or 224))


def _expand(normalization: Sequence[tuple[float, float]], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and offset, float32 [1,1,1,C]."""
    pairs = normalization[:channels]
    if len(set(normalization)) > 1 and channels == 1:
        raise ConfigError("--normalization: has three channels, but the model takes one; name MEAN,STD")
    scale, offset = np.array(pairs, np.float32).T
    return scale.reshape(1, 1, 1, -1), offset.reshape(1, 1, 1, -1)


def _find_features(output: Any) -> Any:
    """Return the [N,C] input of the last dense layer; the output itself if there is none."""
    node = output.get_node()
    for _ in range(8):
        if node.get_type_name() == "MatMul":
            features = node.input_value(0)
            shape = features.partial_shape
            return features if shape.rank == 2 and shape[0].is_dynamic else output
        if not node.get_input_size():
            break
        node = node.input_value(0).get_node()
    return output
