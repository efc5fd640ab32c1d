"""Fetching ahead: order, parallel calls, and bounds of memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_cxr.storage.prefetch import fetch_ahead


class Server:
    """Answers with as many bytes as requested, and notes how many answers were not yet used."""

    def __init__(self) -> None:
        self.lock, self.unused, self.running = threading.Lock(), 0, 0
        self.most_bytes = self.most_running = 0

    def fetch(self, size: int) -> bytes:
        with self.lock:
            self.running += 1
            self.unused += size
            self.most_bytes = max(self.most_bytes, self.unused)
            self.most_running = max(self.most_running, self.running)
        time.sleep(0.001 * (size % 7))
        with self.lock:
            self.running -= 1
        return bytes(size)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def test_results_keep_the_order_while_calls_run_at_the_same_time(pool: ThreadPoolExecutor) -> None:
    server = Server()
    sizes = [(number * 31) % 97 for number in range(100)]
    results = list(fetch_ahead(pool, server.fetch, enumerate(sizes), threads=4, max_bytes=10_000))
    assert [(key, len(content)) for key, content in results] == list(enumerate(sizes))
    assert server.most_running == 4


def test_large_results_limit_how_far_calls_run_ahead(pool: ThreadPoolExecutor) -> None:
    server, read = Server(), []

    def items() -> Iterator[tuple[int, int]]:
        for number in range(40):
            read.append(number)
            yield number, 1000

    for key, content in fetch_ahead(pool, server.fetch, items(), threads=4, max_bytes=6000):
        time.sleep(0.002)  # slower than the server
        assert len(read) <= key + 8
        with server.lock:
            server.unused -= len(content)
    assert server.most_bytes <= 7000
    assert server.unused == 0


def test_one_result_above_the_limit_still_arrives(pool: ThreadPoolExecutor) -> None:
    results = fetch_ahead(pool, Server().fetch, enumerate([50, 5000, 50, 50]), threads=4, max_bytes=1000)
    assert [len(content) for _, content in results] == [50, 5000, 50, 50]


def test_calls_stop_when_the_caller_stops(pool: ThreadPoolExecutor) -> None:
    called = []

    def fetch(number: int) -> bytes:
        called.append(number)
        time.sleep(0.01)
        return b"x"

    results = fetch_ahead(pool, fetch, enumerate(range(1000)), threads=4, max_bytes=1000)
    next(results)
    results.close()
    pool.shutdown()
    assert len(called) < 20
