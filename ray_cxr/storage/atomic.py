"""Atomic writes: readers, and runs after a kill, never see an incomplete file."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr.errors import OutputError
from ray_cxr.storage import remote
from ray_cxr.storage.paths import is_system_file


def write(path: str | Path, produce: Callable[[Path], object]) -> None:
    """Let `produce` write a temporary file in the same folder, flush it to disk, then rename it to `path`. For a
    bucket, the temporary file is local, and a PUT replaces the rename. An `OSError` names `path`.
    """
    path = remote.to_path(path)
    if (store_path := remote.as_store_path(path)) is not None:
        store_path.write(produce)
        return
    part = remote.make_part_path(path)  # unique, so that of two concurrent writers one rename wins
    try:
        produce(part)
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())  # otherwise a power failure can leave an empty file under the new name
        os.replace(part, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(part)):  # Arrow's errors do not name a file
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
        raise
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, last: str) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `path` when the block ends without an exception.

    A bucket has no folders to rename, so the files are uploaded one by one, and the file named `last` at the end. A
    folder without this file is incomplete and is written again.
    """
    if (store_path := remote.as_store_path(path)) is None:
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            yield part
            try:
                part.rename(path)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                raise OutputError(f"{path}: another command has written it now, and it is complete; use it") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(prefix="ray_cxr-") as name:
        yield Path(name)
        files = sorted(Path(name).iterdir(), key=lambda file: (file.name == last, file.name))
        present = {file.name for file in store_path.glob("*") if file.name and not is_system_file(file.name)}
        if foreign := present - {file.name for file in files}:
            raise OutputError(f"{path}: holds another file, {min(foreign)}; choose another folder")
        for file in files:
            write(path / file.name, functools.partial(shutil.copyfile, file))


def write_parquet(table: pa.Table, path: str | Path, **options: Any) -> None:
    """Write an Arrow table; `options` are those of `pyarrow.parquet.write_table`."""
    write(path, lambda part: pq.write_table(table, part, **options))


def write_arrow(table: pa.Table, path: str | Path) -> None:
    """Write an Arrow table as an uncompressed Arrow IPC file with one record batch."""

    def produce(part: Path) -> None:
        with pa.OSFile(str(part), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table.combine_chunks())  # one chunk becomes one batch

    write(path, produce)


def write_bytes(path: str | Path, data: bytes) -> None:
    write(path, lambda part: part.write_bytes(data))


def write_if_changed(path: Path, data: bytes) -> bool:
    """Write a local file unless it has this content already; return whether it was written."""
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return False
    write_bytes(path, data)
    return True


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON in the order of its keys; NaN and infinity raise `ValueError`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
