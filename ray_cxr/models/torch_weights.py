"""Convert PyTorch weights in torchvision's layout of DenseNet and ResNet50 to the layers of our Keras models.

torchvision's names are also those of torchxrayvision, arnoweng/CheXNet, reproduce-chexnet and medical_mae, behind
prefixes such as `module.` and in two spellings. The layouts differ: PyTorch stores convolutions as OIHW and dense
kernels as [out,in], Keras as HWIO and [in,out]. keras.applications' DenseNet adds 1.001e-5 to variances where PyTorch
adds 1e-5; the difference is subtracted from the stored variances.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ray_cxr.errors import ConfigError

#: A convolution of each family, by which the prefix of all names is found.
_FIRST = {"DenseNet": "features.conv0.weight", "ResNet": "layer1.0.conv1.weight"}
_DENSENETS = {"DenseNet121": (6, 12, 24, 16), "DenseNet169": (6, 12, 32, 32), "DenseNet201": (6, 12, 48, 32)}
_RESNETS = {"ResNet50V1.5": (3, 4, 6, 3)}
_KERAS_EPSILON, _TORCH_EPSILON = 1.001e-5, 1e-5
#: Backbones of which PyTorch weights can be converted.
BACKBONES = (*_DENSENETS, *_RESNETS)
#: State that has no counterpart: counters of BatchNorm, and the thresholds that torchxrayvision keeps beside weights.
_UNUSED = re.compile(r"(^|\.)(num_batches_tracked|op_threshs)$")


@dataclass(frozen=True)
class TorchWeights:
    """Weights of a model with one dense output layer."""

    layers: dict[str, list[np.ndarray]]  # of the backbone, by the name of the Keras layer
    kernel: np.ndarray  # [features, outputs]
    bias: np.ndarray  # [outputs]
    channels: int  # of the first convolution's input: 1 or 3


def convert_weights(arrays: Mapping[str, np.ndarray], backbone: str, where: str) -> TorchWeights:
    """Convert the arrays of a state dict for a backbone of `BACKBONES`; errors start with `where`.

    Raises:
        ConfigError: an array is missing, or is left over.
    """
    if backbone not in BACKBONES:
        raise ConfigError(f"{where}: PyTorch weights can be read for {', '.join(BACKBONES)}, not for {backbone}")
    state = {re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", name): array for name, array in arrays.items()}
    state = {name: array for name, array in state.items() if not _UNUSED.search(name)}
    family = "ResNet" if backbone in _RESNETS else "DenseNet"
    prefix = _find_prefix(state, _FIRST[family], f"{where}: is not a {backbone}")
    layers: dict[str, list[np.ndarray]] = {}
    for theirs, ours, kind in _list_densenet(backbone) if family == "DenseNet" else _list_resnet(backbone):
        names = ("weight",) if kind == "conv" else ("weight", "bias", "running_mean", "running_var")
        found = []
        for name in names:
            key = f"{prefix}{theirs}.{name}"
            if key not in state:
                raise ConfigError(f"{where}: is not a {backbone}: it has no {key}")
            found.append(np.asarray(state.pop(key), dtype=np.float32))
        if kind == "conv":
            found = [np.ascontiguousarray(found[0].transpose(2, 3, 1, 0))] if found[0].ndim == 4 else found
        elif family == "DenseNet":
            found[3] = found[3] + np.float32(_TORCH_EPSILON - _KERAS_EPSILON)
        layers[ours] = found
    kernel, bias = _find_output(state, where)
    return TorchWeights(layers, kernel.T, bias, layers["conv1_conv"][0].shape[2])


def _find_prefix(state: Mapping[str, np.ndarray], first: str, problem: str) -> str:
    """Return what precedes the backbone's names, such as `module.`."""
    prefixes = sorted((name.removesuffix(first) for name in state if f".{name}".endswith(f".{first}")), key=len)
    if not prefixes:
        shown = ", ".join(list(state)[:4]) or "nothing"
        raise ConfigError(f"{problem}: it has no {first}, but {shown}")
    return prefixes[0]


def _find_output(rest: Mapping[str, np.ndarray], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return weight [outputs, features] and bias of the only layer that is left."""
    weights = [name for name, array in rest.items() if name.endswith("weight") and array.ndim == 2]
    if len(weights) == 1 and len(rest) == 2:
        weight, bias = rest[weights[0]], rest.get(weights[0].removesuffix("weight") + "bias")
        if bias is not None and bias.shape == weight.shape[:1]:
            return np.asarray(weight, np.float32), np.asarray(bias, np.float32)
    shown = ", ".join(f"{name} {list(array.shape)}" for name, array in list(rest.items())[:6]) or "nothing"
    raise ConfigError(f"{where}: expected the backbone and one dense output layer; beside the backbone it has: {shown}")


def _list_densenet(backbone: str) -> Iterator[tuple[str, str, str]]:
    """Yield torchvision's name, ours, and the kind of every layer with weights."""
    yield "features.conv0", "conv1_conv", "conv"
    yield "features.norm0", "conv1_bn", "norm"
    blocks = _DENSENETS[backbone]
    for block, count in enumerate(blocks, 1):
        for layer in range(1, count + 1):
            theirs, ours = f"features.denseblock{block}.denselayer{layer}", f"conv{block + 1}_block{layer}"
            yield f"{theirs}.norm1", f"{ours}_0_bn", "norm"
            yield f"{theirs}.conv1", f"{ours}_1_conv", "conv"
            yield f"{theirs}.norm2", f"{ours}_1_bn", "norm"
            yield f"{theirs}.conv2", f"{ours}_2_conv", "conv"
        if block < len(blocks):
            yield f"features.transition{block}.norm", f"pool{block + 1}_bn", "norm"
            yield f"features.transition{block}.conv", f"pool{block + 1}_conv", "conv"
    yield "features.norm5", "bn", "norm"


def _list_resnet(backbone: str) -> Iterator[tuple[str, str, str]]:
    """Yield names and kinds as `_list_densenet` does."""
    yield "conv1", "conv1_conv", "conv"
    yield "bn1", "conv1_bn", "norm"
    for stage, count in enumerate(_RESNETS[backbone], 1):
        for block in range(count):
            theirs, ours = f"layer{stage}.{block}", f"conv{stage + 1}_block{block + 1}"
            for number in (1, 2, 3):
                yield f"{theirs}.conv{number}", f"{ours}_{number}_conv", "conv"
                yield f"{theirs}.bn{number}", f"{ours}_{number}_bn", "norm"
            if block == 0:
                yield f"{theirs}.downsample.0", f"{ours}_0_conv", "conv"
                yield f"{theirs}.downsample.1", f"{ours}_0_bn", "norm"
