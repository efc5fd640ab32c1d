"""From settings to one flat Keras model: uint8 [N,S,S,1] in, one probability per finding out."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from keras import layers

from ray_cxr import labels
from ray_cxr.errors import BundleError, ConfigError
from ray_cxr.models import backbones
from ray_cxr.models.architecture import Architecture

OUTPUT_LAYER = "findings"
#: More than the weights of any backbone here; a file that declares more is a mistake, or meant to fill the memory.
MAX_WEIGHTS_BYTES = 2 * 1024**3
_TOO_LARGE = f"declares more than {MAX_WEIGHTS_BYTES >> 30} GiB of weights, which no backbone here has"


def build(architecture: Architecture, *, weights: str | None = None) -> keras.Model:
    """Build the network, flat: no model nested in another, so that heat maps and exports see every layer.

    Args:
        architecture: what to build.
        weights: `imagenet` or None (random), for the backbone.

    Returns:
        A Keras model from uint8 [N,S,S,1] to float32 [N,F] probabilities (sigmoid, float32 under any policy).
    """
    images = keras.Input((architecture.size, architecture.size, 1), dtype="uint8", name="image")
    x = backbones.features(architecture.backbone, images, weights)
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
    # Logits and sigmoid in float32: half precision turns small probabilities, the interesting ones, into steps.
    x = layers.Dense(len(architecture.findings), dtype="float32", name="logits")(x)
    x = layers.Activation("sigmoid", dtype="float32", name=OUTPUT_LAYER)(x)
    return keras.Model(images, x, name=f"{architecture.backbone}_{architecture.size}")


def logits_of(model: keras.Model) -> keras.Model:
    """The same network up to its logits, sharing all weights: losses are exact on logits, not on probabilities."""
    return keras.Model(model.input, model.get_layer("logits").output, name=f"{model.name}_logits")


def _dropout(x: Any, rate: float, name: str) -> Any:
    return layers.Dropout(rate, name=name)(x) if rate else x


def load_own_weights(model: keras.Model, path: str | Path) -> None:
    """Load a `.weights.h5` that this package wrote, naming the first variable that does not fit.

    Raises:
        BundleError: not a weights file, or another architecture's.
    """
    try:
        model.load_weights(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(f"{path}: the weights do not fit {model.name}: {_first_line(error)}") from None


def initialise(
    model: keras.Model, architecture: Architecture, path: str | Path, source_findings: Sequence[str] | None = None
) -> list[str]:
    """Start from somebody's weights: a bundle's, or a file for the same backbone, by layer name and shape.

    Every backbone layer must be found. A head of another shape keeps its random start. The outputs are taken one by
    one, by the name of the finding; of a file, whose order nobody states, they are taken only where told.

    Args:
        source_findings: the order of the source's outputs; None where it is not known.

    Returns:
        What starts at random: names of layers, and `logits of <Finding>`.

    Raises:
        ConfigError: no such file, or a backbone layer is absent from it or has another shape.
    """
    path = Path(path)
    stored = stored_arrays(path)
    random: list[str] = []
    for layer in model.layers:
        if not layer.weights or layer.name == "logits":
            continue
        arrays = stored.get(layer.name)
        shapes = [tuple(weight.shape) for weight in layer.weights]
        if arrays is not None and [array.shape for array in arrays] == shapes:
            layer.set_weights(arrays)
        elif layer.name.startswith("head_"):
            random.append(layer.name)
        elif arrays is None:
            raise ConfigError(f"weights: {path} has no layer {layer.name!r}; is it for {architecture.backbone}?")
        else:
            raise ConfigError(
                f"weights: {path}: layer {layer.name!r} has shapes {[a.shape for a in arrays]}, "
                f"{architecture.backbone} needs {shapes}"
            )
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


def import_foreign(model: keras.Model, path: str | Path) -> None:
    """Load somebody else's `.h5`, `.weights.h5` or `.keras` of the same backbone, with one dense output layer.

    Layers are taken by name; the one that is left over becomes the output. Nothing of the file's own model
    description is executed, so that a file cannot run code.

    Raises:
        ConfigError: a layer is missing, has another shape, or the output cannot be told.
    """
    stored = stored_arrays(Path(path))
    used: set[str] = set()
    n_outputs = model.get_layer("logits").kernel.shape[-1]
    for layer in model.layers:
        if not layer.weights or layer.name == "logits":
            continue
        arrays = stored.get(layer.name)
        shapes = [tuple(weight.shape) for weight in layer.weights]
        if arrays is None:
            near = labels.suggestion(layer.name, stored)
            raise ConfigError(f"{path}: has no layer {layer.name!r}{near}; is it for another backbone?")
        if [array.shape for array in arrays] != shapes:
            raise ConfigError(f"{path}: layer {layer.name!r} has shapes {[a.shape for a in arrays]}, not {shapes}")
        layer.set_weights(arrays)
        used.add(layer.name)
    left = {name: arrays for name, arrays in stored.items() if name not in used and arrays}
    width = model.get_layer("logits").kernel.shape[0]
    fitting = [
        name
        for name, arrays in left.items()
        if len(arrays) == 2 and arrays[0].ndim == 2 and arrays[0].shape[0] == width
    ]
    if len(fitting) != 1 or len(left) != 1:
        shown = ", ".join(f"{name} {[a.shape for a in arrays]}" for name, arrays in list(left.items())[:6]) or "none"
        raise ConfigError(
            f"{path}: expected, besides the backbone, one dense output layer from {width} features; found: {shown}"
        )
    kernel, bias = left[fitting[0]]
    if kernel.shape[1] != n_outputs:
        raise ConfigError(f"{path}: its output has {kernel.shape[1]} columns, but {n_outputs} findings were named")
    model.get_layer("logits").set_weights([kernel, bias])


def stored_arrays(path: Path) -> dict[str, list[np.ndarray]]:
    """The weights in a Keras file by layer name, in each layer's own order; reads numbers only.

    Knows the HDF5 of Keras 1 and 2 (whole models, and weights alone), `.weights.h5` of Keras 3, and `.keras`.

    Raises:
        ConfigError: no such file, or not one of these.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(".weights.h5")]
                if len(names) != 1:
                    raise ConfigError(f"{path}: is a zip file without a model.weights.h5; is it a .keras file?")
                if archive.getinfo(names[0]).file_size > MAX_WEIGHTS_BYTES:
                    raise ConfigError(f"{path}: {_TOO_LARGE}")
                with h5py.File(io.BytesIO(archive.read(names[0])), "r") as file:
                    return _arrays_of(file, path)
        with h5py.File(path, "r") as file:
            return _arrays_of(file, path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file of weights") from None
    except (OSError, zipfile.BadZipFile, RuntimeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path}: not a Keras file of weights: {_first_line(error)}") from None


def _arrays_of(file: h5py.File, path: Path) -> dict[str, list[np.ndarray]]:
    group = file.get("model_weights", file)
    numbers = _Numbers(file, path)
    if "layer_names" in group.attrs:  # Keras 1 and 2
        result: dict[str, list[np.ndarray]] = {}
        for raw in group.attrs["layer_names"]:
            name = _text(raw)
            layer = group[name]
            inner = [_text(item) for item in layer.attrs.get("weight_names", [])]
            owners = [item.rpartition("/")[0].removeprefix(f"{name}/") for item in inner]
            # A nested backbone keeps all its variables under its own name; their paths say which layer each is of.
            nested = len(set(owners)) > 1
            for item, owner in zip(inner, owners, strict=True):
                # keras.applications once wrote conv1/conv where it now writes conv1_conv.
                key = (owner if nested else name).replace("/", "_")
                result.setdefault(key, []).append(numbers.read(layer[item]))
        return result
    if "layers" in group:  # Keras 3
        found: dict[str, list[np.ndarray]] = {}
        _walk_keras3(group["layers"], found, numbers)
        return found
    raise ConfigError(f"{path}: an HDF5 file without Keras weights in it")


class _Numbers:
    """Reads arrays of one HDF5 file, and of no other: links and external storage in it could name any file at all.

    Raises:
        ConfigError: an array lies elsewhere, or all together are larger than any network's.
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file, self._path, self._left = file, path, MAX_WEIGHTS_BYTES

    def read(self, array: Any) -> np.ndarray:
        if not isinstance(array, h5py.Dataset):
            raise ConfigError(f"{self._path}: {array.name} is not an array; is it a Keras file of weights?")
        if array.external or array.is_virtual or array.file.id != self._file.id:
            raise ConfigError(f"{self._path}: {array.name} lies in another file; weights must stand in the file itself")
        self._left -= array.nbytes
        if self._left < 0:  # before anything is read: a few bytes can declare any shape
            raise ConfigError(f"{self._path}: {_TOO_LARGE}")
        return np.asarray(array)


def _walk_keras3(group: h5py.Group, found: dict[str, list[np.ndarray]], numbers: _Numbers) -> None:
    for key in group:
        child = group[key]
        if not isinstance(child, h5py.Group):
            continue
        if "vars" in child and len(child["vars"]):
            order = sorted(child["vars"], key=int)
            # Keras 3 keeps the layer's own name as an attribute; its key is only the class and a number.
            name = _text(child["vars"].attrs.get("name", child.attrs.get("name", key)))
            found[name] = [numbers.read(child["vars"][number]) for number in order]
        if "layers" in child:
            _walk_keras3(child["layers"], found, numbers)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
