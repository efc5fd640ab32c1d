"""Versions of everything that a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version

import ray_cxr

PACKAGES = ("ray", "tensorflow", "keras", "numpy", "pillow", "opencv-python-headless", "pydicom", "pyarrow")


def versions() -> dict[str, str]:
    """Version by name, for provenance and run.json."""
    # Ours from the code itself: under `ray job submit` it may run from a working directory, not installed.
    ours = {"ray-cxr": ray_cxr.__version__, "python": platform.python_version()}
    return {**ours, **{name: version(name) for name in PACKAGES}}
