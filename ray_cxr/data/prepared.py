"""Prepared sets: every radiograph decoded and resized once, so that epochs and trials never decode again.

    PREPARED/manifest.parquet      the manifest it was made from, frozen
    PREPARED/settings.json         what another run must agree with to continue here
    PREPARED/224/part-00000.parquet, ...   manifest columns, image (uint8[S*S] or null), error_code, error
    PREPARED/224/counts.json       written last: the set of this size is whole

A shard holds exactly one row per manifest row of its range and has a fixed name, so that work is repeated only
where a shard is absent, and repeating it gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr import labels
from ray_cxr.config import InputSpec, PrepareSettings
from ray_cxr.data import atomic, imaging
from ray_cxr.data import manifest as manifests
from ray_cxr.errors import ConfigError, ImageError, OutputError, TableError
from ray_cxr.progress import Work

logger = logging.getLogger(__name__)


SETTINGS = "settings.json"


def shard_schema(size: int) -> pa.Schema:
    """The manifest's columns, then `image` (uint8 [size*size], rows first; null on failure) and the reason."""
    return pa.schema(
        [*manifests.SCHEMA, ("image", pa.binary(size * size)), ("error_code", pa.string()), ("error", pa.string())]
    )


def shard_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def prepare(manifest: str | Path, out: str | Path, settings: PrepareSettings) -> dict[int, Counter[str]]:
    """Decode and resize every picture of a manifest with Ray Data; continues where an earlier run stopped.

    Args:
        manifest: a manifest with paths.
        out: the folder for the sets, on storage that all nodes share.
        settings: sizes and the rest.

    Returns:
        Per size a count of rows by error code; `ok` counts the good ones.

    Raises:
        TableError: not a manifest, or one without a single path.
        OutputError: `out` holds sets of another manifest or of other settings.
    """
    import ray

    out = Path(out)
    table, wanted = check(manifest, out, settings)
    begin(out, wanted)
    if not (out / "manifest.parquet").exists():
        # One row group per shard: a task reads its own rows and nothing else.
        atomic.write_parquet(table, out / "manifest.parquet", row_group_size=settings.rows_per_shard)
    n_shards = -(-len(table) // settings.rows_per_shard)
    for size in settings.sizes:
        (out / str(size)).mkdir(exist_ok=True)
    missing = {
        index: [size for size in settings.sizes if not (out / str(size) / shard_name(index)).exists()]
        for index in range(n_shards)
    }
    todo = [{"index": index, "sizes": sizes} for index, sizes in missing.items() if sizes]
    if todo:
        done = sum(rows_in(i, len(table), settings.rows_per_shard) for i, sizes in missing.items() if not sizes)
        # One block per shard, so that a shard is one task, and a lost node costs single shards.
        work = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
            _prepare_shard, fn_kwargs={"out": str(out.absolute()), "settings": settings}, num_cpus=1
        )
        failed = 0
        with Work("prepare", len(table), done=done) as progress:
            for row in work.iter_rows():
                failed += row["failed"]
                progress.advance(row["rows"], f"{failed:,} failed")
    return {size: _count(out, size, n_shards, len(table)) for size in settings.sizes}


def check(manifest: str | Path, out: Path, settings: PrepareSettings) -> tuple[pa.Table, dict[str, Any]]:
    """What `prepare` would refuse, refused before Ray starts; the manifest, and what `out` must agree with.

    Raises:
        TableError, OutputError: see `prepare`.
    """
    table = manifests.read_manifest(manifest)
    if not len(table) or table["path"].null_count == len(table):
        raise TableError(f"{manifest}: no row has a path; make it with `ray-cxr manifest ... --images FOLDER`")
    wanted = {
        "kind": "prepare",
        "format": 1,
        "manifest_digest": manifests.digest(table),
        "rows": len(table),
        "rows_per_shard": settings.rows_per_shard,
        "aspect": settings.aspect,
        "interpolation": settings.interpolation,
    }
    agree(out, wanted)
    return table, wanted


def agree(out: Path, wanted: dict[str, Any], *, remedy: str = "name another --out") -> None:
    """Check that what `out` holds, if anything, was begun with the same input and settings.

    Raises:
        OutputError: it was not; the message names each difference.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; name another --out")
    path = out / SETTINGS
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
    except (OSError, ValueError, TypeError, AttributeError):
        raise OutputError(f"{path}: is damaged; {remedy}") from None
    if differing:
        shown = ", ".join(f"{name} {_short(found.get(name))} (now {_short(wanted.get(name))})" for name in differing)
        raise OutputError(f"{out}: was begun with another {shown}; {remedy}")


def begin(out: Path, wanted: dict[str, Any]) -> None:
    """Make `out` and write down what a later run must agree with.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / SETTINGS).exists():
            atomic.write_json(out / SETTINGS, wanted)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {error.strerror}; name another --out") from None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def rows_in(index: int, rows: int, per_shard: int) -> int:
    """How many rows the shard or output file of a number holds."""
    return min(rows, (index + 1) * per_shard) - index * per_shard


def _prepare_shard(task: dict[str, Any], out: str, settings: PrepareSettings) -> dict[str, int]:
    """One shard, in a Ray task: decode each picture once, write it at every size still wanted."""
    cv2.setNumThreads(1)  # Ray gives this task one core; OpenCV would take them all
    rows = pq.ParquetFile(Path(out) / "manifest.parquet").read_row_group(task["index"])
    images: dict[int, list[bytes | None]] = {size: [] for size in task["sizes"]}
    codes: list[str | None] = []
    messages: list[str | None] = []
    for path in rows["path"].to_pylist():
        try:
            picture = imaging.load(path or "")
            resized = {size: imaging.resize(picture, settings.spec(size)).tobytes() for size in images}
        except ImageError as error:
            codes.append(error.code)
            messages.append(error.message)
            for column in images.values():
                column.append(None)
            continue
        codes.append(None)
        messages.append(None)
        for size, column in images.items():
            column.append(resized[size])
    for size, column in images.items():
        schema = shard_schema(size)
        arrays = [rows[name] for name in manifests.SCHEMA.names]
        arrays += [
            pa.array(column, pa.binary(size * size)),
            pa.array(codes, pa.string()),
            pa.array(messages, pa.string()),
        ]
        shard = pa.Table.from_arrays(arrays, schema=schema)
        atomic.write_parquet(shard, Path(out) / str(size) / shard_name(task["index"]), compression="zstd")
    return {"rows": len(rows), "failed": sum(code is not None for code in codes)}


def _count(out: Path, size: int, n_shards: int, rows: int) -> Counter[str]:
    """Count a size's rows from the shards themselves, and mark it whole."""
    counts: Counter[str] = Counter()
    for index in range(n_shards):
        codes = pq.read_table(out / str(size) / shard_name(index), columns=["error_code"])["error_code"]
        counts.update("ok" if code is None else code for code in codes.to_pylist())
    if counts.total() != rows:
        raise OutputError(f"{out / str(size)}: holds {counts.total():,} rows for a manifest of {rows:,}; remove it")
    atomic.write_json(out / str(size) / "counts.json", dict(sorted(counts.items())))
    return counts


@dataclass(frozen=True)
class SplitData:
    """The images of one split at one size.

    Attributes:
        image_ids: strings [N], in manifest order.
        patient_ids: strings or None [N].
        ages: float64 [N], years, NaN where unknown.
        labels: int8 [N,15] in `labels.LABELS` order, -1 where not labelled.
        images: uint8 [N,S,S], memory-mapped: pages come and go as the system has room, whatever N is.
    """

    image_ids: np.ndarray
    patient_ids: np.ndarray
    ages: np.ndarray
    labels: np.ndarray
    images: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)


class PreparedSet:
    """One size of a prepared folder, open for reading.

    Args:
        path: the folder that `prepare` made.
        size: pixels; None takes the only size there is.

    Raises:
        ConfigError: no such folder or size, several sizes and none named, or an unfinished one.
    """

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        self.path = Path(path)
        try:
            self._settings = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ConfigError(f"{path}: not a prepared folder; make one with `ray-cxr prepare`") from None
        whole = sorted(int(file.parent.name) for file in self.path.glob("*/counts.json"))
        if not whole:
            raise ConfigError(f"{path}: no size is complete; run `ray-cxr prepare` again to continue it")
        if size is None:
            if len(whole) > 1:
                raise ConfigError(f"{path}: has sizes {', '.join(map(str, whole))}; choose one with --set size=...")
            size = whole[0]
        if size not in whole:
            raise ConfigError(
                f"{path}: has no complete size {size}, only {', '.join(map(str, whole))}; "
                f"run `ray-cxr prepare ... --size {size}`"
            )
        self.size = size
        self.counts: dict[str, int] = json.loads((self.path / str(size) / "counts.json").read_text())

    @property
    def input_spec(self) -> InputSpec:
        """How its images were made, and so how a model trained on them must be fed."""
        return InputSpec(size=self.size, aspect=self._settings["aspect"], interpolation=self._settings["interpolation"])

    @property
    def manifest_digest(self) -> str:
        return str(self._settings["manifest_digest"])

    def split_info(self) -> dict[str, Any]:
        """How the manifest was split."""
        return manifests.split_info(manifests.read_manifest(self.path / "manifest.parquet"))

    def rows(self) -> pa.Table:
        """The manifest's columns and error_code of every row, without the images."""
        return pa.concat_tables(
            pq.read_table(shard, columns=[*manifests.SCHEMA.names, "error_code"]) for shard in self._shards()
        )

    def usable(self, split: str) -> pa.Table:
        """The rows of a split whose picture could be prepared, as `rows` gives them.

        Raises:
            TableError: there is none.
        """
        table = self.rows()
        table = table.filter(pc.and_(pc.equal(table["split"], split), pc.is_null(table["error_code"])))
        if not len(table):
            raise TableError(
                f"{self.path}: no usable image in split {split!r}; make the manifest with --split, "
                "or with train= and val= tables"
            )
        return table

    def load(self, split: str) -> SplitData:
        """Read one split; the images go to an unnamed temporary file that ends with this process.

        Raises:
            TableError: the split has no usable image.
        """
        table = self.usable(split)
        with tempfile.TemporaryFile(prefix="ray_cxr-") as file:
            images = np.memmap(file, dtype=np.uint8, mode="w+", shape=(len(table), self.size, self.size))
        position = 0
        for batch in self._batches(split):
            images[position : position + len(batch)] = batch
            position += len(batch)
        values = np.stack(
            [np.asarray(table[name].fill_null(-1).to_numpy(), dtype=np.int8) for name in labels.LABELS], axis=1
        )
        return SplitData(
            image_ids=np.array(table["image_id"].to_pylist(), dtype=object),
            patient_ids=np.array(table["patient_id"].to_pylist(), dtype=object),
            ages=np.asarray(table["age"].to_numpy(), dtype=float),
            labels=values,
            images=images,
        )

    def _shards(self) -> list[Path]:
        return sorted((self.path / str(self.size)).glob("part-*.parquet"))

    def _batches(self, split: str) -> Iterator[np.ndarray]:
        for shard in self._shards():
            table = pq.read_table(shard, columns=["split", "error_code", "image"])
            mask = np.array(
                [
                    s == split and code is None
                    for s, code in zip(*(table[c].to_pylist() for c in ("split", "error_code")), strict=True)
                ]
            )
            rows = table.filter(pa.array(mask, pa.bool_()))["image"].combine_chunks()
            if len(rows):
                # A fixed-size binary array is one flat buffer: seen as pixels without a copy.
                flat = np.frombuffer(rows.buffers()[1], dtype=np.uint8)
                area = self.size * self.size
                start = rows.offset * area
                yield flat[start : start + len(rows) * area].reshape(len(rows), self.size, self.size)
