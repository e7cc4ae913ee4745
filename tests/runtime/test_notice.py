"""A cloud's notice reaches Ray. The clouds' metadata servers are played, from their documentation; Ray is real."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from relora_ray.runtime.elastic import _draining
from relora_ray.runtime.notice import _first_look, leave, look_at_aws, look_at_gcp, nodes_of
from tests.cluster import Machines

Metadata = tuple[str, dict[str, str]]


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    """A server's URL, and what it says by path; AWS's asks for a session token."""
    says: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            assert self.path == "/latest/api/token"
            assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self._answer(200, "a token")

        def do_GET(self) -> None:
            aws = self.headers["X-aws-ec2-metadata-token"] == "a token"
            if not (aws if self.path.startswith("/latest") else self.headers["Metadata-Flavor"] == "Google"):
                self._answer(401, "")
            else:
                self._answer(200 if self.path in says else 404, says.get(self.path, ""))

        def _answer(self, status: int, body: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", says
    server.shutdown()
    server.server_close()


ACTION = "/latest/meta-data/spot/instance-action"
PREEMPTED = "/computeMetadata/v1/instance/preempted"


def in_seconds(seconds: float) -> tuple[float, str]:
    at = int(time.time() + seconds)
    return at, datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_notices_are_understood(metadata: Metadata) -> None:
    url, says = metadata
    aws, gcp = look_at_aws(url), look_at_gcp(url)
    says[PREEMPTED] = "FALSE"
    assert aws() is None
    assert gcp() is None
    at, text = in_seconds(120)
    says |= {ACTION: json.dumps({"action": "terminate", "time": text}), PREEMPTED: "TRUE\n"}
    assert aws() == at
    deadline = gcp()
    assert deadline == pytest.approx(time.time() + 30, abs=5)
    assert gcp() == deadline, "counted from when it was first seen"


def test_metadata_server_that_is_not_there_yet_is_waited_for() -> None:
    said: list[OSError | None] = [OSError("no route"), urllib.error.HTTPError("", 503, "busy", Message(), None), None]

    def look() -> None:
        if (error := said.pop(0)) is not None:
            raise error

    assert _first_look(look) is None
    assert said == []
    said.append(OSError("no route"))
    assert str(_first_look(look, within_s=-1.0)) == "no route"


def test_not_on_a_cloud_is_said(metadata: Metadata) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relora_ray.runtime.notice", "gcp", "--metadata-url", metadata[0], "--ip", "127.0.0.1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "gcp's metadata server does not answer: HTTP Error 404" in done.stderr


def test_notice_drains_this_machine_and_what_is_started_on_it_later(metadata: Metadata) -> None:
    """The test's machines have one IP address: they stand for Ray nodes started one after the other on one machine."""
    url, says = metadata
    says[PREEMPTED] = "FALSE"
    machines = Machines(1)
    ip = machines.nodes[0].node_ip_address
    watching = subprocess.Popen(
        [sys.executable, "-m", "relora_ray.runtime.notice", "aws", "--metadata-url", url, "--ip", ip,
         "--address", machines.address], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert watching.stderr is not None
        assert "listening for aws" in watching.stderr.readline()
        assert _draining() == set()
        says[ACTION] = json.dumps({"action": "terminate", "time": in_seconds(120)[1]})
        wait_for(lambda: machines.nodes[0].node_id in _draining() or machines.nodes[0].node_id not in alive(machines))
        again = machines.add()
        wait_for(lambda: again.node_id in _draining() or again.node_id not in alive(machines))
    finally:
        watching.kill()
        watching.wait()
        machines.shutdown()


def test_leave_waits_until_rays_daemons_have_ended() -> None:
    """They end by themselves when a drained machine is idle."""
    machines = Machines(1)
    try:
        node = machines.nodes[0]
        assert node.node_id in alive(machines)
        assert leave(machines.address, [node.node_id], node.node_ip_address, 60)
        assert node.node_id not in alive(machines)
    finally:
        machines.shutdown()


def alive(machines: Machines) -> list[str]:
    return nodes_of(machines.address, machines.nodes[0].node_ip_address)


def wait_for(found: Callable[[], bool]) -> None:
    for _ in range(300):
        if found():
            return
        time.sleep(0.1)
    raise AssertionError("nothing came in 30 s")
