"""The names of Ray that it may change in any minor version: each exists in the installed Ray and behaves as needed.

The second value of each case is what fails without it. With another version of Ray, run this file first.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import ray.train
from ray._raylet import AuthenticationTokenLoader
from ray.data import DataContext, Dataset

from ray_cxr import cluster, ray_api, session
from ray_cxr.scoring import pool
from ray_cxr.training import backend

RAY = Path(ray.__file__).parent


def accepts(function: Callable[..., Any], *names: str) -> None:
    """Check that a function takes arguments of these names."""
    parameters = inspect.signature(function).parameters
    has_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    assert has_any or set(names) <= set(parameters)


def restart_limits() -> None:
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    for transform in (Dataset.map, Dataset.flat_map):
        kinds = {parameter.kind for parameter in inspect.signature(transform).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD in kinds
    given = {"max_restarts": 7, "max_task_retries": 0}
    applied = ActorPoolMapOperator._apply_default_remote_args(given, DataContext.get_current())
    assert given.items() <= applied.items()


def trainer() -> None:
    from ray.train.v2._internal.execution.controller import TrainController

    base = ray_api.load_train_classes().trainer
    for name in ("_create_default_callbacks", "_register_sigint_handler", "fit"):
        ours, theirs = (inspect.signature(getattr(owner, name)).parameters for owner in (backend.Trainer, base))
        assert list(ours) == list(theirs)
    source = inspect.getsource(base)
    assert all(f"self.{name}(" in source for name in ("_create_default_callbacks", "_register_sigint_handler"))
    assert all(f"{one.__name__}(" in source for one in ray_api.load_train_classes().helpers)
    assert callable(TrainController.abort)


def worker_group() -> None:
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

    accepts(WorkerGroup.execute, "fn")
    accepts(WorkerGroup.execute_single_async, "rank", "fn")


def uploads() -> None:
    from ray.train.v2._internal.execution.context import MAX_CHECKPOINT_UPLOAD_THREADS

    assert {"SYNC", "ASYNC"} <= set(ray.train.CheckpointUploadMode.__members__)
    accepts(ray.train.report, "checkpoint_upload_mode", "delete_local_checkpoint_after_upload")
    assert MAX_CHECKPOINT_UPLOAD_THREADS == 1


def checkpoint_list() -> None:
    from ray.train.v2._internal import constants
    from ray.train.v2._internal.execution.checkpoint import checkpoint_manager

    assert constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME == ray_api.CHECKPOINT_LIST
    assert ray_api.LATEST_CHECKPOINT in checkpoint_manager._CheckpointManagerState.model_fields
    assert "metrics" in checkpoint_manager._TrainingResultState.model_fields


def loggers() -> None:
    assert importlib.import_module(ray_api.LOSS_LOGGER).logger.name == ray_api.LOSS_LOGGER
    assert importlib.util.find_spec(ray_api.PROGRESS_LOGGER)


def data_context() -> None:
    context = DataContext()
    names = ["execution_no_progress_timeout_s", "raise_original_map_exception", "enable_progress_bars"]
    for owner, name in [(context, name) for name in [*names, "max_errored_blocks"]] + [
        (context.execution_options, "label_selector"),
        (context.autoscaling_config, "actor_pool_util_upscaling_threshold"),
        (context.autoscaling_config, "actor_pool_util_downscaling_threshold"),
    ]:
        assert hasattr(owner, name), name


def head() -> None:
    channel = Mock()
    ray_api.call_head(channel, {"authorization": "Bearer t"}, 1.5)
    called = channel.unary_unary.return_value
    assert called.call_args.kwargs == {"timeout": 1.5, "metadata": (("authorization", "Bearer t"),)}
    assert "/ray.rpc.NodeInfoGcsService/GetClusterId" in {one.args[0] for one in channel.unary_unary.call_args_list}


def own_head() -> None:
    from ray._private import services

    accepts(services.canonicalize_bootstrap_address, "addr")


def names_of_nodes() -> None:
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    assert HEAD_NODE_RESOURCE_NAME == cluster.HEAD
    assert ray._raylet.RAY_NODE_ID_KEY == cluster.NODE_ID


CASES: list[tuple[Callable[[], None], str]] = [
    (restart_limits, "an actor restarts without limit, and a lost task waits for its own actor, maybe forever"),
    (trainer, "every start of a run takes four seconds more of a core, and Ctrl-C ends without a message"),
    (worker_group, "workers have no TF_CONFIG, and train does not start"),
    (uploads, "training waits for uploads, or checkpoints become visible in another order"),
    (checkpoint_list, "train starts again from the first epoch instead of the last checkpoint"),
    (loggers, "tracebacks of lost tasks fill the terminal, and an error does not name their cause"),
    (data_context, "score ends after 30 minutes without a file, or with the first lost actors"),
    (head, "a cluster with another token accepts a command, whose tasks never start"),
    (own_head, "ray.address=auto fails"),
    (names_of_nodes, "the head of a cluster works, and may run out of memory"),
    (lambda: accepts(ray.train.get_preemption_info), "a reclaimed machine costs all steps since the last checkpoint"),
    (lambda: None if ray_api.count_cpus() > 0 else pytest.fail("no CPU"), "a container uses more CPUs than it has"),
]


@pytest.mark.parametrize(("check", "loss"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_ray_has_what_the_package_needs(check: Callable[[], None], loss: str) -> None:
    try:
        check()
    except Exception as error:
        pytest.fail(f"Ray {ray.__version__}: {loss}: {error!r}")


def test_token_of_this_machine_is_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "mine")
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        assert ray_api.load_token() == {"authorization": "Bearer mine"}
    finally:
        monkeypatch.undo()
        AuthenticationTokenLoader.instance().reset_cache()


#: Variables that other modules set than `session`.
OTHER_VARIABLES = ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_TRAIN_V2_ENABLED", "RAY_OVERRIDE_JOB_RUNTIME_ENV"]
TUNE_VARIABLES = ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "RAY_AIR_NEW_OUTPUT", "TUNE_DISABLE_STRICT_METRIC_CHECKING"]


def test_ray_reads_the_variables_that_commands_set() -> None:
    """Ray ignores an unknown variable silently. Its C++ part reads RAY_x for its option x."""
    names = {*session.OWN_RAY, *session._build_address_variables(), *OTHER_VARIABLES, *TUNE_VARIABLES}
    files = [RAY / "_raylet.so", *RAY.glob("_private/*.py"), *RAY.glob("_common/usage/*.py")]
    files += [RAY / "train/v2/_internal/constants.py", RAY / "tune/constants.py", RAY / "tune/tune.py"]
    text = b"\n".join(path.read_bytes() for path in files)
    options = {name for name in names if name.removeprefix("RAY_").islower()}
    assert [name for name in names - options if name.encode() not in text] == []
    assert [name for name in options if name.removeprefix("RAY_").encode() not in text] == []


class DyingActor(pool.PoolActor):
    """An actor whose process ends in each of the first four tasks."""

    def open(self, log: str, cpus: int) -> None:
        self.log = Path(log)
        self.write(f"start of {ray.get_runtime_context().get_actor_id()}")

    def write(self, line: str) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def run(self, row: Mapping[str, Any]) -> Any:
        self.write(f"task {row['i']}")
        if row["i"] < 4:
            os._exit(1)
        return pool.TaskResult([row["i"]])


@pytest.mark.ray
@pytest.mark.long
def test_a_killed_actor_restarts_and_its_task_is_not_repeated(shared_ray: None, tmp_path: Path) -> None:
    """With Ray's defaults, the first task would kill the actor again and again, without an end."""
    rows = [{"i": i, "indices": [i]} for i in range(8)]
    plan = pool.ActorPlan(1, cpus=1, in_flight=1)
    dataset = pool.build_dataset(rows, DyingActor, {"log": str(tmp_path / "log")}, plan)
    done = [index for row in dataset.iter_rows() for index in row["done"]]
    assert sorted(done) == [4, 5, 6, 7]
    lines = Counter((tmp_path / "log").read_text(encoding="utf-8").splitlines())
    starts = [lines.pop(line) for line in list(lines) if line.startswith("start")]
    assert lines == {f"task {i}": 1 for i in range(8)}
    # Ray Data may add an actor. The run can end before the last restart.
    assert 2 <= sum(starts) - len(starts) <= 4, "a lost process is a restart of the same actor"
