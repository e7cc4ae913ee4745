"""A real launch that fails: what another attempt would meet again ends the run after one. A Ray that cannot start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from relora_ray.runs.metrics import METRICS
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import is_finished
from relora_ray.runtime import driver
from tests.tiny import TINY, run, tiny_config

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(TINY)
    command = [sys.executable, "-m", "relora_ray.launch", str(folder / "run.yaml"), f"storage={folder}/runs", *args]
    return subprocess.run(command, cwd=ROOT, env=clean() | variables, capture_output=True, text=True, timeout=300)


def clean() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "TMPDIR" and not k.startswith("RAY_")}


def test_error_in_a_step_ends_the_run_after_one_attempt_with_its_traceback(data: Path, tmp_path: Path) -> None:
    """A bug that shows at the fourth update, as a shape that does not fit."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "import importlib.abc, importlib.machinery\n"
        "class Loader(importlib.abc.Loader):\n"
        "    def __init__(self, loader): self.loader = loader\n"
        "    def create_module(self, spec): return self.loader.create_module(spec)\n"
        "    def exec_module(self, module):\n"
        "        self.loader.exec_module(module)\n"
        "        import torch\n"
        "        real = module._make_update\n"
        "        def broken_update(*args):\n"
        "            broken_update.calls += 1\n"
        "            if broken_update.calls == 4:\n"
        "                torch.zeros(3) + torch.zeros(4)\n"
        "            return real(*args)\n"
        "        broken_update.calls = 0\n"
        "        module._make_update = broken_update\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name != 'relora_ray.loop': return None\n"
        "        spec = importlib.machinery.PathFinder.find_spec(name, path)\n"
        "        spec.loader = Loader(spec.loader)\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = launch(tmp_path, f"data.path={data}", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1, done.stderr[-3000:]
    assert "RunFailedError: RuntimeError: The size of tensor a (3) must match the size of tensor b (4)" in done.stderr
    assert "(in broken_update, " in done.stderr
    assert "tensors do not fit together, whatever machine computes them" in done.stderr
    assert "-- error (rank 0): Traceback (most recent call last):" in done.stdout
    assert len(re.findall("^attempt ", done.stdout, re.MULTILINE)) == 1, done.stdout


START = """
import os
from relora_ray.config.file import load_config
from relora_ray.errors import ReloraError
from relora_ray.runtime.driver import connected

cfg = load_config({config!r})
for name, value in {variables}:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        with connected(cfg):
            print("it started")
    except ReloraError as error:
        print(f"{{type(error).__name__}}: {{error}}")
    if before is None:
        del os.environ[name]
    else:
        os.environ[name] = before
"""


def test_ray_that_cannot_start_says_what_to_change(tmp_path: Path) -> None:
    """Ray's own errors, one after the other in one process."""
    (tmp_path / "file").touch()
    (tmp_path / ("long" * 12)).mkdir()
    (tmp_path / "run.yaml").write_text(TINY)
    variables = [
        ("HOME", f"{tmp_path}/file"),
        ("TMPDIR", f"{tmp_path}/{'long' * 12}"),
        ("RAY_TMPDIR", f"{tmp_path}/file"),
    ]
    script = START.format(config=f"{tmp_path}/run.yaml", variables=variables)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=clean(), capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 3, done.stderr[-3000:]
    assert said[0] == "it started", "a token of its own lies in no file"
    assert all(line.startswith("ConfigError: no Ray can be started here: ") for line in said[1:]), said
    assert "Set RAY_TMPDIR to a short folder, such as /tmp" in said[1]
    assert f"Ray keeps its files below RAY_TMPDIR={tmp_path}/file" in said[2]


def test_run_that_another_driver_has_finished_meanwhile_is_left_as_it_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after `--wait`: no Ray worker is started, and no attempt."""
    cfg = tiny_config(data, tmp_path)
    run(cfg)
    storage = run_storage(cfg)
    assert is_finished(cfg, storage)
    monkeypatch.setattr(driver, "connected", lambda *_: nullcontext(True))
    monkeypatch.setattr(driver, "CoordinatorActor", None)
    before = storage.list(METRICS)
    driver.run(cfg, on_event=lambda event: None)
    assert storage.list(METRICS) == before
