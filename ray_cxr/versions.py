"""Versions of the packages that results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version

import ray_cxr

PACKAGES = ("ray", "tensorflow", "keras", "numpy", "pillow", "opencv-python-headless", "pydicom", "pyarrow")


def versions() -> dict[str, str]:
    """Return version by name, for provenance and run.json."""
    # `ray job submit` may run the code from a working directory, without an installed package.
    ours = {"ray-cxr": ray_cxr.__version__, "python": platform.python_version()}
    return {**ours, **{name: version(name) for name in PACKAGES}}
