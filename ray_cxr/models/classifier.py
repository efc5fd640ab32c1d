"""Build a flat Keras model from settings and load its weights: uint8 [N,S,S,1] in, one probability per finding out."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ray_cxr import labels
from ray_cxr.errors import BundleError, ConfigError, first_line
from ray_cxr.models import backbones, torch_files, torch_weights
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.keras_setup import check_settings, keras

layers = keras.layers

OUTPUT_LAYER = "findings"
#: More than any backbone's weights. A file that declares more is damaged, or made to exhaust the memory.
MAX_WEIGHTS_BYTES = 2 * 1024**3
_TOO_LARGE = f"declares more than {MAX_WEIGHTS_BYTES >> 30} GiB of weights, more than any backbone here"


def build(architecture: Architecture, *, weights: str | None = None) -> keras.Model:
    """Build a model from uint8 [N,S,S,1] to probabilities [N,F], which are float32 under any dtype policy.

    The model has no nested models, so that heat maps and exports see every layer. `weights` are those of the backbone:
    `imagenet`, or None for random ones. Raises ConfigError if this process has configured Keras in another way.
    """
    check_settings()
    images = keras.Input((architecture.size, architecture.size, 1), dtype="uint8", name="image")
    x = backbones.features(architecture.backbone, images, weights, architecture.normalization)
    if architecture.pooling == "avgmax":
        x = layers.Concatenate(name="pool")(
            [layers.GlobalAveragePooling2D(name="pool_avg")(x), layers.GlobalMaxPooling2D(name="pool_max")(x)]
        )
    else:
        pool = {"avg": layers.GlobalAveragePooling2D, "max": layers.GlobalMaxPooling2D}[architecture.pooling]
        x = pool(name="pool")(x)
    for number, width in enumerate(architecture.dense):
        x = _dropout(x, architecture.dropout, f"head_dropout{number}")
        x = layers.Dense(width, activation="relu", name=f"head_dense{number}")(x)
    x = _dropout(x, architecture.dropout, "head_dropout")
    # Logits and sigmoid in float32: in half precision, probabilities of rare findings would be rounded into steps.
    x = layers.Dense(len(architecture.findings), dtype="float32", name="logits")(x)
    x = layers.Activation("sigmoid", dtype="float32", name=OUTPUT_LAYER)(x)
    return keras.Model(images, x, name=f"{architecture.backbone}_{architecture.size}")


def build_logits_model(model: keras.Model) -> keras.Model:
    """Return the model up to its logits, with shared weights, for losses: on probabilities they would be inexact."""
    return keras.Model(model.input, model.get_layer("logits").output, name=f"{model.name}_logits")


def is_head(layer: keras.layers.Layer) -> bool:
    """Return whether a layer with weights is above the backbone."""
    return bool(layer.name.startswith("head_") or layer.name == "logits")


def compute_depths(model: keras.Model) -> dict[str, int]:
    """Return for each layer how many stages it is below the head, which has depth 0.

    A stage of the backbone is all layers between two reductions of the image by strides, as in the papers of the
    architectures. The layer that reduces belongs to the stage that it starts.
    """
    sides: list[int] = []
    stages: dict[str, int] = {}
    for layer in model.layers:
        if max(getattr(layer, "strides", (1,))) > 1 and layer.output.shape[1] not in sides:
            sides.append(layer.output.shape[1])
        stages[layer.name] = len(sides)
    return {layer.name: 0 if is_head(layer) else len(sides) + 1 - stages[layer.name] for layer in model.layers}


def _dropout(x: Any, rate: float, name: str) -> Any:
    return layers.Dropout(rate, name=name)(x) if rate else x


def load_model(architecture: Architecture, weights: Path, policy: str = "float32") -> keras.Model:
    """Build the model under a dtype policy and load a `.weights.h5` that this package wrote."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = build(architecture)
    finally:
        keras.config.set_dtype_policy(before)
    try:
        model.load_weights(str(weights))
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"{weights}: the weights do not fit {model.name}: {first_line(error)}") from None
    return model


def initialize_weights(
    model: keras.Model, architecture: Architecture, path: str | Path, source_findings: Sequence[str] | None = None
) -> list[str]:
    """Copy the weights of a file for the same backbone, matched by layer name and shape.

    Every layer of the backbone must be in the file. Layers of the head with another shape stay random. An output is
    copied if its finding is in `source_findings`, which names the file's outputs in order.

    Returns the parts that stay random: names of layers, and `logits of <Finding>`.
    """
    path = Path(path)
    if path.suffix.lower() in torch_files.SUFFIXES:
        read = torch_files.read_torch_file(path)
        converted = torch_weights.convert_weights(read.arrays, architecture.backbone, str(path))
        stored = {**converted.layers, "logits": [converted.kernel, converted.bias]}
    else:
        stored = stored_arrays(path)
    random = _copy_layers(model, stored, path, optional="head_")
    layer = model.get_layer("logits")
    kernel, bias = layer.get_weights()
    arrays = stored.get("logits", [])
    known = tuple(source_findings or ())
    fits = not random and len(arrays) == 2 and arrays[0].shape == (kernel.shape[0], len(known))
    for j, name in enumerate(architecture.findings):
        if fits and name in known:
            kernel[:, j], bias[j] = arrays[0][:, known.index(name)], arrays[1][known.index(name)]
        else:
            random.append(f"logits of {name}")
    layer.set_weights([kernel, bias])
    return random


def load_third_party_weights(model: keras.Model, path: str | Path, n_outputs: int, kept: Sequence[int]) -> None:
    """Load a third-party `.h5`, `.weights.h5` or `.keras` file of the same backbone, with one dense output layer.

    Layers are matched by name; the layer without a match becomes the output, of which the columns `kept` are copied.
    The model description in the file is never executed, so the file cannot run code.
    """
    stored = stored_arrays(Path(path))
    names = {layer.name for layer in _inner_layers(model)}
    rest = {name: arrays for name, arrays in stored.items() if name not in names and arrays}
    width = model.get_layer("logits").kernel.shape[0]
    fitting = [a for a in rest.values() if len(a) == 2 and a[0].ndim == 2 and a[0].shape[0] == width]
    if len(fitting) != 1 or len(rest) != 1:
        _copy_layers(model, stored, path)  # explains a file for another backbone better
        shown = ", ".join(f"{name} {_shapes(arrays)}" for name, arrays in list(rest.items())[:6]) or "none"
        raise ConfigError(
            f"{path}: expected the backbone and one dense output layer from {width} features; found: {shown}"
        )
    kernel, bias = fitting[0]
    set_weights(model, stored, kernel, bias, path, n_outputs, kept)


def set_weights(
    model: keras.Model,
    layers: dict[str, list[np.ndarray]],
    kernel: np.ndarray,
    bias: np.ndarray,
    path: str | Path,
    n_outputs: int,
    kept: Sequence[int],
) -> None:
    """Set the backbone's layers by name, and the output to the columns `kept` of kernel [C,n_outputs] and its bias."""
    _copy_layers(model, layers, path)
    if kernel.shape[1] != n_outputs:
        raise ConfigError(f"{path}: its output has {kernel.shape[1]} columns, but {n_outputs} findings were named")
    model.get_layer("logits").set_weights([kernel[:, list(kept)], bias[list(kept)]])


def _copy_layers(
    model: keras.Model, stored: dict[str, list[np.ndarray]], path: str | Path, optional: str | None = None
) -> list[str]:
    """Copy the weights of all layers but the output; return the names of skipped layers.

    A layer whose name starts with `optional` is skipped if it is missing or has another shape.
    """
    skipped = []
    for layer in _inner_layers(model):
        arrays, shapes = stored.get(layer.name), _shapes(layer.weights)
        if arrays is not None and _shapes(arrays) == shapes:
            layer.set_weights(arrays)
        elif optional and layer.name.startswith(optional):
            skipped.append(layer.name)
        elif arrays is None:
            near = labels.suggest(layer.name, stored)
            raise ConfigError(f"{path}: has no layer {layer.name!r}{near}; is it for another backbone?")
        else:
            raise ConfigError(f"{path}: layer {layer.name!r} has shapes {_shapes(arrays)}, not {shapes}")
    return skipped


def _inner_layers(model: keras.Model) -> list[Any]:
    """Return the layers with weights, without the output layer."""
    return [layer for layer in model.layers if layer.weights and layer.name != "logits"]


def _shapes(arrays: Sequence[Any]) -> list[tuple[int, ...]]:
    return [tuple(array.shape) for array in arrays]


def stored_arrays(path: Path) -> dict[str, list[np.ndarray]]:
    """Read the weights of a Keras file by layer name, in each layer's order. No code in the file is executed.

    Supports the HDF5 of Keras 1 and 2 (whole models, and weights alone), `.weights.h5` of Keras 3, and `.keras`.
    """
    try:
        source: Path | io.BytesIO = path
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".weights.h5")]
                if len(names) != 1:
                    raise ConfigError(f"{path}: is a zip file without a model.weights.h5; is it a .keras file?")
                if archive.getinfo(names[0]).file_size > MAX_WEIGHTS_BYTES:
                    raise ConfigError(f"{path}: {_TOO_LARGE}")
                source = io.BytesIO(archive.read(names[0]))
        with h5py.File(source, "r") as file:
            return {name: [np.asarray(array) for array in arrays] for name, arrays in _find_arrays(file, path).items()}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such weights file") from None
    except (OSError, zipfile.BadZipFile, RuntimeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: not a Keras weights file: {first_line(error)}") from None


def _find_arrays(file: h5py.File, path: Path) -> dict[str, list[h5py.Dataset]]:
    """Return the arrays by layer name, unread: a few bytes can declare any shape, so the total size is checked first.

    Links and external storage are refused, because they could name any other file.
    """
    group = file.get("model_weights", file)
    result: dict[str, list[Any]] = {}
    if "layer_names" in group.attrs:  # Keras 1 and 2
        for raw in group.attrs["layer_names"]:
            name = _text(raw)
            layer = group[name]
            variables = [_text(item) for item in layer.attrs.get("weight_names", [])]
            owners = [variable.rpartition("/")[0].removeprefix(f"{name}/") for variable in variables]
            # A nested backbone stores all variables under its own name; their paths contain the name of the layer.
            nested = len(set(owners)) > 1
            for variable, owner in zip(variables, owners, strict=True):
                # keras.applications once wrote conv1/conv where it now writes conv1_conv.
                key = (owner if nested else name).replace("/", "_")
                result.setdefault(key, []).append(layer[variable])
    elif "layers" in group:
        _walk_keras3(group["layers"], result)
    else:
        raise ConfigError(f"{path}: an HDF5 file without Keras weights")
    arrays = [array for layer_arrays in result.values() for array in layer_arrays]
    for array in arrays:
        if not isinstance(array, h5py.Dataset):
            raise ConfigError(f"{path}: {array.name} is not an array; is it a Keras weights file?")
        if array.external or array.is_virtual or array.file.id != file.id:
            raise ConfigError(f"{path}: {array.name} lies in another file; weights must be in the file itself")
    if sum(array.nbytes for array in arrays) > MAX_WEIGHTS_BYTES:
        raise ConfigError(f"{path}: {_TOO_LARGE}")
    return result


def _walk_keras3(group: h5py.Group, result: dict[str, list[Any]]) -> None:
    for key in group:
        child = group[key]
        if not isinstance(child, h5py.Group):
            continue
        if "vars" in child and len(child["vars"]):
            order = sorted(child["vars"], key=int)
            # The key is the layer's class and a number; an attribute has the layer's name.
            name = _text(child["vars"].attrs.get("name", child.attrs.get("name", key)))
            result[name] = [child["vars"][number] for number in order]
        if "layers" in child:
            _walk_keras3(child["layers"], result)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
