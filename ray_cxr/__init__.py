"""Chest X-ray screening at scale: Keras models trained with Ray Train, archives scored with Ray Data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["FINDINGS", "Bundle", "RayCxrError", "__version__", "load_bundle"]

from ray_cxr.errors import RayCxrError
from ray_cxr.labels import FINDINGS

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ray_cxr.models.bundle import Bundle, load_bundle


def __getattr__(name: str) -> Any:
    """Import TensorFlow only on demand, so that `ray-cxr --help` is fast."""
    if name in ("Bundle", "load_bundle"):
        from ray_cxr.models import bundle

        return getattr(bundle, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
