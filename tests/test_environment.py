"""Settings of the user's environment: what a command ignores, and what it refuses in one line."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray._private import utils

from ray_cxr import environment

ROOT = Path(__file__).parents[1]


def run_python(code: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, in which `environment` is imported and log lines are on stderr."""
    program = f"import logging, os, warnings\nfrom ray_cxr import environment\nlogging.basicConfig()\n{code}"
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        cwd=ROOT, env={"PATH": os.environ["PATH"], **variables}, capture_output=True, encoding="utf-8",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "variables", "is_ignored"),
    [
        ([], {"PYTHONWARNINGS": "ignore,error::ResourceWarning"}, True),
        (["-We"], {}, True),
        ([], {"PYTHONWARNINGS": "default"}, False),
    ],
)
def test_warnings_of_libraries_do_not_end_a_command(
    options: list[str], variables: dict[str, str], is_ignored: bool
) -> None:
    code = "environment.configure_command()\n" + "warnings.warn('left open', ResourceWarning)\n"
    done = run_python(code + "print(os.environ.get('PYTHONWARNINGS'))", *options, **variables)
    assert done.returncode == 0, done.stderr
    assert ("is ignored" in done.stderr) == is_ignored
    assert done.stdout.strip() == str(None if is_ignored else variables.get("PYTHONWARNINGS"))


@pytest.mark.slow
def test_a_warning_while_the_libraries_are_imported_does_not_end_a_command() -> None:
    code = (
        "import sys\n"
        "import ray_cxr.__main__ as program\n"
        "assert not {'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'pandas':\n"
        "            warnings.warn('old', DeprecationWarning)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "sys.argv = ['ray-cxr', '--version']\n"
        "sys.exit(program.main())"
    )
    done = run_python(code, "-We")
    assert (done.returncode, done.stdout) == (0, "ray-cxr 0.1.0\n"), done.stderr
    assert "PYTHONWARNINGS or -W e is ignored" in done.stderr


def test_another_backend_of_keras_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(environment, "is_command", False)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    for _ in range(2):
        environment.configure_command()
    assert "KERAS_BACKEND" not in os.environ
    assert [record.getMessage() for record in caplog.records] == [
        "KERAS_BACKEND=jax is ignored: ray_cxr runs Keras on TensorFlow"
    ]


def test_python_without_docstrings_is_refused_before_ray_starts() -> None:
    done = run_python("environment.prepare_for_ray()", PYTHONOPTIMIZE="2")
    assert "InputError: Python runs without docstrings, which Ray needs: unset PYTHONOPTIMIZE" in done.stderr


def test_a_variable_that_ray_cannot_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").touch()
    (tmp_path / "ray" / "data.py").write_text("int('yes')  # as Ray reads RAY_TQDM=yes\n", encoding="utf-8")
    done = run_python("environment.import_ray()", PYTHONPATH=str(tmp_path))
    assert re.search(r"InputError: Ray cannot be imported \(ValueError: .*'yes'\), .* `env \| grep RAY_`", done.stderr)


def test_version_1_of_ray_train_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "0")
    environment.prepare_for_ray()
    assert os.environ["RAY_TRAIN_V2_ENABLED"] == "1"
    assert "RAY_TRAIN_V2_ENABLED=0 is ignored" in caplog.text


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (1.0, 1), (1.5, 1), (2.9, 2)])
def test_a_quota_below_one_cpu_counts_as_one(
    quota: float, expected: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(utils, "_get_docker_cpus", lambda: quota)
    caplog.set_level(logging.WARNING, logger="ray_cxr")
    assert environment.count_cpus() == expected
    assert ("Ray counts it as one" in caplog.text) == (quota < 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("errors", "count", "expected"), [((0, 0), 2, 2), ((0, 0), 0, 0), ((100, 0), 2, 0), ((0, 3), 2, 0), (None, 2, 0)]
)
def test_gpus_are_counted_by_the_driver(
    errors: tuple[int, int] | None, count: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Driver:
        def __init__(self, name: str) -> None:
            if errors is None:
                raise OSError(f"{name}: cannot open shared object file")
            self.cuInit = lambda flags: errors[0]

        def cuDeviceGetCount(self, target: Any) -> int:
            target._obj.value = count
            return 0 if errors is None else errors[1]

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    assert environment.count_gpus() == expected


def test_figures_are_independent_of_the_settings_for_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\naxes.facecolor: black\n", encoding="utf-8")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from ray_cxr import environment
environment.configure_command()
from ray_cxr.reporting import plots
import matplotlib
print(matplotlib.get_backend(), *(matplotlib.rcParams[name] for name in ("text.usetex", "axes.facecolor")))
"""
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.stdout.split() == ["agg", "False", "white"], done.stderr


# ---------------------------------------------------------------- standard streams and Ctrl-C

NO_SPACE = "No space left on device"


def run_command(arguments: str, redirection: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `ray-cxr` from a shell, with Python's default buffering."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        ["sh", "-c", f"{sys.executable} -m ray_cxr {arguments} {redirection}"],
        cwd=cwd, env={**variables, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text("Image Index,Finding Labels,Patient ID\na.png,Effusion,1\n", encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "redirection", "code", "last_line"),
    [
        ("manifest table.csv --out m.parquet", "<&- >&- 2>&-", 0, ""),
        ("manifest table.csv --out m.parquet", ">/dev/full", 1, f"ray-cxr manifest: standard output: {NO_SPACE}"),
        ("--help", ">/dev/full", 1, f"ray-cxr: standard output: {NO_SPACE}"),
    ],
)
def test_a_command_ends_in_order_without_a_standard_output(
    arguments: str, redirection: str, code: int, last_line: str, table: Path, tmp_path: Path
) -> None:
    done = run_command(arguments, redirection, tmp_path)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith(last_line)
    assert len(done.stderr.splitlines()) == bool(last_line)
    assert (tmp_path / "m.parquet").exists() == ("table.csv" in arguments)


def test_closed_streams_do_not_give_their_numbers_to_files(tmp_path: Path) -> None:
    code = (
        "environment.open_closed_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w')\n"
        "assert os.system('echo output of a library && echo error >&2') == 0\n"
        "assert file.fileno() > 2 and os.read(0, 9) == b''"
    )
    program = f"import os, sys\nfrom ray_cxr import environment\n{code}"
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.parametrize("is_ignored", [False, True])
def test_ctrl_c_while_the_libraries_are_imported_is_one_line(is_ignored: bool) -> None:
    program = (
        "import os, signal, sys\n"
        "import ray_cxr.__main__ as program\n"
        "assert not {'numpy', 'pydantic'} & set(sys.modules)\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'pandas':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
        f"signal.signal(signal.SIGINT, signal.{'SIG_IGN' if is_ignored else 'default_int_handler'})\n"
        "sys.argv = ['ray-cxr', '--version']\n"
        "sys.exit(program.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    stopped = (130, "ray-cxr: stopped; run the same command again to continue\n")
    assert (done.returncode, done.stderr) == ((0, "") if is_ignored else stopped)
