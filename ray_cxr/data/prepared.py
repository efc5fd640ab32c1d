"""Prepared sets: radiographs decoded and resized once, so that epochs and trials never decode again.

    PREPARED/manifest.parquet      a frozen copy of the manifest
    PREPARED/settings.json         settings that a later run must match
    PREPARED/224/part-00000.arrow, ...   manifest columns, image (uint8[S*S] or null), error_code, error
    PREPARED/224/counts.json       written last: this size is complete

A shard holds exactly one row per manifest row of its range and has a fixed name. A repeated run therefore makes only
the missing shards, and its result has the same bytes.

Images inside archives keep the archive's order. The frozen manifest groups the rows of each archive, and one task reads
an archive in one pass. Its rows fill the shards in the order of its members; rows without an image come last. No shard
spans two archives, so shards then differ in length.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr import cluster, labels, tasks, telemetry
from ray_cxr.config import InputSpec, PacsSettings, PrepareSettings
from ray_cxr.data import manifest as manifests
from ray_cxr.data.partition import Range, Unit, first_location, group_by_archive, plan_units
from ray_cxr.data.shards import Pixels, ShardRows, ShardWriter, missing_shard, read_outcomes, read_shard, shard_name
from ray_cxr.errors import ConfigError, ImageError, OutputError, TableError
from ray_cxr.imaging.sandbox import DecodedImage, Decoder, Failure
from ray_cxr.progress import Progress, Stage
from ray_cxr.storage import atomic, contents, dicomweb, remote, run_folder
from ray_cxr.storage.archives import read_members
from ray_cxr.storage.pacs_workers import PacsAccess, PacsFetcher, open_access
from ray_cxr.storage.paths import find_dicomweb, is_dicomweb, name_search

#: Formats of the folder: 1 had Parquet shards; 3 holds images from archives, in shards of different lengths.
FORMAT, FORMAT_WITH_ARCHIVES = 2, 3


@dataclass(frozen=True)
class OutcomeCounts:
    """Row counts of one size by outcome."""

    codes: Counter[str]  # by error code; `ok` counts rows without an error
    flags: Counter[str]  # by quality flag from DICOM headers; a row may have several


def prepare(
    manifest: str | Path,
    out: str | Path,
    settings: PrepareSettings,
    start_ray: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    pacs: PacsSettings | None = None,
) -> dict[int, OutcomeCounts]:
    """Decode and resize every image of a manifest to `out`, which all nodes share, or continue an earlier run.

    Args:
        manifest: a manifest, or a search of a PACS, whose listing is frozen at the first run.
        pacs: how to reach a PACS that has images; None: the default settings.
        start_ray: returns a context in which Ray runs; it is entered after the checks.

    Returns:
        Counts of rows for each size, those of earlier runs included.

    Raises:
        TableError: not a manifest, or one without a path.
        OutputError: `out` holds sets of another manifest or with other settings, or another command writes there.
    """
    out = remote.to_path(out)
    with Stage("checking the manifest"):
        table, wanted = check(manifest, out, settings, pacs)
    with run_folder.lock(out, "prepare"), start_ray(), contextlib.ExitStack() as stack:
        import ray  # after `start_ray`, which sets its environment

        units = plan_units(table["path"], settings.rows_per_shard)
        n_rows = len(table)
        cluster.require_shared(out, {"an image at": first_location(table["path"])})
        in_pacs, access = find_dicomweb(table["path"]), None
        if in_pacs is not None:
            access = stack.enter_context(open_access(pacs or PacsSettings(), in_pacs))
        run_folder.create_run(out, wanted)
        ranges = [range_ for unit in units for range_ in unit.ranges]
        if not (out / "manifest.parquet").exists():
            _freeze(table, out / "manifest.parquet", ranges)
        del table
        for size in settings.sizes:
            (out / str(size)).mkdir(exist_ok=True)

        def find_pending(*_: Any) -> list[tasks.Task]:
            complete = _list_complete(out, settings.sizes)
            return [task for unit in units if (task := _make_task(unit, complete))]

        def build_dataset(pending: list[tasks.Task]) -> Any:
            # One block per task, so that a lost node loses few shards.
            dataset = ray.data.from_items(pending, override_num_blocks=len(pending))
            arguments = {"out": remote.to_address(out), "settings": settings, "access": access}
            dataset = tasks.map_once(dataset, _run_task, fn_kwargs=arguments, num_cpus=1, **cluster.placement.options)
            cpus = sum(node["Resources"].get("CPU", 0) for node in cluster.list_nodes())
            dataset.context.max_errored_blocks = int(tasks.MAX_LOST_PER_WORKER * max(1, cpus))
            return dataset

        if todo := find_pending():
            pending = sum(sum(task["rows"]) for task in todo)
            progress = Progress("prepare", n_rows, done=n_rows - pending, waiting="starting the workers")
            show = _make_progress(out, settings.sizes, ranges, progress)
            with progress, cluster.log_node_changes("prepare"), tasks.poll(show, "prepare"):
                for _ in tasks.run_with_retries(todo, build_dataset, find_pending, "prepare"):
                    pass  # `show` reports the shards that the tasks write
        with Stage("counting the images of each size"):
            return {size: _count_rows(out, size, ranges) for size in settings.sizes}


def check(
    manifest: str | Path, out: Path, settings: PrepareSettings, pacs: PacsSettings | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """Make the checks of `prepare` that need no Ray; return the manifest in reading order and the run's settings."""
    table, origin = _read_input(manifest, out, pacs or PacsSettings())
    if not len(table) or table["path"].null_count == len(table):
        raise TableError(f"{manifest}: no row has a path; make it with `ray-cxr manifest ... --images FOLDER`")
    wanted = {
        "kind": "prepare",
        "format": FORMAT,
        "manifest_digest": manifests.digest(table),
        "rows": len(table),
        **settings.model_dump(include={"rows_per_shard", "aspect", "interpolation"}),
        **origin,
    }
    table = group_by_archive(table)
    units = plan_units(table["path"], settings.rows_per_shard)
    if any(unit.archive for unit in units):
        wanted |= {"format": FORMAT_WITH_ARCHIVES, "shards": sum(len(unit.ranges) for unit in units)}
    run_folder.check_run(out, wanted)
    return table, wanted


def _read_input(manifest: str | Path, out: Path, pacs: PacsSettings) -> tuple[pa.Table, dict[str, Any]]:
    """Read a manifest, or search a PACS unless an earlier run in `out` did; also return what settings.json records."""
    origin: dict[str, Any] = {}
    dicomweb.configure(pacs)  # also checks the files that it names
    if not is_dicomweb(str(manifest)):
        table = manifests.read_manifest(manifest)
    else:
        origin, frozen = {"images": name_search(str(manifest))}, out / "manifest.parquet"
        if run_folder.read_settings(out).get("images") == origin["images"] and frozen.exists():
            table = manifests.read_manifest(frozen)
        else:
            from ray_cxr.data.dicomweb_listing import list_radiographs  # pydicom is slow to import

            table = list_radiographs(str(manifest), captures=pacs.captures)
    return table, origin


def _freeze(table: pa.Table, path: Path, ranges: Sequence[Range]) -> None:
    """Write a table in reading order with one row group per range, so that a task reads its own rows only."""

    def produce(part: Path) -> None:
        with pq.ParquetWriter(part, table.schema) as writer:
            for range_ in ranges:
                writer.write_table(table.slice(range_.start, range_.rows), row_group_size=range_.rows)

    atomic.write(path, produce)


def _list_complete(out: Path, sizes: Sequence[int]) -> set[str]:
    """Return the names of the shards that exist at all sizes."""
    return set.intersection(*({path.name for path in (out / str(size)).glob("part-*.arrow")} for size in sizes))


def _make_progress(out: Path, sizes: Sequence[int], ranges: Sequence[Range], progress: Progress) -> Callable[[], bool]:
    """Return a function that reports the shards written since its last call, and returns whether there were any."""

    names = {shard_name(range_.index) for range_ in ranges}
    reported, failed = names & _list_complete(out, sizes), 0

    def show() -> bool:
        nonlocal failed
        new = (names & _list_complete(out, sizes)) - reported
        for name in new:
            codes, _ = read_outcomes(out / str(sizes[0]) / name, sizes[0])
            failed += len(codes) - codes.null_count
            reported.add(name)
            progress.advance(len(codes), f"{failed:,} failed")
        return bool(new)

    return show


def _make_task(unit: Unit, complete: set[str]) -> tasks.Task | None:
    """Return the task that writes the shards of a unit that are not `complete`; None if there are none."""
    missing = {range_.index: range_.rows for range_ in unit.ranges if shard_name(range_.index) not in complete}
    if not missing:
        return None
    # All lengths, because an existing shard of an archive has to be read to know its rows.
    return {
        "archive": unit.archive or "",
        "first": unit.ranges[0].index,
        "lengths": [range_.rows for range_ in unit.ranges],
        "indices": list(missing),
        "rows": list(missing.values()),
    }


def _run_task(task: tasks.Task, out: str, settings: PrepareSettings, access: PacsAccess | None) -> dict[str, Any]:
    """Write the missing shards of one unit, in a Ray task; each image is decoded once for all sizes."""
    try:
        _write_shards(task, out, settings, None if access is None else _get_fetcher(access))
    except Exception as error:
        return {"done": [], **tasks.encode_error(tasks.sanitize_error(error, "prepare"))}
    finally:
        telemetry.flush()
    return {"done": task["indices"], **tasks.SUCCESS}


def _write_shards(task: tasks.Task, out: str, settings: PrepareSettings, fetcher: PacsFetcher | None) -> None:
    shards = range(task["first"], task["first"] + len(task["lengths"]))
    folder = remote.to_path(out)
    rows = pq.ParquetFile(folder / "manifest.parquet").read_row_groups(list(shards))
    lengths = dict(zip(shards, task["lengths"], strict=True))
    writers = [
        ShardWriter(folder / str(size), size, position, rows, lengths) for position, size in enumerate(settings.sizes)
    ]
    wanted = np.flatnonzero(np.any([writer.wanted for writer in writers], axis=0)).tolist()
    decoder = _get_decoder(settings)
    for row, outcome in _decode_rows(task["archive"], rows["path"].to_pylist(), wanted, decoder, fetcher):
        telemetry.add(telemetry.IMAGES_PREPARED, 1)
        if isinstance(outcome, Failure):
            telemetry.add(telemetry.IMAGE_ERRORS, 1, "prepare", outcome.code)
        for writer in writers:
            writer.add(row, outcome)


@functools.lru_cache(maxsize=1)
def _get_decoder(settings: PrepareSettings) -> Decoder:
    """Return the decoder that all tasks of this process share."""
    specs = [settings.spec(size) for size in settings.sizes]
    return Decoder(specs, timeout_s=settings.decode_timeout_s, tags=True)


@functools.lru_cache(maxsize=1)
def _get_fetcher(access: PacsAccess) -> PacsFetcher:
    """Return the fetcher that all tasks of this process share."""
    return PacsFetcher(access, "prepare")


def _decode(decoder: Decoder, source: str | bytes | ImageError | None) -> DecodedImage | Failure:
    if isinstance(source, ImageError):
        return Failure(source.code, source.message, None)
    outcome = decoder.load(source)
    if decoder.seconds:
        telemetry.add_decode("prepare", decoder.seconds)
    return outcome


def _decode_rows(
    archive: str, paths: list[str | None], rows: list[int], decoder: Decoder, fetcher: PacsFetcher | None
) -> Iterator[tuple[int, DecodedImage | Failure]]:
    """Yield each row once with its image: single files in the order of the rows, members in the archive's order."""
    if not archive:
        sources: Iterator[tuple[int, str | bytes | ImageError | None]] = ((row, paths[row]) for row in rows)
        for row, source in sources if fetcher is None else fetcher.fetch_ahead(sources):
            yield row, _decode(decoder, source)
        return
    members: dict[str, list[int]] = {}
    for row in rows:
        members.setdefault(str(paths[row]).removeprefix(f"{archive}::"), []).append(row)
    failure = Failure("missing", "the archive holds no such member", None)
    pending = set(rows)
    try:
        for name, content in read_members(archive, members.keys()):
            outcome = _decode(decoder, content)
            pending.difference_update(members[name])
            for row in members[name]:
                yield row, outcome
    except ImageError as error:
        failure = Failure(error.code, error.message, None)
    for row in sorted(pending):
        yield row, failure


def _count_rows(out: Path, size: int, ranges: Sequence[Range]) -> OutcomeCounts:
    """Count a size's rows from its shards, and mark the size complete."""
    counts = OutcomeCounts(Counter(), Counter())
    paths = [out / str(size) / shard_name(range_.index) for range_ in ranges]
    found = remote.map_concurrently(functools.partial(read_outcomes, size=size), paths)
    for range_, path, (codes, flags) in zip(ranges, paths, found, strict=True):
        if len(codes) != range_.rows:
            raise OutputError(
                f"{path}: has {len(codes):,} rows instead of {range_.rows:,}; remove it and run `ray-cxr prepare` again"
            )
        counts.flags.update(flags)
        counts.codes.update("ok" if code is None else code for code in codes.to_pylist())
    atomic.write_json(out / str(size) / "counts.json", dict(sorted(counts.codes.items())))
    return counts


def complete_sizes(prepared: Path) -> list[int]:
    """Return the sizes whose shards are complete in a prepared folder, pixels."""
    names = [folder.name for folder in prepared.glob("*") if folder.name.isdecimal()]
    return sorted(int(name) for name in names if (prepared / name / "counts.json").exists())


@dataclass(frozen=True)
class SplitData:
    """The images of one split at one size, in manifest order; the pixels are read from the shards on demand."""

    image_ids: np.ndarray  # strings [N]
    patient_ids: np.ndarray  # strings or None [N]
    ages: np.ndarray  # float64 [N], years, NaN where unknown
    labels: np.ndarray  # int8 [N,15] in `labels.LABELS` order, -1 where not labelled
    images: Pixels  # uint8 [N,S,S]

    def __len__(self) -> int:
        return len(self.image_ids)


@dataclass(frozen=True)
class Scan:
    """What `score` reads of a prepared set before it reads images.

    Attributes:
        rows: the manifest's columns, in the order of the shards.
        counts: number of rows of each shard.
        has_details: whether all `shards.Details` are known; earlier versions did not keep those of DICOM files.
    """

    rows: pa.Table
    counts: list[int]
    has_details: bool


class PreparedSet:
    """One size of a folder that `prepare` made, open for reading; `size` None chooses the only one."""

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        self.path = remote.to_path(path)
        self._settings = run_folder.read_settings(self.path)
        if not self._settings or self._settings.get("kind", "prepare") != "prepare":
            raise ConfigError(contents.explain(path, "a prepared folder", "make one with `ray-cxr prepare`"))
        if (version := self._settings.get("format", FORMAT)) not in (FORMAT, FORMAT_WITH_ARCHIVES):
            raise ConfigError(
                f"{path}: has format {version}, but this version reads formats {FORMAT} and {FORMAT_WITH_ARCHIVES}; "
                "run `ray-cxr prepare` again into another folder"
            )
        sizes = complete_sizes(self.path)
        names = ", ".join(map(str, sizes))
        if not sizes:
            raise ConfigError(f"{path}: no size is complete; run `ray-cxr prepare` again to continue it")
        if size is None and len(sizes) > 1:
            raise ConfigError(f"{path}: has sizes {names}; choose one with --set size=...")
        self.size = sizes[0] if size is None else size
        if self.size not in sizes:
            raise ConfigError(
                f"{path}: has no complete size {size}, only {names}; run `ray-cxr prepare ... --size {size}`"
            )
        self.counts: dict[str, int] = json.loads((self.path / str(self.size) / "counts.json").read_text())

    @property
    def input_spec(self) -> InputSpec:
        """How its images were resized; a model trained on them needs the same input."""
        return InputSpec(size=self.size, aspect=self._settings["aspect"], interpolation=self._settings["interpolation"])

    @property
    def manifest_digest(self) -> str:
        return str(self._settings["manifest_digest"])

    def split_info(self) -> dict[str, Any]:
        """Return the description of the manifest's split."""
        return manifests.split_info(manifests.read_manifest(self.path / "manifest.parquet"))

    def rows(self) -> pa.Table:
        """Return the manifest's columns and error_code of every row, without the images."""
        return _to_table(self._read([*manifests.SCHEMA.names, "error_code"]))

    def usable(self, split: str) -> pa.Table:
        """Return `rows` of the images of a split that were decoded; refuse a split without any."""
        return _to_table(self._read([*manifests.SCHEMA.names, "error_code"], split))

    def load(self, split: str) -> SplitData:
        """Open one split: its labels and names are read now, its pixels on demand."""
        shards = self._read(["image_id", "patient_id", "age", *labels.LABELS], split)
        table = _to_table(shards)
        images = Pixels(
            self._shards,
            [shard.length for shard in shards],
            np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.offsets) for shard in shards]),
            np.concatenate([shard.offsets for shard in shards]),
            self.size,
        )
        values = [np.asarray(table[name].fill_null(-1).to_numpy(), dtype=np.int8) for name in labels.LABELS]
        return SplitData(
            image_ids=table["image_id"].to_numpy(),
            patient_ids=table["patient_id"].to_numpy(),
            ages=np.asarray(table["age"].to_numpy(), dtype=float),
            labels=np.stack(values, axis=1),
            images=images,
        )

    def manifest_metadata(self) -> dict[bytes, bytes]:
        """Return the metadata of the manifest's schema, such as the description of its split."""
        with manifests.open_manifest(self.path / "manifest.parquet") as file:
            return dict(file.metadata or {})

    @functools.cached_property
    def shard_names(self) -> list[str]:
        """Names of the shards, in order."""
        count = self._settings.get("shards", -(-self._settings["rows"] // self._settings["rows_per_shard"]))
        return [shard_name(index) for index in range(count)]

    def scan(self) -> Scan:
        """Read the rows of all shards, in their order."""
        shards = self._read(manifests.SCHEMA.names)
        has_details = all(shard.details is not None or _lacks_headers(shard.table["path"]) for shard in shards)
        return Scan(_to_table(shards), [len(shard.offsets) for shard in shards], has_details)

    def read_rows(self, index: int, columns: Sequence[str]) -> tuple[ShardRows, Pixels]:
        """Return columns of all rows of one shard, and its images; only this shard is fetched from a bucket."""
        (path,) = self._download([self.shard_names[index]])
        shard = read_shard(path, self.size, columns)
        places = np.zeros(len(shard.offsets), np.int32)
        return shard, Pixels([path], [shard.length], places, shard.offsets, self.size)

    @functools.cached_property
    def _shards(self) -> list[Path]:
        # By number, so that a missing shard is noticed.
        return self._download(self.shard_names)

    def _download(self, names: Sequence[str]) -> list[Path]:
        """Return paths on this machine; all processes of a node share one download of each shard from a bucket."""
        try:
            return remote.download([self.path / str(self.size) / name for name in names])
        except FileNotFoundError as error:  # of a bucket; on a disk the reader notices
            raise missing_shard(error.filename) from None

    def _read(self, columns: Sequence[str], split: str | None = None) -> list[ShardRows]:
        shards = [read_shard(path, self.size, columns, split) for path in self._shards]
        if split is not None and not any(len(shard.offsets) for shard in shards):
            raise TableError(
                f"{self.path}: no usable image in split {split!r}; make the manifest again with --split patient, or "
                "with train=, val= and test= tables, and prepare it into a new folder"
            )
        return shards


def _lacks_headers(paths: pa.Array) -> bool:
    """Whether all images of a shard are PNG or JPEG files, which have no headers to keep."""
    names = pc.utf8_lower(paths)
    return bool(pc.all(pc.match_substring_regex(names, r"\.(png|jpe?g)$")).as_py() is not False)


def _to_table(shards: Sequence[ShardRows]) -> pa.Table:
    return pa.Table.from_batches(shard.table for shard in shards)
