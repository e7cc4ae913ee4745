"""`ray job submit` on a real head with token authentication, storage on a real S3 server."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.daemons import Head, ray_command
from relora_ray.checkpoint import list_manifests
from relora_ray.runs.metrics import read, read_all
from relora_ray.storage import Storage
from tests.s3 import BUCKET, SECRET, Server
from tests.tiny import TINY, run_on, stored_losses, tiny_config

ROOT = Path(__file__).parent.parent.parent
TOKEN = os.urandom(32).hex()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    head = Head(2, env={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN})
    head.start()
    yield head
    head.stop()


def submit(head: Head, *launch: str | Path, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [
        *ray_command("job", "submit"), "--address", head.dashboard, "--working-dir", str(ROOT), *options, "--",
        "python", "-m", "relora_ray.launch", *map(str, launch),
    ]  # fmt: skip
    return subprocess.Popen(
        command, env={**head.env, "RAY_LOG_TO_STDERR": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def job(head: Head, *args: str) -> str:
    command = [*ray_command("job", args[0]), "--address", head.dashboard, *args[1:]]
    done = subprocess.run(command, env=head.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_job_that_is_stopped_and_submitted_again(head: Head, data: Path, tmp_path: Path, moto: Server) -> None:
    """Two workers, storage on S3. In the middle of a long cycle without saves the state is stored at the stop, and the
    run's losses stay. Logs are followed, the exit code is 0, and neither Ray's files nor what it tells about jobs have
    a secret in them."""
    config, storage = tmp_path / "run.yaml", f"s3://{BUCKET}/job-{os.urandom(4).hex()}"
    config.write_text(TINY)
    overrides = (
        "steps=303", "method.merge_every_steps=300", "checkpoint.save_every_steps=1000", "train.log_every_steps=1",
    )  # fmt: skip
    arguments = (
        config, f"data.path={data}", f"storage={storage}", f"storage_options={json.dumps(moto.options)}",
        "cluster.workers=2", *overrides,
    )  # fmt: skip
    waits = ("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}')
    first = submit(head, *arguments, options=waits)
    assert first.stdout is not None
    name = told = ""
    for line in first.stdout:
        told += line
        if found := re.search(r"'(raysubmit_\w+)' submitted", line):
            name = found[1]
        if re.match(r"step +20/", line):
            break
    told += job(head, "stop", name) + first.stdout.read()
    first.wait(60)
    there = Storage(f"{storage}/tiny", moto.options)
    saved = list_manifests(there)
    assert saved[:2] == [0, 3]
    assert 20 <= saved[2] < 303
    told += job(head, "logs", name)
    assert f"told to stop by SIGTERM: the state after step {saved[2]} is stored" in told
    assert "STOPPED" in job(head, "status", name).upper()
    second = submit(head, *arguments)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0, said[-3000:]
    for expected in (
        "2 worker(s) on cpu", "step 303/303", "merge 1 of 14 layers", "run tiny (relora)", "succeeded",
    ):  # fmt: skip
        assert expected in said, f"{expected!r} is not in\n{said}"
    assert [a["step"] for a in read_all(there, "attempt")] == [0, saved[2]]
    alone = tiny_config(data, tmp_path / "b", *overrides)
    run_on(2, alone)
    assert {r["step"]: r["loss"] for r in read(there, "train")} == stored_losses(alone)
    told += said + job(head, "list")
    # The job's working directory is our own, whose tests do name the test server's secret.
    files = [path for path in head.folder.rglob("*") if path.is_file() and "working_dir_files" not in path.parts]
    assert any(path.name.startswith("job-driver-raysubmit") for path in files), "its log is among them"
    for secret in (SECRET, TOKEN):
        assert secret not in told
        assert not [str(path) for path in files if secret.encode() in path.read_bytes()]


def test_job_with_a_bad_config_fails_with_its_message(head: Head, data: Path, tmp_path: Path) -> None:
    submitted = submit(head, "configs/quickstart.yaml", f"data.path={data}", f"storage={tmp_path}", "method.lora_rnk=4")
    said, _ = submitted.communicate(timeout=120)
    assert submitted.returncode == 1
    assert "ConfigError: unknown key method.lora_rnk=4. Did you mean 'lora_rank'?" in said
    assert "exit code 2" in said
    relative = submit(head, "configs/quickstart.yaml", f"data.path={data}")
    said, _ = relative.communicate(timeout=120)
    assert relative.returncode == 1
    assert "storage='runs' is relative, and a Ray job's working directory is a copy that goes away" in said


def test_submission_without_the_token_is_refused(head: Head) -> None:
    command = [*ray_command("job", "submit"), "--address", head.dashboard, "--", "true"]
    for wrong in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        env = {**head.env, **wrong}
        refused = subprocess.run(command, env=env, capture_output=True, text=True)
        assert refused.returncode != 0
        assert "uthenti" in refused.stderr + refused.stdout
