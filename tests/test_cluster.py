"""cluster.yaml: Ray and EC2 know all of it, and it keeps what it promises.

Ray's launcher brings its own schema and its own start-up code, which runs here in a simulated AWS (moto); what EC2
takes comes with botocore. None of it needs a network or an account.
"""

from __future__ import annotations

import json
import re
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


def cluster() -> dict[str, Any]:
    found = yaml.safe_load(TEXT)
    assert isinstance(found, dict)
    return found


def kinds() -> dict[str, dict[str, Any]]:
    found = cluster()["available_node_types"]
    assert isinstance(found, dict)
    return found


def test_ray_accepts_it() -> None:
    validate_config(prepare_config(cluster()))


def test_ray_knows_every_key() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert schema["additionalProperties"] is False
    jsonschema.validate(cluster(), schema)
    # The one part where the schema lets anything pass.
    assert set(cluster()["provider"]) <= set(schema["properties"]["provider"]["properties"])


@pytest.mark.parametrize("kind", kinds())
def test_ec2_knows_every_key_below_node_config(kind: str) -> None:
    session = pytest.importorskip("botocore.session", reason="botocore: run scripts/setup dev").get_session()
    from botocore.validate import ParamValidator

    model = session.get_service_model("ec2").operation_model("RunInstances")
    wanted = {**kinds()[kind]["node_config"], "MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(wanted, model.input_shape)
    assert not report.has_errors(), report.generate_report()
    markets = {None, *session.get_service_model("ec2").shape_for("MarketType").enum}
    assert wanted.get("InstanceMarketOptions", {}).get("MarketType") in markets
    # What is misspelt is told: else the check above says nothing.
    assert ParamValidator().validate({**wanted, "ImageID": "ami-1"}, model.input_shape).has_errors()


def test_there_are_a_head_machines_for_cpus_and_machines_for_gpus() -> None:
    config, found = cluster(), kinds()
    assert config["head_node_type"] == "head"
    assert set(found) == {"head", "cpu", "gpu"}
    assert found["head"]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in found["head"]["node_config"], "the head must not be taken back"
    assert 1 <= found["cpu"]["min_workers"] < found["cpu"]["max_workers"]
    for kind in ("cpu", "gpu"):
        assert found[kind]["resources"] == {}, "what the machine has is Ray's to find"
        assert found[kind]["max_workers"] <= config["max_workers"]
        assert found[kind]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_no_port_is_open_to_the_world_and_the_token_is_asked_for() -> None:
    config = cluster()
    head, worker = config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    for command in (head, worker):
        assert command.split("; ")[-1].startswith("RAY_AUTH_MODE=token ")
    assert "0.0.0.0" not in TEXT
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_the_environment_is_that_of_the_lock_files() -> None:
    config = cluster()
    assert any("scripts/setup $(" in command and "echo gpu" in command for command in config["setup_commands"])
    assert "pip" not in re.findall(r"\w+", TEXT.replace("python3", ""))
    # Ray's code for AWS imports boto3, on the head; workers are started from there.
    assert config["head_setup_commands"] == ["cd ~/ray_cxr && scripts/setup dev"]
    assert re.search(r"^boto3==", (ROOT / "requirements-dev.lock").read_text(), re.MULTILINE)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_setup_command_asks_for_cuda_where_a_gpu_answers(gpu: bool, tmp_path: Path) -> None:
    """An image can hold `nvidia-smi` on a machine without a GPU: there it fails, and CUDA's libraries are left out."""
    (tmp_path / "ray_cxr" / "scripts").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for path, line in (
        ("ray_cxr/scripts/setup", 'echo "setup $*"'),
        ("bin/nvidia-smi", "exit 0" if gpu else "echo 'NVIDIA-SMI has failed'; exit 9"),
    ):
        (tmp_path / path).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / path).chmod(0o755)
    (command,) = [one for one in cluster()["setup_commands"] if "scripts/setup" in one]
    shell = shutil.which("bash") or "sh"
    done = subprocess.run(
        [shell, "-ec", command],
        env={"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == (["setup", "gpu"] if gpu else ["setup"])


def test_what_must_change_says_so() -> None:
    """Every placeholder stands beside the word that a newcomer looks for, and each but the profiles once."""
    lines = TEXT.splitlines()
    for i, line in enumerate(lines):
        if "CHANGEME" in line:
            assert "# CHANGE" in "\n".join(lines[max(0, i - 3) : i + 1]), line
    places = re.findall(r"[\w.-]*CHANGEME", TEXT)
    assert sorted(set(places)) == ["ami-CHANGEME", "fs-CHANGEME", "ray-cxr-head-CHANGEME", "ray-cxr-worker-CHANGEME",
                                   "sg-CHANGEME"]  # fmt: skip
    for name in ("ami-", "sg-", "fs-"):
        assert sum(place.startswith(name) for place in places) == 1


def test_rays_own_start_up_opens_nothing_and_gives_nobody_more_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's code for AWS against a simulated AWS: by default it makes a group with port 22 open to all, and a role that
    may do everything; here it must keep to what is named."""
    moto = pytest.importorskip("moto", reason="moto: run scripts/setup dev")
    import boto3
    from ray.autoscaler._private.aws import config as rays

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the key to the machines in ~/.ssh
    (tmp_path / ".ssh").mkdir()
    region = cluster()["provider"]["region"]
    with moto.mock_aws():
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
