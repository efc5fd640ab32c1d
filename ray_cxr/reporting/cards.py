"""The radiographs of a report on its page: cards with images, boxes and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from ray_cxr.imaging.overlays import color_scale
from ray_cxr.reporting.cases import Band, Case, encode_webp


class Shot(NamedTuple):
    """An image of a card: WebP, its width divided by its height, and its name for readers."""

    webp: bytes
    ratio: float
    name: str


class Mark(NamedTuple):
    """A box over an image; edges and size are percentages of the image's sides."""

    finding: str
    is_own: bool
    left: float
    top: float
    width: float
    height: float


def list_shots(case: Case) -> list[Shot]:
    """Return the radiograph and the heat map of a case, as far as it has them."""
    images = (("Radiograph", case.image), ("Heat map", case.overlay))
    return [
        Shot(encode_webp(image), image.shape[1] / image.shape[0], name) for name, image in images if image is not None
    ]


def list_marks(case: Case) -> list[Mark]:
    """Return the boxes of a case."""
    return [
        Mark(
            box.finding,
            box.finding == case.finding,
            *(100 * edge for edge in (left, top, right - left, bottom - top)),
        )
        for box in case.boxes
        for top, left, bottom, right in (box.area,)
    ]


def has_boxes(bands: Sequence[Band]) -> bool:
    return any(case.boxes for _, cases in bands for case in cases)


def list_stops() -> Markup:
    """Return the colours of heat maps from no evidence to the highest value, for a gradient in CSS."""
    return Markup(", ").join(
        f"rgb({255 * red:.0f} {255 * green:.0f} {255 * blue:.0f} / {opacity:.2f})"
        for red, green, blue, opacity in color_scale(12)
    )
