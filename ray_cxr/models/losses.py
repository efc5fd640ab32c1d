"""Losses for a model with one sigmoid output per finding, computed from logits in float32.

Each loss mixes two terms, the cost of an entry if the finding is present and the cost if it is absent:

    y * positive * T+(z)  +  (1 - y) * negative * T-(z)

with p = sigmoid(z) and

    bce, weighted_bce   T+ = -log p                    T- = -log(1 - p)
    focal               T+ = (1 - p)^g * -log p        T- = p^g * -log(1 - p)
    asymmetric          T+ = (1 - p)^g+ * -log p       T- = q^g- * -log(1 - q),   q = max(p - margin, 0)

focal follows Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, without its alpha. asymmetric follows
Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021; as there, the gradient includes the focusing
factor. The weights `positive` and `negative` are 1 except for `weighted_bce`; see `compute_finding_weights`.

Label smoothing replaces y by e or 1 - e. The soft label mixes the two terms, each with its own weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ray_cxr.config import TrainSettings
from ray_cxr.models.keras_setup import tf

#: The function that `make_loss` returns.
Loss = Callable[[Any, Any, Any, Any], Any]


#: Maximum factor of a finding's weights with `balance = "findings"`. The rarest finding of NIH's official split, Hernia
#: with 0.16 %, needs 25. Without a limit, the only positive among 80,000 images would outweigh the rest of its batch of
#: 32 images 90-fold.
MAX_FACTOR = 32.0


def compute_finding_weights(values: np.ndarray, loss: str, balance: str = "none") -> tuple[np.ndarray, np.ndarray]:
    """Compute the weight of a positive and of a negative, float32 [F] each, from training labels int8 [N,F], -1 null.

    `weighted_bce` weights a positive by the finding's share of negatives and a negative by its share of positives, so
    that positives and negatives have the same total weight. With `balance = "findings"` these weights are multiplied by
    one factor per finding, so that all findings have the same total weight. All other losses use 1.
    """
    if loss != "weighted_bce":
        ones = np.ones(values.shape[1], dtype=np.float32)
        return ones, ones.copy()
    known = (values >= 0).sum(axis=0)
    prevalence = (values == 1).sum(axis=0) / np.maximum(known, 1)
    factors = np.ones(values.shape[1])
    if balance == "findings":
        factors = _balance_totals(2.0 * known * prevalence * (1.0 - prevalence))
    return (factors * (1.0 - prevalence)).astype(np.float32), (factors * prevalence).astype(np.float32)


def _balance_totals(totals: np.ndarray) -> np.ndarray:
    """Return factors up to MAX_FACTOR that make the total weights [F] of findings equal and keep their sum.

    A total of 0, of a finding without positives or negatives, keeps the factor 1. A finding that would need more than
    MAX_FACTOR keeps less weight than the others, which share the rest.
    """
    factors = np.ones(len(totals))
    rest = totals > 0
    while rest.any():
        target = (totals.sum() - MAX_FACTOR * totals[~rest].sum()) / rest.sum()
        factors = np.where(rest, target / np.where(rest, totals, 1.0), np.where(totals > 0, MAX_FACTOR, 1.0))
        if not (rest & (factors > MAX_FACTOR)).any():
            break
        rest &= factors <= MAX_FACTOR
    return factors


def make_loss(settings: TrainSettings, positive: np.ndarray, negative: np.ndarray) -> Loss:
    """Return the configured loss: the sum over this worker's entries, divided by the global number of entries.

    The sum over the workers is the loss of the global batch; the same holds for gradients. The loss consists of plain
    TensorFlow operations without variables, so it runs eagerly, in a graph, under XLA and in any replica. Value and
    gradient are finite for logits between -1e4 and 1e4.

    Returns:
        `loss(labels, logits, weight, denominator)`, a float32 scalar, where
        labels, logits: floats [B,F]; ignored, even if NaN, where weight is 0;
        weight: floats [B,F], 0 for nulls and padding, which then affect neither value nor gradient;
        denominator: the number of labelled entries in the global batch, above 0.
    """
    gamma_positive = gamma_negative = margin = 0.0
    if settings.loss == "focal":
        gamma_positive = gamma_negative = settings.focal_gamma
    elif settings.loss == "asymmetric":
        gamma_positive, gamma_negative = settings.asymmetric_gamma_positive, settings.asymmetric_gamma_negative
        margin = settings.asymmetric_margin
    smoothing = settings.label_smoothing
    positive, negative = np.asarray(positive, np.float32), np.asarray(negative, np.float32)

    def loss(labels: Any, logits: Any, weight: Any, denominator: Any) -> Any:
        weight = tf.cast(weight, tf.float32)
        counts = weight > 0.0
        # Masked first: after the computation, NaN * 0 would still be NaN, in the value or in the gradient.
        y = tf.where(counts, tf.cast(labels, tf.float32), 0.0)
        z = tf.where(counts, tf.cast(logits, tf.float32), 0.0)
        if smoothing:
            y = y * (1.0 - smoothing) + (1.0 - y) * smoothing
        # T+ is T- without a margin at -z, because 1 - sigmoid(z) = sigmoid(-z).
        present, absent = _negative_term(-z, gamma_positive, 0.0), _negative_term(z, gamma_negative, margin)
        losses = y * positive * present + (1.0 - y) * negative * absent
        return tf.reduce_sum(losses * weight) / tf.cast(denominator, tf.float32)

    return loss


def _negative_term(z: Any, gamma: float, margin: float) -> Any:
    """Compute T- at logits z: q^gamma * -log(1 - q) with p = sigmoid(z) and q = max(p - margin, 0).

    log p and log(1 - p) come from softplus, which is exact and has a bounded gradient even where p rounds to 0 or 1.
    Powers are computed as exponentials of logarithms: for gamma below 1 the derivative of x^gamma is infinite at 0, and
    infinity times zero is NaN.
    """
    log_p, cross_entropy = -tf.math.softplus(-z), tf.math.softplus(z)
    if not margin:
        return cross_entropy * tf.exp(gamma * log_p) if gamma else cross_entropy
    q = tf.maximum(tf.exp(log_p) - margin, 0.0)
    # 1 - q is (1 - p) + margin. Near q = 0 its logarithm is exact only if computed from q, near q = 1 only if computed
    # from logarithms. The minimum keeps the unused form finite, since its gradient is multiplied by 0.
    log_margin = math.log(margin)
    small = -tf.math.log1p(-tf.minimum(q, 0.5))
    large = -(log_margin + tf.math.softplus(-cross_entropy - log_margin))
    shifted = tf.where(q < 0.5, small, large)
    # At q = 0 the cross-entropy is 0, so any finite power gives 0; 1e-30 is far below any q that matters.
    return shifted * tf.exp(gamma * tf.math.log(tf.maximum(q, 1e-30))) if gamma else shifted
