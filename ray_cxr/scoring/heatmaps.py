"""`score --heatmaps K`: a second pass that draws heat maps of the K highest-ranked and of the flagged findings.

`imaging.overlays` describes the files. As with scores, a range whose file is missing is pending, and a repeated range
writes the same file. A file of maps is written after its overlays. It holds the digest of its file of scores: when rows
are scored again, their maps are drawn again. This pass only reads scores.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_cxr import telemetry
from ray_cxr.config import HeatMapImages, HeatMapMethod, InputSpec, ScoreSettings
from ray_cxr.data.partition import Range
from ray_cxr.errors import RETRYABLE_CODES, ConfigError, OutputError
from ray_cxr.imaging.overlays import (
    EMPTY,
    HEATMAPS,
    OVERLAY_TYPES,
    SCHEMA,
    compute_area,
    crop_padding,
    draw_overlay,
    encode_jpeg,
    overlay_name,
)
from ray_cxr.imaging.sandbox import DecodedImage
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.models import predictions, runtime
from ray_cxr.models.bundle import Bundle
from ray_cxr.models.occlusion import Occlusion
from ray_cxr.scoring import ranges
from ray_cxr.scoring.pool import PoolActor
from ray_cxr.scoring.ranges import ProgressFile, RangeState, RowLocation, ScoreJob, ScoreTask, TaskResult, part_path
from ray_cxr.scoring.reader import ImageReader
from ray_cxr.storage import atomic, remote

if TYPE_CHECKING:
    from ray_cxr.models.explain import GradCam

#: Images per forward pass, without and with a GPU.
BATCH_SIZE = {False: 16, True: 64}
#: Maximum difference of a probability between scoring and drawing. No precision explains more: the image has changed.
MAX_DRIFT = 0.25
#: Error code of an image that changed after scoring, in addition to `errors.ERROR_CODES`.
CHANGED = "changed"
_OVERLAYS = get_args(HeatMapImages)
#: Key of the entry that describes a file of maps in its metadata.
_KEY = b"ray_cxr.heatmaps"


@dataclass(frozen=True)
class HeatMapRequest:
    """Heat maps to draw: at least `count` per image, and for `overlays` of them an image of `side` pixels."""

    count: int
    method: HeatMapMethod
    side: int
    overlays: HeatMapImages = "flagged"


@dataclass
class HeatMapReport:
    """The heat maps in a folder, and what a run added.

    Attributes:
        images: number of images that have maps, those of earlier runs included.
        maps: number of maps of these images.
        overlays: number of maps with evidence that are also drawn over their image.
        flagged: number of flagged findings in these images.
        flagged_without_map: number of flagged findings without a map, in files of earlier versions.
        without_evidence: number of maps that are zero everywhere.
        flagged_empty: number of these that are of flagged findings.
        failures: number of images that were scored but not drawn, by error code.
        drawn_now: number of images that this run drew.
        to_draw: in a dry run, the number of rows in ranges without maps.
        seconds: wall time that this run took for maps.
    """

    images: int = 0
    maps: int = 0
    overlays: int = 0
    flagged: int = 0
    flagged_without_map: int = 0
    without_evidence: int = 0
    flagged_empty: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    drawn_now: int = 0
    to_draw: int = 0
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float | None:
        return self.drawn_now / self.seconds if self.drawn_now and self.seconds else None

    def lines(self) -> list[str]:
        """Describe the report, for the terminal."""
        lines = [f"heat maps: {self.maps:,} for {self.images:,} images, stored in {HEATMAPS}/*.parquet"]
        if self.overlays:
            lines.append(f"heat maps: {self.overlays:,} of them also saved as images for viewing, {HEATMAPS}/*.jpg")
        if self.images_per_second is not None:
            rate = f"{self.images_per_second:.1f} images/s, start-up included"
            lines.append(f"heat maps: {self.drawn_now:,} images in {self.seconds:.0f} s ({rate})")
        if self.without_evidence:
            lines.append(f"heat maps: {self.without_evidence:,} of {self.maps:,} are empty: {EMPTY}")
        if self.flagged_without_map:
            lines.append(
                f"heat maps: {self.flagged_without_map:,} of {self.flagged:,} flagged findings have none, because an "
                f"earlier version drew the K highest only; remove the folder {HEATMAPS} to draw them again"
            )
        if self.failures:
            codes = ", ".join(f"{code} {n:,}" for code, n in self.failures.most_common())
            lines.append(f"heat maps: {self.failures.total():,} images that were scored could not be drawn: {codes}")
        return lines

    def to_record(self, request: HeatMapRequest) -> dict[str, Any]:
        """Return the entry of `run.json`."""
        rate = self.images_per_second
        return {
            **asdict(request),
            "images": self.images,
            "maps": self.maps,
            "drawn": self.overlays,
            "flagged": self.flagged,
            "flagged_without_map": self.flagged_without_map,
            "without_evidence": self.without_evidence,
            "flagged_empty": self.flagged_empty,
            "failed": dict(sorted(self.failures.items())),
            "last_run": {
                "images": self.drawn_now,
                "seconds": round(self.seconds, 3),
                "images_per_second": None if rate is None else round(rate, 3),
            },
        }


def make_request(bundle: Bundle, settings: ScoreSettings, count: int) -> HeatMapRequest:
    """Return the request of `--heatmaps count`, with at most one map per finding of the bundle."""
    if count < 1:
        raise ConfigError(f"--heatmaps {count}: must be at least 1")
    diseases = len(set(bundle.findings) - {NO_FINDING})
    if not diseases:
        raise ConfigError(f"--heatmaps: the bundle predicts only {NO_FINDING}, which has no location in an image")
    if bundle.input_spec.tiles:
        raise ConfigError(
            f"--heatmaps: {bundle.location} averages models of different inputs; draw the heat maps of one of them"
        )
    if bundle.is_graph and settings.heatmap_method != "occlusion":
        raise ConfigError(
            f"--heatmaps: {bundle.location} holds only a graph, without the layers that {settings.heatmap_method} "
            "needs; add --set heatmap_method=occlusion, which is slower"
        )
    return HeatMapRequest(
        min(count, diseases), settings.heatmap_method, settings.heatmap_pixels, settings.heatmap_images
    )


def map_path(out: Path, index: int) -> Path:
    return part_path(out, index, HEATMAPS)


def count_failures(part: pa.NativeFile | None) -> int | None:
    """Return the number of images that a file of maps lists as failed; None if the file is incomplete."""
    state = _read_state(part)
    return None if state is None else int(state["failures"])


def find_pending(out: Path, indices: Iterable[int], run: str, request: HeatMapRequest, *, retry: bool) -> set[int]:
    """Return the numbers of ranges whose maps are missing or out of date, and with `retry` also with retryable errors.

    `run` is the digest of the settings that the scores were made with.

    Raises:
        OutputError: the folder holds maps of another method or size.
    """
    pending = set()
    indices = sorted(indices)
    for index, part in zip(indices, remote.read_files(map_path(out, index) for index in indices), strict=True):
        state = _read_state(part)
        if state is None or state["run"] != run:
            pending.add(index)
            continue
        changed = [name for name in ("method", "side") if state[name] != getattr(request, name)]
        if changed:
            shown = ", ".join(f"{name} {state[name]} (now {getattr(request, name)})" for name in changed)
            raise OutputError(f"{out / HEATMAPS}: holds heat maps with {shown}; remove that folder to draw them again")
        # Earlier versions drew every map over its image. Files that hold more than requested stay.
        fewer = _OVERLAYS.index(state.get("overlays", "all")) < _OVERLAYS.index(request.overlays)
        outdated = fewer or state["count"] < request.count or state["scores"] != _digest_file(part_path(out, index))
        if outdated or (retry and state["retryable"]):
            pending.add(index)
    return pending


def widen_request(out: Path, pending: Iterable[int], run: str, request: HeatMapRequest) -> HeatMapRequest:
    """Return the request to draw the ranges `pending` with: what any of their files of maps holds already stays."""
    for part in remote.read_files(map_path(out, index) for index in sorted(pending)):
        state = _read_state(part)
        if state is not None and state["run"] == run:
            overlays = max(state.get("overlays", "all"), request.overlays, key=_OVERLAYS.index)
            request = replace(request, count=max(state["count"], request.count), overlays=overlays)
    return request


def choose_findings(ranked: np.ndarray, flags: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the findings that get a map: the `count` highest of each image, and its flagged ones below them.

    Args:
        ranked: numbers of the findings from the highest to the lowest, int [n,D].
        flags: whether each finding is flagged, bool [n,F].

    Returns:
        Numbers and ranks (from 1) of the findings, int [n,M], in order of rank. An image with fewer than M of them has
        others at the end, of rank 0, that get no map. M is a multiple of `count`.
    """
    has_map = np.take_along_axis(flags, ranked, axis=1)
    has_map[:, :count] = True
    width = -(-int(has_map.sum(axis=1).max()) // count) * count
    places = np.argsort(~has_map, axis=1, kind="stable")[:, :width]
    ranks = np.where(np.take_along_axis(has_map, places, axis=1), places + 1, 0)
    padding = ((0, 0), (0, width - places.shape[1]))
    return np.pad(np.take_along_axis(ranked, places, axis=1), padding), np.pad(ranks, padding)


def choose_overlays(overlays: HeatMapImages, chosen: np.ndarray, flags: np.ndarray | None) -> np.ndarray:
    """Return which maps are drawn over their image, bool [n,K]; see `config.ScoreSettings.heatmap_images`.

    Args:
        chosen: numbers of the findings that have a map, by rank, int [n,K].
        flags: whether each finding is flagged, bool [n,F]; None if the model has no operating points.
    """
    if overlays != "flagged":
        return np.full(chosen.shape, overlays == "all")
    if flags is None:
        return np.broadcast_to(np.arange(chosen.shape[1]) == 0, chosen.shape)
    return np.take_along_axis(flags, chosen, axis=1)


def encode_overlay(image: DecodedImage, cells: np.ndarray, spec: InputSpec, side: int) -> bytes:
    """Return the JPEG of a map over its image.

    Args:
        image: was decoded to the model's input `spec`, and then to `describe_shown(side)`.
    """
    assert image.shape is not None
    shown = crop_padding(image.images[1], describe_shown(side), image.shape)
    return encode_jpeg(draw_overlay(shown, cells, compute_area(spec, *image.shape), side=side))


def describe_shown(side: int) -> InputSpec:
    """Return how overlays show an image."""
    return InputSpec(size=side, aspect="pad")


def count_maps(out: Path, all_ranges: Sequence[Range], bundle: Bundle) -> HeatMapReport:
    """Count maps from their files, and check that each scored image has its maps or an error."""
    report = HeatMapReport()
    maps = remote.read_files(map_path(out, range_.index) for range_ in all_ranges)
    scores = remote.read_files(part_path(out, range_.index) for range_ in all_ranges)
    for range_, map_file, score_file in zip(all_ranges, maps, scores, strict=True):
        part = map_path(out, range_.index)
        columns = [f"{kind}_{name}" for name in bundle.findings for kind in ("p", "flag")]
        rows = _read_scored(part_path(out, range_.index), score_file, ["image_id", *columns])
        scored = rows["image_id"].to_pylist()
        table = ranges.read_part(part, map_file, ["image_id", "finding", "evidence", "overlay", "error_code"])
        ids = table["image_id"].to_pylist()
        if list(dict.fromkeys(ids)) != scored:
            raise OutputError(f"{part}: does not match its file of scores; remove it and run score again")
        codes = table["error_code"].drop_null().to_pylist()
        failed = set(table.filter(table["error_code"].is_valid())["image_id"].to_pylist())
        flags = _stack_columns(rows, "flag_", bundle.findings, False).astype(bool)
        flagged = {
            (scored[row], bundle.findings[number])
            for row, number in np.argwhere(flags).tolist()
            if scored[row] not in failed and bundle.findings[number] != NO_FINDING
        }
        report.flagged += len(flagged)
        report.flagged_without_map += len(flagged - set(zip(ids, table["finding"].to_pylist(), strict=True)))
        report.failures.update(codes)
        report.images += len(scored) - len(codes)
        report.maps += len(ids) - len(codes)
        has_evidence = pc.not_equal(table["evidence"], 0)
        # Earlier versions also drew maps without evidence, as the gray image.
        report.overlays += table.filter(has_evidence)["overlay"].is_valid().to_pylist().count(True)
        report.without_evidence += has_evidence.to_pylist().count(False)
        cells = zip(ids, table["finding"].to_pylist(), table["evidence"].to_pylist(), strict=True)
        report.flagged_empty += len(flagged & {(name, finding) for name, finding, evidence in cells if evidence == 0})
    return report


def remove_maps(out: Path) -> None:
    """Remove the maps of an earlier run, and no other files."""
    folder = out / HEATMAPS
    remote.remove_files(folder.glob("part-*.parquet"))
    remote.remove_files(folder / name for name in list_overlays(out))
    remove_partial_files(out)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def list_overlays(out: Path) -> set[str]:
    """Return the names of the files in the folder of maps that are named like overlays."""
    endings = tuple(f".{name}{suffix}" for name in LABELS for suffix in OVERLAY_TYPES)
    return {path.name for path in (out / HEATMAPS).glob("*.*") if path.name.endswith(endings)}


def remove_orphans(out: Path, found: set[str], all_ranges: Sequence[Range]) -> None:
    """Remove those of the overlays `found` that no file of maps lists, left by killed runs with other settings."""
    if not found:
        return
    parts = [map_path(out, range_.index) for range_ in all_ranges]
    for part, file in zip(parts, remote.read_files(parts), strict=True):
        found = found.difference(ranges.read_part(part, file, ["overlay"])["overlay"].to_pylist())
    remote.remove_files(out / HEATMAPS / name for name in found)


def remove_partial_files(out: Path) -> None:
    """Remove the incomplete files of killed workers."""
    for pattern in (".part-*.part", *(f".*{suffix}.*.part" for suffix in OVERLAY_TYPES)):
        remote.remove_files((out / HEATMAPS).glob(pattern))


def _read_state(part: pa.NativeFile | None) -> dict[str, Any] | None:
    """Return the entry that `HeatMapWriter.flush` writes to the metadata; None if the file is missing or damaged."""
    try:
        state = json.loads((ranges.read_metadata(part) or {})[_KEY])
    except (ValueError, KeyError):
        return None
    return state if isinstance(state, dict) else None


def _digest_file(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def _read_scored(part: Path, file: pa.NativeFile | None, columns: list[str]) -> pa.Table:
    """Return the rows of a file of scores that have no error."""
    table = ranges.read_part(part, file, [*columns, "status"])
    return table.filter(pc.equal(table["status"], "ok"))


class HeatMapWriter:
    """Draws the maps of a task's images, and writes a file of maps per range."""

    def __init__(self, actor: HeatMapActor, states: Sequence[RangeState]) -> None:
        self._actor, self._job, self._states = actor, actor.job, states
        self._digests = [_digest_file(part_path(self._job.folder, state.index)) for state in states]
        self._p = [_stack_columns(state.rows, "p_", actor.findings, np.nan).astype(np.float32) for state in states]
        #: Whether each finding is flagged, bool [rows,F], by range.
        self._flags = [_stack_columns(state.rows, "flag_", actor.findings, False).astype(bool) for state in states]
        self._has_flags = any(
            state.rows[f"flag_{name}"].null_count < len(state.rows) for state in states for name in actor.findings
        )
        #: Rows of the file of maps, by row of the range.
        self._maps: list[dict[int, list[dict[str, Any]]]] = [{} for _ in states]
        self._batch: list[tuple[RowLocation, DecodedImage]] = []
        self._progress = [ProgressFile(map_path(self._job.folder, state.index)) for state in states]

    def add(self, location: RowLocation, image: DecodedImage) -> list[RowLocation]:
        self._batch.append((location, image))
        return self.finish() if len(self._batch) == self._job.batch_size else []

    def finish(self) -> list[RowLocation]:
        batch, self._batch = self._batch, []
        if not batch:
            return []
        p = np.stack([self._p[range_position][row] for (range_position, row), _ in batch])
        flags = np.stack([self._flags[range_position][row] for (range_position, row), _ in batch])
        chosen, ranks = self._actor.choose_findings(p, flags)
        drawn = choose_overlays(self._actor.request.overlays, chosen, flags if self._has_flags else None)
        # All batches have one size, so that the model is traced once.
        side, padding = self._job.spec.size, self._job.batch_size - len(batch)
        images = np.zeros((self._job.batch_size, side, side, 1), np.uint8)
        images[: len(batch), ..., 0] = [image.images[0] for _, image in batch]
        start = time.monotonic()
        maps, new_p = self._explain(images, np.pad(chosen.astype(np.int32), ((0, padding), (0, 0))))
        telemetry.add_inference("heatmaps", time.monotonic() - start)
        drawings = []
        for n, (location, image) in enumerate(batch):
            if np.abs(new_p[n] - p[n]).max() <= MAX_DRIFT:
                given = (chosen[n], ranks[n], drawn[n], p[n], maps[n])
                drawings.append(self._actor.pool.submit(self._draw, location, image, *given))
            else:
                state = self._states[location.range_position]
                state.failures[location.row] = (CHANGED, "the image changed after scoring; score it again")
        for drawing in drawings:
            drawing.result()
        for position in {location.range_position for location, _ in batch}:
            self._progress[position].write(len(self._maps[position]) + len(self._states[position].failures))
        return [location for location, _ in batch]

    def _explain(self, images: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the maps of the findings [n,M] and the probabilities; each call has as many findings per image."""
        count = self._actor.request.count
        parts = [
            self._actor.cam.explain(images, chosen[:, start : start + count])
            for start in range(0, chosen.shape[1], count)
        ]
        return np.concatenate([maps for maps, _ in parts], axis=1), parts[0][1]

    def _draw(
        self,
        location: RowLocation,
        image: DecodedImage,
        chosen: np.ndarray,
        ranks: np.ndarray,
        drawn: np.ndarray,
        p: np.ndarray,
        maps: np.ndarray,
    ) -> None:
        """Write an image's overlays, and keep its rows for the file of maps."""
        actor = self._actor
        assert image.shape is not None
        height, width = image.shape
        area = compute_area(self._job.spec, height, width)
        image_id = self._states[location.range_position].rows["image_id"][location.row].as_py()
        rows = []
        for number, rank, is_drawn, cells in zip(chosen.tolist(), ranks.tolist(), drawn, maps, strict=True):
            if not rank:
                continue
            finding = actor.findings[number]
            name = None
            if is_drawn and cells.any():
                name = overlay_name(image_id, finding)
                data = encode_overlay(image, cells, self._job.spec, actor.request.side)
                atomic.write_bytes(self._job.folder / HEATMAPS / name, data)
            row = {
                "image_id": image_id,
                "finding": finding,
                "rank": rank,
                "p": p[number],
                "evidence": cells.sum(),
                "height": cells.shape[0],
                "width": cells.shape[1],
                "map": cells.ravel(),
                **area._asdict(),
                "picture_height": height,
                "picture_width": width,
                "overlay": name,
            }
            rows.append(row)
        self._maps[location.range_position][location.row] = rows

    def flush(self, range_position: int) -> tuple[int, int]:
        """Write the maps of a range; return the number of the range and how many of its images have maps."""
        state, maps, job = self._states[range_position], self._maps[range_position], self._job
        job.check_run()
        for row, (code, message) in state.failures.items():
            maps[row] = [{"image_id": state.rows["image_id"][row].as_py(), "error_code": code, "error": message}]
        codes = [code for code, _ in state.failures.values()]
        record = {
            "run": job.run_digest,
            "scores": self._digests[range_position],
            **asdict(self._actor.request),
            "failures": len(codes),
            "retryable": sum(code in RETRYABLE_CODES for code in codes),
        }
        table = pa.Table.from_pylist([row for i in sorted(maps) for row in maps[i]], SCHEMA)
        path = map_path(job.folder, state.index)
        old_overlays = _list_overlays(path)
        atomic.write_parquet(table.replace_schema_metadata({_KEY: json.dumps(record)}), path, compression="zstd")
        self._progress[range_position].remove()
        telemetry.add_written(telemetry.IMAGES_DRAWN, "heatmaps", len(maps), codes)
        for name in old_overlays - set(table["overlay"].to_pylist()):
            (path.parent / name).unlink(missing_ok=True)
        drawn = len(maps) - len(codes)
        maps.clear()
        return state.index, drawn


def _list_overlays(part: Path) -> set[str]:
    """Return the names of the overlays that a file of maps lists; none for a file of another program."""
    file = remote.read_file(part)
    if _read_state(file) is None:
        return set()
    names = ranges.read_part(part, file, ["overlay"])["overlay"].to_pylist()
    return {name for name in names if name and "/" not in name and name.endswith(OVERLAY_TYPES)}


def _stack_columns(rows: pa.Table, prefix: str, findings: Sequence[str], missing: Any) -> np.ndarray:
    """Return one column of scores per finding: [rows,F], with `missing` for null."""
    return np.column_stack([rows[f"{prefix}{name}"].fill_null(missing).to_numpy() for name in findings])


class HeatMapActor(PoolActor):
    """Decodes images, runs the model with gradients, and draws; each of the three uses up to `cpus` threads."""

    command = "score --heatmaps"

    def open(self, job: ScoreJob, request: HeatMapRequest, cpus: int) -> None:
        bundle = job.load_bundle()
        self.job, self.request, self.findings, self._rules = job, request, bundle.findings, bundle.rules
        if job.use_gpu:
            runtime.require_gpu()
        self.cam = self._open_model(bundle, cpus)
        self.pool = ThreadPoolExecutor(cpus, thread_name_prefix="draw")
        shown = [] if request.overlays == "none" else [describe_shown(request.side)]
        self._reader = ImageReader(job, cpus, shown, "heatmaps")

    def _open_model(self, bundle: Bundle, cpus: int) -> GradCam | Occlusion:
        if self.request.method == "occlusion":
            return Occlusion(
                bundle.open_runtime(
                    self.job.precision,
                    batch_size=self.job.batch_size,
                    threads=cpus,
                    gpu=self.job.use_gpu,
                    jit_compile=self.job.settings.jit_compile,
                )
            )
        if not self.job.use_gpu and "keras" not in sys.modules:
            runtime.limit_threads(cpus)
        from ray_cxr.models.explain import GradCam  # imports Keras, whose threads are limited by now

        return GradCam(bundle.model(), self.request.method)

    def choose_findings(self, p: np.ndarray, flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers and ranks of the findings that get a map, int [n,M]; the first is the scores' top_finding."""
        return choose_findings(predictions.order_findings(p, self._rules), flags, self.request.count)

    def run(self, row: dict[str, Any]) -> TaskResult:
        task, job = ScoreTask.from_row(row), self.job
        indices = {range_.index for range_ in task.ranges}
        if not task.retry:
            # Ray repeats a task whose worker was lost: ranges that it had drawn stay as they are.
            indices = find_pending(job.folder, indices, job.run_digest, self.request, retry=False)
        columns = ["image_id", "path", *(f"{kind}_{name}" for name in self.findings for kind in ("p", "flag"))]
        paths = {index: part_path(job.folder, index) for index in sorted(indices)}
        states = [RangeState(i, _read_scored(path, remote.read_file(path), columns)) for i, path in paths.items()]
        files = list(ranges.fill_ranges(states, self._reader.iter_images(states), HeatMapWriter(self, states)))
        return TaskResult([index for index, _ in files], sum(images for _, images in files))
