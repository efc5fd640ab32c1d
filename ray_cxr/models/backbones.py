"""The backbones, each with the normalisation that its ImageNet weights were trained with.

One mean and standard deviation for all backbones is a common bug: in keras.applications, ResNet50 expects BGR minus the
mean, DenseNet scaled RGB over the deviation, ResNet50V2 -1 to 1, and EfficientNetV2 and MobileNetV3 normalise inside.
Here the normalisation is a layer of the graph, so that no caller can forget it.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
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


@dataclass(frozen=True)
class BackboneInfo:
    """How a backbone is constructed and what input it expects; for scale and offset see `GrayToInput`."""

    application: str | None  # its constructor in keras.applications; None for TinyCNN
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
    # Mode "tf": x / 127.5 - 1.
    "ResNet50V2": BackboneInfo("ResNet50V2", (1 / 127.5,) * 3, (-1.0,) * 3),
    "DenseNet121": BackboneInfo("DenseNet121", _TORCH_SCALE, _TORCH_OFFSET),
    "DenseNet169": BackboneInfo("DenseNet169", _TORCH_SCALE, _TORCH_OFFSET),
    # These two take 0 to 255 and normalise in their own first layers.
    "EfficientNetV2B0": BackboneInfo("EfficientNetV2B0", _ONES, _ZEROS, (("include_preprocessing", True),)),
    "MobileNetV3Small": BackboneInfo("MobileNetV3Small", _ONES, _ZEROS, (("include_preprocessing", True),)),
    "TinyCNN": BackboneInfo(None, (1 / 127.5,), (-1.0,)),
}


def features(backbone: str, images: Any, weights: str | None) -> Any:
    """Build a backbone on a symbolic uint8 [N,S,S,1], without a nested model; return its last feature map [N,h,w,C].

    Weights are `imagenet`, or None for random ones. Raises ConfigError if they are unavailable.
    """
    if backbone not in BACKBONES:
        raise ConfigError(f"backbone: unknown {backbone!r}; use one of {', '.join(BACKBONES)}")
    info = BACKBONES[backbone]
    x = GrayToInput(info.scale, info.offset, name="normalisation")(images)
    if info.application is None:
        if weights is not None:
            raise ConfigError(
                f"weights: {backbone} has no {weights!r} weights; use --set weights=none or a weights file"
            )
        return _tiny(x)
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
    return model.output


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
