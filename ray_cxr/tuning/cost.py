"""What a search takes, from one training step of each backbone and from the trials in the same folder."""

from __future__ import annotations

import time
from dataclasses import replace

from ray_cxr.costs import ASSUMED, Cost, Rate
from ray_cxr.data.prepare_cost import describe_splits
from ray_cxr.data.prepared import PreparedSet
from ray_cxr.models.architecture import Architecture
from ray_cxr.storage.run_folder import read_json
from ray_cxr.training.cost import NO_GPU_RATE, ModelCost, count_images, measure_step, read_epochs
from ray_cxr.training.planning import plan_training
from ray_cxr.training.worker import METRICS
from ray_cxr.tuning.plan import SUMMARY, TRIALS, StudyPlan, list_prepared_sizes

#: Measuring another backbone starts only before this many seconds.
_MEASURE_S = 6.0


def estimate_tune(plan: StudyPlan, *, use_gpu: bool = False) -> Cost:
    """Estimate a search whose checks have passed, and write nothing.

    The shortest duration is that of a search in which all trials but one end after `grace_epochs`.
    """
    settings = plan.settings
    size = max(list_prepared_sizes(plan.prepared) if plan.base.size is None else (plan.base.size,))
    data = PreparedSet(plan.prepared, size)
    done = min(settings.trials, int(read_json(plan.out / SUMMARY).get("trials_over", 0)))
    left, epochs = settings.trials - done, plan.base.epochs
    counts = (
        f"{describe_splits(data.rows())}; {left:,} of {settings.trials:,} trials to train, up to {epochs:,} epochs each"
    )
    if settings.confirm:
        counts += f", and {2 * settings.confirm:,} confirming trainings"
    costs = _measure_backbones(plan, data)
    first = next(iter(costs.values()))
    largest = max(costs.values(), key=lambda cost: cost.parameters)
    sizes = largest.list_sizes(plan.base)
    sizes["checkpoints"] *= left
    tables = [folder / METRICS for folder in sorted((plan.out / TRIALS).glob("[0-9]*"))]
    tables = [table for table in tables if table.exists()]
    earlier = read_epochs(tables, f"of {len(tables)} trials in {plan.out}")
    if earlier is None and use_gpu:
        return Cost(counts, {}, None, sizes, NO_GPU_RATE)
    base = plan.base.replace(size=size, backbone=next(iter(costs)))
    images = count_images(plan_training(plan.prepared, plan.out / TRIALS / ".check", base))
    rates = {name: earlier or cost.rate for name, cost in costs.items()}
    # Trials choose among the backbones about equally often.
    epoch_s = sum(images / rate.per_second for rate in rates.values()) / len(rates)
    full = left + 2 * settings.confirm
    grace = 2 * settings.confirm + (left if settings.scheduler == "none" else min(left, 1))
    shortest = grace * epochs + (full - grace) * min(epochs, settings.grace_epochs)
    low, high = (n * epoch_s + full * first.start_s for n in (shortest, full * epochs))
    shown = {"train": earlier} if earlier else {f"train {name}": rate for name, rate in rates.items()}
    notes = [] if low == high else ["  shortest: all trials but one are stopped early; longest: none is"]
    return Cost(counts, shown, (low, high), sizes, notes=notes)


def _measure_backbones(plan: StudyPlan, data: PreparedSet) -> dict[str, ModelCost]:
    """Measure each searched backbone; those for which there is no time are assumed to be as fast as the slowest."""
    started, costs = time.monotonic(), dict[str, ModelCost]()
    for name in plan.space.backbones:
        settings = plan.base.replace(backbone=name, size=data.size)
        if costs and time.monotonic() - started > _MEASURE_S:
            slowest = min(costs.values(), key=lambda cost: cost.rate.per_second)
            costs[name] = replace(slowest, rate=Rate(slowest.rate.per_second, f"{ASSUMED}, as that of the slowest"))
        else:
            costs[name] = measure_step(data, settings, Architecture.of(settings, data.size))
    return costs
