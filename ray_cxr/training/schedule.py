"""The learning rate, the stages of transfer learning and early stopping: pure functions of where a run stands.

Nothing here keeps a state that a checkpoint could miss: a continued run asks the same questions and gets the same
answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ray_cxr.config import TrainSettings


def compute_learning_rate(
    settings: TrainSettings, steps_per_epoch: int, epoch: int, step: int, scores: Sequence[float]
) -> float:
    """The learning rate of one step.

    Args:
        epoch, step: both from 0.
        scores: the selection score of every epoch before this one, the higher the better.
    """
    if epoch < settings.frozen_epochs:
        return settings.frozen_learning_rate or settings.learning_rate
    at = (epoch - settings.frozen_epochs) * steps_per_epoch + step
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    if at < warmup:
        return settings.learning_rate * (at + 1) / warmup
    if settings.schedule == "cosine":
        total = max(1, (settings.epochs - settings.frozen_epochs) * steps_per_epoch - warmup)
        return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, (at - warmup) / total)))
    if settings.schedule == "plateau":
        return settings.learning_rate * settings.plateau_factor ** count_falls(settings, scores)
    return settings.learning_rate


def count_falls(settings: TrainSettings, scores: Sequence[float]) -> int:
    """How often the plateau rule has lowered the rate: after each `plateau_patience` epochs without a better score."""
    best, waited, count = -math.inf, 0, 0
    for score in scores[settings.frozen_epochs :]:
        if score > best:
            best, waited = score, 0
            continue
        waited += 1
        if waited == settings.plateau_patience:
            waited, count = 0, count + 1
    return count


def find_best_epoch(scores: Sequence[float]) -> int | None:
    """The epoch, from 1, of the highest score; of equals the first."""
    return None if not scores else max(range(len(scores)), key=lambda i: (scores[i], -i)) + 1


def is_out_of_patience(settings: TrainSettings, scores: Sequence[float]) -> bool:
    """Whether `patience` epochs have passed since the best one; frozen epochs do not count as waiting."""
    best = find_best_epoch(scores)
    if settings.patience is None or best is None:
        return False
    return len(scores) - max(best, min(settings.frozen_epochs, len(scores))) >= settings.patience
