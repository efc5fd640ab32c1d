"""The nodes of the Ray that runs: which of them may work, and whether all of them see the same files.

The head of a cluster coordinates: its processes hold the state of every job, and a head that is out of memory or CPU
takes all of them with it. So nothing is decoded, trained or scored there, unless it is the only node that could.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_cxr.errors import ConfigError, OutputError, RayCxrError

logger = logging.getLogger(__name__)

Node = dict[str, Any]
#: The resource that Ray gives the head of a cluster, and the label that it gives every node.
HEAD, NODE_ID = "node:__internal_head__", "ray.io/node-id"
#: So many nodes are asked, and waited for so long: one that is just starting is slow.
ASKED, ANSWER_TIMEOUT_S = 32, 60.0
#: Seconds that a cluster without a node that may work is given to get one.
JOIN_TIMEOUT_S = 300.0
#: Seconds between looks at which nodes are there.
_LOOK_S = 2.0
#: Nodes that may work, as a label selector of Ray's; None: all. Of this process.
_where: dict[str, str] | None = None
#: Whether this process started the Ray that it uses, which then ends with it.
_own = False


def wait_for_work(on_head: bool | None, say: Callable[[str], None] = logger.warning) -> None:
    """Wait until a node with a CPU is there, and ask for one: a cluster that grows by demand may have none yet.

    Ray keeps one such request for a cluster: whoever made another by hand has to make it again afterwards.

    Raises:
        RayCxrError: none came in time.
    """
    if _with_cpu(on_head):
        return
    from ray.autoscaler.sdk import request_resources

    say("no node with a CPU has joined the cluster yet; waiting for one")
    request_resources(num_cpus=1)
    try:
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        while not _with_cpu(on_head):
            if time.monotonic() > deadline:
                raise RayCxrError(
                    f"the cluster has had no node that may work for {JOIN_TIMEOUT_S:.0f} s; see `ray status` there, "
                    "and whether its nodes reach the head's port"
                )
            time.sleep(_LOOK_S)
    finally:
        request_resources(bundles=[])


def _with_cpu(on_head: bool | None) -> list[Node]:
    nodes = [node for node in _alive() if node["Resources"].get("CPU", 0) >= 1]
    return [node for node in nodes if HEAD not in node["Resources"]] if on_head is False else nodes


def place_work(on_head: bool | None) -> None:
    """Say where work of this process may go; Ray Data's own options say so to every dataset.

    Args:
        on_head: whether the head works; None: where no other node has a CPU.

    Raises:
        ConfigError: the head must not, and there is no other node.
    """
    alive = _alive()
    heads = [node for node in alive if HEAD in node["Resources"]]
    others = [node for node in alive if HEAD not in node["Resources"] and node["Resources"].get("CPU", 0) >= 1]
    off = bool(heads and others) if on_head is None else not on_head
    if off and not others:
        raise ConfigError("ray.on_head=false: no other node has a CPU; leave it out, or let a node join")
    place_as({NODE_ID: f"!{heads[0]['NodeID']}"} if off and heads else None)

    from ray.data import DataContext

    DataContext.get_current().execution_options.label_selector = selector()


def exempt_from_proxies(hosts: Iterable[str]) -> dict[str, str]:
    """Reach hosts of the cluster without the proxy that `http_proxy` or `https_proxy` name.

    gRPC (TensorFlow's workers) and Ray's state API would send even traffic to this machine through the proxy. Other
    traffic of this process, and of processes that it starts, still uses the proxy.

    Returns:
        The variables of the environment that were set.
    """
    hosts = [host.strip("[]") for host in hosts if host]
    general = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    variables = {}
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):  # gRPC reads the last one first
        entries = [entry.strip() for entry in (os.environ.get(name) or general).split(",") if entry.strip()]
        if "*" not in entries:
            entries += [host for host in dict.fromkeys(hosts) if host not in entries]
        variables[name] = ",".join(entries)
    os.environ.update(variables)
    return variables


def set_own(own: bool) -> None:
    """Record whether this process started the Ray that it uses."""
    global _own
    _own = own


def is_own() -> bool:
    """Return whether this process started the Ray that it uses; no other process then uses that Ray."""
    return _own


def place_as(where: dict[str, str] | None) -> None:
    """Work that is no dataset's goes where another process of this command was told: what `selector` says there."""
    global _where
    _where = where


def selector() -> dict[str, str] | None:
    """Where work may go, as a label selector of Ray's; None: anywhere."""
    return _where


def working() -> list[Node]:
    """The nodes of `ray.nodes()` that are alive and may work."""
    not_this = (selector() or {}).get(NODE_ID, "").removeprefix("!")
    return [node for node in _alive() if node.get("NodeID") != not_this]


def head_hint(resource: str) -> str:
    """What to add to a line that says that this is lacking, where the head has it and may not work."""
    heads = [node for node in _alive() if HEAD in node["Resources"] and node["Resources"].get(resource, 0)]
    return f"; the head's {resource}s are used with --set ray.on_head=true alone" if selector() and heads else ""


def _alive() -> list[Node]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def ask(function: Callable[..., Any], nodes: Sequence[Node], *arguments: Any) -> Iterator[tuple[Node, Any]]:
    """What a function answers on each of these nodes; one that does not answer in time, or has gone, is left out.

    Args:
        function: must be nested in another, so that it travels by value and needs no ray_cxr to be run.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def there(node: Node) -> Any:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        return task.remote(*arguments)

    asked = {there(node): node for node in nodes[:ASKED]}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S) if asked else ([], [])
    for one in answered:
        # What is wrong with a node that stays, the work itself will meet.
        with contextlib.suppress(ray.exceptions.RayError):
            yield asked[one], ray.get(one)


def require_shared(out: str | Path, **inputs: str | Path | None) -> None:
    """Refuse folders that are not the same for all nodes; on a single node nothing is asked.

    Args:
        out: a folder, made where it is not there, in which a file is written and removed again; or a place in a bucket.
        inputs: other paths that workers open, by what a user calls them; what is not here either is left out.

    Raises:
        OutputError: a node that may work does not see one of them, or `out` cannot be written.
    """
    if len(_alive()) < 2:
        return

    def unseen(paths: Mapping[str, str]) -> list[str]:
        import os  # nested, see `ask`

        return [name for name, path in paths.items() if not os.path.exists(path)]

    local = {name: Path(path).absolute() for name, path in inputs.items() if path and "://" not in str(path)}
    wanted = {name: path for name, path in local.items() if path.exists()}
    probe = None
    try:
        if "://" not in str(out):
            local["--out"] = Path(out).absolute()
            probe = wanted["--out"] = local["--out"] / f".seen-{secrets.token_hex(8)}"
            try:
                local["--out"].mkdir(parents=True, exist_ok=True)
                probe.touch()
            except OSError as error:
                raise OutputError(f"{out}: cannot be written: {error.strerror}; name another --out") from None
        if not wanted:
            return
        for node, lacking in ask(unseen, working(), {name: str(path) for name, path in wanted.items()}):
            for name in lacking:
                raise OutputError(
                    f"{name} {local[name]}: the node {node['NodeManagerAddress']} does not see it, and every node "
                    "works on the same files: name a path on storage that all of them mount at the same place, or an "
                    "s3:// address"
                )
    finally:
        if probe is not None:
            with contextlib.suppress(OSError):
                probe.unlink()


@contextlib.contextmanager
def watched(what: str, say: Callable[[str], None] = logger.warning) -> Iterator[None]:
    """While the block runs, say which nodes go and come: Ray itself would wait for a lost one without a word.

    Args:
        what: the command, which begins each line.
        say: takes the lines.
    """
    over = threading.Event()

    def loop() -> None:
        known = {node["NodeID"] for node in working()}
        while not over.wait(_LOOK_S):
            try:
                nodes = working()
            except Exception:  # Ray itself is gone, and whoever works with it says so
                continue
            now, cpus = {node["NodeID"] for node in nodes}, sum(node["Resources"].get("CPU", 0) for node in nodes)
            for gone in known - now:
                rest = f"{len(now)} left, with {cpus:g} CPUs" if now else "none is left: waiting for one to join"
                say(f"{what}: WARNING: the node {gone[:8]} is lost, {rest}; what it had in work is done again")
            for new in now - known:
                say(f"{what}: the node {new[:8]} has joined: {len(now)} nodes with {cpus:g} CPUs")
            known = now

    thread = threading.Thread(target=loop, name="nodes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
