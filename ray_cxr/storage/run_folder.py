"""Run folders: the settings a run started with, its completion mark, and its lock.

    OUT/settings.json   written first: settings that a later run must match
    OUT/_SUCCESS        written last: all output is complete
    OUT/.lock           held and removed by the command that writes here; the system releases it if the process dies
    .BUNDLE.lock        the same lock for a command that writes a bundle, which must contain no other files

`OUT` may be in a bucket, which has no locks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_cxr.errors import InputError, OutputError
from ray_cxr.storage import atomic, contents, remote
from ray_cxr.storage.paths import is_system_file

logger = logging.getLogger(__name__)

SETTINGS = "settings.json"
SUCCESS = "_SUCCESS"
LOCK = ".lock"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; `{}` if the file is missing, damaged, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_settings(out: Path) -> dict[str, Any]:
    """Return the settings of the run in `out`; `{}` if there is none or its file is damaged."""
    return read_json(out / SETTINGS)


def has_settings(out: Path) -> bool:
    return (out / SETTINGS).exists()


def digest_settings(out: Path) -> str:
    """Return the SHA-256 of settings.json; runs with the same settings can have the same digest."""
    return hashlib.sha256((out / SETTINGS).read_bytes()).hexdigest()


def check_run(
    out: Path,
    settings: Mapping[str, Any],
    *,
    remedy: str = "choose another --out",
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Refuse an `out` that is a file, or that holds a run with damaged or other settings; the error names each
    difference.

    `defaults` has the values of settings that either side may lack.
    """
    remote.check_bucket(out)
    _refuse_file(out)
    if not has_settings(out):
        return
    old = read_settings(out)
    if not old:
        raise OutputError(f"{out / SETTINGS}: damaged; {remedy}")
    old, new = ({**(defaults or {}), **_flatten(given)} for given in (old, settings))
    changes = [
        f"{name} {_shorten(old.get(name))} (now {_shorten(new.get(name))})"
        for name in sorted({*new, *old})
        if new.get(name) != old.get(name)
    ]
    if changes:
        raise OutputError(f"{out}: its run started with other settings: {', '.join(changes)}; {remedy}")


def check_writable(out: Path) -> None:
    """Refuse a local folder that this process cannot make or write, without writing."""
    if remote.as_store_path(out) is not None:
        return
    near = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not near.is_dir():
        raise _cannot_write(out, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    if not os.access(near, os.W_OK | os.X_OK):
        raise _cannot_write(out, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def create_run(out: Path, settings: Mapping[str, Any]) -> None:
    """Make `out` and write its settings, unless they exist."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not has_settings(out):
            atomic.write_json(out / SETTINGS, settings)
    except OSError as error:
        raise _cannot_write(out, error) from None


def replace_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Overwrite the settings of the run in `out`; workers of this run that are still alive notice it and stop."""
    atomic.write_json(out / SETTINGS, settings)


def remove_settings(out: Path) -> None:
    """Remove the settings, so that a run with other settings can start in `out`."""
    (out / SETTINGS).unlink(missing_ok=True)


def refuse_foreign(out: Path, kind: str) -> None:
    """Refuse a file, and a folder that another kind of command wrote, before `--fresh` removes anything."""
    _refuse_file(out)
    if not out.exists() or read_settings(out).get("kind") == kind:
        return
    if any(path.name != LOCK and not is_system_file(path.name) for path in out.iterdir()):
        raise OutputError(f"{out}: holds files but no run of {kind}, so --fresh removes nothing; choose another --out")


def is_complete(out: Path) -> bool:
    return (out / SUCCESS).exists()


def mark_complete(out: Path) -> None:
    """Write `_SUCCESS`; call it after everything else is written."""
    atomic.write_text(out / SUCCESS, "")


def clear_complete(out: Path) -> None:
    """Remove `_SUCCESS`; call it before anything else in the folder changes."""
    (out / SUCCESS).unlink(missing_ok=True)


def check_complete(path: Path, command: str) -> None:
    """Check that `path` holds a finished run of `command`, to read it."""
    remedy = f"pass the folder that `ray-cxr {command}` wrote"
    is_other = read_settings(path).get("kind", command) != command
    if has_settings(path) and not is_other and not is_complete(path):
        raise InputError(f"{path}: {command} did not finish; run it again to continue")
    if is_other or not is_complete(path):
        raise InputError(contents.explain(path, f"a run of {command}", remedy))


@contextlib.contextmanager
def lock(out: Path, command: str) -> Iterator[None]:
    """Hold the lock of a local folder, which is made if needed, while one process of `command` writes there.

    A folder that was made for the lock and is still empty is removed at the end. A bucket has no locks, and some shared
    file systems have none: there, nothing is refused, and for a file system without locks a warning is logged.

    Raises:
        OutputError: another process holds the lock, or the folder cannot be written.
    """
    if remote.as_store_path(out) is not None:
        yield
        return
    with _hold(out / LOCK, out, command):
        yield


@contextlib.contextmanager
def lock_bundle(out: Path, command: str) -> Iterator[None]:
    """Hold a lock as `lock` does, in a file next to `out`: a bundle appears when it is complete, without other files.

    Raises:
        OutputError: another process holds the lock, or the folder of `out` cannot be written.
    """
    if remote.as_store_path(out) is not None:
        yield
        return
    with _hold(out.parent / f".{out.name}{LOCK}", out, command):
        yield


@contextlib.contextmanager
def _hold(path: Path, out: Path, command: str) -> Iterator[None]:
    """Hold the lock of `out` in the file `path`, whose folder is made if needed and removed if it is still empty."""
    is_new = not path.parent.exists()
    descriptor = _open_lock(path, out, command)
    try:
        yield
    finally:
        # Before the lock is released: later, another process could hold the lock of this file.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)
        if is_new:
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _open_lock(path: Path, out: Path, command: str) -> int:
    """Return a descriptor that holds the lock of `out`; the file names its holder."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _cannot_write(out, error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode("utf-8", "replace") or "another command"
            os.close(descriptor)
            raise OutputError(
                f"{out}: {holder} is writing here; wait for it, stop it, or choose another --out"
            ) from None
        except OSError as error:  # such as Lustre without its option `flock`
            reason = error.strerror or type(error).__name__
            logger.warning("%s: this file system has no locks (%s): start no second command here", out, reason)
            return descriptor
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            with contextlib.suppress(OSError):  # on a full disk the holder has no name
                os.truncate(descriptor, 0)
                os.write(descriptor, f"`ray-cxr {command}` (process {os.getpid()} on {socket.gethostname()})".encode())
            return descriptor
        os.close(descriptor)  # its holder has just removed the file


def _refuse_file(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; choose another --out")


def _cannot_write(out: Path, error: OSError) -> OutputError:
    return OutputError(f"{out}: cannot be written: {error.strerror or error}; choose another --out")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names, so that a message can name a difference."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _shorten(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
