"""The public names, and that naming the package costs nobody the start of TensorFlow or Ray."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ray_cxr


def test_public_names() -> None:
    assert ray_cxr.__all__ == ["FINDINGS", "Bundle", "RayCxrError", "__version__", "load_bundle"]


def test_version_is_the_one_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert ray_cxr.__version__ == project["project"]["version"]


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        _ = ray_cxr.load_model  # type: ignore[attr-defined]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "ray_cxr",
        "ray_cxr.cli",
        "ray_cxr.data.manifest",
        "ray_cxr.data.prepared",
        "ray_cxr.models.predictions",
        "ray_cxr.models.bundle",
        "ray_cxr.scoring.pipeline",
        "ray_cxr.reporting.report",
    ],
)
def test_import_brings_neither_tensorflow_nor_keras_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'tensorflow', 'keras', 'ray'}} & set(sys.modules)))"
    assert run(code) == "[]"


def test_all_names_are_there() -> None:
    """In a process of its own: the bundle's names are imported when asked for."""
    assert run("import ray_cxr; print([n for n in ray_cxr.__all__ if not hasattr(ray_cxr, n)])") == "[]"
