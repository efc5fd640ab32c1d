"""Read a bundle: an immutable folder of data with everything that scoring and reporting need from a trained model.

bundle.json        format, architecture, findings in order, input spec, calibration, operating points, provenance;
                   may have operating_alternatives (points by other rules) and rule_notes (why a finding has no point)
model.weights.h5   the weights alone; the model is rebuilt from `architecture`; missing if the bundle holds only a graph
config.toml        the resolved settings, which `ray-cxr train --config` accepts
curves.json        learning curves, one object per epoch
split.parquet      image_id, patient_id, split: the images used to train the model and to choose its epoch
MODEL_CARD.md      the model card
openvino.xml, ...  the OpenVINO graph, golden images, quality flags: see `exports`; bundles of older versions lack them
SHA256SUMS         the SHA-256 of each file above; the SHA-256 of SHA256SUMS is the bundle's digest

`bundle_writer` writes bundles.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ray_cxr.config import HeatMapMethod, InputSpec, build
from ray_cxr.errors import BundleError, ConfigError, ImageError
from ray_cxr.evaluation.calibration import Calibration
from ray_cxr.evaluation.quality import QualityModel, judge_images
from ray_cxr.imaging.overlays import HeatMap, compute_area
from ray_cxr.imaging.resize import resize
from ray_cxr.imaging.sandbox import Decoder, Failure
from ray_cxr.labels import LABELS
from ray_cxr.models import predictions, runtime
from ray_cxr.models.architecture import Architecture, BundleInfo
from ray_cxr.models.runtime import GOLDEN, GOLDEN_INT8, TOLERANCE
from ray_cxr.storage import contents, remote
from ray_cxr.storage.files import hash_file
from ray_cxr.storage.paths import file_name, is_system_file
from ray_cxr.storage.run_folder import LOCK

if TYPE_CHECKING:
    from ray_cxr.models.keras_setup import keras

FORMAT = 1
WEIGHTS = "model.weights.h5"
QUALITY = "quality.npz"
SUMS = "SHA256SUMS"
FILES = ("MODEL_CARD.md", "bundle.json", "config.toml", "curves.json", "split.parquet")
#: Files that some bundles lack: those of older versions, and those that hold only a graph.
OPTIONAL_FILES = (
    GOLDEN_INT8,
    GOLDEN,
    "openvino-int8.bin",
    "openvino-int8.xml",
    "openvino.bin",
    "openvino.xml",
    QUALITY,
    WEIGHTS,
)
SPLIT_SCHEMA = pa.schema([("image_id", pa.string()), ("patient_id", pa.string()), ("split", pa.string())])
#: Files of git and of a command's lock, which a bundle's folder may hold in addition.
_IGNORED = (".git", ".gitattributes", ".gitignore", LOCK)
#: Entries of bundle.json with one entry per finding.
TABLES = ("calibration", "operating_points", "expected_flag_rates", "operating_alternatives", "rule_notes")
#: Text files of a bundle are shorter.
_MAX_TEXT_BYTES = 1 << 26
_CRLF = (
    "its lines end with CR LF, as git writes them with core.autocrlf); add the line `* -text` to the .gitattributes of "
    "the bundle's folder and check it out again, or copy the bundle again"
)
_SUM_LINE = re.compile(r"^([0-9a-f]{64})  ([A-Za-z0-9_][A-Za-z0-9_.-]*)$")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        path: the bundle's folder, or a local copy of a bundle in a bucket (see `remote.download_folder`).
        digest: SHA-256 of SHA256SUMS, hex, which identifies the bundle.
        architecture: the layers of the model.
        input_spec: how radiographs are resized for the model.
        info: the content of `bundle.json`.
        files: names of the bundle's files, without SHA256SUMS.
        location: the path or URI that the caller passed, for messages.
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
        """Names of the model's outputs, in order."""
        return self.architecture.findings

    @property
    def is_graph(self) -> bool:
        """Whether the bundle holds an OpenVINO graph and no layers."""
        return self.architecture.backbone == "graph"

    @cached_property
    def rules(self) -> predictions.Rules:
        """The rules that turn the model's probabilities into rows of a score table."""
        ages = self.info["provenance"].get("age_range")
        return predictions.Rules(
            findings=self.findings,
            calibrations={
                name: Calibration.from_dict(fitted) if fitted else None
                for name, fitted in self.info["calibration"].items()
            },
            thresholds={name: point and point["threshold"] for name, point in self.info["operating_points"].items()},
            age_range=(ages[0], ages[1]) if ages else None,
            digest=self.digest,
        )

    @cached_property
    def quality(self) -> QualityModel | None:
        """Statistics of ordinary images for quality flags.

        None in older bundles, in bundles made without images, and after a failed fit.

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

        Raises:
            ConfigError: the bundle holds only a graph.
        """
        if self.is_graph:
            raise ConfigError(
                f"{self.location}: holds only a graph, without layers: it runs on CPUs, and can be neither trained "
                "further nor explained by gradients"
            )
        from ray_cxr.models import classifier

        return classifier.load_model(self.architecture, self.path / WEIGHTS, policy)

    def model_json(self) -> dict[str, Any]:
        """Return the object that `score` writes as `model.json`."""
        curves = json.loads((self.path / "curves.json").read_text(encoding="utf-8"))
        return {"digest": self.digest, **self.info, "curves": curves}

    def open_runtime(
        self, precision: str, *, batch_size: int, threads: int, gpu: bool = False, jit_compile: bool = False
    ) -> runtime.ThreadedRuntime:
        """Open the model for scoring; it passes `check_golden` before it is returned.

        Args:
            precision: a result of `choose_precision`.
            threads: maximum number of CPU threads.
            jit_compile: compile a Keras model with XLA.

        Raises:
            ConfigError: this machine does not support the precision, or has no GPU.
            BundleError: the probabilities of the golden images differ from those in the bundle.
        """
        if not gpu and "runtimes" in self.info:
            if precision == "bf16" and not runtime.cpu_has_bf16():
                raise ConfigError("the run uses bf16, which this node's CPU does not support; use --precision fp32")
            graph = self.path / runtime.graph_file(precision)
            opened: runtime.ThreadedRuntime = runtime.OpenVinoRuntime(graph, precision, batch_size, threads)
        else:
            if not gpu and "keras" not in sys.modules:
                runtime.limit_threads(threads)
            policy = runtime.prepare_gpu(precision) if gpu else "float32"
            opened = runtime.KerasRuntime(self.model(policy=policy), batch_size, jit_compile=jit_compile)
        self.check_golden(opened, precision)
        return opened

    def check_golden(self, opened: runtime.Runtime, precision: str) -> None:
        """Compare a model's probabilities of the golden images with the stored ones.

        Golden images are synthetic radiographs. A bundle of an older version, which has none, passes.

        Raises:
            BundleError: a difference exceeds `TOLERANCE`, or the golden images are damaged.
        """
        if GOLDEN not in self.files:
            return
        path, size = self.path / GOLDEN, self.input_spec.size
        with runtime.open_arrays(path) as arrays:
            images, expected = arrays["images"], arrays["fp32"]
        if precision == "int8":
            with runtime.open_arrays(self.path / GOLDEN_INT8) as arrays:
                expected = arrays["int8"]
        count = max(1, images.size // size**2)
        for name, array, dtype, shape in (
            ("images", images, np.uint8, (count, size, size)),
            ("probabilities", expected, np.float32, (count, len(self.findings))),
        ):
            if array.dtype != dtype or array.shape != shape:
                raise BundleError(f"{path}: damaged: {name} are {array.dtype} {array.shape}; copy the bundle again")
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
            images: a sequence of paths, URIs, and arrays uint8 [H,W] of any size; or one array uint8 [N,H,W].
            batch_size: images per forward pass.
            precision: `auto`, `fp32`, `bf16` or `int8`, as for `ray-cxr score`.

        Returns:
            A score table (see `predictions.schema`) with one row per image, in order. The image_id is the file's name;
            for the array at position i it is `array_<i>`. The status is `error` for a file that cannot be read, crashes
            the decoder, or takes more than a minute. All weights of the priority are 1. If the bundle calibrates no
            finding, uncalibrated probabilities rank the images.

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
                decoder.start()  # before the runtime is opened, so that both start at the same time
                self._cached_runtime(batch_size, precision)
            pixels, failures, header_flags = _load_images(items, self.input_spec, decoder)
        unknown = [None] * len(items)
        columns = {"image_id": ids, "path": paths, "patient_id": unknown, "study_id": unknown}
        rows = pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))
        probabilities = np.zeros((len(items), len(self.findings)), dtype=np.float32)
        spread: np.ndarray | None = None
        flags: list[str | None] = [None] * len(items)
        good = [i for i in range(len(items)) if i not in failures]
        if good:
            outputs = self._cached_runtime(batch_size, precision).predict(pixels[good])
            probabilities[good] = outputs.probabilities
            if outputs.spread is not None:
                spread = np.zeros_like(probabilities)
                spread[good] = outputs.spread
            if self.quality is not None:
                for i, flag in zip(good, judge_images(self.quality, pixels[good], outputs.features), strict=True):
                    flags[i] = flag
        table = predictions.assemble(rows, probabilities, failures, self.rules, flags, header_flags, spread)
        frame: pd.DataFrame = table.to_pandas()
        return frame

    def explain(
        self,
        images: Sequence[str | Path | np.ndarray] | np.ndarray,
        finding: str | None = None,
        *,
        method: HeatMapMethod = "gradcam",
    ) -> list[HeatMap]:
        """Compute heat maps, which show the regions that support a finding according to the model. Needs no Ray.

        Args:
            images: as for `predict`.
            finding: a finding of this bundle; None: each image's top finding.
            method: `gradcam`, `hirescam` or `occlusion` (slow, works for every bundle).

        Returns:
            One map per image, in order. `cells` are float32 [h,w] in units of the finding's logit, 0 and above; `p` is
            the raw probability; `project(shape)` scales the cells to pixels, and `draw(image)` draws them over it.

        Raises:
            ConfigError: the bundle does not predict the finding, or holds only a graph (use `occlusion`).
            ImageError: a file cannot be read; its `code` is one of docs/scoring.md.
            ValueError: an array is not uint8 [H,W].
        """
        if finding is not None and finding not in self.findings:
            raise ConfigError(f"finding {finding!r}: this bundle predicts {', '.join(self.findings)}")
        items = [images] if isinstance(images, (str, Path)) else list(images)
        pixels = np.zeros((len(items), self.input_spec.size, self.input_spec.size, 1), np.uint8)
        shapes: list[tuple[int, int]] = []
        with self._borrow_decoder() as decoder:
            for i, item in enumerate(items):
                if isinstance(item, np.ndarray):
                    pixels[i, ..., 0], shape = resize(item, self.input_spec), (item.shape[0], item.shape[1])
                else:
                    loaded = decoder.load(str(item))
                    if isinstance(loaded, Failure):
                        raise ImageError(loaded.code, f"{item}: {loaded.message}")
                    assert loaded.shape is not None
                    pixels[i, ..., 0], shape = loaded.images[0], loaded.shape
                shapes.append(shape)
        if not items:
            return []
        cam = self._cached_cam(method)
        number = 0 if finding is None else self.findings.index(finding)
        numbers = np.full((len(items), 1), number, np.int32)
        maps, p = cam.explain(pixels, numbers)
        order = predictions.order_findings(p, self.rules)
        if finding is None:
            numbers = order[:, :1].astype(np.int32)
            maps, p = cam.explain(pixels, numbers)
        return [
            HeatMap(
                image_id=f"array_{i}" if isinstance(item, np.ndarray) else file_name(str(item)),
                finding=self.findings[numbers[i, 0]],
                rank=1 + int(np.append(order[i], numbers[i]).tolist().index(numbers[i, 0])),  # No_Finding is the last
                p=float(p[i, numbers[i, 0]]),
                cells=maps[i, 0],
                area=compute_area(self.input_spec, *shapes[i]),
                image_shape=shapes[i],
                overlay=None,
            )
            for i, item in enumerate(items)
        ]

    def _cached_cam(self, method: HeatMapMethod) -> Any:
        """Return the object that computes heat maps, which takes seconds to build."""
        from ray_cxr.models import explain, occlusion  # `explain` imports Keras

        cache: dict[str, Any] = self.__dict__.setdefault("_cams", {})
        if method not in cache:
            cache[method] = (
                occlusion.Occlusion(self._cached_runtime(4, "auto"))
                if method == "occlusion"
                else explain.GradCam(self.model(), method)
            )
        return cache[method]

    @contextlib.contextmanager
    def _borrow_decoder(self) -> Iterator[Decoder]:
        """Yield a decoder that no other caller uses. Keep its child process, which takes 0.4 s to start."""
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
        """Pickle only the fields: runtimes and decoders belong to this process."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def _load_images(
    items: Sequence[Any], spec: InputSpec, decoder: Decoder
) -> tuple[np.ndarray, dict[int, tuple[str, str]], dict[int, tuple[str, ...]]]:
    """Resize arrays in this process and files in the decoder.

    Returns images uint8 [N,S,S]; by row of a failed file, its error code and message; by row of a read file, the flags
    of its header.
    """
    pixels = np.zeros((len(items), spec.size, spec.size), dtype=np.uint8)
    failures: dict[int, tuple[str, str]] = {}
    flags: dict[int, tuple[str, ...]] = {}
    for i, item in enumerate(items):
        if isinstance(item, np.ndarray):
            pixels[i] = resize(item, spec)
            continue
        result = decoder.load(str(item))
        if isinstance(result, Failure):
            failures[i] = (result.code, result.message)
        else:
            pixels[i], flags[i] = result.images[0], result.flags
    return pixels, failures, flags


def load_bundle(path: str | Path) -> Bundle:
    """Open a bundle after comparing every file with its SHA-256. No code of the bundle is executed.

    Raises:
        BundleError: not a bundle, a newer format, a missing, added or changed file, or inconsistent entries.
    """
    location = remote.to_path(path)
    local = remote.download_folder(location)
    try:
        return _load(local, str(location))
    except BundleError as error:
        # Name the bundle, which the reader must fix, and not its local copy.
        raise BundleError(str(error).replace(str(local), str(location))) from None


def is_written(path: Path) -> bool:
    """Return whether a path exists. In a bucket, return whether it holds SHA256SUMS, which is uploaded last."""
    return (path / SUMS).exists() if remote.as_store_path(path) else path.exists()


def _load(path: Path, location: str) -> Bundle:
    if not (path / "bundle.json").exists():
        inner = f"{location}/bundle" if (path / "bundle" / "bundle.json").exists() else "RUN/bundle of `ray-cxr train`"
        raise BundleError(contents.explain(location, "a bundle (no bundle.json)", f"pass a bundle, e.g. {inner}"))
    info = _read_info(path)
    if type(info.get("format")) is not int or info["format"] < 1:
        raise BundleError(f"{path}: bundle.json has no format; pass a bundle")
    if info["format"] > FORMAT:
        raise BundleError(
            f"{path}: format {info['format']} is newer than this ray-cxr reads ({FORMAT}); install a newer ray-cxr"
        )
    digest, files = _verify_files(path)
    try:
        checked = build(BundleInfo, info)
        bundle = Bundle(path, digest, checked.architecture, checked.input_spec, info, frozenset(files), location)
        bundle.rules  # noqa: B018  -- a bad calibration must fail here, not during a run
    except ConfigError as error:
        raise BundleError(f"{path}: bundle.json: {error}; copy the bundle again") from None
    findings = checked.findings
    if not set(findings) <= set(LABELS) or findings != bundle.findings or len(set(findings)) != len(findings):
        raise BundleError(
            f"{path}: findings do not agree: bundle.json lists {', '.join(findings)}, "
            f"the architecture {', '.join(bundle.findings)}; copy the bundle again"
        )
    for name in TABLES:
        if name in info and set(info[name]) != set(findings):
            raise BundleError(f"{path}: {name} must have exactly one entry for each of: {', '.join(findings)}")
    if bundle.input_spec.size != bundle.architecture.size:
        raise BundleError(
            f"{path}: the input spec is {bundle.input_spec.size} pixels, the model's input {bundle.architecture.size}"
        )
    _check_exported_files(bundle)
    return bundle


def _check_exported_files(bundle: Bundle) -> None:
    """Check that exactly the files that bundle.json refers to are present."""
    info = bundle.info
    expected = set() if bundle.is_graph else {WEIGHTS}
    expected |= {GOLDEN} & bundle.files  # a bundle without graphs may have it: Keras is compared with it
    if "runtimes" in info:
        expected |= {GOLDEN, "openvino.xml", "openvino.bin"}
        if "int8" in info["runtimes"]:
            expected |= {GOLDEN_INT8, "openvino-int8.xml", "openvino-int8.bin"}
    if info.get("quality") and "lacking" not in info["quality"]:
        expected |= {QUALITY}
    present = bundle.files & set(OPTIONAL_FILES)
    problems = [f"{SUMS} does not list {name}" for name in sorted(expected - present)]
    problems += [f"nothing refers to {name}" for name in sorted(present - expected)]
    if problems:
        raise BundleError(f"{bundle.path}: files differ from bundle.json: {'; '.join(problems)}; copy the bundle again")


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads((path / "bundle.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        info = None
    if not isinstance(info, dict):
        raise BundleError(f"{path}: bundle.json is not a readable JSON object; copy the bundle again")
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
    foreign = ", ".join(sorted(set(listed) - {*FILES, *OPTIONAL_FILES})[:5])
    if foreign:
        raise BundleError(f"{path}: {SUMS} lists {foreign}, not part of the bundle format; do not use this bundle")
    for name, expected in listed.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{path}: {name} is missing; the bundle is incomplete, copy it again")
        if hash_file(file) != expected:
            raise BundleError(f"{path}: {name} was changed ({_explain_change(file, expected)}")
    if b"\r" in sums:  # checked last, so that after a conversion by git the error names the model card, a familiar file
        raise BundleError(f"{path}: {SUMS} was changed ({_CRLF}")
    extra = sorted(
        item.name
        for item in path.iterdir()
        if item.name not in {*listed, SUMS, *_IGNORED} and not is_system_file(item.name)
    )
    if extra:
        raise BundleError(f"{path}: contains {', '.join(extra[:5])}, which is not part of the bundle; remove it")
    return hashlib.sha256(sums).hexdigest(), set(listed)


def _explain_change(file: Path, expected: str) -> str:
    """Return why the SHA-256 of a file is not `expected`, and the remedy, as the rest of a message."""
    with open(file, "rb") as stream:
        data = stream.read(_MAX_TEXT_BYTES)
    if data.startswith(b"version https://git-lfs.github.com/spec/"):
        return "it is a pointer of Git LFS); run `git lfs pull`, or copy the bundle again"
    if hashlib.sha256(data.replace(b"\r\n", b"\n")).hexdigest() == expected:
        return _CRLF
    return "SHA-256 differs); copy the bundle again"
