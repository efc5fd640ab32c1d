"""A bundle: a folder with all that scoring and reporting need of a trained model. Immutable, and only data.

bundle.json        format, architecture, findings in order, input spec, calibration, operating points, provenance;
                   may have operating_alternatives (points by other rules) and rule_notes (why a finding has none)
model.weights.h5   the weights alone; the network is built again from `architecture`
config.toml        the resolved settings, which `ray-cxr train --config` takes
curves.json        learning curves, one object per epoch
split.parquet      image_id, patient_id, split: what trained it and what chose it
MODEL_CARD.md      the same for people
openvino.xml, ...  the network for OpenVINO, golden images, quality flags: see `exports`; an older bundle has none
SHA256SUMS         a digest per file; its own SHA-256 is the bundle's digest
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ray_cxr.config import InputSpec, build
from ray_cxr.errors import BundleError, ConfigError, OutputError
from ray_cxr.evaluation.calibration import Calibration
from ray_cxr.evaluation.quality import QualityModel, judge
from ray_cxr.imaging.resize import resize
from ray_cxr.imaging.sandbox import Decoder, Failure
from ray_cxr.labels import LABELS
from ray_cxr.models import exports, predictions, runtime
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.exports import QUALITY
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.paths import file_name

if TYPE_CHECKING:
    import keras

FORMAT = 1
WEIGHTS = "model.weights.h5"
SUMS = "SHA256SUMS"
FILES = ("MODEL_CARD.md", "bundle.json", "config.toml", "curves.json", WEIGHTS, "split.parquet")
#: Entries of bundle.json that belong to the weights and not to how they are read.
_EXPORTED = ("runtimes", "runtimes_refused", "quality")
SPLIT_SCHEMA = pa.schema([("image_id", pa.string()), ("patient_id", pa.string()), ("split", pa.string())])
_SUM_LINE = re.compile(r"^([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9_.-]*)$")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        path: its folder, or that of its copies on this machine, see `remote.folder_here`.
        digest: SHA-256 over its contents, hex.
        architecture: the network.
        input_spec: how a radiograph becomes its input.
        info: `bundle.json` as read: calibration, operating_points, expected_flag_rates, provenance and the rest.
        files: names of what it holds.
        place: where it was opened, for people.
    """

    path: Path
    digest: str
    architecture: Architecture
    input_spec: InputSpec
    info: Mapping[str, Any] = field(repr=False)
    files: frozenset[str] = field(repr=False, default=frozenset())
    place: str = ""

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.architecture.findings

    @cached_property
    def rules(self) -> predictions.Rules:
        """How its probabilities become a score table's rows."""
        points = self.info["operating_points"]
        ages = self.info["provenance"].get("age_range")
        return predictions.Rules(
            findings=self.findings,
            calibrations={
                name: Calibration.from_dict(fitted) if fitted else None
                for name, fitted in self.info["calibration"].items()
            },
            thresholds={name: _threshold(point) if point else None for name, point in points.items()},
            age_range=(float(ages[0]), float(ages[1])) if ages else None,
            digest=self.digest,
        )

    @cached_property
    def quality(self) -> QualityModel | None:
        """How ordinary images look to it, where it was made with such images.

        Raises:
            BundleError: the file is not what `quality` writes.
        """
        if QUALITY not in self.files:
            return None
        with runtime.arrays_of(self.path / QUALITY) as arrays:
            return QualityModel.from_arrays(arrays)

    def model(self, *, policy: str = "float32") -> keras.Model:
        """Build the network and load its weights: uint8 [N,S,S,1] to float32 [N,F].

        Args:
            policy: Keras' dtype policy to compute in; weights and probabilities are float32 in all of them.
        """
        return _build(self.architecture, self.path / WEIGHTS, policy)

    def model_json(self) -> dict[str, Any]:
        """What a score folder keeps of the bundle as `model.json`."""
        curves = json.loads((self.path / "curves.json").read_text(encoding="utf-8"))
        return {"digest": self.digest, **self.info, "curves": curves}

    def predict(
        self, images: Sequence[str | Path | np.ndarray] | np.ndarray, *, batch_size: int = 4, precision: str = "auto"
    ) -> pd.DataFrame:
        """Score images without Ray; files are decoded in a child process, which a damaged file may end.

        Args:
            images: paths or URIs, or arrays uint8 [H,W] of any size; also one array uint8 [N,H,W].
            batch_size: images per forward pass.
            precision: `auto`, `fp32`, `bf16` or `int8`, as for `ray-cxr score`.

        Returns:
            A score table (see `predictions.schema`), one row per picture in the order given. The image_id is the
            file's name, or `array_0`, `array_1`, ...; a file that cannot be read, that ends its decoder or that takes
            more than a minute is a row of status `error`.

        Raises:
            ValueError: an array that is not uint8 [H,W].
            ConfigError: a precision that the bundle or this machine does not have.
            RayCxrError: the child process cannot start.
        """
        if isinstance(images, (str, Path)):
            images = [images]
        items = list(images)
        paths = [None if isinstance(item, np.ndarray) else str(item) for item in items]
        ids = [f"array_{i}" if path is None else file_name(path) for i, path in enumerate(paths)]
        with self._borrow_decoder() as decoder:
            if any(paths):
                decoder.start()  # the child starts while this process opens the runtime
                self._runtime(batch_size, precision)
            pixels, failures = _load_images(items, self.input_spec, decoder)
        rows = pa.table(
            {
                "image_id": pa.array(ids, pa.string()),
                "path": pa.array(paths, pa.string()),
                "patient_id": pa.nulls(len(items), pa.string()),
                "study_id": pa.nulls(len(items), pa.string()),
            }
        )
        probabilities = np.zeros((len(items), len(self.findings)), dtype=np.float32)
        flags: list[str | None] = [None] * len(items)
        good = [i for i in range(len(items)) if i not in failures]
        if good:
            found = self._runtime(batch_size, precision).predict(pixels[good])
            probabilities[good] = found.probabilities
            if self.quality is not None:
                for i, flag in zip(good, judge(self.quality, pixels[good], found.features), strict=True):
                    flags[i] = flag
        frame: pd.DataFrame = predictions.assemble(rows, probabilities, failures, self.rules, flags).to_pandas()
        return frame

    @contextlib.contextmanager
    def _borrow_decoder(self) -> Iterator[Decoder]:
        """Yield a decoder for one caller; its child process, whose start takes 0.4 s of a core, stays for later calls.

        The child ends with this object or this process.
        """
        kept: dict[int, Decoder] = self.__dict__.setdefault("_decoders", {})
        number = os.getpid()  # a forked process must not share the pipes of its parent
        decoder = kept.pop(number, None) or Decoder([self.input_spec])
        try:
            yield decoder
        except BaseException:
            decoder.close()
            raise
        if kept.setdefault(number, decoder) is not decoder:  # another thread was faster
            decoder.close()

    def _runtime(self, batch_size: int, precision: str) -> runtime.Runtime:
        chosen = runtime.choose_precision(self.info, precision, gpu=False)
        cache: dict[Any, runtime.Runtime] = self.__dict__.setdefault("_runtimes", {})
        if (batch_size, chosen) not in cache:
            cache[batch_size, chosen] = runtime.open_runtime(
                self, chosen, batch_size=batch_size, threads=runtime.threads_here()
            )
        return cache[batch_size, chosen]

    def __getstate__(self) -> dict[str, Any]:
        """To another process go the fields alone: networks that were opened here are opened again there."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def _load_images(
    items: Sequence[Any], spec: InputSpec, decoder: Decoder
) -> tuple[np.ndarray, dict[int, tuple[str, str]]]:
    """Load arrays in this process and files through the decoder: uint8 [N,S,S], and code and message by row."""
    pixels = np.zeros((len(items), spec.size, spec.size), dtype=np.uint8)
    failures: dict[int, tuple[str, str]] = {}
    for i, item in enumerate(items):
        if isinstance(item, np.ndarray):
            pixels[i] = resize(item, spec)
            continue
        found = decoder.load(str(item))
        if isinstance(found, Failure):
            failures[i] = (found.code, found.message)
        else:
            pixels[i] = found.images[0]
    return pixels, failures


def load_bundle(path: str | Path) -> Bundle:
    """Open a bundle, verifying that every byte is as it was written. Executes nothing from it.

    Raises:
        BundleError: not a bundle, a newer format, a missing, added or changed file, findings that do not agree.
    """
    place = remote.path(path)
    here = remote.folder_here(place)
    try:
        return _load(here, str(place))
    except BundleError as error:
        # Whoever reads it is to mend the bundle and not the copies of it.
        raise BundleError(str(error).replace(str(here), str(place))) from None


def _load(path: Path, place: str) -> Bundle:
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; name a bundle, as `ray-cxr train` leaves in RUN/bundle")
    info = _read_info(path)
    if type(info.get("format")) is not int or info["format"] < 1:
        raise BundleError(f"{path}: bundle.json names no format; is it a bundle?")
    if info["format"] > FORMAT:
        raise BundleError(
            f"{path}: is of format {info['format']}, this ray-cxr reads up to {FORMAT}; install a newer ray-cxr"
        )
    digest, files = _verify(path)
    try:
        architecture = build(Architecture, info["architecture"])
        spec = build(InputSpec, info["input_spec"])
        findings = tuple(info["findings"])
        tables = {name: info[name] for name in ("calibration", "operating_points", "expected_flag_rates")}
        provenance = info["provenance"]
    except ConfigError as error:
        raise BundleError(f"{path}: bundle.json: {error}") from None
    except (KeyError, TypeError) as error:
        raise BundleError(f"{path}: bundle.json lacks {error}; write the bundle again") from None
    unknown = [name for name in findings if name not in LABELS]
    if unknown or findings != architecture.findings or len(set(findings)) != len(findings):
        raise BundleError(
            f"{path}: findings do not agree: bundle.json lists {', '.join(findings)}, "
            f"the architecture {', '.join(architecture.findings)}"
        )
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) != set(findings):
            raise BundleError(f"{path}: findings do not agree: {name} is not for {', '.join(findings)}")
    if not isinstance(provenance, dict):
        raise BundleError(f"{path}: bundle.json: provenance is not an object")
    if spec.size != architecture.size:
        raise BundleError(f"{path}: the input spec is {spec.size} pixels, the network {architecture.size}")
    bundle = Bundle(
        path=path,
        digest=digest,
        architecture=architecture,
        input_spec=spec,
        info=info,
        files=frozenset(files),
        place=place,
    )
    try:
        bundle.rules  # noqa: B018  -- read now, so that a bad entry is refused on loading and not in mid-run
        _check_additions(info, findings)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: bundle.json: calibration, operating points or ages are damaged: {error}") from None
    try:
        _check_exports(info, bundle.files)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: bundle.json: runtimes or quality are damaged: {error}") from None
    return bundle


def written(path: Path) -> bool:
    """Whether a bundle is there, or on a disk anything at all; in a bucket its sums come last."""
    return (path / SUMS).exists() if remote.stored(path) else path.exists()


def write_bundle(
    out: str | Path,
    *,
    save_weights: Any,
    architecture: Architecture,
    input_spec: InputSpec,
    calibration: Mapping[str, Any],
    operating_points: Mapping[str, Any],
    expected_flag_rates: Mapping[str, float | None],
    provenance: Mapping[str, Any],
    config_toml: str,
    curves: Sequence[Mapping[str, Any]],
    split: pa.Table,
    operating_alternatives: Mapping[str, Mapping[str, Any]] | None = None,
    rule_notes: Mapping[str, str | None] | None = None,
    ordinary: exports.Ordinary | None = None,
    like: Bundle | None = None,
    add: Callable[[Path, dict[str, Any]], None] | None = None,
) -> Bundle:
    """Write a bundle beside its final name, then rename it there: a bundle is whole or absent.

    Args:
        save_weights: called with the path to write the `.weights.h5` to.
        split: a table of `SPLIT_SCHEMA`.
        operating_alternatives: per finding, operating points by other rules than the chosen one (a point or None).
        rule_notes: per finding, why it has no calibration or no operating point, or None.
        ordinary: images to measure precisions and to fit the quality flags on.
        like: a bundle of the same weights, whose graphs, golden images and quality flags are taken as they are.
        add: called with the folder and the entries of `bundle.json` so far, to add files of `exports.OPTIONAL_FILES`
            and entries of its own.

    Raises:
        OutputError: `out` exists; a bundle is never changed.
    """
    from ray_cxr.models.card import model_card

    out = remote.path(out)
    if written(out):
        raise OutputError(f"{out}: exists already, and a bundle is never changed; name another folder")
    with atomic.new_folder(out, SUMS) as part:
        info = {
            "format": FORMAT,
            "backbone": architecture.backbone,
            "findings": list(architecture.findings),
            "architecture": architecture.model_dump(mode="json"),
            "input_spec": input_spec.model_dump(mode="json"),
            "calibration": dict(calibration),
            "operating_points": dict(operating_points),
            "expected_flag_rates": dict(expected_flag_rates),
        }
        if operating_alternatives is not None:
            info["operating_alternatives"] = {name: dict(points) for name, points in operating_alternatives.items()}
        if rule_notes is not None:
            info["rule_notes"] = dict(rule_notes)
        info["provenance"] = dict(provenance)
        save_weights(part / WEIGHTS)
        if like is None:
            info |= exports.export(part, _build(architecture, part / WEIGHTS), architecture, input_spec, ordinary)
        else:
            info |= {name: like.info[name] for name in _EXPORTED if name in like.info}
            for name in like.files & set(exports.OPTIONAL_FILES):
                shutil.copyfile(like.path / name, part / name)
        if add is not None:
            add(part, info)
        atomic.write_json(part / "bundle.json", info)
        atomic.write_json(part / "curves.json", list(curves))
        atomic.write_text(part / "config.toml", config_toml)
        atomic.write_parquet(split.cast(SPLIT_SCHEMA), part / "split.parquet")
        atomic.write_text(part / "MODEL_CARD.md", model_card(info, curves))
        files = [*FILES, *(name for name in exports.OPTIONAL_FILES if (part / name).exists())]
        atomic.write_text(part / SUMS, "".join(f"{_sha256(part / name)}  {name}\n" for name in files))
        for name in (*files, SUMS):
            (part / name).chmod(0o444)
    return load_bundle(out)


def _build(architecture: Architecture, weights: Path, policy: str = "float32") -> keras.Model:
    import keras

    from ray_cxr.models import classifier

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = classifier.build(architecture)
    finally:
        keras.config.set_dtype_policy(before)
    classifier.load_own_weights(model, weights)
    return model


def _check_additions(info: Mapping[str, Any], findings: Sequence[str]) -> None:
    """What older bundles do not have: right where it is there.

    Raises:
        TypeError, KeyError, ValueError: it is not.
    """
    for name in ("operating_alternatives", "rule_notes"):
        if name in info and (not isinstance(info[name], dict) or set(info[name]) != set(findings)):
            raise ValueError(f"{name} is not for {', '.join(findings)}")
    for name, points in info.get("operating_alternatives", {}).items():
        if not isinstance(points, dict):
            raise TypeError(f"operating_alternatives of {name} is not an object")
        for point in points.values():
            if point is not None:
                _threshold(point)
    for name, note in info.get("rule_notes", {}).items():
        if not isinstance(note, (str, type(None))):
            raise TypeError(f"rule_notes of {name} is not a text")


def _check_exports(info: Mapping[str, Any], files: Set[str]) -> None:
    """What `exports` and `quantize` add: entries of the right kind, with exactly their files. Older bundles have none.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: it is not so.
    """
    wanted: set[str] = {runtime.GOLDEN} & files  # it may stand alone: Keras, too, is compared with it
    if "runtimes" in info:
        runtimes = info["runtimes"]
        if not isinstance(runtimes, dict):
            raise TypeError("runtimes is not an object")
        if not {"fp32", "bf16"} <= set(runtimes) <= set(runtime.TOLERANCE):
            raise ValueError(f"runtimes are for {', '.join(runtimes)}")
        for name, entry in runtimes.items():
            if not isinstance(entry, dict):
                raise TypeError(f"runtimes: {name} is not an object")
            if entry["accepted"] is not None and not isinstance(entry["accepted"], bool):
                raise TypeError(f"runtimes: accepted of {name} is neither true, false nor null")
            if entry["largest_drift"] is not None or entry["accepted"] is not None:
                _number(entry["largest_drift"])
            _number(entry["tolerance"])
        wanted |= {runtime.GOLDEN, *_graph("fp32")}
        if "int8" in runtimes:
            wanted |= {runtime.GOLDEN_INT8, *_graph("int8")}
    elif not isinstance(info.get("runtimes_refused", ""), str):
        raise TypeError("runtimes_refused is not a text")
    quality = info.get("quality")
    if not isinstance(quality, (dict, type(None))):
        raise TypeError("quality is not an object")
    if quality is not None and "lacking" not in quality:
        for rate in quality["expected_rates"].values():
            _number(rate)
        _number(quality["train_images"])
        _number(quality["held_out_images"])
        wanted.add(QUALITY)
    elif quality is not None and not isinstance(quality["lacking"], str):
        raise TypeError("quality: lacking is not a text")
    found = files & set(exports.OPTIONAL_FILES)
    if wanted != found:
        without = [f"{SUMS} does not list {name}" for name in sorted(wanted - found)]
        without += [f"nothing is said of {name}" for name in sorted(found - wanted)]
        raise ValueError("; ".join(without))


def _graph(precision: str) -> tuple[str, str]:
    name = runtime.graph_file(precision)
    return name, str(Path(name).with_suffix(".bin"))


def _number(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise TypeError(f"{value!r} is not a number of 0 or more")


def _threshold(point: Mapping[str, Any]) -> float:
    value = float(point["threshold"])
    if not 0.0 < value < 1.0:
        raise ValueError(f"an operating point of {value} is not between 0 and 1")
    return value


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{path}: has no bundle.json; name a bundle, as `ray-cxr train` leaves in RUN/bundle"
        ) from None
    except (OSError, ValueError):
        raise BundleError(f"{path}: bundle.json cannot be read as JSON; the bundle is damaged, copy it again") from None
    if not isinstance(info, dict):
        raise BundleError(f"{path}: bundle.json is not a JSON object; the bundle is damaged, copy it again")
    return info


def _verify(path: Path) -> tuple[str, set[str]]:
    """Check every file against its digest; the digest of them all, and their names."""
    try:
        sums = (path / SUMS).read_bytes()
    except OSError:
        raise BundleError(f"{path}: has no {SUMS}; the bundle is incomplete, copy it again") from None
    listed: dict[str, str] = {}
    for line in sums.decode("utf-8", "replace").splitlines():
        match = _SUM_LINE.match(line)  # a name without a slash: nothing outside the folder is ever opened
        if match is None:
            raise BundleError(f"{path}: {SUMS} is damaged; copy the bundle again")
        listed[match[2]] = match[1]
    for name in FILES:
        if name not in listed:
            raise BundleError(f"{path}: {SUMS} does not list {name}; the bundle is damaged, copy it again")
    foreign = sorted(set(listed) - {*FILES, *exports.OPTIONAL_FILES})
    if foreign:  # nothing would read it, and nothing but what is read belongs into a bundle
        raise BundleError(f"{path}: {SUMS} lists {', '.join(foreign[:5])}, which no bundle holds; do not use this one")
    for name, expected in listed.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{path}: {name} is missing; the bundle is incomplete, copy it again")
        if _sha256(file) != expected:
            raise BundleError(f"{path}: {name} is not as it was written (SHA-256 differs); copy the bundle again")
    extra = sorted(
        item.name for item in path.iterdir() if item.name not in listed and item.name != SUMS and item.name[0] != "."
    )
    if extra:
        raise BundleError(f"{path}: holds {', '.join(extra[:5])}, which is not part of it; remove it")
    return hashlib.sha256(sums).hexdigest(), set(listed)


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
