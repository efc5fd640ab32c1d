"""Settings of the user's environment: what a command ignores, and what it refuses in one line."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

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
