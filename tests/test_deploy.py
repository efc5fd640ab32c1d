"""The Dockerfile and what is in deploy/ agree with each other, with this project, and with whoever reads them.

Ray's launcher checks its files by its own schema, Kubernetes' schemas come with a package. KubeRay's own fields are
held against a list written here, of those that these files use: no package brings its schema.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import ray_cxr

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "deploy" / "kuberay"
VERSION = ray_cxr.__version__


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text(encoding="utf-8")))


def cluster_spec(name: str) -> dict[str, Any]:
    *_, last = documents(name)
    return last["spec"] if last["kind"] == "RayCluster" else last["spec"]["rayClusterSpec"]


def groups(name: str) -> dict[str, dict[str, Any]]:
    spec = cluster_spec(name)
    return {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}


BOTH = pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
#: What KubeRay 1.5.1 knows, of what is used here; all values of rayStartParams are strings.
FIELDS = {
    "RayCluster": {
        "rayVersion",
        "authOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    },
    "RayJob": {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"},
    "head": {"serviceType", "rayStartParams", "template"},
    "worker": {"groupName", "minReplicas", "replicas", "maxReplicas", "rayStartParams", "template"},
}


# --- machines of one's own


def onpremise() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "onpremise.yaml").read_text(encoding="utf-8"))


def test_ray_accepts_the_machines_on_premise_and_knows_every_key() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(onpremise(), schema)
    prepared = prepare_config(onpremise())
    validate_config(prepared)
    # The number of machines is what Ray counts, so that nobody need say it again.
    assert prepared["max_workers"] == len(onpremise()["provider"]["worker_ips"])


def test_the_machines_on_premise_keep_their_doors_shut() -> None:
    config = onpremise()
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token" in command
    assert "0.0.0.0" not in (ROOT / "deploy" / "onpremise.yaml").read_text()


# --- Google Cloud


def gcp() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "gcp.yaml").read_text(encoding="utf-8"))


def test_ray_accepts_google_clouds_and_knows_every_key() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(gcp(), schema)
    assert set(gcp()["provider"]) <= set(schema["properties"]["provider"]["properties"])
    validate_config(prepare_config(gcp()))
    # Of Google's own schema no package is here: what is used of it, by hand.
    for kind in gcp()["available_node_types"].values():
        assert set(kind["node_config"]) <= {"machineType", "disks", "networkInterfaces", "scheduling"}


def test_google_clouds_is_the_same_cluster_and_keeps_its_doors_shut() -> None:
    text, aws = (ROOT / "deploy" / "gcp.yaml").read_text(), yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for name in ("file_mounts", "rsync_exclude", "setup_commands", "head_start_ray_commands", "max_workers"):
        assert gcp()[name] == aws[name]
    assert gcp()["worker_start_ray_commands"] == aws["worker_start_ray_commands"]
    kinds = gcp()["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert "scheduling" not in kinds["head"]["node_config"], "the head must not be taken back"
    for name, kind in kinds.items():
        assert [kind.get(key) for key in ("min_workers", "max_workers")] == [
            aws["available_node_types"][name].get(key) for key in ("min_workers", "max_workers")
        ]
        assert "networkInterfaces" in kind["node_config"], "Google's own network lets all the world knock"
        assert name == "head" or kind["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "0.0.0.0" not in text
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if "CHANGEME" in line:
            assert "# CHANGE" in "\n".join(lines[max(0, i - 3) : i + 1]), line


# --- Kubernetes


@BOTH
def test_kuberay_knows_every_field(name: str) -> None:
    *_, last = documents(name)
    assert last["apiVersion"] == "ray.io/v1"
    assert set(last["spec"]) <= FIELDS[last["kind"]]
    spec = cluster_spec(name)
    assert set(spec) == FIELDS["RayCluster"]
    for kind, group in groups(name).items():
        assert set(group) == FIELDS["head" if kind == "head" else "worker"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        if kind != "head":
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@BOTH
def test_kubernetes_accepts_the_pods_and_the_claim(name: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate: run scripts/setup dev")
    for group in groups(name).values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": group["template"]["spec"]}
        validator.validate(pod, "1.33", strict=True)
    for document in documents(name)[:-1]:
        validator.validate(document, "1.33", strict=True)


@BOTH
def test_pods_are_whole(name: str) -> None:
    """By hand, so that something is checked where that package is not."""
    for kind, group in groups(name).items():
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"data": "/data", "shm": "/dev/shm"}
        assert set(volumes) == set(mounts)
        assert (
            volumes["data"]["persistentVolumeClaim"]["claimName"] == documents("raycluster.yaml")[0]["metadata"]["name"]
        )
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (kind == "gpu")
        assert container["image"].endswith(f"/ray-cxr:{VERSION}-gpu" if kind == "gpu" else f"/ray-cxr:{VERSION}")


@BOTH
def test_the_head_does_not_work_the_token_is_asked_for_and_the_cluster_grows(name: str) -> None:
    spec, found = cluster_spec(name), groups(name)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == ray.__version__
    assert spec["enableInTreeAutoscaling"] is True
    assert found["head"]["rayStartParams"]["num-cpus"] == "0"
    assert found["head"]["serviceType"] == "ClusterIP"
    assert set(found) == {"head", "cpu", "gpu"}
    assert 1 <= found["cpu"]["minReplicas"] < found["cpu"]["maxReplicas"]


def test_job_and_cluster_are_of_the_same_machines() -> None:
    assert cluster_spec("rayjob.yaml") == cluster_spec("raycluster.yaml")


# --- the image


def dockerfile() -> list[tuple[str, str]]:
    """Its instructions with what follows each, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_the_image_is_built_as_it_should_be() -> None:
    steps = dockerfile()
    words = [word for word, _ in steps]
    (base,) = [rest for word, rest in steps if word == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base)
    assert "ADD" not in words
    assert ("USER", "1000") in steps
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    for word, rest in steps:
        assert "latest" not in rest
        assert not re.search(r"https?://|\bsudo\b|\bcurl\b", rest)
        if word == "RUN" and "apt-get install" in rest:
            assert "apt-get update" in rest
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists" in rest
        if word == "RUN" and "pip install" in rest:
            assert "--no-cache-dir" in rest
            assert "--require-hashes" in rest or "--no-deps" in rest
        if word in ("ENV", "ARG"):
            assert not re.search(r"TOKEN=|SECRET|PASSWORD|_KEY", rest)
        if word == "COPY":
            assert rest != ". ."


def test_the_image_takes_what_is_there_and_nothing_else() -> None:
    taken = {source for word, rest in dockerfile() if word == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in taken)
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line[0] == "!"} == taken
    (lock,) = [rest.partition("=")[2] for word, rest in dockerfile() if word == "ARG"]
    assert lock == "requirements.lock"
    assert {"requirements.lock", "requirements-gpu.lock"} <= taken


@pytest.mark.parametrize(
    "file",
    [*sorted(KUBERAY.iterdir()), *sorted((ROOT / "deploy").glob("*.yaml")), ROOT / "cluster.yaml", ROOT / "Dockerfile"],
)
def test_names_are_of_things_that_are_there(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for job in re.findall(r"\bjobs/\w+\.py", text):
        assert (ROOT / job).is_file()
    for lock in re.findall(r"\brequirements[\w-]*\.lock", text):
        assert (ROOT / lock).is_file()
    for script in re.findall(r"\bscripts/[\w-]+", text):
        assert (ROOT / script).is_file()
    for tag in re.findall(r"ray-cxr:(\d[\w.]*)", text):
        assert tag == VERSION
    for page in re.findall(r"\b(?:docs|tests)/[\w/]+\.\w+", text):
        assert (ROOT / page).is_file()
