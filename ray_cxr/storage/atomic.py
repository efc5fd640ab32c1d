"""Files that appear under their name only when whole: a reader, or a run after a kill, never sees a half."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr.errors import OutputError
from ray_cxr.storage import remote


def write(path: str | Path, produce: Callable[[Path], None]) -> None:
    """Let `produce` write a temporary neighbour of `path`, flush it to disk, then rename it to `path`.

    Of a path in a bucket the temporary file is on this machine, and a PUT takes the place of the rename.

    Raises:
        OSError: a file system refused something; it names `path`.
    """
    path = remote.path(path)
    if (there := remote.stored(path)) is not None:
        there.write(produce)
        return
    # Hidden, and of a name that no other writer has, on whatever machine: of two that race one rename wins.
    part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        produce(part)
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())  # else a power cut can leave the new name with no data behind it
        os.replace(part, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(part)):  # Arrow's errors name no file
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, last: str) -> Iterator[Path]:
    """A folder to fill, which is at `path` when the block has ended well and not before.

    In a bucket, which has no folders to rename, its files come one after another and the one named `last` at the end:
    without that one the folder does not count, and is filled again.

    Raises:
        OutputError: the bucket holds other files there.
    """
    if (there := remote.stored(path)) is None:
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            yield part
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as name:
        yield Path(name)
        files = sorted(Path(name).iterdir(), key=lambda file: (file.name == last, file.name))
        foreign = {one.name for one in there.glob("*") if one.name} - {file.name for file in files}
        if foreign:
            raise OutputError(f"{path}: holds {min(foreign)}, which is not of this; name another folder")
        for file in files:
            write(path / file.name, functools.partial(shutil.copyfile, file))


def write_parquet(table: pa.Table, path: str | Path, **options: Any) -> None:
    """Write an Arrow table; `options` are those of `pyarrow.parquet.write_table`."""
    write(path, lambda part: pq.write_table(table, part, **options))


def write_arrow(table: pa.Table, path: str | Path) -> None:
    """Write an Arrow table as a file of Arrow IPC: one record batch, uncompressed."""
    write(path, lambda part: _write_arrow(part, table))


def write_text(path: str | Path, text: str) -> None:
    write(path, lambda part: _write_text(part, text))


def write_json(path: str | Path, value: Any) -> None:
    """Indented JSON, keys in the order given; NaN is refused because JSON has none.

    Raises:
        ValueError: the value holds NaN or infinity.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table.combine_chunks())  # a batch per chunk, so a single one
