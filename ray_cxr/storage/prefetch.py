"""Fetch the contents of the next images in threads, ahead of the caller and in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

K = TypeVar("K")
S = TypeVar("S")
T = TypeVar("T")

#: Maximum number of results that wait for the caller, however small they are.
MAX_AHEAD = 64


def fetch_ahead(
    pool: Executor, fetch: Callable[[S], T], items: Iterable[tuple[K, S]], *, threads: int, max_bytes: int
) -> Iterator[tuple[K, T]]:
    """Yield each key with what `fetch` returns for its source, in the order of the items.

    Calls run ahead of the caller. All that are submitted take at most `max_bytes`, if none returns more than the
    largest result so far; one call is always submitted.

    Args:
        pool: runs `threads` calls at a time.
        items: pairs of key and source. The caller's thread reads them, only as far ahead as the calls.
    """
    ahead: deque[tuple[K, Future[T]]] = deque()
    window, largest = threads, 1

    def take() -> tuple[K, T]:
        nonlocal window, largest
        key, future = ahead[0]
        content = future.result()
        ahead.popleft()
        if isinstance(content, bytes):
            largest = max(largest, len(content))
        window = max(1, min(MAX_AHEAD + threads, max_bytes // largest))
        return key, content

    try:
        for key, source in items:
            while len(ahead) >= window:
                yield take()
            ahead.append((key, pool.submit(fetch, source)))
        while ahead:
            yield take()
    finally:
        for _, future in ahead:
            future.cancel()
