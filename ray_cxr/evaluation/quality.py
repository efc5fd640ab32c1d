"""Quality flags: decide from pixels and model features whether an image resembles the training images.

A model keeps two descriptions of the training images (`Subspace`): one of thumbnails of 16 x 16, standardised to mean 0
and deviation 1 so that brightness and contrast do not count, and one of the features that the model's last layer reads.
Each description yields a distance d, about 2 for an ordinary image. Compared with the model's limits:

    inverted             d(negative) <= limit, and d(image) > 1.25 d(negative)
    lateral              d(image) > limit, and d(symmetrised image) <= limit: only the asymmetry is unusual, and it
                         is less than half of the variance
    not_frontal_chest    d(image) > limit, and neither inverted nor lateral
    out_of_distribution  d(features) > limit of the features

Limits come from held-out images and flag about one ordinary image in a hundred. Flagged images are scored too.
Detection rates and limits: docs/decisions/0010-quality-flags.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

#: Flags that `judge_images` returns.
JUDGED = ("inverted", "lateral", "not_frontal_chest", "out_of_distribution")
#: All quality flags, most severe first: known causes, then doubts about the display, then unusual images, then known
#: limits of the training data. `reoriented`, `display_fallback` and `burned_in_annotation` come from DICOM headers.
FLAGS = (
    *JUDGED[:3],
    "reoriented",
    "display_fallback",
    JUDGED[3],
    "age_outside_training",
    "burned_in_annotation",
)
#: Short names for readers. Flags from pixels are guesses; `lateral` is one unless the view is stated.
NAMES = {
    "inverted": "possibly inverted",
    "lateral": "possibly lateral",
    "not_frontal_chest": "possibly not a frontal chest",
    "out_of_distribution": "unlike the training images",
}
#: What flags mean, for readers; `lateral` without a stated view.
MEANINGS = {
    "inverted": "the pixels look like a negative",
    "lateral": "a guess from the pixels, because no view is stated: the image is unusually asymmetric, as a "
    "lateral view is, but also a frontal chest that is rotated or has a large opacity on one side",
    "not_frontal_chest": "the pixels look unlike the training images: not a frontal chest, or one with wide borders, "
    "cropped or turned; or the manifest or header states an oblique view or another body part",
    "reoriented": "the header says that the image is mirrored or turned; it was put upright",
    "display_fallback": "the header's gray values would hide the image, and were not used",
    "out_of_distribution": "the model's features are far from those of the training images",
    "age_outside_training": "younger or older than every training patient",
    "burned_in_annotation": "the header says that text is burned into the pixels",
}
#: What `lateral` means if the view is stated.
STATED_LATERAL = "the manifest or header states a lateral view"
#: Minimum numbers of images to describe, and to set limits from.
MIN_TRAINING, MIN_HELD_OUT = 60, 30
#: More training images take time and change little.
MAX_TRAINING = 2000

_FORMAT = 1  # raised when the definition of a distance changes, which invalidates stored limits
_SIDE = 16
_AXES = 16
_SHRINKAGE = 0.1
_NEARER = 1.25  # distances of ordinary images and their negatives differ by a factor of at least 1.4
# Squared, so twice the ordinary distance: features react to noise and clipped tones that do not disturb a reader.
_FEATURE_MARGIN = 4.0
_FLAT = 0.5  # deviation in grays below which a thumbnail shows nothing
_FOLDS = 5


@dataclass(frozen=True, eq=False)
class Subspace:
    """Description of training vectors: a mean, the directions of largest variance, and the variance outside them.

    d = mean_k(c_k^2 / variance_k) + |rest|^2 / residual, with c the coordinates of the scaled vector along the axes.
    """

    mean: np.ndarray  # float64 [D]
    scale: np.ndarray  # float64 [D] > 0, which divides a centred vector
    axes: np.ndarray  # float64 [D,K], orthonormal columns
    variances: np.ndarray  # float64 [K] > 0, of the training vectors along the axes
    residual: float  # mean squared length outside the axes, > 0

    def distances(self, vectors: np.ndarray) -> np.ndarray:
        """Return d, float64 [N], of vectors float64 [N,D]; each is bitwise independent of the others."""
        x = (vectors - self.mean) / self.scale
        # One product per row: the order of summation in a batched product depends on the batch.
        along = np.matmul(x[:, None, :], self.axes)[:, 0]
        rest = np.maximum((x**2).sum(axis=1) - (along**2).sum(axis=1), 0.0)
        return np.asarray((along**2 / self.variances).mean(axis=1) + rest / self.residual)


@dataclass(frozen=True, eq=False)
class QualityModel:
    """Descriptions of ordinary images, and limits of their distances.

    `expected_rates` has the share of held-out images with each flag of `JUDGED`. Each image is judged by limits that
    were set without it (five folds). Rates below 1 / held_out are indistinguishable from 0.
    """

    pixels: Subspace  # of standardised thumbnails and their mirror images, D = 256
    features: Subspace  # of the model's pooled features, D = C
    pixel_limit: float
    feature_limit: float
    expected_rates: Mapping[str, float]
    training: int  # number of images behind the descriptions
    held_out: int  # number of images behind the limits

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the form stored in a bundle, for `np.savez`."""
        result = {"format": np.array(_FORMAT, dtype=np.int64)}
        for name, space in (("pixels", self.pixels), ("features", self.features)):
            result |= {f"{name}_{part}": np.asarray(array, dtype=np.float64) for part, array in vars(space).items()}
        result["limits"] = np.array([self.pixel_limit, self.feature_limit], dtype=np.float64)
        result["expected_rates"] = np.array([self.expected_rates[name] for name in JUDGED], dtype=np.float64)
        result["counts"] = np.array([self.training, self.held_out], dtype=np.int64)
        return result

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> QualityModel:
        """Read the form that `arrays` returns; raise ValueError if an array is missing, unknown or invalid."""
        if "format" not in arrays:
            raise ValueError("quality model: no array 'format'")
        if not np.array_equal(arrays["format"], _FORMAT) or arrays["format"].dtype != np.int64:
            raise ValueError(f"quality model: format {arrays['format']}, this version reads {_FORMAT}; train again")
        # Means and variances set the two free lengths, of the features and of each set of axes.
        length = {name: array.shape[0] if array.ndim == 1 else 0 for name, array in arrays.items()}
        shapes: dict[str, tuple[int, ...]] = {"format": (), "limits": (2,), "counts": (2,), "expected_rates": (4,)}
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
            raise ValueError(f"quality model: expected_rates {rates.tolist()} must be shares whose sum is at most 1")
        return cls(
            _read_subspace(arrays, "pixels"),
            _read_subspace(arrays, "features"),
            pixel_limit=float(arrays["limits"][0]),
            feature_limit=float(arrays["limits"][1]),
            expected_rates=dict(zip(JUDGED, rates.tolist(), strict=True)),
            training=int(arrays["counts"][0]),
            held_out=int(arrays["counts"][1]),
        )


def find_most_severe(flags: Iterable[str | None]) -> str | None:
    """Return the first flag in the order of `FLAGS`, or None."""
    present = set(flags)
    return next((flag for flag in FLAGS if flag in present), None)


def name_flag(flag: str) -> str:
    """Return the short name of a flag for readers: `possibly lateral`, `reoriented`."""
    return NAMES.get(flag, flag.replace("_", " "))


def fit_quality_model(
    images: np.ndarray,
    features: np.ndarray,
    held_out_images: np.ndarray,
    held_out_features: np.ndarray,
    *,
    seed: int = 0,
) -> tuple[QualityModel | None, str | None]:
    """Describe training images, and set limits on held-out images of other patients.

    With fewer than `MIN_HELD_OUT` held-out images, a random third of the training images is held out too. Then patients
    can be on both sides, which makes the limits slightly too tight. Uniform images are omitted.

    Args:
        images: uint8 [N,S,S], input of the model.
        features: float32 [N,C], input of the model's last layer for these images.
        seed: selects the held-out third, `MAX_TRAINING` images, and the folds.

    Returns:
        (model, None), or (None, reason) if there are too few images or all features are equal.
    """
    train, held = _select_usable(images, features), _select_usable(held_out_images, held_out_features)
    if train[0].shape[1:] != held[0].shape[1:] or train[1].shape[1:] != held[1].shape[1:]:
        raise ValueError(f"held-out images {held[0].shape}, features {held[1].shape} differ from the training images'")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train[0]))
    if len(held[0]) < MIN_HELD_OUT:
        moved, order = np.split(order, [len(order) // 3])
        held = (np.concatenate([held[0], train[0][moved]]), np.concatenate([held[1], train[1][moved]]))
    order = np.sort(order[:MAX_TRAINING])
    train = (train[0][order], train[1][order])
    if len(train[0]) < MIN_TRAINING or len(held[0]) < MIN_HELD_OUT:
        return None, (
            f"{len(train[0])} images to learn from and {len(held[0])} to set limits by; "
            f"{MIN_TRAINING} and {MIN_HELD_OUT} are needed"
        )
    if np.ptp(train[1], axis=0).max(initial=0.0) == 0.0:
        return None, "all images have the same features"
    thumbnails = train[0].reshape(-1, _SIDE, _SIDE)
    # Mirror images count as ordinary, because mirrored exports are common and hearts on the right are not.
    pixels = _fit_subspace(np.concatenate([thumbnails, thumbnails[:, :, ::-1]]).reshape(-1, _SIDE * _SIDE))
    space = _fit_subspace(train[1])
    distances = _measure_distances(pixels, space, *held)
    flags: list[str | None] = []
    for fold in np.array_split(rng.permutation(len(distances)), _FOLDS):
        flags += _choose_flags(distances[fold], *_compute_limits(np.delete(distances, fold, axis=0)))
    model = QualityModel(
        pixels,
        space,
        *_compute_limits(distances),
        expected_rates={name: flags.count(name) / len(flags) for name in JUDGED},
        training=len(train[0]),
        held_out=len(distances),
    )
    return model, None


def judge_images(model: QualityModel, images: np.ndarray, features: np.ndarray) -> list[str | None]:
    """Return the most severe flag of each image, one of `JUDGED` or None, independent of the rest of the batch.

    Images are uint8 [N,S,S], S >= 16, features float32 [N,C]. An image with a feature that is not finite is out of
    distribution.
    """
    _check_inputs(images, features)
    if features.shape[1] != len(model.features.mean):
        raise ValueError(f"{features.shape[1]} features per image, the quality model has {len(model.features.mean)}")
    distances = _measure_distances(model.pixels, model.features, _make_thumbnails(images), features.astype(np.float64))
    return _choose_flags(distances, model.pixel_limit, model.feature_limit)


def _read_subspace(arrays: Mapping[str, np.ndarray], name: str) -> Subspace:
    mean, scale, axes, variances = (arrays[f"{name}_{part}"].copy() for part in ("mean", "scale", "axes", "variances"))
    return Subspace(mean, scale, axes, variances, float(arrays[f"{name}_residual"]))


def _check_inputs(images: np.ndarray, features: np.ndarray) -> None:
    if images.ndim != 3 or images.shape[1] != images.shape[2] or images.shape[1] < _SIDE or images.dtype != np.uint8:
        raise ValueError(f"images are {images.dtype} {images.shape}, expected uint8 [N,S,S] with S >= {_SIDE}")
    if features.ndim != 2 or len(features) != len(images) or features.dtype.kind != "f":
        raise ValueError(f"features are {features.dtype} {features.shape}, expected floats [{len(images)},C]")


def _select_usable(images: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return thumbnails float64 [n,256] and features float64 [n,C] of the images that are not uniform."""
    _check_inputs(images, features)
    if not np.isfinite(features).all():
        raise ValueError("features: some are not finite")
    thumbnails = _make_thumbnails(images)
    usable = ~np.isnan(thumbnails[:, 0])
    return thumbnails[usable], features[usable].astype(np.float64)


def _make_thumbnails(images: np.ndarray) -> np.ndarray:
    """Return standardised thumbnails float64 [N,256] of images uint8 [N,S,S]; NaN for uniform images.

    A pixel averages a block of S // 16 pixels per side. If 16 does not divide S, at most one row or column is skipped
    between two blocks.
    """
    n, side = images.shape[:2]
    block = side // _SIDE
    if block * _SIDE != side:
        starts = np.arange(_SIDE) * (side - block) // (_SIDE - 1)
        kept = (starts[:, None] + np.arange(block)).ravel()
        images = images[:, kept][:, :, kept]
    # Sums of integers are exact in any batch. uint16 holds sums of 257 rows, up to S = 4127.
    narrow = np.uint16 if block <= 257 else np.uint32
    rows = images.reshape(n, _SIDE, block, _SIDE * block).sum(axis=2, dtype=narrow)
    sums = rows.reshape(n, _SIDE, _SIDE, block).sum(axis=3, dtype=np.uint32)
    return _standardise(sums.reshape(n, _SIDE * _SIDE) / block**2, _FLAT)


def _standardise(x: np.ndarray, flat: float) -> np.ndarray:
    """Scale rows of x [N,D] to mean 0 and deviation 1; NaN if the deviation is below `flat`."""
    x = x - x.mean(axis=1, keepdims=True)
    deviation = np.sqrt((x**2).mean(axis=1, keepdims=True))
    return np.asarray(x / np.where(deviation < flat, np.nan, deviation))


def _fit_subspace(vectors: np.ndarray) -> Subspace:
    """Describe vectors float64 [n,D] that are not all equal."""
    n, d = vectors.shape
    mean, variance = vectors.mean(axis=0), vectors.var(axis=0)
    # A pixel or feature that rarely varies weighs more when it does, up to a limit.
    scale = np.sqrt(variance + _SHRINKAGE * variance.mean())
    x = (vectors - mean) / scale
    k = min(_AXES, d, n // 4)
    if d <= n:
        values, turned = np.linalg.eigh(x.T @ x / n)
        axes = turned[:, ::-1][:, :k]
    else:
        values, turned = np.linalg.eigh(x @ x.T / n)
        axes = np.linalg.qr(x.T @ turned[:, ::-1][:, :k])[0]
    total = float(values.sum())
    floor = 1e-6 * total  # some directions may have no variance: fewer varying features than axes
    variances = np.maximum(values[::-1][:k], floor)
    residual = max(total - float(values[::-1][:k].sum()), floor)
    return Subspace(mean, scale, np.ascontiguousarray(axes), variances, residual)


def _measure_distances(pixels: Subspace, space: Subspace, thumbnails: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return d of image, negative, symmetrised image and features, float64 [N,4]; infinite if undefined."""
    n = len(thumbnails)
    grids = thumbnails.reshape(n, _SIDE, _SIDE)
    # Undefined if more than half of the variance is asymmetry; a lateral chest has less.
    symmetric = _standardise(((grids + grids[:, :, ::-1]) / 2).reshape(n, _SIDE * _SIDE), np.sqrt(0.5))
    broken = ~np.isfinite(features).all(axis=1)
    of_features = space.distances(np.where(broken[:, None], 0.0, features))
    of_features[broken] = np.inf
    columns = [pixels.distances(vectors) for vectors in (thumbnails, -thumbnails, symmetric)]
    return np.nan_to_num(np.stack([*columns, of_features], axis=1), nan=np.inf, posinf=np.inf)


def _compute_limits(distances: np.ndarray) -> tuple[float, float]:
    """Return the largest ordinary distances of pixels and of features, from `_measure_distances` of held-out images."""
    return _compute_limit(distances[:, 0]), _FEATURE_MARGIN * _compute_limit(distances[:, 3])


def _compute_limit(distances: np.ndarray) -> float:
    """Return the median plus three deviations on the log scale, or the 99% quantile if that is larger.

    The deviation is the distance from median to 84% quantile, which a few unusual images do not affect. If the tail is
    heavier, the 99% quantile ensures that at most 1% are flagged.
    """
    middle, upper, high = np.quantile(distances, [0.5, 0.84, 0.99])
    return float(max(middle * (upper / middle) ** 3, high))


def _choose_flags(distances: np.ndarray, pixel_limit: float, feature_limit: float) -> list[str | None]:
    own, negative, symmetric, of_features = distances.T
    far = own > pixel_limit
    rules = (
        (negative <= pixel_limit) & (own > _NEARER * negative),
        far & (symmetric <= pixel_limit),
        far,
        of_features > feature_limit,
    )
    first = np.select(rules, range(len(JUDGED)), len(JUDGED))
    return [(*JUDGED, None)[i] for i in first]
