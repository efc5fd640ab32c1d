"""Connecting to Ray: versions are compared, and every failure is one line. Ray is a stand-in."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
import ray
from nodes import find_free_port
from ray._private import utils, worker
from ray._private.runtime_env import uv_runtime_env_hook
from ray._raylet import AuthenticationTokenLoader
from ray.core.generated import common_pb2

import ray_cxr
from ray_cxr import session
from ray_cxr.config import RaySettings
from ray_cxr.errors import InputError, RayCxrError

HERE = ray_cxr.__version__
REAL_REMOTE = ray.remote
HEAD = "10.0.0.1:6379"


class Cluster:
    """Answers the calls of `start_ray` by the version of each node; an exception is a lost node."""

    def __init__(self, answers: dict[str, str | Exception | None], silent: tuple[str, ...] = ()) -> None:
        self.answers, self.silent = answers, silent
        self.names = {
            hashlib.sha224(name.encode()).hexdigest(): name for name in answers
        }  # by an id as Ray requires it
        self.queried: list[str] = []
        self.options_seen: list[dict[str, Any]] = []
        self.shutdown = Mock()

    def nodes(self) -> list[dict[str, Any]]:
        names = [("0" * 56, "gone"), *self.names.items()]
        return [
            {"NodeID": node_id, "NodeManagerAddress": name, "Alive": name != "gone", "Resources": {}}
            for node_id, name in names
        ]

    def remote(self, *arguments: Any, **options: Any) -> Any:
        if options or arguments[0].__module__ != session.__name__:
            return REAL_REMOTE(*arguments, **options)  # Ray decorates its own functions on import
        assert arguments[0]() == HERE
        return self

    def options(self, **options: Any) -> Any:
        self.options_seen.append(options)
        name = self.names[options["scheduling_strategy"].node_id]
        return SimpleNamespace(remote=lambda: self.queried.append(name) or name)

    def wait(self, refs: list[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert num_returns == len(refs)
        assert timeout > 0
        return [ref for ref in refs if ref not in self.silent], [ref for ref in refs if ref in self.silent]

    def get(self, ref: str) -> str | None:
        answer = self.answers[ref]
        if isinstance(answer, Exception):
            raise answer
        return answer


class NoWatch(contextlib.nullcontext[None]):
    loss = None


Connect = Callable[..., None]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    def run(cluster: Cluster | None = None, address: str = HEAD, init: Callable[..., None] = lambda **_: None) -> None:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)
        for name in ("nodes", "remote", "wait", "get", "shutdown") if cluster else ():
            monkeypatch.setattr(ray, name, getattr(cluster, name))
        monkeypatch.setattr(session.cluster, "wait_for_node", lambda *_: None)
        monkeypatch.setattr(session, "_wait_for_answer", lambda address, source: address)
        monkeypatch.setattr(session, "check_token", lambda target: None)
        monkeypatch.setattr(session, "_RayWatch", NoWatch)
        with session.start_ray(RaySettings(address=address)):
            pass

    return run


def refusal(call: Callable[[], None], kind: type[RayCxrError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nodes_of_the_same_version_are_used(connect: Connect) -> None:
    cluster = Cluster({"a": HERE, "b": HERE})
    connect(cluster)
    assert cluster.queried == ["a", "b"]
    assert [options["num_cpus"] for options in cluster.options_seen] == [0, 0], "a head without CPUs answers too"
    cluster.shutdown.assert_called_once()
    # Lost and slow nodes are skipped, large clusters are sampled, and a local Ray is not queried.
    connect(Cluster({"a": HERE, "b": ray.exceptions.RayError("lost"), "slow": "9.9.9"}, silent=("slow",)))
    connect(Cluster({}))
    large, local = Cluster({f"n{number}": HERE for number in range(1000)}), Cluster({"a": "9.9.9"})
    connect(large)
    connect(local, address="local")
    assert 10 < len(large.queried) < 100
    assert not local.queried


@pytest.mark.parametrize(("version", "words"), [("9.9.9", "has ray_cxr 9.9.9"), (None, "has no ray_cxr")])
def test_node_with_another_version_is_refused(version: str | None, words: str, connect: Connect) -> None:
    cluster = Cluster({"a": HERE, "10.0.0.7": version})
    message = refusal(lambda: connect(cluster))
    assert f"node 10.0.0.7 {words}, this command is {HERE};" in message
    cluster.shutdown.assert_called_once()


@pytest.mark.parametrize(("other_ray", "other_python"), [("2.9.0", "3.11.4"), (ray.__version__, "3.9.1")])
def test_ray_or_python_of_another_version_is_refused(other_ray: str, other_python: str, connect: Connect) -> None:
    def init(**_: object) -> None:
        utils.check_version_info({"ray_version": other_ray, "python_version": other_python}, "node 10.0.0.1")

    message = refusal(lambda: connect(init=init))
    assert message.startswith(f"Ray at '{HEAD}': ")
    assert f"Ray {other_ray} and Python {other_python}, this command Ray {ray.__version__} and Python 3." in message


SLOW = "The current node timed out during startup. This could happen\nbecause the machine is slow."


@pytest.mark.parametrize("error", [Exception(SLOW), RuntimeError("Version mismatch: in other\nwords")])
def test_ray_that_does_not_start_is_one_line(error: Exception, connect: Connect) -> None:
    message = refusal(lambda: connect(address="local", init=Mock(side_effect=error)), RayCxrError)
    assert message.startswith(f"Ray at 'local': {' '.join(str(error).split())}")
    assert ("run the command again" in message) == ("timed out" in message)


# ---------------------------------------------------------------- a cluster that is gone, or goes away


@pytest.fixture
def port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def watch(port: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A watch of a local Ray whose only process is `Server`."""
    monkeypatch.setattr(session, "_POLL_S", 0.01)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=f"127.0.0.1:{port}"))
    made = session._RayWatch("local")
    made._servers = [Server()]
    return made


@pytest.mark.parametrize("source", ["ray.address", "RAY_ADDRESS"])
@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("listens", [False, True])
def test_cluster_that_does_not_answer_is_named_and_given_up(
    source: str, scheme: str, listens: bool, port: int, monkeypatch, caplog
) -> None:
    target = f"127.0.0.1:{port if listens else find_free_port()}"
    monkeypatch.setattr(session, "JOIN_TIMEOUT_S", 0.5)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", Mock(side_effect=AssertionError("Ray would wait for minutes")))
    settings = RaySettings(address=scheme + target) if source == "ray.address" else RaySettings()
    if source == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", scheme + target)

    def connect() -> None:
        with session.start_ray(settings):
            pass

    with caplog.at_level(logging.INFO):
        message = refusal(connect, RayCxrError)
    assert target in message
    assert source in message
    assert target in caplog.text


def test_address_of_the_job_api_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(InputError, match="ray job submit"), session.start_ray(RaySettings()):
        pass


class Server:
    """A stand-in for a process of Ray."""

    alive = True

    def is_running(self) -> bool:
        return self.alive

    def status(self) -> str:
        return "sleeping"


@pytest.mark.parametrize("lost", ["process", "port"])
def test_own_ray_that_is_lost_ends_a_block_with_one_line(lost: str, watch: Any) -> None:
    before = signal.signal(signal.SIGTERM, session._interrupt)  # as `start_ray` does

    def lose() -> None:
        with watch:
            time.sleep(0.1)
            assert watch.loss is None
            if lost == "process":
                watch._servers[0].alive = False
            else:
                watch._target = f"127.0.0.1:{find_free_port()}"
            time.sleep(60)

    assert "the same command again" in refusal(lose, RayCxrError)
    signal.signal(signal.SIGTERM, before)


def test_ray_that_is_shut_down_after_the_block_is_not_lost(watch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "pthread_kill", Mock(side_effect=AssertionError))
    is_checking = threading.Event()

    def check(_: float) -> bool:
        is_checking.set()
        time.sleep(0.2)
        return False

    monkeypatch.setattr(watch, "_is_running", check)
    with watch:
        assert is_checking.wait(10)
    watch._thread.join(10)
    assert watch.loss is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, RayCxrError, ValueError])
def test_errors_of_a_command_stay_while_ray_is_running(error: Any, watch: Any) -> None:
    with pytest.raises(error) as caught, watch:
        raise error("a reason")
    assert caught.value.args == ("a reason",)


@pytest.mark.parametrize("ending", ["os._exit(3)", "os.kill(os.getpid(), 9)", "sys.exit(0)", "raise KeyboardInterrupt"])
def test_a_command_that_is_killed_leaves_a_line(ending: str) -> None:
    program = f"import os, sys\nfrom ray_cxr import session\nwith session._report_sudden_end():\n    {ending}\n"
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, timeout=60)
    assert ("the same command again" in done.stderr) == ending.startswith("os.")


# ---------------------------------------------------------------- proxies


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, dict.fromkeys(("no_proxy", "NO_PROXY", "no_grpc_proxy"), "10.0.0.1,::1")),
        ({"NO_PROXY": "a.org, 10.0.0.1"}, dict.fromkeys(("no_proxy", "no_grpc_proxy"), "a.org,10.0.0.1,::1")),
        ({"no_proxy": "a.org", "no_grpc_proxy": "b.org"}, {"no_grpc_proxy": "b.org,10.0.0.1,::1"}),
        ({"no_proxy": "*"}, {"no_proxy": "*", "NO_PROXY": "*", "no_grpc_proxy": "*"}),
    ],
)
def test_only_hosts_of_the_cluster_are_exempt_from_proxies(
    given: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, given.get(name, ""))
    monkeypatch.setenv("https_proxy", "http://10.9.9.9:3128")
    for _ in range(2):  # twice changes nothing more
        session.cluster.bypass_proxies(["10.0.0.1", "[::1]", ""])
        assert {name: os.environ[name] for name in expected} == expected
    assert os.environ["https_proxy"] == "http://10.9.9.9:3128"
    if given.get("no_proxy") != "*":
        assert not urllib.request.proxy_bypass_environment("pypi.org")
    assert urllib.request.proxy_bypass_environment("10.0.0.1")


def test_workers_of_a_cluster_behind_a_proxy_reach_its_head(connect: Connect, monkeypatch) -> None:
    options: dict[str, Any] = {}
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    for proxy in ("", "http://10.9.9.9:3128"):
        monkeypatch.setenv("http_proxy", proxy)
        connect(Cluster({}), init=lambda **given: options.update(given))
        assert ("runtime_env" in options) == bool(proxy)
    variables = options["runtime_env"]["env_vars"]
    assert {"10.0.0.1", "localhost", "127.0.0.1"} <= set(variables["no_grpc_proxy"].split(","))


# ---------------------------------------------------------------- the token of a local Ray


def token_file(monkeypatch: pytest.MonkeyPatch, home: Path | None) -> Path:
    """Return the file in which a local Ray finds its token, with this HOME."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HOME"):
        monkeypatch.setenv(name, str(home))  # so that the present value returns after the test
        if home is None or name != "HOME":
            monkeypatch.delenv(name)
    session.ensure_token()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or f"{home}/.ray/auth_token")
    assert len(path.read_text(encoding="utf-8")) >= 32
    assert path.stat().st_mode & 0o777 == 0o600
    return path


def test_the_token_is_kept_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = token_file(monkeypatch, tmp_path)
    assert first == tmp_path / ".ray" / "auth_token"
    before = first.read_bytes()
    assert token_file(monkeypatch, tmp_path).read_bytes() == before
    first.write_bytes(b"")  # as Ray leaves it on a full disk
    assert token_file(monkeypatch, tmp_path).read_bytes() != b""


@pytest.mark.parametrize("home", ["unset", "missing", "a file", "read-only", "full"])
def test_a_home_that_cannot_hold_the_token_is_not_needed(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "home"
    if home == "a file":
        folder.write_text("")
    elif home != "missing":
        folder.mkdir()
    if home in ("read-only", "full"):  # root could write to a read-only folder
        error = OSError(errno.EROFS if home == "read-only" else errno.ENOSPC, "cannot be written", str(folder))
        monkeypatch.setattr(session.atomic, "write", Mock(side_effect=error))
    found = token_file(monkeypatch, None if home == "unset" else folder)
    assert tmp_path not in found.parents
    assert found.parent.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(found.parent)


@pytest.mark.parametrize("own", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_of_the_environment_is_left_alone(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv(own, "mine")
    session.ensure_token()
    assert os.environ[own] == "mine"
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the token of a cluster


@pytest.fixture
def head() -> Iterator[Callable[[str], str]]:
    """Returns a function that starts a head with this token, or '' for none, and returns its address."""
    servers = []

    def start(token: str) -> str:
        def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
            if token and dict(context.invocation_metadata()).get("authorization") != f"Bearer {token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        method = {"GetClusterId": grpc.unary_unary_rpc_method_handler(answer)}
        server = grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", method),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


@pytest.mark.parametrize(
    ("theirs", "own", "mode", "expected"),
    [
        ("", "", "", None),
        (
            "",
            "mine",
            "",
            "the cluster uses no token, but this command has one and would require it; set RAY_AUTH_MODE=d",
        ),
        ("", "mine", "disabled", None),
        ("", "mine", "token", "the cluster uses no token, but this command has one and would require it; set RAY_AUTH"),
        ("t", "t", "", None),
        ("t", "t", "token", None),
        ("t", "", "", "the cluster requires a token, and this command has none; copy ~/.ray/auth_token from the head"),
        ("t", "mine", "", "the cluster rejects this command's token; copy ~/.ray/auth_token from the head"),
        ("t", "t", "disabled", "the cluster requires a token, but RAY_AUTH_MODE=disabled is set; unset it"),
    ],
)
def test_a_mismatch_of_tokens_is_named(
    head: Callable[[str], str],
    theirs: str,
    own: str,
    mode: str,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"HOME": str(tmp_path), "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": own}.items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    AuthenticationTokenLoader.instance().reset_cache()
    target = head(theirs)
    try:
        if expected is None:
            session.check_token(target)
        else:
            assert refusal(lambda: session.check_token(target)).startswith(f"Ray at {target}: {expected}")
    finally:
        AuthenticationTokenLoader.instance().reset_cache()


# ---------------------------------------------------------------- what workers inherit


def test_workers_import_nothing_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` appends the script's folder, if any, and the working directory to the workers' module path."""
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        (["/app", str(tmp_path)], ["/app"]),
        ([str(tmp_path)], []),
        ([str(tmp_path), str(tmp_path)], [str(tmp_path)]),  # a script of the user, which imports from there too
        ([], []),  # a job with a working_dir
    ):
        configuration = session._make_job_config()
        configuration._py_driver_sys_path.extend(given)
        sent = common_pb2.JobConfig.FromString(configuration._serialize())
        assert list(sent.py_driver_sys_path) == expected


def test_local_ray_starts_without_the_users_modules(connect: Connect, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    seen: dict[str, str] = {}
    connect(Cluster({}), address="local", init=lambda **_: seen.update(os.environ))
    assert str(tmp_path) not in seen["PYTHONPATH"].split(os.pathsep)
    assert "" not in seen["PYTHONPATH"].split(os.pathsep)
    assert seen["PYTHONSAFEPATH"] == "1"


def test_uv_does_not_make_ray_upload_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uv_runtime_env_hook, "_get_uv_run_cmdline", lambda: ["uv", "run", "ray-cxr"])
    assert worker._maybe_modify_runtime_env({}, False) == {}


def test_machine_without_a_network_interface_is_one_line(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENETUNREACH, "Network is unreachable")
    monkeypatch.setattr(socket, "create_connection", Mock(side_effect=error))
    message = refusal(lambda: connect(address="local"), RayCxrError)
    assert message.startswith(
        "Ray: no network interface is up on this machine, not even the loopback (Network is unreachable)"
    )
    assert "`ip link set lo up`" in message
