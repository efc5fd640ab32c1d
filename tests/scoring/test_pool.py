"""The size of a pool of actors on different clusters."""

from __future__ import annotations

import pytest
import ray

from ray_cxr.config import ScoreSettings
from ray_cxr.errors import ConfigError
from ray_cxr.scoring.pool import ActorPlan, plan_drawing, plan_scoring


def set_nodes(monkeypatch: pytest.MonkeyPatch, *nodes: tuple[float, float]) -> None:
    """Let Ray's nodes have these CPUs and GPUs."""
    listed = [
        {"Alive": True, "NodeID": str(i), "Resources": {"CPU": cpu, "GPU": gpu}} for i, (cpu, gpu) in enumerate(nodes)
    ]
    monkeypatch.setattr(ray, "nodes", lambda: listed)


def test_pools_use_all_gpus_and_share_each_nodes_cpus_among_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    set_nodes(monkeypatch, (8, 0), (6, 2), (2, 1))
    settings = ScoreSettings()
    assert plan_scoring(settings, 100, use_gpu=True) == ActorPlan(3, cpus=0, gpus=1, in_flight=4, decode_apart=True)
    # The third node has two CPUs for its GPU; the first has no GPU and does not limit the CPUs.
    assert plan_drawing(settings, 100, use_gpu=True) == ActorPlan(3, cpus=2, gpus=1, in_flight=1)
    assert plan_drawing(settings, 2, use_gpu=True).actors == 2
    # Four CPUs per actor at most, also with a single GPU.
    set_nodes(monkeypatch, (16, 1))
    assert plan_drawing(settings, 100, use_gpu=True) == ActorPlan(1, cpus=4, gpus=1, in_flight=1)


def test_pools_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    set_nodes(monkeypatch, (8, 0), (2, 0), (0, 0))
    assert plan_scoring(ScoreSettings(), 100, use_gpu=False) == ActorPlan(5, cpus=2)
    assert plan_drawing(ScoreSettings(cpus_per_actor=4), 100, use_gpu=False) == ActorPlan(2, cpus=4, in_flight=1)
    assert plan_scoring(ScoreSettings(decode="apart"), 9, use_gpu=False) == ActorPlan(1, cpus=1, decode_apart=True)
    for plan in (plan_scoring, plan_drawing):
        with pytest.raises(ConfigError, match="--gpu"):
            plan(ScoreSettings(), 1, use_gpu=True)
    set_nodes(monkeypatch, (1, 0))
    with pytest.raises(ConfigError, match="decode=apart"):
        plan_scoring(ScoreSettings(decode="apart"), 9, use_gpu=False)
    set_nodes(monkeypatch, (0, 1))
    with pytest.raises(ConfigError, match="CPU"):
        plan_scoring(ScoreSettings(), 9, use_gpu=True)
