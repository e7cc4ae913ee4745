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
from relora_ray.metrics import read
from relora_ray.runs import run_storage
from relora_ray.storage import Storage
from tests.s3 import BUCKET, SECRET, Server
from tests.tiny import TINY, losses, run, tiny_config

ROOT = Path(__file__).parent.parent


def command(module: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"relora_ray.{module}", *map(str, args)], capture_output=True, text=True, cwd=ROOT
    )


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
    done = command("launch", yaml_file, f"data.path={data}", f"storage={tmp_path}/runs", override)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_launch_trains_and_prints_a_summary(yaml_file: Path, data: Path, tmp_path: Path) -> None:
    """A local Ray of its own, one worker."""
    done = command("launch", yaml_file, f"data.path={data}", f"storage={tmp_path}/runs", "train.log_every_steps=4")
    assert done.returncode == 0, done.stderr[-3000:]
    for expected in (
        "starting, 1 worker(s) on cpu",
        "step  4/12  loss ",
        "cycle 1/3",
        "merge 3 of 14 layers",
        "after step      12",
        "merges    3 after steps 6, 9, 12",
        "tiny/model (plain Hugging Face folder)",
    ):
        assert expected in done.stdout, expected
    other = command("launch", yaml_file, f"data.path={data}", f"storage={tmp_path}/runs", "seed=9")
    assert other.returncode == 2
    assert "seed: 3 there, 9 here" in other.stderr


def test_gpus_that_are_not_there_are_refused(yaml_file: Path, data: Path, tmp_path: Path) -> None:
    done = command(
        "launch", yaml_file, f"data.path={data}", f"storage={tmp_path}/runs", "cluster.gpus_per_worker=1",
        "cluster.workers=99",
    )  # fmt: skip
    assert done.returncode == 1
    assert "cluster.workers=99 with cluster.gpus_per_worker=1 need 99 GPUs; this machine has" in done.stderr


def test_export_and_report(cfg: RunConfig, tmp_path: Path) -> None:
    run(cfg)
    url = run_storage(cfg).url
    done = command("export", url, tmp_path / "out", "--step", "6", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "the model after step 6" in done.stdout
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert str(next(model.parameters()).dtype) == "torch.bfloat16"
    again = command("export", url, tmp_path / "out")
    assert again.returncode == 2
    assert "ConfigError: " in again.stderr
    assert "is not empty: config.json is there" in again.stderr
    assert "merges    3" in command("report", url).stdout
    assert "is not a run" in command("report", tmp_path / "nowhere").stderr


def test_own_text_from_tokenizer_to_shards(austen_excerpt: Path, tmp_path: Path) -> None:
    done = command("data.tokenizer", austen_excerpt, "--out", tmp_path / "tokenizer", "--vocab-size", "400")
    assert done.returncode == 0, done.stderr
    done = command(
        "data.prepare", austen_excerpt, "--out", tmp_path / "tokens", "--tokenizer", tmp_path / "tokenizer",
        "--document-separator", "CHAPTER.*", "--validation-fraction", "0.2", "--num-workers", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vocabulary 400, fingerprint" in done.stdout


def test_driver_killed_and_the_same_command_again(yaml_file: Path, data: Path, tmp_path: Path, moto: Server) -> None:
    """Storage on S3. While a driver trains a second one is refused. After SIGKILL its Ray goes with it, and the next
    start gives the undisturbed run's losses."""
    options = json.dumps(moto.options)
    storage = f"s3://{BUCKET}/driver-{os.urandom(4).hex()}"
    length = ("steps=303", "method.merge_every_steps=6")
    command = [sys.executable, "-m", "relora_ray.launch", yaml_file, f"data.path={data}", f"storage={storage}",
               f"storage_options={options}", "train.log_every_steps=1",
               *length, "checkpoint.save_async=true", "checkpoint.save_every_steps=15"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if (at := re.match(r"step +(\d+)/", line)) and int(at[1]) >= 20:
            break
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=480)
    assert second.returncode == 2, second.stderr[-2000:]
    assert "RunBusyError: " in second.stderr
    assert "is being trained by another driver" in second.stderr
    assert process.poll() is None, "the first is still at work"
    process.kill()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    there = Storage(f"{storage}/tiny", moto.options)
    assert 0 < list_manifests(there)[-1] < 303
    how_it_is = [sys.executable, "-m", "relora_ray.status", there.url] + [
        f"--storage-option={name}={value}" for name, value in moto.options.items()
    ]
    said = subprocess.run(how_it_is, capture_output=True, text=True, cwd=ROOT).stdout
    assert re.search(r"saved     step \d+, \d+ s ago; \d+ steps after it are not", said), said
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=480)
    assert done.returncode == 0, done.stderr[-2000:]
    assert SECRET not in done.stdout + done.stderr
    _, records = run(tiny_config(data, tmp_path, *length, "train.log_every_steps=1"))
    found = {r["step"]: r["loss"] for r in read(there, "train")}
    assert found.keys() == losses(records).keys()
    assert found == pytest.approx(losses(records), rel=1e-5)
    said = subprocess.run(how_it_is, capture_output=True, text=True, cwd=ROOT).stdout
    assert "run tiny: finished" in said
    assert re.search(r"step      303 of 303\n  attempt   0002\.0001-\w+: 1 worker", said), said
    assert re.search(r"goodput   \d+\.\d%: \d+ s of \d+ (s|min) went into steps that count", said), said


def launch_and_signal(sent: signal.Signals, at: str, *args: str | Path) -> tuple[int, str]:
    """Launch a run and send it a signal when a line of its output begins with `at`; its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "relora_ray.launch", *map(str, args), "steps=30003", "train.log_every_steps=1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(at):
            process.send_signal(sent)
            break
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_interrupted_launch_says_how_to_continue(yaml_file: Path, data: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle: exit code 130, no traceback, and checkpoints to go on from."""
    code, errors = launch_and_signal(
        signal.SIGINT, "step     9/", yaml_file, f"data.path={data}", f"storage={tmp_path}/runs"
    )
    assert code == 130, errors[-2000:]
    assert "interrupted: run the same command again to continue" in errors
    assert "Traceback" not in errors
    assert list_manifests(Storage(f"{tmp_path}/runs/tiny"))[-1] >= 8


def test_sigterm_stores_the_state_before_it_ends_the_run(yaml_file: Path, data: Path, tmp_path: Path) -> None:
    """In the middle of a long cycle without saves: exit code 143, and the next start goes on from there."""
    code, errors = launch_and_signal(
        signal.SIGTERM, "step    20/", yaml_file, f"data.path={data}", f"storage={tmp_path}/runs",
        "method.merge_every_steps=30000", "checkpoint.save_every_steps=30000",
    )  # fmt: skip
    assert code == 143, errors[-2000:]
    saved = list_manifests(Storage(f"{tmp_path}/runs/tiny"))
    assert saved[:2] == [0, 3]
    assert saved[2] >= 20
    assert f"StoppedError: told to stop by SIGTERM: the state after step {saved[2]} is stored" in errors
    assert "Traceback" not in errors
