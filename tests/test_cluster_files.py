"""What is in cluster/: against Ray's schema and EC2's own model, the KubeRay CRDs, and by running it."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.daemons import free_port, start_server

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared/kuberay-crds"))

VALUES = {
    "MAX_WORKERS": "4", "AWS_REGION": "us-west-2", "AWS_ACCOUNT": "123456789012", "AMI": "ami-0123456789abcdef0",
    "SECURITY_GROUP": "sg-0123456789abcdef0", "IMAGE": "registry.example/relora:1", "REGISTRY": "registry.example",
    "GCP_REGION": "us-central1", "GCP_ZONE": "us-central1-a", "GCP_PROJECT": "a-project",
    "VM_IMAGE": "projects/p/global/images/i", "SPOT_LABEL": "cloud.example/spot", "SPOT_VALUE": "true",
    "SIZE": "250m", "STORAGE": "s3://bucket/runs", "DATA": "s3://bucket/data",
}  # fmt: skip


def filled(path: Path) -> str:
    """With every ${NAME} replaced; one that is not known is an error."""
    return re.sub(r"\$\{(\w+)\}", lambda found: VALUES[found[1]], path.read_text())


def test_every_placeholder_is_explained_at_the_top() -> None:
    top = (CLUSTER / "README.md").read_text().split("\n## ")[1]
    used = {name for path in CLUSTER.rglob("*.yaml") for name in re.findall(r"\$\{(\w+)\}", path.read_text())}
    assert used == set(VALUES)
    assert set(re.findall(r"^\| `(\w+)`", top, re.MULTILINE)) == used


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_takes_the_file(cloud: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray/relora").mkdir(parents=True)
    config = yaml.safe_load(filled(CLUSTER / cloud / "cluster.yaml"))
    if cloud == "aws":  # what `ray up` asks EC2 for, which cannot be asked here
        for kind, resources in {"spot": {"CPU": 8, "GPU": 1}, "on_demand": {"CPU": 8, "GPU": 1}}.items():
            config["available_node_types"][kind]["resources"] = resources
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_node_type"] == "head"
    assert prepared["available_node_types"]["spot"]["max_workers"] == 4
    commands = " ".join(prepared["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands
    docker = prepared["docker"]
    assert "--env RAY_AUTH_MODE=token" in docker["run_options"]
    assert docker["worker_run_options"] == ["--gpus all"]
    assert f"notice {cloud}" in " ".join(prepared["worker_start_ray_commands"])


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_listener_is_started_anew_and_the_shell_that_does_it_lives(cloud: str, tmp_path: Path) -> None:
    """The commands as Ray quotes them; pkill's pattern is looked for with pgrep, as others' listeners may be here."""
    from ray.autoscaler._private.command_runner import _with_interactive

    commands = yaml.safe_load(filled(CLUSTER / cloud / "cluster.yaml"))["worker_start_ray_commands"]
    (kill,) = (command for command in commands if "pkill" in command)
    stub = tmp_path / "pkill"
    stub.write_text('#!/bin/sh\nexec pgrep -a "$@"\n')
    stub.chmod(0o755)
    (start,) = (command for command in commands if "nohup" in command)
    module, listener = re.search(r"-m ([\w.]+)", start), "import time; time.sleep(60)"
    assert module is not None
    decoy = subprocess.Popen([sys.executable, "-c", listener, "-m", module[1], str(tmp_path)])
    try:
        shell = " ".join(_with_interactive(kill.replace("pkill", str(stub))))
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    finally:
        decoy.kill()
        decoy.wait()
    assert done.returncode == 0, done.stderr
    found = done.stdout.splitlines()
    assert any(line.startswith(f"{decoy.pid} ") for line in found)
    assert not [line for line in found if "bash" in line], "it would have killed the shell that starts the next one"


def test_ec2_knows_every_key_of_the_aws_file() -> None:
    """botocore's own check of a request, as it makes it before it sends one."""
    import botocore.session
    from botocore.validate import ParamValidator

    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    for name, kind in yaml.safe_load(filled(CLUSTER / "aws/cluster.yaml"))["available_node_types"].items():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        unknown = ParamValidator().validate({**request, "IamInstanceProfil": {}}, shape)
        assert unknown.has_errors(), "a key that is misspelt would be seen"


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto3, with moto in the place of AWS."""
    import boto3

    port = free_port()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray/relora").mkdir(parents=True)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": VALUES["AWS_REGION"],
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = start_server(command, f"http://127.0.0.1:{port}", tmp_path / "moto.log")
    yield boto3
    server.kill()
    server.wait()


def test_ray_asks_ec2_for_the_machines_of_the_aws_file(aws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray up` up to the point where it would connect by SSH: what it fills in, and the machines that it starts."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    ec2, iam = aws.client("ec2"), aws.client("iam")
    for name in ("relora-head", "relora-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    group = ec2.create_security_group(GroupName="relora", Description="relora")["GroupId"]
    image = ec2.describe_images()["Images"][0]["ImageId"]
    monkeypatch.setitem(VALUES, "SECURITY_GROUP", group)
    monkeypatch.setitem(VALUES, "AMI", image)
    config = prepare_config(yaml.safe_load(filled(CLUSTER / "aws/cluster.yaml")))
    config = AWSNodeProvider.fillout_available_node_types_resources(config)
    validate_config(config)
    kinds = bootstrap_aws(config)["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["spot"]["resources"].items() >= {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}.items()
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in ("head", "spot"):
        tags = {
            "ray-node-type": "head" if kind == "head" else "worker",
            "ray-launch-config": "x",
            "ray-node-name": kind,
        }
        provider.create_node(copy.deepcopy(kinds[kind]["node_config"]), tags, 1)
    started = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    found = {
        machine["InstanceType"]: (
            machine["ImageId"] == image,
            machine["IamInstanceProfile"]["Arn"].rpartition("/")[2],
            [each["GroupId"] for each in machine["SecurityGroups"]] == [group],
            machine["MetadataOptions"]["HttpTokens"],
            machine.get("InstanceLifecycle"),
        )
        for machine in started
    }
    assert found == {
        "m7i.xlarge": (True, "relora-head", True, "required", None),
        "g6.2xlarge": (True, "relora-worker", True, "required", "spot"),
    }
    disks = [(disk["Size"], disk["VolumeType"]) for disk in ec2.describe_volumes()["Volumes"]]
    assert disks == [(200, "gp3")] * 2


def strict(schema: Any) -> Any:
    """A CRD's schema in which keys that it does not name are errors."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


@pytest.mark.parametrize(("file", "crd"), [("cluster.yaml", "rayclusters"), ("job.yaml", "rayjobs")])
def test_kuberay_takes_the_manifest(file: str, crd: str) -> None:
    path = CRDS / f"ray.io_{crd}.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}: set KUBERAY_CRDS to a folder with {path.name}")
    versions = {v["name"]: v for v in yaml.safe_load(path.read_text())["spec"]["versions"]}
    schema = strict(versions["v1"]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    manifest = yaml.safe_load(filled(CLUSTER / "kuberay" / file))
    jsonschema.validate(manifest, schema)
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    leave = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert int(leave[-1]) < worker["terminationGracePeriodSeconds"]
    (term,) = cluster["headGroupSpec"]["template"]["spec"]["affinity"]["nodeAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]["nodeSelectorTerms"]
    (rule,) = term["matchExpressions"]
    assert {rule["key"]: rule["values"][0]} == worker["nodeSelector"], "the head keeps off where workers are"
    assert rule["operator"] == "NotIn"
    worker["containers"][0]["lifecycl"] = {}
    with pytest.raises(jsonschema.ValidationError, match="lifecycl"):
        jsonschema.validate(manifest, schema)


def test_both_kuberay_manifests_have_the_same_cluster() -> None:
    cluster, job = (yaml.safe_load(filled(CLUSTER / "kuberay" / file)) for file in ("cluster.yaml", "job.yaml"))
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", "")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line.strip()]


def test_dockerfile_is_linted() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([beside, CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""
    assert [value for name, value in instructions() if name == "USER"] == ["1000"]


def test_dockerfiles_commands_install_what_a_job_needs(tmp_path: Path) -> None:
    """Its COPY and pip instructions as a script, in a clean virtual environment; apt and the user are the image's."""
    venv.create(tmp_path / "venv", with_pip=True)
    build, bin_folder = tmp_path / "build", tmp_path / "venv/bin"
    build.mkdir()
    script = ["set -eu", f"cd {build}"]
    for name, value in instructions():
        if name == "COPY":
            *sources, target = value.split()
            script.append(f"cp -r {' '.join(str(ROOT / source) for source in sources)} {target}")
        elif name == "RUN" and value.startswith("pip "):
            script.append(value)
    assert sum("pip install" in line for line in script) == 2
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", "\n".join(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    env.pop("PYTHONPATH", None)
    providers = (  # what the head's autoscaler imports, in the clouds that cluster/ has files for
        "import ray.autoscaler._private.aws.node_provider, ray.autoscaler._private.gcp.node_provider, gcsfs"
    )
    for command in (
        ["ray", "--version"],
        ["python", "-c", providers],
        ["python", "-m", "relora_ray.launch", "--help"],
    ):
        done = subprocess.run([bin_folder / command[0], *command[1:]], cwd=tmp_path, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
