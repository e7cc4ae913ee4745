"""What is in cluster/: against Ray's schema and EC2's own model, the KubeRay CRDs, and by running it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


INSTALLED = {canonicalize_name(found.name): found for found in metadata.distributions()}


def filled(path: Path) -> str:
    """With every ${NAME} replaced; one that is not known is an error."""
    return re.sub(r"\$\{(\w+)\}", lambda found: VALUES[found[1]], path.read_text())


def test_every_placeholder_is_explained_at_the_top() -> None:
    top = (CLUSTER / "README.md").read_text().split("\n## ")[1]
    paths = [*CLUSTER.rglob("*.yaml"), *CLUSTER.rglob("*.json")]
    used = {name for path in paths for name in re.findall(r"\$\{(\w+)\}", path.read_text())}
    assert used == set(VALUES)
    assert set(re.findall(r"^\| `(\w+)`", top, re.MULTILINE)) == used


def test_readmes_fill_replaces_the_names_and_nothing_else() -> None:
    (fill,) = re.findall(r"^fill\(\) .*", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    for path in (CLUSTER / "aws/cluster.yaml", CLUSTER / "aws/head-policy.json", CLUSTER / "kuberay/job.yaml"):
        command = ["bash", "-c", f'{fill}\nfill < "$0"', path]
        done = subprocess.run(command, env={"PATH": os.environ["PATH"], **VALUES}, capture_output=True, text=True)
        assert done.stdout == filled(path), done.stderr
    done = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError" in done.stderr


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
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache

    for cache in (client_cache, resource_cache):  # by region: another test's server is gone
        cache.cache_clear()
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


def bootstrapped(aws: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The AWS file as `ray up` completes it, in an account that has what README makes."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    ec2, iam = aws.client("ec2"), aws.client("iam")
    for name in ("relora-head", "relora-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    group = ec2.create_security_group(GroupName="relora", Description="relora")["GroupId"]
    monkeypatch.setitem(VALUES, "SECURITY_GROUP", group)
    monkeypatch.setitem(VALUES, "AMI", ec2.describe_images()["Images"][0]["ImageId"])
    config = prepare_config(yaml.safe_load(filled(CLUSTER / "aws/cluster.yaml")))
    config = AWSNodeProvider.fillout_available_node_types_resources(config)
    validate_config(config)
    return bootstrap_aws(config)


def create_node(provider: Any, config: dict[str, Any], kind: str) -> list[str]:
    tags = {
        "ray-node-type": "head" if kind == "head" else "worker",
        "ray-launch-config": "x",
        "ray-node-name": kind,
    }
    return list(provider.create_node(copy.deepcopy(config["available_node_types"][kind]["node_config"]), tags, 1))


def test_ray_asks_ec2_for_the_machines_of_the_aws_file(aws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray up` up to the point where it would connect by SSH: what it fills in, and the machines that it starts."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    ec2 = aws.client("ec2")
    config = bootstrapped(aws, monkeypatch)
    image, group, kinds = VALUES["AMI"], VALUES["SECURITY_GROUP"], config["available_node_types"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    assert kinds["spot"]["resources"].items() >= {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}.items()
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind in ("head", "spot"):
        create_node(provider, config, kind)
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


Request = tuple[str, str, dict[str, str]]
"""An action, the ARN of one resource, and the condition keys that AWS gives with it."""


def requests_of(operation: str, params: dict[str, Any], tags: dict[str, dict[str, str]]) -> list[Request]:
    """What EC2 asks IAM about a call: every one of these must be allowed. After AWS's list of actions, resources and
    condition keys of EC2; `tags` are those of the machines that exist. A call that is not known here is a KeyError."""

    def arn(kind: str, name: str, account: str = VALUES["AWS_ACCOUNT"]) -> str:
        return f"arn:aws:ec2:{VALUES['AWS_REGION']}:{account}:{kind}/{name}"

    def with_tags(where: str, pairs: dict[str, str]) -> dict[str, str]:
        return {f"aws:{where}/{key}": value for key, value in pairs.items()}

    if operation == "DescribeInstances":
        return [("ec2:DescribeInstances", "*", {})]
    if operation == "TerminateInstances":
        return [
            ("ec2:TerminateInstances", arn("instance", name), with_tags("ResourceTag", tags[name]))
            for name in params["InstanceIds"]
        ]
    if operation == "CreateTags":
        asked = with_tags("RequestTag", {tag["Key"]: tag["Value"] for tag in params["Tags"]})
        return [
            ("ec2:CreateTags", arn("instance", name), asked | with_tags("ResourceTag", tags[name]))
            for name in params["Resources"]
        ]
    (spec,) = {"RunInstances": params}[operation]["TagSpecifications"]
    assert spec["ResourceType"] == "instance"
    asked = with_tags("RequestTag", {tag["Key"]: tag["Value"] for tag in spec["Tags"]})
    others = [
        arn("image", params["ImageId"], account=""),
        arn("key-pair", params["KeyName"]),
        arn("subnet", params["SubnetId"]),
        arn("network-interface", "*"),
        arn("volume", "*"),
        *[arn("security-group", group) for group in params["SecurityGroupIds"]],
    ]
    if params.get("InstanceMarketOptions", {}).get("MarketType") == "spot":
        others.append(arn("spot-instances-request", "*"))
    role = params["IamInstanceProfile"]["Arn"].replace(":instance-profile/", ":role/")  # README gives both one name
    tagging = [("ec2:CreateTags", arn("instance", "*"), asked | {"ec2:CreateAction": "RunInstances"})] if asked else []
    return [
        *tagging,
        ("ec2:RunInstances", arn("instance", "*"), asked),
        *[("ec2:RunInstances", other, {}) for other in others],
        ("iam:PassRole", role, {"iam:PassedToService": "ec2.amazonaws.com"}),
    ]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allows(policy: dict[str, Any], request: Request) -> bool:
    """IAM's answer, for policies that only allow and have no operator but StringEquals."""
    action, resource, context = request
    for statement in policy["Statement"]:
        assert statement.keys() <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert statement["Effect"] == "Allow"
        conditions = statement.get("Condition", {"StringEquals": {}})
        assert list(conditions) == ["StringEquals"]
        if (
            action in listed(statement["Action"])
            and any(fnmatchcase(resource, pattern) for pattern in listed(statement["Resource"]))
            and all(context.get(key) == value for key, value in conditions["StringEquals"].items())
        ):
            return True
    return False


def test_policy_of_the_aws_head_allows_what_ray_does_there_and_no_more(
    aws: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls that Ray's provider makes on the head are recorded, and each is held against the policy."""
    from botocore.client import BaseClient
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config, ec2 = bootstrapped(aws, monkeypatch), aws.client("ec2")
    policy = json.loads(filled(CLUSTER / "aws/head-policy.json"))
    (foreign,) = ec2.run_instances(ImageId=VALUES["AMI"], MinCount=1, MaxCount=1)["Instances"]
    made: list[tuple[str, dict[str, Any]]] = []
    call = BaseClient._make_api_call

    def record(client: Any, operation: str, params: dict[str, Any]) -> Any:
        made.append((operation, params))
        return call(client, operation, params)

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    with monkeypatch.context() as patch:
        patch.setattr(BaseClient, "_make_api_call", record)
        ids = [name for kind in ("spot", "on_demand") for name in create_node(provider, config, kind)]
        assert set(provider.non_terminated_nodes({})) == set(ids)
        provider.set_node_tags(ids[0], {"ray-node-status": "up-to-date"})
        provider.internal_ip(ids[0])
        provider.terminate_node(ids[0])
        provider.terminate_nodes(ids[1:])
    tags: dict[str, dict[str, str]] = {foreign["InstanceId"]: {}, **{name: {} for name in ids}}
    for tag in ec2.describe_tags()["Tags"]:
        if tag["ResourceId"] in tags:
            tags[tag["ResourceId"]][tag["Key"]] = tag["Value"]

    asked = [request for operation, params in made for request in requests_of(operation, params, tags)]
    assert [request for request in asked if not allows(policy, request)] == []
    assert {action for statement in policy["Statement"] for action in listed(statement["Action"])} == {
        action for action, _, _ in asked
    }, "the policy has no action that is not used"
    without = [statement for statement in policy["Statement"] if statement["Sid"] != "LaunchWith"]
    assert any(not allows({"Statement": without}, request) for request in asked), "and what is missing would be seen"

    launch = next(params for operation, params in made if operation == "RunInstances")
    other_tag = {"ResourceType": "instance", "Tags": [{"Key": "ray-cluster-name", "Value": "another"}]}
    head_profile = {"Arn": launch["IamInstanceProfile"]["Arn"].replace("relora-worker", "relora-head")}
    for operation, params in (
        ("TerminateInstances", {"InstanceIds": [foreign["InstanceId"]]}),
        (
            "CreateTags",
            {"Resources": [foreign["InstanceId"]], "Tags": [{"Key": "ray-cluster-name", "Value": "relora"}]},
        ),
        ("RunInstances", launch | {"TagSpecifications": [other_tag]}),
        ("RunInstances", launch | {"TagSpecifications": [other_tag | {"Tags": []}]}),
        ("RunInstances", launch | {"SecurityGroupIds": ["sg-of-others"]}),
        ("RunInstances", launch | {"IamInstanceProfile": head_profile}),
    ):
        assert not all(allows(policy, request) for request in requests_of(operation, params, tags)), (operation, params)


def test_readme_gives_the_aws_head_this_policy_alone() -> None:
    readme = (CLUSTER / "README.md").read_text()
    assert "fill < cluster/aws/head-policy.json > head-policy.json" in readme
    assert (
        "put-role-policy --role-name relora-head --policy-name workers --policy-document file://head-policy.json"
        in readme
    )
    assert set(re.findall(r"policy/(Amazon\w+)", readme)) == {"AmazonEC2ContainerRegistryReadOnly"}


def test_only_members_and_ssh_from_one_address_reach_the_aws_machines() -> None:
    rules = re.findall(r"authorize-security-group-ingress (.*)", (CLUSTER / "README.md").read_text())
    assert [re.sub(r"\$\(curl -s \S+\)/32", "ADDRESS", rule) for rule in rules] == [
        "--group-id $SECURITY_GROUP --protocol all --source-group $SECURITY_GROUP",
        "--group-id $SECURITY_GROUP --protocol tcp --port 22 --cidr ADDRESS",
    ]


def test_s3_knows_the_lifecycle_rule() -> None:
    import botocore.session
    from botocore.validate import ParamValidator

    found = re.search(r"--lifecycle-configuration \\\n\s*'(.*)'", (CLUSTER / "README.md").read_text())
    assert found is not None
    rules = json.loads(found[1])
    model = botocore.session.get_session().get_service_model("s3")
    shape = model.operation_model("PutBucketLifecycleConfiguration").input_shape
    report = ParamValidator().validate({"Bucket": "b", "LifecycleConfiguration": rules}, shape)
    assert not report.has_errors(), report.generate_report()
    (rule,) = rules["Rules"]
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}
    assert rule["Status"] == "Enabled"
    assert rule.keys() == {"ID", "Status", "Filter", "AbortIncompleteMultipartUpload"}, "nothing else expires"


def test_roles_of_the_google_head_hold_what_ray_calls() -> None:
    """Read in Ray's source: googleapiclient is not among what the tests install."""
    import ray

    source = (Path(ray.__file__).parent / "autoscaler/_private/gcp/node.py").read_text()
    compute = re.split(r"^class ", source, flags=re.MULTILINE)
    (body,) = (part for part in compute if part.startswith("GCPCompute(GCPResource)"))
    calls = {f"{kind}.{verb}" for kind, verb in re.findall(r"self\.resource\.(\w+)\(\)\s*\.(\w+)\(", body)}
    assert len(calls) == 8, calls
    calls -= {"instances.stop", "instances.start"}  # cache_stopped_nodes: false
    config = yaml.safe_load(filled(CLUSTER / "gcp/cluster.yaml"))
    assert config["provider"]["cache_stopped_nodes"] is False
    needed = {f"compute.{call.replace('insert', 'create')}" for call in calls}
    needed |= {  # of what an insert names: a disk, the subnet that Ray fills in with a public address, an account
        "compute.disks.create", "compute.subnetworks.use", "compute.subnetworks.useExternalIp",
        "compute.instances.setServiceAccount",
    }  # fmt: skip
    unscoped, scoped = (
        yaml.safe_load((CLUSTER / "gcp" / name).read_text())["includedPermissions"]
        for name in ("head-role.yaml", "head-own-role.yaml")
    )
    assert needed == {*unscoped, *scoped}
    assert not {permission for permission in unscoped if re.search(r"delete|setLabels|setMetadata|stop", permission)}
    readme = (CLUSTER / "README.md").read_text()
    assert set(re.findall(r"roles/compute\.(\w+)", readme)) == {"imageUser"}
    assert f"/instances/ray-{config['cluster_name']}-" in readme, (
        "the names that Ray gives, see its _generate_node_name"
    )


def test_only_members_and_ssh_from_one_address_reach_the_google_machines() -> None:
    text = (CLUSTER / "README.md").read_text().replace("\\\n", " ")
    rules = {}
    for name, options in re.findall(r"firewall-rules create (\S+) (.*)", text):
        rules[name] = dict(re.findall(r"--([\w-]+)=(\S+)", options))
    assert all(rule["target-service-accounts"] == "$members" for rule in rules.values())
    assert all(rule["direction"] == "INGRESS" for rule in rules.values())
    deny = rules.pop("relora-nobody-else")
    assert (deny["action"], deny["rules"], deny["source-ranges"]) == ("DENY", "all", "0.0.0.0/0")
    assert {name: (rule["action"], rule["rules"]) for name, rule in rules.items()} == {
        "relora-members": ("ALLOW", "all"),
        "relora-ssh": ("ALLOW", "tcp:22"),
    }
    assert rules["relora-members"]["source-service-accounts"] == "$members"
    assert rules["relora-ssh"]["source-ranges"] == "$(curl"  # one address, asked for
    assert all(int(rule["priority"]) < int(deny["priority"]) < 1000 for rule in rules.values()), "before the defaults"


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


def policies() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(filled(CLUSTER / "kuberay/network.yaml")))


def test_kubernetes_knows_the_rules_of_the_network_policies() -> None:
    """Against the copy of NetworkPolicy's ingress rules in KubeRay's CRD; Kubernetes's own schema is in no package."""
    path = CRDS / "ray.io_rayclusters.yaml"
    if not path.exists():
        pytest.skip(f"KubeRay's CRDs are not in {CRDS}: set KUBERAY_CRDS to a folder with {path.name}")
    versions = {v["name"]: v for v in yaml.safe_load(path.read_text())["spec"]["versions"]}
    spec = versions["v1"]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    schema = strict(spec["networkPolicy"]["properties"]["head"]["properties"]["ingressRules"])
    for policy in policies():
        assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
        assert policy["spec"].keys() == {"podSelector", "policyTypes", "ingress"}
        jsonschema.validate(policy["spec"]["ingress"], schema)
    with pytest.raises(jsonschema.ValidationError, match="form"):
        jsonschema.validate([{"form": []}], schema)


def reached(target: dict[str, str], source: dict[str, str], port: int) -> bool:
    """Whether a pod with labels `source` may connect to one with labels `target`, both in the policies' namespace."""

    def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
        return selector["matchLabels"].items() <= labels.items()

    chosen = [policy["spec"] for policy in policies() if selects(policy["spec"]["podSelector"], target)]
    return not chosen or any(
        any(selects(peer["podSelector"], source) for peer in rule["from"])
        and ("ports" not in rule or port in [each["port"] for each in rule["ports"]])
        for spec in chosen
        for rule in spec["ingress"]
    )


@pytest.mark.parametrize("file", ["cluster.yaml", "job.yaml"])
def test_pods_are_reached_by_each_other_and_the_dashboard_by_operator_and_submitter(file: str) -> None:
    manifest = yaml.safe_load(filled(CLUSTER / "kuberay" / file))
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    (workers,) = cluster["workerGroupSpecs"]
    # As KubeRay completes the labels, and Kubernetes those of a job's pods.
    head = {**cluster["headGroupSpec"]["template"]["metadata"]["labels"], "ray.io/node-type": "head"}
    worker = {**workers["template"]["metadata"]["labels"], "ray.io/node-type": "worker"}
    submitter = {"batch.kubernetes.io/job-name": manifest["metadata"]["name"]}
    operator = {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/instance": "kuberay-operator"}
    stranger = {"app": "shop"}
    for target in (head, worker):
        for port in (6379, 8265, 29500, 10002):
            assert reached(target, head, port)
            assert reached(target, worker, port)
            assert not reached(target, stranger, port)
            for other in (operator, submitter):
                assert reached(target, other, port) == (target is head and port == 8265)
    assert reached({"app": "shop"}, stranger, 80), "others are left alone"


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


def needed_here(*needed: str) -> set[str]:
    """Names of what is installed here of what these need."""
    known: set[tuple[str, str]] = set()
    todo = [(requirement, "") for requirement in map(Requirement, needed)]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {(name, ""), *((name, extra) for extra in requirement.extras)} - known:
            known.add(wanted)
            found = INSTALLED.get(name)
            todo += [(Requirement(text), wanted[1]) for text in (found.requires if found else None) or ()]
    return {name for name, _ in known} & INSTALLED.keys()


def lend(environment: Path, names: set[str]) -> None:
    """Link packages that are installed here into a virtual environment, so that they are not unpacked again: pip takes
    what is there and is what it would install, and fetches the rest."""
    (site,) = environment.glob("lib/python3*/site-packages")
    files = [file for name in names for file in INSTALLED[name].files or ()]
    for file in files:
        source, target = Path(str(file.locate())), site / file
        if file.parts[0] == "..":  # a command, which begins with the path of this environment's Python
            target = environment / "bin" / file.name
            target.write_bytes(source.read_bytes().replace(sys.prefix.encode(), str(environment).encode()))
            target.chmod(0o755)
        elif source.exists() and not target.exists():  # some packages have files of one name
            target.parent.mkdir(parents=True, exist_ok=True)
            link(source, target)


def link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def test_dockerfiles_commands_install_what_a_job_needs(tmp_path: Path) -> None:
    """Its COPY and pip instructions as a script, in a virtual environment that has nothing but what such an image has
    of the packages here; apt and the user are the image's."""
    venv.create(tmp_path / "venv", with_pip=True)
    (extras,) = re.findall(r"\.(\[[a-z,]+\])", (CLUSTER / "Dockerfile").read_text())
    lend(tmp_path / "venv", needed_here("torch", f"relora-ray{extras}") - {"relora-ray"})
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
    env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PIP_NO_COMPILE": "1"}  # in half the time
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
        ["relora-ray", "--version"],
        ["relora-ray", "configs", "quickstart", "mine.yaml"],
    ):
        done = subprocess.run([bin_folder / command[0], *command[1:]], cwd=tmp_path, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "mine.yaml").read_bytes() == (ROOT / "configs/quickstart.yaml").read_bytes()
    told = subprocess.run([bin_folder / "relora-ray", "configs", "--path"], env=env, capture_output=True, text=True)
    assert Path(told.stdout.strip(), "quickstart/austen.txt.bz2").is_file()
    assert Path(told.stdout.strip()).parent.parent.name == "site-packages", "from the wheel, not from the checkout"
