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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil

import ray_cxr
from ray_cxr import cluster, config
from ray_cxr.errors import InputError, RayCxrError
from ray_cxr.progress import silence_stderr
from ray_cxr.storage import atomic

logger = logging.getLogger(__name__)

#: For any Ray: its C++ layer prints to the terminal what belongs into its log.
ANY_RAY = {"RAY_BACKEND_LOG_LEVEL": "fatal"}
#: Defaults for a Ray that a command starts; a variable that is set in the environment wins.
OWN_RAY = {
    # On a loaded two-core machine Ray's own 60 s for its node process, and 20 s for its head, are too few.
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_port_wait_time_s": "180",
    # Ray's default when this is unset, without its warning.
    "RAY_AUTH_MODE": "token",
    # Nothing about a hospital's machine leaves it.
    "RAY_USAGE_STATS_ENABLED": "0",
    **ANY_RAY,
    # No machine of a laptop's Ray is taken back by a cloud.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


#: Seconds that a cluster is given to answer.
JOIN_TIMEOUT_S = 30.0
#: Seconds without an answer after which a cluster counts as gone. Ray itself ends the process after 60, without a line.
LOSS_TIMEOUT_S = 45.0
#: Seconds that a command is given to end after its Ray is gone.
END_TIMEOUT_S = 5.0
#: Seconds in which Ray's processes end after a `ray stop`.
SHUTDOWN_S = 3.0
#: Seconds between looks at whether Ray is still there.
_LOOK_S = 1.0


@contextlib.contextmanager
def start_ray(settings: config.RaySettings, *, dashboard: bool = False) -> Iterator[None]:
    """Use the Ray that this process has, join a cluster, or start a Ray of the command's own.

    Args:
        settings: which.
        dashboard: a Ray of the command's own gets a dashboard, on this machine alone.

    Raises:
        RayCxrError: Ray does not start, the cluster does not answer, or Ray goes away while the block runs.
        InputError: the cluster has other versions.
    """
    # Never a Ray that merely happens to run on this machine: "local" starts one of this command's own.
    address = settings.address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray's C++ layer reads its environment once, on import; set later, client and server would disagree.
    if "ray" not in sys.modules:
        for name, value in (OWN_RAY if address == "local" else ANY_RAY).items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        cluster.select_nodes(settings.on_head)
        yield
        return
    exempt = cluster.bypass_proxies(_own_addresses())
    if address == "local":
        ensure_token()
        options: dict[str, Any] = {
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "object_store_memory": settings.object_store_mb and settings.object_store_mb << 20,
            "include_dashboard": dashboard,
        }
    else:
        source = "ray.address" if settings.address else "RAY_ADDRESS"
        options = _join_options(_wait_for_answer(address, source), exempt)
    try:
        with silence_stderr(), _found_by_its_own(address if dashboard else ""):
            # Workers' own chatter stays in Ray's log folder; their errors are raised.
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)  # noqa: TID251
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
    watch = _Watch(address)
    try:
        with _report_sudden_end(), watch:
            if address != "local":
                _refuse_other_versions(address)
                cluster.wait_for_node(settings.on_head)
            cluster.select_nodes(settings.on_head)
            yield
    finally:
        if watch.reason is None:  # otherwise it would wait for a Ray that is gone
            ray.shutdown()
        cluster.set_own(False)
        if in_main_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _own_addresses() -> list[str]:
    """Return the names and addresses of this machine."""
    found = ["localhost", socket.gethostname()]
    for addresses in psutil.net_if_addrs().values():
        found += [one.address.partition("%")[0] for one in addresses if one.family in (socket.AF_INET, socket.AF_INET6)]
    return found


def _wait_for_answer(address: str, source: str) -> str:
    """Wait until a cluster answers; Ray itself tries for many minutes without a word.

    Args:
        address: as a user gives it.
        source: where it was given, `ray.address` or `RAY_ADDRESS`.

    Returns:
        HOST:PORT.

    Raises:
        InputError: an address of another kind.
        RayCxrError: no answer within `JOIN_TIMEOUT_S`.
    """
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{source}={address}: is the address for `ray job submit`; give HOST:6379 or ray://HOST:10001, or unset it "
            "for a Ray on this machine"
        )
    target = address.removeprefix("ray://")
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            target = canonicalize_bootstrap_address(address)
        except ConnectionError:
            raise RayCxrError(f"{source}=auto: no Ray runs on this machine; start one, or leave it out") from None
    logger.info("joining Ray at %s (%s)", target, source)
    if not _answers(target, JOIN_TIMEOUT_S):
        raise RayCxrError(
            f"Ray at {target} ({source}): no answer within {JOIN_TIMEOUT_S:.0f} s; check that the cluster runs "
            f"(`ray status --address {target}`) and that this machine reaches it, or leave {source} out for a Ray on "
            "this machine"
        )
    return target


def _answers(target: str, timeout_s: float) -> bool:
    """Return whether a server of gRPC answers at HOST:PORT within some seconds."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # its handshake needs Ray's certificates
        host, _, port = target.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
        except (OSError, ValueError):
            return False
        return True
    import grpc

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            return False
    return True


def _join_options(target: str, exempt: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of `ray.init` for a cluster: behind a proxy, workers must reach its head without it."""
    cluster.bypass_proxies([target.rpartition(":")[0]])
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "grpc_proxy")
    if not any(os.environ.get(name) for name in proxies):
        return {}
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # a job's own variables are among these already
    return {"runtime_env": {"env_vars": {name: os.environ[name] for name in exempt}}}


@contextlib.contextmanager
def _report_sudden_end() -> Iterator[None]:
    """Make sure that a line is printed when this process is killed while the block runs.

    Ray's C++ layer ends the process at once when the node's raylet is gone, and the system may kill it for its memory.
    A shell waits for one line of this process; at the end of the pipe without it, the shell prints the message.
    """
    message = (
        "ray-cxr: the command was ended from outside: Ray went away (`ray stop`, or its node was lost), or the system "
        "killed it (memory?); the same command continues"
    )
    script = 'read -r line || printf "%s\\n" "$1" >&2'
    try:
        shell = subprocess.Popen(
            ["sh", "-c", script, "sh", message],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        yield
        return

    def end() -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            shell.communicate(b"ended\n", timeout=5)

    try:
        yield
    except BaseException:
        atexit.register(end)  # until the error is printed, Ray can still end this process
        raise
    end()


class _Watch:
    """Notices that Ray goes away while a block runs, and ends the block with an error.

    The calls of a command would wait for Ray until its C++ layer ends the process, without a line.

    Attributes:
        reason: what is wrong; None while Ray is there.
    """

    def __init__(self, address: str) -> None:
        self.reason: str | None = None
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._servers: list[psutil.Process] = []
        self._target: str | None = None
        if not address.startswith("ray://"):
            import ray

            self._target = ray.get_runtime_context().gcs_address
        if address == "local":
            names = ("gcs_server", "raylet")
            self._servers = [child for child in psutil.Process().children() if child.name() in names]
        self._thread = threading.Thread(target=self._loop, name="ray-watch", daemon=True)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():  # the only thread that a signal can interrupt
            self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._ending:
            self._over.set()
        # An error of Ray can be the consequence of a lost Ray, whose processes end some moments later.
        deadline = time.monotonic() + (SHUTDOWN_S if _comes_from_ray(error) else 0)
        while self.reason is None and time.monotonic() < deadline:
            if not self._is_there(0):
                self.reason = self._describe()
            time.sleep(0.1)
        if self.reason is not None:
            raise RayCxrError(self.reason) from error

    def _loop(self) -> None:
        while not self._over.wait(_LOOK_S):
            if self._is_there(LOSS_TIMEOUT_S):
                continue
            with self._ending:
                if self._over.is_set():  # the block has ended, and Ray was shut down after it
                    return
                self.reason = self._describe()
                # `_stop` raises in the main thread, also out of a system call. A background job ignores SIGINT.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if not self._over.wait(END_TIMEOUT_S):
                # The main thread waits inside Ray and cannot be interrupted.
                os._exit(1)  # `_report_sudden_end` prints why
            return

    def _is_there(self, patience_s: float) -> bool:
        """Return whether Ray still answers; a cluster's head may restart within some seconds."""
        if self._target is None:
            return True
        if self._servers:
            alive = all(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in self._servers)
            return alive and not _refuses(self._target)
        return _answers(self._target, 2.0) or (patience_s > 0 and _answers(self._target, patience_s))

    def _describe(self) -> str:
        where = f" at {self._target}" if self._target and not self._servers else ""
        return f"Ray{where} went away (`ray stop`, or its node was lost); the same command continues"


def _comes_from_ray(error: BaseException | None) -> bool:
    """Return whether an exception of Ray is this error or its cause."""
    while error is not None:
        if type(error).__module__.partition(".")[0] == "ray":
            return True
        error = error.__cause__
    return False


def _refuses(target: str) -> bool:
    """Return whether no server listens at HOST:PORT; one that is slow to answer still listens."""
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 2.0).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


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
    for node, there in cluster.query_nodes(version_there, alive):
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
