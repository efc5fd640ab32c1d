"""The nodes of the current Ray: which of them may work, and whether all of them see the same files.

The head of a cluster holds the state of every job. If it runs out of memory or CPU, all jobs fail, so it decodes,
trains and scores nothing unless it is the only node with a CPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_cxr.errors import ConfigError, OutputError, RayCxrError
from ray_cxr.progress import run_periodically

logger = logging.getLogger(__name__)

Node = dict[str, Any]
#: Ray's resource that only the head of a cluster has, and Ray's label with the id of a node.
HEAD, NODE_ID = "node:__internal_head__", "ray.io/node-id"
#: A query goes to at most 32 nodes. It waits 60 s for their answers, because a node that is just starting is slow.
MAX_QUERIED, ANSWER_TIMEOUT_S = 32, 60.0
#: Seconds to wait for a first node that may work.
JOIN_TIMEOUT_S = 300.0
#: Seconds between two checks of the list of nodes.
_POLL_S = 2.0
#: Ray's label selector of the nodes that may work; None: all nodes. The processes of a command share it.
selector: dict[str, str] | None = None
#: Whether this process started the Ray that it uses. No other process then uses that Ray.
owns_ray = False


def wait_for_node(on_head: bool | None, on_event: Callable[[str], None] = logger.warning) -> None:
    """Wait until a node with a CPU has joined. Request one, because an autoscaling cluster may have none yet.

    Ray keeps one request per cluster, so this request replaces one that the user made.
    """

    def has_node() -> bool:
        nodes = [node for node in list_alive() if node["Resources"].get("CPU", 0) >= 1]
        return any(HEAD not in node["Resources"] for node in nodes) if on_head is False else bool(nodes)

    if has_node():
        return
    from ray.autoscaler.sdk import request_resources

    on_event("no node with a CPU has joined the cluster yet; waiting for one")
    request_resources(num_cpus=1)
    try:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while not has_node():
            if time.monotonic() > deadline:
                raise RayCxrError(
                    f"the cluster has had no node that may work for {JOIN_TIMEOUT_S:.0f} s; see `ray status` there, "
                    "and check that its nodes reach the head's port"
                )
            time.sleep(_POLL_S)
    finally:
        request_resources(bundles=[])


def select_nodes(on_head: bool | None) -> None:
    """Choose the nodes on which this process's tasks, actors and datasets may run.

    If `on_head` is None, the head works only if no other node has a CPU.
    """
    global selector
    alive = list_alive()
    heads = [node for node in alive if HEAD in node["Resources"]]
    others = [node for node in alive if HEAD not in node["Resources"] and node["Resources"].get("CPU", 0) >= 1]
    exclude_head = bool(heads and others) if on_head is None else not on_head
    if exclude_head and not others:
        raise ConfigError("ray.on_head=false: no other node has a CPU; omit it, or let a node join")
    selector = {NODE_ID: f"!{heads[0]['NodeID']}"} if exclude_head and heads else None

    from ray.data import DataContext

    DataContext.get_current().execution_options.label_selector = selector


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
    excluded = (selector or {}).get(NODE_ID, "").removeprefix("!")
    return [node for node in list_alive() if node.get("NodeID") != excluded]


def list_alive() -> list[Node]:
    """Return the nodes of `ray.nodes()` that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def hint_at_head(resource: str) -> str:
    """Return a hint if the head has a resource but may not work, else ''; an error about the resource ends with it."""
    heads = [node for node in list_alive() if HEAD in node["Resources"] and node["Resources"].get(resource, 0)]
    return f"; the head's {resource}s are used with --set ray.on_head=true alone" if selector and heads else ""


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
