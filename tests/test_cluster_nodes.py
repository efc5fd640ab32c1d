"""Nodes that may work, paths that all nodes share, and reports of lost and new nodes. Ray is a stand-in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.autoscaler.sdk
from nodes import wait_until
from ray.data import DataContext

from ray_cxr import cluster, ray_api
from ray_cxr.errors import ConfigError, OutputError, RayCxrError

Nodes = list[dict[str, Any]]


def node(name: str, cpus: float, *, alive: bool = True, **labels: str) -> dict[str, Any]:
    """A node as `ray.nodes()` returns it; the head's name is "h"."""
    resources = {**({"CPU": cpus} if cpus else {}), **({cluster.HEAD: 1.0} if name == "h" else {})}
    facts = {"NodeManagerAddress": f"{name}.there", "Alive": alive, "Resources": resources}
    return {"NodeID": name, "Labels": {"ray.io/node-id": name, **labels}, **facts}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """The value of `ray.nodes()`, which the test changes."""
    current: Nodes = []
    monkeypatch.setattr(ray, "nodes", lambda: list(current))
    monkeypatch.setattr(cluster, "_POLL_S", 0.01)
    monkeypatch.setattr(cluster, "placement", cluster.Placement())
    monkeypatch.setattr(DataContext.get_current().execution_options, "label_selector", None)
    return current


@pytest.mark.parametrize(
    ("present", "on_head", "working"),
    [
        ([("h", 4)], None, ["h"]),
        ([("h", 4), ("a", 2)], None, ["a"]),
        ([("h", 0), ("a", 2), ("b", 2)], None, ["a", "b"]),
        ([("h", 4), ("a", 0)], None, ["h", "a"]),  # the other node has no CPU
        ([("h", 4), ("a", 2)], True, ["h", "a"]),
    ],
)
def test_head_works_only_where_it_is_alone_or_configured_to(
    present: list[tuple[str, int]], on_head: bool | None, working: list[str], nodes: Nodes
) -> None:
    nodes += [*(node(name, cpus) for name, cpus in present), node("dead", 8, alive=False)]
    cluster.select_nodes(on_head, {}, {})
    assert [node["NodeID"] for node in cluster.list_nodes()] == working
    selector = None if "h" in working else {"ray.io/node-id": "!h"}
    assert DataContext.get_current().execution_options.label_selector == selector
    assert cluster.placement.options == ({"label_selector": selector} if selector else {})


def test_idle_head(nodes: Nodes) -> None:
    nodes.append(node("h", 8))
    nodes[0]["Resources"]["GPU"] = 1.0
    with pytest.raises(ConfigError, match=r"^ray\.on_head=false: "):
        cluster.select_nodes(False, {}, {})
    nodes.append(node("a", 1))
    cluster.select_nodes(None, {}, {})
    assert "--set ray.on_head=true" in cluster.hint_at_unused("GPU")
    assert cluster.hint_at_unused("TPU") == ""
    cluster.select_nodes(True, {}, {})
    assert cluster.hint_at_unused("GPU") == ""


def test_folder_that_a_node_does_not_see_is_refused_by_its_option(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def query(sees: Callable[[str, str], bool]) -> list[list[str]]:
        """Let each node answer by the paths that it sees; return the names of the nodes of each query."""
        queried: list[list[str]] = []

        def ask(function: Any, nodes: Any, paths: dict[str, str]) -> Iterator[tuple[Any, list[str]]]:
            queried.append([node["NodeID"] for node in nodes])
            assert function(paths) == [], "the file exists during the query"
            for node in nodes:
                yield node, [name for name, path in paths.items() if not sees(node["NodeID"], path)]

        monkeypatch.setattr(cluster, "query_nodes", ask)
        return queried

    nodes += [node("h", 0), node("a", 2), node("b", 2)]
    cluster.select_nodes(None, {}, {})
    out, model = tmp_path / "out", tmp_path / "bundle"
    model.mkdir()
    queried = query(lambda name, path: name != "b")
    with pytest.raises(OutputError, match=rf"^--out {out}: .* the node b\.there"):
        cluster.require_shared(out)
    assert queried == [["a", "b"]], "the head does no work and need not see it"
    assert not list(out.iterdir()), "the probe file is removed"

    query(lambda name, path: path != str(model))
    with pytest.raises(OutputError, match=rf"^--model {model}: .* the node a\.there"):
        cluster.require_shared(out, {"--model": model, "--manifest": None, "images": "/none/here/either"})

    queried = query(lambda name, path: False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=f"^{tmp_path / 'file'}: "):
        cluster.require_shared(tmp_path / "file")
    nodes[:] = [node("h", 2), node("dead", 2, alive=False)]
    cluster.require_shared(out)
    assert not queried, "a single node shares its own disk"


def test_lost_and_new_nodes_are_reported(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    looks: list[None] = []
    nodes += [node("h", 0), node("aaaaaaaaaa", 2), node("bbbbbbbbbb", 2)]
    cluster.select_nodes(None, {}, {})
    monkeypatch.setattr(ray, "nodes", lambda: looks.append(None) or list(nodes))

    with cluster.log_node_changes("score", lines.append):
        wait_until(lambda: len(looks) >= 2, 60)
        nodes.pop()
        wait_until(lambda: len(lines) >= 1, 60)
        nodes.append(node("cccccccccc", 8))
        wait_until(lambda: len(lines) >= 2, 60)
        del nodes[1:]
        wait_until(lambda: len(lines) >= 4, 60)
    nodes.clear()
    time.sleep(0.1)
    assert len(lines) == 4, "one line per change, none after the end"
    assert lines[0].startswith("score: WARNING: the node bbbbbbbb is lost, 1 left, with 2 CPUs")
    assert lines[1] == "score: the node cccccccc has joined: 2 nodes with 10 CPUs"
    assert all("none is left" in line for line in lines[2:])


def test_cluster_without_a_worker_requests_one_and_waits(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[Any] = []
    lines: list[str] = []

    def request(bundles: list[Any], bundle_label_selectors: Any = None) -> None:
        requests.append(bundle_label_selectors)
        if bundles and cluster.JOIN_TIMEOUT_S:
            nodes.append(node("new", 4, **bundle_label_selectors[0]))

    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", request)
    nodes.append(node("h", 0))
    for _ in range(2):
        cluster.wait_for_node(None, {}, lines.append)
    assert requests == [[{}], None], "the request is withdrawn"
    assert len(lines) == 1

    monkeypatch.setattr(ray_api, "get_cluster_config", lambda: "an autoscaler")
    for _ in range(2):
        cluster.wait_for_node(None, {"market": "spot"}, lines.append)
    assert requests[2:] == [[{"market": "spot"}], None]
    assert len(lines) == 2
    assert "market=spot" in lines[1]

    monkeypatch.setattr(cluster, "JOIN_TIMEOUT_S", 0.0)
    nodes[:] = [node("h", 4)]
    with pytest.raises(RayCxrError, match="`ray status`"):
        cluster.wait_for_node(False, {}, lines.append)
    cluster.wait_for_node(None, {})  # by default a head alone may work


def test_nodes_with_other_labels_do_no_work(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes += [node("h", 0), node("a", 2, market="spot"), node("b", 2, market="on-demand"), node("c", 2)]
    for selector, working in (("spot", "a"), ("!spot", "bc"), ("in(spot, on-demand)", "ab"), ("!in(spot)", "bc")):
        cluster.select_nodes(None, {"market": selector}, {})
        assert "".join(node["NodeID"] for node in cluster.list_nodes()) == working
        context = DataContext.get_current().execution_options.label_selector
        assert context == cluster.placement.options["label_selector"] == {"market": selector, "ray.io/node-id": "!h"}
    nodes[1]["Resources"]["GPU"] = 1.0
    assert "ray.label_selector" in cluster.hint_at_unused("GPU")

    with pytest.raises(ConfigError, match=r"^ray\.label_selector=market=sopt: .*on-demand, spot"):
        cluster.select_nodes(None, {"market": "sopt"}, {})
    with pytest.raises(ConfigError, match=r"^ray\.prefer=market=sp ot: "):
        cluster.check_labels({"market": "spot"}, {"market": "sp ot"})
    monkeypatch.setattr(ray_api, "get_cluster_config", lambda: None)
    with pytest.raises(ConfigError, match="market=sopt"):  # at once, because no autoscaler can start such a node
        cluster.wait_for_node(None, {"market": "sopt"})


@pytest.mark.parametrize(
    ("required", "preferred"),
    [({"a": "b=c"}, {}), ({"zone": "in(a, b)"}, {"zone": "!b"}), ({}, {cluster.NODE_ID: "!b"})],
)
def test_selectors_that_would_not_hold_are_refused(required: dict[str, str], preferred: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"^ray\."):
        cluster.check_labels(required, preferred)


def test_a_required_node_is_the_only_one_that_works(nodes: Nodes) -> None:
    nodes += [node("h", 1), node("a", 2), node("b", 2)]
    for each in nodes:
        each["Labels"][cluster.NODE_ID] = each["NodeID"]
    cluster.select_nodes(None, {cluster.NODE_ID: "a"}, {})
    assert [each["NodeID"] for each in cluster.list_nodes()] == ["a"]


def test_processes_that_should_last_avoid_spot_machines(nodes: Nodes) -> None:
    nodes += [node("h", 4), node("a", 8, **{"ray.io/market-type": "on-demand"})]
    assert cluster.avoid_spot("CPU", 2, 1) == {}, "no machine is a spot machine"
    nodes.append(node("b", 64, **{"ray.io/market-type": "spot"}))
    assert cluster.avoid_spot("CPU", 2, 6) == {"ray.io/market-type": "!spot"}
    assert cluster.avoid_spot("CPU", 2, 7) == {}, "the others are too small"


def test_preferred_nodes_work_first_and_all_others_if_there_are_none(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    nodes += [node("h", 4), node("a", 2, market="spot"), node("b", 2)]
    cluster.select_nodes(None, {}, {"market": "spot"})
    assert [node["NodeID"] for node in cluster.list_nodes()] == ["a", "b"]
    assert cluster.placement.options == {
        "label_selector": {"ray.io/node-id": "!h", "market": "spot"},
        "fallback_strategy": [{"label_selector": {"ray.io/node-id": "!h"}}],
    }
    context = DataContext.get_current().execution_options.label_selector
    assert context == {"ray.io/node-id": "!h"}, "operators without a fallback must not wait for a lost node"
    assert not caplog.messages
    del nodes[1]
    cluster.select_nodes(None, {}, {"market": "spot"})
    assert "ray.prefer=market=spot" in caplog.text
