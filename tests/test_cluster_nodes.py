"""Which nodes may work, whether all see the same files, and what is said of those that go. Ray is a stand-in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.autoscaler.sdk
from ray.data import DataContext

from ray_cxr import cluster
from ray_cxr.errors import ConfigError, OutputError, RayCxrError


def node(name: str, cpus: float, *, head: bool = False, alive: bool = True) -> dict[str, Any]:
    resources = {**({"CPU": cpus} if cpus else {}), **({cluster.HEAD: 1.0} if head else {})}
    return {"NodeID": name, "NodeManagerAddress": f"{name}.there", "Alive": alive, "Resources": resources}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What `ray.nodes()` gives, to be changed by the test."""
    there: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "nodes", lambda: list(there))
    before = DataContext.get_current().execution_options.label_selector
    yield there
    cluster.place_as(None)
    DataContext.get_current().execution_options.label_selector = before


@pytest.mark.parametrize(
    ("there", "on_head", "work"),
    [
        ([("h", 4)], None, ["h"]),
        ([("h", 4)], True, ["h"]),
        ([("h", 4), ("a", 2)], None, ["a"]),
        ([("h", 0), ("a", 2), ("b", 2)], None, ["a", "b"]),
        ([("h", 4), ("a", 0)], None, ["h", "a"]),  # the other one could not do anything
        ([("h", 4), ("a", 2)], True, ["h", "a"]),
        ([("h", 4), ("a", 2)], False, ["a"]),
    ],
)
def test_the_head_works_only_where_it_is_alone_or_told_to(
    there: list[tuple[str, int]], on_head: bool | None, work: list[str], nodes: list[dict[str, Any]]
) -> None:
    nodes += [node(name, cpus, head=name == "h") for name, cpus in there]
    nodes.append(node("dead", 8, alive=False))
    cluster.place_work(on_head)
    assert [one["NodeID"] for one in cluster.working()] == work
    off = None if "h" in work else {"ray.io/node-id": "!h"}
    assert cluster.selector() == off
    assert DataContext.get_current().execution_options.label_selector == off, "Ray Data is told as well"


def asks(seen_by: Callable[[str, str], bool], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let each node answer by what it sees; gives which nodes were asked."""
    asked: list[list[str]] = []

    def ask(function: Any, nodes: Any, paths: dict[str, str]) -> Iterator[tuple[Any, list[str]]]:
        asked.append([one["NodeID"] for one in nodes])
        assert function(paths) == [], "the file is there while the nodes are asked"
        for one in nodes:
            yield one, [name for name, path in paths.items() if not seen_by(one["NodeID"], path)]

    monkeypatch.setattr(cluster, "ask", ask)
    return asked


def test_a_folder_that_a_node_does_not_see_is_refused(
    nodes: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes += [node("h", 0, head=True), node("a", 2), node("b", 2)]
    cluster.place_work(None)
    asked = asks(lambda name, path: name != "b", monkeypatch)
    with pytest.raises(
        OutputError, match=rf"--out {tmp_path}: the node b\.there does not see it.* or an s3:// address"
    ):
        cluster.require_shared(tmp_path)
    assert asked == [["a", "b"]], "the head, which does no work, need not see it"
    assert not list(tmp_path.iterdir()), "what was written to be seen is gone again"


def test_inputs_are_asked_for_by_their_names(
    nodes: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes += [node("h", 0, head=True), node("a", 2)]
    cluster.place_work(None)
    model = tmp_path / "bundle"
    model.mkdir()
    asks(lambda name, path: path != str(model), monkeypatch)
    with pytest.raises(OutputError, match=rf"--model {model}: the node a\.there does not see it"):
        cluster.require_shared(tmp_path, **{"--model": model, "--manifest": None, "pictures": "/none/here/either"})


def test_a_single_node_is_not_asked(
    nodes: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes += [node("h", 2, head=True), node("dead", 2, alive=False)]
    asked = asks(lambda name, path: False, monkeypatch)
    cluster.require_shared(tmp_path)
    assert not asked


def test_nodes_that_go_and_come_are_said(nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_LOOK_S", 0.01)
    said: list[str] = []

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 10
        while len(said) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(said) == count

    nodes += [node("h", 0, head=True), node("aaaaaaaaaa", 2), node("bbbbbbbbbb", 2)]
    cluster.place_work(None)
    with cluster.watched("score", said.append):
        time.sleep(0.1)
        nodes.pop()
        wait_for(1)
        nodes.append(node("cccccccccc", 8))
        wait_for(2)
        del nodes[1:]
        wait_for(4)
    assert said[0] == (
        "score: WARNING: the node bbbbbbbb is lost, 1 left, with 2 CPUs; what it had in work is done again"
    )
    assert said[1] == "score: the node cccccccc has joined: 2 nodes with 10 CPUs"
    assert all("none is left: waiting for one to join" in line for line in said[2:])
    nodes.clear()
    time.sleep(0.1)
    assert len(said) == 4, "over is over"


def test_a_cluster_without_a_worker_gets_time_and_is_asked_for_one(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_LOOK_S", 0.01)
    requests: list[dict[str, Any]] = []

    def request(**what: Any) -> None:
        requests.append(what)
        if what == {"num_cpus": 1}:
            nodes.append(node("new", 4))

    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", request)
    said: list[str] = []
    nodes.append(node("h", 0, head=True))
    cluster.wait_for_work(None, said.append)
    assert said == ["no node with a CPU has joined the cluster yet; waiting for one"]
    assert requests == [{"num_cpus": 1}, {"bundles": []}], "what was asked for is let go of"
    cluster.wait_for_work(None, said.append)
    assert len(said) == 1


def test_a_cluster_that_stays_without_one_is_one_line(
    nodes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_LOOK_S", 0.01)
    monkeypatch.setattr(cluster, "JOIN_TIMEOUT_S", 0.0)
    monkeypatch.setattr(ray.autoscaler.sdk, "request_resources", lambda **what: None)
    nodes.append(node("h", 4, head=True))
    with pytest.raises(RayCxrError, match="no node that may work for 0 s; see `ray status`"):
        cluster.wait_for_work(False, lambda line: None)
    cluster.wait_for_work(None)  # the head may, where nothing else is said


def test_a_head_that_must_not_work_alone_is_refused(nodes: list[dict[str, Any]]) -> None:
    """Ray would look for another node for ever."""
    nodes.append(node("h", 4, head=True))
    with pytest.raises(ConfigError, match=r"ray\.on_head=false: no other node has a CPU"):
        cluster.place_work(False)


def test_gpus_of_a_head_that_does_not_work_are_named(nodes: list[dict[str, Any]]) -> None:
    nodes += [node("h", 8, head=True), node("a", 1)]
    nodes[0]["Resources"]["GPU"] = 1.0
    cluster.place_work(None)
    assert cluster.head_hint("GPU") == "; the head's GPUs are used with --set ray.on_head=true alone"
    cluster.place_work(True)
    assert cluster.head_hint("GPU") == ""


def test_a_folder_that_cannot_be_made_is_one_line(
    nodes: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes += [node("h", 0, head=True), node("a", 2)]
    asks(lambda name, path: True, monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file: cannot be written: .*; name another --out"):
        cluster.require_shared(tmp_path / "file")
