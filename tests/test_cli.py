"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from relora_ray.checkpoint import list_manifests
from relora_ray.config import RunConfig
from relora_ray.runs.metrics import read
from relora_ray.runs.places import run_storage
from relora_ray.storage import Storage
from tests.commands import ROOT, command
from tests.s3 import BUCKET, SECRET, Server
from tests.tiny import TINY, losses, run, tiny_config


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(TINY)
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=/nowhere", "DataError: data.path='/nowhere' has no index.json"),
        ("method.lora_rank=64", "ConfigError: method.lora_rank=64 is more than 32"),
        ("model.vocab_size=100", "DataError: model.vocab_size=100 is less than the 2048 token ids"),
        ("data.fingerprint=0123456789abcdef", "but the run needs 0123456789abcdef"),
        ("data.seq_len=100000", "not enough for one row of data.seq_len=100000"),
        ("data.path=foo://x", "ConfigError: data.path='foo://x' is of scheme foo:, where objects cannot be kept"),
        ("storage=/dev/null", "StorageError: cannot "),
    ],
)
def test_launch_refuses_before_ray_starts(
    yaml_file: Path, data: Path, tmp_path: Path, override: str, message: str
) -> None:
    done = command("relora_ray.launch", yaml_file, f"data.path={data}", f"storage={tmp_path}/runs", override)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_gpus_that_are_not_there_are_refused(yaml_file: Path, data: Path, tmp_path: Path) -> None:
    done = command(
        "relora_ray.launch", yaml_file, f"data.path={data}", f"storage={tmp_path}/runs", "cluster.gpus_per_worker=1",
        "cluster.workers=99",
    )  # fmt: skip
    assert done.returncode == 1
    assert "cluster.workers=99 with cluster.gpus_per_worker=1 need 99 GPUs; this machine has" in done.stderr


def test_export_and_report(cfg: RunConfig, tmp_path: Path) -> None:
    run(cfg)
    url = run_storage(cfg).url
    done = command("relora_ray.commands.export", url, tmp_path / "out", "--step", "6", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "the model after step 6" in done.stdout
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert str(next(model.parameters()).dtype) == "torch.bfloat16"
    again = command("relora_ray.commands.export", url, tmp_path / "out")
    assert again.returncode == 2
    assert "ConfigError: " in again.stderr
    assert "is not empty: README.md is there" in again.stderr
    assert "merges    3" in command("relora_ray.commands.report", url).stdout
    assert "is not a run" in command("relora_ray.commands.report", tmp_path / "nowhere").stderr


def test_own_text_from_tokenizer_to_shards(austen_excerpt: Path, tmp_path: Path) -> None:
    done = command("relora_ray.data.tokenizer", austen_excerpt, "--out", tmp_path / "tokenizer", "--vocab-size", "400")
    assert done.returncode == 0, done.stderr
    done = command(
        "relora_ray.data.prepare", austen_excerpt, "--out", tmp_path / "tokens", "--tokenizer", tmp_path / "tokenizer",
        "--document-separator", "CHAPTER.*", "--validation-fraction", "0.2", "--num-workers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vocabulary 400, fingerprint" in done.stdout


def test_driver_stopped_in_two_ways_and_the_same_command_again(
    yaml_file: Path, data: Path, tmp_path: Path, moto: Server
) -> None:
    """SIGINT and SIGKILL, one start after the other; storage on S3, a local Ray of each driver's own. While one trains
    a second is refused. In the end the losses are an undisturbed run's. (SIGTERM: of a job, and of a sweep.)"""
    options = json.dumps(moto.options)
    storage = f"s3://{BUCKET}/driver-{os.urandom(4).hex()}"
    length = ("steps=603", "method.merge_every_steps=100", "train.log_every_steps=1")
    start: list[str | Path] = [
        sys.executable, "-m", "relora_ray.launch", yaml_file, f"data.path={data}", f"storage={storage}",
        f"storage_options={options}", *length, "checkpoint.save_async=true", "checkpoint.save_every_steps=15",
    ]  # fmt: skip
    there = Storage(f"{storage}/tiny", moto.options)

    def newest() -> int:
        return list_manifests(there)[-1]

    process = trained_until(20, start, "starting, 1 worker(s) on cpu")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors[-2000:]
    assert "told to stop by Ctrl-C: the state is stored first. Ctrl-C again ends at once" in said
    assert "Traceback" not in errors
    stored = newest()
    assert 20 <= stored < 603
    assert f"StoppedError: told to stop by Ctrl-C: the state after step {stored} is stored." in errors

    process = trained_until(stored + 5, start)
    second = subprocess.run(start, capture_output=True, text=True, cwd=ROOT, timeout=480)
    assert second.returncode == 2, second.stderr[-2000:]
    assert "RunBusyError: " in second.stderr
    assert "is being trained by another driver" in second.stderr
    assert process.poll() is None, "the first is still at work"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert stored <= newest() < 603
    how_it_is = [sys.executable, "-m", "relora_ray.commands.status", there.url] + [
        f"--storage-option={name}={value}" for name, value in moto.options.items()
    ]
    said = subprocess.run(how_it_is, capture_output=True, text=True, cwd=ROOT).stdout
    assert re.search(r"saved     step \d+, \d+ s ago; \d+ steps after it are not", said), said

    done = subprocess.run(start, capture_output=True, text=True, cwd=ROOT, timeout=480)
    assert done.returncode == 0, done.stderr[-2000:]
    assert SECRET not in done.stdout + done.stderr
    for expected in (
        "step 603/603  loss ",
        "cycle 6/6",
        "merge 6 of 14 layers",
        "after step     603",
        "merges    6 after steps 103, 203, 303, 403, 503, 603",
        "tiny/model (plain Hugging Face folder)",
    ):
        assert expected in done.stdout, expected
    _, records = run(tiny_config(data, tmp_path, *length))
    found = {r["step"]: r["loss"] for r in read(there, "train")}
    assert found.keys() == losses(records).keys()
    assert found == pytest.approx(losses(records), rel=1e-5)
    said = subprocess.run(how_it_is, capture_output=True, text=True, cwd=ROOT).stdout
    assert "run tiny: finished" in said
    assert re.search(r"step      603 of 603\n  attempt   0003\.0001-\w+: 1 worker", said), said
    assert re.search(r"goodput   \d+\.\d%: \d+ s of \d+ (s|min) went into steps that count", said), said
    again = subprocess.run(start, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"{there.url} has made all of its 603 updates: nothing is left to do\nrun tiny")
    other = subprocess.run([*start, "seed=9"], capture_output=True, text=True, cwd=ROOT)
    assert other.returncode == 2
    assert "seed: 3 there, 9 here" in other.stderr


def trained_until(step: int, start: list[str | Path], before: str = "") -> subprocess.Popen[str]:
    """The driver, when it has printed a line of this step or a later one, and `before` before it."""
    process = subprocess.Popen(
        start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if (at := re.match(r"step +(\d+)/", line)) and int(at[1]) >= step:
            break
    assert before in said
    return process
