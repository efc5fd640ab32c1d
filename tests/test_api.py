"""The public names, and which imports start TensorFlow or Ray."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ray_cxr

MODULES = (
    "ray_cxr",
    "ray_cxr.cli",
    "ray_cxr.data.manifest",
    "ray_cxr.data.prepared",
    "ray_cxr.models.predictions",
    "ray_cxr.models.bundle",
    "ray_cxr.scoring.pipeline",
    "ray_cxr.reporting.report",
)


def test_public_names_and_version() -> None:
    assert ray_cxr.__all__ == ["FINDINGS", "Bundle", "RayCxrError", "__version__", "load_bundle"]
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert ray_cxr.__version__ == project["project"]["version"]
    with pytest.raises(AttributeError, match="load_model"):
        _ = ray_cxr.load_model  # type: ignore[attr-defined]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_imports_and_help_start_neither_tensorflow_nor_ray() -> None:
    """Nor do they wait for highdicom; the bundle's names are imported on first use."""
    code = f"""
import contextlib, importlib, io, sys
for name in {MODULES}:
    importlib.import_module(name)
    print(name, sorted({{"tensorflow", "keras", "ray", "highdicom"}} & set(sys.modules)))
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    sys.modules["ray_cxr.cli"].main(["--help"])
print("help", sorted({{"tensorflow", "keras", "ray", "highdicom"}} & set(sys.modules)))
"""
    assert run(code).splitlines() == [f"{name} []" for name in (*MODULES, "help")]


@pytest.mark.slow
def test_all_public_names_exist() -> None:
    """In a process of its own, because other tests import the modules behind them."""
    assert run("import ray_cxr; print([n for n in ray_cxr.__all__ if not hasattr(ray_cxr, n)])") == "[]"
