"""Chest X-ray screening at scale: Keras models trained with Ray Train, archives scored with Ray Data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

#: What programs and notebooks use; docs/python.md shows each of them.
__all__ = [
    "FINDINGS",
    "Bundle",
    "HeatMap",
    "RayCxrError",
    "__version__",
    "evaluate",
    "load_bundle",
    "plot_calibration",
    "train",
    "worklist",
]

from ray_cxr.errors import RayCxrError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ray_cxr.api import evaluate, plot_calibration, train, worklist
    from ray_cxr.imaging.overlays import HeatMap
    from ray_cxr.labels import FINDINGS
    from ray_cxr.models.bundle import Bundle, load_bundle

#: The module of each name that is imported on first use: `import ray_cxr` and `ray-cxr --help` stay fast, and a command
#: handles Ctrl-C before any import.
_MODULES = {
    "FINDINGS": "ray_cxr.labels",
    "Bundle": "ray_cxr.models.bundle",
    "HeatMap": "ray_cxr.imaging.overlays",
    "evaluate": "ray_cxr.api",
    "load_bundle": "ray_cxr.models.bundle",
    "plot_calibration": "ray_cxr.api",
    "train": "ray_cxr.api",
    "worklist": "ray_cxr.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
