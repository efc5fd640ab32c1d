"""The backbones, each with the normalisation that its ImageNet weights were trained with.

One hard-coded mean and standard deviation for all backbones is this field's commonest bug: keras.applications'
ResNet50 wants BGR minus the mean, DenseNet wants scaled RGB over the deviation, ResNet50V2 wants -1 to 1, and
EfficientNetV2 and MobileNetV3 normalise inside. Here the rule is a layer of the graph, so that no caller can
forget it.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
from keras import layers, ops

from ray_cxr.errors import ConfigError, first_line


@keras.saving.register_keras_serializable(package="ray_cxr")
class GrayToInput(layers.Layer):
    """uint8 gray [N,S,S,1] to what one backbone expects: float [N,S,S,C], `x * scale + offset` per channel.

    Args:
        scale: one number per output channel.
        offset: likewise. Gray is repeated over the channels first.
    """

    def __init__(self, scale: tuple[float, ...], offset: tuple[float, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = tuple(float(value) for value in scale)
        self.offset = tuple(float(value) for value in offset)

    def call(self, images: Any) -> Any:
        # In float32 whatever the compute policy: bfloat16 cannot hold 256 grays, and the offsets need more still.
        x = ops.repeat(ops.cast(images, "float32"), len(self.scale), axis=-1)
        x = x * ops.convert_to_tensor(self.scale, "float32") + ops.convert_to_tensor(self.offset, "float32")
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (*input_shape[:-1], len(self.scale))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale, "offset": self.offset}


@dataclass(frozen=True)
class BackboneInfo:
    """One backbone of the list.

    Attributes:
        application: name of its constructor in keras.applications; None for our own.
        scale, offset: its input is gray * scale + offset, per channel (see `GrayToInput`).
        options: further arguments of the constructor.
    """

    application: str | None
    scale: tuple[float, ...]
    offset: tuple[float, ...]
    options: tuple[tuple[str, Any], ...] = ()


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
    """Build a backbone flat onto an input: its layers become the caller's model's own, none is nested.

    Args:
        backbone: a key of `BACKBONES`.
        images: a symbolic uint8 [N,S,S,1].
        weights: `imagenet`, or None for random ones.

    Returns:
        The symbolic last feature map [N,h,w,C].

    Raises:
        ConfigError: an unknown backbone; weights that cannot be had, with the reason.
    """
    if backbone not in BACKBONES:
        raise ConfigError(f"backbone: unknown {backbone!r}; one of {', '.join(BACKBONES)}")
    info = BACKBONES[backbone]
    x = GrayToInput(info.scale, info.offset, name="normalisation")(images)
    if info.application is None:
        if weights is not None:
            raise ConfigError(f"weights: {backbone} has no {weights!r} weights; use --set weights=none, or a file")
        return _tiny(x)
    constructor: Callable[..., Any] = getattr(keras.applications, info.application)
    try:
        # keras.applications refuses ImageNet weights over another name of input; the tensor alone is enough.
        with _one_at_a_time() if weights else contextlib.nullcontext():
            model = constructor(include_top=False, weights=weights, input_tensor=x, **dict(info.options))
    except Exception as error:
        # Keras raises a bare Exception when its download fails.
        if weights != "imagenet" or isinstance(error, (TypeError, KeyError)):
            raise
        reason = first_line(error)
        raise ConfigError(
            f"weights: the ImageNet weights of {backbone} cannot be had ({reason}); "
            "connect to the internet, name a file of weights, or say weights=none to start from random ones"
        ) from None
    return model.output


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Hold a lock that is this user's on this machine: Keras downloads into one file, from any number of workers."""
    folder = Path.home() / ".keras"
    folder.mkdir(exist_ok=True)
    with open(folder / "ray_cxr.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # given up when the file is closed, also by a kill
        yield


def _tiny(x: Any) -> Any:
    """A small residual-free CNN of about 100,000 weights: minutes on a laptop's CPU; for demos and tests."""
    for stage, width in enumerate((16, 32, 64, 96)):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"tiny_conv{stage}")(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"tiny_bn{stage}")(x)
        x = layers.ReLU(name=f"tiny_relu{stage}")(x)
        if stage < 3:
            x = layers.MaxPooling2D(2, name=f"tiny_pool{stage}")(x)
    return x
