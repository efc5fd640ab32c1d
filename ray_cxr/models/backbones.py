"""The backbones, each with the normalisation that its ImageNet weights were trained with.

One mean and standard deviation for all backbones is a common bug: in keras.applications, ResNet50 expects BGR minus the
mean, DenseNet scaled RGB over the deviation, ResNet50V2 -1 to 1, and EfficientNetV2, MobileNetV3 and ConvNeXt normalise
inside. Here the normalisation is a layer of the graph, so that no caller can forget it.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ray_cxr.errors import ConfigError, first_line
from ray_cxr.models.keras_setup import KERAS_FOLDER, keras

layers, ops = keras.layers, keras.ops


@keras.saving.register_keras_serializable(package="ray_cxr")
class GrayToInput(keras.layers.Layer):
    """Maps gray x, uint8 [N,S,S,1], to the input of a backbone, float [N,S,S,C].

    Channel c is `x * scale[c] + offset[c]`.
    """

    def __init__(self, scale: tuple[float, ...], offset: tuple[float, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = tuple(float(value) for value in scale)
        self.offset = tuple(float(value) for value in offset)

    def call(self, images: Any) -> Any:
        # In float32 under any policy: bfloat16 cannot represent 256 grays, and the offsets need more digits.
        x = ops.repeat(ops.cast(images, "float32"), len(self.scale), axis=-1)
        x = x * ops.convert_to_tensor(self.scale, "float32") + ops.convert_to_tensor(self.offset, "float32")
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], len(self.scale))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale, "offset": self.offset}


class Conv2D(keras.layers.Conv2D):
    """A convolution with one group per channel, run as a depthwise convolution.

    TensorFlow runs grouped convolutions on CPUs only through XLA, which is slow and which ONNX has no form of. Weights
    and configuration are those of Keras's Conv2D, and so is the name of the class, by which weights files name layers.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        kernel = ops.transpose(kernel, (0, 1, 3, 2))  # [h,w,1,C] to [h,w,C,1]
        return ops.depthwise_conv(inputs, kernel, self.strides, self.padding, self.data_format, self.dilation_rate)


def gelu(x: Any) -> Any:
    """Return the exact GELU; that of TensorFlow uses `erfc`, of which ONNX has no form."""
    return 0.5 * x * (1.0 + ops.erf(x * 0.5**0.5))


@dataclass(frozen=True)
class BackboneInfo:
    """How a backbone is constructed and what input it expects; for scale and offset see `GrayToInput`."""

    application: str | None  # its constructor in keras.applications; None for those built here
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    options: tuple[tuple[str, Any], ...] = ()  # additional arguments of the constructor


# keras.applications.imagenet_utils, mode "torch": x / 255, minus the mean, over the deviation, in RGB.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TORCH_SCALE = tuple(1 / (255 * s) for s in _STD)
_TORCH_OFFSET = tuple(-m / s for m, s in zip(_MEAN, _STD, strict=True))
# Mode "caffe": BGR, minus the mean; gray is the same in RGB and BGR.
_CAFFE_OFFSET = (-103.939, -116.779, -123.68)
_ONES, _ZEROS = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)

BACKBONES: dict[str, BackboneInfo] = {
    "ResNet50": BackboneInfo("ResNet50", _ONES, _CAFFE_OFFSET),
    # He et al. with the stride in the 3 x 3 convolution, as in torchvision; keras.applications has it in the 1 x 1.
    "ResNet50V1.5": BackboneInfo(None, _TORCH_SCALE, _TORCH_OFFSET),
    # Mode "tf": x / 127.5 - 1.
    "ResNet50V2": BackboneInfo("ResNet50V2", (1 / 127.5,) * 3, (-1.0,) * 3),
    "DenseNet121": BackboneInfo("DenseNet121", _TORCH_SCALE, _TORCH_OFFSET),
    "DenseNet169": BackboneInfo("DenseNet169", _TORCH_SCALE, _TORCH_OFFSET),
    "DenseNet201": BackboneInfo("DenseNet201", _TORCH_SCALE, _TORCH_OFFSET),
    # These two take 0 to 255 and normalise in their own first layers.
    "EfficientNetV2B0": BackboneInfo("EfficientNetV2B0", _ONES, _ZEROS, (("include_preprocessing", True),)),
    "MobileNetV3Small": BackboneInfo("MobileNetV3Small", _ONES, _ZEROS, (("include_preprocessing", True),)),
    # These two would do so too, but in half precision under a mixed policy.
    "EfficientNetV2S": BackboneInfo(
        "EfficientNetV2S", (1 / 128,) * 3, (-1.0,) * 3, (("include_preprocessing", False),)
    ),
    "ConvNeXtTiny": BackboneInfo("ConvNeXtTiny", _TORCH_SCALE, _TORCH_OFFSET, (("include_preprocessing", False),)),
    "TinyCNN": BackboneInfo(None, (1 / 127.5,), (-1.0,)),
}


def features(
    backbone: str, images: Any, weights: str | None, normalization: Sequence[tuple[float, float]] | None = None
) -> Any:
    """Build a backbone on a symbolic uint8 [N,S,S,1], without a nested model; return its last feature map [N,h,w,C].

    Weights are `imagenet`, or None for random ones. `normalization` has (scale, offset) per input channel; None stands
    for that of the ImageNet weights. Raises ConfigError if the weights are unavailable.
    """
    if backbone not in BACKBONES:
        raise ConfigError(f"backbone: unknown {backbone!r}; use one of {', '.join(BACKBONES)}")
    info = BACKBONES[backbone]
    scale, offset = zip(*normalization, strict=True) if normalization else (info.scale, info.offset)
    x = GrayToInput(scale, offset, name="normalisation")(images)
    if info.application is None:
        if weights is not None:
            raise ConfigError(
                f"weights: {backbone} has no {weights!r} weights; use --set weights=none or a weights file"
            )
        return _resnet50(x) if backbone == "ResNet50V1.5" else _tiny(x)
    constructor: Callable[..., Any] = getattr(keras.applications, info.application)
    try:
        # As `input_tensor`: keras.applications rejects ImageNet weights if the input has another name.
        with _lock_downloads() if weights else contextlib.nullcontext():
            model = constructor(include_top=False, weights=weights, input_tensor=x, **dict(info.options))
    except Exception as error:
        # Keras raises a bare Exception when its download fails.
        if weights != "imagenet" or isinstance(error, (TypeError, KeyError)):
            raise
        reason = first_line(error)
        raise ConfigError(
            f"weights: the ImageNet weights of {backbone} are unavailable ({reason}); connect to the internet, pass a "
            "weights file, or use weights=none for random weights"
        ) from None
    return _flatten(model, images) if any(isinstance(x, keras.Model) for x in model.layers) else model.output


def _flatten(model: keras.Model, images: Any) -> Any:
    """Rebuild a model with the layers of its Sequential parts, and their weights; return its output for `images`.

    Depthwise convolutions and GELU get a form that is fast on CPUs and can become ONNX.
    """

    def clone(layer: keras.layers.Layer) -> Any:
        if isinstance(layer, keras.Sequential):
            return layer
        config = layer.get_config()
        # Keras numbers layers without a name by what the process has built before.
        config["name"] = re.sub(r"^(layer_normalization)_\d+$", r"\1", config["name"])
        if isinstance(layer, keras.layers.Conv2D) and layer.groups == layer.filters > 1:
            return Conv2D.from_config(config)
        if isinstance(layer, keras.layers.Activation) and layer.activation is keras.activations.gelu:
            config["activation"] = gelu
        return type(layer).from_config(config)

    def call(layer: keras.layers.Layer, x: Any, *more: Any, **options: Any) -> Any:
        if not isinstance(layer, keras.Sequential):
            return layer(x, *more, **options)
        for inner in layer.layers:
            x = clone(inner)(x)
        return x

    flat = keras.models.clone_model(model, input_tensors=images, clone_function=clone, call_function=call)
    flat.set_weights(model.get_weights())
    return flat.output


@contextlib.contextmanager
def _lock_downloads() -> Iterator[None]:
    """Hold a lock that all processes of this user share, since all would download into the same file."""
    KERAS_FOLDER.mkdir(parents=True, exist_ok=True)  # without it, Keras would download into another folder
    with open(KERAS_FOLDER / "ray_cxr.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, also by a kill
        yield


def _tiny(x: Any) -> Any:
    """Build a plain CNN of about 100,000 weights for demos and tests, which trains in minutes on a laptop's CPU."""
    for stage, width in enumerate((16, 32, 64, 96)):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"tiny_conv{stage}")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"tiny_bn{stage}")(x)
        x = layers.ReLU(name=f"tiny_relu{stage}")(x)
        if stage < 3:
            x = layers.MaxPooling2D(2, name=f"tiny_pool{stage}")(x)
    return x


def _resnet50(x: Any) -> Any:
    """Build ResNet50 v1.5 as PyTorch does: padding on both sides, epsilon 1e-5. Layers are named as in Keras."""

    def convolve(x: Any, width: int, kernel: int, stride: int, name: str, relu: bool = True) -> Any:
        if kernel > 1:
            x = layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
        x = layers.Conv2D(width, kernel, strides=stride, use_bias=False, name=f"{name}_conv")(x)
        x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)
        return layers.ReLU(name=f"{name}_relu")(x) if relu else x

    x = convolve(x, 64, 7, 2, "conv1")
    x = layers.ZeroPadding2D(1, name="pool1_pad")(x)  # zeros, because ReLU leaves nothing below
    x = layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 2):
        for block in range(1, blocks + 1):
            name, stride = f"conv{stage}_block{block}", 2 if block == 1 and stage > 2 else 1
            shortcut = convolve(x, 4 * width, 1, stride, f"{name}_0", relu=False) if block == 1 else x
            y = convolve(x, width, 1, 1, f"{name}_1")
            y = convolve(y, width, 3, stride, f"{name}_2")
            y = convolve(y, 4 * width, 1, 1, f"{name}_3", relu=False)
            x = layers.ReLU(name=f"{name}_out")(layers.Add(name=f"{name}_add")([shortcut, y]))
    return x
