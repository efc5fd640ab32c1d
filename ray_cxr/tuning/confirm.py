"""Confirming trainings: pairs of runs that train the two best backbones of a search with equal settings and new seeds.

STUDY/confirm/DenseNet121-ResNet50/plan.json   the ranked trials whose settings the pairs have, and the number of pairs
STUDY/confirm/DenseNet121-ResNet50/0003/       a RUN of `train` without a bundle, of the backbone of the odd number

The plan is fixed when the first pair starts, so later trials do not change it. Two other backbones get another folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pandas as pd

from ray_cxr.config import TrainSettings
from ray_cxr.evaluation.confirmation import MAX_PAIRS, Confirmation, ConfirmedPair
from ray_cxr.storage import atomic, remote
from ray_cxr.storage.run_folder import read_json
from ray_cxr.training.monitor import read_metrics
from ray_cxr.training.uploads import FAILURE
from ray_cxr.tuning.plan import StudyPlan
from ray_cxr.tuning.space import Space

CONFIRM, _PLAN = "confirm", "plan.json"
Values = Mapping[str, Any]


class Source(NamedTuple):
    """A trial whose settings a pair may have."""

    number: int
    values: Values  # by field


@dataclass(frozen=True)
class ConfirmRun:
    """One training of a pair."""

    number: int
    trial: int  # whose settings it has
    folder: Path
    settings: TrainSettings

    @property
    def state(self) -> tuple[bool, float | None, str | None]:
        """Whether it has ended, the AUROC of its best epoch, and why there is none."""
        if failure := read_json(self.folder / FAILURE):
            return True, None, f"{self.settings.backbone}: {failure.get('message')}"
        curve = [epoch["val_auroc"] for epoch in read_metrics(self.folder)]
        if len(curve) < self.settings.epochs:
            return False, None, f"{self.settings.backbone}: not finished"
        best = max((value for value in curve if value is not None), default=None)
        return True, best, None if best is not None else f"{self.settings.backbone}: no validation AUROC"


def build_pairs(
    space: Space, backbones: tuple[str, str], ranked: Sequence[Sequence[Source]], count: int
) -> list[tuple[int, tuple[dict[str, Any], dict[str, Any]]]]:
    """Return for each pair the number of the trial whose settings it has, and the values for each backbone.

    The trials come from both backbones alternately, the best first. A backbone with too few trials repeats them. A
    value that the space does not allow with the other backbone comes from that backbone's own trial of the same rank.

    Args:
        ranked: the trials of each backbone, the best first.
    """
    pairs = []
    for index in range(count):
        own = [trials[index // 2 % len(trials)] for trials in ranked]
        source = own[index % 2]
        values = [
            _adapt_values(space, backbone, source.values, trial.values)
            for backbone, trial in zip(backbones, own, strict=True)
        ]
        pairs.append((source.number, (values[0], values[1])))
    return pairs


def _adapt_values(space: Space, backbone: str, source: Values, own: Values) -> dict[str, Any]:
    """Return the values of `source` for another backbone; what that backbone does not allow comes from `own`."""
    values: dict[str, Any] = {}
    for parameter in space.parameters:
        field = parameter.field
        if field == "backbone":
            values[field] = backbone
        elif parameter.applies(values):
            values[field] = source[field] if field in source and source[field] in parameter else own[field]
    return values


def plan_runs(plan: StudyPlan, study: optuna.Study, rows: pd.DataFrame, count: int) -> list[ConfirmRun]:
    """Return the trainings of the two best backbones, two per pair; empty if fewer than two have an AUROC.

    Writes plan.json if `count` exceeds the number of earlier pairs, which are always returned.
    """
    usable = rows[(rows["state"] != "failed") & rows["val_auroc"].notna()]
    usable = usable.sort_values(["val_auroc", "number"], ascending=[False, True])
    best = usable.drop_duplicates("backbone").sort_values(["val_auroc", "backbone"], ascending=[False, True])
    if len(best) < 2:
        return []
    first, second = sorted(best["backbone"].iloc[:2])
    folder = plan.out / CONFIRM / f"{first}-{second}"
    record = read_json(folder / _PLAN)
    if count > record.get("pairs", 0):
        ranked = [
            usable.loc[usable["backbone"] == name, "number"].tolist()[: MAX_PAIRS // 2] for name in (first, second)
        ]
        record = {"trials": ranked, **record, "pairs": count}
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(folder / _PLAN, record)
    if not record:
        return []
    trials = study.get_trials(deepcopy=False)
    sources = [
        [Source(number, plan.space.values(trials[number].params)) for number in numbers] for numbers in record["trials"]
    ]
    runs: list[ConfirmRun] = []
    for index, (trial, pair) in enumerate(build_pairs(plan.space, (first, second), sources, record["pairs"])):
        seed = (plan.base.seed + 1 + index) % 2**31  # all trials have the seed of `base`
        for values in pair:
            settings = plan.complete(values).replace(seed=seed, patience=None)
            runs.append(ConfirmRun(len(runs), trial, folder / f"{len(runs):04d}", settings))
    return runs


def read_confirmation(runs: Sequence[ConfirmRun]) -> Confirmation | None:
    """Return the results of the trainings; None without any."""
    if not runs:
        return None
    pairs = []
    for a, b in list(pairwise(runs))[::2]:
        (a_ended, a_auroc, a_reason), (b_ended, b_auroc, b_reason) = a.state, b.state
        reason = "; ".join(filter(None, (a_reason, b_reason))) or None
        pairs.append(ConfirmedPair(a.trial, a.settings.seed, a_auroc, b_auroc, a_ended and b_ended, reason))
    return Confirmation.of(runs[0].settings.backbone, runs[1].settings.backbone, pairs)


def drop_checkpoints(plan: StudyPlan, runs: Sequence[ConfirmRun]) -> None:
    """Remove the checkpoints of ended trainings, unless `tune.keep` is `all`."""
    if plan.settings.keep != "all":
        for run in runs:
            if run.state[0]:
                remote.remove_folder(run.folder / "ray")
