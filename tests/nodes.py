"""A Ray cluster of several nodes on this machine, each started by `ray start` as on separate machines."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: The programs beside this interpreter.
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(what: Callable[[], Any], seconds: float, said: Callable[[], str] = str) -> None:
    """Wait for a condition; fail with the text of `said` when it does not come."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


class Nodes:
    """A head and its nodes, each a process group that can be killed; a token keeps others out."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.port, self.dashboard = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        #: The address of the job server.
        self.jobs = f"http://127.0.0.1:{self.dashboard}"
        self.token = secrets.token_hex(32)
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._jobs: dict[Path, subprocess.Popen[bytes]] = {}
        # Ray's sockets have names of at most 107 characters, so not below `folder`.
        self.temp = Path("/tmp") / f"ray-{secrets.token_hex(4)}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of programs that have the token."""
        ours = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
        return {
            **{key: value for key, value in os.environ.items() if key not in ours},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            # A proxy that is a closed port, as in a hospital; `ray job submit` itself reaches the head.
            **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),
            "no_proxy": "127.0.0.1,localhost",
            # A lost node is noticed after about 10 seconds, not 30.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
            # More time than Ray gives, for a busy machine.
            "RAY_raylet_start_wait_time_s": "180",
            "RAY_gcs_server_port_wait_time_s": "180",
            "RAY_agent_register_timeout_ms": "120000",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def start_head(self) -> None:
        """Start a head with a CPU that no work may use."""
        self._start(
            "head",
            "--head", f"--port={self.port}", "--num-cpus=1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}", f"--temp-dir={self.temp}",
        )  # fmt: skip
        until(lambda: _listens(self.dashboard), 120, lambda: self.log("head"))

    def add(self, name: str, *, cpus: int = 1, gpus: int = 0, hidden: Path | None = None) -> None:
        """Start one more node; its GPUs need not exist. For this node `hidden` is an empty folder (needs root)."""
        own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden)] if hidden else []
        self._start(name, f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}", before=own)

    def count(self) -> int:
        return self.ray("status", "--address", self.address).stdout.count("node_")

    @contextlib.contextmanager
    def extra(self, name: str, **options: Any) -> Iterator[None]:
        """One more node for a while."""
        before = self.count()
        self.add(name, **options)
        try:
            until(lambda: self.count() > before, 300, lambda: self.log(name))
            yield
        finally:
            self.kill(name)

    def kill(self, name: str) -> None:
        """Send SIGKILL to all processes of a node, workers and their children included, like a power cut."""
        process = self._nodes.pop(name)
        for number in _of_session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for job in self._jobs.values():
            job.kill()
            job.wait()
        for name in [*self._nodes][::-1]:
            self.kill(name)
        shutil.rmtree(self.temp, ignore_errors=True)

    def where(self, *titles: str) -> set[str]:
        """The nodes with a process whose command line has one of these."""
        found = set()
        for name, process in self._nodes.items():
            for number in _of_session(process.pid):
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace")
                    if any(title in line for title in titles):
                        found.add(name)
        return found

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def submit(self, job: str, arguments: Sequence[object], *, name: str) -> Path:
        """Run `ray job submit` of a script of jobs/ in the background, and return the file of its output."""
        options = ["--address", self.jobs, "--working-dir", ".", "--submission-id", name, "--"]
        program = [str(BIN / "ray"), "job", "submit", *options, sys.executable, f"jobs/{job}.py", *map(str, arguments)]
        log = self.folder / f"job-{name}.log"
        # The head's agent, which starts jobs, is there some time after the job server.
        for _ in range(20):
            self._jobs[log] = self._background(program, log)
            until(lambda: "submitted successfully" in log.read_text() or self.over(log), 120)
            if "No available agent" not in log.read_text():
                break
            time.sleep(1)
        return log

    def stop_job(self, name: str) -> None:
        """Do what `ray job stop` does, without the seconds that its start takes."""
        stop = urllib.request.Request(f"{self.jobs}/api/jobs/{name}/stop", method="POST")
        stop.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(stop, timeout=60) as answer:
            assert json.load(answer) == {"stopped": True}

    def over(self, log: Path) -> bool:
        return self._jobs[log].poll() is not None

    def finished(self, log: Path, seconds: float = 240) -> tuple[int, str]:
        """The exit code and the output of `ray job submit`."""
        until(lambda: self.over(log), seconds, log.read_text)
        return self._jobs.pop(log).wait(), log.read_text()

    def ray(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray to its end."""
        return subprocess.run(
            [str(BIN / "ray"), *arguments], cwd=ROOT, env={**self.environment, **changes}, text=True, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _background(self, program: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own."""
        with open(log, "wb") as stream:
            return subprocess.Popen(
                program, cwd=ROOT, env=self.environment, stdout=stream, stderr=stream, start_new_session=True
            )

    def _start(self, name: str, *arguments: str, before: Sequence[str] = ()) -> None:
        log = self.folder / f"{name}.log"
        for _ in range(4):
            ports = [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
            program = [
                *before, str(BIN / "ray"), "start", "--block", "--disable-usage-stats",
                "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0", *ports, *arguments,
            ]  # fmt: skip
            process = self._nodes[name] = self._background(program, log)
            begun = time.monotonic()
            while process.poll() is None and "Ray runtime started" not in self.log(name):
                # On a busy machine the agent can miss Ray's limit of 15 seconds; `ray start` then waits forever.
                if time.monotonic() - begun > 60 and name not in self.where("raylet/raylet"):
                    break
                time.sleep(0.5)
            else:
                if process.poll() is None:
                    return
            self.kill(name)
        raise AssertionError(self.log(name))


def _of_session(session: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(folder.name)) == session:
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def cluster(folder: Path, **gpus: int) -> Iterator[Nodes]:
    """A head and nodes, each with its number of declared GPUs."""
    nodes = Nodes(folder)
    try:
        nodes.start_head()
        for name, count in gpus.items():
            nodes.add(name, gpus=count)
        yield nodes
    finally:
        nodes.stop()
