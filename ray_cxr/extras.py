"""Packages that only some commands need, and the extra of ray-cxr that installs each of them."""

from __future__ import annotations

from importlib.util import find_spec

from ray_cxr.errors import ConfigError

EXTRAS = {
    "highdicom": "dicom-sr",
    "nncf": "int8",
    "plotly": "plots",
    "cmaes": "cmaes",
    "tf2onnx": "onnx",
    "pynetdicom": "pacs",
    "starlette": "review",
    "uvicorn": "review",
    "psycopg": "postgres",
}


def is_installed(package: str) -> bool:
    return find_spec(package) is not None


def install_hint(package: str) -> str:
    """Return the end of a message: which package is needed, and the command that installs it."""
    return f"needs {package}. Install it with: pip install 'ray-cxr[{EXTRAS[package]}]'"


def require(package: str, command: str) -> None:
    """Raise an error that names the extra if a command's optional package is missing; the package is not imported."""
    if not is_installed(package):
        raise ConfigError(f"{command}: {install_hint(package)}")
