"""What users get wrong, command by command: one message, an exit code, no traceback. In this process, with real runs.

Each row is a command line with what must be said. `{}` in it are things that `Things` makes, by name: runs of which
something is broken, files and folders of the wrong kind.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from relora_ray import cli
from relora_ray.runs.places import run_storage
from relora_ray.runtime import driver
from tests.s3 import BUCKET, FaultyProxy, Server
from tests.tiny import TINY, run, tiny_config

ROOT = Path(__file__).parent.parent
KEYS = "--storage-option=key=nobodys-key --storage-option=secret=nobodys-secret"


class Things:
    """What the rows name. Each is made when it is asked for, below one folder."""

    def __init__(self, folder: Path, finished: Path, data: Path, moto: Server, proxy: FaultyProxy) -> None:
        self.folder, self._finished, self._data, self._moto, self._proxy = folder, finished, data, moto, proxy

    def __getitem__(self, name: str) -> str:
        return str(getattr(self, name)())

    # Files and folders.

    def tmp(self) -> Path:
        return self.folder

    def data(self) -> Path:
        return self._data

    def missing(self) -> Path:
        return self.folder / "nowhere"

    def file(self) -> Path:
        (self.folder / "file").write_text("text\n")
        return self.folder / "file"

    def empty(self) -> Path:
        (self.folder / "empty").mkdir()
        return self.folder / "empty"

    def full(self) -> Path:
        """A folder with something in it."""
        (self.folder / "full").mkdir()
        (self.folder / "full" / "notes.txt").write_text("mine")
        return self.folder / "full"

    def binary(self) -> Path:
        (self.folder / "binary").write_bytes(bytes(range(256)))
        return self.folder / "binary"

    # Configs.

    def cfg(self) -> Path:
        return self._yaml(TINY)

    def twice(self) -> Path:
        return self._yaml(TINY + "seed: 4\n")

    def tabs(self) -> Path:
        return self._yaml("name: x\nmodel:\n\tsize: 9m\n")

    def nothing(self) -> Path:
        return self._yaml("")

    def comment(self) -> Path:
        return self._yaml("# to be written\n")

    def items(self) -> Path:
        return self._yaml("- name: x\n")

    def deep(self) -> Path:
        return self._yaml("[" * 5000)

    def sweep(self) -> Path:
        return self._yaml(TINY + "sweep: {space: {optimizer.learning_rate: [1.0e-2, 2.0e-2]}}\n")

    def sweep_of_nothing(self) -> Path:
        return self._yaml(TINY + "sweep: {space: {}}\n")

    def sweep_of_unknown(self) -> Path:
        return self._yaml(TINY + "sweep: {space: {optimizer.rate: [1]}}\n")

    def sweep_list(self) -> Path:
        return self._yaml(TINY + "sweep: [1]\n")

    def _yaml(self, text: str) -> Path:
        (self.folder / "run.yaml").write_text(text)
        return self.folder / "run.yaml"

    # Runs.

    def run(self) -> Path:
        if not (self.folder / "tiny").exists():
            shutil.copytree(self._finished, self.folder / "tiny")
        return self.folder / "tiny"

    def _broken(self, pattern: str, text: bytes) -> Path:
        run = self.run()
        found = sorted(run.glob(pattern))
        assert found, pattern
        for path in found:
            path.write_bytes(text)
        return run

    def run_without_config(self) -> Path:
        shutil.rmtree(self.run() / "setup")
        return self.run()

    def run_with_config_cut(self) -> Path:
        return self._broken("setup/*/config.yaml", b"name: [")

    def run_with_config_of_bytes(self) -> Path:
        return self._broken("setup/*/config.yaml", bytes(range(256)))

    def run_with_manifests_cut(self) -> Path:
        return self._broken("manifests/*.json", b'{"step": ')

    def run_with_metrics_of_bytes(self) -> Path:
        return self._broken("metrics/*/*.jsonl", bytes(range(256)))

    def run_with_metrics_of_others(self) -> Path:
        """JSON, but no records of ours."""
        kinds = ("attempt", "train", "eval", "boundary", "checkpoint", "end")
        return self._broken("metrics/*/*.jsonl", "".join(json.dumps({"kind": k}) + "\n" for k in kinds).encode())

    def run_with_fork_cut(self) -> Path:
        (self.run() / "fork.json").write_bytes(b'{"parent"')
        return self.run()

    def run_with_fork_of_others(self) -> Path:
        (self.run() / "fork.json").write_bytes(b"[1]")
        return self.run()

    def run_with_pages_cut(self) -> Path:
        """As a run has them that had a coordinator."""
        for path in ("restarts/0001.0001-1f2e3d4c.json", "progress/0001-1f2e3d4c.json", "drivers/1f2e3d4c.json"):
            (self.run() / path).parent.mkdir(exist_ok=True)
            (self.run() / path).write_bytes(b'{"attempt": ')
        return self.run()

    def run_with_page_of_others(self) -> Path:
        (self.run() / "restarts").mkdir()
        (self.run() / "restarts/0001.0001-1f2e3d4c.json").write_bytes(b"[]")
        return self.run()

    def run_with_index_cut(self) -> Path:
        return self._broken("delta/*/index.json", b"{")

    def run_with_weights_cut(self) -> Path:
        return self._broken("delta/*/*.safetensors", b"x")

    def run_with_data_cut(self) -> Path:
        return self._broken("setup/*/data.json", b"{")

    def table(self) -> Path:
        return ROOT / "configs/ablations/resets.yaml"

    def results_cut(self) -> Path:
        """A folder of results."""
        (self.folder / "results").mkdir()
        (self.folder / "results" / "results.json").write_text('{"runs": [')
        return self.folder / "results"

    def run_with_pin_cut(self) -> Path:
        (self.run() / "pins").mkdir()
        (self.run() / "pins/other.1.json").write_bytes(b"{")
        return self.run()

    def run_with_term_of_bytes(self) -> Path:
        return self._broken("terms/*.json", b"\xff")

    def no_such_bucket(self) -> str:
        return f"s3://no-such-bucket-here/run --storage-option=endpoint_url={self._moto.endpoint} {KEYS}"

    def wrong_keys(self) -> str:
        """A server that refuses them."""
        for method in ("GET", "HEAD", "PUT", "POST"):
            self._proxy.add("403", method, times=1000)
        return f"s3://{BUCKET}/run --storage-option=endpoint_url={self._proxy.endpoint} {KEYS}"

    def s3(self) -> str:
        options = json.dumps(self._moto.options).replace(" ", "")
        return f"storage_options={options}"

    def denied(self) -> str:
        self.wrong_keys()
        options = json.dumps(self._moto.options | {"endpoint_url": self._proxy.endpoint}).replace(" ", "")
        return f"storage=s3://{BUCKET}/runs storage_options={options}"


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = tiny_config(data, tmp_path_factory.mktemp("finished"))
    run(cfg)
    return Path(run_storage(cfg).url)


@pytest.fixture
def things(finished: Path, data: Path, tmp_path: Path, moto: Server, proxy: FaultyProxy) -> Things:
    return Things(tmp_path, finished, data, moto, proxy)


LAUNCH = "launch {cfg} data.path={data} storage={tmp}/runs "
MISTAKES = """
launch {missing}.yaml                          | config file '{tmp}/nowhere.yaml' cannot be read: No such file
launch {empty}                                 | config file '{tmp}/empty' cannot be read: Is a directory
launch {file}/x.yaml                           | cannot be read: Not a directory
launch {binary}                                | not UTF-8 text
launch {nothing}                               | holds NoneType, not a mapping
launch {comment}                               | not a mapping
launch {items}                                 | holds list, not a mapping
launch {file}                                  | holds str, not a mapping
launch {twice}                                 | key 'seed' is there twice
launch {tabs}                                  | is not valid YAML
launch {deep}                                  | is not valid YAML
launch                                         | no config is given. `relora-ray configs` lists those that come
launch {cfg} --wiat                            | unrecognized arguments: --wiat
@ step=5                                       | unknown key step
@ steps=x                                      | steps='x'
@ steps=-3                                     | steps=-3
@ steps=1.5                                    | steps=1.5
@ steps=true                                   | steps=True is neither a number nor a name
@ optimizer.learning_rate=.nan                 | optimizer.learning_rate=nan
@ optimizer.learning_rate=.inf                 | optimizer.learning_rate=inf
@ optimizer.learning_rate=-1                   | optimizer.learning_rate=-1
@ steps                                        | is not of the form key=value
@ steps=[                                      | not valid YAML
@ seed.x=1                                     | 'seed' is a value, not a section
@ method.kind=rolera                           | is not a method
@ storage=foo://x/y                            | is of scheme foo:, where objects cannot be kept
@ storage=gs://bucket/runs                     | gcsfs
@ storage=s3:/bucket                           | is half a URL
@ storage={tmp}/a#b                            | has a #
@ storage=s3://k:s@bucket/x                    | must not carry credentials in its URL
@ storage={file}                               | Not a directory
@ storage=s3://no-such-bucket-here/runs {s3}   | The specified bucket does not exist
@ {denied}                                     | PermissionError
@ data.path={missing}                          | has no index.json
@ data.path={file}                             | has no index.json
@ data.path={empty}                            | has no index.json
@ model={{huggingface:&{missing}}}             | there is no such
@ model.init_from={missing}                    | there is no such
@ model.init_from=./nowhere                    | there is no such
@ model.init_from=configs/nowhere              | there is no such
@ model.init_from=~/nowhere@5                  | there is no such
@ model={{huggingface:&configs/nowhere}}       | there is no such
@ model={{huggingface:&nobodys/model}}         | there is no such folder, and the hub cannot be asked
@ model={{huggingface:&{empty}}}               | is not a readable Hugging Face configuration
@ model.init_from={empty}                      | model.init_from
@ model.init_from={run}@5000                   | no checkpoint at step 5000
launch {sweep_of_nothing}                      | sweep.space
launch {sweep_of_unknown}                      | optimizer.rate
launch {sweep_list}                            | sweep
status {missing}                               | is not a run
status {file}                                  | is a file. Give the folder
status {empty}                                 | is not a run
status {full}                                  | is not a run
status                                         | the following arguments are required: RUN
status {run} --storage-option=x                | is not of the form key=value
status {run_without_config}                    | config.yaml
status {run_with_config_cut}                   | somebody has changed it
status {run_with_config_of_bytes}              | somebody has changed it
status foo://x/y                               | is of scheme foo:, where objects cannot be kept
status gs://bucket/run                         | gcsfs
status s3:/bucket/run                          | is half a URL
status s3://bucket/run#1                       | must not have a query or a fragment
status s3://key:secret@bucket/run              | must not carry credentials in its URL
status {no_such_bucket}                        | The specified bucket does not exist
status {wrong_keys}                            | PermissionError
report {missing}                               | is not a run
report {file}                                  | is a file. Give the folder
report {run_without_config}                    | config.yaml
report {run_with_config_cut}                   | somebody has changed it
report {no_such_bucket}                        | The specified bucket does not exist
report {wrong_keys}                            | PermissionError
report {empty}                                 | is not a run
report {full} --html {tmp}/x.html              | is not a run
report {run} {missing}                         | is not a run
report {run} --html {run}                      | is no .html or .htm file
report {run} --against nobody                  | --against 'nobody' is none of these runs: tiny
report {run} --dollars-per-hour nan            | argument --dollars-per-hour: 'nan' is no number of dollars above 0
report                                         | the following arguments are required: RUN
export {missing} {tmp}/out                     | is not a run
export {run} {run}/model                       | is not empty: README.md is there
export {run} {file}                            | is a file. Give the folder
export {run} {file}/out                        | Not a directory
export {run} /proc/nowhere                     | cannot write /proc/nowhere
export {run} foo://x/y                         | is of scheme foo:, where objects cannot be kept
export {run} s3:bucket/x                       | is half a URL
export {run} {tmp}/out --step 5000             | no checkpoint at step 5000
export {run} {tmp}/out --step -1               | argument --step: '-1' is not a whole number of 0 or more
export {run} {tmp}/out --step two              | argument --step: 'two' is not a whole number of 0 or more
export {run} {tmp}/out --step nan              | argument --step: 'nan' is not a whole number of 0 or more
export {run} {tmp}/out --dtype int8            | invalid choice: 'int8'
export {run}                                   | the following arguments are required: OUT
export {run_with_data_cut} {tmp}/out           | somebody has changed it
checkpoints                                    | the following arguments are required: command
checkpoints remove {run}                       | invalid choice: 'remove'
checkpoints list {missing}                     | is not a run
checkpoints show {run} --step 5000             | no checkpoint at step 5000
checkpoints show {run} --step 1e3              | argument --step: '1e3' is not a whole number of 0 or more
checkpoints verify {run} --step 5000           | no checkpoint at step 5000
checkpoints prune {run}                        | the following arguments are required: --keep-last
checkpoints prune {run} --keep-last 0          | argument --keep-last: '0' is not a whole number of 1 or more
checkpoints prune {run} --keep-last 1 --keep-every-steps -2 | '-2' is not a whole number of 0 or more
checkpoints prune {missing} --keep-last 1 --yes | is not a run
checkpoints copy {run} {full}                  | is not empty
checkpoints copy {run} {file}                  | is a file. Give the folder
checkpoints copy {run} {tmp}/a#b/c             | has a #
checkpoints copy {missing} {tmp}/copy          | is not a run
checkpoints own {empty}                        | is not a run
checkpoints delete {full} --yes                | is not a run
checkpoints delete {missing} --yes             | is not a run
spectrum {missing} --out {tmp}/out             | is not a run
spectrum {run}                                 | the following arguments are required: --out
spectrum {run} --out {file}                    | {tmp}/file
spectrum {run} --out {file}/x                  | {tmp}/file/x
spectrum {run} --out {tmp}/out --step 5000     | no checkpoint at step 5000
spectrum {run} --out {tmp}/out --from 12       | there is no update between step 12 and step 12
spectrum {run} --out {tmp}/out --labels a b    | --labels has 2 names for 1 runs
ablations {missing}.yaml --out {tmp}/out       | No such file
ablations {binary} --out {tmp}/out             | not UTF-8 text
ablations {empty} --out {tmp}/out              | Is a directory
ablations {nothing} --out {tmp}/out            | {tmp}/run.yaml
ablations {items} --out {tmp}/out              | {tmp}/run.yaml
ablations {tabs} --out {tmp}/out               | {tmp}/run.yaml
ablations {cfg} --out {tmp}/out                | {tmp}/run.yaml
ablations {cfg} --out {tmp}/out --jobs 0       | argument --jobs: '0' is not a whole number of 1 or more
ablations configs/ablations/resets.yaml --out {tmp}/out data.path={missing} | has no index.json
ablations configs/ablations/resets.yaml --out {file} data.path={data} model.vocab_size=2048 | {tmp}/file
conformance --only nothing                     | --only nothing is no check. They are
conformance --implementation nowhere:Theirs    | --implementation nowhere:Theirs
conformance --implementation os                | --implementation os
conformance --configs {missing}                | {tmp}/nowhere
runtime.notice azure                           | invalid choice: 'azure'
runtime.notice now --seconds soon              | argument --seconds
runtime.notice now --seconds nan               | argument --seconds
runtime.notice now --seconds -5                | argument --seconds
cluster.local --data {missing}                 | there is no data in {tmp}/nowhere
cluster.local --data {data} --machines -1      | argument --machines
cluster.local --data {data} --machines two     | argument --machines
"""
ROWS = [tuple(map(str.strip, line.split(" | "))) for line in MISTAKES.strip().splitlines()]
DAMAGED = """
report {run_with_manifests_cut}                    | 0 | merges    3 after steps 6, 9, 12
report {run_with_metrics_of_bytes}                 | 0 | merges    0
report {run_with_metrics_of_others}                | 0 | merges    0
report {run_with_pages_cut} --html {tmp}/x.html     | 0 | x.html (4.
report {run_with_metrics_of_others} --html {tmp}/x.html | 0 | x.html (4.
report {run_with_fork_cut}                         | 1 | fork.json does not say from which run this is a fork
report {run_with_fork_of_others}                   | 1 | fork.json does not say from which run this is a fork
status {run_with_manifests_cut}                    | 0 | is not a readable manifest
status {run_with_metrics_of_bytes}                 | 0 | saved     step 12
status {run_with_metrics_of_others}                | 0 | saved     step 12
status {run_with_pages_cut}                        | 0 | saved     step 12
status {run_with_page_of_others}                   | 0 | saved     step 12
status {run_with_term_of_bytes}                    | 0 | saved     step 12
export {run_with_manifests_cut} {tmp}/out          | 1 | is not a readable manifest
export {run_with_index_cut} {tmp}/out              | 1 | index.json has 1 bytes; its manifest recorded
export {run_with_weights_cut} {tmp}/out            | 1 | safetensors has 1 bytes; its manifest recorded
checkpoints list {run_with_manifests_cut}          | 0 | tokens  boundary  world
checkpoints show {run_with_manifests_cut}          | 1 | is not a readable manifest
checkpoints show {run_with_index_cut}              | 1 | index.json has 1 bytes
checkpoints verify {run_with_weights_cut}          | 1 | safetensors has 1 bytes
checkpoints verify {run_with_index_cut}            | 1 | index.json has 1 bytes
checkpoints prune {run_with_pin_cut} --keep-last 1 | 1 | other.1.json is no readable pin
checkpoints copy {run_with_weights_cut} {tmp}/copy | 1 | safetensors has 1 bytes
checkpoints delete {run_with_pin_cut}              | 1 | other.1.json is no readable pin
checkpoints own {run_with_fork_cut}                | 1 | fork.json does not say from which run this is a fork
spectrum {run_with_weights_cut} --out {tmp}/out    | 1 | safetensors has 1 bytes
ablations {table} --out {results_cut} data.path={data} model.vocab_size=2048 | 1 | does not hold results
"""
BROKEN = [tuple(map(str.strip, line.split(" | "))) for line in DAMAGED.strip().splitlines()]
DATA = """
data.prepare {missing}.txt --out {tmp}/out --tokenizer configs/quickstart/tokenizer
data.prepare {file} --out {tmp}/out --tokenizer {missing}
data.prepare {file} --out {tmp}/out
data.prepare {file} --out {file} --tokenizer configs/quickstart/tokenizer
data.tokenizer {missing}.txt --out {tmp}/out
data.tokenizer {file} --out {tmp}/out --vocab-size 5
data.tokenizer {file} --out s3://bucket/tokenizer
"""
"""Sources and tokenizers of all kinds are in tests/data."""


def filled(text: str, things: Things) -> str:
    """With every {name} made, once."""
    names = dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(text) if name)
    return text.format(**{name: things[name] for name in names})


def words(line: str, things: Things) -> list[str]:
    """`&` is a space that divides nothing."""
    return [word.replace("&", " ") for word in filled(line.replace("@ ", LAUNCH), things).split()]


def call(argv: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    """A command in this process: its exit code, and what it said on stdout and stderr."""
    name = argv[0] if argv[0].startswith("cluster.") else f"relora_ray.{argv[0]}"
    module = importlib.import_module("relora_ray.conformance.__main__" if argv[0] == "conformance" else name)
    try:
        code = module.main(argv[1:])
    except SystemExit as error:  # argparse
        code = error.code
    said = capfd.readouterr()
    return code, said.out, said.err


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is trained, and commands run where the repository is."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("that was to be refused")

    monkeypatch.setattr(driver, "run", never)
    monkeypatch.setattr(cli, "PATIENCE_S", 0.3)
    monkeypatch.setattr(cli, "RETRY_S", 0.3)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # not installed
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    yield
    logging.disable(logging.NOTSET)  # the conformance suite does


@pytest.mark.parametrize(("line", "said"), ROWS, ids=[line for line, _ in ROWS])
def test_mistake_is_refused_in_one_message(
    line: str, said: str, things: Things, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = words(line, things)
    if line.startswith("@"):
        argv.append("storage_retry_s=0.5")
    code, _, errors = call(argv, capfd)
    assert code == 2, errors[-2000:]
    assert "Traceback" not in errors
    assert said.format(tmp=things.folder) in errors, errors


@pytest.mark.parametrize(("line", "expected", "said"), BROKEN, ids=[line for line, _, _ in BROKEN])
def test_damage_is_said_without_a_traceback(
    line: str, expected: str, said: str, things: Things, capfd: pytest.CaptureFixture[str]
) -> None:
    """Somebody broke what a run stores: what can be said is said, and the rest named."""
    code, out, errors = call(words(line, things), capfd)
    assert code == int(expected), errors[-2000:]
    assert "Traceback" not in errors
    assert said in (out if code == 0 or "verify" in line else errors)
    assert code == 0 or "verify" in line or errors.startswith("DamagedError: ")


def test_what_is_no_record_is_left_out_with_a_warning(
    things: Things, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("run_with_metrics_of_bytes", "run_with_metrics_of_others", "run_with_page_of_others"):
        call(["status", things[name]], capfd)
    said = [record.getMessage() for record in caplog.records]
    assert any("lines are no records and are left out" in text for text in said)
    assert any("restarts/0001.0001-1f2e3d4c.json is no page of ours" in text for text in said)


def test_reader_that_goes_away_is_no_error(things: Things) -> None:
    """As `| head` does. The exit code is the one that a shell gives a program which SIGPIPE ends."""
    command = [sys.executable, "-m", "relora_ray.commands.report", things["run"]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(120), errors) == (141, "")


def test_interrupt_is_no_traceback(
    things: Things, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("relora_ray.storage.Storage.list", interrupted)
    for name in ("status", "report", "export", "checkpoints list", "spectrum --out x"):
        argv = [*name.split(), things["run"], *([str(things.tmp() / "out")] if name == "export" else [])]
        code, _, errors = call(argv, capfd)
        assert (code, errors) == (130, "interrupted\n"), name


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become somebody else")
def test_what_may_not_be_read_or_written_is_named(
    things: Things, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As a user whom nothing here belongs to."""
    run, cfg, binary = things["run"], things["cfg"], things["file"]
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    Path(run, "setup").chmod(0o700)
    Path(cfg).chmod(0o600)
    os.seteuid(65534)
    try:
        said = [call(argv, capfd) for argv in (
            ["status", run], ["report", run], ["export", run, f"{tmp_path}/out"], ["launch", cfg],
            ["spectrum", run, "--out", f"{tmp_path}/out"], ["checkpoints", "copy", run, f"{tmp_path}/copy"],
            ["ablations", "configs/ablations/resets.yaml", "--out", f"{tmp_path}/out", f"data.path={binary}"],
        )]  # fmt: skip
    finally:
        os.seteuid(0)
    for code, _, errors in said[:-1]:
        assert code == 2, errors
        assert "Permission denied" in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize("line", DATA.strip().splitlines())
def test_mistake_with_data_is_no_traceback(
    line: str, things: Things, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = words(line, things)
    monkeypatch.setattr(sys, "argv", argv)
    module = importlib.import_module(f"relora_ray.{argv[0]}")
    with pytest.raises(SystemExit) as ended:
        sys.exit(module.main())
    assert ended.value.code, "a message, or its exit code"
    assert "Traceback" not in capfd.readouterr().err
