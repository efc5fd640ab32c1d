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
#: The folder of the programs of this environment.
BIN = Path(sys.executable).parent
#: Settings of a training run of seconds.
TRAINING = {"backbone": "TinyCNN", "weights": "none", "size": 64, "batch_size": 6, "min_positives": 2}


def training_arguments(prepared: Path, out: Path, **changes: object) -> list[str]:
    """Return a command that trains with the settings `TRAINING` and some changes."""
    settings = [part for key, value in (TRAINING | changes).items() for part in ("--set", f"{key}={value}")]
    return ["train", str(prepared), "--out", str(out), *settings]


def find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], Any], seconds: float, describe: Callable[[], str] = str) -> None:
    """Wait for a condition; fail with the text of `describe` after a time limit."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.1)


class Nodes:
    """Run a head and nodes, each a process group that can be killed; access needs a token."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.port, self.dashboard = find_free_port(), find_free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.job_server = f"http://127.0.0.1:{self.dashboard}"
        self.token = secrets.token_hex(32)
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._jobs: dict[Path, subprocess.Popen[bytes]] = {}
        # Outside of `folder`, because the path of a socket has at most 107 characters.
        self.temp = Path("/tmp") / f"ray-{secrets.token_hex(4)}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of programs with the token."""
        ours = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
        return {
            **{key: value for key, value in os.environ.items() if key not in ours},
            # The tests' own process has the variables of a local Ray, which no cloud reclaims.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            # A proxy at a closed port, as in a hospital; `ray job submit` bypasses it.
            **dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"),
            "no_proxy": "127.0.0.1,localhost",
            # Ray detects a lost node after about 10 seconds instead of 30.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
            # Longer than the defaults, for a busy machine.
            "RAY_raylet_start_wait_time_s": "180",
            "RAY_gcs_server_port_wait_time_s": "180",
            "RAY_agent_register_timeout_ms": "120000",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def start_head(self) -> None:
        """Start a head whose CPU must stay idle."""
        self._start(
            "head",
            "--head", f"--port={self.port}", "--num-cpus=1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={find_free_port()}",
            f"--temp-dir={self.temp}",
        )  # fmt: skip
        wait_until(lambda: _listens(self.dashboard), 120, lambda: self.read_log("head"))

    def add_node(
        self, name: str, *, cpus: int = 1, gpus: int = 0, market: str = "", hidden: Path | None = None
    ) -> None:
        """Start a node; its GPUs need not exist. This node sees `hidden` as an empty folder (needs root)."""
        mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden)]
        labels = f"name={name}" + (f",ray.io/market-type={market}" if market else "")
        options = [f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--labels={labels}"]
        self._start(name, *options, before=mount if hidden else [])

    @contextlib.contextmanager
    def temporary_node(self, name: str, **options: Any) -> Iterator[None]:
        """Run another node in a context."""

        def count_nodes() -> int:
            return self.run_ray("status", "--address", self.address).stdout.count("node_")

        before = count_nodes()
        self.add_node(name, **options)
        try:
            wait_until(lambda: count_nodes() > before, 300, lambda: self.read_log(name))
            yield
        finally:
            self.kill(name)

    def kill(self, name: str) -> None:
        """Kill all processes of a node, including workers and their children, like a power cut."""
        process = self._nodes.pop(name)
        for number in _list_session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()

    def drain(self, name: str, seconds: float) -> None:
        """Announce that a node goes away in some seconds, as a cloud's notice of a reclaimed machine does."""
        program = (
            f"import ray; ray.init({self.address!r}, log_to_driver=False)\n"
            f"print('found', *[n['NodeID'] for n in ray.nodes() if n['Alive'] and n['Labels'].get('name') == {name!r}])"
        )
        asked = subprocess.run(
            [sys.executable, "-c", program], env=self.environment, text=True, timeout=120, stdout=subprocess.PIPE
        )
        node = asked.stdout.rpartition("found ")[2].strip()
        assert node, asked.stdout
        options = ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed"]
        options += ["--deadline-remaining-seconds", str(int(seconds))]
        done = self.run_ray("drain-node", "--address", self.address, *options)
        assert done.returncode == 0, done.stdout

    def stop(self) -> None:
        for job in self._jobs.values():
            job.kill()
            job.wait()
        for name in [*self._nodes][::-1]:
            self.kill(name)
        shutil.rmtree(self.temp, ignore_errors=True)

    def find_nodes(self, *titles: str) -> set[str]:
        """Return the nodes with a process whose command line contains one of the titles."""
        found = set()
        for name, process in self._nodes.items():
            for number in _list_session(process.pid):
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{number}/cmdline").read_bytes().decode(errors="replace")
                    if any(title in line for title in titles):
                        found.add(name)
        return found

    def read_log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def submit(self, command: Sequence[object], *, name: str) -> Path:
        """Start `ray job submit` with the script of a command, and return its log file."""
        options = ["--address", self.job_server, "--working-dir", ".", "--submission-id", name, "--"]
        job = [sys.executable, f"jobs/{command[0]}.py", *map(str, command[1:])]
        program = [str(BIN / "ray"), "job", "submit", *options, *job]
        log = self.folder / f"job-{name}.log"
        # The agent of the head, which starts jobs, is ready later than the job server.
        for _ in range(20):
            self._jobs[log] = self._background(program, log)
            wait_until(lambda: "submitted successfully" in log.read_text() or self.has_ended(log), 120)
            if "No available agent" not in log.read_text():
                break
            time.sleep(1)
        return log

    def start(self, command: Sequence[object], *, name: str) -> Path:
        """Start a command that joins this cluster from outside, and return its log file."""
        log = self.folder / f"command-{name}.log"
        program = [str(BIN / "ray-cxr"), *map(str, command)]
        with open(log, "wb") as stream:
            self._jobs[log] = subprocess.Popen(
                program, cwd=ROOT, env={**self.environment, "RAY_ADDRESS": self.address}, stdout=stream, stderr=stream
            )
        return log

    def stop_job(self, name: str) -> None:
        """Stop a job through the HTTP API, which is seconds faster than `ray job stop`."""
        stop = urllib.request.Request(f"{self.job_server}/api/jobs/{name}/stop", method="POST")
        stop.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(stop, timeout=60) as answer:
            assert json.load(answer) == {"stopped": True}

    def has_ended(self, log: Path) -> bool:
        return self._jobs[log].poll() is not None

    def wait_for_job(self, log: Path, seconds: float = 240) -> tuple[int, str]:
        """Wait for `ray job submit`; return its exit code and output."""
        wait_until(lambda: self.has_ended(log), seconds, log.read_text)
        return self._jobs.pop(log).wait(), log.read_text()

    def run_ray(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray and wait for it."""
        return subprocess.run(
            [str(BIN / "ray"), *arguments], cwd=ROOT, env={**self.environment, **changes}, text=True, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _background(self, program: Sequence[str], log: Path, **changes: str) -> subprocess.Popen[bytes]:
        """Start a program in its own session, with changes of its environment."""
        environment = {**self.environment, **changes}
        with open(log, "wb") as stream:
            return subprocess.Popen(
                program, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )

    def _start(self, name: str, *arguments: str, before: Sequence[str] = ()) -> None:
        log = self.folder / f"{name}.log"
        for _ in range(4):
            ports = [f"--dashboard-agent-listen-port={find_free_port()}", f"--metrics-export-port={find_free_port()}"]
            program = [
                *before, str(BIN / "ray"), "start", "--block", "--disable-usage-stats",
                "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0", *ports, *arguments,
            ]  # fmt: skip
            # A node keeps its own copies of files from a bucket, as on a separate machine.
            cache = str(self.folder / f"cache-{name}")
            # With its address, a node's process finds this cluster although other Rays run on this machine.
            changes = {"RAY_CXR_CACHE": cache, "RAY_ADDRESS": self.address}
            process = self._nodes[name] = self._background(program, log, **changes)
            start = time.monotonic()
            while process.poll() is None and "Ray runtime started" not in self.read_log(name):
                # If the agent misses Ray's limit of 15 seconds on a busy machine, `ray start` waits forever.
                if time.monotonic() - start > 60 and name not in self.find_nodes("raylet/raylet"):
                    break
                time.sleep(0.5)
            else:
                if process.poll() is None:
                    return
            self.kill(name)
        raise AssertionError(self.read_log(name))


def _list_session(session: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(folder.name)) == session:
                found.append(int(folder.name))
    return found


@contextlib.contextmanager
def cluster(folder: Path, **gpus: int) -> Iterator[Nodes]:
    """Run a head and nodes, each with its number of declared GPUs."""
    nodes = Nodes(folder)
    try:
        nodes.start_head()
        for name, count in gpus.items():
            nodes.add_node(name, gpus=count)
        yield nodes
    finally:
        nodes.stop()
