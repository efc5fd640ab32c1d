"""The addresses that TensorFlow's workers find each other by, and the end of a run."""

from __future__ import annotations

import json
import os
import socket
from unittest.mock import Mock

import pytest
import ray

from ray_cxr import cluster
from ray_cxr.training import backend


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_address_of_a_worker_names_its_host_and_a_free_port(monkeypatch, host: str, shown: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: host)
    found, _, port = backend._find_address().rpartition(":")
    assert found == shown
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(port)))


def test_every_worker_knows_all_addresses_and_its_own_place(monkeypatch) -> None:
    for name in ("TF_CONFIG", "no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.setenv(name, "")
    backend._set_tf_config(["10.0.0.1:7001", "10.0.0.2:7002"], 1)
    assert json.loads(os.environ["TF_CONFIG"]) == {
        "cluster": {"worker": ["10.0.0.1:7001", "10.0.0.2:7002"]},
        "task": {"type": "worker", "index": 1},
    }
    assert {"10.0.0.1", "10.0.0.2"} <= set(os.environ["no_proxy"].split(","))


@pytest.mark.parametrize(("own", "registered", "aborts"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_ctrl_c_stops_the_workers_on_a_cluster(monkeypatch, own: bool, registered: bool, aborts: int) -> None:
    """A local Ray ends with the command, and so do its workers."""
    controller = Mock()
    monkeypatch.setattr(cluster, "owns_ray", own)
    monkeypatch.setattr(ray, "get", Mock(side_effect=ray.exceptions.GetTimeoutError))
    monkeypatch.setattr(backend.Trainer.__base__, "fit", Mock(side_effect=KeyboardInterrupt))
    trainer = backend.Trainer.__new__(backend.Trainer)
    if registered:
        trainer._register_sigint_handler(controller)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert controller.abort.remote.call_count == aborts
