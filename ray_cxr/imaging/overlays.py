"""Heat maps as `score --heatmaps` leaves them: what a file of them holds, and where on the picture a map lies.

    SCORES/heatmaps/part-00000.parquet, ...     `SCHEMA`: the maps of one range of scores each
    SCORES/heatmaps/<image>.<Finding>.png       the same, laid over the picture

A map has few cells (7 x 7 for most networks at 224 pixels) and covers an `Area` of the original picture: all of it
where the network saw it stretched, its middle where it was cropped, and more than it where it was padded.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr.config import InputSpec
from ray_cxr.errors import TableError
from ray_cxr.storage import remote

FOLDER = "heatmaps"
#: One row per map, an image's in order of rank; or one for an image that could not be read again, with `error_code`
#: and nothing else but its `image_id`.
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("finding", pa.string()),
        ("rank", pa.int32()),  # 1 is the image's top_finding
        ("p", pa.float32()),  # the probability in the scores
        ("evidence", pa.float32()),  # sum of the map; 0: nothing in the picture speaks for the finding
        ("height", pa.int32()),  # of the map, cells
        ("width", pa.int32()),
        ("map", pa.list_(pa.float32())),  # height x width, row by row from the top, 0 and above
        ("top", pa.float64()),  # the area it covers, see `Area`
        ("left", pa.float64()),
        ("bottom", pa.float64()),
        ("right", pa.float64()),
        ("picture_height", pa.int32()),  # of the original, pixels
        ("picture_width", pa.int32()),
        ("overlay", pa.string()),  # name of the PNG in the same folder
        ("error_code", pa.string()),
        ("error", pa.string()),
    ]
)

_READABLE = re.compile(r"[a-z0-9_][a-z0-9_.-]{0,99}")


class Area(NamedTuple):
    """Edges in fractions of the original's height (top, bottom) and width (left, right), from its upper left corner.

    Below 0 and above 1 lies what was padded.
    """

    top: float
    left: float
    bottom: float
    right: float


WHOLE = Area(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Where a network found what speaks for a finding.

    Attributes:
        rank: 1 for the image's top finding.
        p: the probability in the scores.
        cells: float32 [h,w], 0 and above, in the finding's logit; all 0 where nothing speaks for it.
        area: of the original picture that the cells cover together.
        picture: height and width of the original, pixels.
        overlay: the PNG.
    """

    image_id: str
    finding: str
    rank: int
    p: float
    cells: np.ndarray
    area: Area
    image_shape: tuple[int, int]
    overlay: Path

    @property
    def evidence(self) -> float:
        """Sum of the cells; 0 means that nothing in the picture speaks for the finding."""
        return float(self.cells.sum())

    def project(self, shape: tuple[int, int] | None = None) -> np.ndarray:
        """The map on the original's pixels, or on those of a smaller picture of it: float32 [H,W]."""
        return project_cells(self.cells, self.area, shape or self.image_shape)


def read_heatmaps(scores: str | Path, image_ids: Collection[str] | None = None) -> dict[tuple[str, str], HeatMap]:
    """The heat maps of a folder of scores, by image_id and finding.

    Args:
        scores: SCORES, as `score --heatmaps` left it.
        image_ids: those of these images only; None for all.

    Returns:
        Images in the order of the scores, an image's findings by rank. Images that could not be read again are absent.

    Raises:
        TableError: there are no heat maps, or a file of them is damaged.
    """
    folder = remote.path(scores) / FOLDER
    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        raise TableError(f"{scores}: holds no heat maps; `ray-cxr score ... --heatmaps K` draws them")
    wanted = None if image_ids is None else set(image_ids)
    found: dict[tuple[str, str], HeatMap] = {}
    for part, file in zip(parts, remote.contents(parts), strict=True):
        try:
            rows = pq.read_table(file, columns=SCHEMA.names).cast(SCHEMA).to_pylist()
            for row in rows:
                if row["finding"] is not None and (wanted is None or row["image_id"] in wanted):
                    found[row["image_id"], row["finding"]] = _heat_map(row, folder)
        except (OSError, ValueError, TypeError, KeyError, pa.ArrowException):
            raise TableError(f"{part}: is no file of heat maps; remove it and draw them again") from None
    return found


def _heat_map(row: dict[str, Any], folder: Path) -> HeatMap:
    return HeatMap(
        image_id=row["image_id"],
        finding=row["finding"],
        rank=row["rank"],
        p=row["p"],
        cells=np.array(row["map"], np.float32).reshape(row["height"], row["width"]),
        area=Area(*(row[edge] for edge in Area._fields)),
        image_shape=(row["picture_height"], row["picture_width"]),
        overlay=folder / row["overlay"],
    )


def overlay_name(image_id: str, finding: str) -> str:
    """Name of a PNG: no two of an image and a finding share one, also where a disk knows no upper and lower case.

    An id of small letters, digits, `_`, `.` and `-` is used as it is. Of any other the foreign characters become `_`,
    and a part of its SHA-256 follows behind `~`, which none of the former holds.
    """
    if _READABLE.fullmatch(image_id):
        return f"{image_id}.{finding}.png"
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", image_id)[-60:].lstrip("-")
    return f"{readable}~{sha256(image_id.encode()).hexdigest()[:20]}.{finding}.png"


def content(spec: InputSpec, height: int, width: int) -> tuple[int, int, int, int]:
    """Where a picture of this size lies in the model's input, pixels: (top, left, rows, columns).

    All of the input, but for the margins of `pad`; as `imaging.resize` does it.
    """
    size = spec.size
    if spec.aspect != "pad":
        return 0, 0, size, size
    longest = max(height, width)
    rows = max(1, (2 * height * size + longest) // (2 * longest))
    columns = max(1, (2 * width * size + longest) // (2 * longest))
    return (size - rows) // 2, (size - columns) // 2, rows, columns


def area_of(spec: InputSpec, height: int, width: int) -> Area:
    """What of a picture of this size the model's whole input covers."""
    if spec.aspect == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return Area(top / height, left / width, (top + side) / height, (left + side) / width)
    top, left, rows, columns = content(spec, height, width)
    return Area(-top / rows, -left / columns, (spec.size - top) / rows, (spec.size - left) / columns)


def project_cells(cells: np.ndarray, area: Area, shape: tuple[int, int]) -> np.ndarray:
    """Lay a map over a picture, linear between the middles of its cells; 0 outside of what it covers.

    Args:
        cells: float [h,w].
        area: what of the picture they cover.
        shape: (H, W) of the picture, or of a smaller one of the same.

    Returns:
        float32 [H,W].
    """
    rows = _weights(cells.shape[0], area.top, area.bottom, shape[0])
    columns = _weights(cells.shape[1], area.left, area.right, shape[1])
    return np.asarray(rows @ cells.astype(np.float32) @ columns.T, dtype=np.float32)


def _weights(cells: int, start: float, end: float, pixels: int) -> np.ndarray:
    """Share of each cell in each pixel along one side, float32 [pixels,cells]."""
    middles = (np.arange(pixels) + 0.5) / pixels
    place = (middles - start) / (end - start)
    at = np.clip(place * cells - 0.5, 0, cells - 1)  # beyond the outermost middles their values hold
    shares = np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(cells)))
    shares[(place < 0) | (place > 1)] = 0.0
    return np.asarray(shares, dtype=np.float32)
