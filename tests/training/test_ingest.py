"""The order of images and the thread that fetches them."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
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


@pytest.mark.parametrize(("accumulate", "mixup"), [(1, 0.0), (3, 0.0), (1, 0.4), (2, 0.4)])
@given(n=st.integers(1, 60), count=st.sampled_from([1, 2, 3, 4]), share=st.integers(1, 5), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_shares_of_the_workers_make_the_global_batch(
    accumulate: int, mixup: float, n: int, count: int, share: int, seed: int
) -> None:
    """Images, labels, weights and draws of all workers together are those of one worker with the whole batches."""
    data, batch = split(n, size=4), share * count

    def read(rank: int, workers: int) -> list[ingest.Batch]:
        feed = ingest.Feed(data, range(14), batch, rank, workers, accumulate=accumulate, mixup=mixup)
        return list(feed.prefetch_training(seed, 3, 0, 10**6))

    def join(parts: list[np.ndarray], per_batch: int) -> np.ndarray:
        split_parts = [part.reshape(accumulate, per_batch, -1, *part.shape[1:]) for part in parts]
        return np.concatenate(split_parts, axis=2).reshape(-1, *parts[0].shape[1:])

    whole, parts = read(0, 1), [read(rank, count) for rank in range(count)]
    assert sorted(row for step in whole for row in step.rows) == list(range(n))
    for step, expected in enumerate(whole):
        for name in ("images", "labels", "weight", "draws"):
            per_batch = 2 if mixup and name in ("images", "draws") else 1
            together = join([getattr(part[step], name) for part in parts], per_batch)
            np.testing.assert_array_equal(together, getattr(expected, name))
        for part in parts:
            assert (part[step].denominator, part[step].batches) == (expected.denominator, expected.batches)
            np.testing.assert_array_equal(part[step].rows, expected.rows)
        assert expected.batches == -(-len(expected.rows) // batch)
        labelled = expected.weight.any(axis=1)
        own = expected.images if not mixup else expected.images.reshape(accumulate, 2, batch, 4, 4, 1)[:, 0]
        own = own.reshape(-1, 4, 4)[labelled]
        assert {image.tobytes() for image in own} <= {data.images.pixels[row].tobytes() for row in expected.rows}
        if not mixup:
            values = data.labels[expected.rows][:, :14]
            np.testing.assert_array_equal(expected.weight[: len(values)], values >= 0)
            np.testing.assert_array_equal(expected.labels[: len(values)], values == 1)
            assert expected.weight.sum() == (values >= 0).sum()


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
