"""Check cluster.yaml, deploy/ and the Dockerfile against each other, this project and their schemas.

The schemas of Ray's launcher, Kubernetes and EC2 are in packages. Those of KubeRay and Google are in none, so this file
lists the fields in use.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config

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


# --- machines on premises, in AWS and in Google Cloud

LAUNCHED = {path.name: path for path in (ROOT / "cluster.yaml", DEPLOY / "gcp.yaml", DEPLOY / "onpremise.yaml")}
AWS = load(ROOT / "cluster.yaml")
#: Ray's label of machines that a cloud can reclaim, `spot`, and others, `on-demand`.
MARKET = "ray.io/market-type"


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_every_key(name: str) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    assert schema["additionalProperties"] is False
    config = load(LAUNCHED[name])
    jsonschema.validate(config, schema)
    # The schema accepts any key of the provider.
    assert set(config["provider"]) <= set(schema["properties"]["provider"]["properties"])
    prepared = prepare_config(load(LAUNCHED[name]))
    validate_config(prepared)
    if name == "onpremise.yaml":  # Ray counts the machines
        assert prepared["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_no_port_is_open_to_the_world_and_nodes_need_the_token(name: str) -> None:
    config = load(LAUNCHED[name])
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, worker):
        assert command.split("; ")[-1].startswith("RAY_AUTH_MODE=token ")
    assert "0.0.0.0" not in LAUNCHED[name].read_text(encoding="utf-8")
    if name != "onpremise.yaml":
        assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
        assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


@pytest.mark.parametrize(("name", "spot"), [("cluster.yaml", "'MarketType': 'spot'"), ("gcp.yaml", "'SPOT'")])
def test_head_does_no_work_and_labels_say_which_machines_can_be_reclaimed(name: str, spot: str) -> None:
    kinds = load(LAUNCHED[name])["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["head"]["labels"] == {MARKET: "on-demand"}, "a spot head can be reclaimed"
    for kind in kinds.values():
        assert kind["labels"][MARKET] == ("spot" if spot in str(kind["node_config"]) else "on-demand")


@pytest.mark.parametrize("name", ["cluster.yaml", "gcp.yaml"])
def test_autoscaler_starts_spot_machines_first_and_then_on_demand_ones(name: str) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = load(LAUNCHED[name]) | {"auth": {}}  # without a key, which need not exist here
    for kind, node in config["available_node_types"].items():  # on AWS, Ray looks the resources up
        node["resources"] = {"CPU": 16, "GPU": int("gpu" in kind)} if kind != "head" else {}
        node["min_workers"] = 0
    types = AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()

    def start(resources: dict[str, float], label: str | None = None, **failed: float) -> set[str]:
        selectors = [[(MARKET, 1, [label])]] if label else None
        requests = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(resources, label_selectors=selectors)])
        reply = ResourceDemandScheduler().schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=types,
                max_num_nodes=config["max_workers"] + 1,
                resource_requests=requests,
                recoverable_resource_availabilities={kind.replace("_", "-"): score for kind, score in failed.items()},
            )
        )
        return {launch.instance_type for launch in reply.to_launch}

    assert start({"CPU": 16}) == {"cpu-spot"}
    assert start({"GPU": 1}) == {"gpu-spot"}
    assert start({"GPU": 1}, gpu_spot=0.0) == {"gpu"}
    assert start({"GPU": 1}, "on-demand") == {"gpu"}


def test_google_cloud_matches_aws() -> None:
    gcp = load(DEPLOY / "gcp.yaml")
    commands = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    for name in (*commands, "file_mounts", "rsync_exclude", "max_workers", "head_node_type"):
        assert gcp[name] == AWS[name]
    workers = {name: kind for name, kind in AWS["available_node_types"].items() if name != "head"}
    assert all(kind["resources"] == {} for kind in workers.values()), "Ray detects them"
    kinds = gcp["available_node_types"]
    for name, kind in kinds.items():
        node = kind["node_config"]
        assert set(node) <= {"machineType", "disks", "networkInterfaces", "scheduling"}
        assert "networkInterfaces" in node, "the default network is open to the internet"
        for key in ("min_workers", "max_workers", "labels", "priority"):
            assert kind.get(key) == AWS["available_node_types"][name].get(key)


def test_ec2_accepts_every_key_below_node_config() -> None:
    session = pytest.importorskip("botocore.session", reason="botocore: run scripts/setup dev").get_session()
    from botocore.validate import ParamValidator

    model = session.get_service_model("ec2").operation_model("RunInstances")
    for kind in AWS["available_node_types"].values():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, model.input_shape)
        assert not report.has_errors(), report.generate_report()
        # The validator does find a misspelt key.
        assert ParamValidator().validate({**request, "ImageID": "ami-1"}, model.input_shape).has_errors()


@pytest.mark.parametrize("gpu", [False, True])
def test_setup_installs_cuda_only_where_a_gpu_responds(gpu: bool, tmp_path: Path) -> None:
    """An image can hold `nvidia-smi` on a machine without a GPU, where it fails."""
    for name, line in (
        ("ray_cxr/scripts/setup", 'echo "setup $*"'),
        ("bin/nvidia-smi", "exit 0" if gpu else "echo 'NVIDIA-SMI has failed'; exit 9"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (command,) = [command for command in AWS["setup_commands"] if "scripts/setup" in command]
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    shell = shutil.which("bash") or "sh"
    done = subprocess.run([shell, "-ec", command], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == (["setup", "gpu"] if gpu else ["setup"])


@pytest.mark.slow
def test_ray_start_up_opens_no_port_and_grants_no_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's default is a group with port 22 open to all and a role with all rights; here it uses the named ones."""
    moto = pytest.importorskip("moto", reason="moto: run scripts/setup dev")
    import boto3
    from ray.autoscaler._private.aws import config as rays

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key to the machines in ~/.ssh
    (tmp_path / ".ssh").mkdir()
    region = AWS["provider"]["region"]
    with contextlib.ExitStack() as stack:
        aws = moto.mock_aws()
        aws.start(reset=False)  # the session's S3 server keeps its buckets in the same place
        stack.callback(aws.stop, remove_data=False)
        ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="ray-cxr", Description="nodes", VpcId=vpc)["GroupId"]
        iam.create_instance_profile(InstanceProfileName="ray-cxr-head-CHANGEME")
        before = {entry["GroupId"] for entry in ec2.describe_security_groups()["SecurityGroups"]}

        text = LAUNCHED["cluster.yaml"].read_text(encoding="utf-8").replace("sg-CHANGEME", group)
        config = rays.bootstrap_aws(fillout_defaults(prepare_config(yaml.safe_load(text))))
        for kind in config["available_node_types"].values():
            assert kind["node_config"]["SecurityGroupIds"] == [group]
        groups = ec2.describe_security_groups()["SecurityGroups"]
        assert {entry["GroupId"] for entry in groups} == before
        assert "0.0.0.0/0" not in json.dumps([entry["IpPermissions"] for entry in groups])
        assert iam.list_roles()["Roles"] == []
        assert "IamInstanceProfile" not in config.get("head_node", {})


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


# --- a nightly job

NIGHTLY = DEPLOY / "nightly"


def test_units_of_systemd_are_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    for unit in NIGHTLY.glob("ray-cxr-night.*"):
        text = unit.read_text(encoding="utf-8")
        # Programs and users of the example are not on this machine.
        text = re.sub(r"(?m)^ExecStart=.*", "ExecStart=/bin/true", text).replace("User=ray-cxr", "User=root")
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
    units = sorted(map(str, tmp_path.iterdir()))
    assert len(units) == 2
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


@pytest.fixture
def run_night(tmp_path: Path):
    """Run the script with a `score` that writes its words and exits with a code."""
    (tmp_path / "nights").mkdir()
    fake = tmp_path / "ray-cxr"
    fake.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nexit ${{CODE:-0}}\n', encoding="utf-8")
    fake.chmod(0o755)

    def run(**variables: str) -> tuple[int, list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        given = {
            "MODEL": "m",
            "IMAGES": "x?StudyDate=%SINCE%-%DATE%",
            "NIGHTS": f"{tmp_path}/nights",
            "NIGHT": "20260302",
            "START": "20260101",
        }
        environment = {"PATH": "/usr/bin:/bin", "RAY_CXR": str(fake), **given, **variables}
        code = subprocess.run(["sh", str(NIGHTLY / "night.sh")], env=environment, timeout=60, check=False).returncode
        return code, (tmp_path / "calls").read_text(encoding="utf-8").splitlines()

    return run


def test_script_of_a_night_continues_a_killed_one_first(run_night, tmp_path: Path) -> None:
    nights = tmp_path / "nights"
    first = f"score --model m --images x?StudyDate=20260101-20260302 --out {nights}/20260302"
    assert run_night() == (0, [first])
    for name, done in (("20260228", True), ("20260301", False)):
        (nights / name).mkdir()
        (nights / name / "settings.json").touch()
        if done:
            (nights / name / "_SUCCESS").touch()
    killed = f"score --model m --images x?StudyDate=20260225-20260301 --out {nights}/20260301"
    first = first.replace("20260101", "20260225")
    skip = f"--skip-scored {nights}/20260228"
    assert run_night(OPTIONS="--limit 3") == (0, [f"{killed} --limit 3 {skip}", f"{first} --limit 3 {skip}"])
    assert run_night(CODE="3")[0] == 3
    assert len(run_night(CODE="3")[1]) == 2, "scored, with many errors: the next night goes on"
    assert run_night(CODE="2") == (2, [f"{killed} {skip}"])


def test_script_searches_all_days_since_the_last_finished_night(run_night, tmp_path: Path) -> None:
    for name in ("20260210", "20260220", "notes"):
        (tmp_path / "nights" / name).mkdir()
        (tmp_path / "nights" / name / "_SUCCESS").touch()
    code, [call] = run_night()
    assert (code, call.split()[4]) == (0, "x?StudyDate=20260217-20260302")


def test_script_needs_a_date_to_start(run_night, tmp_path: Path) -> None:
    (tmp_path / "calls").touch()
    assert run_night(START="", NIGHT="20260302", IMAGES="x?StudyDate=%DATE%")[0] == 0
    with pytest.raises(FileNotFoundError):  # nothing was scored
        run_night(START="")
