"""cluster.yaml: Ray and a simulated EC2 accept every key of it, and it keeps its promises."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import fillout_defaults, prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def test_ray_accepts_every_key(cluster: dict[str, Any]) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    assert schema["additionalProperties"] is False
    jsonschema.validate(cluster, schema)
    # The schema accepts any key of the provider.
    assert set(cluster["provider"]) <= set(schema["properties"]["provider"]["properties"])
    validate_config(prepare_config(cluster))


def test_ec2_accepts_every_key_below_node_config(cluster: dict[str, Any]) -> None:
    session = pytest.importorskip("botocore.session", reason="botocore: run scripts/setup dev").get_session()
    from botocore.validate import ParamValidator

    model = session.get_service_model("ec2").operation_model("RunInstances")
    for kind in cluster["available_node_types"].values():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, model.input_shape)
        assert not report.has_errors(), report.generate_report()
        # The validator does find a misspelt key.
        assert ParamValidator().validate({**request, "ImageID": "ami-1"}, model.input_shape).has_errors()


def test_head_does_no_work_and_is_no_spot_machine(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    head = kinds[cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"], "a spot head can be reclaimed"
    assert all(kinds[name]["resources"] == {} for name in ("cpu", "gpu")), "Ray detects what the machine has"


def test_no_port_is_open_to_the_world_and_nodes_need_the_token(cluster: dict[str, Any]) -> None:
    head, worker = cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, worker):
        assert command.split("; ")[-1].startswith("RAY_AUTH_MODE=token ")
    assert "0.0.0.0" not in TEXT
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in cluster["setup_commands"]


@pytest.mark.parametrize("gpu", [False, True])
def test_setup_installs_cuda_only_where_a_gpu_responds(gpu: bool, tmp_path: Path, cluster: dict[str, Any]) -> None:
    """An image can hold `nvidia-smi` on a machine without a GPU, where it fails."""
    for name, line in (
        ("ray_cxr/scripts/setup", 'echo "setup $*"'),
        ("bin/nvidia-smi", "exit 0" if gpu else "echo 'NVIDIA-SMI has failed'; exit 9"),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    (command,) = [one for one in cluster["setup_commands"] if "scripts/setup" in one]
    environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    shell = shutil.which("bash") or "sh"
    done = subprocess.run([shell, "-ec", command], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == (["setup", "gpu"] if gpu else ["setup"])


def test_ray_start_up_opens_no_port_and_grants_no_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's default is a group with port 22 open to all and a role with all rights; here it uses the named ones."""
    moto = pytest.importorskip("moto", reason="moto: run scripts/setup dev")
    import boto3
    from ray.autoscaler._private.aws import config as rays

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key to the machines in ~/.ssh
    (tmp_path / ".ssh").mkdir()
    region = yaml.safe_load(TEXT)["provider"]["region"]
    with contextlib.ExitStack() as stack:
        aws = moto.mock_aws()
        aws.start(reset=False)  # the session's S3 server keeps its buckets in the same place
        stack.callback(aws.stop, remove_data=False)
        ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        group = ec2.create_security_group(GroupName="ray-cxr", Description="nodes", VpcId=vpc)["GroupId"]
        iam.create_instance_profile(InstanceProfileName="ray-cxr-head-CHANGEME")
        before = {one["GroupId"] for one in ec2.describe_security_groups()["SecurityGroups"]}

        config = yaml.safe_load(TEXT.replace("sg-CHANGEME", group))
        config = rays.bootstrap_aws(fillout_defaults(prepare_config(config)))
        for kind in config["available_node_types"].values():
            assert kind["node_config"]["SecurityGroupIds"] == [group]
        groups = ec2.describe_security_groups()["SecurityGroups"]
        assert {one["GroupId"] for one in groups} == before
        assert "0.0.0.0/0" not in json.dumps([one["IpPermissions"] for one in groups])
        assert iam.list_roles()["Roles"] == []
        assert "IamInstanceProfile" not in config.get("head_node", {})
