"""The first step of `score`: check the request and find the pending ranges, without Ray and without writing."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ray_cxr.config import PacsSettings, ScoreSettings
from ray_cxr.data.features import FEATURES
from ray_cxr.data.partition import Range, Unit, first_location, plan_units
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.errors import RETRYABLE_CODES, ConfigError, OutputError
from ray_cxr.models.bundle import Bundle, load_bundle
from ray_cxr.models.runtime import TOLERANCE, Usage, choose_precision
from ray_cxr.scoring import heatmaps, inputs
from ray_cxr.scoring.actors import make_pseudonym
from ray_cxr.scoring.earlier import read_earlier
from ray_cxr.scoring.heatmaps import HeatMapReport, HeatMapRequest
from ray_cxr.scoring.pool import ActorPlan
from ray_cxr.scoring.ranges import (
    INPUT,
    SCORES,
    PreparedSource,
    ScoreTask,
    list_parts,
    make_tasks,
    part_path,
    read_part,
)
from ray_cxr.scoring.selection import Marks, Selection, leave_out_scored, select_frontal
from ray_cxr.storage import dicomweb, remote, run_folder
from ray_cxr.storage.paths import is_dicomweb, make_absolute, name_search, redact

KIND = "score"
#: Version of the score table. Until 2, priority was the highest rank relative to the operating point.
FORMAT = 3
#: Shares of waiting from which the summary names them, in runs of at least this many seconds of all models.
_MIN_SHARE, _MIN_USAGE_S = 0.25, 10.0
REMEDY = "use --fresh to start over, or choose another --out"
#: Values of settings that settings.json may lack.
_DEFAULTS: dict[str, Any] = {
    "tta": 1,
    "prepared": None,
    "features": False,
    "select": "all",
    "skip_scored": False,
    "manifest_digest": None,
}


@dataclass(frozen=True)
class ScoreRequest:
    """One call of `score`.

    Attributes:
        model: folder of a bundle, on storage that all nodes share.
        out: folder for the scores, on storage that all nodes share.
        manifest, images, prepared: the input: a manifest, a folder or URI of images or a search of a PACS, or a folder
            of `prepare`; exactly one of them is set.
        pacs: how to reach a PACS that has images.
        fresh: remove an earlier run in `out` first.
        retry_errors: score rows again whose error code is retryable.
        limit: maximum number of rows to score.
        skip_scored: folders of earlier scores, or patterns of folders, whose images are left out.
        heatmaps: number of heat maps per image, drawn after scoring.
        features: write the features of each image, too.
        started_at: start of the command, seconds since 1970; None: now.
    """

    model: str | Path
    out: str | Path
    settings: ScoreSettings
    manifest: str | None = None
    images: str | None = None
    prepared: str | None = None
    fresh: bool = False
    retry_errors: bool = False
    limit: int | None = None
    use_gpu: bool = False
    heatmaps: int | None = None
    features: bool = False
    skip_scored: tuple[str, ...] = ()
    started_at: float | None = None
    pacs: PacsSettings = field(default_factory=PacsSettings)

    def __post_init__(self) -> None:
        if sum(source is not None for source in (self.manifest, self.images, self.prepared)) != 1:
            raise ConfigError("score: pass one of --manifest, --images and --prepared")
        if self.prepared is not None and self.heatmaps is not None:
            raise ConfigError("--heatmaps: draws on the image files; use --manifest instead of --prepared")
        if self.prepared is not None and self.retry_errors:
            raise ConfigError("--retry-errors: a prepared set keeps its errors; use --manifest instead of --prepared")
        self.settings.check_device(use_gpu=self.use_gpu)
        if self.prepared is not None and self.is_selective:
            option = "--skip-scored" if self.skip_scored else "score.select=frontal"
            raise ConfigError(
                f"{option}: all images of a prepared set are scored; use --manifest instead of --prepared"
            )

    @property
    def is_selective(self) -> bool:
        """Whether some of the listed images are left out."""
        return self.settings.select != "all" or bool(self.skip_scored)

    @property
    def origin(self) -> str:
        """The manifest or folder as the user named it; a search of a PACS without its keys."""
        return redact(str(self.manifest or self.images or self.prepared))


@dataclass
class ScoreReport:
    """The state of the scores after a run.

    Attributes:
        counts: number of rows by status (`ok` or an error code), with the rows that earlier runs wrote.
        scored_now: number of rows that this run wrote.
        start_up: seconds up to the first scored image, by stage; empty if nothing was scored.
        notes: sentences about files in the image folder that are not images.
        selection: the listed images that were left out; None if all were scored.
        pool: actors that scored; None if nothing was scored.
        usage: how long the models worked and waited.
        pacs: requests to a PACS, instances, their bytes, and seconds over all threads that fetch, in this run.
    """

    rows: int
    counts: Counter[str] = field(default_factory=Counter)
    scored_now: int = 0
    seconds: float = 0.0
    start_up: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    selection: Selection | None = None
    pool: ActorPlan | None = None
    heatmaps: HeatMapReport | None = None
    usage: Usage = field(default_factory=Usage)
    pacs: dict[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        return self.counts.total() - self.counts["ok"]

    @property
    def images_per_second(self) -> float | None:
        return self.scored_now / self.seconds if self.scored_now and self.seconds else None

    def describe_waits(self, *, jit_compile: bool) -> str | None:
        """Return what limits the run and what helps; None if it was short, or if models and decoders share CPUs."""
        pool = self.pool
        if pool is None or not (pool.gpus or pool.decode_apart) or self.usage.seconds < _MIN_USAGE_S:
            return None
        model, images = self.usage.shares().values()
        if model >= _MIN_SHARE:
            remedy = "more CPUs to decode, or score --prepared," if pool.decode_apart else "a faster disk"
            return f"the model waited for images {model:.0%} of the time; {remedy} would help"
        if images >= _MIN_SHARE:
            xla = "" if jit_compile else "--set score.jit_compile=true, or "
            remedy = f"{xla}more GPUs" if pool.gpus else "--set score.decode=inside"
            return f"images waited for the model {images:.0%} of the time; {remedy} would help"
        return None


@dataclass(frozen=True)
class ScorePlan:
    """Work of one run.

    Attributes:
        rows: the whole input, with the rows beyond `limit`.
        units: ranges of the rows to score, grouped by archive.
        written: indices of the ranges that have a file of scores.
        to_draw: indices of ranges, scored or not, whose requested maps are missing, out of date or to be retried.
        first_image: location of the first image, of its archive, or of the prepared set.
        settings: contents of settings.json, which a later run in the same folder must match.
    """

    request: ScoreRequest
    bundle: Bundle
    out: Path
    rows: inputs.InputRows
    units: list[Unit]
    written: set[int]
    tasks: list[ScoreTask]
    to_draw: set[int]
    first_image: str | None
    settings: dict[str, Any]
    drawing: HeatMapRequest | None
    key: bytes | None = field(repr=False)
    prepared: PreparedSource | None = None

    @property
    def ranges(self) -> list[Range]:
        return [range_ for unit in self.units for range_ in unit.ranges]

    @property
    def has_features(self) -> bool:
        """Whether the run writes features: also without a request, if the run in the folder started with it."""
        return bool(self.settings.get("features"))

    @property
    def is_empty(self) -> bool:
        """Whether no image is left to score, and nothing was started in the folder."""
        return not len(self.rows)

    @property
    def has_work(self) -> bool:
        return bool(self.tasks or self.to_draw)


def plan_run(request: ScoreRequest) -> ScorePlan:
    """Check a request and plan the pending work."""
    settings, out = request.settings, remote.to_path(request.out)
    bundle = load_bundle(request.model)
    drawing = None if request.heatmaps is None else heatmaps.make_request(bundle, settings, request.heatmaps)
    started_with = {} if request.fresh else run_folder.read_settings(out)
    key = _read_key(settings.pseudonym_key)
    dicomweb.configure(request.pacs)  # also checks the files that it names
    source = _open_source(request, bundle, out, started_with, key)
    wanted = _make_settings(request, bundle, source, started_with, key)
    is_old = _check_folder(request, out, wanted, started_with)
    units = plan_units(source.rows.paths.slice(0, wanted["rows"]), settings.rows_per_file)
    written = set() if request.fresh else list_parts(out / SCORES)
    if wanted.get("features"):
        written &= list_parts(out / FEATURES)
    tasks = _list_tasks(request, out, units, written)
    to_draw = _list_drawings(request, out, units, drawing)
    if is_old and (tasks or to_draw):
        raise OutputError(_explain_old(out, started_with))
    first_image = first_location(source.rows.paths) if source.prepared is None else source.prepared.path
    return ScorePlan(
        request, bundle, out, source.rows, units, written, tasks, to_draw, first_image, wanted, drawing, key,
        source.prepared,
    )  # fmt: skip


@dataclass(frozen=True)
class _Source:
    """The input of a run: its rows, and what settings.json records of where they come from."""

    rows: inputs.InputRows
    settings: dict[str, Any]
    prepared: PreparedSource | None = None


def _open_source(
    request: ScoreRequest, bundle: Bundle, out: Path, started_with: Mapping[str, Any], key: bytes | None
) -> _Source:
    """Read the manifest, list the images, or open the prepared set; a listing is frozen at the first run."""
    if request.prepared is not None:
        return _open_prepared(request.prepared, bundle)
    images = None if request.images is None else _name_images(request.images, key)
    manifest = None if request.manifest is None else inputs.read_manifest(request.manifest)
    settings: dict[str, Any] = {"images": images}
    if request.is_selective:
        # The folders of earlier scores grow from night to night, so their names are not compared.
        settings |= {"select": request.settings.select, "skip_scored": bool(request.skip_scored)}
        settings |= {} if manifest is None else {"manifest_digest": manifest.digest}
    is_listed = request.is_selective or (images is not None and started_with.get("images") == images)
    if started_with and is_listed and (out / INPUT).exists():
        # The run continues with the images that it started with, even if the folder has changed.
        return _Source(inputs.read_frozen(out / INPUT), settings)
    rows = _list_images(request, key) if manifest is None else manifest
    if not len(rows) and not (request.skip_scored and is_dicomweb(str(request.images))):
        raise ConfigError(f"score: {request.origin}: holds no rows to score")
    if request.is_selective:
        rows = _select(rows, request, bundle, out, key)
    return _Source(rows, settings)


def _list_images(request: ScoreRequest, key: bytes | None) -> inputs.InputRows:
    """List a folder, or search a PACS."""
    images = str(request.images)
    if not is_dicomweb(images):
        return inputs.list_folder(images)
    limit = None if request.is_selective else request.limit
    return inputs.list_search(
        images,
        limit=limit,
        captures=request.pacs.captures,
        replace_id=_make_hide(key),
        allow_empty=bool(request.skip_scored),  # a night without images
    )


def _make_hide(key: bytes | None) -> Callable[[str], str] | None:
    return None if key is None else functools.partial(make_pseudonym, key)


def _is_cut(request: ScoreRequest, rows: inputs.InputRows) -> bool:
    """Whether --limit ended the search that found the rows."""
    return is_dicomweb(str(request.images)) and not request.is_selective and len(rows) == request.limit


def _name_images(images: str, key: bytes | None) -> str:
    """Return the location of the images for settings.json."""
    return name_search(images, _make_hide(key)) if is_dicomweb(images) else make_absolute(images)


def _select(
    rows: inputs.InputRows, request: ScoreRequest, bundle: Bundle, out: Path, key: bytes | None
) -> inputs.InputRows:
    """Leave out the images that score.select and --skip-scored do not want."""
    settings, selection = request.settings, Selection(len(rows), request.settings.select)
    wanted = {"model_digest": bundle.digest, "pseudonyms": _mark_key(key), **settings.model_dump()}
    earlier = read_earlier(request.skip_scored, out, wanted) if request.skip_scored else None
    marks = Marks(rows.read_table(), settings.decode_timeout_s)
    is_all = settings.select == "all" or not len(rows)
    kept = np.ones(len(rows), bool) if is_all else select_frontal(marks, selection)
    if earlier is not None:
        selection.skip_scored = earlier.folders
        leave_out_scored(marks, kept, earlier, selection, key)
    return inputs.select(rows, kept, selection)


def _mark_key(key: bytes | None) -> str | None:
    """Return a text that differs between keys for pseudonyms without revealing them."""
    return None if key is None else make_pseudonym(key, "ray_cxr")


def _make_settings(
    request: ScoreRequest, bundle: Bundle, source: _Source, started_with: Mapping[str, Any], key: bytes | None
) -> dict[str, Any]:
    """Return the contents of settings.json, which a later run in the same folder must match."""
    settings = request.settings
    requested = settings.precision
    if requested == "auto" and started_with.get("precision") in TOLERANCE:
        # A run continues on any machine with the precision that it started with.
        requested = started_with["precision"]
    n_rows = min(len(source.rows), request.limit or len(source.rows))
    weights = bundle.rules.ranked.list_weights(settings.weights)
    if weights and not any(weights.values()):
        raise ConfigError("score.weights: every finding of this bundle has the weight 0; give one a positive weight")
    return {
        "kind": KIND,
        "format": FORMAT,
        "model_digest": bundle.digest,
        "precision": choose_precision(bundle.info, requested, gpu=request.use_gpu),
        "input_digest": source.rows.digest,
        "rows": n_rows,
        # A search ends at the limit, so a later run without a limit would need another search.
        **({"limit": request.limit} if _is_cut(request, source.rows) else {}),
        "rows_per_file": settings.rows_per_file,
        "max_pixels": settings.max_pixels,
        "pseudonyms": _mark_key(key),
        # Left out without copies, so that folders of earlier versions still match.
        **({"tta": settings.tta} if settings.tta > 1 else {}),
        **source.settings,
        # Of a run that wrote features, also if they are not requested again.
        **({"features": True} if request.features or started_with.get("features") else {}),
        "weights": weights,
    }


def _check_folder(request: ScoreRequest, out: Path, wanted: dict[str, Any], started_with: Mapping[str, Any]) -> bool:
    """Refuse a folder of another run; return whether an older version finished it, whose settings `wanted` takes."""
    is_old = started_with.get("kind") == KIND and started_with.get("format") in range(FORMAT)
    if is_old:
        if not run_folder.is_complete(out) or request.settings.weights:
            raise OutputError(_explain_old(out, started_with))
        # A finished folder of an older version stays as it is.
        wanted["format"] = started_with["format"]
        del wanted["weights"]
    if request.fresh:
        run_folder.refuse_foreign(out, KIND)
    else:
        run_folder.check_run(out, wanted, remedy=REMEDY, defaults=_DEFAULTS)
    return is_old


def _list_tasks(request: ScoreRequest, out: Path, units: list[Unit], written: set[int]) -> list[ScoreTask]:
    """Return the tasks for ranges without a file, and with --retry-errors for files with retryable errors."""
    tasks = make_tasks(units, _list_indices(units) - written, retry=False)
    if request.retry_errors:
        errors = _count_retryable(out, sorted(written))
        tasks += make_tasks(units, {index for index, count in errors.items() if count}, retry=True)
    return tasks


def _list_drawings(request: ScoreRequest, out: Path, units: list[Unit], drawing: HeatMapRequest | None) -> set[int]:
    """Return the ranges whose requested heat maps are missing, out of date or to be retried."""
    indices = set() if drawing is None else _list_indices(units)
    if drawing is None or request.fresh or not run_folder.has_settings(out):
        return indices
    run = run_folder.digest_settings(out)
    return heatmaps.find_pending(out, indices, run, drawing, retry=request.retry_errors)


def _list_indices(units: list[Unit]) -> set[int]:
    return {range_.index for unit in units for range_ in unit.ranges}


def _open_prepared(path: str, bundle: Bundle) -> _Source:
    """Open the prepared set of the model's input; refuse one that was resized in another way."""
    if bundle.input_spec.tiles:
        raise ConfigError(
            f"--prepared: {bundle.location} averages models of different inputs, which no prepared set holds; use "
            "--manifest"
        )
    data = PreparedSet(path, bundle.input_spec.size)
    if data.input_spec != bundle.input_spec:
        raise ConfigError(f"{path}: prepared with {data.input_spec}, but the bundle takes {bundle.input_spec}")
    scan = data.scan()
    if not scan.has_details:
        raise ConfigError(
            f"{path}: prepared by an earlier version, which did not keep what DICOM headers say; run "
            "`ray-cxr prepare` again into another folder"
        )
    source = PreparedSource(remote.to_address(data.path), data.size, (0, *accumulate(scan.counts)))
    return _Source(inputs.read_prepared(data, scan), {"images": None, "prepared": data.manifest_digest}, source)


def preview_run(plan: ScorePlan) -> ScoreReport:
    """Return the report of a dry run: counts of rows to score and of rows without maps."""
    report = ScoreReport(rows=plan.settings["rows"], notes=plan.rows.notes)
    for task in plan.tasks:
        rows = {range_.index: range_.rows for range_ in task.ranges}
        counts = _count_retryable(plan.out, list(rows)) if task.retry else rows
        report.counts["to score"] += sum(counts.values())
    if plan.drawing is not None:
        to_draw = plan.to_draw.union(range_.index for task in plan.tasks for range_ in task.ranges)
        report.heatmaps = HeatMapReport(to_draw=sum(range_.rows for range_ in plan.ranges if range_.index in to_draw))
    return report


def _explain_old(out: Path, settings: Mapping[str, Any]) -> str:
    """Return the message for a folder of an older version in which there is work to do."""
    is_finished = run_folder.is_complete(out)
    return (
        f"{out}: {'written' if is_finished else 'started'} by an older version of ray-cxr (format "
        f"{settings['format']}, now {FORMAT}), whose priority has another meaning; "
        + ("report, export-sr and recalibrate still read it; " if is_finished else "finish it with that version, ")
        + REMEDY
    )


def _read_key(path: str | None) -> bytes | None:
    """Read the key for pseudonyms from a file of at least 16 bytes."""
    if path is None:
        return None
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"pseudonym_key {path}: {error.strerror}; name a file that holds a secret") from None
    if len(key) < 16:
        raise ConfigError(f"pseudonym_key {path}: holds {len(key)} bytes; use at least 16, which cannot be guessed")
    return key


def _count_retryable(out: Path, indices: list[int]) -> dict[int, int]:
    """Return the number of rows with a retryable error in each of these files of scores."""
    counts = {}
    parts = [part_path(out, index) for index in indices]
    for index, part, file in zip(indices, parts, remote.read_files(parts), strict=True):
        codes = read_part(part, file, ["error_code"])["error_code"].to_pylist()
        counts[index] = sum(code in RETRYABLE_CODES for code in codes)
    return counts
