"""All settings, in one place: frozen, validated, and read from one TOML file with a section per command.

    [ray]      where Ray runs
    [prepare]  [train]  [tune]  [score]  [quantize]  [recalibrate]

A key that no section knows is refused with the nearest one that exists. `--set key=value` changes a key of the
command's own section, `--set section.key=value` one of another.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ray_cxr import labels
from ray_cxr.errors import ConfigError

_T = TypeVar("_T", bound="Settings")

Interpolation = Literal["area", "linear", "cubic", "lanczos"]
Aspect = Literal["stretch", "pad", "crop"]


class Settings(BaseModel):
    """Base of all settings: immutable, no unknown keys, errors as one `ConfigError` line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated like a new one.

        Raises:
            ConfigError: an unknown field or a value out of its range.
        """
        return build(type(self), {**self.model_dump(), **changes})


class InputSpec(Settings):
    """How a decoded radiograph becomes the model's input; the same for `prepare`, `score` and `predict`.

    The default aspect is `stretch` because the NIH release itself was made so: originals such as 2992 x 2991 or
    2500 x 2048 were stretched to 1024 x 1024 before anybody trained on them.
    """

    size: int = Field(224, ge=32, le=2048, description="side of the square input, pixels")
    aspect: Aspect = Field("stretch", description="pictures that are not square: stretch, pad with black, or crop")
    interpolation: Interpolation = Field("area", description="area averages when shrinking, as anti-aliasing needs")


class RaySettings(Settings):
    """Where Ray runs: a laptop and a cluster differ here and nowhere else."""

    address: str = Field("", description="empty: $RAY_ADDRESS if set, else a Ray of this command's own; or an address")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of a Ray of this command's own; null: all")
    num_gpus: int | None = Field(None, ge=0, description="GPUs of a Ray of this command's own; null: all")
    object_store_mb: int | None = Field(None, ge=80, description="object store of a Ray of this command's own, MiB")
    on_head: bool | None = Field(
        None, description="whether a cluster's head decodes, trains and scores; null: where no other node has a CPU"
    )


def _checked_rule(value: str) -> str:
    """A rule of an operating point.

    Raises:
        ValueError: it is none.
    """
    name, _, target = value.partition("=")
    try:
        good = (name == "youden" and value == name) or (
            name in ("sensitivity", "specificity") and 0.0 < float(target) < 1.0
        )
    except ValueError:
        good = False
    if not good:
        raise ValueError("use youden, sensitivity=X or specificity=X, with X between 0 and 1")
    return value


class PrepareSettings(Settings):
    sizes: tuple[int, ...] = Field((224,), description="sides of the prepared images, pixels")
    aspect: Aspect = Field("stretch", description="pictures that are not square: stretched, padded with black, cropped")
    interpolation: Interpolation = Field("area", description="area averages when shrinking, as anti-aliasing needs")
    rows_per_shard: int = Field(256, ge=1, le=100_000, description="images per shard; also what a kill can cost")
    decode_timeout_s: float = Field(
        60.0, gt=0.0, le=86_400, description="a file that takes longer becomes a row of decode_timeout"
    )

    @field_validator("sizes")
    @classmethod
    def _sizes(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("name at least one size")
        return tuple(sorted({InputSpec(size=size).size for size in value}))

    def spec(self, size: int) -> InputSpec:
        return InputSpec(size=size, aspect=self.aspect, interpolation=self.interpolation)


Backbone = Literal[
    "ResNet50", "ResNet50V2", "DenseNet121", "DenseNet169", "EfficientNetV2B0", "MobileNetV3Small", "TinyCNN"
]


class TrainSettings(Settings):
    """One training run. Flat, so that a search can name any field."""

    backbone: Backbone = Field("DenseNet121", description="the network below the head; TinyCNN is for demos and tests")
    size: int | None = Field(None, ge=32, le=2048, description="which prepared size; null: the only one there is")
    findings: int | tuple[str, ...] = Field(14, description="14, 15 (with No_Finding), or a list of names")
    weights: str = Field("imagenet", description="imagenet, none, a bundle, or a file of Keras weights")
    pooling: Literal["avg", "max", "avgmax"] = Field("avg", description="of the last feature map; avgmax: both")
    dense: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field((), description="widths of extra dense layers")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="before each dense layer, the output included")
    sync_batchnorm: bool = Field(False, description="BatchNorm over the whole global batch, not each worker's share")
    loss: Literal["bce", "weighted_bce", "focal", "asymmetric"] = Field(
        "weighted_bce", description="weighted_bce: positives and negatives of a finding weigh the same in total"
    )
    focal_gamma: float = Field(2.0, ge=0.0, le=10.0, description="focal: how much the easy count less; 0 is bce")
    asymmetric_gamma_positive: float = Field(0.0, ge=0.0, le=10.0, description="asymmetric: focusing of positives")
    asymmetric_gamma_negative: float = Field(4.0, ge=0.0, le=10.0, description="asymmetric: focusing of negatives")
    asymmetric_margin: float = Field(
        0.05, ge=0.0, lt=1.0, description="asymmetric: negatives below this probability count nothing"
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5, description="labels become this and 1 minus this")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="sgd: with Nesterov momentum")
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="sgd only")
    weight_decay: float = Field(1e-4, ge=0.0, le=1.0, description="adamw only; decoupled from the gradient")
    learning_rate: float = Field(1e-4, gt=0.0, le=10.0, description="the highest, where it changes")
    schedule: Literal["constant", "cosine", "plateau"] = Field(
        "constant", description="cosine: to zero at the last step; plateau: falls when the AUROC no longer rises"
    )
    warmup_epochs: float = Field(0.0, ge=0.0, description="linear rise of the learning rate; parts of an epoch count")
    plateau_patience: int = Field(2, ge=1, description="plateau: epochs without a better AUROC before a fall")
    plateau_factor: float = Field(0.1, gt=0.0, lt=1.0, description="plateau: the learning rate is multiplied by this")
    frozen_epochs: int = Field(0, ge=0, description="first epochs in which only the head learns (transfer learning)")
    frozen_learning_rate: float | None = Field(
        None, gt=0.0, le=10.0, description="constant, for those epochs; null: learning_rate"
    )
    clip_norm: float | None = Field(None, gt=0.0, description="largest norm of the global batch's gradient; null: any")
    ema: float | None = Field(
        None, gt=0.0, lt=1.0, description="momentum of a moving average of the weights, which is validated and kept"
    )
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "auto", description="auto: float32 on CPUs, mixed on GPUs (bfloat16 where they have it)"
    )
    xla: bool = Field(False, description="compile each worker's step with XLA; slower to start")
    deterministic: bool | None = Field(
        None, description="the same bits on every run; null: on CPUs without xla, where it costs little"
    )
    batch_size: int = Field(32, ge=1, le=65536, description="global batch, over all workers")
    epochs: int = Field(10, ge=1, le=100_000, description="passes over the training images")
    steps_per_epoch: int | None = Field(None, ge=1, description="null: every training image once an epoch")
    patience: int | None = Field(None, ge=1, description="stop after so many epochs without a better AUROC")
    checkpoint_steps: int | None = Field(None, ge=1, description="a checkpoint every so many steps, too; null: none")
    flip: bool = Field(
        False, description="random left-right flips; off, because a mirrored chest is situs inversus, not a variant"
    )
    rotation: float = Field(0.0, ge=0.0, le=45.0, description="random rotation, degrees to either side")
    shift: float = Field(0.04, ge=0.0, le=0.5, description="random shift, fraction of the side")
    zoom: float = Field(0.0, ge=0.0, le=0.5, description="random zoom, 1 +- this")
    contrast: float = Field(0.1, ge=0.0, le=0.9, description="random contrast, 1 +- this")
    calibration: Literal["platt", "temperature"] = Field(
        "platt", description="platt: slope and intercept; temperature: slope alone"
    )
    operating_point: str = Field("youden", description="rule for flags: youden, sensitivity=0.9 or specificity=0.9")
    min_positives: int = Field(5, ge=2, description="calibrate a finding only from so many validation positives")
    seed: int = Field(0, ge=0, lt=2**31, description="of the start, the order, dropout and the augmentation")
    workers: int = Field(1, ge=1, description="training processes; --workers N sets it")
    cpus_per_worker: int | None = Field(None, ge=1, description="null: all CPUs there are, shared out")
    gpus_per_worker: float = Field(
        1.0, gt=0.0, le=1.0, description="with --gpu; a part of one lets runs of one worker share a GPU"
    )
    max_failures: int = Field(2, ge=-1, description="restarts from the last checkpoint; -1: without end")

    @field_validator("findings", mode="before")
    @classmethod
    def _findings(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = int(value) if value.isdecimal() else [name for name in value.split(",") if name]
        try:
            labels.resolve(value)
        except ConfigError as error:
            # As a ValueError it is told with its place, like any other bad value.
            raise ValueError(str(error).removeprefix("findings: ")) from None
        return value

    @field_validator("operating_point")
    @classmethod
    def _operating_point(cls, value: str) -> str:
        return _checked_rule(value)

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.xla and self.deterministic:
            raise ValueError(
                "deterministic: XLA has no deterministic gradient of max pooling; set one of the two to false"
            )
        if self.xla and self.sync_batchnorm:
            raise ValueError("sync_batchnorm: statistics cannot be exchanged inside XLA; set one of the two to false")
        if self.gpus_per_worker < 1 and self.workers > 1:
            raise ValueError("gpus_per_worker: NCCL takes one worker per GPU; a part of a GPU is for workers=1")
        return self

    def list_unused(self) -> list[str]:
        """Return the changed settings that have no effect with the other settings, each with the reason."""
        stage = self.epochs - self.frozen_epochs
        needs = {
            "momentum": (self.optimizer == "sgd", "optimizer is not sgd"),
            "weight_decay": (self.optimizer == "adamw", "optimizer is not adamw"),
            "focal_gamma": (self.loss == "focal", "loss is not focal"),
            "asymmetric_gamma_positive": (self.loss == "asymmetric", "loss is not asymmetric"),
            "asymmetric_gamma_negative": (self.loss == "asymmetric", "loss is not asymmetric"),
            "asymmetric_margin": (self.loss == "asymmetric", "loss is not asymmetric"),
            "plateau_patience": (self.schedule == "plateau", "schedule is not plateau"),
            "plateau_factor": (self.schedule == "plateau", "schedule is not plateau"),
            "frozen_learning_rate": (self.frozen_epochs > 0, "frozen_epochs is 0"),
            "learning_rate": (stage > 0 or self.frozen_learning_rate is None, "all epochs are frozen"),
            "warmup_epochs": (stage > 0, "all epochs are frozen"),
        }
        return [
            f"{name} ({reason})"
            for name, (used, reason) in needs.items()
            if not used and getattr(self, name) != type(self).model_fields[name].default
        ]

    def finding_names(self) -> tuple[str, ...]:
        return labels.resolve(self.findings)


Objective = Literal["auroc", "images_per_second", "calibration_error"]


class TuneSettings(Settings):
    """A search. What every trial shares is [train]; what differs is [tune.space]."""

    trials: int = Field(20, ge=1, le=100_000, description="in all, those of earlier runs included; --trials N sets it")
    space: dict[str, Any] = Field({}, description="what is searched; empty: a space of its own, see docs/tuning.md")
    enqueue: tuple[dict[str, Any], ...] = Field((), description="known good settings, tried first, in this order")
    known: bool = Field(
        True, description="try ResNet50 and DenseNet121 with settings that are known to work first, where searched"
    )
    sampler: Literal["tpe", "random", "cmaes"] = Field(
        "tpe", description="cmaes: numbers only, one backbone, nothing conditional; needs the extra cmaes"
    )
    startup_trials: int = Field(10, ge=0, description="tpe: random ones before it models anything")
    scheduler: Literal["asha", "halving", "median", "none"] = Field(
        "asha", description="which trials end early: asha and halving by rungs, median below the others' median"
    )
    grace_epochs: int = Field(1, ge=1, description="epochs that every trial gets")
    reduction_factor: int = Field(3, ge=2, le=100, description="asha, halving: one in so many goes on, so much longer")
    objectives: tuple[Objective, ...] = Field(
        ("auroc",), description="auroc alone, or with images_per_second of the exported network, calibration_error"
    )
    concurrent: int | None = Field(
        None, ge=1, description="trials that train at a time; null: as GPUs allow, and one for each node's CPUs"
    )
    ahead: int = Field(
        1, ge=0, le=100, description="trials started before there is room, so that only their workers have to start"
    )
    max_failures: int = Field(1, ge=0, description="new starts of a trial whose process or node was lost")
    keep: Literal["best", "all"] = Field(
        "best", description="checkpoints that stay when the search has ended: those that a bundle may come of, or all"
    )
    storage: str | None = Field(None, description="Optuna storage, such as postgresql://...; null: STUDY/study.db")
    seed: int = Field(0, ge=0, lt=2**31, description="of the sampler")

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "auroc" not in value or len(set(value)) != len(value):
            raise ValueError("name auroc, and each of the others at most once")
        return ("auroc", *(name for name in value if name != "auroc"))


Precision = Literal["auto", "fp32", "bf16", "int8"]
HeatMapMethod = Literal["gradcam", "hirescam"]


class ScoreSettings(Settings):
    precision: Precision = Field(
        "auto", description="auto: bf16 where the CPU has it and the bundle was checked in it, else fp32; --precision"
    )
    batch_size: int | None = Field(
        None, ge=1, le=4096, description="images per forward pass; null: 4 on CPUs, which their caches hold, 64 on GPUs"
    )
    rows_per_file: int = Field(
        256, ge=1, le=1_000_000, description="rows per output file; a kill costs up to two files' work an actor"
    )
    cpus_per_actor: int | None = Field(None, ge=1, description="null: up to 4, and never more than a node has")
    decode: Literal["auto", "inside", "apart"] = Field(
        "auto",
        description="inside: by the network's own actors; apart: in tasks of one CPU; auto: apart with --gpu only",
    )
    decode_timeout_s: float = Field(
        60.0, gt=0.0, le=86_400, description="a file that takes longer becomes a row of decode_timeout"
    )
    max_error_rate: float = Field(0.5, ge=0.0, le=1.0, description="exit with 3 when a larger share failed")
    max_pixels: int = Field(100_000_000, ge=1, description="larger pictures are refused before they are decoded")
    pseudonym_key: str | None = Field(
        None, description="file with a secret key: ids read from DICOM tags become keyed hashes; null: as they are"
    )
    heatmap_method: HeatMapMethod = Field("gradcam", description="how `--heatmaps K` finds what speaks for a finding")
    heatmap_pixels: int = Field(512, ge=64, le=2048, description="longer side of the pictures of `--heatmaps K`")


class QuantizeSettings(Settings):
    images: int = Field(300, ge=32, le=100_000, description="training images that the ranges of int8 are taken from")
    check_images: int = Field(2000, ge=32, le=1_000_000, description="validation images that the drift is checked on")
    max_p99_drift: float = Field(
        0.03, gt=0.0, lt=1.0, description="largest change allowed in 99 of 100 probabilities, against fp32"
    )
    max_auroc_fall: float = Field(0.005, gt=0.0, lt=1.0, description="largest fall allowed in the macro AUROC")
    seed: int = Field(0, ge=0, lt=2**31, description="of the choice of images")


class RecalibrateSettings(Settings):
    calibration: Literal["platt", "temperature"] | None = Field(
        None, description="platt: slope and intercept; temperature: slope alone; null: the bundle's own, or platt"
    )
    operating_point: str | None = Field(
        None,
        description="rule for flags: youden, sensitivity=0.9 or specificity=0.9; null: the bundle's own, or youden",
    )
    min_positives: int = Field(5, ge=2, description="fit a finding only from so many positives, and negatives")

    @field_validator("operating_point")
    @classmethod
    def _operating_point(cls, value: str | None) -> str | None:
        return None if value is None else _checked_rule(value)


class Config(Settings):
    """The whole file."""

    ray: RaySettings = RaySettings()
    prepare: PrepareSettings = PrepareSettings()
    train: TrainSettings = TrainSettings()
    tune: TuneSettings = TuneSettings()
    score: ScoreSettings = ScoreSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    recalibrate: RecalibrateSettings = RecalibrateSettings()

    @model_validator(mode="before")
    @classmethod
    def _tables(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name, section in data.items():
                if name in cls.model_fields and not isinstance(section, (Mapping, Settings)):
                    raise ValueError(f"{name} is a section: write [{name}] and its keys below")
        return data


def build(kind: type[_T], values: Mapping[str, Any], *, where: str = "") -> _T:
    """Validate `values` as settings of one kind.

    Raises:
        ConfigError: one line that names each bad key, its value and its rule.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise _refusal((f"{where}: " if where else "") + _one_line(kind, error)) from None


def load(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    section: str = "train",
    start: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Read a TOML file (none: the defaults) and apply `key=value` overrides to it.

    Args:
        path: the TOML file, or None.
        overrides: texts such as `epochs=3`, `ray.num_cpus=2`, `dense=[256]`; the value is TOML, or a bare word.
        section: the section that a key without a dot belongs to.
        start: values of sections in place of a file.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a value out of its range.
    """
    data: dict[str, Any] = {name: dict(values) for name, values in (start or {}).items()}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise _refusal(f"--config {path}: {error.strerror}; name an existing TOML file") from None
        except (ValueError, RecursionError) as error:
            raise _refusal(f"--config {path}: not TOML: {error}") from None
        build(Config, data, where=f"--config {path}")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise _refusal(f"--set {text}: write it as key=value")
        name, _, field = key.strip().rpartition(".")
        name = name or section
        if not isinstance(data.setdefault(name, {}), dict):
            raise _refusal(f"--set {text}: {name} is not a section")
        data[name][field] = _value(value.strip())
        build(Config, data, where=f"--set {text}")
    return build(Config, data)


def _value(text: str) -> Any:
    """A TOML value; a bare word that is no TOML value is a string."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        if text in ("null", "None"):
            return None
        return text
    except (ValueError, RecursionError):
        # A number of thousands of digits, brackets without end: no setting takes these, and as text they are refused.
        return text


def _refusal(text: str) -> ConfigError:
    """The error with `text` on one line, whatever the user's own text holds."""
    return ConfigError(" ".join(text.split()))


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else text[:97] + "..."


def _one_line(kind: type[Settings], error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        place = ".".join(str(step) for step in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _fields_at(kind, item["loc"][:-1])
            parts.append(f"unknown key {place!r}{labels.suggestion(str(item['loc'][-1]), known)}")
        else:
            shown = "" if isinstance(item["input"], (Mapping, Settings)) else f" (got {_shown(item['input'])})"
            message = item["msg"].removeprefix("Value error, ")
            parts.append(f"{place}: {message}{shown}" if place else message)
    return "; ".join(parts)


def _fields_at(kind: type[Settings], path: Sequence[Any]) -> list[str]:
    fields = kind.model_fields
    for step in path:
        inner = fields[step].annotation if step in fields else None
        if not (isinstance(inner, type) and issubclass(inner, Settings)):
            return []
        fields = inner.model_fields
    return list(fields)
