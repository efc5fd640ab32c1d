"""How Ray Train's workers learn of one another: the part of Ray Train that a framework may supply.

Ray's own for TensorFlow does the same and imports TensorFlow in the driver and in the run's controller as well, which
never compute with it: some ten seconds of a core for each start of a run.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


class TensorflowCluster(BackendConfig):
    """Sets `TF_CONFIG` in every worker before the loop begins: all their addresses, and the place of this one."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Cluster


class _Cluster(Backend):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        addresses = worker_group.execute(_free_address)
        ray.get(
            [worker_group.execute_single_async(rank, _set_place, addresses, rank) for rank in range(len(worker_group))]
        )


def _free_address() -> str:
    """This worker's host and a port that is free there."""
    host = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_place(addresses: list[str], rank: int) -> None:
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
