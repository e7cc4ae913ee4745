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
from relora_ray.metrics import read, read_all
from relora_ray.storage import Storage
from tests.s3 import BUCKET, SECRET, Server
from tests.tiny import TINY, losses, run, tiny_config

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


def test_demo_as_a_job(head: Head, data: Path, moto: Server) -> None:
    """Shorter than the demo, and otherwise the same: logs are followed, the exit code is 0, the run is in storage, and
    neither Ray's files nor what it tells about jobs have a secret in them."""
    storage = f"s3://{BUCKET}/job-{os.urandom(4).hex()}"
    submitted = submit(
        head, "configs/quickstart.yaml", f"storage={storage}", f"data.path={data}", "steps=9",
        f"storage_options={json.dumps(moto.options)}", "method.warm_start_steps=3", "method.merge_every_steps=3",
        "schedule.warmup_steps=1", "schedule.restart_warmup_steps=1", "train.eval_rows=4", "train.log_every_steps=1",
    )  # fmt: skip
    said, _ = submitted.communicate(timeout=300)
    assert submitted.returncode == 0, said[-3000:]
    for expected in (
        "starting, 2 worker(s) on cpu", "step 4/9", "merge 2 of 28 layers", "run quickstart (relora)", "succeeded",
    ):  # fmt: skip
        assert expected in said, f"{expected!r} is not in\n{said}"
    run_folder = Storage(f"{storage}/quickstart", moto.options)
    assert list_manifests(run_folder)[-1] == 9
    told = said + job(head, "list")
    # The job's working directory is our own, whose tests do name the test server's secret.
    files = [path for path in head.folder.rglob("*") if path.is_file() and "working_dir_files" not in path.parts]
    assert any(path.name.startswith("job-driver-raysubmit") for path in files), "its log is among them"
    for secret in (SECRET, TOKEN):
        assert secret not in told
        assert not [str(path) for path in files if secret.encode() in path.read_bytes()]


def test_job_that_is_stopped_and_submitted_again(head: Head, data: Path, tmp_path: Path) -> None:
    """In the middle of a long cycle without saves: the state is stored at the stop, and the run's losses stay."""
    config = tmp_path / "run.yaml"
    config.write_text(TINY)
    overrides = (
        "steps=303", "method.merge_every_steps=300", "checkpoint.save_every_steps=1000", "train.log_every_steps=1",
    )  # fmt: skip
    arguments = (config, f"data.path={data}", f"storage={tmp_path}/a", *overrides)
    waits = ("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}')
    first = submit(head, *arguments, options=waits)
    assert first.stdout is not None
    name = ""
    for line in first.stdout:
        if found := re.search(r"'(raysubmit_\w+)' submitted", line):
            name = found[1]
        if re.match(r"step +20/", line):
            break
    job(head, "stop", name)
    said = first.stdout.read()
    first.wait(60)
    there = Storage(f"{tmp_path}/a/tiny")
    saved = list_manifests(there)
    assert saved[:2] == [0, 3]
    assert 20 <= saved[2] < 303
    assert f"told to stop by SIGTERM: the state after step {saved[2]} is stored" in said + job(head, "logs", name)
    assert "STOPPED" in job(head, "status", name).upper()
    second = submit(head, *arguments)
    said, _ = second.communicate(timeout=300)
    assert second.returncode == 0, said[-3000:]
    assert [a["step"] for a in read_all(there, "attempt")] == [0, saved[2]]
    _, expected = run(tiny_config(data, tmp_path / "b", *overrides))
    assert {r["step"]: r["loss"] for r in read(there, "train")} == losses(expected)


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
