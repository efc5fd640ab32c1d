"""The order of images and the thread that fetches them."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from workers import split

from ray_cxr.training import ingest


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 2**31 - 1), st.integers(0, 1000))
def test_an_epoch_has_every_image_exactly_once(n: int, batch: int, seed: int, epoch: int) -> None:
    order = ingest.shuffle_epoch(n, seed, epoch)
    planned = list(ingest.iter_batches(order, batch))
    assert sorted(row for rows, real in planned for row in rows[real]) == list(range(n))
    assert all(len(rows) == batch for rows, _ in planned)
    np.testing.assert_array_equal(order, ingest.shuffle_epoch(n, seed, epoch))


@given(st.integers(1, 60), st.sampled_from([1, 2, 3, 4]), st.integers(1, 5), st.integers(0, 5))
def test_shares_of_the_workers_make_the_global_batch(n: int, count: int, share: int, seed: int) -> None:
    """Images, labels, weights and draws of all workers together are those of one worker with the whole batch."""
    data, batch = split(n, size=4), share * count
    whole = list(ingest.Feed(data, range(14), batch, 0, 1).prefetch_training(seed, 3, 0, 10**6))
    parts = [
        list(ingest.Feed(data, range(14), batch, rank, count).prefetch_training(seed, 3, 0, 10**6))
        for rank in range(count)
    ]
    for step, expected in enumerate(whole):
        for name in ("images", "labels", "weight", "draws"):
            together = np.concatenate([getattr(part[step], name) for part in parts])
            np.testing.assert_array_equal(together, getattr(expected, name))
        for part in parts:
            assert part[step].denominator == expected.denominator
            np.testing.assert_array_equal(part[step].rows, expected.rows)


def test_a_resumed_epoch_continues_with_the_same_batches_and_others_differ() -> None:
    assert len({tuple(ingest.shuffle_epoch(50, *key)) for key in ((0, 0), (0, 1), (1, 0))}) == 3
    feed = ingest.Feed(split(23, size=4), range(14), 4, 0, 1)
    whole, rest = list(feed.prefetch_training(1, 2, 0, 6)), list(feed.prefetch_training(1, 2, 3, 6))
    assert [batch.step for batch in rest] == [3, 4, 5]
    for one, other in zip(whole[3:], rest, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.draws, other.draws)


def test_items_are_fetched_ahead_but_only_a_few_and_the_wait_is_counted() -> None:
    started = [threading.Event() for _ in range(6)]
    fetched = ingest.Prefetcher(lambda i: started[i].set() or i, 6)
    for item in fetched:
        assert all(event.wait(60) for event in started[item + 1 : item + 2])
        assert not any(event.is_set() for event in started[item + 1 + ingest.QUEUE_SIZE :])
    fetched = ingest.Prefetcher(lambda i: time.sleep(0.2) or i, 1)
    assert list(fetched) == [0]
    assert fetched.wait_seconds >= 0.1


@pytest.mark.parametrize("failure", [None, OSError("gone")])
def test_the_thread_ends_after_an_error_and_when_the_loop_is_left(failure: OSError | None) -> None:
    def fetch(i: int) -> int:
        if i == 2 and failure:
            raise failure
        return i

    before = set(threading.enumerate())
    fetched = iter(ingest.Prefetcher(fetch, 5))
    assert [next(fetched), next(fetched)] == [0, 1]
    if failure:
        with pytest.raises(OSError, match="gone"):
            next(fetched)
    else:
        fetched.close()
    assert set(threading.enumerate()) <= before
