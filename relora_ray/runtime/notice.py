"""Tell Ray that this machine is about to be taken away: a run then stores its state and goes on without it.

    python -m relora_ray.runtime.notice aws          on a spot instance, beside `ray start`, for as long as it runs
    python -m relora_ray.runtime.notice gcp          the same on a Spot VM
    python -m relora_ray.runtime.notice now --seconds 100     a pod's preStop hook: returns when Ray has left the pod

Clouds say it beforehand (AWS two minutes, Google 30 seconds, Kubernetes its grace period), but only to the machine, and
open-source Ray does not listen: without this a spot machine that is reclaimed is a machine that is lost. If Ray is
started again on a machine that has had its notice, it is told again.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from datetime import datetime

from relora_ray import cli
from relora_ray.cli import command, seconds
from relora_ray.errors import ConfigError

logger = logging.getLogger(__name__)

AWS = "http://169.254.169.254"
GCP = "http://metadata.google.internal"
GCP_NOTICE_S = 30.0
"""Google does not say until when. cloud.google.com/compute/docs/instances/spot: "up to 30 seconds"."""
POLL_S = 5.0
CALL_S = 10.0
START_S = 60.0
"""A machine that has just started reaches its metadata server within this."""
TOKEN_S = 21600
"""How long a token of AWS's metadata server lasts, and one is taken for; the longest that it gives."""

Look = Callable[[], float | None]
"""When this machine will be taken away, in Unix time; None if nobody has said so. Raises OSError."""


def drain(address: str, node_id: str, deadline: float, cause: str) -> None:
    """Have Ray's scheduler keep off a machine and whoever asks told that it goes at `deadline` (Unix time)."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # --help must not wait for Ray
    from ray.core.generated import autoscaler_pb2

    accepted, why = GcsClient(address=address).drain_node(
        node_id, autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, cause, int(deadline * 1000)
    )
    assert accepted, why  # Ray refuses for idle machines only


def nodes_of(address: str, ip: str | None = None, name: str | None = None) -> list[str]:
    """Ids of the nodes, all or those with that IP or name, that Ray takes for alive."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import gcs_pb2

    found = GcsClient(address=address).get_all_node_info(timeout=CALL_S)
    return [
        node_id.hex()
        for node_id, node in found.items()
        if node.state == gcs_pb2.GcsNodeInfo.ALIVE
        and ip in (None, node.node_manager_address)
        and name in (None, node.node_name)
    ]


def look_at_aws(url: str = AWS) -> Look:
    """docs.aws.amazon.com, "Spot Instance interruption notices", read with a session token (IMDSv2)."""
    token, token_until = "", 0.0

    def look() -> float | None:
        nonlocal token, token_until
        if time.monotonic() > token_until:
            request = urllib.request.Request(
                f"{url}/latest/api/token",
                method="PUT",
                headers={"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)},
            )
            token = urllib.request.urlopen(request, timeout=CALL_S).read().decode()
            token_until = time.monotonic() + TOKEN_S / 2
        request = urllib.request.Request(
            f"{url}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
        )
        try:
            said = json.load(urllib.request.urlopen(request, timeout=CALL_S))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            if error.code == 401:
                token_until = 0.0
            raise
        return datetime.fromisoformat(said["time"].replace("Z", "+00:00")).timestamp()

    return look


def look_at_gcp(url: str = GCP) -> Look:
    """cloud.google.com/compute/docs/instances/create-use-spot, "preempted" in a VM's metadata."""
    since: float | None = None

    def look() -> float | None:
        nonlocal since
        request = urllib.request.Request(
            f"{url}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}
        )
        if since is None and urllib.request.urlopen(request, timeout=CALL_S).read().decode().strip() == "TRUE":
            since = time.time()
        return None if since is None else since + GCP_NOTICE_S

    return look


def watch(look: Look, address: Callable[[], str], ip: str, poll_s: float = POLL_S) -> None:
    """Drain every node of this machine after a notice, also those that join after it. Never returns."""
    drained: set[str] = set()
    while True:
        try:
            deadline = look()
            if deadline is not None:
                for node_id in set(nodes_of(address(), ip)) - drained:
                    drain(address(), node_id, deadline, "the cloud takes this machine away")
                    drained.add(node_id)
                    logger.warning("this machine goes in %.0f s: Ray has been told", deadline - time.time())
        except Exception as error:  # the metadata server or Ray's head is away for the moment: this must outlive it
            logger.warning("cannot look for a notice, or pass it on: %s: %s", type(error).__name__, error)
        time.sleep(poll_s)


def leave(address: str, node_ids: list[str], ip: str, seconds: float) -> bool:
    """Drain these nodes, and wait until Ray's daemons there have ended, which they do when nothing runs there any more;
    False if they have not within `seconds`."""
    deadline = time.time() + seconds
    for node_id in node_ids:
        drain(address, node_id, deadline, "this machine is being shut down")
    while time.time() < deadline:
        if not set(nodes_of(address, ip)) & set(node_ids):
            return True
        time.sleep(min(1.0, seconds / 10))
    return False


def _first_look(look: Look, within_s: float = START_S) -> OSError | None:
    """None when the metadata server answers; a machine that has just started may have to wait for it."""
    until = time.monotonic() + within_s
    while True:
        try:
            look()
        except OSError as error:
            is_answer = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if is_answer or time.monotonic() > until:
                return error
            time.sleep(1.0)
        else:
            return None


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser("notice", (__doc__ or "").splitlines()[0], "aws", "now --ip 10.0.0.7")
    parser.add_argument("source", choices=["aws", "gcp", "now"])
    parser.add_argument("--address", default="auto", help="of Ray's head, host:port; found on this machine if left out")
    parser.add_argument("--ip", help="this machine's, as Ray knows it; found if left out")
    parser.add_argument("--metadata-url", help="of the cloud's metadata server; its own if left out")
    parser.add_argument("--seconds", type=seconds, default=30.0, help="with 'now': until the machine is gone")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from ray._private.services import canonicalize_bootstrap_address_or_die, get_node_ip_address

    from relora_ray.runtime.address import knock

    def address() -> str:
        found: str = canonicalize_bootstrap_address_or_die(args.address)
        return found

    if args.source == "now" and (wrong := knock(address())):
        raise ConfigError(f"--address={args.address}: {wrong}.")
    ip = args.ip or get_node_ip_address()
    if args.source == "now":
        node_ids = nodes_of(address(), ip)
        if not node_ids:
            print(f"no Ray node at {ip} is alive: nothing to leave", file=sys.stderr)
            return 0
        return 0 if leave(address(), node_ids, ip, args.seconds) else 1
    look = {"aws": look_at_aws, "gcp": look_at_gcp}[args.source](
        args.metadata_url or {"aws": AWS, "gcp": GCP}[args.source]
    )
    if (error := _first_look(look)) is not None:
        print(f"{args.source}'s metadata server does not answer: {error}. Is this machine there?", file=sys.stderr)
        return 1
    logger.info("listening for %s to take this machine (%s) away", args.source, ip)
    watch(look, address, ip)
    return 0


if __name__ == "__main__":
    sys.exit(main())
