"""What the package uses of Ray Core, Ray Data and Ray Train that is private, deprecated or marked as alpha.

No other module imports such names. Subclasses elsewhere rely on private members of their Ray classes: `OptunaSearch`
in tuning/searcher.py, the trial controller in tuning/trial.py, and `JobConfig` in session.py.

Ray may change them in any minor version, so pyproject.toml holds Ray below the next one
(docs/decisions/0002-dependencies.md). tests/test_ray_api.py checks every name here against the installed Ray, and
states what fails without it. It also checks the environment variables of Ray that other modules set.

There is no logic here. Functions import Ray when they are called, because `session` sets its environment first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

#: In the folder of a run of Ray Train: its list of complete checkpoints.
CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
#: In this JSON object: the latest checkpoint, an object with the `metrics` that were reported with it.
LATEST_CHECKPOINT = "latest_checkpoint_result"
#: Loggers of Ray Data: one shows progress, the other gets the exceptions of lost tasks, which Ray Data skips.
PROGRESS_LOGGER = "ray.data._internal.progress"
LOSS_LOGGER = "ray.data._internal.execution.streaming_executor_state"


# ---------------------------------------------------------------- Ray Data


def map_rows(transform: Callable[..., Any], function: Any, remote_args: Mapping[str, int], **options: Any) -> Any:
    """Call `Dataset.map` or `flat_map` with options of Ray for its tasks (`max_retries`) or actors (`max_restarts`).

    Ray 2.60 deprecates both ways to pass such options, and removes them in 2.64. Its named parameters have no
    replacement for these.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args", category=Warning)
        return transform(function, ray_remote_args_fn=lambda: dict(remote_args), **options)


# ---------------------------------------------------------------- Ray Train


class TrainClasses(NamedTuple):
    """Classes of Ray Train.

    Attributes:
        trainer: the trainer that `training.backend` extends; it overrides `_create_default_callbacks` and
            `_register_sigint_handler`.
        helpers: two of its default callbacks, each of which starts a process: one serves Ray datasets, the other frees
            the resources of a run whose controller was killed.
        controller_callback: base class of callbacks that choose the nodes of the workers.
    """

    trainer: Any
    helpers: tuple[type, ...]
    controller_callback: Any


def load_train_classes() -> TrainClasses:
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    return TrainClasses(DataParallelTrainer, (DatasetsCallback, PlacementGroupCleanerCallback), ControllerCallback)


def get_preemption_info() -> Any:
    """Return what Ray Train knows of a machine of the run that goes away, or None; waits until all workers ask."""
    import ray.train

    return ray.train.get_preemption_info()


def report(metrics: dict[str, Any], checkpoint: Any, *, wait: bool, upload: Callable[[Any, str], Any]) -> None:
    """Report metrics and a checkpoint, or None, to Ray Train, and wait until all workers report.

    Without `wait`, `upload(checkpoint, name)` runs in another thread; checkpoints are uploaded one after the other. The
    end of the worker waits for the last of them. The local folder is removed after the upload.
    """
    import ray.train

    mode = ray.train.CheckpointUploadMode
    ray.train.report(
        metrics,
        checkpoint=checkpoint,
        checkpoint_upload_mode=mode.SYNC if wait else mode.ASYNC,
        checkpoint_upload_fn=upload,
        delete_local_checkpoint_after_upload=True,
    )


# ---------------------------------------------------------------- starting and joining Ray


def count_cpus() -> float:
    """Return the CPUs that a local Ray would use: the quota of a container, or the machine's."""
    from ray._private.utils import get_num_cpus

    return float(get_num_cpus(override_docker_cpu_warning=True))


def find_own_head() -> str:
    """Return HOST:PORT of the Ray that runs on this machine; raise ConnectionError if there is none."""
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address("auto"))


def explain_labels(selector: Mapping[str, str]) -> str | None:
    """Return what is wrong with the form of a label selector; None if nothing is."""
    from ray._private.label_utils import validate_label_selector

    return validate_label_selector(dict(selector))


def get_cluster_config() -> Any:
    """Return the configuration of the cluster's autoscaler; None without an autoscaler.

    Raises RaySystemError behind Ray's client.
    """
    import ray

    return ray._private.state.state.get_cluster_config()


def load_token() -> dict[str, str]:
    """Return the header with this machine's token for a cluster, empty without a token.

    Raises an exception of Ray if the file of RAY_AUTH_TOKEN_PATH is missing or empty.
    """
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # its stub lacks it

    return dict(AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True))


def call_head(channel: Any, headers: Mapping[str, str], timeout_s: float) -> None:
    """Send the cheapest request to a head through a channel of gRPC, which raises `grpc.RpcError` if it fails."""
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    stub, request = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel), gcs_service_pb2.GetClusterIdRequest()
    stub.GetClusterId(request, timeout=timeout_s, metadata=tuple(headers.items()))
