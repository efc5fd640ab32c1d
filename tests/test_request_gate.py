"""The gate of requests to a PACS, as a plain object with a clock of the test."""

from __future__ import annotations

import asyncio

from ray_cxr.request_gate import RequestGate


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_requests_wait_until_one_of_the_allowed_number_ends() -> None:
    async def run() -> None:
        gate = RequestGate(2, 1000, 60)
        first, second = [(await gate.acquire())[0] for _ in range(2)]
        third, fourth = (asyncio.create_task(gate.acquire()) for _ in range(2))
        await asyncio.sleep(0.02)
        assert not any([third.done(), fourth.done()])
        await gate.release(first)
        await gate.release(first)  # twice: still one
        await asyncio.wait([third, fourth], timeout=5, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0.02)
        assert third.done() + fourth.done() == 1
        await gate.release(second)
        numbers = {(await third)[0], (await fourth)[0]}
        assert len(numbers | {first, second}) == 4
        assert (await gate.read_totals())["requests"] == 4

    asyncio.run(run())


def test_a_request_of_a_dead_worker_ends_after_its_lease() -> None:
    async def run() -> None:
        clock = Clock()
        gate = RequestGate(1, 1000, 30, clock)
        lost, _ = await gate.acquire()
        clock.now += 29
        waiting = asyncio.create_task(gate.acquire())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        clock.now += 1.1
        waiting.cancel()
        number, _ = await asyncio.wait_for(gate.acquire(), 5)
        await gate.release(lost)  # the worker was only slow: its release must not end the other request
        waiting = asyncio.create_task(gate.acquire())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await gate.release(number)
        await asyncio.wait_for(waiting, 5)

    asyncio.run(run())


def test_a_waiting_request_notices_that_a_lease_ends() -> None:
    async def run() -> None:
        gate = RequestGate(1, 1000, 0.03)
        await gate.acquire()
        await asyncio.wait_for(gate.acquire(), 5)  # nothing releases the first

    asyncio.run(run())


def test_starts_are_spread_over_the_seconds() -> None:
    async def run() -> list[float]:
        clock, starts = Clock(), []
        gate = RequestGate(100, 4, 60, clock)
        for pause in (0, 0, 0, 0.1, 5, 0):
            clock.now += pause
            starts.append(clock.now + (await gate.acquire())[1])
        return starts

    assert asyncio.run(run()) == [100, 100.25, 100.5, 100.75, 105.1, 105.35]


def test_totals_add_what_workers_report() -> None:
    async def run() -> dict[str, float]:
        gate = RequestGate(1, 1000, 60)
        await gate.add({"bytes": 3, "seconds": 0.5})
        await gate.add({"bytes": 4})
        return await gate.read_totals()

    assert asyncio.run(run()) == {"bytes": 7, "seconds": 0.5}
