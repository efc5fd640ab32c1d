"""Write a bundle of a trained or imported model, or a changed copy of a bundle. `bundle` describes the format."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ray_cxr.config import InputSpec
from ray_cxr.data import identity
from ray_cxr.errors import OutputError
from ray_cxr.models import bundle as bundles
from ray_cxr.models import exports
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.bundle import WEIGHTS, Bundle, is_written, load_bundle
from ray_cxr.models.card import model_card
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.files import hash_file

if TYPE_CHECKING:
    from ray_cxr.models.keras_setup import keras

#: Entries of bundle.json that depend on the weights alone.
_EXPORTED = ("runtimes", "runtimes_refused", "quality")
#: Entries of bundle.json that are fields of `BundleContent`.
_FIELDS = (*bundles.TABLES, "provenance")


@dataclass(frozen=True)
class BundleContent:
    """The content of a bundle without its weights and what `exports` derives from them."""

    architecture: Architecture
    input_spec: InputSpec
    calibration: Mapping[str, Any]
    operating_points: Mapping[str, Any]
    expected_flag_rates: Mapping[str, float | None]
    provenance: Mapping[str, Any]
    config_toml: str
    curves: Sequence[Mapping[str, Any]]
    split: pa.Table  # of `SPLIT_SCHEMA`
    operating_alternatives: Mapping[str, Mapping[str, Any]] | None = None  # points by other rules
    rule_notes: Mapping[str, str | None] | None = None  # why a finding has no calibration or no operating point

    def info(self) -> dict[str, Any]:
        """Return the entries of bundle.json, without those of `exports`."""
        fields = {name: getattr(self, name) for name in _FIELDS}
        return {
            "format": bundles.FORMAT,
            "backbone": self.architecture.backbone,
            "findings": list(self.architecture.findings),
            "architecture": self.architecture.model_dump(mode="json"),
            "input_spec": self.input_spec.model_dump(mode="json"),
            **copy.deepcopy({name: value for name, value in fields.items() if value is not None}),
        }


def write_bundle(
    out: str | Path,
    content: BundleContent,
    weights: Path | keras.Model | exports.Graph | None,
    *,
    images: exports.SampleImages | None = None,
    source: Bundle | None = None,
    add: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Bundle:
    """Write a bundle under a temporary name and rename it, so that `out` is complete or absent.

    Args:
        weights: a `.weights.h5` file to copy, a model whose weights are saved, or a graph; None with a `source`.
        images: images for the drift of each precision and for the quality flags.
        source: a bundle whose weights, graphs, golden images and quality flags are copied.
        add: a function that adds files of `OPTIONAL_FILES` to the folder and entries to those of bundle.json.

    Raises:
        OutputError: `out` exists; bundles are never changed.
    """
    out = remote.to_path(out)
    refuse_existing(out)
    with atomic.new_folder(out, bundles.SUMS) as folder:
        info = content.info()
        if source is not None:
            info |= {name: source.info[name] for name in _EXPORTED if name in source.info}
            for name in source.files & set(bundles.OPTIONAL_FILES):
                shutil.copyfile(source.path / name, folder / name)
        elif isinstance(weights, exports.Graph):
            info |= exports.export_graph(folder, weights, content.input_spec)
        else:
            from ray_cxr.models import classifier

            if isinstance(weights, Path):
                shutil.copyfile(weights, folder / WEIGHTS)
            else:
                assert weights is not None
                weights.save_weights(str(folder / WEIGHTS))
            # Export the weights as written, in float32: the given model may have another dtype policy.
            model = classifier.load_model(content.architecture, folder / WEIGHTS)
            info |= exports.export(folder, model, content.architecture, content.input_spec, images)
        if add is not None:
            add(folder, info)
        atomic.write_json(folder / "bundle.json", info)
        atomic.write_json(folder / "curves.json", list(content.curves))
        atomic.write_text(folder / "config.toml", content.config_toml)
        atomic.write_parquet(content.split.cast(bundles.SPLIT_SCHEMA), folder / "split.parquet")
        atomic.write_text(folder / "MODEL_CARD.md", model_card(info, content.curves))
        files = [*bundles.FILES, *(name for name in bundles.OPTIONAL_FILES if (folder / name).exists())]
        atomic.write_text(folder / bundles.SUMS, "".join(f"{hash_file(folder / name)}  {name}\n" for name in files))
        for name in (*files, bundles.SUMS):
            (folder / name).chmod(0o444)
    return load_bundle(out)


def refuse_existing(out: Path) -> None:
    """Refuse an `out` that exists; bundles are never changed."""
    if is_written(out):
        raise OutputError(f"{out}: exists already, and bundles are never changed; choose another folder")


def derive_bundle(
    source: Bundle, out: str | Path, *, add: Callable[[Path, dict[str, Any]], None] | None = None, **changes: Any
) -> Bundle:
    """Write a copy of a bundle with the same weights, in which some fields of `BundleContent` differ."""
    fields: dict[str, Any] = {name: source.info.get(name) for name in _FIELDS}
    content = BundleContent(
        architecture=source.architecture,
        input_spec=source.input_spec,
        config_toml=(source.path / "config.toml").read_text(encoding="utf-8"),
        curves=json.loads((source.path / "curves.json").read_text(encoding="utf-8")),
        split=identity.read_split(source.path, bundles.SPLIT_SCHEMA),
        **fields,
    )
    return write_bundle(out, replace(content, **changes), None, source=source, add=add)


def find_finished(out: Path, step: str, inputs: Mapping[str, Any], names: Mapping[str, str]) -> Bundle | None:
    """Return the bundle at `out` if an earlier run wrote it from the same inputs; None if `out` does not exist.

    Args:
        step: the key of the inputs in the provenance, `quantized` or `recalibrated`.
        names: for error messages, the name of each input.

    Raises:
        OutputError: `out` is not a bundle, or was made from other inputs.
    """
    if not is_written(out):
        return None
    if not (out / "bundle.json").exists():
        raise OutputError(f"{out}: exists already and is not a bundle; choose another --out")
    bundle = load_bundle(out)
    recorded = bundle.info["provenance"].get(step)
    if not isinstance(recorded, dict):
        raise OutputError(f"{out}: exists already and is a bundle that was not {step}; choose another --out")
    changed = [names[name] for name, value in inputs.items() if recorded.get(name) != value]
    if changed:
        raise OutputError(f"{out}: was made from another {', another '.join(changed)}; choose another --out")
    return bundle
