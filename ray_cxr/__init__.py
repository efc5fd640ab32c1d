"""Chest X-ray screening at scale: Keras models trained with Ray Train, archives scored with Ray Data."""

from __future__ import annotations

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
    "load_features",
    "plot_calibration",
    "train",
    "worklist",
]

from ray_cxr.errors import RayCxrError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ray_cxr.api import evaluate, plot_calibration, train, worklist
    from ray_cxr.data.features import load_features
    from ray_cxr.imaging.overlays import HeatMap
    from ray_cxr.labels import FINDINGS
    from ray_cxr.models.bundle import Bundle, load_bundle


def __getattr__(name: str) -> Any:
    """Import NumPy and TensorFlow only on demand: `ray-cxr --help` is fast, and Ctrl-C is handled before any import."""
    if name == "FINDINGS":
        from ray_cxr import labels

        return labels.FINDINGS
    if name in ("Bundle", "load_bundle"):
        from ray_cxr.models import bundle

        return getattr(bundle, name)
    if name == "HeatMap":
        from ray_cxr.imaging import overlays

        return overlays.HeatMap
    if name == "load_features":
        from ray_cxr.data import features

        return features.load_features
    if name in ("evaluate", "plot_calibration", "train", "worklist"):
        from ray_cxr import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
