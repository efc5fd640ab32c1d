"""Start a Ray for one command, or join a cluster. The only module that calls `ray.init`."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import ray_cxr
from ray_cxr import cluster, config
from ray_cxr.data import atomic
from ray_cxr.errors import InputError, RayCxrError
from ray_cxr.progress import quiet_stderr

#: For any Ray: its C++ layer prints to the terminal what belongs into its log.
ANY_RAY = {"RAY_BACKEND_LOG_LEVEL": "fatal"}
#: For a Ray of a command's own; whoever sets one of these in the environment is heeded.
OWN_RAY = {
    # On a loaded two-core machine Ray's own 60 s for its node process, and 20 s for its head, are too few.
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_port_wait_time_s": "180",
    # What Ray does by itself where this is unset, with a warning.
    "RAY_AUTH_MODE": "token",
    # Nothing about a hospital's machine leaves it.
    "RAY_USAGE_STATS_ENABLED": "0",
    **ANY_RAY,
    # No machine of a laptop's Ray is taken back by a cloud.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


@contextlib.contextmanager
def start_ray(settings: config.RaySettings, *, dashboard: bool = False) -> Iterator[None]:
    """A Ray to work with: the one that is there already, a cluster's, or one of this command's own.

    Args:
        settings: where.
        dashboard: a Ray of this command's own gets a dashboard, on this machine alone.
    """
    # Never a Ray that merely happens to run on this machine: "local" starts one of this command's own.
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray's C++ layer reads its environment once, on import; set later, client and server would disagree.
    if "ray" not in sys.modules:
        for name, value in (OWN_RAY if address == "local" else ANY_RAY).items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        cluster.place_work(settings.on_head)
        yield
        return
    own: dict[str, Any] = {}
    if address == "local":
        ensure_token()
        own = {
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "object_store_memory": settings.object_store_mb and settings.object_store_mb << 20,
            "include_dashboard": dashboard,
        }
    try:
        with quiet_stderr(), _found_by_its_own(address if dashboard else ""):
            # Workers' own chatter stays in Ray's log folder; their errors are raised.
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **own)  # noqa: TID251
    except Exception as error:  # Ray raises bare ones where a node does not come up within its own 30 seconds
        if differing := _version_mismatch(str(error)):
            raise InputError(f"Ray at {address!r}: {differing}") from None
        hint = "; the machine may be busy: run the command again" if "timed out during startup" in str(error) else ""
        raise RayCxrError(f"Ray at {address!r}: {' '.join(str(error).split())[:300]}{hint}") from None
    cluster.set_own(address == "local")
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        # What `ray job stop` sends. Ray's own handler ends the process where it stands, with nothing said.
        signal.signal(signal.SIGTERM, _stop)
    # The commands show progress of their own, of images and not of blocks, and Ray Data need not say so.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    # A task that was lost with its worker is no reason for a traceback: what it leaves undone is said, and done again.
    logging.getLogger("ray.data._internal.execution.streaming_executor_state").setLevel(logging.CRITICAL)
    try:
        if address != "local":
            _refuse_other_versions(address)
            cluster.wait_for_work(settings.on_head)
        cluster.place_work(settings.on_head)
        yield
    finally:
        ray.shutdown()
        cluster.set_own(False)
        if in_main_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ensure_token() -> None:
    """Make sure that a Ray of this command's own finds a token, wherever the home folder is missing or not writable.

    Ray reads `~/.ray/auth_token` by HOME. Where none can be kept there, it lies in a private temporary folder until
    this process ends.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        return
    home = Path(os.environ.get("HOME") or os.devnull)
    try:
        kept = home / ".ray" / "auth_token"
        if not (kept.is_file() and kept.read_text(encoding="utf-8").strip()):
            kept.parent.mkdir(exist_ok=True)
            atomic.write(kept, _write_token)
    except (OSError, UnicodeDecodeError):
        folder = Path(tempfile.mkdtemp(prefix="ray_cxr-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _write_token(folder / "auth_token")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "auth_token")


def _write_token(path: Path) -> None:
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="utf-8")


def _version_mismatch(said: str) -> str | None:
    """Ray's six lines on its own or Python's version being another, as one; None where it says another thing."""
    found = re.findall(r"^\s*(Ray|Python): (\S+)$", said, re.MULTILINE)
    if "Version mismatch" not in said or [name for name, _ in found] != ["Ray", "Python"] * 2:
        return None
    (_, ray_there), (_, python_there), (_, ray_here), (_, python_here) = found
    return (
        f"the cluster has Ray {ray_there} and Python {python_there}, this command Ray {ray_here} and Python "
        f"{python_here}; make them equal (scripts/setup with PYTHON=..., on both sides), or submit the command as a "
        "job, which runs on the cluster"
    )


def _refuse_other_versions(address: str) -> None:
    """Ask the nodes of a cluster for their ray_cxr: what is sent to them calls the one that is there.

    Raises:
        InputError: a node has another version, or none.
    """

    def version_there() -> str | None:  # nested, so that it travels by value and needs no ray_cxr to be run
        try:
            import ray_cxr
        except ImportError:
            return None
        return ray_cxr.__version__

    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    for node, there in cluster.ask(version_there, alive):
        if there != ray_cxr.__version__:
            has = f"has ray_cxr {there}" if there else "has no ray_cxr"
            raise InputError(
                f"Ray at {address!r}: the node {node['NodeManagerAddress']} {has}, this command is "
                f"{ray_cxr.__version__}; install this version there, or submit the command as a job with "
                "--working-dir, which takes it along"
            )


def _stop(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _found_by_its_own(address: str) -> Iterator[None]:
    """While a Ray of this command's own starts: its processes get its address into their environment.

    Without it they look for the one Ray on this machine, and where there are two Ray's state API finds none. Ray Train
    then never frees what a killed run holds.
    """
    if address != "local":
        yield
        return
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    added = {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
