"""The heat maps of a score run for the browser: colours with opacity, in the geometry of the whole image."""

from __future__ import annotations

import threading

import cv2
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_cxr.data import identity
from ray_cxr.errors import TableError
from ray_cxr.imaging import overlays
from ray_cxr.imaging.overlays import HeatMap
from ray_cxr.review.index import ReviewIndex
from ray_cxr.storage import remote

#: Longer side of a drawn map, pixels. The browser stretches it over the image: a map has few cells.
SIDE = 512


class NoMapError(Exception):
    """There is no heat map to show; the message is the reason, for the reader."""


class MapStore:
    """Draws the heat maps of rows, one file of maps at a time."""

    def __init__(self, index: ReviewIndex) -> None:
        self._index = index
        self._lock = threading.Lock()
        #: The file of maps of each row, int64 [n], -1 for none; None until the first map is requested.
        self._parts: np.ndarray | None = None
        self._paths = overlays.list_parts(index.scores)

    @property
    def has_maps(self) -> bool:
        return bool(self._paths)

    def draw(self, row: int, finding: str) -> bytes:
        """Return a PNG, RGBA, that covers the whole image when it is stretched over it.

        Colours run from 0 to the highest cell of this map, as in the overlays of `score`.

        Raises:
            NoMapError: there is no map, with the reason.
        """
        found = self._read(row, finding)
        if not found.evidence > 0:
            raise NoMapError(f"the heat map is empty: {overlays.EMPTY}")
        scale = SIDE / max(found.image_shape)
        height, width = (max(1, round(side * scale)) for side in found.image_shape)
        strength = found.project((height, width)) / found.cells.max()
        step = np.rint(np.clip(strength, 0.0, 1.0) * 255).astype(np.uint8)
        table = np.rint(overlays.color_scale()[:, [2, 1, 0, 3]] * 255).astype(np.uint8)  # OpenCV takes BGRA
        return bytes(cv2.imencode(".png", table[step], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])

    def _read(self, row: int, finding: str) -> HeatMap:
        if not self._paths:
            raise NoMapError("this run has no heat maps; `ray-cxr score ... --heatmaps K` draws them")
        try:
            with self._lock:
                if self._parts is None:
                    self._parts = self._locate()
            part = int(self._parts[row])
            image_id = self._index.ids[row].as_py()
            path = self._paths[part]
            found = {} if part < 0 else overlays.parse_part(path, remote.read_file(path), [image_id])
        except TableError as error:
            raise NoMapError(str(error)) from None
        if part < 0:
            raise NoMapError("this image has no heat map; run `ray-cxr score ... --heatmaps K` again")
        if not found:
            raise NoMapError("the image could not be read again when the heat maps were drawn")
        if (heat_map := found.get((image_id, finding))) is None:
            count = len(found)
            raise NoMapError(f"heat maps were drawn only of the {count} highest findings of this image")
        if abs(heat_map.p - float(self._index.p[finding][row])) > 1e-6:
            raise NoMapError("the heat map belongs to other scores; run `ray-cxr score ... --heatmaps K` again")
        return heat_map

    def _locate(self) -> np.ndarray:
        """Return the file of each row. Only names are read: the maps of 112,120 images fill hundreds of files."""
        names: list[str] = []
        numbers: list[int] = []
        for number, (path, file) in enumerate(zip(self._paths, remote.read_files(self._paths), strict=True)):
            with overlays.explain_damage(path):
                names += (found := pc.unique(pq.read_table(file, columns=["image_id"])["image_id"]).to_pylist())
            numbers += [number] * len(found)
        parts = np.full(len(self._index.ids), -1, dtype=np.int64)
        rows = identity.find_ids(names, self._index.ids.to_pylist())
        parts[rows[rows >= 0]] = np.array(numbers, dtype=np.int64)[rows >= 0]
        return parts
