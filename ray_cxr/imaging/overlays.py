"""Heat maps written by `score --heatmaps`: their file format, their projection onto the image, and their drawing.

    SCORES/heatmaps/part-00000.parquet, ...     `SCHEMA`: the maps of one range of scores each
    SCORES/heatmaps/<image>.<Finding>.jpg       overlays: maps over their image, of flagged findings by default

Overlays of earlier versions are PNG files.

A map has few cells (7 x 7 for most models at 224 pixels) and covers an `Area` of the original image. That area is the
whole image if the model's input was stretched, its centre if the input was cropped, and more than the image if the
input was padded.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr.config import InputSpec
from ray_cxr.errors import TableError
from ray_cxr.imaging.decode import load_image
from ray_cxr.imaging.resize import locate_in_input, resize
from ray_cxr.storage import remote

HEATMAPS = "heatmaps"
#: One row per map, in order of rank within an image. An image that could not be read again has one row with only
#: `image_id`, `error_code` and `error`.
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("finding", pa.string()),
        ("rank", pa.int32()),  # 1 is the image's top_finding
        ("p", pa.float32()),  # the probability in the scores
        ("evidence", pa.float32()),  # sum of the map; 0: no evidence for the finding
        ("height", pa.int32()),  # of the map, cells
        ("width", pa.int32()),
        ("map", pa.list_(pa.float32())),  # height x width, row-major from the top, 0 and above
        ("top", pa.float64()),  # the `Area` that the map covers
        ("left", pa.float64()),
        ("bottom", pa.float64()),
        ("right", pa.float64()),
        ("picture_height", pa.int32()),  # of the original, pixels
        ("picture_width", pa.int32()),
        ("overlay", pa.string()),  # name of the image in the same folder; null: not drawn
        ("error_code", pa.string()),
        ("error", pa.string()),
    ]
)

#: What a map of zeros means.
EMPTY = "no single region raises the score, which does not speak against the finding"
#: File types of overlays; the first is written now, and earlier versions wrote the others.
OVERLAY_TYPES = (".jpg", ".png")
#: At 512 pixels, PNG takes eleven times the bytes and eight times the time; WebP half the bytes and twelve times the
#: time.
_JPEG_QUALITY = 85
#: Opacity of the strongest cell, and the exponent for weaker cells: below 1, so that they remain visible on white.
_OPACITY, _EXPONENT = 0.6, 0.7
#: A matplotlib colour map whose lightness rises evenly, so that colour-blind readers can read it. Its darkest and its
#: lightest colours are omitted: they are invisible on black lungs and white bones.
_COLOURS, _DARKEST, _LIGHTEST = "inferno", 64, 220

_READABLE = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,99}")


class Area(NamedTuple):
    """Edges as fractions of the original's height (top, bottom) and width (left, right), from its upper left corner.
    Values below 0 and above 1 are padding.
    """

    top: float
    left: float
    bottom: float
    right: float


WHOLE = Area(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class HeatMap:
    """The evidence of a model for one finding in an image."""

    image_id: str
    finding: str
    rank: int  # 1 for the image's top finding
    p: float  # the probability in the scores
    cells: np.ndarray  # float32 [h,w], 0 and above, in units of the finding's logit; all 0 without evidence
    area: Area  # the part of the original that the cells cover
    image_shape: tuple[int, int]  # height and width of the original, pixels
    overlay: Path | None  # the map over its image; None: not drawn

    @property
    def evidence(self) -> float:
        """Sum of the cells; 0 means no evidence for the finding."""
        return float(self.cells.sum())

    def project(self, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Return the map on the pixels of the original, or of a smaller copy: float32 [H,W]."""
        return project_cells(self.cells, self.area, shape or self.image_shape)

    def draw(self, image: str | Path | np.ndarray, *, side: int = 512) -> np.ndarray:
        """Draw the map over its image: uint8 RGB [H,W,3], whose longer side has `side` pixels.

        Args:
            image: the original, a path or URI or uint8 [H,W]. Its text, such as a burned-in name, stays visible.

        Raises:
            ImageError: the file cannot be read.
        """
        pixels = image if isinstance(image, np.ndarray) else load_image(str(image))
        return draw_overlay(pixels, self.cells, self.area, side=side)


def read_heatmaps(scores: str | Path, image_ids: Collection[str] | None = None) -> dict[tuple[str, str], HeatMap]:
    """Read the heat maps in a folder that `score --heatmaps` wrote, by image_id and finding. If `image_ids` is None,
    the maps of all images are read.

    Images are in the order of the scores, findings by rank. Images that could not be read again are absent.

    Raises:
        TableError: there are no heat maps, or a file is damaged.
    """
    parts = list_parts(scores)
    if not parts:
        raise TableError(f"{scores}: has no heat maps; make them with `ray-cxr score ... --heatmaps K`")
    maps: dict[tuple[str, str], HeatMap] = {}
    for part, file in zip(parts, remote.read_files(parts), strict=True):
        maps |= parse_part(part, file, image_ids)
    return maps


def parse_part(
    part: Path, file: pa.NativeFile | None, image_ids: Collection[str] | None = None
) -> dict[tuple[str, str], HeatMap]:
    """Return what `read_heatmaps` returns, from one file of maps that was opened already; `part` is its path."""
    with explain_damage(part):
        table = pq.read_table(file, columns=SCHEMA.names).cast(SCHEMA)
        if image_ids is not None:  # rows as Python objects take much longer than the file
            table = table.filter(pc.is_in(table["image_id"], pa.array(list(image_ids), pa.string())))
        rows = [row for row in table.to_pylist() if row["finding"] is not None]
        return {(row["image_id"], row["finding"]): _parse_row(row, part.parent) for row in rows}


def read_evidence(scores: str | Path) -> dict[tuple[str, str], float]:
    """Return the evidence of each heat map of a folder of scores by image_id and finding, without reading the maps.

    Raises:
        TableError: a file is damaged.
    """
    found: dict[tuple[str, str], float] = {}
    parts = list_parts(scores)
    for part, file in zip(parts, remote.read_files(parts), strict=True):
        with explain_damage(part):
            table = pq.read_table(file, columns=["image_id", "finding", "evidence"])
            rows = table.filter(table["finding"].is_valid()).to_pydict()
            found |= dict(zip(zip(rows["image_id"], rows["finding"], strict=True), rows["evidence"], strict=True))
    return found


@contextlib.contextmanager
def explain_damage(part: Path) -> Iterator[None]:
    """Raise TableError in place of the errors of reading a damaged file of maps."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
        raise TableError(f"{part}: damaged or not a file of heat maps; remove it and draw them again") from None


def has_heatmaps(scores: str | Path) -> bool:
    """Whether a folder of scores holds heat maps."""
    return bool(list_parts(scores))


def list_parts(scores: str | Path) -> list[Path]:
    """Return the files of maps of a folder of scores, in the order of its rows."""
    return sorted((remote.to_path(scores) / HEATMAPS).glob("part-*.parquet"))


def _parse_row(row: dict[str, Any], folder: Path) -> HeatMap:
    return HeatMap(
        image_id=row["image_id"],
        finding=row["finding"],
        rank=row["rank"],
        p=row["p"],
        cells=np.array(row["map"], np.float32).reshape(row["height"], row["width"]),
        area=Area(*(row[edge] for edge in Area._fields)),
        image_shape=(row["picture_height"], row["picture_width"]),
        overlay=None if row["overlay"] is None else folder / row["overlay"],
    )


def overlay_name(image_id: str, finding: str) -> str:
    """Return the name of an overlay, unique for image and finding, also on disks that ignore case.

    Ids of lower-case letters, digits, `_`, `.` and `-` are used unchanged. In any other id, `_` replaces all other
    characters, and a part of the id's SHA-256 follows after `~`, which unchanged ids do not have.
    """
    if _READABLE.fullmatch(image_id):
        return f"{image_id}.{finding}{OVERLAY_TYPES[0]}"
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", image_id)[-60:].lstrip("-")
    return f"{readable}~{sha256(image_id.encode()).hexdigest()[:20]}.{finding}{OVERLAY_TYPES[0]}"


def compute_area(spec: InputSpec, height: int, width: int) -> Area:
    """Return the area of an image of this size that the model's input covers."""
    if spec.aspect == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return Area(top / height, left / width, (top + side) / height, (left + side) / width)
    top, left, rows, columns = locate_in_input(spec, height, width)
    return Area(-top / rows, -left / columns, (spec.size - top) / rows, (spec.size - left) / columns)


def project_cells(cells: np.ndarray, area: Area, shape: tuple[int, int]) -> np.ndarray:
    """Project a map, float [h,w], onto an image of `shape` (H, W): float32 [H,W].

    The projection is linear between the centres of the cells, and 0 outside the area.
    """
    rows = _weights(cells.shape[0], area.top, area.bottom, shape[0])
    columns = _weights(cells.shape[1], area.left, area.right, shape[1])
    return np.asarray(rows @ cells.astype(np.float32) @ columns.T, dtype=np.float32)


def _weights(cells: int, start: float, end: float, pixels: int) -> np.ndarray:
    """Return the weight of each cell in each pixel along one side, float32 [pixels,cells]."""
    centres = (np.arange(pixels) + 0.5) / pixels
    position = (centres - start) / (end - start)
    index = np.clip(position * cells - 0.5, 0, cells - 1)  # outermost values extend to the edges
    weights = np.maximum(0.0, 1.0 - np.abs(index[:, None] - np.arange(cells)))
    weights[(position < 0) | (position > 1)] = 0.0
    return np.asarray(weights, dtype=np.float32)


def draw_overlay(image: np.ndarray, cells: np.ndarray, area: Area = WHOLE, *, side: int = 512) -> np.ndarray:
    """Draw a heat map over its image: uint8 RGB with the image's proportions and a longer side of `side` pixels.

    Colours run from 0 to the highest cell of this map, so the colours of two maps are not comparable. The weaker a
    region, the more of the image is visible; with a map of zeros the result is gray.

    Args:
        image: uint8 [H,W].
        cells: float32 [h,w], 0 and above.
        area: the part of the image that the cells cover, see `compute_area`.
    """
    gray = scale_to_side(image, side)
    peak = float(cells.max())
    if not peak > 0:
        return np.repeat(gray[..., None], 3, axis=2)
    strength = project_cells(cells / peak, area, (gray.shape[0], gray.shape[1]))
    # 256 steps, so that colour and opacity come from one table.
    step = np.rint(strength * 255).astype(np.uint8)
    colours, remaining = _blend_table()
    blended = cv2.LUT(cv2.merge((step, step, step)), colours)
    under = cv2.multiply(gray, cv2.LUT(step, remaining), scale=1 / 255)
    return np.asarray(cv2.add(blended, cv2.merge((under, under, under))))


def scale_to_side(image: np.ndarray, side: int) -> np.ndarray:
    """Scale an image so that its longer side has `side` pixels: uint8 [H',W']."""
    if max(image.shape) == side:
        return image
    spec = InputSpec(size=side, aspect="pad")
    return crop_padding(resize(image, spec), spec, (image.shape[0], image.shape[1]))


def crop_padding(padded: np.ndarray, spec: InputSpec, shape: tuple[int, int]) -> np.ndarray:
    """Remove the margins that `resize` added to an image of shape (H, W)."""
    top, left, rows, columns = locate_in_input(spec, *shape)
    return padded[top : top + rows, left : left + columns]


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encode a uint8 image, gray [H,W] or RGB [H,W,3], as a JPEG without metadata."""
    # OpenCV takes BGR.
    pixels = image[..., ::-1] if image.ndim == 3 else image
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise ValueError(f"not an image: {image.dtype} {image.shape}")
    return bytes(data)


@functools.cache
def color_scale(steps: int = 256) -> np.ndarray:
    """Return the colours of overlays for strengths from 0 to 1: float [steps,4], red, green, blue and opacity."""
    from matplotlib import colormaps  # the table alone; no canvas, no fonts

    colours = colormaps[_COLOURS](np.linspace(_DARKEST, _LIGHTEST, steps).astype(int))[:, :3]
    cover = _OPACITY * np.linspace(0.0, 1.0, steps) ** _EXPONENT
    return np.column_stack([colours, cover])


@functools.cache
def _blend_table() -> tuple[np.ndarray, np.ndarray]:
    """Return, for 256 strengths, the colour to add, uint8 [1,256,3], and the image's share to keep, uint8 [1,256]."""
    scale = color_scale()
    added = np.rint(scale[:, :3] * scale[:, 3:] * 255).astype(np.uint8)
    return added.reshape(1, 256, 3), np.rint(255 * (1 - scale[:, 3])).astype(np.uint8).reshape(1, 256)
