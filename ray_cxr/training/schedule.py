"""Learning rate and early stopping as pure functions of epoch, step and scores, so that checkpoints need no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray_cxr.config import TrainSettings


def compute_learning_rate(
    settings: TrainSettings, steps_per_epoch: int, epoch: int, step: int, scores: Sequence[float]
) -> float:
    """Return the learning rate of one step, after earlier epochs with these selection scores; both count from 0."""
    if epoch < settings.frozen_epochs:
        return settings.frozen_learning_rate or settings.learning_rate
    position = (epoch - settings.frozen_epochs) * steps_per_epoch + step
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if position < warmup:
        return settings.learning_rate * (position + 1) / warmup
    if settings.schedule == "cosine":
        total = max(1, (settings.epochs - settings.frozen_epochs) * steps_per_epoch - warmup)
        return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (position - warmup) / total)))
    if settings.schedule == "plateau":
        return settings.learning_rate * settings.plateau_factor ** count_falls(settings, scores)
    return settings.learning_rate


def count_falls(settings: TrainSettings, scores: Sequence[float]) -> int:
    """Return how often the plateau rule fired: after `plateau_patience` epochs without a better score."""
    best, stale, count = -math.inf, 0, 0
    for score in scores[settings.frozen_epochs :]:
        if score > best:
            best, stale = score, 0
            continue
        stale += 1
        if stale == settings.plateau_patience:
            stale, count = 0, count + 1
    return count


def find_best_epoch(scores: Sequence[float]) -> int | None:
    """Return the epoch, from 1, with the highest score; the first of equal ones."""
    return None if not scores else max(range(len(scores)), key=lambda i: (scores[i], -i)) + 1


def is_out_of_patience(settings: TrainSettings, scores: Sequence[float]) -> bool:
    """Return whether `patience` epochs have passed since the best one; frozen epochs do not count."""
    best = find_best_epoch(scores)
    if settings.patience is None or best is None:
        return False
    return len(scores) - max(best, min(settings.frozen_epochs, len(scores))) >= settings.patience
