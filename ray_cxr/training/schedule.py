"""Learning rate and early stopping as pure functions of epoch, step and scores, so that checkpoints need no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray_cxr.config import TrainSettings


def compute_learning_rate(
    settings: TrainSettings, steps_per_epoch: int, epoch: int, step: int, scores: Sequence[float]
) -> float:
    """Return the learning rate of a step; `scores` are the selection scores of the epochs before `epoch`.

    Epochs and steps count from 0.
    """
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
    """Return the number of falls of the rate: one after every `plateau_patience` epochs without a better score."""
    best, stale, count = -math.inf, 0, 0
    for score in scores[settings.frozen_epochs :]:
        if score > best:
            best, stale = score, 0
            continue
        stale += 1
        if stale == settings.plateau_patience:
            stale, count = 0, count + 1
    return count


def has_ended(settings: TrainSettings, scores: Sequence[float], *, stopped: bool) -> bool:
    """Return whether a run with these scores is finished: after `epochs`, if `stopped`, or when `patience` is over.

    Patience is over `patience` epochs after the best epoch, the first of equal ones. Frozen epochs do not count.
    """
    if stopped or len(scores) >= settings.epochs:
        return True
    if settings.patience is None or not scores:
        return False
    best = scores.index(max(scores)) + 1
    return len(scores) - max(best, min(settings.frozen_epochs, len(scores))) >= settings.patience
