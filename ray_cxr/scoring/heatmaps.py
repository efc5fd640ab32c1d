"""`score --heatmaps K`: a second pass over what was scored, that draws the K highest-ranked findings of each picture.

    SCORES/heatmaps/part-00000.parquet, ...     one for each file of scores; `data.heatmaps` says what is in it
    SCORES/heatmaps/<image>.<Finding>.png       the maps over their pictures

As for scores: fixed names, whole or absent, what is not there is what remains, and a repeated range writes the same
again. A file of maps is written after its pictures, and says which file of scores it was drawn for, so that maps of
rows that were scored anew are drawn anew. Scores are read here and never written.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr import telemetry
from ray_cxr.config import HeatMapMethod, InputSpec, ScoreSettings
from ray_cxr.data.ranges import Range, Unit
from ray_cxr.errors import RETRYABLE_CODES, ConfigError, OutputError, RayCxrError
from ray_cxr.imaging.overlays import FOLDER, SCHEMA, area_of, overlay_name
from ray_cxr.imaging.sandbox import DecodedImage, Failure
from ray_cxr.labels import LABELS, NO_FINDING
from ray_cxr.models import predictions, runtime
from ray_cxr.models.bundle import Bundle
from ray_cxr.scoring.engine import Job, Place, Reading, Work, part_name, part_path
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.run_folder import SETTINGS
from ray_cxr.tasks import SUCCESS, encode_error, sanitize_error

#: Images per forward pass, without and with a GPU.
BATCH_SIZE = {False: 16, True: 64}
#: A probability that moved by more than this between scoring and drawing is another picture's: no precision does that.
MAX_DRIFT = 0.25
#: Code of a picture that is not the one that was scored; beside those of `errors.ERROR_CODES`.
CHANGED = "changed"
#: Key of a file's metadata.
_KEY = b"ray_cxr.heatmaps"


@dataclass(frozen=True)
class Asked:
    """What is to be drawn.

    Attributes:
        count: maps per image.
        method: see `models.explain`.
        side: of an overlay's longer side, pixels.
    """

    count: int
    method: HeatMapMethod
    side: int


@dataclass
class HeatMapReport:
    """What the heat maps of a folder are, and what a run added.

    Attributes:
        per_image: maps asked for per image.
        images: that have maps.
        maps: in all, those of earlier runs included.
        without_evidence: maps of zeros.
        failures: images scored and not drawn, by code.
        drawn_now: images that this run drew.
        to_draw: of a dry run: rows that are in ranges without maps.
        seconds: this run's wall time for maps.
    """

    per_image: int
    images: int = 0
    maps: int = 0
    without_evidence: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    drawn_now: int = 0
    to_draw: int = 0
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float | None:
        return self.drawn_now / self.seconds if self.drawn_now and self.seconds else None

    def lines(self) -> list[str]:
        """For people."""
        found = [f"heat maps: {self.maps:,} for {self.images:,} images"]
        if self.images_per_second is not None:
            rate = f"{self.images_per_second:.1f} images/s, start-up included"
            found[0] += f"; {self.drawn_now:,} images drawn now in {self.seconds:.0f} s ({rate})"
        if self.without_evidence:
            found.append(
                f"heat maps: {self.without_evidence:,} are empty: nothing in the picture speaks for the finding"
            )
        if self.failures:
            codes = ", ".join(f"{code} {n:,}" for code, n in self.failures.most_common())
            found.append(f"heat maps: {self.failures.total():,} images that were scored could not be drawn: {codes}")
        return found

    def record(self, asked: Asked) -> dict[str, Any]:
        """What `run.json` says."""
        rate = self.images_per_second
        return {
            **asdict(asked),
            "images": self.images,
            "maps": self.maps,
            "without_evidence": self.without_evidence,
            "failed": dict(sorted(self.failures.items())),
            "last_run": {
                "images": self.drawn_now,
                "seconds": round(self.seconds, 3),
                "images_per_second": None if rate is None else round(rate, 3),
            },
        }


def asked_of(bundle: Bundle, settings: ScoreSettings, count: int) -> Asked:
    """What `--heatmaps count` asks of a bundle; more than it has findings are all of them.

    Raises:
        ConfigError: less than one, or the bundle has none but No_Finding.
    """
    if count < 1:
        raise ConfigError(f"--heatmaps {count}: give at least 1")
    diseases = len(_diseases(bundle.findings))
    if not diseases:
        raise ConfigError(f"--heatmaps: the bundle tells only {NO_FINDING}, which has no place in a picture")
    return Asked(min(count, diseases), settings.heatmap_method, settings.heatmap_pixels)


def map_path(out: Path, index: int) -> Path:
    return out / FOLDER / part_name(index)


def failures_of(part: pa.NativeFile | None) -> int | None:
    """How many images of a file of maps have none; None where there is no whole file."""
    state = _state(part)
    return None if state is None else int(state["failures"])


def remaining(out: Path, indices: Iterable[int], run: str, asked: Asked, *, retry: bool) -> set[int]:
    """Which of these ranges maps are to be drawn for.

    Args:
        indices: numbers of ranges.
        run: digest of the settings that the scores were made with.
        retry: also those with images whose error may have passed.

    Raises:
        OutputError: the folder holds maps of another method or size.
    """
    left = set()
    indices = sorted(indices)
    for index, part in zip(indices, remote.contents(map_path(out, index) for index in indices), strict=True):
        state = _state(part)
        if state is None or state["run"] != run:
            left.add(index)
            continue
        other = [name for name in ("method", "side") if state[name] != getattr(asked, name)]
        if other:
            shown = ", ".join(f"{name} {state[name]} (now {getattr(asked, name)})" for name in other)
            raise OutputError(f"{out / FOLDER}: holds heat maps of another {shown}; remove that folder to draw anew")
        fewer = state["count"] < asked.count
        if fewer or state["scores"] != _digest(part_path(out, index)) or (retry and state["retryable"]):
            left.add(index)
    return left


def tasks(units: Sequence[Unit], left: set[int], *, retry: bool) -> list[dict[str, Any]]:
    """A task for each unit with ranges that are left: an archive is read once for all of its own."""
    chosen = ([one.index for one in unit.ranges if one.index in left] for unit in units)
    return [{"indices": indices, "retry": retry} for indices in chosen if indices]


def count(out: Path, ranges: Sequence[Range], asked: Asked) -> HeatMapReport:
    """Count the maps from their files, and check that each scored image has its own or an error.

    Raises:
        OutputError: a file is missing or damaged, or holds other images.
    """
    report = HeatMapReport(asked.count)
    maps = remote.contents(map_path(out, one.index) for one in ranges)
    rows = remote.contents(part_path(out, one.index) for one in ranges)
    for one, map_file, score_file in zip(ranges, maps, rows, strict=True):
        part = map_path(out, one.index)
        try:
            scored = _scored(score_file, ["image_id"])["image_id"].to_pylist()
            if map_file is None:
                raise FileNotFoundError
            found = pq.read_table(map_file, columns=["image_id", "finding", "evidence", "error_code"])
        except (OSError, pa.ArrowException):
            raise OutputError(f"{part}: is missing or damaged; remove it and run score again") from None
        ids = found["image_id"].to_pylist()
        if list(dict.fromkeys(ids)) != scored:
            raise OutputError(f"{part}: does not hold the images it should; remove it and run score again")
        codes = [code for code in found["error_code"].to_pylist() if code is not None]
        report.failures.update(codes)
        report.images += len(scored) - len(codes)
        report.maps += len(ids) - len(codes)
        report.without_evidence += sum(evidence == 0 for evidence in found["evidence"].to_pylist())
    return report


def remove(out: Path) -> None:
    """Remove an earlier run's maps, and nothing that a run did not write."""
    folder = out / FOLDER
    for pattern in ("part-*.parquet", *(f"*.{name}.png" for name in LABELS)):
        remote.remove(folder.glob(pattern))
    tidy(out)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def tidy(out: Path) -> None:
    """Remove what workers left half-written when they were killed."""
    for pattern in (".part-*.part", ".*.png.*.part"):
        for path in (out / FOLDER).glob(pattern):
            path.unlink(missing_ok=True)


def _diseases(findings: Sequence[str]) -> list[int]:
    return [number for number, name in enumerate(findings) if name != NO_FINDING]


def _state(part: pa.NativeFile | None) -> dict[str, Any] | None:
    """What a file of maps says of itself; None where there is no whole one."""
    if part is None:
        return None
    try:
        found = json.loads((pq.read_metadata(part).metadata or {})[_KEY])
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None
    return found if isinstance(found, dict) else None


def _digest(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def _scored(part: pa.NativeFile | None, columns: list[str]) -> pa.Table:
    """The rows of a file of scores that have scores.

    Raises:
        FileNotFoundError: there is none.
    """
    if part is None:
        raise FileNotFoundError
    table = pq.read_table(part, columns=[*columns, "status"])
    return table.filter(pa.array([status == "ok" for status in table["status"].to_pylist()], pa.bool_()))


class Drawing:
    """A network with gradients, and the files that its maps go into.

    Args:
        threads: for the network, and for drawing.
    """

    def __init__(self, job: Job, asked: Asked, threads: int) -> None:
        bundle = job.load()
        self._job, self._asked = job, asked
        self._findings, self._disease = bundle.findings, np.array(_diseases(bundle.findings))
        points = bundle.rules.thresholds
        self._thresholds = np.array([np.nan if (point := points.get(f)) is None else point for f in bundle.findings])
        if job.use_gpu:
            if not runtime.use_gpu_memory_as_needed():
                raise ConfigError("--gpu: this actor sees no GPU; is requirements-gpu.lock installed there?")
        elif "keras" not in sys.modules:
            runtime.limit_threads(threads)
        from ray_cxr.models import explain  # with Keras, whose threads are limited by now

        self._explain = explain
        self._cam = explain.GradCam(bundle.model(), asked.method)
        self._shown = InputSpec(size=asked.side, aspect="pad")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="draw")

    @property
    def more(self) -> tuple[InputSpec, ...]:
        """Sizes to decode beside the network's own."""
        return (self._shown,)

    def take_up(self, indices: Sequence[int]) -> list[Work]:
        """The scored rows of ranges, with their probabilities."""
        out = self._job.folder
        columns = ["image_id", "path", *(f"p_{name}" for name in self._findings)]
        works = []
        for index in indices:
            rows = _scored(remote.content(part_path(out, index)), columns)
            p = np.column_stack([rows[f"p_{name}"].to_numpy() for name in self._findings]).astype(np.float32)
            works.append(Work(index, rows, None, None, p, left=len(rows)))
        return works

    def draw(self, works: Sequence[Work], pictures: Iterator[tuple[Place, DecodedImage | Failure]]) -> Iterator[int]:
        """Take pictures in any order; write a range when its last one is there.

        Yields:
            Per file written how many images it has maps of.
        """
        done: list[dict[int, list[dict[str, Any]]]] = [{} for _ in works]
        digests = [_digest(part_path(self._job.folder, work.index)) for work in works]
        batch: list[tuple[Place, DecodedImage]] = []
        for w, work in enumerate(works):
            if not work.left:
                yield self._write(work, done[w], digests[w])
        for (w, i), found in pictures:
            if isinstance(found, Failure):
                done[w][i] = [self._failed(works[w], i, found.code, found.message)]
                settled = [w]
            else:
                batch.append(((w, i), found))
                settled = self._settle(works, batch, done) if len(batch) == self._job.batch_size else []
            for w in settled:
                yield from self._finished(works[w], done[w], digests[w])
        for w in self._settle(works, batch, done):
            yield from self._finished(works[w], done[w], digests[w])

    def _finished(self, work: Work, rows: dict[int, list[dict[str, Any]]], digest: str) -> Iterator[int]:
        if work.left and len(rows) == work.left:
            yield self._write(work, rows, digest)
            work.left = 0
            rows.clear()

    def _settle(
        self,
        works: Sequence[Work],
        batch: list[tuple[Place, DecodedImage]],
        done: Sequence[dict[int, list[dict[str, Any]]]],
    ) -> list[int]:
        """Draw a batch and empty it; returns the ranges that its pictures are of."""
        if not batch:
            return []
        p = np.stack([works[w].probabilities[i] for (w, i), _ in batch])
        chosen = self._top(p)
        size = self._job.batch_size
        images = np.zeros((size, self._job.spec.size, self._job.spec.size, 1), np.uint8)
        images[: len(batch), ..., 0] = [picture.images[0] for _, picture in batch]
        # Every batch is filled up to one size, so that the network is traced once.
        filled = np.zeros((size, chosen.shape[1]), np.int32)
        filled[: len(batch)] = chosen
        began = time.monotonic()
        maps, again = self._cam.explain(images, filled)
        telemetry.inferred("heatmaps", time.monotonic() - began)
        running = [
            self._pool.submit(self._rows, works[w], i, picture, chosen[n], p[n], again[n], maps[n])
            for n, ((w, i), picture) in enumerate(batch)
        ]
        for ((w, i), _), rows in zip(batch, running, strict=True):
            done[w][i] = rows.result()
        of = sorted({w for (w, _), _ in batch})
        batch.clear()
        return of

    def _top(self, p: np.ndarray) -> np.ndarray:
        """Numbers of the highest-ranked findings, int [n,K]; the first is the scores' top_finding."""
        ranks = predictions.ranks(p, self._thresholds)[:, self._disease]
        order = np.argsort(-ranks, axis=1, kind="stable")[:, : self._asked.count]
        return np.asarray(self._disease[order])

    def _rows(
        self,
        work: Work,
        i: int,
        picture: DecodedImage,
        chosen: np.ndarray,
        p: np.ndarray,
        again: np.ndarray,
        maps: np.ndarray,
    ) -> list[dict[str, Any]]:
        """Write an image's overlays; returns its rows."""
        if not np.abs(again - p).max() <= MAX_DRIFT:
            return [self._failed(work, i, CHANGED, "the picture is not the one that was scored; score it again")]
        assert picture.shape is not None
        height, width = picture.shape
        shown = self._explain.unpadded(picture.images[1], self._shown, picture.shape)
        area = area_of(self._job.spec, height, width)
        image_id = work.rows["image_id"][i].as_py()
        rows = []
        for rank, (number, cells) in enumerate(zip(chosen.tolist(), maps, strict=True), start=1):
            finding = self._findings[number]
            name = overlay_name(image_id, finding)
            png = self._explain.encode(self._explain.overlay(shown, cells, area, side=self._asked.side))
            atomic.write(self._job.folder / FOLDER / name, functools.partial(_write_bytes, data=png))
            rows.append(
                {
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
            )
        return rows

    def _failed(self, work: Work, i: int, code: str, message: str) -> dict[str, Any]:
        return {"image_id": work.rows["image_id"][i].as_py(), "error_code": code, "error": message}

    def _write(self, work: Work, rows: dict[int, list[dict[str, Any]]], digest: str) -> int:
        out = self._job.folder
        part = map_path(out, work.index)
        if (out / SETTINGS).read_bytes() != self._job.settings_file:
            raise RayCxrError(f"{out}: another run has begun there; this one stops")
        in_order = [row for i in sorted(rows) for row in rows[i]]
        codes = [row["error_code"] for row in in_order if "error_code" in row]
        state = {
            "run": self._job.run,
            "scores": digest,
            **asdict(self._asked),
            "failures": len(codes),
            "retryable": sum(code in RETRYABLE_CODES for code in codes),
        }
        table = pa.Table.from_pylist(in_order, SCHEMA).replace_schema_metadata({_KEY: json.dumps(state)})
        before = _overlays(part)
        atomic.write_parquet(table, part, compression="zstd")
        telemetry.wrote(telemetry.IMAGES_DRAWN, "heatmaps", len(rows), codes)
        for name in before - set(table["overlay"].to_pylist()):  # of scores that have changed since
            (part.parent / name).unlink(missing_ok=True)
        return len(rows) - len(codes)


def _overlays(part: Path) -> set[str]:
    """Names of pictures that a file of maps lists; those of a foreign file are none of ours."""
    file = remote.content(part)
    if _state(file) is None:
        return set()
    names = pq.read_table(file, columns=["overlay"])["overlay"].to_pylist()
    return {name for name in names if name and "/" not in name and name.endswith(".png")}


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


class HeatMapActor:
    """Decoding, network and drawing in one Ray actor."""

    def __init__(self, job: Job, asked: Asked, cpus: int) -> None:
        self._job, self._asked = job, asked
        self._failed: RayCxrError | None = None
        try:
            self._drawing = Drawing(job, asked, cpus)
            self._reading = Reading(job, cpus, self._drawing.more, "heatmaps")
        except Exception as error:
            self._failed = sanitize_error(error, "score --heatmaps")  # by the first call

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        if self._failed is not None:
            return _answer(0, self._failed)
        try:
            indices = {int(index) for index in task["indices"]}
            if not task["retry"]:
                # Where Ray does a task again, because a worker was lost, what it had drawn stays as it is.
                indices = remaining(self._job.folder, indices, self._job.run, self._asked, retry=False)
            works = self._drawing.take_up(sorted(indices))
            return _answer(sum(self._drawing.draw(works, self._reading.iter_images(works))), done=sorted(indices))
        except Exception as error:
            return _answer(0, sanitize_error(error, "score --heatmaps"))


def _answer(images: int, failed: RayCxrError | None = None, *, done: Sequence[int] = ()) -> dict[str, Any]:
    """Return the row of a task."""
    return {"images": images, "done": list(done), **(SUCCESS if failed is None else encode_error(failed))}
