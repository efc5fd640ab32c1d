"""Check that Ray's dashboard answers; without it, stopped trials never release their resources.

A stopped trial leaves a run whose controller was killed. A process of Ray Train frees such a run's resources; it asks
Ray's state API, a part of the dashboard, whether the controller is alive.
"""

from __future__ import annotations

import time

import ray

from ray_cxr import cluster
from ray_cxr.errors import ConfigError

#: Seconds until the dashboard must answer.
WAIT_S = 90


def check_dashboard() -> None:
    """Wait until Ray's state API answers.

    Raises:
        ConfigError: it does not.
    """
    # Query it from the head node, as Ray Train does: a process there must find this Ray among several.
    query = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001}, max_retries=0)(_query_state_api)
    deadline = time.monotonic() + WAIT_S
    while (reason := ray.get(query.remote())) is not None:
        # The dashboard starts some seconds after Ray, and later on a loaded machine.
        if time.monotonic() > deadline:
            raise ConfigError(
                "Ray's dashboard does not answer, so stopped or lost trials would never release their resources; "
                f"start Ray with its dashboard, and only one Ray per machine ({reason})"
            )
        time.sleep(1)


def _query_state_api() -> str | None:
    """Return why Ray's state API does not answer; None if it does."""
    from ray.util.state import list_nodes

    cluster.bypass_proxies([ray.util.get_node_ip_address(), "127.0.0.1", "localhost"])
    try:
        list_nodes(limit=1, timeout=20)
    except Exception as error:  # of Ray or its HTTP client
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return None
