"""The public names, and which imports start TensorFlow or Ray."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ray_cxr
from ray_cxr import extras

MODULES = (
    "ray_cxr",
    "ray_cxr.api",
    "ray_cxr.cli",
    "ray_cxr.data.manifest",
    "ray_cxr.data.prepared",
    "ray_cxr.models.predictions",
    "ray_cxr.models.bundle",
    "ray_cxr.scoring.pipeline",
    "ray_cxr.reporting.report",
)
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_public_names_and_version() -> None:
    assert ray_cxr.__all__ == [
        "FINDINGS",
        "Bundle",
        "HeatMap",
        "RayCxrError",
        "__version__",
        "evaluate",
        "load_bundle",
        "load_features",
        "plot_calibration",
        "train",
        "worklist",
    ]
    assert ray_cxr.__version__ == PROJECT["version"]
    with pytest.raises(AttributeError, match="load_model"):
        _ = ray_cxr.load_model  # type: ignore[attr-defined]


def run(code: str) -> str:
    """Run code in a child process, because other tests import most modules; return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_imports_and_help_start_no_slow_package() -> None:
    """The optional packages are not imported either."""
    code = f"""
import contextlib, importlib, io, sys
slow = {{"tensorflow", "keras", "ray", "highdicom", "nncf"}}
for name in {MODULES}:
    importlib.import_module(name)
    print(name, sorted(slow & set(sys.modules)))
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    sys.modules["ray_cxr.cli"].main(["--help"])
print("help", sorted(slow & set(sys.modules)))
"""
    assert run(code).splitlines() == [f"{name} []" for name in (*MODULES, "help")]
    unneeded = "{'matplotlib', 'jinja2', 'pydicom', 'sklearn'}"
    assert run(f"import ray_cxr.cli, ray_cxr.scoring.plan, sys; print({unneeded} & set(sys.modules))") == "set()"


@pytest.mark.slow
def test_all_public_names_exist() -> None:
    assert run("import ray_cxr; print([n for n in ray_cxr.__all__ if not hasattr(ray_cxr, n)])") == "[]"


@pytest.mark.slow
def test_bundle_is_made_and_predicts_without_extras(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.modules.update(dict.fromkeys({list(extras.EXTRAS)}))  # no optional package can be imported or found
sys.path.insert(0, {str(ROOT / "tests")!r})
import numpy as np
from conftest import make_tiny_bundle
bundle = make_tiny_bundle(Path({str(tmp_path / "b")!r}))
print(bundle.predict(np.zeros((2, 64, 64), np.uint8))["status"].tolist())
import ray_cxr.reporting.report, ray_cxr.reporting.search_page, ray_cxr.scoring.pipeline, ray_cxr.tuning.search
assert not [name for name in {list(extras.EXTRAS)} if sys.modules[name]]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, "['ok', 'ok']\n"), done.stderr


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["export-sr", "scores", "--out", "reports"], "highdicom", "dicom-sr"),
        (["quantize", "bundle", "prepared", "--out", "int8"], "nncf", "int8"),
    ],
)
def test_command_names_its_missing_extra(
    arguments: list[str], package: str, extra: str, command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    code, _, err = command(*arguments)
    (line,) = err.splitlines()
    assert code == 2
    assert f"{arguments[0]}: needs {package}." in line
    assert f"pip install 'ray-cxr[{extra}]'" in line
    assert list(tmp_path.iterdir()) == []


def test_every_extra_is_declared_and_locked() -> None:
    for package, extra in extras.EXTRAS.items():
        assert package in {re.split(r">=|\[", line)[0] for line in PROJECT["optional-dependencies"][extra]}
        assert not [line for line in PROJECT["dependencies"] if line.split(">=")[0] == package]
        locked = f"\n{package}==" in (ROOT / "requirements.lock").read_text(encoding="utf-8")
        assert locked == (extra not in ("cmaes", "onnx"))
