"""Read a bundle: an immutable folder of data with everything that scoring and reporting need from a trained model.

bundle.json        format, architecture, findings in order, input spec, calibration, operating points, provenance;
                   may have operating_alternatives (points by other rules) and rule_notes (why a finding has none)
model.weights.h5   the weights alone; the model is rebuilt from `architecture`
config.toml        the resolved settings, which `ray-cxr train --config` accepts
curves.json        learning curves, one object per epoch
split.parquet      image_id, patient_id, split: the images used to train the model and to choose its epoch
MODEL_CARD.md      the model card
openvino.xml, ...  the OpenVINO graph, golden images, quality flags: see `exports`; bundles of older versions lack them
SHA256SUMS         the digest of each file; its own SHA-256 is the bundle's digest

`bundle_writer` writes bundles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ray_cxr.config import InputSpec, build
from ray_cxr.errors import BundleError, ConfigError
from ray_cxr.evaluation.calibration import Calibration
from ray_cxr.evaluation.quality import QualityModel, judge_images
from ray_cxr.imaging.resize import resize
from ray_cxr.imaging.sandbox import Decoder, Failure
from ray_cxr.labels import LABELS
from ray_cxr.models import predictions, runtime
from ray_cxr.models.architecture import Architecture
from ray_cxr.models.runtime import GOLDEN, GOLDEN_INT8, TOLERANCE
from ray_cxr.storage import remote
from ray_cxr.storage.paths import file_name

if TYPE_CHECKING:
    import keras

FORMAT = 1
WEIGHTS = "model.weights.h5"
QUALITY = "quality.npz"
SUMS = "SHA256SUMS"
FILES = ("MODEL_CARD.md", "bundle.json", "config.toml", "curves.json", WEIGHTS, "split.parquet")
#: Files that bundles of older versions lack.
OPTIONAL_FILES = (
    GOLDEN_INT8,
    GOLDEN,
    "openvino-int8.bin",
    "openvino-int8.xml",
    "openvino.bin",
    "openvino.xml",
    QUALITY,
)
SPLIT_SCHEMA = pa.schema([("image_id", pa.string()), ("patient_id", pa.string()), ("split", pa.string())])
_SUM_LINE = re.compile(r"^([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9_.-]*)$")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        path: its folder, or a local copy of it, see `remote.download_folder`.
        digest: SHA-256 over its contents, hex.
        architecture: what `model` builds.
        input_spec: how a radiograph is resized for it.
        info: the content of `bundle.json`.
        files: names of its files.
        location: the path or URI that was opened, for messages.
    """

    path: Path
    digest: str
    architecture: Architecture
    input_spec: InputSpec
    info: Mapping[str, Any] = field(repr=False)
    files: frozenset[str] = field(repr=False, default=frozenset())
    location: str = ""

    @property
    def findings(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return self.architecture.findings

    @cached_property
    def rules(self) -> predictions.Rules:
        """How its probabilities become the rows of a score table."""
        ages = self.info["provenance"].get("age_range")
        return predictions.Rules(
            findings=self.findings,
            calibrations={
                name: Calibration.from_dict(fitted) if fitted else None
                for name, fitted in self.info["calibration"].items()
            },
            thresholds={
                name: _read_threshold(point) if point else None for name, point in self.info["operating_points"].items()
            },
            age_range=(float(ages[0]), float(ages[1])) if ages else None,
            digest=self.digest,
        )

    @cached_property
    def quality(self) -> QualityModel | None:
        """Statistics of ordinary images, for the quality flags; None if the bundle was made without images.

        Raises:
            BundleError: the file is damaged.
        """
        if QUALITY not in self.files:
            return None
        with runtime.open_arrays(self.path / QUALITY) as arrays:
            return QualityModel.from_arrays(arrays)

    def model(self, *, policy: str = "float32") -> keras.Model:
        """Build the Keras model and load its weights: uint8 [N,S,S,1] to float32 [N,F].

        Args:
            policy: Keras' dtype policy for computation; weights and probabilities are always float32.
        """
        from ray_cxr.models import classifier

        return classifier.load_model(self.architecture, self.path / WEIGHTS, policy)

    def model_json(self) -> dict[str, Any]:
        """Return the content of `model.json` in a score folder."""
        curves = json.loads((self.path / "curves.json").read_text(encoding="utf-8"))
        return {"digest": self.digest, **self.info, "curves": curves}

    def open_runtime(self, precision: str, *, batch_size: int, threads: int, gpu: bool = False) -> runtime.Runtime:
        """Open the model for scoring; run it on the stored test images (golden images) and compare with their stored
        probabilities.

        Args:
            precision: a result of `choose_precision`.
            threads: CPU threads it may use.

        Raises:
            ConfigError: this machine does not support the precision, or has no GPU.
            BundleError: the probabilities of the golden images differ from those in the bundle.
        """
        opened: runtime.Runtime
        if not gpu and "runtimes" in self.info:
            if precision == "bf16" and not runtime.cpu_has_bf16():
                raise ConfigError("the run uses bf16, which this node's CPU does not support; use --precision fp32")
            graph = self.path / runtime.graph_file(precision)
            opened = runtime.OpenVinoRuntime(graph, precision, batch_size, threads)
        else:
            policy = "float32"
            if gpu:
                policy = runtime.prepare_gpu(precision)
            elif "keras" not in sys.modules:
                runtime.limit_threads(threads)
            opened = runtime.KerasRuntime(self.model(policy=policy), batch_size)
        self.check_golden(opened, precision)
        return opened

    def check_golden(self, opened: runtime.Runtime, precision: str) -> None:
        """Run a model on the golden images and compare with their stored probabilities. Bundles without them pass.

        Raises:
            BundleError: the difference exceeds `TOLERANCE`, or the golden images are damaged.
        """
        if GOLDEN not in self.files:
            return
        path, size = self.path / GOLDEN, self.input_spec.size
        with runtime.open_arrays(path) as arrays:
            images, expected = arrays["images"], arrays["fp32"]
        if precision == "int8":
            with runtime.open_arrays(self.path / GOLDEN_INT8) as arrays:
                expected = arrays["int8"]
        if images.dtype != np.uint8 or images.shape[1:] != (size, size) or not len(images):
            raise BundleError(f"{path}: damaged: images are {images.dtype} {images.shape}; copy the bundle again")
        if expected.dtype != np.float32 or expected.shape != (len(images), len(self.findings)):
            raise BundleError(
                f"{path}: damaged: probabilities are {expected.dtype} {expected.shape}; copy the bundle again"
            )
        drift = np.abs(opened.predict(images).probabilities - expected).max()
        if not drift <= TOLERANCE[precision]:  # refuses NaN too
            raise BundleError(
                f"{self.path}: in {precision} on this machine, probabilities of the golden images are off by "
                f"{drift:.3g} ({TOLERANCE[precision]:g} is allowed); use another --precision"
            )

    def predict(
        self, images: Sequence[str | Path | np.ndarray] | np.ndarray, *, batch_size: int = 4, precision: str = "auto"
    ) -> pd.DataFrame:
        """Score images without Ray. A child process decodes files, so a damaged file cannot end this process.

        Args:
            images: paths or URIs, or arrays uint8 [H,W] of any size; also one array uint8 [N,H,W].
            batch_size: images per forward pass.
            precision: `auto`, `fp32`, `bf16` or `int8`, as for `ray-cxr score`.

        Returns:
            A score table (see `predictions.schema`), one row per image, in order. The image_id is the file's name, or
            `array_0`, `array_1`, .... A file that cannot be read, that crashes its decoder, or that takes more than a
            minute is a row with status `error`.

        Raises:
            ValueError: an array is not uint8 [H,W].
            ConfigError: the bundle or this machine does not support the precision.
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
                self._cached_runtime(batch_size, precision)
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
            outputs = self._cached_runtime(batch_size, precision).predict(pixels[good])
            probabilities[good] = outputs.probabilities
            if self.quality is not None:
                for i, flag in zip(good, judge_images(self.quality, pixels[good], outputs.features), strict=True):
                    flags[i] = flag
        frame: pd.DataFrame = predictions.assemble(rows, probabilities, failures, self.rules, flags).to_pandas()
        return frame

    @contextlib.contextmanager
    def _borrow_decoder(self) -> Iterator[Decoder]:
        """Yield a decoder for one caller. Its child process takes 0.4 s to start and is kept for later calls."""
        decoders: dict[int, Decoder] = self.__dict__.setdefault("_decoders", {})
        number = os.getpid()  # a forked process must not share the pipes of its parent
        decoder = decoders.pop(number, None) or Decoder([self.input_spec])
        try:
            yield decoder
        except BaseException:
            decoder.close()
            raise
        if decoders.setdefault(number, decoder) is not decoder:  # another thread returned its decoder first
            decoder.close()

    def _cached_runtime(self, batch_size: int, precision: str) -> runtime.Runtime:
        chosen = runtime.choose_precision(self.info, precision, gpu=False)
        cache: dict[Any, runtime.Runtime] = self.__dict__.setdefault("_runtimes", {})
        if (batch_size, chosen) not in cache:
            threads = runtime.default_threads()
            cache[batch_size, chosen] = self.open_runtime(chosen, batch_size=batch_size, threads=threads)
        return cache[batch_size, chosen]

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the fields alone; runtimes and decoders belong to this process."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def _load_images(
    items: Sequence[Any], spec: InputSpec, decoder: Decoder
) -> tuple[np.ndarray, dict[int, tuple[str, str]]]:
    """Resize arrays here and files in the decoder: uint8 [N,S,S], and error code and message by row."""
    pixels = np.zeros((len(items), spec.size, spec.size), dtype=np.uint8)
    failures: dict[int, tuple[str, str]] = {}
    for i, item in enumerate(items):
        if isinstance(item, np.ndarray):
            pixels[i] = resize(item, spec)
            continue
        result = decoder.load(str(item))
        if isinstance(result, Failure):
            failures[i] = (result.code, result.message)
        else:
            pixels[i] = result.images[0]
    return pixels, failures


def load_bundle(path: str | Path) -> Bundle:
    """Open a bundle and verify every byte of it. Executes nothing from it.

    Raises:
        BundleError: not a bundle, a newer format, a missing, added or changed file, or inconsistent findings.
    """
    location = remote.to_path(path)
    local = remote.download_folder(location)
    try:
        return _load(local, str(location))
    except BundleError as error:
        # Name the bundle, not its local copy: the bundle is what the reader must fix.
        raise BundleError(str(error).replace(str(local), str(location))) from None


def is_written(path: Path) -> bool:
    """Return whether anything exists at a path; in a bucket, whether a complete bundle does (its sums come last)."""
    return (path / SUMS).exists() if remote.as_store_path(path) else path.exists()


def _load(path: Path, location: str) -> Bundle:
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder; pass a bundle, e.g. the folder RUN/bundle of `ray-cxr train`")
    info = _read_info(path)
    if type(info.get("format")) is not int or info["format"] < 1:
        raise BundleError(f"{path}: bundle.json has no format; pass a bundle")
    if info["format"] > FORMAT:
        raise BundleError(
            f"{path}: format {info['format']} is newer than this ray-cxr reads ({FORMAT}); install a newer ray-cxr"
        )
    digest, files = _verify_files(path)
    try:
        architecture = build(Architecture, info["architecture"])
        spec = build(InputSpec, info["input_spec"])
        findings = tuple(info["findings"])
        tables = {name: info[name] for name in ("calibration", "operating_points", "expected_flag_rates")}
        provenance = info["provenance"]
    except ConfigError as error:
        raise BundleError(f"{path}: bundle.json: {error}") from None
    except KeyError as error:
        raise BundleError(f"{path}: bundle.json has no entry {error}; copy the bundle again") from None
    except TypeError as error:
        raise BundleError(f"{path}: bundle.json is malformed: {error}; copy the bundle again") from None
    unknown = [name for name in findings if name not in LABELS]
    if unknown or findings != architecture.findings or len(set(findings)) != len(findings):
        raise BundleError(
            f"{path}: findings do not agree: bundle.json lists {', '.join(findings)}, "
            f"the architecture {', '.join(architecture.findings)}; copy the bundle again"
        )
    for name, table in tables.items():
        if not isinstance(table, dict) or set(table) != set(findings):
            raise BundleError(f"{path}: {name} must have exactly one entry for each of: {', '.join(findings)}")
    if not isinstance(provenance, dict):
        raise BundleError(f"{path}: bundle.json: provenance is not an object; copy the bundle again")
    if spec.size != architecture.size:
        raise BundleError(f"{path}: the input spec is {spec.size} pixels, the model's input {architecture.size}")
    bundle = Bundle(path, digest, architecture, spec, info, frozenset(files), location)
    try:
        bundle.rules  # noqa: B018  -- a bad entry must fail here, not during a run
        _check_additions(info, findings)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: bundle.json: calibration, operating points or ages are damaged: {error}") from None
    try:
        _check_exports(info, bundle.files)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path}: bundle.json: runtimes or quality are damaged: {error}") from None
    return bundle


def _check_additions(info: Mapping[str, Any], findings: Sequence[str]) -> None:
    """Check the entries that bundles of older versions lack."""
    for name in ("operating_alternatives", "rule_notes"):
        if name in info and (not isinstance(info[name], dict) or set(info[name]) != set(findings)):
            raise ValueError(f"{name} must have exactly one entry for each of: {', '.join(findings)}")
    for name, points in info.get("operating_alternatives", {}).items():
        if not isinstance(points, dict):
            raise TypeError(f"operating_alternatives of {name} is not an object")
        for point in points.values():
            if point is not None:
                _read_threshold(point)
    for name, note in info.get("rule_notes", {}).items():
        if not isinstance(note, (str, type(None))):
            raise TypeError(f"rule_notes of {name} is not a string")


def _check_exports(info: Mapping[str, Any], files: Set[str]) -> None:
    """Check that the entries of `exports` and `quantize` are well formed and that exactly their files are present."""
    expected: set[str] = {GOLDEN} & files  # without graphs, Keras is compared with it
    if "runtimes" in info:
        runtimes = info["runtimes"]
        if not isinstance(runtimes, dict):
            raise TypeError("runtimes is not an object")
        if not {"fp32", "bf16"} <= set(runtimes) <= set(TOLERANCE):
            raise ValueError(f"runtimes are for {', '.join(runtimes)}")
        for name, entry in runtimes.items():
            if not isinstance(entry, dict):
                raise TypeError(f"runtimes: {name} is not an object")
            if entry["accepted"] is not None and not isinstance(entry["accepted"], bool):
                raise TypeError(f"runtimes: accepted of {name} is neither true, false nor null")
            if entry["largest_drift"] is not None or entry["accepted"] is not None:
                _check_number(entry["largest_drift"])
            _check_number(entry["tolerance"])
        expected |= {GOLDEN, "openvino.xml", "openvino.bin"}
        if "int8" in runtimes:
            expected |= {GOLDEN_INT8, "openvino-int8.xml", "openvino-int8.bin"}
    elif not isinstance(info.get("runtimes_refused", ""), str):
        raise TypeError("runtimes_refused is not a string")
    quality = info.get("quality")
    if not isinstance(quality, (dict, type(None))):
        raise TypeError("quality is not an object")
    if quality is not None and "lacking" not in quality:
        for rate in quality["expected_rates"].values():
            _check_number(rate)
        _check_number(quality["train_images"])
        _check_number(quality["held_out_images"])
        expected.add(QUALITY)
    elif quality is not None and not isinstance(quality["lacking"], str):
        raise TypeError("quality: lacking is not a string")
    present = files & set(OPTIONAL_FILES)
    if expected != present:
        problems = [f"{SUMS} does not list {name}" for name in sorted(expected - present)]
        problems += [f"nothing refers to {name}" for name in sorted(present - expected)]
        raise ValueError("; ".join(problems))


def _check_number(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise TypeError(f"{value!r} is not a number of 0 or more")


def _read_threshold(point: Mapping[str, Any]) -> float:
    value = float(point["threshold"])
    if not 0.0 < value < 1.0:
        raise ValueError(f"an operating point of {value} is not between 0 and 1")
    return value


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{path}: has no bundle.json; pass a bundle, e.g. the folder RUN/bundle of `ray-cxr train`"
        ) from None
    except (OSError, ValueError):
        raise BundleError(f"{path}: bundle.json is not readable JSON; the bundle is damaged, copy it again") from None
    if not isinstance(info, dict):
        raise BundleError(f"{path}: bundle.json is not a JSON object; the bundle is damaged, copy it again")
    return info


def _verify_files(path: Path) -> tuple[str, set[str]]:
    """Check every file against its digest; return the bundle's digest and the names of its files."""
    try:
        sums = (path / SUMS).read_bytes()
    except OSError:
        raise BundleError(f"{path}: has no {SUMS}; the bundle is incomplete, copy it again") from None
    listed: dict[str, str] = {}
    for line in sums.decode("utf-8", "replace").splitlines():
        match = _SUM_LINE.match(line)  # a name without a slash, so that no file outside the folder is opened
        if match is None:
            raise BundleError(f"{path}: {SUMS} is damaged; copy the bundle again")
        listed[match[2]] = match[1]
    for name in FILES:
        if name not in listed:
            raise BundleError(f"{path}: {SUMS} does not list {name}; the bundle is damaged, copy it again")
    foreign = sorted(set(listed) - {*FILES, *OPTIONAL_FILES})
    if foreign:
        raise BundleError(f"{path}: {SUMS} lists {', '.join(foreign[:5])}, which no bundle contains; do not use it")
    for name, expected in listed.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{path}: {name} is missing; the bundle is incomplete, copy it again")
        if sha256(file) != expected:
            raise BundleError(f"{path}: {name} was changed (SHA-256 differs); copy the bundle again")
    extra = sorted(
        item.name for item in path.iterdir() if item.name not in listed and item.name != SUMS and item.name[0] != "."
    )
    if extra:
        raise BundleError(f"{path}: contains {', '.join(extra[:5])}, which is not part of the bundle; remove it")
    return hashlib.sha256(sums).hexdigest(), set(listed)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
