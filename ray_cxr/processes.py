"""What the processes of a command inherit: a module path without the working directory, and Ray's folder."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ray_cxr.errors import RayCxrError

logger = logging.getLogger(__name__)

#: Maximum length of the path of a Unix socket, bytes: `sun_path` without its final zero byte (unix(7)).
_MAX_SOCKET = 103 if sys.platform == "darwin" else 107
#: What Ray appends to its folder: a session with a process id of seven digits, and its longest name of a socket.
_LONGEST_SOCKET = "/session_2026-01-31_23-59-59_123456_4194304/sockets/dash_TaskEventsHead"
MAX_FOLDER = _MAX_SOCKET - len(_LONGEST_SOCKET)
#: Parents of a short folder; the first one that can be written is used.
_SHORT_PARENTS = ("/tmp", "/var/tmp", "/dev/shm")


def build_module_path() -> str:
    """Return `PYTHONPATH` for a child process: this process's module path without the working directory.

    A user's own `numpy.py` or `random.py` may lie there. The folder of this package is appended if it is missing.
    """
    try:
        here = os.getcwd()
    except OSError:  # the folder was removed
        here = ""
    root = str(Path(__file__).parents[1])
    absolute = (os.path.join(here, entry) for entry in sys.path)
    path = [os.path.normpath(entry) for entry in absolute if os.path.isabs(entry)]
    return os.pathsep.join(dict.fromkeys([*(entry for entry in path if entry != here), root]))


@contextlib.contextmanager
def provide_ray_folder() -> Iterator[str]:
    """Yield the folder for the sessions of a local Ray: its default, `ray` in TMPDIR, if that can be used.

    The paths of Unix sockets are limited to about 100 bytes. If TMPDIR is too long, the folder is a short link to it;
    if it cannot be written, a short folder. Both are removed when the block ends.
    """
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform.startswith("linux") else ("RAY_TMPDIR",)  # as Ray does
    variable = next((name for name in names if os.environ.get(name)), None)
    folder = os.path.join(os.path.abspath(os.environ[variable]) if variable else "/tmp", "ray")
    reason = _find_obstacle(folder)
    length = len(os.fsencode(folder))
    if reason is None and length <= MAX_FOLDER:
        yield folder
        return
    source = f"{variable}={os.environ[variable]}" if variable else folder
    if reason is None:
        problem = f"{source} is too long for them ({length} bytes with Ray's part, at most {MAX_FOLDER})"
    else:
        problem = f"{source} cannot be used ({reason})"
    parent = _make_short_folder(problem)
    try:
        short = parent / "r"
        if reason is None:
            short.symlink_to(folder)
        else:
            short.mkdir()
        logger.info("Ray's sockets are in %s, because %s", short, problem)
        yield str(short)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _find_obstacle(folder: str) -> str | None:
    """Create Ray's folder if it is missing; return why it cannot be written, or None."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        return error.strerror or type(error).__name__
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} belongs to another user"


def _make_short_folder(problem: str) -> Path:
    for parent in dict.fromkeys((*_SHORT_PARENTS, tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="ray_cxr-", dir=parent))
            if len(os.fsencode(folder)) + 2 <= MAX_FOLDER:
                return folder
            folder.rmdir()
    raise RayCxrError(
        f"Ray's sockets: {problem}, and {', '.join(_SHORT_PARENTS)} cannot be written; set RAY_TMPDIR to a writable "
        f"folder of at most {MAX_FOLDER - 4} bytes"
    )
