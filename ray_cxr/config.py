"""Settings: frozen, validated, and read from a TOML file with a section per command.

    [ray]      where Ray runs
    [pacs]     how a PACS is reached
    [prepare]  [train]  [tune]  [score]  [quantize]  [recalibrate]  [probe]

An unknown key is an error that suggests the nearest known one. `--set key=value` changes a key of the command's own
section, `--set section.key=value` a key of another section.
"""

from __future__ import annotations

import codecs
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from ray_cxr import labels
from ray_cxr.errors import ConfigError, one_line

_T = TypeVar("_T", bound="Settings")
#: A range of workers, such as `2-8`.
_RANGE = re.compile(r"(\d{1,5})-(\d{1,5})")

Interpolation = Literal["area", "linear", "cubic", "lanczos"]
Aspect = Literal["stretch", "pad", "crop"]


class Settings(BaseModel):
    """Base of all settings: immutable, without unknown keys; every error is a one-line `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed; the fields that were not set remain so."""
        return build(type(self), {**self.model_dump(exclude_unset=True), **changes})


class InputSpec(Settings):
    """How a decoded radiograph becomes the model's input, in `prepare`, `score` and `predict` alike.

    The default aspect is `stretch`, as in the NIH release: originals of 2992 x 2991 or 2500 x 2048 pixels were
    stretched to 1024 x 1024.
    """

    size: int = Field(224, ge=32, le=2048, description="side of the square input, pixels")
    aspect: Aspect = Field("stretch", description="for images that are not square: stretch, pad with black, or crop")
    interpolation: Interpolation = Field("area", description="area averages when shrinking, against aliasing")
    tiles: tuple[InputSpec, ...] = Field((), description="inputs that share the square, instead of one image")

    def __str__(self) -> str:
        """Return the form that error messages show."""
        return f"size={self.size} aspect={self.aspect!r} interpolation={self.interpolation!r}"

    @model_serializer(mode="wrap")
    def _leave_out_no_tiles(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write a plain spec as files of runs without tiles hold it."""
        written: dict[str, Any] = write(self)
        if not self.tiles:
            del written["tiles"]
        return written


def _parse_labels(value: Any) -> Any:
    """Return a text such as `a=1,b=in(2, 3)` as a mapping; return anything else unchanged."""
    if not isinstance(value, str):
        return value
    parts = [part.partition("=") for part in re.split(r",(?![^(]*\))", value) if part.strip()]
    if not all(equals for _, equals, _ in parts):
        raise ValueError("write LABEL=VALUE, e.g. ray.io/market-type=spot")
    return {label.strip(): text.strip() for label, _, text in parts}


#: Labels of Ray's nodes, as in `ray start --labels`, or a table in TOML.
NodeLabels = Annotated[dict[str, str], BeforeValidator(_parse_labels)]


class RaySettings(Settings):
    """Where Ray runs; a laptop and a cluster differ only in this section."""

    address: str = Field("", description="address of a cluster; empty: $RAY_ADDRESS if set, else start a local Ray")
    num_cpus: int | None = Field(None, ge=1, description="CPUs of a local Ray; null: all")
    num_gpus: int | None = Field(None, ge=0, description="GPUs of a local Ray; null: all")
    object_store_mb: int | None = Field(None, ge=80, description="object store of a local Ray, MiB")
    on_head: bool | None = Field(
        None, description="whether a cluster's head decodes, trains and scores; null: only if no other node has a CPU"
    )
    label_selector: NodeLabels = Field(
        {},
        description="labels of the nodes that may work, in Ray's form: `ray.io/market-type=on-demand`, `zone=!b`, "
        "`pool=in(a, b)`; empty: all nodes",
    )
    prefer: NodeLabels = Field(
        {}, description="labels of nodes that work first; the others work when these are busy or lost"
    )


def _locate(path: str) -> str:
    if not path:
        raise ValueError("name a file")
    return os.path.abspath(os.path.expanduser(path))


#: A file of this machine, made absolute, because workers run in other folders.
LocalFile = Annotated[str, AfterValidator(_locate)]


class PacsSettings(Settings):
    """How a PACS is reached over DICOMweb. Secrets are in files, never in settings; this holds only the paths."""

    host: str | None = Field(
        None,
        description="the only host, as HOST or HOST:PORT, that may be reached; required with token_file or "
        "client_certificate, so that no address in a table can obtain them; null: any host",
    )
    credentials: LocalFile | None = Field(
        None, description="file of mode 600 with lines `machine HOST login USER password PASSWORD`; null: no password"
    )
    token_file: LocalFile | None = Field(
        None, description="file of mode 600 with a bearer token, read again when the PACS refuses the token"
    )
    client_certificate: LocalFile | None = Field(None, description="PEM file with the client's certificate for TLS")
    client_key: LocalFile | None = Field(
        None, description="PEM file of mode 600 with its key, not encrypted; null: in client_certificate"
    )
    ca_file: LocalFile | None = Field(
        None, description="PEM file with the authorities that sign the PACS's certificate; null: the public ones"
    )
    parallel: int = Field(4, ge=1, le=256, description="requests at the same time, over all nodes of a run")
    per_second: float = Field(20.0, gt=0.0, le=10_000.0, description="requests per second, over all nodes of a run")
    timeout_s: float = Field(
        60.0, gt=0.0, le=86_400, description="one request with its whole transfer; also of a server that sends slowly"
    )
    attempts: int = Field(
        5, ge=1, le=20, description="for busy servers (429, 500, 502, 503, 504), broken connections and time-outs"
    )
    page: int = Field(500, ge=1, le=10_000, description="instances per page of a listing (QIDO-RS)")
    calling_aet: str = Field("RAYCXR", description="AE title of this program, for `export-sr --send dimse://...`")
    captures: bool = Field(
        False, description="also list Secondary Captures: scanned films, but also screenshots and stored heat maps"
    )


#: Rules for operating points that take a target, as in `npv=0.99`; `youden` takes none.
TARGET_RULES = ("any_flag_rate", "flag_rate", "sensitivity", "specificity", "npv")
#: One limit for the flags of all findings; docs/decisions/0019 compares it with the other rules.
DEFAULT_RULE = "any_flag_rate=0.3"
_RULES = "youden, any_flag_rate=0.3, flag_rate=0.1, sensitivity=0.9, specificity=0.9 or npv=0.99"


def normalize_rule(rule: str) -> str:
    """Return a rule for operating points without blanks; raise ValueError if it is unknown or its target not valid."""
    name, equals, target = (part.strip() for part in rule.partition("="))
    try:
        is_valid = 0.0 < float(target) < 1.0 if name in TARGET_RULES else name == "youden" and not equals
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"use youden, or one of {', '.join(f'{known}=X' for known in TARGET_RULES)} with 0 < X < 1")
    return f"{name}{equals}{target}"


OperatingPoint = Annotated[str, AfterValidator(normalize_rule)]


class PrepareSettings(Settings):
    sizes: tuple[int, ...] = Field((224,), description="sides of the prepared images, pixels")
    aspect: Aspect = Field("stretch", description="for images that are not square: stretch, pad with black, or crop")
    interpolation: Interpolation = Field("area", description="area averages when shrinking, against aliasing")
    rows_per_shard: int = Field(256, ge=1, le=100_000, description="images per shard; a kill loses up to one per task")
    decode_timeout_s: float = Field(
        60.0, gt=0.0, le=86_400, description="a file that takes longer gets the error code decode_timeout"
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
    "ResNet50",
    "ResNet50V1.5",
    "ResNet50V2",
    "DenseNet121",
    "DenseNet169",
    "DenseNet201",
    "EfficientNetV2B0",
    "MobileNetV3Small",
    "EfficientNetV2S",
    "ConvNeXtTiny",
    "TinyCNN",
]


class TrainSettings(Settings):
    """One training run. The fields are flat, so that a search can vary any of them."""

    backbone: Backbone = Field("DenseNet121", description="the model below the head; TinyCNN is for demos and tests")
    size: int | None = Field(None, ge=32, le=2048, description="which prepared size to use; null: the only one")
    findings: int | tuple[str, ...] = Field(14, description="14, 15 (with No_Finding), or a list of names")
    weights: str = Field(
        "imagenet", description="initial weights: imagenet, none, a bundle, or a Keras or PyTorch file"
    )
    pooling: Literal["avg", "max", "avgmax"] = Field("avg", description="of the last feature map; avgmax: both")
    dense: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field((), description="widths of additional dense layers")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="before each dense layer, including the output")
    sync_batchnorm: bool = Field(False, description="BatchNorm over the global batch, not each worker's share")
    loss: Literal["bce", "weighted_bce", "focal", "asymmetric"] = Field(
        "weighted_bce", description="weighted_bce: the positives and the negatives of a finding weigh the same in total"
    )
    balance: Literal["none", "findings"] = Field(
        "none", description="weighted_bce: findings gives all findings the same total weight, also rare ones"
    )
    focal_gamma: float = Field(2.0, ge=0.0, le=10.0, description="focal: down-weighting of easy images; 0 is bce")
    asymmetric_gamma_positive: float = Field(0.0, ge=0.0, le=10.0, description="asymmetric: focusing of positives")
    asymmetric_gamma_negative: float = Field(4.0, ge=0.0, le=10.0, description="asymmetric: focusing of negatives")
    asymmetric_margin: float = Field(0.05, ge=0.0, lt=1.0, description="asymmetric: ignore negatives below this value")
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5, description="replaces labels 0 and 1 by this and 1 minus this")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="sgd: with Nesterov momentum")
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="sgd only")
    weight_decay: float = Field(1e-4, ge=0.0, le=1.0, description="adamw only; decoupled from the gradient")
    learning_rate: float = Field(1e-4, gt=0.0, le=10.0, description="maximum, if the schedule changes it")
    schedule: Literal["constant", "cosine", "plateau"] = Field(
        "constant", description="cosine: falls to zero at the last step; plateau: falls when the AUROC stops rising"
    )
    layer_decay: float = Field(
        1.0, gt=0.0, le=1.0, description="factor of the learning rate per stage of the backbone below the head; 1: none"
    )
    warmup_epochs: float = Field(0.0, ge=0.0, description="epochs of linear warm-up; may be a fraction")
    plateau_patience: int = Field(2, ge=1, description="plateau: epochs without a better AUROC before a fall")
    plateau_factor: float = Field(0.1, gt=0.0, lt=1.0, description="plateau: factor of each fall")
    frozen_epochs: int = Field(0, ge=0, description="first epochs that train only the head (transfer learning)")
    frozen_learning_rate: float | None = Field(
        None, gt=0.0, le=10.0, description="constant learning rate of the frozen epochs; null: learning_rate"
    )
    clip_norm: float | None = Field(None, gt=0.0, description="maximum norm of the global batch's gradient; null: none")
    ema: float | None = Field(
        None, gt=0.0, lt=1.0, description="momentum of averaged weights, to validate and export; null: no average"
    )
    batchnorm_images: int = Field(
        0, ge=0, description="training images to estimate BatchNorm's statistics on before each validation; 0: off"
    )
    precision: Literal["auto", "float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "auto", description="auto: float32 on CPUs, mixed on GPUs (bfloat16 if supported)"
    )
    xla: bool = Field(False, description="compile each worker's step with XLA; start-up takes longer")
    deterministic: bool | None = Field(
        None, description="bit-identical results on every run; null: on CPUs without xla, where it costs little"
    )
    batch_size: int = Field(
        32, ge=1, le=65536, description="images per forward pass, over all workers; BatchNorm's batch"
    )
    accumulate: int = Field(
        1, ge=1, le=1024, description="batches whose gradients are summed for one step, as a batch of their total size"
    )
    epochs: int = Field(10, ge=1, le=100_000, description="passes over the training images")
    steps_per_epoch: int | None = Field(None, ge=1, description="null: one pass over the training images")
    patience: int | None = Field(None, ge=1, description="stop after this many epochs without a better AUROC")
    checkpoint_steps: int | None = Field(None, ge=1, description="steps between checkpoints in an epoch; null: none")
    flip: bool = Field(False, description="random left-right flips; off, because a mirrored chest shows situs inversus")
    rotation: float = Field(0.0, ge=0.0, le=45.0, description="maximum random rotation to either side, degrees")
    shift: float = Field(0.04, ge=0.0, le=0.5, description="maximum random shift, fraction of the side")
    zoom: float = Field(0.0, ge=0.0, le=0.5, description="random zoom in the range 1 +- this")
    shear: float = Field(0.0, ge=0.0, le=20.0, description="maximum random horizontal shear to either side, degrees")
    crop: float = Field(
        0.0, ge=0.0, le=0.9, description="random resized crop: the largest share of the area that is cut off"
    )
    contrast: float = Field(0.1, ge=0.0, le=0.9, description="random contrast in the range 1 +- this")
    intensity: int = Field(
        0, ge=0, le=8, description="random changes of gray values per image (RandAugment), of eight kinds; 0: none"
    )
    intensity_strength: float = Field(0.5, gt=0.0, le=1.0, description="intensity: strength of the changes")
    erase: float = Field(
        0.0, ge=0.0, le=0.5, description="random erasing in half of the images: the largest share of the area"
    )
    mixup: float = Field(
        0.0, ge=0.0, le=10.0, description="MixUp of pairs of images: alpha of the share's Beta distribution; 0: off"
    )
    calibration: Literal["platt", "temperature"] = Field(
        "platt", description="platt: slope and intercept; temperature: slope only"
    )
    operating_point: OperatingPoint = Field(
        DEFAULT_RULE, description=f"rule for flags: {_RULES}; the number is an example"
    )
    min_positives: int = Field(5, ge=2, description="minimum validation positives to calibrate a finding")
    seed: int = Field(0, ge=0, lt=2**31, description="of initial weights, image order, dropout and augmentation")
    workers: int = Field(1, ge=1, description="training processes; --workers N sets it; 2-8: as many as fit")
    min_workers: int | None = Field(
        None, ge=1, description="train with fewer workers too; null: no; workers=2-8 sets it"
    )
    cpus_per_worker: int | None = Field(None, ge=1, description="null: divide all CPUs among the workers")
    gpus_per_worker: float = Field(1.0, gt=0.0, le=1.0, description="with --gpu; below 1, one-worker runs share a GPU")
    max_failures: int = Field(
        2, ge=-1, description="maximum restarts after failures, not after lost spot machines; -1: unlimited"
    )
    step_timeout_s: float | None = Field(
        900.0, ge=1.0, description="restart workers that wait this long for a step, which another holds up; null: never"
    )

    @field_validator("findings", mode="before")
    @classmethod
    def _findings(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = int(value) if value.isdecimal() else [name for name in value.split(",") if name]
        try:
            labels.resolve(value)
        except ConfigError as error:
            # pydantic adds the field's name to a ValueError.
            raise ValueError(str(error).removeprefix("findings: ")) from None
        return value

    @model_validator(mode="before")
    @classmethod
    def _worker_range(cls, values: Any) -> Any:
        text = str(values.get("workers", "")) if isinstance(values, dict) else ""
        if found := _RANGE.fullmatch(text):
            return {**values, "min_workers": int(found[1]), "workers": int(found[2])}
        if re.match(r"\d+-", text):
            raise ValueError(f"workers: {text}: must be a range such as 2-8")
        return values

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"workers: {self.min_workers}-{self.workers}: must be a range such as 2-8")
        if self.xla and self.deterministic:
            raise ValueError(
                "deterministic: XLA has no deterministic gradient of max pooling; set xla or deterministic to false"
            )
        if self.xla and self.sync_batchnorm:
            raise ValueError("sync_batchnorm: XLA cannot exchange statistics; set xla or sync_batchnorm to false")
        if self.gpus_per_worker < 1 and self.workers > 1:
            raise ValueError("gpus_per_worker: NCCL needs a whole GPU per worker; set it to 1, or workers to 1")
        return self

    def list_unused(self) -> list[str]:
        """Return the changed settings that have no effect with the other settings, each with the reason."""
        stage = self.epochs - self.frozen_epochs
        asymmetric = ("asymmetric_gamma_positive", "asymmetric_gamma_negative", "asymmetric_margin")
        needs = [
            (self.optimizer == "sgd", "optimizer is not sgd", ("momentum",)),
            (self.optimizer == "adamw", "optimizer is not adamw", ("weight_decay",)),
            (self.loss == "weighted_bce", "loss is not weighted_bce", ("balance",)),
            (self.loss == "focal", "loss is not focal", ("focal_gamma",)),
            (self.loss == "asymmetric", "loss is not asymmetric", asymmetric),
            (self.schedule == "plateau", "schedule is not plateau", ("plateau_patience", "plateau_factor")),
            (self.frozen_epochs > 0, "frozen_epochs is 0", ("frozen_learning_rate",)),
            (stage > 0 or self.frozen_learning_rate is None, "all epochs are frozen", ("learning_rate",)),
            (stage > 0, "all epochs are frozen", ("warmup_epochs", "layer_decay", "batchnorm_images")),
            (self.backbone != "ConvNeXtTiny", "ConvNeXtTiny has no BatchNorm", ("batchnorm_images", "sync_batchnorm")),
            (self.intensity > 0, "intensity is 0", ("intensity_strength",)),
        ]
        return [
            f"{name} ({reason})"
            for is_used, reason, names in needs
            for name in names
            if not is_used and getattr(self, name) != type(self).model_fields[name].default
        ]

    @property
    def images_per_step(self) -> int:
        """The images of one step of the optimizer, over all workers."""
        return self.batch_size * self.accumulate

    def finding_names(self) -> tuple[str, ...]:
        return labels.resolve(self.findings)


Objective = Literal["auroc", "images_per_second", "calibration_error"]


class TuneSettings(Settings):
    """A search. [train] holds what all trials share, [tune.space] what differs."""

    trials: int = Field(20, ge=1, le=100_000, description="total, including earlier runs; --trials N sets it")
    space: dict[str, Any] = Field({}, description="searched settings; empty: the default space, see docs/tuning.md")
    enqueue: tuple[dict[str, Any], ...] = Field((), description="known good settings, to try first, in this order")
    known: bool = Field(True, description="try known good settings of ResNet50 and DenseNet121 first, if searched")
    sampler: Literal["tpe", "random", "cmaes"] = Field(
        "tpe", description="cmaes: only numbers, one backbone, no conditional settings; needs the extra cmaes"
    )
    startup_trials: int = Field(10, ge=0, description="tpe: number of random trials at the start")
    scheduler: Literal["asha", "halving", "median", "none"] = Field(
        "asha", description="early stopping: asha and halving at rungs, median below the other trials' median"
    )
    grace_epochs: int = Field(1, ge=1, description="minimum epochs of every trial")
    reduction_factor: int = Field(3, ge=2, le=100, description="asha, halving: one in this many continues at a rung")
    objectives: tuple[Objective, ...] = Field(
        ("auroc",), description="auroc, alone or with calibration_error, images_per_second of the exported model"
    )
    concurrent: int | None = Field(
        None, ge=1, description="trials that train at the same time; null: as many as fit GPUs, or one per node on CPUs"
    )
    ahead: int = Field(1, ge=0, le=100, description="trials that start before resources are free, to shorten the wait")
    max_failures: int = Field(1, ge=0, description="maximum restarts of a trial whose process or node was lost")
    keep: Literal["best", "all"] = Field(
        "best", description="checkpoints to keep after the search: those that may become the bundle, or all"
    )
    confirm: int = Field(
        0,
        ge=0,
        le=20,
        description="pairs of extra trainings of the two best backbones; even, at least 6; --confirm N sets it",
    )
    storage: str | None = Field(None, description="Optuna storage, such as postgresql://...; null: STUDY/study.db")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the sampler")

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "auroc" not in value or len(set(value)) != len(value):
            raise ValueError("must contain auroc, and no name twice")
        return ("auroc", *(name for name in value if name != "auroc"))

    @field_validator("confirm")
    @classmethod
    def _confirm(cls, value: int) -> int:
        if value and (value < 6 or value % 2):
            raise ValueError("must be 0, or an even number from 6: fewer pairs cannot reach p < 0.05")
        return value


Precision = Literal["auto", "fp32", "bf16", "int8"]
HeatMapMethod = Literal["gradcam", "hirescam", "occlusion"]
#: Findings of `--heatmaps K` that are drawn over the image, from few to many.
HeatMapImages = Literal["none", "flagged", "all"]


class ScoreSettings(Settings):
    precision: Precision = Field(
        "auto", description="auto: bf16 if the CPU supports it and the bundle was validated in it, else fp32"
    )
    batch_size: int | None = Field(
        None, ge=1, le=4096, description="images per forward pass; null: 4 on CPUs, whose caches hold them, 64 on GPUs"
    )
    rows_per_file: int = Field(
        256, ge=1, le=1_000_000, description="rows per output file; a kill loses up to 2 files per actor, 4 with --gpu"
    )
    cpus_per_actor: int | None = Field(None, ge=1, description="null: up to 4, and at most a node's")
    decode: Literal["auto", "inside", "apart"] = Field(
        "auto", description="inside: in the model's actors; apart: in tasks of one CPU; auto: apart only with --gpu"
    )
    decode_timeout_s: float = Field(
        60.0, gt=0.0, le=86_400, description="a file that takes longer gets the error code decode_timeout"
    )
    jit_compile: bool = Field(
        False, description="with --gpu: compile the model with XLA when an actor starts; see docs/scoring.md"
    )
    tta: int = Field(
        1,
        ge=1,
        le=32,
        description="number of slightly shifted and scaled copies of each image to average; 1: no average",
    )
    max_error_rate: float = Field(0.5, ge=0.0, le=1.0, description="exit with 3 if a larger share of images fails")
    max_pixels: int = Field(100_000_000, ge=1, description="refuse larger images before decoding")
    pseudonym_key: str | None = Field(
        None, description="file with a secret key that turns ids from DICOM tags into keyed hashes; null: keep the ids"
    )
    select: Literal["all", "frontal"] = Field(
        "all",
        description="frontal: one frontal image per study, by manifest, listing or DICOM header; see docs/scoring.md",
    )
    weights: dict[str, Annotated[float, Field(ge=0.0, le=10.0)]] = Field(
        {}, description="of findings in `priority`, 0 to 10, such as `{Pneumothorax = 3}`; 1 for other findings"
    )
    heatmap_method: HeatMapMethod = Field(
        "gradcam", description="method of `--heatmaps K`; occlusion is slow, and works for every bundle"
    )
    heatmap_pixels: int = Field(512, ge=64, le=2048, description="longer side of the images of `--heatmaps K`, pixels")
    heatmap_images: HeatMapImages = Field(
        "flagged",
        description="heat maps that are also drawn as images; flagged: of flagged findings, or of the top finding if "
        "the model has no operating points",
    )

    @field_validator("weights")
    @classmethod
    def _weights(cls, value: dict[str, float]) -> dict[str, float]:
        weights: dict[str, float] = {}
        for name, weight in value.items():
            finding = labels.canonicalize(name)
            if finding not in labels.FINDINGS:
                raise ValueError(f"{name!r} is not a finding{labels.suggest(name, labels.FINDINGS)}")
            if finding in weights:
                raise ValueError(f"{finding} is named twice")
            weights[finding] = weight
        return weights

    def check_device(self, *, use_gpu: bool) -> None:
        """Raise ConfigError for a setting that has no effect on the device, or does not work there."""
        if self.jit_compile and not use_gpu:
            raise ConfigError("jit_compile: compiles models on GPUs only; remove it, or add --gpu")
        if self.decode == "inside" and use_gpu:
            raise ConfigError("decode=inside: cannot be combined with --gpu; remove one of them")

    def __hash__(self) -> int:  # a dict has none
        return hash(self.model_dump_json())


class QuantizeSettings(Settings):
    images: int = Field(300, ge=32, le=100_000, description="number of training images for the ranges of int8")
    check_images: int = Field(2000, ge=32, le=1_000_000, description="number of validation images for the drift check")
    max_p99_drift: float = Field(0.03, gt=0.0, lt=1.0, description="maximum change of 99 % of probabilities from fp32")
    max_auroc_fall: float = Field(0.005, gt=0.0, lt=1.0, description="maximum fall of the macro AUROC")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the choice of images")


class RecalibrateSettings(Settings):
    calibration: Literal["platt", "temperature"] | None = Field(
        None, description="platt: slope and intercept; temperature: slope only; null: the bundle's, else platt"
    )
    operating_point: OperatingPoint | None = Field(
        None, description=f"rule for flags: {_RULES}; null: the bundle's, else {DEFAULT_RULE}"
    )
    min_positives: int = Field(5, ge=2, description="minimum positives, and negatives, to fit a finding")


class ProbeSettings(Settings):
    findings: tuple[str, ...] | None = Field(None, description="findings of the head; null: all with enough labels")
    strengths: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.001, 0.01, 0.1, 1.0),
        min_length=1,
        description="candidates for scikit-learn's C; large: weak penalty",
    )
    folds: int = Field(5, ge=2, le=20, description="folds of patients, without images of both splits train and val")
    selection_images: int = Field(20000, ge=100, description="images that choose the strength; more take longer")
    calibration: Literal["platt", "temperature"] = Field("platt", description="platt: slope and intercept")
    operating_point: OperatingPoint = Field(DEFAULT_RULE, description=f"rule for flags: {_RULES}")
    min_positives: int = Field(5, ge=2, description="minimum positives, and negatives, of a finding")
    seed: int = Field(0, ge=0, description="of the sample of patients that chooses the strength")


class Config(Settings):
    """All sections."""

    ray: RaySettings = RaySettings()
    pacs: PacsSettings = PacsSettings()
    prepare: PrepareSettings = PrepareSettings()
    train: TrainSettings = TrainSettings()
    tune: TuneSettings = TuneSettings()
    score: ScoreSettings = ScoreSettings()
    quantize: QuantizeSettings = QuantizeSettings()
    recalibrate: RecalibrateSettings = RecalibrateSettings()
    probe: ProbeSettings = ProbeSettings()

    @model_validator(mode="before")
    @classmethod
    def _tables(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for name, section in data.items():
                if name in cls.model_fields and not isinstance(section, (Mapping, Settings)):
                    raise ValueError(f"{name} is a section: write [{name}] with its keys below")
        return data


def build(kind: type[_T], values: Mapping[str, Any], *, where: str = "") -> _T:
    """Return validated settings of one kind; the ConfigError names each wrong key, its value and its rule."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise make_error((f"{where}: " if where else "") + _describe_errors(kind, error)) from None


def load(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    section: str = "train",
    start: Mapping[str, Mapping[str, Any]] | None = None,
) -> Config:
    """Read a TOML file, if any, and apply `key=value` overrides.

    Args:
        overrides: Texts such as `epochs=3`, `ray.num_cpus=2` or `dense=[256]`; a value is TOML or a bare word.
        section: The section of an override whose key has no dot.
        start: Values by section, to start from if there is no file.
    """
    data: dict[str, Any] = {name: dict(values) for name, values in (start or {}).items()}
    if path is not None:
        try:
            data = read_toml(path)
        except OSError as error:
            raise make_error(f"--config {path}: {error.strerror}; name an existing TOML file") from None
        except ValueError as error:
            raise make_error(f"--config {path}: not TOML: {error}") from None
        build(Config, data, where=f"--config {path}")
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise make_error(f"--set {text}: write it as key=value")
        name, _, field = key.strip().rpartition(".")
        name = name or section
        if not isinstance(data.setdefault(name, {}), dict):
            raise make_error(f"--set {text}: {name} is not a section")
        data[name][field] = _parse_value(value.strip())
        build(Config, data, where=f"--set {text}")
    return build(Config, data)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file, with or without a byte-order mark.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not TOML; the text gives the reason.
    """
    data = Path(path).read_bytes()
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError("encoded in UTF-16; save it as UTF-8")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse_value(text: str) -> Any:
    """Return a TOML value, or the text itself if it is not TOML."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except (ValueError, RecursionError):  # no TOML, a number of thousands of digits, or deeply nested brackets
        return None if text in ("null", "None") else text


def make_error(text: str) -> ConfigError:
    """Return an error of one line, even if the text quotes several lines of user input."""
    return ConfigError(one_line(text))


def shorten_repr(value: Any) -> str:
    """Return the `repr` of a value, at most 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else text[:97] + "..."


def _describe_errors(kind: type[Settings], error: ValidationError) -> str:
    parts = []
    for item in error.errors():
        place = ".".join(str(step) for step in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _list_fields(kind, item["loc"][:-1])
            parts.append(f"unknown key {place!r}{labels.suggest(str(item['loc'][-1]), known)}")
        else:
            given = "" if isinstance(item["input"], (Mapping, Settings)) else f" (got {shorten_repr(item['input'])})"
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "literal_error":
                given += labels.suggest(str(item["input"]), re.findall(r"'([^']*)'", item["ctx"]["expected"]))
            parts.append(f"{place}: {message}{given}" if place else message)
    return "; ".join(parts)


def _list_fields(kind: type[Settings], path: Sequence[Any]) -> list[str]:
    fields = kind.model_fields
    for step in path:
        inner = fields[step].annotation if step in fields else None
        if not (isinstance(inner, type) and issubclass(inner, Settings)):
            return []
        fields = inner.model_fields
    return list(fields)
