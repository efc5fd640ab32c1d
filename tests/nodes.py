"""A Ray cluster of several nodes on this machine, each started by `ray start` as on machines of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: So often a node is started that does not come up.
STARTS = 4
#: The programs beside this interpreter.
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: Callable[[], Any], seconds: float, said: Callable[[], str] = str) -> None:
    """Wait for it.

    Raises:
        AssertionError: it did not come; `said` tells what there is to know.
    """
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, said()
        time.sleep(0.1)


class Nodes:
    """A head and its nodes, each a process group that can be killed; a token keeps others out.

    Args:
        folder: for logs; must not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.port, self.dashboard = free_port(), free_port()
        self.token = secrets.token_hex(32)
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._jobs: dict[Path, subprocess.Popen[bytes]] = {}
        # Ray's sockets have names of at most 107 characters, so not below `folder`.
        self.temp = Path("/tmp") / f"ray-{secrets.token_hex(4)}"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def jobs(self) -> str:
        """Where `ray job submit` finds the job server."""
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def environment(self) -> dict[str, str]:
        """Of a program that may take part."""
        kept = {
            key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
        }
        return {
            **kept,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            # A node that is gone is noticed after some 10 seconds and not after 30.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
            # A busy machine needs longer than Ray gives it.
            "RAY_raylet_start_wait_time_s": "180",
            "RAY_gcs_server_port_wait_time_s": "180",
            "RAY_agent_register_timeout_ms": "120000",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def start_head(self) -> None:
        """A head, with a CPU that no work may go to."""
        self._start(
            "head",
            "--head", f"--port={self.port}", "--num-cpus=1", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard}", f"--ray-client-server-port={free_port()}", f"--temp-dir={self.temp}",
        )  # fmt: skip
        until(lambda: self._listens(self.dashboard), 120, lambda: self.log("head"))

    def add(self, name: str, *, cpus: int = 1, gpus: int = 0, hidden: Path | None = None) -> None:
        """One more node; GPUs are declared, and none need be there.

        Args:
            hidden: a folder that is another one for this node, as on a machine without the shared storage; needs root.
        """
        own = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(hidden)] if hidden else []
        self._start(name, f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}", before=own)

    def kill(self, name: str) -> None:
        """As a power cut: SIGKILL to all of a node's processes, its workers and their children included."""
        process = self._nodes.pop(name)
        session = process.pid
        for number in _of_session(session):
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

    def has(self, name: str) -> bool:
        return name in self._nodes

    def count(self) -> int:
        """Nodes that the cluster counts, the head among them."""
        return self.ray("status", "--address", self.address).stdout.count("node_")

    def where(self, *titles: str) -> set[str]:
        """The nodes with a process whose command line holds one of these."""
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
        """`ray job submit` of one of jobs/, as in README, in the background.

        Returns:
            A file with all that it says; `finished` waits for its exit code.
        """
        program = [
            "ray", "job", "submit", "--address", self.jobs, "--working-dir", ".", "--submission-id", name, "--",
            sys.executable, f"jobs/{job}.py", *map(str, arguments),
        ]  # fmt: skip
        log = self.folder / f"job-{name}.log"
        # The head's agent, which starts jobs, comes up a while after the job server.
        for _ in range(20):
            with open(log, "wb") as stream:
                self._jobs[log] = subprocess.Popen(
                    [str(BIN / program[0]), *program[1:]], cwd=ROOT, env=self.environment, stdout=stream, stderr=stream
                )
            until(lambda: "submitted successfully" in log.read_text() or self._jobs[log].poll() is not None, 120)
            if "No available agent" not in log.read_text():
                break
            time.sleep(1)
        return log

    def over(self, log: Path) -> bool:
        return self._jobs[log].poll() is not None

    def finished(self, log: Path, seconds: float = 240) -> int:
        """The exit code of `ray job submit`."""
        until(lambda: self.over(log), seconds, log.read_text)
        return self._jobs.pop(log).wait()

    def ray(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """A command of Ray's, to the end."""
        return subprocess.run(
            [str(BIN / "ray"), *arguments], cwd=ROOT, env={**self.environment, **changes}, text=True, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _start(self, name: str, *arguments: str, before: Sequence[str] = ()) -> None:
        log = self.folder / f"{name}.log"
        for _ in range(STARTS):
            agent = free_port()
            ports = [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={free_port()}"]
            program = [
                *before, str(BIN / "ray"), "start", "--block", "--disable-usage-stats",
                "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0", *ports, *arguments,
            ]  # fmt: skip
            with open(log, "wb") as stream:
                process = subprocess.Popen(
                    program, env=self.environment, stdout=stream, stderr=stream, start_new_session=True
                )
            self._nodes[name] = process
            begun = time.monotonic()
            while process.poll() is None and "Ray runtime started" not in self.log(name):
                # Ray itself gives a node's agent 15 seconds, which a busy machine may not; `ray start` then waits on.
                if time.monotonic() - begun > 60 and name not in self.where("raylet/raylet"):
                    break
                time.sleep(0.5)
            else:
                if process.poll() is None:
                    return
            self.kill(name)
        raise AssertionError(self.log(name))

    @staticmethod
    def _listens(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0


def _of_session(session: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(folder.name)) == session:
                found.append(int(folder.name))
    return found
