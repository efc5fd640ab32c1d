"""Limit the requests to a PACS over all nodes of a run: how many at a time, and how many per second.

    worker: GateLimiter.slot  -- acquire -->  RequestGate, an actor without CPUs on the node of the command
                              <-- number, seconds to wait --
                              -- release -->

A worker that dies cannot release its requests, so each request is counted as ended after `lease_s` seconds. The actor
also adds up what the workers fetched, for `run.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from ray_cxr.config import PacsSettings

#: Seconds from the time limit of a request until it counts as ended.
_MARGIN_S = 10.0
#: Maximum number of requests that wait for the actor; further calls wait in Ray.
_MAX_WAITING = 10_000


class RequestGate:
    """Grants requests; its methods are those of a Ray actor, or of an object in one event loop.

    Args:
        parallel: requests at a time.
        per_second: requests per second. They are spread evenly, without bursts.
        lease_s: seconds after which a request that was not released counts as ended.
        clock: returns seconds; it replaces `time.monotonic` in tests.
    """

    def __init__(
        self, parallel: int, per_second: float, lease_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._parallel, self._interval_s, self._lease_s, self._clock = parallel, 1 / per_second, lease_s, clock
        self._numbers = itertools.count()
        #: When each running request counts as ended, by its number.
        self._ends: dict[int, float] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._next_start = -math.inf
        self._totals: Counter[str] = Counter()

    async def acquire(self) -> tuple[int, float]:
        """Wait for a free request; return its number, and the seconds that the caller must wait before it starts."""
        while not self._has_free():
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await asyncio.wait([waiter], timeout=max(0.0, min(self._ends.values()) - self._clock()))
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiter)
        now = self._clock()
        start = max(now, self._next_start)
        self._next_start = start + self._interval_s
        number = next(self._numbers)
        self._ends[number] = start + self._lease_s
        self._totals["requests"] += 1
        return number, start - now

    async def release(self, number: int) -> None:
        """End a request; a number that is unknown or ended already is ignored."""
        self._ends.pop(number, None)
        if self._waiting:
            waiter = self._waiting.pop(0)
            if not waiter.done():
                waiter.set_result(None)

    async def add(self, amounts: dict[str, float]) -> None:
        """Add amounts to the totals, by name."""
        self._totals.update(amounts)

    async def read_totals(self) -> dict[str, float]:
        """Return the totals: `requests`, and the sums of `add`."""
        return dict(self._totals)

    def _has_free(self) -> bool:
        now = self._clock()
        self._ends = {number: end for number, end in self._ends.items() if end > now}
        return len(self._ends) < self._parallel


class GateLimiter:
    """Client of the gate with a name, for all threads of a worker."""

    def __init__(self, name: str) -> None:
        self._name = name

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Wait until a request may start; it ends with the block."""
        import ray

        number, seconds = ray.get(self._gate.acquire.remote())
        try:
            time.sleep(seconds)
            yield
        finally:
            self._gate.release.remote(number)

    def add(self, **amounts: float) -> None:
        """Add amounts to the totals of the run, without waiting."""
        self._gate.add.remote(amounts)

    def read_totals(self) -> dict[str, float]:
        """Return the totals of the run."""
        import ray

        return dict(ray.get(self._gate.read_totals.remote()))

    @functools.cached_property
    def _gate(self) -> Any:
        import ray

        return ray.get_actor(self._name)


@contextlib.contextmanager
def open_gate(settings: PacsSettings) -> Iterator[str | None]:
    """Run a gate while the block runs; yield its name, which `GateLimiter` takes. Without Ray, yield None."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not ray.is_initialized():
        yield None
        return
    name = f"ray_cxr-requests-{secrets.token_hex(8)}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    gate = (
        ray.remote(RequestGate)
        .options(
            name=name,
            num_cpus=0,
            max_concurrency=_MAX_WAITING,
            # A node can be lost. The requests that it had granted run on, so for a moment there can be more.
            max_restarts=-1,
            max_task_retries=-1,
            scheduling_strategy=here,
        )
        .remote(settings.parallel, settings.per_second, settings.timeout_s + _MARGIN_S)
    )
    try:
        ray.get(gate.read_totals.remote())
        yield name
    finally:
        ray.kill(gate)
