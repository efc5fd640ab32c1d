"""Two real workers against each other and against one: what data-parallel training promises, to the last bit."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from workers import N_TRAIN, N_VAL

pytestmark = pytest.mark.ray  # not Ray itself, but three processes with TensorFlow
Arrays = dict[str, np.ndarray]


def free_ports(count: int) -> int:
    """The first of so many neighbouring free ports."""
    for first in range(23000, 60000, 97):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Arrays]]]:
    """By number of workers, by rank, by scenario: what `workers.py` wrote down."""
    out = tmp_path_factory.mktemp("workers")
    program = str(Path(__file__).with_name("workers.py"))
    found = {}
    for count in (2, 1):
        port = free_ports(count)
        running = [
            subprocess.Popen(
                [sys.executable, program, str(out), str(rank), str(count), str(port)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            # The limit is the proof that nothing hangs.
            complaints = [process.communicate(timeout=200)[1] for process in running]
        finally:
            for process in running:
                process.kill()
        for process, complaint in zip(running, complaints, strict=True):
            assert process.returncode == 0, complaint[-4000:]
        found[count] = [_read(out / f"{count}-{rank}.npz") for rank in range(count)]
    return found


def _read(path: Path) -> dict[str, Arrays]:
    scenarios: dict[str, Arrays] = {}
    with np.load(path) as arrays:
        for key in arrays:
            scenario, _, name = key.partition("/")
            scenarios.setdefault(scenario, {})[name] = arrays[key]
    return scenarios


@pytest.mark.parametrize("scenario", ["same_steps", "clipped", "xla", "unsynchronised", "overflow", "saved_by_one"])
def test_all_variables_and_slots_are_the_same_bits_on_both_workers(results, scenario: str) -> None:
    one, other = (worker[scenario] for worker in results[2])
    names = [name for name in one if name != "own statistics"]
    assert sum(name.startswith("model ") for name in names) > 10
    assert sum(name.startswith("optimizer ") for name in names) >= 3
    for name in names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_statistics_are_each_workers_own_until_they_are_averaged(results) -> None:
    """Else the test above would show nothing about the averaging."""
    one, other = (worker["unsynchronised"]["own statistics"] for worker in results[2])
    assert np.abs(one - other).max() > 1e-6


@pytest.mark.parametrize("scenario", ["same_steps", "clipped", "saved_by_one", "xla", "not_xla"])
def test_two_workers_take_the_steps_of_one(results, scenario: str) -> None:
    """The same global batches give the same weights, to 1e-5 of each tensor's size."""
    together, alone = results[2][0][scenario], results[1][0][scenario]
    assert set(together) == set(alone)
    for name, expected in alone.items():
        if np.issubdtype(expected.dtype, np.floating):
            scale = max(float(np.abs(expected).max()), 1e-30)
            assert np.abs(together[name] - expected).max() / scale < 1e-5, name


def test_clipping_is_of_the_global_gradient_and_does_something(results) -> None:
    name = next(name for name in results[1][0]["clipped"] if name.endswith("logits/kernel"))
    assert np.abs(results[1][0]["clipped"][name] - results[1][0]["same_steps"][name]).max() > 1e-4


def test_xla_computes_what_tensorflow_computes(results) -> None:
    for count in (1, 2):
        with_xla, without = results[count][0]["xla"], results[count][0]["not_xla"]
        for name, expected in without.items():
            if name.startswith("model "):
                np.testing.assert_allclose(with_xla[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_averaged_weights_are_not_the_raw_ones(results) -> None:
    arrays = results[2][0]["unsynchronised"]
    name = next(name for name in arrays if name.startswith("averaged") and name.endswith("tiny_conv0/kernel"))
    assert np.abs(arrays[name] - arrays["kernel"]).max() > 1e-5


@pytest.mark.parametrize("count", [1, 2])
def test_every_training_image_is_read_exactly_once_an_epoch(results, count: int) -> None:
    """The rows that the workers read, put together: each once, and then the padding of the last batch."""
    read = [worker["every_image_once"]["trained"].reshape(-1, 8 // count) for worker in results[count]]
    order = np.concatenate(read, axis=1).reshape(-1)  # step by step, rank by rank
    assert sorted(order[:N_TRAIN]) == list(range(N_TRAIN))
    assert len(order) == 32
    assert set(order[N_TRAIN:]) <= set(order[24:N_TRAIN]), "padding repeats the last batch"


def test_the_order_is_the_same_for_one_and_two_workers(results) -> None:
    alone = results[1][0]["every_image_once"]["trained"]
    both = np.concatenate([w["every_image_once"]["trained"].reshape(-1, 4) for w in results[2]], axis=1)
    np.testing.assert_array_equal(both.reshape(-1), alone)
    assert alone[:N_TRAIN].tolist() != list(range(N_TRAIN))


@pytest.mark.parametrize("count", [1, 2])
def test_every_validation_image_counts_once(results, count: int) -> None:
    read = [worker["every_image_once"]["validated"].reshape(-1, 8 // count) for worker in results[count]]
    assert np.concatenate(read, axis=1).reshape(-1)[:N_VAL].tolist() == list(range(N_VAL))
    for worker in results[count]:
        assert worker["every_image_once"]["probabilities"].shape == (N_VAL, 14)
        np.testing.assert_array_equal(
            worker["every_image_once"]["probabilities"], results[count][0]["every_image_once"]["probabilities"]
        )


def test_predictions_of_two_workers_are_those_of_one(results) -> None:
    one, two = (results[count][0]["every_image_once"]["probabilities"] for count in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_validation_auroc_is_scikit_learns_over_all_workers_predictions(results, count: int) -> None:
    for worker in results[count]:
        found = worker["every_image_once"]
        defined = []
        for j in range(14):
            known = found["labels"][:, j] >= 0
            y = found["labels"][known, j]
            if 0 < y.sum() < len(y):
                expected = roc_auc_score(y, found["probabilities"][known, j])
                assert found["aurocs"][j] == pytest.approx(expected, abs=1e-12)
                defined.append(expected)
            else:
                assert np.isnan(found["aurocs"][j])
        assert len(defined) > 7
        assert float(found["macro"]) == pytest.approx(np.mean(defined), abs=1e-12)


def test_an_overflow_on_one_worker_skips_the_step_on_both(results) -> None:
    """Keras's own loss scaling decides before gradients are summed: under a strategy one worker would wait for ever."""
    for count in (1, 2):
        for worker in results[count]:
            assert worker["overflow"]["moved"] == 0.0
            before, after = worker["overflow"]["scale"]
            assert after == before / 4  # two steps, each of which halves it


def test_workers_that_part_are_noticed_by_all(results) -> None:
    for worker in results[2]:
        said = str(worker["parted"]["said"])
        assert said.startswith("here: the weights of worker 1 are not those of worker 0")
    assert not str(results[1][0]["parted"]["said"])


def test_a_stop_on_one_worker_is_a_stop_on_all(results) -> None:
    for count in (1, 2):
        for worker in results[count]:
            assert worker["stopped"]["stop"].tolist() == [False, True]


def test_meeting_often_makes_no_new_graphs(results) -> None:
    """One graph for each kind of thing that is gathered; one for each call stayed in memory and took seconds."""
    assert [int(worker["often"]["graphs"]) for worker in results[2]] == [3, 3]
