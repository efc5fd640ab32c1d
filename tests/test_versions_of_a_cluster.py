"""A command and the cluster that it connects to are of one version, or it says which. Ray itself is a stand-in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray._private import utils

import ray_cxr
from ray_cxr import cli
from ray_cxr.config import RaySettings
from ray_cxr.errors import InputError, RayCxrError

HERE = ray_cxr.__version__
REAL_REMOTE = ray.remote


def hex_id(name: str) -> str:
    """As long as Ray wants a node's to be."""
    return hashlib.sha224(name.encode()).hexdigest()


class Cluster:
    """What `start_ray` asks of Ray, answered by the versions that its nodes have; an exception is a node that went."""

    def __init__(self, answers: dict[str, str | Exception | None], silent: tuple[str, ...] = ()) -> None:
        self.answers, self.silent = answers, silent
        self.asked: list[str] = []
        self.options_seen: list[dict[str, Any]] = []
        self.shut = 0

    def nodes(self) -> list[dict[str, Any]]:
        alive = [
            {"NodeID": hex_id(name), "NodeManagerAddress": name, "Alive": True, "Resources": {}}
            for name in self.answers
        ]
        return [{"NodeID": hex_id("gone"), "NodeManagerAddress": "gone", "Alive": False}, *alive]

    def remote(self, *arguments: Any, **options: Any) -> Any:
        if options or arguments[0].__module__ != cli.__name__:
            return REAL_REMOTE(*arguments, **options)  # Ray decorates its own functions as it is imported
        (function,) = arguments
        assert function() == HERE, "where this package is, it says its version"
        return self

    def options(self, **options: Any) -> Any:
        self.options_seen.append(options)
        return type("Task", (), {"remote": lambda _: self._ask(options["scheduling_strategy"].node_id)})()

    def _ask(self, node_id: str) -> str:
        (name,) = [name for name in self.answers if hex_id(name) == node_id]
        self.asked.append(name)
        return name

    def wait(self, refs: list[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert num_returns == len(refs)
        assert timeout > 0
        return [ref for ref in refs if ref not in self.silent], [ref for ref in refs if ref in self.silent]

    def get(self, ref: str) -> str | None:
        answer = self.answers[ref]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def shutdown(self) -> None:
        self.shut += 1


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cluster], None]:
    def run(cluster: Cluster, address: str = "10.0.0.1:6379") -> None:
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", lambda **_: None)
        for name in ("nodes", "remote", "wait", "get", "shutdown"):
            monkeypatch.setattr(ray, name, getattr(cluster, name))
        monkeypatch.setattr(cli.cluster, "wait_for_work", lambda on_head: None)
        with cli.start_ray(RaySettings(address=address)):
            pass

    return run


def test_nodes_of_the_same_version_are_asked_and_used(connect: Callable[..., None]) -> None:
    cluster = Cluster({"a": HERE, "b": HERE})
    connect(cluster)
    assert cluster.asked == ["a", "b"]
    assert all(one["num_cpus"] == 0 for one in cluster.options_seen), "a head without CPUs answers too"
    assert cluster.shut == 1


@pytest.mark.parametrize(("there", "words"), [("9.9.9", "has ray_cxr 9.9.9"), (None, "has no ray_cxr")])
def test_another_version_on_a_node_is_one_line_with_both(
    there: str | None, words: str, connect: Callable[..., None]
) -> None:
    cluster = Cluster({"a": HERE, "10.0.0.7": there})
    with pytest.raises(InputError) as caught:
        connect(cluster)
    said = str(caught.value)
    assert f"node 10.0.0.7 {words}, this command is {HERE};" in said
    assert "install this version there" in said
    assert "\n" not in said
    assert cluster.shut == 1, "the connection is closed again"


def test_nodes_that_went_or_are_slow_stop_nothing(connect: Callable[..., None]) -> None:
    connect(Cluster({"a": HERE, "b": ray.exceptions.RayError("lost"), "slow": "9.9.9"}, silent=("slow",)))
    connect(Cluster({}))


def test_a_large_cluster_is_asked_in_part(connect: Callable[..., None]) -> None:
    cluster = Cluster({f"n{number}": HERE for number in range(1000)})
    connect(cluster)
    assert 10 < len(cluster.asked) < 100


def test_a_ray_of_its_own_is_not_asked(connect: Callable[..., None]) -> None:
    cluster = Cluster({"a": "9.9.9"})
    connect(cluster, address="local")
    assert not cluster.asked


@pytest.mark.parametrize(
    ("there", "words"),
    [
        (("2.9.0", "3.11.4"), "the cluster has Ray 2.9.0 and Python 3.11.4, this command Ray "),
        ((ray.__version__, "3.9.1"), f"the cluster has Ray {ray.__version__} and Python 3.9.1, this command Ray "),
    ],
)
def test_rays_own_refusal_is_one_line(there: tuple[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own words, from Ray itself."""

    def init(**_: object) -> None:
        utils.check_version_info({"ray_version": there[0], "python_version": there[1]}, "node 10.0.0.1")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError) as caught, cli.start_ray(RaySettings(address="10.0.0.1:6379")):
        pass
    said = str(caught.value)
    assert said.startswith(f"Ray at '10.0.0.1:6379': {words}{ray.__version__} and Python 3.")
    assert "make them equal" in said
    assert "\n" not in said


def test_what_ray_says_otherwise_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("Version mismatch: in words that nobody has seen yet")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RayCxrError, match="nobody has seen"), cli.start_ray(RaySettings(address="10.0.0.1:6379")):
        pass
