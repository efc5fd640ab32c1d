"""Chest X-ray screening at scale: Keras models trained with Ray Train, archives scored with Ray Data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["FINDINGS", "Bundle", "RayCxrError", "__version__", "load_bundle"]

from ray_cxr.errors import RayCxrError

__version__ = "0.1.0"

if TYPE_CHECKING:
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
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
