"""Is this picture one the model can be asked about? A flag per image, from its pixels and the network's features.

Two descriptions of the training images are kept, both of the same kind (`Subspace`): one of thumbnails of
16 x 16 with mean 0 and deviation 1, so that brightness and contrast do not count, and one of the features that the
network's last layer reads. Each gives a distance d, about 2 for an ordinary image. With the limits of the model:

    inverted             d(negative) <= limit, and d(image) > 1.25 d(negative)
    lateral              d(image) > limit, and d(image made symmetric) <= limit: only its asymmetry is unlike, and
                         that is the lesser part of it
    not_frontal_chest    d(image) > limit, and neither of these
    out_of_distribution  d(features) > limit of the features

Limits come from images that the descriptions were not made from, and are set so that about one ordinary image in
a hundred passes them. An image is scored whatever its flag. What this finds and what it does not:
docs/decisions/0010-quality-flags.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

#: Every quality flag, gravest first: a cause that can be named, then what is only unlike, then what is well known.
FLAGS = ("inverted", "lateral", "not_frontal_chest", "out_of_distribution", "age_outside_training")
#: Those of them that `judge` gives.
JUDGED = FLAGS[:4]
#: The least numbers of images to describe, and to set limits from.
MIN_TRAINING, MIN_HELD_OUT = 60, 30
#: More training images than these add nothing but time.
MAX_TRAINING = 2000

_FORMAT = 1  # raised when a distance is measured otherwise, so that older limits are not taken for its
_SIDE = 16
_AXES = 16
_SHRINKAGE = 0.1
_NEARER = 1.25  # ordinary images and their negatives lie a factor of 1.4 and more apart
# Of squares: twice as far as is ordinary. Features answer to noise and clipped tones that do a reader no harm.
_FEATURE_MARGIN = 4.0
_FLAT = 0.5  # deviation in grays below which a thumbnail shows nothing
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Subspace:
    """Where training vectors lie: a mean, the directions in which they vary most, and how far they stray from those.

    d = mean_k(c_k^2 / variance_k) + |rest|^2 / residual, with c the coordinates of the scaled vector along the axes.

    Attributes:
        mean, scale: float64 [D]; a vector is centred and divided first. scale > 0.
        axes: float64 [D,K], orthonormal columns.
        variances: float64 [K] > 0, of the training vectors along the axes.
        residual: mean squared length of what the axes leave, > 0.
    """

    mean: np.ndarray
    scale: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    residual: float

    def distances(self, vectors: np.ndarray) -> np.ndarray:
        """d of vectors float64 [N,D], as float64 [N]; each to the bit the same whatever the others are."""
        x = (vectors - self.mean) / self.scale
        # One product a row: a product of the whole batch adds in an order that depends on the batch.
        along = np.matmul(x[:, None, :], self.axes)[:, 0]
        rest = np.maximum((x**2).sum(axis=1) - (along**2).sum(axis=1), 0.0)
        return np.asarray((along**2 / self.variances).mean(axis=1) + rest / self.residual)


@dataclass(frozen=True, eq=False)
class QualityModel:
    """What ordinary images look like, and how far is too far.

    Attributes:
        pixels: of standardised thumbnails and their mirror images, D = 256.
        features: of the network's pooled features, D = C.
        pixel_limit, feature_limit: greatest ordinary distances, > 0.
        expected_rates: per flag of `JUDGED` the share of held-out images that had it, each judged by limits set
            without it (five folds); with `held_out` images, rates below 1 / held_out cannot be told from 0.
        training, held_out: numbers of images behind the descriptions and behind the limits.
    """

    pixels: Subspace
    features: Subspace
    pixel_limit: float
    feature_limit: float
    expected_rates: Mapping[str, float]
    training: int
    held_out: int

    def arrays(self) -> dict[str, np.ndarray]:
        """The form in which a bundle keeps it, for `np.savez`; the inverse is `from_arrays`."""
        result = {"format": np.array(_FORMAT, dtype=np.int64)}
        for name, space in (("pixels", self.pixels), ("features", self.features)):
            result[f"{name}_mean"], result[f"{name}_scale"] = space.mean, space.scale
            result[f"{name}_axes"], result[f"{name}_variances"] = space.axes, space.variances
            result[f"{name}_residual"] = np.array(space.residual, dtype=np.float64)
        result["limits"] = np.array([self.pixel_limit, self.feature_limit], dtype=np.float64)
        result["expected_rates"] = np.array([self.expected_rates[name] for name in JUDGED], dtype=np.float64)
        result["counts"] = np.array([self.training, self.held_out], dtype=np.int64)
        return result

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> QualityModel:
        """The model that `arrays` describes.

        Raises:
            ValueError: an array is missing, unknown, of another shape or dtype, not finite or out of its range.
        """
        if "format" not in arrays:
            raise ValueError("quality model: no array 'format'")
        if arrays["format"].shape != () or arrays["format"].dtype != np.int64 or arrays["format"] != _FORMAT:
            raise ValueError(f"quality model: format {arrays['format']}, this version reads {_FORMAT}; train again")
        # The two free lengths, of the features and of each set of axes, are taken from the means and variances.
        length = {name: array.shape[0] if array.ndim == 1 else 0 for name, array in arrays.items()}
        shapes: dict[str, tuple[int, ...]] = {"format": (), "limits": (2,), "expected_rates": (len(JUDGED),)}
        shapes["counts"] = (2,)
        for name, d in (("pixels", _SIDE * _SIDE), ("features", length.get("features_mean", 0))):
            k = length.get(f"{name}_variances", 0)
            shapes |= {f"{name}_mean": (d,), f"{name}_scale": (d,), f"{name}_axes": (d, k)}
            shapes |= {f"{name}_variances": (k,), f"{name}_residual": ()}
        if set(arrays) != set(shapes):
            raise ValueError(f"quality model: missing or unknown arrays {sorted(set(arrays) ^ set(shapes))}")
        for name, shape in shapes.items():
            array, dtype = arrays[name], np.int64 if name in ("format", "counts") else np.float64
            if array.shape != shape or array.dtype != dtype or not array.size:
                raise ValueError(
                    f"quality model: {name} is {array.dtype} {array.shape}, expected {dtype.__name__} {shape}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"quality model: {name} holds a value that is not finite")
            if name.endswith(("scale", "variances", "residual", "limits", "counts")) and not (array > 0).all():
                raise ValueError(f"quality model: {name} holds a value that is not positive")
        rates = arrays["expected_rates"]
        if (rates < 0).any() or rates.sum() > 1 + 1e-9:
            raise ValueError(f"quality model: expected_rates {rates.tolist()} are no shares of one whole")
        return cls(
            _subspace(arrays, "pixels"),
            _subspace(arrays, "features"),
            pixel_limit=float(arrays["limits"][0]),
            feature_limit=float(arrays["limits"][1]),
            expected_rates=dict(zip(JUDGED, rates.tolist(), strict=True)),
            training=int(arrays["counts"][0]),
            held_out=int(arrays["counts"][1]),
        )


def gravest(flags: Iterable[str | None]) -> str | None:
    """The gravest of some flags, None where there is none; the order is that of `FLAGS`.

    Raises:
        ValueError: an unknown flag.
    """
    present = {flag for flag in flags if flag is not None}
    if not present <= set(FLAGS):
        raise ValueError(f"no quality flag: {', '.join(sorted(present - set(FLAGS)))}")
    return next((flag for flag in FLAGS if flag in present), None)


def fit(
    images: np.ndarray,
    features: np.ndarray,
    held_out_images: np.ndarray,
    held_out_features: np.ndarray,
    *,
    seed: int = 0,
) -> QualityModel | None:
    """Describe training images, and set limits by images held out.

    With fewer than `MIN_HELD_OUT` images held out, a third of the training images is drawn and held out too; a
    patient who is then on both sides makes the limits a little tighter than they should be.

    Args:
        images: uint8 [N,S,S], as the network is given them. Pictures of one tone are left out.
        features: float32 [N,C], what the network's last layer reads for these images.
        held_out_images: uint8 [M,S,S] of other patients; M may be 0.
        held_out_features: float32 [M,C].
        seed: of what is drawn: the held-out third, `MAX_TRAINING` images of more, and the folds.

    Returns:
        None where there is too little to learn from; `lacking` says why.

    Raises:
        ValueError: shapes or dtypes differ from the above, or a feature is not finite.
    """
    train, held = _usable(images, features), _usable(held_out_images, held_out_features)
    if train[0].shape[1:] != held[0].shape[1:] or train[1].shape[1:] != held[1].shape[1:]:
        raise ValueError(f"held-out images {held[0].shape}, features {held[1].shape} differ from the training images'")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train[0]))
    if len(held[0]) < MIN_HELD_OUT:
        moved, order = np.split(order, [len(order) // 3])
        held = (np.concatenate([held[0], train[0][moved]]), np.concatenate([held[1], train[1][moved]]))
    order = np.sort(order[:MAX_TRAINING])
    train = (train[0][order], train[1][order])
    if _lacking(len(train[0]), len(held[0]), train[1]) is not None:
        return None
    thumbnails = train[0].reshape(-1, _SIDE, _SIDE)
    # A heart on the right is rare, a picture turned round is not: mirror images are ordinary.
    pixels = _describe(np.concatenate([thumbnails, thumbnails[:, :, ::-1]]).reshape(-1, _SIDE * _SIDE))
    space = _describe(train[1])
    distances = _distances(pixels, space, *held)
    found: list[str | None] = []
    for fold in np.array_split(rng.permutation(len(distances)), _FOLDS):
        found += _flags(distances[fold], *_limits(np.delete(distances, fold, axis=0)))
    return QualityModel(
        pixels,
        space,
        *_limits(distances),
        expected_rates={name: found.count(name) / len(found) for name in JUDGED},
        training=len(train[0]),
        held_out=len(distances),
    )


def lacking(
    images: np.ndarray, features: np.ndarray, held_out_images: np.ndarray, held_out_features: np.ndarray
) -> str | None:
    """Why `fit` would give no model from these, in words; None if it would give one."""
    train, held = _usable(images, features), len(_usable(held_out_images, held_out_features)[0])
    n = len(train[0])
    moved = n // 3 if held < MIN_HELD_OUT else 0
    return _lacking(n - moved, held + moved, train[1])


def judge(model: QualityModel, images: np.ndarray, features: np.ndarray) -> list[str | None]:
    """The gravest flag of each image, one of `JUDGED`, or None; it does not depend on the rest of the batch.

    Args:
        model: from `fit`.
        images: uint8 [N,S,S], S >= 16, as the network is given them.
        features: float32 [N,C], of the same images. One that is not finite makes its image out of distribution.

    Raises:
        ValueError: shapes or dtypes differ from the above, or C is not the model's.
    """
    _check(images, features)
    if features.shape[1] != len(model.features.mean):
        raise ValueError(f"{features.shape[1]} features an image, the quality model has {len(model.features.mean)}")
    distances = _distances(model.pixels, model.features, _thumbnails(images), features.astype(np.float64))
    return _flags(distances, model.pixel_limit, model.feature_limit)


def _subspace(arrays: Mapping[str, np.ndarray], name: str) -> Subspace:
    mean, scale, axes, variances = (arrays[f"{name}_{part}"].copy() for part in ("mean", "scale", "axes", "variances"))
    return Subspace(mean, scale, axes, variances, float(arrays[f"{name}_residual"]))


def _check(images: np.ndarray, features: np.ndarray) -> None:
    if images.ndim != 3 or images.shape[1] != images.shape[2] or images.shape[1] < _SIDE or images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 [N,S,S] with S >= {_SIDE}")
    if features.ndim != 2 or len(features) != len(images) or features.dtype.kind != "f":
        raise ValueError(f"features are {features.dtype} {features.shape}, expected floats [{len(images)},C]")


def _usable(images: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thumbnails float64 [n,256] and features float64 [n,C] of the images that show anything."""
    _check(images, features)
    if not np.isfinite(features).all():
        raise ValueError("features: some are not finite")
    thumbnails = _thumbnails(images)
    shows = ~np.isnan(thumbnails[:, 0])
    return thumbnails[shows], features[shows].astype(np.float64)


def _lacking(training: int, held_out: int, features: np.ndarray) -> str | None:
    if training < MIN_TRAINING or held_out < MIN_HELD_OUT:
        return (
            f"{training} images to learn from and {held_out} to set limits by; "
            f"{MIN_TRAINING} and {MIN_HELD_OUT} are needed"
        )
    if np.ptp(features, axis=0).max(initial=0.0) == 0.0:
        return "the network gives every image the same features"
    return None


def _thumbnails(images: np.ndarray) -> np.ndarray:
    """Images uint8 [N,S,S] as standardised thumbnails float64 [N,256]; NaN where nothing is shown.

    A pixel of a thumbnail is the sum over a block of S // 16 pixels a side. Where 16 does not divide S, at most one
    row is left out between two blocks.
    """
    n, side = images.shape[:2]
    block = side // _SIDE
    if block * _SIDE != side:
        starts = np.arange(_SIDE) * (side - block) // (_SIDE - 1)
        kept = (starts[:, None] + np.arange(block)).ravel()
        images = images[:, kept][:, :, kept]
    # Sums of integers are exact: no batch can differ. uint16 holds 257 rows, which is S = 4127.
    narrow = np.uint16 if block <= 257 else np.uint32
    rows = images.reshape(n, _SIDE, block, _SIDE * block).sum(axis=2, dtype=narrow)
    sums = rows.reshape(n, _SIDE, _SIDE, block).sum(axis=3, dtype=np.uint32)
    return _standardised(sums.reshape(n, _SIDE * _SIDE) / block**2, _FLAT)


def _standardised(x: np.ndarray, flat: float) -> np.ndarray:
    """Rows of x [N,D] with mean 0 and deviation 1; NaN where the deviation is below `flat`."""
    x = x - x.mean(axis=1, keepdims=True)
    deviation = np.sqrt((x**2).mean(axis=1, keepdims=True))
    return np.asarray(x / np.where(deviation < flat, np.nan, deviation))


def _describe(vectors: np.ndarray) -> Subspace:
    """The subspace of vectors float64 [n,D] that are not all alike."""
    n, d = vectors.shape
    mean, variance = vectors.mean(axis=0), vectors.var(axis=0)
    # A pixel or feature that hardly ever moves counts for more than others when it does, but not without bound.
    scale = np.sqrt(variance + _SHRINKAGE * variance.mean())
    x = (vectors - mean) / scale
    k = min(_AXES, d, n // 4)
    # Eigenvectors from the smaller of the two products.
    if d <= n:
        values, turned = np.linalg.eigh(x.T @ x / n)
        axes = turned[:, ::-1][:, :k]
    else:
        values, turned = np.linalg.eigh(x @ x.T / n)
        axes = np.linalg.qr(x.T @ turned[:, ::-1][:, :k])[0]
    total = float(values.sum())
    floor = 1e-6 * total  # directions without any variance: fewer features alive than axes
    variances = np.maximum(values[::-1][:k], floor)
    residual = max(total - float(values[::-1][:k].sum()), floor)
    return Subspace(mean, scale, np.ascontiguousarray(axes), variances, residual)


def _distances(pixels: Subspace, space: Subspace, thumbnails: np.ndarray, features: np.ndarray) -> np.ndarray:
    """float64 [N,4]: of the image, its negative, the image made symmetric, its features; infinite where undefined."""
    n = len(thumbnails)
    pictures = thumbnails.reshape(n, _SIDE, _SIDE)
    # Undefined where more than half of the picture's variance is asymmetry: a chest from the side has less.
    symmetric = _standardised(((pictures + pictures[:, :, ::-1]) / 2).reshape(n, _SIDE * _SIDE), np.sqrt(0.5))
    broken = ~np.isfinite(features).all(axis=1)
    of_features = space.distances(np.where(broken[:, None], 0.0, features))
    of_features[broken] = np.inf
    columns = [pixels.distances(one) for one in (thumbnails, -thumbnails, symmetric)]
    return np.nan_to_num(np.stack([*columns, of_features], axis=1), nan=np.inf, posinf=np.inf)


def _limits(distances: np.ndarray) -> tuple[float, float]:
    """The greatest ordinary distances, of pixels and of features, from `_distances` of held-out images."""
    return _limit(distances[:, 0]), _FEATURE_MARGIN * _limit(distances[:, 3])


def _limit(distances: np.ndarray) -> float:
    """Three deviations above the median of the logarithms, and no less than the 99 % quantile.

    The deviation is taken between the median and the 84 % quantile: the few odd images that archives hold do not
    stretch it. The quantile is the promise that no more than 1 % are flagged, should the tail be heavier.
    """
    middle, upper, high = np.quantile(distances, [0.5, 0.84, 0.99])
    return float(max(middle * (upper / middle) ** 3, high))


def _flags(distances: np.ndarray, pixel_limit: float, feature_limit: float) -> list[str | None]:
    own, negative, symmetric, of_features = distances.T
    far = own > pixel_limit
    rules = (
        (negative <= pixel_limit) & (own > _NEARER * negative),
        far & (symmetric <= pixel_limit),
        far,
        of_features > feature_limit,
    )
    return [
        next((name for name, holds in zip(JUDGED, row, strict=True) if holds), None)
        for row in zip(*(rule.tolist() for rule in rules), strict=True)
    ]
