"""`import-weights`: turn third-party weights, such as a CheXNet file, into a bundle."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tomli_w
from pydantic import ConfigDict

from ray_cxr import labels
from ray_cxr.config import Aspect, InputSpec, Interpolation, Settings, TrainSettings, build
from ray_cxr.errors import ConfigError
from ray_cxr.models import exports, graphs, torch_files, torch_weights
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import SPLIT_SCHEMA, Bundle
from ray_cxr.models.bundle_writer import BundleContent, refuse_existing, write_bundle
from ray_cxr.storage import remote, run_folder
from ray_cxr.storage.files import hash_file
from ray_cxr.versions import versions

if TYPE_CHECKING:
    from ray_cxr.models.keras_setup import keras

#: An output of a third-party model that is left out.
DROPPED = "-"
#: (mean, standard deviation) per channel, of gray values from 0 to 1.
_IMAGENET = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
#: torchxrayvision maps gray from 0 to 255 to -1024 to 1024.
_TORCHXRAYVISION = (2048.0 / 255.0, -1024.0)
#: Saves the weights of a file of torchxrayvision with what `import-weights` must know of them; an error is one line.
_SAVE_TORCHXRAYVISION = """\
import json, torch, torchxrayvision as xrv, safetensors.torch as st;
m = torch.load({file!r}, map_location="cpu", weights_only=False);
known = next((k for k in xrv.models.model_urls.values() if k["weights_url"].endswith({ending!r})), {{}});
outputs = known.get("labels") or getattr(m, "pathologies", m.targets);
points = known.get("op_threshs", getattr(m, "op_threshs", None));
about = {{"source": "torchxrayvision", "outputs": outputs, "size": 224}};
about["op_threshs"] = None if points is None else [float(x) for x in points];
print("the outputs must be those that the file was trained for:", outputs);
st.save_model(m, "xrv.safetensors", {{k: json.dumps(v) for k, v in about.items()}})"""


_NO_FINDINGS = (
    "--findings: name the outputs in their order, comma-separated (or 14, 15 for alphabetical order; - for an output "
    "to leave out); a wrong order cannot be detected later"
)


@dataclass(frozen=True)
class ImportOptions:
    """Facts that a file of weights lacks. None: as the file's metadata says, else the default in brackets."""

    outputs: tuple[str, ...] | None = None  # findings or `-`, in the file's order; no default
    normalization: str | None = None  # keras, imagenet, torchxrayvision or MEAN,STD (keras; imagenet for PyTorch files)
    size: int | None = None  # side of the input, pixels (224)
    aspect: Aspect | None = None  # (stretch)
    interpolation: Interpolation = "area"
    layout: graphs.Layout | None = None  # of an ONNX file's input; no default
    logits: bool = False  # whether an ONNX file's outputs need a sigmoid


def parse_findings(text: str) -> tuple[str, ...]:
    """Parse `14`, `15`, or comma-separated names in the order of the file's outputs; `-` is an output to leave out."""
    if text.strip().isdigit():
        return labels.resolve(int(text))
    return _check_outputs([name.strip() for name in text.split(",") if name.strip()])


def _check_outputs(names: Sequence[str]) -> tuple[str, ...]:
    """Return canonical names, and `-` where it is given."""
    kept = iter(labels.parse_order([name for name in names if name != DROPPED]))
    return tuple(DROPPED if name == DROPPED else next(kept) for name in names)


def import_weights(path: str | Path, out: str | Path, *, backbone: str, options: ImportOptions | None = None) -> Bundle:
    """Make a bundle of a file with the weights of a backbone, pooling and one dense layer.

    Reads Keras files (`.h5`, `.weights.h5`, `.keras`) of every backbone, and PyTorch files (`.pth`, `.pt`, `.pth.tar`,
    `.bin`, `.safetensors`) in torchvision's layout of DenseNet121, 169 and 201 and ResNet50. A ResNet50 of a PyTorch
    file becomes the backbone `ResNet50V1.5`. Only numbers are read; no code of the file is executed. An ONNX file
    (`.onnx`) can have any layers; its bundle holds only the graph (see `graphs`).

    Args:
        backbone: name of the backbone; None for an ONNX file.

    The bundle has no calibration, so the columns `c_` of its score tables are null; and no operating points, unless
    the file's metadata has them (see docs/models.md).

    Raises:
        ConfigError: the file does not fit the backbone or the outputs, is damaged, or could run code.
    """
    path, out, options = Path(path), remote.to_path(out), options or ImportOptions()
    _check_options(path, backbone, options)
    if not path.is_file():
        raise ConfigError(f"{path}: no such weights file")
    refuse_existing(out)
    with run_folder.lock_bundle(out, "import-weights"):
        source = _read_source(path, backbone, options)
        outputs = options.outputs or _read_outputs(source.facts)
        dropped = _list_dropped(outputs, source.facts)
        kept = [j for j, name in enumerate(outputs) if name != DROPPED]
        architecture = build(
            Architecture,
            {
                "backbone": source.backbone,
                "size": source.size or options.size or source.facts.size or 224,
                "findings": tuple(outputs[j] for j in kept),
                "normalization": None if source.graph else _find_normalization(options, source),
            },
            where="import-weights",
        )
        spec = build(
            InputSpec,
            {
                "size": architecture.size,
                "aspect": options.aspect or ("crop" if source.facts.source == "torchxrayvision" else "stretch"),
                "interpolation": options.interpolation,
            },
            where="import-weights",
        )
        if source.graph is not None:
            model = exports.Graph(graphs.keep_outputs(source.graph, kept), str(path))
        else:
            model = _build_model(architecture, source, path, len(outputs), kept)
        points = _read_points(source.facts, outputs, path)
        return write_bundle(out, _describe(architecture, spec, path, points, dropped), model)


class _Facts(Settings):
    """Facts about the model in the metadata of a `.safetensors` file, as JSON texts."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)

    source: Literal["torchxrayvision"] | None = None
    outputs: tuple[str, ...] | None = None
    op_threshs: tuple[float, ...] | None = None  # NaN for an output without one
    size: int | None = None


def _check_options(path: Path, backbone: str | None, options: ImportOptions) -> None:
    """Raise ConfigError if an option is missing or has no effect on a file of this kind."""
    if path.suffix.lower() != ".onnx":
        if backbone is None:
            raise ConfigError("--backbone: name it; only ONNX files have none")
        if options.layout is not None or options.logits:
            raise ConfigError("--input-layout and --logits: are for ONNX files only")
    elif backbone is not None:
        raise ConfigError(f"--backbone {backbone}: an ONNX file has its own layers; omit --backbone")
    elif options.layout is None:
        raise ConfigError("--input-layout: name it, nchw (as PyTorch exports) or nhwc (as Keras does)")
    elif options.normalization is None:
        raise ConfigError(
            "--normalization: name what the model takes: imagenet, torchxrayvision, none (gray from 0 to 255), or "
            "MEAN,STD of gray values from 0 to 1"
        )
    if options.outputs is None and path.suffix.lower() != ".safetensors":
        raise ConfigError(_NO_FINDINGS)


@dataclass(frozen=True)
class _Source:
    """What is known of a file before its findings are."""

    backbone: str
    weights: torch_weights.TorchWeights | None = None  # of a PyTorch file
    facts: _Facts = field(default_factory=_Facts)
    graph: Any = None  # of an ONNX file
    size: int | None = None  # of its input, pixels


def _read_source(path: Path, backbone: str | None, options: ImportOptions) -> _Source:
    if path.suffix.lower() == ".onnx":
        assert options.layout is not None
        assert options.normalization is not None
        assert options.outputs is not None
        rule = parse_normalization(options.normalization, 3, onnx=True)
        graph, size = graphs.read_onnx(
            path,
            layout=options.layout,
            normalization=rule,
            size=options.size,
            logits=options.logits,
            n_outputs=len(options.outputs),
        )
        return _Source("graph", graph=graph, size=size)
    assert backbone is not None
    return _read_torch(path, backbone) if path.suffix.lower() in torch_files.SUFFIXES else _Source(backbone)


def _read_torch(path: Path, backbone: str) -> _Source:
    name = {"ResNet50": "ResNet50V1.5"}.get(backbone, backbone)
    try:
        read = torch_files.read_torch_file(path)
    except torch_files.WholeModelError as error:
        if not f"{error.module}.".startswith("torchxrayvision."):
            raise
        recipe = _SAVE_TORCHXRAYVISION.format(file=str(path), ending=f"/{path.name}")
        raise ConfigError(f"{error}; or run this in Python with torchxrayvision: {recipe}") from None
    try:
        known_facts = {key: json.loads(text) for key, text in read.metadata.items() if key in _Facts.model_fields}
    except ValueError:
        raise ConfigError(f"{path}: an entry of its metadata is not JSON") from None
    return _Source(
        name,
        torch_weights.convert_weights(read.arrays, name, str(path)),
        build(_Facts, known_facts, where=f"{path}, metadata"),
    )


def _read_outputs(facts: _Facts) -> tuple[str, ...]:
    """Return the outputs that the file names, with `-` for those that are no findings of ours."""
    if facts.outputs is None:
        raise ConfigError(_NO_FINDINGS)
    return _check_outputs([labels.canonicalize(name) or DROPPED for name in facts.outputs])


def _list_dropped(outputs: Sequence[str], facts: _Facts) -> dict[int, str]:
    """Return the outputs that are left out: their numbers from 1, and the file's names for them, empty if unknown."""
    names = facts.outputs or ()
    known = names if len(names) == len(outputs) else ("",) * len(outputs)
    return {j + 1: known[j] for j, name in enumerate(outputs) if name == DROPPED}


def _read_points(facts: _Facts, outputs: Sequence[str], path: Path) -> dict[str, dict[str, Any] | None]:
    """Return the operating points that the file names; a threshold of NaN, or outside 0 to 1, is none."""
    thresholds = facts.op_threshs or (math.nan,) * len(outputs)
    if len(thresholds) != len(outputs):
        raise ConfigError(f"{path}: its metadata has {len(thresholds)} op_threshs for {len(outputs)} outputs")
    return {
        name: {"threshold": float(np.float32(value)), "rule": "of the imported file"} if 0.0 < value < 1.0 else None
        for name, value in zip(outputs, thresholds, strict=True)
        if name != DROPPED
    }


def _find_normalization(options: ImportOptions, source: _Source) -> tuple[tuple[float, float], ...] | None:
    """Return (scale, offset) per channel for gray from 0 to 255; None for the backbone's own."""
    channels = source.weights.channels if source.weights else 3
    text = options.normalization or source.facts.source
    if text is None:
        if channels == 1:
            raise ConfigError(
                "--normalization: name it, because the model takes one channel: torchxrayvision, or MEAN,STD of gray "
                "values from 0 to 1"
            )
        text = "imagenet" if source.weights else "keras"
    return None if text == "keras" else parse_normalization(text, channels)


def parse_normalization(text: str, channels: int, *, onnx: bool = False) -> tuple[tuple[float, float], ...]:
    """Return (scale, offset) per channel for gray from 0 to 255; `onnx`: errors do not name rules of a backbone."""
    if text == "none":
        return ((1.0, 0.0),) * channels
    if text == "torchxrayvision":
        return (_TORCHXRAYVISION,) * channels
    if text == "imagenet":
        if channels != 3:
            raise ConfigError("--normalization imagenet: has three channels, the model one; name MEAN,STD")
        return tuple((1.0 / (255.0 * std), -mean / std) for mean, std in _IMAGENET)
    try:
        mean, std = (float(part) for part in text.split(","))
    except ValueError:
        mean, std = math.nan, math.nan
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        names = "imagenet, torchxrayvision, none" if onnx else "imagenet, torchxrayvision, keras, none"
        raise ConfigError(
            f"--normalization {text!r}: use {names}, or MEAN,STD of gray values from 0 to 1, such as 0.5,0.25"
        )
    return ((1.0 / (255.0 * std), -mean / std),) * channels


def _build_model(
    architecture: Architecture, source: _Source, path: Path, n_outputs: int, kept: Sequence[int]
) -> keras.Model:
    from ray_cxr.models import classifier

    model = classifier.build(architecture)
    if source.weights is None:
        classifier.load_third_party_weights(model, path, n_outputs, kept)
    else:
        kernel, bias = source.weights.kernel, source.weights.bias
        classifier.set_weights(model, source.weights.layers, kernel, bias, path, n_outputs, kept)
    return model


def _describe(
    architecture: Architecture,
    spec: InputSpec,
    path: Path,
    points: dict[str, dict[str, Any] | None],
    dropped: Mapping[int, str],
) -> BundleContent:
    same: dict[str, Any] = {"size": architecture.size, "findings": architecture.findings}
    if architecture.backbone != "graph":
        same["backbone"] = architecture.backbone
    # Without the defaults, which did not make this model.
    settings = build(TrainSettings, same).model_dump(mode="json", include={*same})
    unknown = dict.fromkeys(architecture.findings)
    return BundleContent(
        architecture=architecture,
        input_spec=spec,
        calibration=unknown,
        operating_points=points,
        expected_flag_rates=unknown,
        provenance={
            "origin": f"imported from {path.name}; its training images are unknown",
            "initial_weights": f"the file {path.name}, SHA-256 {hash_file(path)}",
            "lineage": "unknown",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "split": {},
            "age_range": None,
            "settings": settings,
            "versions": versions(),
            **({"dropped_outputs": list(dropped), "dropped_names": list(dropped.values())} if dropped else {}),
        },
        config_toml=tomli_w.dumps({"train": settings}),
        curves=[],
        split=SPLIT_SCHEMA.empty_table(),
    )
