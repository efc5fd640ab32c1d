"""A backend of Ray Train for TensorFlow.

Ray's own backend imports TensorFlow also in the driver and in the run's controller, which never use it. That costs
about ten seconds of a core at each start of a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.util.placement_group import placement_group, remove_placement_group

from ray_cxr import cluster, ray_api

#: Seconds that the workers of a run on a cluster have to stop after Ctrl-C.
ABORT_TIMEOUT_S = 30.0
#: Seconds to wait for free CPUs or GPUs on preferred nodes; processes of a failed worker need a moment to end.
PREFERENCE_TIMEOUT_S = 5.0

_rays = ray_api.load_train_classes()


class Trainer(_rays.trainer):  # type: ignore[name-defined]
    """Ray Train's trainer without two helper processes, each of which takes two seconds of a core at every start.

    The first serves Ray datasets, which the workers do not use. The second frees the resources of a run whose
    controller was killed; it is left out of a local Ray, which ends with the command anyway.
    """

    _controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        unused = _rays.helpers if cluster.owns_ray else _rays.helpers[:1]
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def fit(self) -> Any:
        # Seconds between two polls of the workers, by default 2.0. Reports and the end of a run wait for the next poll.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        try:
            return super().fit()
        except KeyboardInterrupt:
            # A local Ray ends with the command, and so do its workers.
            if self._controller is not None and not cluster.owns_ray:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(self._controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
            raise

    def _register_sigint_handler(self, controller: Any) -> None:
        # Ray's handler would end the process without a message, and would stay registered after the run.
        self._controller = controller


class PreferredNodes(_rays.controller_callback):  # type: ignore[name-defined]
    """Start the workers on preferred nodes if these can hold all of them now, else on any node that may work.

    Ray's placement groups have no fallback. Ray Train asks at every start, also after a lost node.
    """

    def __init__(self, selector: dict[str, str], resources: dict[str, float]) -> None:
        self._selector, self._resources = selector, resources

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        bundles = [dict(self._resources) for _ in range(num_workers)]
        group = placement_group(bundles, bundle_label_selector=[dict(self._selector) for _ in bundles])
        try:
            return self._selector if group.wait(PREFERENCE_TIMEOUT_S) else None
        finally:
            remove_placement_group(group)


class TensorflowCluster(BackendConfig):
    """Set `TF_CONFIG` in every worker before training: the addresses of all workers, and the worker's own rank."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Cluster


class _Cluster(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses, ranks = worker_group.execute(_find_address), range(len(worker_group))
        ray.get([worker_group.execute_single_async(rank, _set_tf_config, addresses, rank) for rank in ranks])


def _find_address() -> str:
    """Return this worker's host and a free port."""
    host = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_tf_config(addresses: list[str], rank: int) -> None:
    cluster.bypass_proxies(address.rpartition(":")[0] for address in addresses)
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
