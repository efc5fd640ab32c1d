"""Two real worker processes against each other and against one: the promises of data-parallel training, bit for bit."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from workers import N_TRAIN, N_VAL

# The marker `ray` stands for three processes with TensorFlow; Ray itself is not used.
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
Arrays = dict[str, np.ndarray]
#: The rows that `plain` read.
READS = ("trained", "validated")


def free_ports(count: int) -> list[str]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


def read_scenarios(path: Path) -> dict[str, Arrays]:
    scenarios: dict[str, Arrays] = {}
    with np.load(path) as arrays:
        for key in arrays:
            scenario, _, name = key.partition("/")
            scenarios.setdefault(scenario, {})[name] = arrays[key]
    return scenarios


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Arrays]]]:
    """The arrays that `workers.py` saved, by number of workers, rank and scenario. All three processes run at once."""
    out, ports = tmp_path_factory.mktemp("workers"), free_ports(3)
    program = [sys.executable, str(Path(__file__).with_name("workers.py")), str(out)]
    processes = [
        subprocess.Popen([*program, *rank_and_ports], stderr=subprocess.PIPE, text=True)
        for rank_and_ports in (["0", *ports[:2]], ["1", *ports[:2]], ["0", ports[2]])
    ]
    try:
        # The limit is the proof that nothing hangs.
        logs = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, log[-4000:]
    return {count: [read_scenarios(out / f"{count}-{rank}.npz") for rank in range(count)] for count in (1, 2)}


@pytest.mark.parametrize("scenario", ["plain", "clipped", "padded", "unsynchronised", "overflow"])
def test_weights_and_optimizer_state_have_the_same_bits_on_both_workers(results, scenario: str) -> None:
    one, other = (worker[scenario] for worker in results[2])
    names = set(one) - {"own statistics", *READS}
    assert sum(name.startswith("model ") for name in names) > 10
    assert sum(name.startswith("optimizer ") for name in names) >= 3
    for name in names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("scenario", ["plain", "clipped", "padded"])
def test_two_workers_take_the_steps_of_one(results, scenario: str) -> None:
    """The same global batches give the same weights and predictions, to 1e-5 of each tensor's size."""
    together, alone = results[2][0][scenario], results[1][0][scenario]
    assert set(together) == set(alone)
    for name in set(alone) - set(READS):
        expected = alone[name]
        if np.issubdtype(expected.dtype, np.floating):
            scale = max(float(np.abs(expected).max()), 1e-30)
            assert np.abs(together[name] - expected).max() / scale < 1e-5, name


def test_statistics_and_weights_are_averaged(results) -> None:
    """Statistics differ between workers before it; otherwise the equal bits above would show nothing about it."""
    one, other = (worker["unsynchronised"]["own statistics"] for worker in results[2])
    assert np.abs(one - other).max() > 1e-6
    arrays = results[2][0]["unsynchronised"]
    name = next(name for name in arrays if name.startswith("averaged") and name.endswith("tiny_conv0/kernel"))
    assert np.abs(arrays[name] - arrays[name.replace("averaged", "model")]).max() > 1e-5


@pytest.mark.parametrize("count", [1, 2])
def test_every_image_is_read_exactly_once(results, count: int) -> None:
    """The rows that the workers read, step by step and rank by rank; padding repeats rows of the last batch."""
    trained, validated = (
        np.concatenate([worker["plain"][name].reshape(-1, 8 // count) for worker in results[count]], axis=1).ravel()
        for name in READS
    )
    assert sorted(trained[:N_TRAIN]) == list(range(N_TRAIN)) != trained[:N_TRAIN].tolist()
    assert (len(trained), validated[:N_VAL].tolist()) == (32, list(range(N_VAL)))
    assert set(trained[N_TRAIN:]) <= set(trained[24:N_TRAIN])
    np.testing.assert_array_equal(trained, results[1][0]["plain"]["trained"], "the order depends on the worker count")


def test_an_overflow_on_one_worker_skips_the_step_on_both(results) -> None:
    """Keras decides before gradients are summed: under its own loss scaling one worker would wait for the other."""
    for worker in results[2]:
        assert worker["overflow"]["moved"] == 0.0
        before, after = worker["overflow"]["scale"]
        assert after == before / 4  # two steps, each of which halves it


def test_all_workers_learn_of_a_stop_and_of_different_weights(results) -> None:
    for worker in results[2]:
        assert worker["exchanges"]["stops"].tolist() == [False, True]
        assert str(worker["exchanges"]["message"]).startswith("here: the weights of worker 1 are not those of worker 0")
        # One graph for each kind of exchange: one for each call would stay in memory and take seconds.
        assert worker["exchanges"]["graphs"] == 3
