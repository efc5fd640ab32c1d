"""The nodes of the current Ray: which of them may work, and whether all of them see the same files.

The head of a cluster holds the state of every job. If it runs out of memory or CPU, all jobs fail, so it decodes,
trains and scores nothing unless it is the only node with a CPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_cxr import ray_api
from ray_cxr.errors import ConfigError, OutputError, RayCxrError
from ray_cxr.progress import run_periodically

logger = logging.getLogger(__name__)

Node = dict[str, Any]
#: Labels of nodes, or a label selector of Ray.
Labels = Mapping[str, str]
#: Ray's resource that only the head of a cluster has, and Ray's label with the id of a node.
HEAD, NODE_ID = "node:__internal_head__", "ray.io/node-id"
#: Ray's label of machines that a cloud can reclaim, negated.
NOT_SPOT = {"ray.io/market-type": "!spot"}
#: A query goes to at most 32 nodes. It waits 60 s for their answers, because a node that is just starting is slow.
MAX_QUERIED, ANSWER_TIMEOUT_S = 32, 60.0
#: Seconds to wait for a first node that may work.
JOIN_TIMEOUT_S = 300.0
#: Seconds between two checks of the list of nodes.
_POLL_S = 2.0
#: Whether this process started the Ray that it uses. No other process then uses that Ray.
owns_ray = False


@dataclass(frozen=True)
class Placement:
    """The nodes for the tasks and actors of a command, as label selectors of Ray; empty: all nodes.

    Attributes:
        required: labels of the nodes that may work.
        preferred: labels of those of them that work first; the others work when these are busy or lost.
    """

    required: Labels = field(default_factory=dict)
    preferred: Labels = field(default_factory=dict)

    @property
    def first_choice(self) -> dict[str, str]:
        """Return the label selector of the preferred nodes."""
        return {**self.required, **self.preferred}

    @property
    def options(self) -> dict[str, Any]:
        """Return the options of Ray that place a task, an actor or an operator of Ray Data."""
        if not self.preferred:
            return {"label_selector": dict(self.required)} if self.required else {}
        return {
            "label_selector": self.first_choice,
            "fallback_strategy": [{"label_selector": dict(self.required)}],
        }


#: The processes of a command share it.
placement = Placement()


def has_labels(node: Node, selector: Labels) -> bool:
    """Return whether a node matches Ray's label selector, whose values are `a`, `!a`, `in(a, b)` or `!in(a, b)`."""
    for key, expression in selector.items():
        positive = expression.removeprefix("!")
        values = re.split(", ?", positive[positive.find("(") + 1 : -1]) if positive.endswith(")") else [positive]
        if (node["Labels"].get(key) in values) != (positive == expression):
            return False
    return True


def check_labels(required: Labels, preferred: Labels) -> None:
    """Raise ConfigError if a label selector is not in Ray's form, or if the two of them use one label."""
    for name, labels in (("label_selector", required), ("prefer", preferred)):
        if any("=" in value for value in labels.values()):
            raise ConfigError(f"ray.{name}={_format(labels)}: write LABEL=VALUE, LABEL=!VALUE or LABEL=in(A, B)")
        if problem := ray_api.explain_labels(labels):
            raise ConfigError(f"ray.{name}={_format(labels)}: {problem}")
    if both := required.keys() & preferred.keys():
        raise ConfigError(f"ray.prefer: {min(both)} is in ray.label_selector too; use each label in one of them")
    if NODE_ID in preferred:
        raise ConfigError(f"ray.prefer: {NODE_ID} cannot be preferred; require it with ray.label_selector")


def wait_for_node(on_head: bool | None, required: Labels, on_event: Callable[[str], None] = logger.warning) -> None:
    """Wait until a node that may work has joined. Request one, because an autoscaling cluster may have none yet.

    Ray keeps one request per cluster, so this request replaces one that the user made.

    Raises:
        ConfigError: No node has the required labels, and the cluster does not start nodes itself.
        RayCxrError: No such node has joined for `JOIN_TIMEOUT_S`.
    """
    if _find_workers(on_head, required):
        return
    from ray.autoscaler.sdk import request_resources

    if required and not _has_autoscaler():
        raise ConfigError(_explain_labels(required))
    wanted = "a CPU" + (f" and the labels {_format(required)}" if required else "")
    on_event(f"no node with {wanted} has joined the cluster yet; waiting for one")
    request_resources(bundles=[{"CPU": 1}], bundle_label_selectors=[dict(required)])
    try:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while not _find_workers(on_head, required):
            if time.monotonic() > deadline:
                raise RayCxrError(
                    f"the cluster has had no node with {wanted} for {JOIN_TIMEOUT_S:.0f} s; see `ray status` there, "
                    "and check that its nodes reach the head's port"
                )
            time.sleep(_POLL_S)
    finally:
        request_resources(bundles=[])


def select_nodes(on_head: bool | None, required: Labels, preferred: Labels) -> None:
    """Choose the nodes on which this process's tasks, actors and datasets may run.

    If `on_head` is None, the head works only if no other node has a CPU.

    Raises:
        ConfigError: No node may work.
    """
    global placement
    from ray.data import DataContext

    workers = _find_workers(on_head, required)
    if required and not workers:
        raise ConfigError(_explain_labels(required))
    if on_head is False and not workers:
        raise ConfigError("ray.on_head=false: no other node has a CPU; omit it, or let a node join")
    head = next((node for node in list_alive() if HEAD in node["Resources"]), None)
    if head and workers and head not in workers and on_head is not True and NODE_ID not in required:
        required = {**required, NODE_ID: f"!{head['NodeID']}"}
    placement = Placement(required, preferred)
    if preferred and not any(has_labels(node, preferred) for node in list_nodes()):
        logger.warning("ray.prefer=%s: no node has these labels now, so all nodes may work", _format(preferred))
    DataContext.get_current().execution_options.label_selector = dict(required) or None


def _has_autoscaler() -> bool:
    """Return whether the cluster can start nodes; also if that is unknown, as behind Ray's client."""
    import ray

    try:
        return ray_api.get_cluster_config() is not None
    except ray.exceptions.RaySystemError:
        return True


def _find_workers(on_head: bool | None, required: Labels) -> list[Node]:
    """Return the nodes with a CPU that may work."""
    nodes = [node for node in list_alive() if node["Resources"].get("CPU", 0) >= 1]
    others = [node for node in nodes if HEAD not in node["Resources"]]
    allowed = others if on_head is False or (on_head is None and others) else nodes
    return [node for node in allowed if has_labels(node, required)]


def _format(labels: Labels) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


def _explain_labels(required: Labels) -> str:
    """Return an error about labels that no node with a CPU has."""
    nodes = list_alive()
    found = (f"{key}: {', '.join(sorted({node['Labels'].get(key, 'none') for node in nodes}))}" for key in required)
    return (
        f"ray.label_selector={_format(required)}: no node that may work has a CPU and these labels; the nodes have "
        f"{'; '.join(found)}. Change it, or let a node with these labels join"
    )


@contextlib.contextmanager
def set_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs, and restore them after it."""
    saved = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def bypass_proxies(hosts: Iterable[str]) -> dict[str, str]:
    """Exempt hosts from the proxy of `http_proxy` and `https_proxy`; return the environment variables that do so.

    Otherwise gRPC (TensorFlow's workers) and Ray's state API send even local traffic through the proxy.
    """
    hosts = [host.strip("[]") for host in hosts if host]
    general = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    variables = {}
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):  # gRPC prefers the last one
        entries = [entry.strip() for entry in (os.environ.get(name) or general).split(",") if entry.strip()]
        if "*" not in entries:
            entries += [host for host in dict.fromkeys(hosts) if host not in entries]
        variables[name] = ",".join(entries)
    os.environ.update(variables)
    return variables


def list_nodes() -> list[Node]:
    """Return the nodes of `ray.nodes()` that are alive and may work."""
    return [node for node in list_alive() if has_labels(node, placement.required)]


def group_nodes() -> tuple[list[Node], list[Node]]:
    """Return the nodes of `list_nodes` that work first, and the others."""
    nodes = list_nodes()
    first = [node for node in nodes if has_labels(node, placement.preferred)]
    return first, [node for node in nodes if node not in first]


def list_alive() -> list[Node]:
    """Return the nodes of `ray.nodes()` that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def avoid_spot(resource: str, amount: float, count: int) -> dict[str, str]:
    """Return a label selector of Ray for processes that should outlive spot machines.

    It is empty if there are no spot machines, or if the others cannot hold `count` processes of `amount` each.
    """
    nodes = list_alive()
    lasting = [node for node in nodes if has_labels(node, NOT_SPOT)]
    capacity = sum(node["Resources"].get(resource, 0) // amount for node in lasting)
    return dict(NOT_SPOT) if len(lasting) < len(nodes) and capacity >= count else {}


def hint_at_unused(resource: str) -> str:
    """Return why nodes with a resource may not work, or ''; an error about the resource ends with it."""
    unused = [node for node in list_alive() if node["Resources"].get(resource, 0) and node not in list_nodes()]
    if any(HEAD not in node["Resources"] for node in unused):
        return f"; nodes with {resource}s lack the labels of ray.label_selector"
    return f"; the head's {resource}s are used with --set ray.on_head=true alone" if unused else ""


def query_nodes(function: Callable[..., Any], nodes: Sequence[Node], *arguments: Any) -> Iterator[tuple[Node, Any]]:
    """Run a function on each node; yield each node with the result, except nodes that are lost or too slow.

    The function must be nested in another function. Ray then sends its code, so the node needs no ray_cxr.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def submit(node: Node) -> Any:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        return task.remote(*arguments)

    queries = {submit(node): node for node in nodes[:MAX_QUERIED]}
    finished, _ = ray.wait(list(queries), num_returns=len(queries), timeout=ANSWER_TIMEOUT_S) if queries else ([], [])
    for query in finished:
        # If a node is faulty for longer, the command's own tasks fail there too.
        with contextlib.suppress(ray.exceptions.RayError):
            yield queries[query], ray.get(query)


def require_shared(out: str | Path, paths: Mapping[str, str | Path | None] | None = None) -> None:
    """Refuse folders that are not the same on all nodes; with a single node, do nothing.

    Args:
        out: The output folder, or an address in a bucket. A folder is made if missing; a probe file is written there
            and removed.
        paths: Other paths that workers open, by their labels in an error message. Paths that do not exist on this
            machine are ignored.
    """
    if len(list_alive()) < 2:
        return

    def find_missing(paths: Mapping[str, str]) -> list[str]:
        import os  # nested, see `query_nodes`

        return [name for name, path in paths.items() if not os.path.exists(path)]

    local = {label: Path(path).absolute() for label, path in (paths or {}).items() if path and "://" not in str(path)}
    expected = {label: path for label, path in local.items() if path.exists()}
    probe = None
    try:
        if "://" not in str(out):
            local["--out"] = Path(out).absolute()
            probe = expected["--out"] = local["--out"] / f".seen-{secrets.token_hex(8)}"
            try:
                local["--out"].mkdir(parents=True, exist_ok=True)
                probe.touch()
            except OSError as error:
                raise OutputError(f"{out}: cannot be written: {error.strerror}; choose another --out") from None
        if not expected:
            return
        texts = {name: str(path) for name, path in expected.items()}
        for node, missing in query_nodes(find_missing, list_nodes(), texts):
            for name in missing:
                raise OutputError(
                    f"{name} {local[name]}: not found on the node {node['NodeManagerAddress']}; every node needs the "
                    "same files: use storage that all nodes mount at the same path, or an s3:// address"
                )
    finally:
        if probe is not None:
            with contextlib.suppress(OSError):
                probe.unlink()


@contextlib.contextmanager
def log_node_changes(command: str, on_event: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """Log which nodes leave and join while the block runs; Ray itself waits for a lost node without a message."""
    known = {node["NodeID"] for node in list_nodes()}

    def compare() -> None:
        nonlocal known
        try:
            nodes = list_nodes()
        except Exception:  # Ray itself is lost; the block's own calls raise that error
            return
        current, cpus = {node["NodeID"] for node in nodes}, sum(node["Resources"].get("CPU", 0) for node in nodes)
        for lost in known - current:
            rest = f"{len(current)} left, with {cpus:g} CPUs" if current else "none is left: waiting for one to join"
            on_event(f"{command}: WARNING: the node {lost[:8]} is lost, {rest}; its unfinished work is done again")
        for new in current - known:
            on_event(f"{command}: the node {new[:8]} has joined: {len(current)} nodes with {cpus:g} CPUs")
        known = current

    with run_periodically(compare, _POLL_S, "nodes"):
        yield
