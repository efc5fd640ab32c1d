"""Start Ray for one command, or join a cluster. No other module calls `ray.init`."""

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
from ray_cxr import cluster, config, environment, limits, processes, ray_api
from ray_cxr.errors import ConfigError, InputError, RayCxrError, one_line
from ray_cxr.progress import Stage, silence_stderr
from ray_cxr.storage import atomic

logger = logging.getLogger(__name__)

#: Environment for every Ray.
ANY_RAY = {
    # Ray's C++ layer prints no log lines to the terminal.
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    # With `uv run`, Ray would upload the working directory, images included, and start its workers through uv.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
#: Environment for a Ray that a command starts. Variables that the user has set are kept.
OWN_RAY = {
    # On a loaded two-core machine, Ray's defaults are too short: 60 s for its node process and 20 s for its head.
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_gcs_server_port_wait_time_s": "180",
    # The default of Ray; setting it avoids Ray's warning.
    "RAY_AUTH_MODE": "token",
    # Send no usage statistics from a hospital's machine.
    "RAY_USAGE_STATS_ENABLED": "0",
    **ANY_RAY,
    # No cloud reclaims a local Ray's machine.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
#: Seconds to wait for a cluster to answer.
JOIN_TIMEOUT_S = 30.0
#: Seconds without an answer after which a cluster counts as lost. After 60 s Ray ends the process without a message.
LOSS_TIMEOUT_S = 45.0
#: After Ray is lost, a command gets this many seconds to end by itself; then the process exits.
END_TIMEOUT_S = 5.0
#: Maximum seconds that Ray's processes take to end after `ray stop`.
SHUTDOWN_S = 3.0
#: Seconds between two checks of whether Ray still runs.
_POLL_S = 1.0


def require_gpu(settings: config.RaySettings) -> None:
    """Refuse `--gpu` before a local Ray starts on a machine without a GPU; on a cluster, its nodes count.

    Raises:
        ConfigError: this machine has no GPU.
    """
    is_running = "ray" in sys.modules and sys.modules["ray"].is_initialized()
    if _choose_address(settings) == "local" and not is_running and not environment.count_gpus():
        raise ConfigError(
            "--gpu: this machine has no GPU that CUDA can use; omit --gpu, or name a cluster with ray.address"
        )


def _choose_address(settings: config.RaySettings) -> str:
    """Return where Ray runs; "local" starts a new Ray, while Ray's own default would join any Ray on this machine."""
    return settings.address or os.environ.get("RAY_ADDRESS") or "local"


@contextlib.contextmanager
def start_ray(settings: config.RaySettings, *, dashboard: bool = False) -> Iterator[None]:
    """Use this process's Ray, join a cluster, or start a local Ray and stop it when the block ends.

    The dashboard of a local Ray is reachable only from this machine.

    Raises:
        RayCxrError: If Ray cannot start, or is lost while the block runs.
    """
    address = _choose_address(settings)
    environment.prepare_for_ray()
    # Ray's C++ layer reads these variables when Ray is imported. If they are set later, client and server disagree.
    if "ray" not in sys.modules:
        for name, value in (OWN_RAY if address == "local" else ANY_RAY).items():
            os.environ.setdefault(name, value)
    with Stage("loading Ray"):
        environment.import_ray()
    import ray

    cluster.check_labels(settings.label_selector, settings.prefer)
    if ray.is_initialized():
        cluster.select_nodes(settings.on_head, settings.label_selector, settings.prefer)
        yield
        return
    bypassed = cluster.bypass_proxies(_list_own_addresses())
    with contextlib.ExitStack() as stack:
        if address == "local":
            folder = stack.enter_context(processes.provide_ray_folder())
            options, variables = _build_local_options(settings, folder, dashboard=dashboard)
        else:
            source = "ray.address" if settings.address else "RAY_ADDRESS"
            target = _wait_for_answer(address, source)
            if not address.startswith("ray://"):
                check_token(target)
            options, variables = _build_join_options(target, bypassed), {}
        if not address.startswith("ray://"):  # a client's job runs on the cluster
            options["job_config"] = _make_job_config()
        _init_ray(address, options, variables)
        cluster.owns_ray = address == "local"
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread:
            # `ray job stop` sends SIGTERM. Ray's own handler for it ends the process without a message.
            signal.signal(signal.SIGTERM, _interrupt)
        watch = _RayWatch(address)
        try:
            with _report_sudden_end(), watch:
                if address != "local":
                    _refuse_other_versions(address)
                    cluster.wait_for_node(settings.on_head, settings.label_selector)
                cluster.select_nodes(settings.on_head, settings.label_selector, settings.prefer)
                yield
        finally:
            if watch.loss is None:  # `ray.shutdown` would wait for a lost Ray
                ray.shutdown()
            cluster.owns_ray = False
            if in_main_thread:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _init_ray(address: str, options: Mapping[str, Any], variables: Mapping[str, str]) -> None:
    """Call `ray.init` with these environment variables; every failure is one line."""
    import ray

    try:
        title = "starting Ray" if address == "local" else "joining Ray"
        with Stage(title), silence_stderr(), cluster.set_environment(variables):
            # The output of workers stays in Ray's log folder. Their errors are raised here.
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **options)  # noqa: TID251
    except Exception as error:  # Ray raises a bare Exception if a node does not start within 30 seconds
        if mismatch := _describe_version_mismatch(str(error)):
            raise InputError(f"Ray at {address!r}: {mismatch}") from None
        hint = "; the machine may be busy: run the command again" if "timed out during startup" in str(error) else ""
        raise RayCxrError(f"Ray at {address!r}: {one_line(error)[:300]}{hint}") from None


def _build_local_options(
    settings: config.RaySettings, folder: str, *, dashboard: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the options of `ray.init` and the environment variables for a Ray of this command."""
    _require_loopback()
    ensure_token()
    # Ray starts some of its processes with `python -c`, which would import modules from the working directory.
    variables = {"PYTHONPATH": processes.build_module_path(), "PYTHONSAFEPATH": "1"}
    cpus = settings.num_cpus or environment.count_cpus()
    limits.check_processes(cpus)
    options = {
        "num_cpus": cpus,
        "num_gpus": settings.num_gpus,
        "object_store_memory": settings.object_store_mb and settings.object_store_mb << 20,
        "include_dashboard": dashboard,
        "_temp_dir": folder,
    }
    return options, variables | (_build_address_variables() if dashboard else {})


def _require_loopback() -> None:
    """Refuse a machine whose processes cannot connect to each other; Ray would wait for that without a message."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise RayCxrError(
            f"Ray: no network interface is up on this machine, not even the loopback ({error.strerror or error}), over "
            "which Ray's processes talk to each other; run `ip link set lo up`, or use a container with a network"
        ) from None


def _make_job_config() -> Any:
    """Return a job configuration that keeps the working directory out of the workers' module path.

    Ray itself appends this directory; a user's own `numpy.py` or `random.py` there would then replace the library in
    every worker.
    """
    from ray.job_config import JobConfig

    class _JobConfig(JobConfig):
        def _serialize(self) -> Any:
            # Ray appends the script's folder, then the working directory. The same folder may be both.
            path, here = self._py_driver_sys_path, os.path.abspath(os.curdir)
            if path and path[-1] == here:
                del path[-1]
            return super()._serialize()

    return _JobConfig()


def _list_own_addresses() -> list[str]:
    """Return the host names and IP addresses of this machine."""
    families = (socket.AF_INET, socket.AF_INET6)
    entries = [entry for interface in psutil.net_if_addrs().values() for entry in interface]
    addresses = [entry.address.partition("%")[0] for entry in entries if entry.family in families]
    return ["localhost", socket.gethostname(), *addresses]


def _wait_for_answer(address: str, source: str) -> str:
    """Wait until a cluster answers at an address, and return its HOST:PORT; `ray.init` retries silently for minutes.

    An error names the `source` of the address: `ray.address` or `RAY_ADDRESS`.
    """
    if address.startswith(("http://", "https://")):
        raise InputError(
            f"{source}={address}: is the address for `ray job submit`; use HOST:6379 or ray://HOST:10001, or unset it "
            "to start Ray on this machine"
        )
    target = address.removeprefix("ray://")
    if address == "auto":
        try:
            target = ray_api.find_own_head()
        except ConnectionError:
            raise RayCxrError(f"{source}=auto: no Ray runs on this machine; start one, or unset it") from None
    logger.info("joining Ray at %s (%s)", target, source)
    if not _is_reachable(target, JOIN_TIMEOUT_S):
        raise RayCxrError(
            f"Ray at {target} ({source}): no answer within {JOIN_TIMEOUT_S:.0f} s; check that the cluster runs "
            f"(`ray status --address {target}`) and that this machine reaches it, or unset {source} to start Ray on "
            "this machine"
        )
    return target


def _is_reachable(target: str, timeout_s: float) -> bool:
    """Return whether a gRPC server answers at HOST:PORT within `timeout_s` seconds."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):  # a TLS handshake would need Ray's certificates
        return _try_to_connect(target, timeout_s) is None
    import grpc

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            return False
    return True


def _build_join_options(target: str, bypassed: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of `ray.init` for a cluster; with a proxy, they let its workers reach the head directly."""
    cluster.bypass_proxies([target.rpartition(":")[0]])
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "grpc_proxy")
    if not any(os.environ.get(name) for name in proxies):
        return {}
    # Let the `no_proxy` variables in `bypassed` replace those in a submitted job's runtime_env. No host of the job is
    # lost, because `bypass_proxies` only adds hosts to the job's variables.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    return {"runtime_env": {"env_vars": {name: os.environ[name] for name in bypassed}}}


def check_token(target: str) -> None:
    """Refuse a cluster whose authentication does not match this command's.

    Ray would detect a mismatch late or not at all: tasks of a command that requires a token never start on a cluster
    without one.
    """
    mode, is_open = os.environ.get("RAY_AUTH_MODE", "").lower(), _is_accepted(target, {})
    if is_open is None or (is_open and mode not in ("", "token")):
        return
    try:
        token = ray_api.load_token()
    except Exception as error:  # the file of RAY_AUTH_TOKEN_PATH is missing or empty
        raise InputError(f"Ray at {target}: {one_line(error)[:300]}") from None
    problem, remedy = "", "copy ~/.ray/auth_token from the head to this machine, or set RAY_AUTH_TOKEN_PATH"
    if is_open:
        if token or mode == "token":
            problem = "the cluster uses no token, but this command has one and would require it"
            remedy = "set RAY_AUTH_MODE=disabled here, or start the cluster with RAY_AUTH_MODE=token and this token"
    elif mode not in ("", "token"):
        problem, remedy = f"the cluster requires a token, but RAY_AUTH_MODE={mode} is set", "unset it"
    elif not token:
        problem = "the cluster requires a token, and this command has none"
    elif _is_accepted(target, token) is False:
        problem = "the cluster rejects this command's token"
    if problem:
        raise InputError(f"Ray at {target}: {problem}; {remedy}")


def _is_accepted(target: str, headers: Mapping[str, str]) -> bool | None:
    """Return whether the head at HOST:PORT accepts a call with these headers; None if it does not say."""
    import grpc

    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            ray_api.call_head(channel, headers, JOIN_TIMEOUT_S)
        except grpc.RpcError as error:
            return False if error.code() == grpc.StatusCode.UNAUTHENTICATED else None
    return True


@contextlib.contextmanager
def _report_sudden_end() -> Iterator[None]:
    """Print an error line even if this process is killed while the block runs.

    Ray's C++ layer kills the process when the raylet is lost, and the system may kill it when memory runs out. So a
    child process, a shell, waits for a line from this process, and prints the error if the pipe closes without it.
    """
    message = (
        "ray-cxr: the command was killed: Ray stopped (`ray stop`, or its node was lost), or the system killed it "
        "(out of memory?); run the same command again to continue"
    )
    script = 'read -r line || printf "%s\\n" "$1" >&2'
    try:
        command = ["sh", "-c", script, "sh", message]
        shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    except OSError:
        yield
        return

    def dismiss() -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            shell.communicate(b"ended\n", timeout=5)

    try:
        yield
    except BaseException:
        atexit.register(dismiss)  # at exit, because Ray can still kill this process before the error is printed
        raise
    dismiss()


class _RayWatch:
    """End a block with an error when Ray is lost, before Ray's C++ layer ends the process without a message.

    Attributes:
        loss: Message of the error; None while Ray is running.
    """

    def __init__(self, address: str) -> None:
        self.loss: str | None = None
        self._end = threading.Event()
        self._end_lock = threading.Lock()
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
        if threading.current_thread() is threading.main_thread():  # a signal interrupts only the main thread
            self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._end_lock:
            self._end.set()
        # Ray may raise an error before all of its processes have ended.
        deadline = time.monotonic() + (SHUTDOWN_S if _comes_from_ray(error) else 0)
        while self.loss is None and time.monotonic() < deadline:
            if not self._is_running(0):
                self.loss = self._describe()
            time.sleep(0.1)
        if self.loss is not None:
            raise RayCxrError(self.loss) from error

    def _loop(self) -> None:
        while not self._end.wait(_POLL_S):
            if self._is_running(LOSS_TIMEOUT_S):
                continue
            with self._end_lock:
                if self._end.is_set():  # the block has ended and Ray was shut down
                    return
                self.loss = self._describe()
                # Not SIGINT, which a command that a script started with `&` ignores. SIGTERM also ends a blocking
                # system call, because `_interrupt` raises.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            if not self._end.wait(END_TIMEOUT_S):
                os._exit(1)  # the main thread is blocked inside Ray; `_report_sudden_end` prints the reason
            return

    def _is_running(self, patience_s: float) -> bool:
        """Return whether Ray answers; a cluster's head has `patience_s` seconds, because it may be restarting."""
        if self._target is None:
            return True
        if self._servers:
            is_alive = all(server.is_running() and server.status() != psutil.STATUS_ZOMBIE for server in self._servers)
            # A server that is too slow to accept the connection still listens.
            return is_alive and not isinstance(_try_to_connect(self._target, 2.0), ConnectionRefusedError)
        return _is_reachable(self._target, 2.0) or (patience_s > 0 and _is_reachable(self._target, patience_s))

    def _describe(self) -> str:
        where = f" at {self._target}" if self._target and not self._servers else ""
        return f"Ray{where} stopped (`ray stop`, or its node was lost); run the same command again to continue"


def _comes_from_ray(error: BaseException | None) -> bool:
    """Return whether this error, or one of its causes, was raised by Ray."""
    while error is not None:
        if type(error).__module__.partition(".")[0] == "ray":
            return True
        error = error.__cause__
    return False


def _try_to_connect(target: str, timeout_s: float) -> Exception | None:
    """Open a connection to HOST:PORT and close it; return the error if that fails."""
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except (OSError, ValueError) as error:
        return error
    return None


def ensure_token() -> None:
    """Create the token of a local Ray if it is missing: in `$HOME/.ray`, or in a temporary folder if that fails."""
    if os.environ.get("RAY_AUTH_MODE") != "token" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        return
    home = Path(os.environ.get("HOME") or os.devnull)
    try:
        path = home / ".ray" / "auth_token"
        if not (path.is_file() and path.read_text(encoding="utf-8").strip()):
            path.parent.mkdir(exist_ok=True)
            atomic.write(path, _write_token)
    except (OSError, UnicodeDecodeError):
        folder = Path(tempfile.mkdtemp(prefix="ray_cxr-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _write_token(folder / "auth_token")
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(folder / "auth_token")


def _write_token(path: Path) -> None:
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="utf-8")


def _describe_version_mismatch(message: str) -> str | None:
    """Return one line for Ray's six-line message about different versions; None for any other message."""
    found = re.findall(r"^\s*(Ray|Python): (\S+)$", message, re.MULTILINE)
    if "Version mismatch" not in message or [name for name, _ in found] != ["Ray", "Python"] * 2:
        return None
    (_, cluster_ray), (_, cluster_python), (_, own_ray), (_, own_python) = found
    return (
        f"the cluster has Ray {cluster_ray} and Python {cluster_python}, this command Ray {own_ray} and Python "
        f"{own_python}; install the same versions (scripts/setup with PYTHON=...), or submit the command as a job"
    )


def _refuse_other_versions(address: str) -> None:
    """Refuse a cluster with another version of ray_cxr, because tasks call the version installed on their node."""

    def read_version() -> str | None:  # nested, see `query_nodes`
        try:
            import ray_cxr
        except ImportError:
            return None
        return ray_cxr.__version__

    for node, version in cluster.query_nodes(read_version, cluster.list_alive()):
        if version != ray_cxr.__version__:
            has = f"has ray_cxr {version}" if version else "has no ray_cxr"
            raise InputError(
                f"Ray at {address!r}: the node {node['NodeManagerAddress']} {has}, this command is "
                f"{ray_cxr.__version__}; install this version there, or submit the command as a job with "
                "--working-dir, which uploads it"
            )


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _build_address_variables() -> dict[str, str]:
    """Return environment variables that tell the processes of a local Ray its address.

    If two Rays run on the machine, Ray's state API otherwise finds neither, and Ray Train never frees the resources of
    a killed run.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    return {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
