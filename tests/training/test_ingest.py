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
    order = ingest.epoch_order(n, seed, epoch)
    seen = [row for rows, real in ingest.batches(order, batch) for row in rows[real]]
    assert sorted(seen) == list(range(n))
    assert all(len(rows) == batch for rows, _ in ingest.batches(order, batch))
    np.testing.assert_array_equal(order, ingest.epoch_order(n, seed, epoch))


def test_epochs_differ_and_seeds_differ() -> None:
    assert ingest.epoch_order(50, 0, 0).tolist() != ingest.epoch_order(50, 0, 1).tolist()
    assert ingest.epoch_order(50, 0, 0).tolist() != ingest.epoch_order(50, 1, 0).tolist()


@given(st.integers(1, 60), st.sampled_from([1, 2, 3, 4]), st.integers(1, 5), st.integers(0, 5))
def test_workers_shares_make_the_global_batch(n: int, count: int, share: int, seed: int) -> None:
    """Images, labels, weights and draws of all workers, put together, are those of one worker with the whole batch."""
    data, batch = split(n, size=4), share * count
    whole = list(ingest.Feed(data, range(14), batch, 0, 1).train(seed, 3, 0, 10**6))
    parts = [list(ingest.Feed(data, range(14), batch, rank, count).train(seed, 3, 0, 10**6)) for rank in range(count)]
    for step, expected in enumerate(whole):
        for name in ("images", "labels", "weight", "draws"):
            together = np.concatenate([getattr(part[step], name) for part in parts])
            np.testing.assert_array_equal(together, getattr(expected, name))
        for part in parts:
            assert part[step].denominator == expected.denominator
            np.testing.assert_array_equal(part[step].rows, expected.rows)


def test_an_epoch_taken_up_in_the_middle_goes_on_with_the_same_batches() -> None:
    feed = ingest.Feed(split(23, size=4), range(14), 4, 0, 1)
    whole, rest = list(feed.train(1, 2, 0, 6)), list(feed.train(1, 2, 3, 6))
    assert [batch.step for batch in rest] == [3, 4, 5]
    for one, other in zip(whole[3:], rest, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.draws, other.draws)


def test_fetching_goes_on_while_the_step_works() -> None:
    """The next item is in the making, or made, before this one has been used."""
    begun = [threading.Event() for _ in range(6)]
    fetched = ingest.Fetched(lambda i: begun[i].set() or i, 6)
    for item in fetched:
        assert all(event.wait(30) for event in begun[item + 1 : item + 2])
        assert not any(event.is_set() for event in begun[item + 1 + ingest.AHEAD :]), "memory holds only so many"


def test_what_was_waited_for_is_counted() -> None:
    fetched = ingest.Fetched(lambda i: time.sleep(0.2) or i, 1)
    assert list(fetched) == [0]
    assert fetched.waited >= 0.1


def test_what_fails_in_the_thread_is_raised_where_it_is_used_and_the_thread_ends() -> None:
    def fetch(i: int) -> int:
        if i == 2:
            raise OSError("gone")
        return i

    fetched = iter(ingest.Fetched(fetch, 5))
    assert [next(fetched), next(fetched)] == [0, 1]
    with pytest.raises(OSError, match="gone"):
        next(fetched)
    assert not [t for t in threading.enumerate() if t.name.startswith("fetch")]


def test_leaving_early_ends_the_thread() -> None:
    for _ in ingest.Fetched(lambda i: i, 100):
        break
    deadline = time.monotonic() + 5
    while any(t.name.startswith("fetch") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [t for t in threading.enumerate() if t.name.startswith("fetch")]
