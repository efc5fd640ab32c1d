"""Graphs as models: bundles whose only runtime is an OpenVINO graph, such as an imported ONNX file.

A graph takes uint8 [N,S,S,1] and has two outputs, `probabilities` [N,F] and `features` [N,C]. It runs on CPUs only, and
has no layers that could be trained further or explained by gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ray_cxr.errors import ConfigError
from ray_cxr.models import runtime

Layout = Literal["nchw", "nhwc"]


def read_onnx(
    path: Path, *, layout: Layout, normalization: Sequence[tuple[float, float]], size: int | None, logits: bool
) -> tuple[Any, int]:
    """Read an ONNX model and wrap it as a graph that takes gray values; return the graph and its size in pixels.

    Args:
        layout: of the model's input, [N,C,S,S] or [N,S,S,C]; C is 1 or 3.
        normalization: (scale, offset) of three channels, for gray values from 0 to 255.
        size: side of the input, if the file does not fix it.
        logits: whether the outputs need a sigmoid.

    Raises:
        ConfigError: the file cannot be read, or its input or output has another form.
    """
    ov = runtime.import_openvino()
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as error:
        raise ConfigError(f"{path}: OpenVINO cannot read it: {runtime.summarize_error(error)}") from None
    if len(model.inputs) != 1:
        raise ConfigError(f"{path}: has {len(model.inputs)} inputs, not one")
    channels, size = _check_input(path, model.input(0), layout, size)
    scale, offset = _expand(normalization, channels)
    ops = ov.opset13
    image = ops.parameter([-1, size, size, 1], ov.Type.u8, name="image")
    x = ops.add(ops.multiply(ops.convert(image, "f32"), scale), offset)
    if layout == "nchw":
        x = ops.transpose(x, np.array([0, 3, 1, 2]))
    wanted = model.input(0).get_element_type()
    if wanted != ov.Type.f32:
        x = ops.convert(x, wanted)
    for target in list(model.input(0).get_node().output(0).get_target_inputs()):
        target.replace_source_output(x.output(0))
    outputs = [output for output in model.outputs if output.partial_shape.rank.get_length() == 2]
    if not outputs:
        shapes = ", ".join(str(output.partial_shape) for output in model.outputs)
        raise ConfigError(f"{path}: no output has the shape [images, findings]; its outputs: {shapes}")
    found = outputs[0].get_node().input_value(0)
    probabilities = ops.convert(found, "f32")
    if logits:
        probabilities = ops.sigmoid(probabilities)
    features = ops.convert(_find_features(found), "f32")
    return build_graph(image, probabilities, features), size


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


def keep_outputs(graph: Any, kept: Sequence[int], n_outputs: int, path: Path) -> Any:
    """Return the graph with the columns `kept` of its probabilities, after checking that it has `n_outputs`."""
    ov = runtime.import_openvino()
    shape = graph.output("probabilities").partial_shape
    if shape[1].is_static and shape[1].get_length() != n_outputs:
        raise ConfigError(f"{path}: has {shape[1].get_length()} outputs, but {n_outputs} findings were named")
    probabilities, features = (graph.output(name).get_node().input_value(0) for name in runtime.OUTPUTS)
    if list(kept) != list(range(n_outputs)):
        probabilities = ov.opset13.gather(probabilities, np.array(kept), np.array(1))
    return build_graph(graph.get_parameters()[0], probabilities, features)


def check_graph(graph: Path, golden: np.ndarray, where: str) -> np.ndarray:
    """Return the probabilities of golden images in float32, float32 [N,F].

    Raises:
        ConfigError: they are no probabilities, or depend on the size of the batch.
    """
    batches = [runtime.OpenVinoRuntime(graph, "fp32", size, runtime.default_threads()) for size in (1, 4)]
    alone, together = (opened.predict(golden).probabilities for opened in batches)
    if not ((together >= 0) & (together <= 1)).all():
        raise ConfigError(f"{where}: its outputs are not between 0 and 1; if they are logits, add --logits")
    if not np.abs(alone - together).max() <= runtime.TOLERANCE["fp32"]:
        raise ConfigError(f"{where}: an image's result depends on its batch; export it with a dynamic batch size")
    return together


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
            return features if features.partial_shape.rank.get_length() == 2 else output
        if not node.get_input_size():
            break
        node = node.input_value(0).get_node()
    return output
