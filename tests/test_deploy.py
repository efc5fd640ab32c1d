"""Check that the Dockerfile and deploy/ are consistent with each other, with this project and with their schemas.

Ray's launcher includes a schema, and a package those of Kubernetes. No package has the schemas of KubeRay and Google,
so this file lists the fields in use.
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
DEPLOY = ROOT / "deploy"
KUBERAY = DEPLOY / "kuberay"
VERSION = ray_cxr.__version__
#: Fields of KubeRay 1.5.1; all values of rayStartParams are strings.
FIELDS = {
    "RayJob": {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"},
    "RayCluster": {
        *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"),
        *("headGroupSpec", "workerGroupSpecs"),
    },
    "head": {"serviceType", "rayStartParams", "template"},
    "worker": {"groupName", "minReplicas", "replicas", "maxReplicas", "rayStartParams", "template"},
}


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# --- machines on premises and in Google Cloud


@pytest.mark.parametrize("name", ["onpremise.yaml", "gcp.yaml"])
def test_ray_accepts_every_key(name: str) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    config = load(DEPLOY / name)
    jsonschema.validate(config, schema)
    assert set(config["provider"]) <= set(schema["properties"]["provider"]["properties"])
    prepared = prepare_config(load(DEPLOY / name))
    validate_config(prepared)
    if name == "onpremise.yaml":  # Ray counts the machines
        assert prepared["max_workers"] == len(config["provider"]["worker_ips"])


def test_machines_on_premises_reject_outsiders() -> None:
    config = load(DEPLOY / "onpremise.yaml")
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert all("RAY_AUTH_MODE=token" in command for command in (head, worker))
    assert "0.0.0.0" not in (DEPLOY / "onpremise.yaml").read_text(encoding="utf-8")


def test_google_cloud_matches_aws_and_rejects_outsiders() -> None:
    gcp, aws = load(DEPLOY / "gcp.yaml"), load(ROOT / "cluster.yaml")
    commands = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    for name in (*commands, "file_mounts", "rsync_exclude", "max_workers"):
        assert gcp[name] == aws[name]
    kinds = gcp["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert "scheduling" not in kinds["head"]["node_config"], "the head must not be a spot machine"
    for name, kind in kinds.items():
        node = kind["node_config"]
        assert set(node) <= {"machineType", "disks", "networkInterfaces", "scheduling"}
        assert "networkInterfaces" in node, "the default network is open to the internet"
        assert name == "head" or node["scheduling"]["provisioningModel"] == "SPOT"
        for key in ("min_workers", "max_workers"):
            assert kind.get(key) == aws["available_node_types"][name].get(key)
    assert "0.0.0.0" not in (DEPLOY / "gcp.yaml").read_text(encoding="utf-8")


# --- Kubernetes


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text(encoding="utf-8")))


CLAIM, CLUSTER = documents("raycluster.yaml")
HEAD = CLUSTER["spec"]["headGroupSpec"]
WORKERS = {group["groupName"]: group for group in CLUSTER["spec"]["workerGroupSpecs"]}
GROUPS = {"head": HEAD, **WORKERS}


def test_kuberay_knows_every_field() -> None:
    (job,) = documents("rayjob.yaml")
    assert job["apiVersion"] == CLUSTER["apiVersion"] == "ray.io/v1"
    assert set(job["spec"]) <= FIELDS["RayJob"]
    assert job["spec"]["rayClusterSpec"] == CLUSTER["spec"]
    assert set(CLUSTER["spec"]) == FIELDS["RayCluster"]
    for kind, group in GROUPS.items():
        assert set(group) == FIELDS["head" if kind == "head" else "worker"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_cluster_has_an_idle_head_a_token_and_scalable_workers() -> None:
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    assert CLUSTER["spec"]["rayVersion"] == ray.__version__
    assert CLUSTER["spec"]["enableInTreeAutoscaling"] is True
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert HEAD["serviceType"] == "ClusterIP"
    assert set(WORKERS) == {"cpu", "gpu"}
    for group in WORKERS.values():
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert 1 <= WORKERS["cpu"]["minReplicas"] < WORKERS["cpu"]["maxReplicas"]


def test_kubernetes_accepts_pods_and_claims() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate: run scripts/setup dev")
    for group in GROUPS.values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, "spec": group["template"]["spec"]}
        validator.validate(pod, "1.33", strict=True)
    validator.validate(CLAIM, "1.33", strict=True)


@pytest.mark.parametrize("kind", GROUPS)
def test_pods_are_complete(kind: str) -> None:
    pod = GROUPS[kind]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"data": "/data", "shm": "/dev/shm"}
    assert set(volumes) == set(mounts)
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (kind == "gpu")
    assert container["image"].endswith(f"/ray-cxr:{VERSION}-gpu" if kind == "gpu" else f"/ray-cxr:{VERSION}")


# --- the image


def dockerfile() -> list[tuple[str, str]]:
    """Return each instruction with its arguments; continued lines are joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_image_has_no_root_no_secret_and_hashed_packages() -> None:
    steps = dockerfile()
    words = [word for word, _ in steps]
    assert "ADD" not in words
    assert ("USER", "1000") in steps
    assert words.index("USER") > max(i for i, word in enumerate(words) if word in ("RUN", "COPY"))
    for word, rest in steps:
        assert not re.search(r"latest|https?://|\bsudo\b|\bcurl\b", rest)
        assert "pip install" not in rest or "--require-hashes" in rest or "--no-deps" in rest
        assert word not in ("ENV", "ARG") or not re.search(r"TOKEN=|SECRET|PASSWORD|_KEY", rest)
        assert (word, rest) != ("COPY", ". .")


def test_image_has_the_listed_files_and_no_others() -> None:
    copied = {source for word, rest in dockerfile() if word == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    ignored = re.findall(r"^[^#\n].*", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line[0] == "!"} == copied
    assert ("ARG", "LOCK=requirements.lock") in dockerfile()


@pytest.mark.parametrize(
    "file", [*sorted(KUBERAY.iterdir()), *sorted(DEPLOY.glob("*.yaml")), ROOT / "cluster.yaml", ROOT / "Dockerfile"]
)
def test_named_files_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    names = r"\bjobs/\w+\.py|\brequirements[\w-]*\.lock|\bscripts/[\w-]+|\b(?:docs|tests)/[\w/]+\.\w+"
    assert [name for name in re.findall(names, text) if not (ROOT / name).is_file()] == []
    assert set(re.findall(r"ray-cxr:(\d[\w.]*)", text)) <= {VERSION}
