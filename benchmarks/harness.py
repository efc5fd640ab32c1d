"""The parts that all benchmarks share: arguments, child processes, interleaved rounds, ratios, machine description.

Child processes import this file in a Python that may lack ray_cxr, so it imports only the standard library at the top.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self, TypeVar

ROOT = Path(__file__).resolve().parents[1]
#: Lines of a dead process's log that an error shows.
LAST_LINES = 40
#: An environment variable that marks a process and all its descendants, Ray's included.
MARKER = "RAY_CXR_BENCHMARK"
#: Seconds that a contestant may take.
LIMIT_S = 3600.0
_Item = TypeVar("_Item")


class BenchmarkError(Exception):
    """A process or a check failed; the message names it and quotes its output."""


# ---------------------------------------------------------------- the script


def create_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the raw numbers to this file")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser


def parse_positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


#: Options of an argument that is a positive integer.
POSITIVE: dict[str, Any] = {"type": parse_positive, "metavar": "N"}


def run_script(
    parse: Callable[[], argparse.Namespace],
    measure: Callable[[argparse.Namespace, dict[str, Any]], None],
    functions: Mapping[str, Callable[[dict[str, Any], Channel], None]] | None = None,
) -> int:
    """Run a benchmark, or one of its child processes, and write its numbers to `--out`.

    Args:
        parse: parses the arguments of this process.
        measure: adds the numbers to a result that describes the run and the machine, and prints them.
        functions: the work of child processes by kind.

    Returns:
        The exit code: 0 done, 1 a contestant or a check failed, 130 interrupted.
    """
    arguments = parse()
    if arguments.child:
        run_child(arguments.child, functions or {})
    from ray_cxr.errors import RayCxrError, own_error
    from ray_cxr.storage import atomic
    from ray_cxr.versions import versions

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that child processes end too
    result: dict[str, Any] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]],
        "machine": describe_machine(),
        "versions": versions(),
    }
    try:
        measure(arguments, result)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        cause = error if isinstance(error, BenchmarkError) else own_error(error)
        if not isinstance(cause, (BenchmarkError, RayCxrError)):
            raise
        print(cause, file=sys.stderr)
        return 1
    if arguments.out is not None:
        atomic.write_json(arguments.out, result)
    return 0


def log(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def create_console(width: int = 200) -> Any:
    """Return a rich console; `width` applies if stdout is not a terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else width)


def describe_machine() -> dict[str, Any]:
    """Return what the numbers were measured on."""
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {"system": platform.platform(), "cpu": model, "cpus": os.cpu_count(), "load": read_load()}


def read_load() -> float:
    """Return the load average of the last minute."""
    return os.getloadavg()[0]


# ---------------------------------------------------------------- rounds and ratios


def interleave(contestants: Sequence[_Item], rounds: int) -> Iterator[tuple[int, _Item]]:
    """Yield (round, contestant); each round starts with the next contestant, so that drift affects all of them."""
    for number in range(rounds):
        turn = number % len(contestants)
        for one in [*contestants[turn:], *contestants[:turn]]:
            yield number, one


def compare_rounds(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Return the median of the rounds' ratios, its interval, the ratios, and the ratio of the medians."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    of_medians = statistics.median(ours) / statistics.median(theirs)
    interval = find_median_interval(ratios)
    return {"ratio": statistics.median(ratios), "interval": interval, "ratios": ratios, "of_medians": of_medians}


def find_median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the narrowest interval between two of the values that has at least 95% confidence for the median.

    It assumes no distribution. With 10 values it lies between the second lowest and the second highest; fewer than 6
    values have none.
    """
    ordered, n = sorted(values), len(values)
    found, outside = None, 0.0
    for k in range(n // 2):
        outside += 2 * math.comb(n, k) / 2**n
        if outside > 0.05:
            break
        found = ordered[k], ordered[n - 1 - k]
    return found


def compute_medians(pairs: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Return the median of the values with the same number."""
    values: dict[int, list[float]] = {}
    for number, value in pairs:
        values.setdefault(number, []).append(value)
    return {number: statistics.median(found) for number, found in values.items()}


def meets(value: float, bar: float | None, *, at_most: bool = False) -> bool | None:
    """Return whether a value meets a bar; None without a bar."""
    return None if bar is None else value <= bar if at_most else value >= bar


def format_bar(title: str, value: float, bar: float | None, *, at_most: bool = False, digits: int = 2) -> str:
    """Return the line of a ratio, its bar and the verdict."""
    text = f"{title}: {value:.{digits}f}"
    if bar is None:
        return f"{text}, no bar"
    verdict = "met" if meets(value, bar, at_most=at_most) else "NOT met"
    return f"{text} {'<=' if at_most else '>='} {bar:.{digits}f}: {verdict}"


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def format_spread(values: Sequence[float | None]) -> str:
    """Return the median, minimum and maximum of the known values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.median(known):.1f} ({min(known):.1f} to {max(known):.1f})"


# ---------------------------------------------------------------- in a child


class Channel:
    """A child's connection to the script: lines arrive on stdin, answers leave on stdout as lines of JSON.

    All other output goes to stderr. When stdin ends, the script has ended, and this process ends at once.

    Args:
        started: `time.monotonic()` of the script when it started this process; the clock is the system's.

    Attributes:
        marks: (seconds since `started`, images done so far).
    """

    def __init__(self, started: float) -> None:
        self._started = self._last = started
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._in = os.fdopen(os.dup(0), encoding="utf-8")
        self._commands: queue.Queue[str] = queue.Queue()
        self._lock = threading.Lock()
        self.marks: list[tuple[float, int]] = []
        self._stages: dict[str, float] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._in:
            self._commands.put(line.strip())
        os._exit(1)

    def receive(self) -> str:
        """Wait for the next command."""
        return self._commands.get()

    def end_stage(self, name: str) -> None:
        """Record the seconds since the previous stage, or since the start."""
        now = time.monotonic()
        self._stages[name] = now - self._last
        self._last = now

    def count_images(self, count: int) -> None:
        """Record that the model has processed `count` more images."""
        with self._lock:
            done = self.marks[-1][1] if self.marks else 0
            self.marks.append((time.monotonic() - self._started, done + count))

    def answer(self, **values: Any) -> None:
        self._out.write(json.dumps({"marks": self.marks, "stages": self._stages, **values}) + "\n")
        self._out.flush()


def run_child(spec: dict[str, Any], functions: Mapping[str, Callable[[dict[str, Any], Channel], None]]) -> NoReturn:
    """Run the function of `spec["kind"]` in this process and end it."""
    channel = Channel(spec["started"])
    try:
        functions[spec["kind"]](spec, channel)
    except BaseException:
        channel.answer(error=traceback.format_exc())
        os._exit(1)
    os._exit(0)  # threads of some libraries would delay an orderly end


# ---------------------------------------------------------------- processes


class Process:
    """A process and its descendants, Ray's included, which carry a mark in their environment (Linux).

    Args:
        command: the program and its arguments.
        log: file for stderr, and for stdout unless `pipe`.
        pipe: connect stdin and stdout to this process.
        environment: additional variables.
    """

    _count = 0

    def __init__(
        self, command: Sequence[str], log: Path, *, pipe: bool = False, environment: Mapping[str, str] | None = None
    ) -> None:
        Process._count += 1
        mark = f"{os.getpid()}-{Process._count}"
        self._mark = f"{MARKER}={mark}".encode()
        variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "RAY_USAGE_STATS_ENABLED": "0", MARKER: mark}
        for name in ("RAY_ADDRESS", "TF_CONFIG"):
            variables.pop(name, None)
        self._log = log
        with open(log, "wb") as stream:
            self.started, self.started_at = time.monotonic(), time.time()
            self.process = subprocess.Popen(
                [*command],
                stdin=subprocess.PIPE if pipe else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipe else stream,
                stderr=stream,
                env={**variables, **(environment or {})},
                cwd=ROOT,
                text=True,
                bufsize=1,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.kill()
        for pid in self.list_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """Send SIGKILL to the process group and wait for the process."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def list_pids(self) -> list[int]:
        """Return all processes that carry the mark."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir("/proc") as entries:
            for entry in entries:
                if entry.name.isdecimal():
                    with contextlib.suppress(OSError):
                        if self._mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                            found.append(int(entry.name))
        return found

    def describe_end(self) -> str:
        """Return the exit code and the end of the log."""
        code = self.process.wait()
        hint = " (killed; out of memory?)" if code == -signal.SIGKILL else ""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        return "\n".join([f"ended with code {code}{hint}", *lines])


class Children:
    """Child processes of a script that work together.

    Args:
        script: file of the benchmark, which the children run with --child.
        specs: one per child, with `kind`.
        logs: the file for each child's stderr.
        python: interpreter.
        environments: additional variables of each child.
    """

    def __init__(
        self,
        script: str,
        specs: Sequence[Mapping[str, Any]],
        logs: Sequence[Path],
        *,
        python: str = sys.executable,
        environments: Sequence[Mapping[str, str]] | None = None,
    ) -> None:
        self._answers: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._title = f"{specs[0]['kind']} ({logs[0].stem})"
        self._stack = contextlib.ExitStack()
        self._processes: list[Process] = []
        with contextlib.ExitStack() as stack:
            for index, (spec, path) in enumerate(zip(specs, logs, strict=True)):
                text = json.dumps({**spec, "started": time.monotonic()})
                command = [python, str(Path(script).resolve()), "--child", text]
                variables = environments[index] if environments else None
                process = stack.enter_context(Process(command, path, pipe=True, environment=variables))
                self._processes.append(process)
                threading.Thread(target=self._read, args=(index, process.process), daemon=True).start()
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _read(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._answers.put((index, line))
        self._answers.put((index, None))

    def send(self, command: str) -> None:
        """Send a command to each child."""
        for process in self._processes:
            assert process.process.stdin is not None
            try:
                process.process.stdin.write(command + "\n")
                process.process.stdin.flush()
            except OSError:
                raise BenchmarkError(f"{self._title}: {process.describe_end()}") from None

    def receive(self, limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
        """Return one answer of each child, in order.

        Raises:
            BenchmarkError: a child failed, died or did not answer in time.
        """
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + limit_s
        while len(answers) < len(self._processes):
            try:
                index, line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise BenchmarkError(f"{self._title}: no answer after {limit_s / 60:.0f} minutes") from None
            if line is None:
                raise BenchmarkError(f"{self._title}, process {index}: {self._processes[index].describe_end()}")
            answers[index] = json.loads(line)
            if "error" in answers[index]:
                raise BenchmarkError(f"{self._title}, process {index}:\n{answers[index]['error']}")
        return [answers[index] for index in sorted(answers)]

    def wait(self) -> None:
        """Wait until all children have ended."""
        for process in self._processes:
            process.process.wait()


def ask_child(
    script: str, spec: Mapping[str, Any], log: Path, *, python: str = sys.executable, limit_s: float = LIMIT_S
) -> dict[str, Any]:
    """Run a child and return its answer, with `wall_s`.

    Raises:
        BenchmarkError: it failed, died or took too long.
    """
    started = time.monotonic()
    with Children(script, [spec], [log], python=python) as children:
        (answer,) = children.receive(limit_s)
        children.wait()
        return {**answer, "wall_s": time.monotonic() - started}


def run_command(
    arguments: Sequence[str], log: Path, *, limit_s: float = LIMIT_S, program: Sequence[str] = ("-m", "ray_cxr.cli")
) -> Process:
    """Run `ray-cxr`, or another program of Python that takes its arguments, to its end.

    Raises:
        BenchmarkError: its exit code is not 0, or it took too long.
    """
    with Process([sys.executable, *program, *arguments], log) as process:
        try:
            process.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"ray-cxr {arguments[0]}: not finished after {limit_s / 60:.0f} minutes") from None
        if process.process.returncode:
            raise BenchmarkError(f"ray-cxr {arguments[0]}: {process.describe_end()}")
    return process


# ---------------------------------------------------------------- memory


def read_status(pid: int | str = "self") -> dict[str, int]:
    """Return a process's resident memory now (`VmRSS`) and at its peak (`VmHWM`), bytes; {} if the system hides it.

    Unlike getrusage, the peak excludes the process that started this one.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM") if name in fields}


class MemorySampler:
    """Sample the memory of a command's processes together: PSS, in which shared pages count once.

    Attributes:
        peak: largest sum, bytes.
        parts: bytes and number of processes by their name, at the peak.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.parts: dict[str, tuple[int, int]] = {}

    def sample(self, process: Process) -> int:
        """Take a sample and return the sum, bytes."""
        sizes: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for pid in process.list_pids():
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                name = read_name(pid)
                sizes[name] += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
                counts[name] += 1
        if sizes.total() > self.peak:
            self.peak = sizes.total()
            self.parts = {name: (size, counts[name]) for name, size in sizes.most_common()}
        return sizes.total()

    def describe_parts(self) -> str:
        return ", ".join(f"{name} x {n} {size / 2**20:.0f}" for name, (size, n) in self.parts.items())


#: Samples in which a process may lack the mark before it is ignored: at its start, it has no environment yet.
_LOOKS = 5


class CpuSampler:
    """Sample the CPU time of a contestant's processes in a thread, while a `with` block runs.

    Processes that have ended count with their last sample, so each may miss up to `interval` seconds.

    Attributes:
        samples: (seconds since the start of the block, CPU seconds so far by process name).
    """

    def __init__(self, interval: float = 0.2) -> None:
        self._interval, self._stop = interval, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._misses: Counter[int] = Counter()
        self._seconds: dict[int, tuple[str, float]] = {}
        self.samples: list[tuple[float, dict[str, float]]] = []

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._sample()

    def _sample(self) -> None:
        ticks = os.sysconf("SC_CLK_TCK")
        mark = f"{MARKER}={os.getpid()}-".encode()
        for pid in sorted(map(int, filter(str.isdecimal, os.listdir("/proc")))):
            with contextlib.suppress(OSError, KeyError):
                if self._misses[pid] == _LOOKS:
                    continue
                text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
                stat = text.rpartition(")")[2].split()
                # The title of a Ray worker overwrites its environment, so a child of a known process counts, too.
                known = pid in self._seconds or int(stat[1]) in self._seconds
                if known or mark in Path(f"/proc/{pid}/environ").read_bytes():
                    # A process that ends has no name any more. The title of a Ray worker ends with what it runs now.
                    name = read_name(pid).partition("(")[0] if stat[0] != "Z" else self._seconds[pid][0]
                    self._seconds[pid] = (name, (int(stat[11]) + int(stat[12])) / ticks)
                else:
                    self._misses[pid] += 1
        sums: Counter[str] = Counter()
        for name, seconds in self._seconds.values():
            sums[name] += seconds  # type: ignore[assignment]
        self.samples.append((time.monotonic() - self._started, dict(sums)))

    def fit_per_image(self, marks: Sequence[tuple[float, int]], warm_up: float) -> dict[str, float]:
        """Return the CPU milliseconds per image by process name: a straight line's slope, without the warm-up.

        Args:
            marks: (seconds since the start of the block, images done so far).
            warm_up: share of the images to leave out at the start.
        """
        kept = [(seconds, done) for seconds, done in marks if done >= warm_up * marks[-1][1]]
        if len(kept) < 3 or not self.samples:
            return {}
        times, done = zip(*kept, strict=True)
        found = {}
        for name in {name for _, sums in self.samples for name in sums}:
            used = _interpolate(times, [(at, sums.get(name, 0.0)) for at, sums in self.samples])
            found[name] = 1e3 * statistics.linear_regression(done, used).slope
        return found


def _interpolate(times: Sequence[float], points: Sequence[tuple[float, float]]) -> list[float]:
    """Return the values at these times of a curve through points; constant before the first and after the last."""
    values, at = [], 0
    for time_ in times:
        while at < len(points) and points[at][0] < time_:
            at += 1
        if at in (0, len(points)):
            values.append(points[min(at, len(points) - 1)][1])
            continue
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        values.append(y0 + (y1 - y0) * (time_ - x0) / (x1 - x0))
    return values


def read_name(pid: int) -> str:
    """Return the module or script that a process runs, or its program; for Ray's workers their task."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0 ").split("\0")
    if "-m" in words[:-1]:
        return words[words.index("-m") + 1]
    return next((Path(word).name for word in words if word.endswith(".py")), Path(words[0]).name) or "ending"
