"""Run `ray-cxr` in environments of hospital, HPC and laptop machines, as a user would.

    python tests/environments.py [NAME ...]

Each case is a function with the decorator `case`. It gets an empty folder, runs the command with `run`, and checks the
result with `check_success` or `check_error`. A case that this machine cannot run is skipped. Prints one line per case
and the numbers of cases; the exit code is 1 if a case failed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

#: The environment of every command, without settings of the machine that runs the cases. Taken before other imports,
#: which change the environment of this process.
_LEFT_OUT = re.compile("(RAY|KERAS|TF|PYTHON|OMP)_?|.*proxy$", re.IGNORECASE)
ENVIRONMENT = {name: value for name, value in os.environ.items() if not _LEFT_OUT.match(name)}
PROGRAM = Path(sys.executable).with_name("ray-cxr")
#: One epoch of the smallest model.
TRAINING = ("backbone=TinyCNN", "weights=none", "epochs=1", "batch_size=8", "min_positives=2")

Case = Callable[[Path], None]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Add a function to the cases, under its name."""
    CASES[function.__name__] = function
    return function


class Skipped(Exception):
    """This machine cannot run a case, for the reason in the message."""


class Result(NamedTuple):
    """A command that has ended. `code` is None if it was killed at the time limit."""

    code: int | None
    stdout: str
    stderr: str
    seconds: float

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.0f} s\n{self.stdout}{self.stderr}"


def run(
    folder: Path,
    *arguments: object,
    variables: Mapping[str, str | None] | None = None,
    limit_s: float = 150,
    program: Sequence[str | Path] = (PROGRAM,),
) -> Result:
    """Run a command in `folder`, with an own HOME there, and return its result.

    Args:
        folder: The working directory. HOME is its folder `home`, which is created if `variables` does not set HOME.
        arguments: Arguments of `ray-cxr`.
        variables: Changes to the environment; None removes a variable.
        limit_s: Seconds after which the command is killed.
        program: The command's own start, such as `("prlimit", "--nproc=100", PROGRAM)`.
    """
    changed = {"HOME": str(folder / "home"), **(variables or {})}
    if "HOME" not in (variables or {}):
        (folder / "home").mkdir(exist_ok=True)
    environment = {name: value for name, value in {**ENVIRONMENT, **changed}.items() if value is not None}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            [str(part) for part in (*program, *arguments)],
            cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        code: int | None = None
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()
        seconds = time.monotonic() - started
        out.seek(0)
        err.seek(0)
        return Result(code, out.read(), err.read(), seconds)


def check_success(result: Result, *facts: str) -> None:
    """Require exit code 0, no traceback, and each fact in the output."""
    assert result.code == 0, str(result)
    assert "Traceback" not in result.stderr, str(result)
    for fact in facts:
        assert fact in result.stdout + result.stderr, f"{fact!r} is missing: {result}"


def check_error(result: Result, *facts: str) -> None:
    """Require a failure whose last line is an error of `ray-cxr` that has each fact, and no traceback."""
    assert result.code in (1, 2, 3), str(result)
    assert "Traceback" not in result.stderr, str(result)
    last = (result.stderr.strip().splitlines() or [""])[-1]
    assert last.startswith("ray-cxr"), str(result)
    for fact in facts:
        assert fact in last, f"{fact!r} is missing: {result}"


def require(start: Sequence[str]) -> None:
    """Raise Skipped if a program or permission for a command that begins with `start` is missing."""
    if shutil.which(start[0]) is None:
        raise Skipped(f"{start[0]} is not installed")
    done = subprocess.run([*start, "true"], capture_output=True, text=True, env={**ENVIRONMENT, "LC_ALL": "C"})
    if done.returncode:
        reason = done.stderr.strip() or f"exit code {done.returncode}"
        # Any other reason is a fault of the case. Without user namespaces, unshare reports no space.
        assert re.search("not permitted|denied|not found|No such file|No space left", reason), reason
        raise Skipped(" ".join(reason.split()))


class Inputs:
    """Small inputs of commands, each made on first use and shared by all cases, which must not change them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @functools.cached_property
    def images(self) -> Path:
        """A folder of about 20 PNGs."""
        return Path(self._phantoms.images)

    @functools.cached_property
    def manifest(self) -> Path:
        from conftest import write_phantom_manifest

        return write_phantom_manifest(self._phantoms, self.folder / "manifest.parquet")

    @functools.cached_property
    def prepared(self) -> Path:
        """The output of `prepare` at 64 pixels."""
        from conftest import replace_ray

        from ray_cxr.config import PrepareSettings
        from ray_cxr.data.prepared import prepare

        with replace_ray():
            prepare(self.manifest, self.folder / "prepared", PrepareSettings(sizes=(64,)))
        return self.folder / "prepared"

    @functools.cached_property
    def bundle(self) -> Path:
        """A bundle of TinyCNN at 64 pixels, with random weights."""
        from conftest import make_tiny_bundle

        return Path(make_tiny_bundle(self.folder / "bundle").path)

    @functools.cached_property
    def scores(self) -> Path:
        """Scores of `bundle` for `manifest`."""
        from conftest import replace_ray, score_arguments

        from ray_cxr.cli import main

        with replace_ray(), contextlib.redirect_stdout(io.StringIO()):
            assert main(score_arguments(self.bundle, self.manifest, self.folder / "scores")) == 0
        return self.folder / "scores"

    @functools.cached_property
    def _phantoms(self):
        from ray_cxr.imaging.phantoms import write_phantoms

        return write_phantoms(self.folder / "phantoms", patients=8, size=128, broken=False)

    def prepare(self, folder: Path) -> list[object]:
        """Return the arguments of `prepare` into `folder`."""
        return ["prepare", self.manifest, "--out", folder / "prepared", "--size", "64"]

    def train(self, folder: Path) -> list[object]:
        """Return the arguments of `train` into `folder`."""
        settings = [part for item in TRAINING for part in ("--set", item)]
        return ["train", self.prepared, "--out", folder / "run", *settings]

    def score(self, folder: Path) -> list[object]:
        """Return the arguments of `score` into `folder`."""
        return ["score", "--model", self.bundle, "--images", self.images, "--out", folder / "scores"]


#: Set by `main`.
inputs: Inputs


def main(names: Sequence[str]) -> int:
    """Run the named cases, or all of them, and return the exit code."""
    global inputs
    if unknown := [name for name in names if name not in CASES]:
        print(f"environments.py: no case {', '.join(unknown)}; the cases: {', '.join(CASES)}", file=sys.stderr)
        return 2
    counts = {"ok": 0, "skipped": 0, "failed": 0}
    with tempfile.TemporaryDirectory(prefix="env-") as folder:
        inputs = Inputs(Path(folder) / "inputs")
        inputs.folder.mkdir()
        for name in names or CASES:
            (Path(folder) / name).mkdir()
            started = time.monotonic()
            try:
                CASES[name](Path(folder) / name)
            except Skipped as error:
                counts["skipped"] += 1
                print(f"skipped {name}: {error}", flush=True)
            except Exception as error:
                counts["failed"] += 1
                print(f"FAILED {name}: {error if isinstance(error, AssertionError) else repr(error)}", flush=True)
            else:
                counts["ok"] += 1
                print(f"ok {name} {time.monotonic() - started:.0f} s", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts["failed"] else 0


# ---------------------------------------------------------------- settings for the user's other programs

OTHER_KERAS = {"KERAS_BACKEND": "jax", "TF_USE_LEGACY_KERAS": "1", "KERAS_MAX_EPOCHS": "none"}
OTHER_KERAS_JSON = '{"backend": "torch", "floatx": "bfloat16", "image_data_format": "channels_first"}'


def configure_other_keras(folder: Path) -> Path:
    """Write a `keras.json` of another project into the home folder of `run`, and return its path."""
    path = folder / "home" / ".keras" / "keras.json"
    path.parent.mkdir(parents=True)
    path.write_text(OTHER_KERAS_JSON, encoding="utf-8")
    return path


@case
def keras_of_other_projects_while_training(folder: Path) -> None:
    path = configure_other_keras(folder)
    result = run(folder, *inputs.train(folder), variables=OTHER_KERAS)
    check_success(result, "KERAS_BACKEND=jax is ignored")
    assert path.read_text(encoding="utf-8") == OTHER_KERAS_JSON
    assert list(path.parent.iterdir()) == [path]


@case
def keras_of_other_projects_while_scoring(folder: Path) -> None:
    configure_other_keras(folder)
    check_success(run(folder, *inputs.score(folder), "--heatmaps", "1", variables=OTHER_KERAS))


@case
def keras_is_not_configured_in_the_home_folder(folder: Path) -> None:
    check_success(run(folder, *inputs.score(folder), "--heatmaps", "1"))
    assert not (folder / "home" / ".keras").exists()


@case
def variables_of_python_and_ray(folder: Path) -> None:
    """Each is ignored, or has no effect on the result."""
    variables = {
        "PYTHONWARNINGS": "error",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONSTARTUP": str(folder / "missing.py"),
        "RAY_TRAIN_V2_ENABLED": "0",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    result = run(folder, *inputs.train(folder), variables=variables)
    check_success(result, "PYTHONWARNINGS or -W error is ignored", "RAY_TRAIN_V2_ENABLED=0 is ignored")
    assert "Warning" not in result.stderr, str(result)


@case
def warnings_as_errors_while_preparing_and_scoring(folder: Path) -> None:
    for arguments in (inputs.prepare(folder), inputs.score(folder)):
        result = run(folder, *arguments, variables={"PYTHONWARNINGS": "error"})
        check_success(result, "PYTHONWARNINGS or -W error is ignored")
        assert "Warning" not in result.stderr, str(result)


@case
def python_without_docstrings(folder: Path) -> None:
    for arguments in (inputs.prepare(folder), inputs.train(folder), inputs.score(folder)):
        result = run(folder, *arguments, variables={"PYTHONOPTIMIZE": "2"}, limit_s=20)
        check_error(result, "Python runs without docstrings", "PYTHONOPTIMIZE")


@case
def half_a_cpu(folder: Path) -> None:
    """A container with a quota below one CPU, imitated with a file in place of the kernel's."""
    groups = Path("/sys/fs/cgroup")
    file = next((path for path in (groups / "cpu.max", groups / "cpu" / "cpu.cfs_quota_us") if path.exists()), None)
    if file is None:
        raise Skipped("no control group limits the CPUs")
    quota = folder / "quota"
    quota.write_text("50000 100000\n" if file.name == "cpu.max" else "50000\n", encoding="utf-8")
    start = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'mount --bind {quota} {file} && exec "$@"', "sh"]
    require(start)
    result = run(folder, *inputs.prepare(folder), program=[*start, PROGRAM])
    check_success(result, "the quota of this machine or container is below one CPU")


@case
def figures_from_a_cell_of_jupyter(folder: Path) -> None:
    """Jupyter sets MPLBACKEND for its cells; `matplotlibrc` needs LaTeX, which is not installed."""
    (folder / "matplotlibrc").write_text("text.usetex: True\n", encoding="utf-8")
    variables = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    arguments = ["report", inputs.scores, "--labels", inputs.manifest, "--out", folder / "report"]
    check_success(run(folder, *arguments, variables=variables))


# ---------------------------------------------------------------- folders, modules and networks


@case
def long_temporary_folder(folder: Path) -> None:
    """Job folders of schedulers are longer than the path of a Unix socket may be."""
    temporary = folder / ("job" * 30)
    temporary.mkdir()
    result = run(folder, *inputs.prepare(folder), variables={"TMPDIR": str(temporary)})
    check_success(result, "Ray's sockets are in /tmp/ray_cxr-", f"TMPDIR={temporary} is too long")
    assert list(temporary.glob("ray/session_*/logs/raylet.out")), "Ray's logs are not in TMPDIR"
    assert not Path(re.search("/tmp/ray_cxr-[^/]*", result.stderr)[0]).exists()


@case
def temporary_folder_that_cannot_be_used(folder: Path) -> None:
    (folder / "file").touch()
    result = run(folder, *inputs.prepare(folder), variables={"TMPDIR": str(folder / "file" / "tmp")})
    check_success(result, "Ray's sockets are in ", "cannot be used (Not a directory)")


def write_modules(folder: Path) -> None:
    """Write modules with the names of libraries, as a user may have them next to his images."""
    for name in ("numpy", "keras", "random", "statistics", "pandas", "torch", "socket", "ray", "tensorflow"):
        (folder / f"{name}.py").write_text(f"raise ImportError('the {name}.py of the user')\n")


@case
def modules_of_the_user_while_preparing_and_scoring(folder: Path) -> None:
    write_modules(folder)
    check_success(run(folder, *inputs.prepare(folder)))
    check_success(run(folder, *inputs.score(folder)))


@case
def modules_of_the_user_while_training(folder: Path) -> None:
    write_modules(folder)
    check_success(run(folder, *inputs.train(folder)))


def in_a_network_namespace(script: str) -> list[str | Path]:
    """Return the start of a command on a machine whose network is what a shell script makes of it."""
    start = ["unshare", "--map-root-user", "--net", "sh", "-c", script + ' && exec "$@"', "sh"]
    require(start)
    return [*start, PROGRAM]


@case
def no_network_interface(folder: Path) -> None:
    program = in_a_network_namespace("true")
    check_error(run(folder, *inputs.train(folder), program=program), "no network interface is up")


@case
def only_the_loopback_interface(folder: Path) -> None:
    program = in_a_network_namespace("ip link set lo up")
    check_success(run(folder, *inputs.train(folder), program=program))


# ---------------------------------------------------------------- names and locks of folders


def make_odd_folder(folder: Path) -> Path:
    """Return a new folder whose name has the characters that addresses, patterns and shells interpret."""
    odd = folder / "a?b#c%20d*[e]{f}&;'\" ~=:::g\nh"
    odd.mkdir()
    return odd


@case
def folders_of_any_name_while_training(folder: Path) -> None:
    odd = make_odd_folder(folder)
    check_success(run(folder, *inputs.prepare(odd)))
    settings = [part for item in TRAINING for part in ("--set", item)]
    check_success(run(folder, "train", odd / "prepared", "--out", odd / "run", *settings))
    assert {path.name for path in folder.iterdir()} == {"home", odd.name}
    assert {path.name for path in odd.iterdir()} == {"prepared", "run"}


@case
def folders_of_any_name_while_scoring(folder: Path) -> None:
    odd = make_odd_folder(folder)
    shutil.copytree(inputs.bundle, odd / "bundle")
    shutil.copytree(inputs.images, odd / "images")
    score = ["score", "--model", odd / "bundle", "--images", odd / "images", "--heatmaps", 1]
    check_success(run(folder, *score, "--out", odd / "scores?1"))
    check_success(run(folder, "report", odd / "scores?1", "--out", odd / "scores?2"))
    assert (odd / "scores?2" / "report.html").exists()
    assert {path.name for path in folder.iterdir()} == {"home", odd.name}


@case
def folders_of_any_name_while_searching(folder: Path) -> None:
    odd = make_odd_folder(folder)
    settings = [part for item in TRAINING for part in ("--set", f"train.{item}")]
    (odd / "space.toml").write_text("[tune.space]\ndropout = [0.1, 0.2]\n")
    options = ["--trials", 1, "--config", odd / "space.toml", *settings]
    check_success(run(folder, "tune", inputs.prepared, "--out", odd / "study", *options))
    assert (odd / "study" / "study.db").exists()
    assert {path.name for path in folder.iterdir()} == {"home", odd.name}


@case
def second_command_in_a_folder(folder: Path) -> None:
    """The second command is refused, also one of another kind; after a kill the next one continues."""
    (folder / "home").mkdir()
    environment = {**ENVIRONMENT, "HOME": str(folder / "home")}
    command = [str(part) for part in (PROGRAM, *inputs.train(folder))]
    with open(folder / "log", "w") as log:
        first = subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while not (folder / "run" / "settings.json").exists():
                assert first.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
            holder = f"{folder / 'run'}: `ray-cxr train` (process {first.pid} on "
            check_error(run(folder, *inputs.train(folder), limit_s=30), holder)
        finally:
            first.kill()
            first.wait()
    check_success(run(folder, *inputs.train(folder)))
    assert not (folder / "run" / ".lock").exists()


# ---------------------------------------------------------------- memory, processes, streams and databases


@case
def memory_that_is_used_up(folder: Path) -> None:
    """Ray's memory monitor ends every worker, because it counts 1% of the memory as full."""
    variables = {"RAY_memory_usage_threshold": "0.01"}
    facts = {"prepare": "rows_per_shard", "train": "batch_size"}
    for arguments in (inputs.prepare(folder), inputs.train(folder)):
        result = run(folder, *arguments, variables=variables, limit_s=120)
        check_error(result, "ran out of memory (", "GB in use), so Ray ended a worker; ", facts[str(arguments[0])])


def as_another_user(processes: int) -> list[str | Path]:
    """Return the start of a command under a limit of processes, which does not bind root."""
    files = "+dac_override,+dac_read_search,+fowner"
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", f"--inh-caps={files}"]
    start = ["prlimit", f"--nproc={processes}", *user, f"--ambient-caps={files}"]
    require(start)
    return [*start, PROGRAM]


@case
def limit_of_processes(folder: Path) -> None:
    """With 100, Ray cannot start; with 350, the worker of a training aborts on a machine with two CPUs."""
    for processes, arguments in (
        (100, inputs.prepare(folder)),
        (100, inputs.train(folder)),
        (350, inputs.train(folder)),
    ):
        result = run(folder, *arguments, program=as_another_user(processes), limit_s=120)
        check_error(result, "processes and threads are needed on", f"ulimit -u is {processes}", "ray.num_cpus=1")


@case
def home_that_is_a_file(folder: Path) -> None:
    (folder / "file").touch()
    for arguments in (inputs.prepare(folder), inputs.train(folder), inputs.score(folder)):
        check_success(run(folder, *arguments, variables={"HOME": str(folder / "file")}))


@case
def closed_standard_streams(folder: Path) -> None:
    start = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", PROGRAM]
    check_success(run(folder, *inputs.prepare(folder), program=start))
    check_success(run(folder, *inputs.score(folder), program=start))


@case
def standard_output_on_a_full_disk(folder: Path) -> None:
    start = ["sh", "-c", 'exec "$@" >/dev/full', "sh", PROGRAM]
    result = run(folder, *inputs.train(folder), program=start)
    check_error(result, "ray-cxr train: standard output: No space left on device")
    assert (folder / "run" / "bundle" / "bundle.json").exists()


@case
def ctrl_c_within_the_first_second(folder: Path) -> None:
    program = [PROGRAM, "prepare", "x", "--out", "y"]
    # A shell lets commands that it starts with `&` ignore SIGINT, this script included.
    reset = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(program, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=reset)
    maps = Path(f"/proc/{process.pid}/maps")
    while "numpy" not in maps.read_text():  # the libraries are being imported
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "ray-cxr: stopped; run the same command again to continue\n")


@case
def only_grpc_has_a_proxy(folder: Path) -> None:
    check_success(run(folder, *inputs.train(folder), variables={"grpc_proxy": "http://192.0.2.1:3128"}))


@case
def database_of_a_search_that_another_program_has_locked(folder: Path) -> None:
    study = folder / "study"
    study.mkdir()
    settings = [part for item in TRAINING for part in ("--set", f"train.{item}")]
    with contextlib.closing(sqlite3.connect(study / "study.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        result = run(folder, "tune", inputs.prepared, "--out", study, "--trials", 1, *settings, limit_s=90)
    check_error(result, "study.db: database is locked; another program has locked it")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    raise SystemExit(main(sys.argv[1:]))
