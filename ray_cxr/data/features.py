"""Pooled features of scored images: what the last layer of the model sees, written by `score --features`.

    SCORES/features/part-00000.parquet, ...   one file per range of the input, as of the scores

A file has the columns image_id and features: float16 values in a list of fixed size, null for an image that could not
be scored. It is written before the range's file of scores, so a range with scores has features.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ray_cxr.data import identity
from ray_cxr.errors import ConfigError, InputError, OutputError
from ray_cxr.storage import atomic, contents, remote, run_folder

FEATURES = "features"
#: Rows that are converted to float32 at a time.
_BLOCK = 8192
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Features:
    """Features of scored images, without images that could not be scored.

    Attributes:
        image_ids: str [N].
        vectors: float16 [N,C].
        model_digest: digest of the bundle that computed them.
    """

    image_ids: list[str]
    vectors: np.ndarray
    model_digest: str

    def __len__(self) -> int:
        return len(self.image_ids)

    @functools.cached_property
    def _unit_vectors(self) -> np.ndarray:
        """The vectors divided by their lengths, float32 [N,C]; zeros stay zeros."""
        unit = np.empty(self.vectors.shape, np.float32)
        for start in range(0, len(self), _BLOCK):
            block = self.vectors[start : start + _BLOCK].astype(np.float32)
            unit[start : start + _BLOCK] = block / np.maximum(np.linalg.norm(block, axis=1, keepdims=True), _TINY)
        return unit

    def find_nearest(self, query: str | np.ndarray, k: int = 10) -> pd.DataFrame:
        """Return the images whose features have the largest cosine similarity to those of an image.

        The first call converts the vectors to float32: four bytes per value, in addition.

        Args:
            query: an image id, which is then not part of the result, or features of the same model, float [C].
            k: number of images.

        Returns:
            Columns image_id and similarity (-1 to 1), the most similar first.

        Raises:
            InputError: no features of this image, or a vector of another length.
        """
        if not isinstance(k, int | np.integer) or k < 1:
            raise InputError(f"k={k}: must be an integer of at least 1")
        own = None
        if isinstance(query, str):
            own = int(identity.find_ids([query], self.image_ids)[0])
            if own < 0:
                raise InputError(f"{query}: no features of this image")
            query = self.vectors[own]
        vector = np.asarray(query, np.float32)
        if vector.shape != self.vectors.shape[1:]:
            raise InputError(f"query of shape {list(vector.shape)}: the features have {self.vectors.shape[1]} values")
        if not np.isfinite(vector).all():
            raise InputError("query: holds values that are not finite")
        similarity = self._unit_vectors @ (vector / max(float(np.linalg.norm(vector)), _TINY))
        if own is not None:
            similarity[own] = -np.inf
        count = min(k, len(self) - (own is not None))
        nearest = np.argpartition(-similarity, max(count - 1, 0))[:count] if count else np.array([], int)
        nearest = nearest[np.argsort(-similarity[nearest], kind="stable")]
        return pd.DataFrame(
            {"image_id": [self.image_ids[i] for i in nearest], "similarity": similarity[nearest].astype(float)}
        )


def write_features(
    path: Path, image_ids: pa.ChunkedArray | pa.Array, values: np.ndarray, bad: np.ndarray, metadata: dict[bytes, str]
) -> None:
    """Write one file of features; `values` is float [n,C], and `bad`, bool [n], is true for images without features.

    Raises:
        ConfigError: a value is too large for float16, or not a number.
    """
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    half[bad] = 0
    if not np.isfinite(half).all():
        raise ConfigError("--features: this model's features do not fit into float16; score without --features")
    column = pa.FixedSizeListArray.from_arrays(pa.array(half.reshape(-1)), half.shape[1], mask=pa.array(bad))
    table = pa.table({"image_id": image_ids, "features": column}).replace_schema_metadata(metadata)
    atomic.write_parquet(table, path, compression="zstd")


def read_part(path: Path, columns: Sequence[str] = ("image_id", "features")) -> pa.Table:
    """Read one file of features."""
    try:
        return pq.read_table(remote.read_file(path), columns=list(columns))
    except (OSError, pa.ArrowException, TypeError):
        raise OutputError(
            f"{path}: missing or damaged; remove it and the file of the same name in scores, and score again"
        ) from None


def to_matrix(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return a column of features as float16 [n,C], and which rows have none, bool [n]."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of an empty table
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    width = array.type.list_size
    flat = array.values.slice(array.offset * width, len(array) * width)  # noqa: PD011 -- not pandas
    matrix = flat.to_numpy(zero_copy_only=False).reshape(len(array), width)
    return matrix, array.is_null().to_numpy(zero_copy_only=False)


def load_features(scores: str | Path) -> Features:
    """Read the features of a finished folder of `score --features`.

    Memory: two bytes per value, 230 MB for 112,120 images of DenseNet121.

    Raises:
        InputError: the folder is not one of `score`, is not finished, or has no features.
    """
    folder = remote.to_path(scores)
    settings = run_folder.read_settings(folder)
    if settings.get("kind") != "score":
        raise ConfigError(contents.explain(scores, "a score folder", "make one with `ray-cxr score`"))
    if not run_folder.is_complete(folder):
        raise ConfigError(f"{scores}: not finished; run the same `ray-cxr score` command again to continue")
    if not settings.get("features"):
        raise ConfigError(f"{scores}: has no features; run `ray-cxr score ... --features` into another folder")
    parts = sorted((folder / FEATURES).glob("part-*.parquet"))
    ids: list[str] = []
    matrices = []
    for part in parts:
        table = read_part(part)
        values, bad = to_matrix(table["features"])
        ids += table["image_id"].filter(pa.array(~bad)).to_pylist()
        matrices.append(values[~bad])
    if not ids:
        raise ConfigError(f"{scores}: no image could be scored, so there are no features")
    return Features(ids, np.concatenate(matrices), str(settings["model_digest"]))
