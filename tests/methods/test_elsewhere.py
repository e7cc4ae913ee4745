"""A method in a package that is not this one: docs/add-a-method is installed, and every command knows it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from relora_ray.config import RunConfig
from relora_ray.methods import base
from relora_ray.runs.run import new_model
from tests.conftest import ROOT
from tests.tiny import TINY

PACKAGE = ROOT / "docs/add-a-method"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which it is."""
    folder = tmp_path_factory.mktemp("site")
    built = tmp_path_factory.mktemp("source")
    for path in PACKAGE.rglob("*"):  # a build writes beside its source
        if path.suffix in (".py", ".toml"):
            (built / path.relative_to(PACKAGE)).parent.mkdir(parents=True, exist_ok=True)
            (built / path.relative_to(PACKAGE)).write_bytes(path.read_bytes())
    alone = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", *alone, "--target", str(folder), str(built)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_contract_is_kept(installed: dict[str, str]) -> None:
    """Trains, resumes bitwise, exports: found by its entry point, with no line changed here."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", "lora_fa"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/methods/test_contract.py")],
        env=installed,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_boundary_of_the_guide_keeps_the_function(cfg: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PACKAGE)
    package, section = importlib.import_module("lora_fa.method"), importlib.import_module("lora_fa.config")
    guide = (ROOT / "docs/add-a-method.md").read_text()
    blocks = re.findall(r"(?:^    .*\n)+(?:\n?(?:^    .*\n)+)*", guide, re.MULTILINE)
    code = [textwrap.dedent(block) for block in blocks if block.startswith("    def ")]
    assert len(code) == 2
    given: dict[str, Any] = {**vars(package), **vars(base)}
    exec(code[0] + code[1], given)
    assert given["boundaries"](None, 250) == (100, 200)
    method = package.LoraFa(cfg.model_copy(update={"method": section.LoraFaConfig(rank=4, alpha=8)}))
    model = new_model(cfg).eval()
    method.adapt(model, 0)
    optimizer = method.build_optimizer(model)
    found = package.layers(model)
    with torch.no_grad():
        for layer in found.values():
            layer.B.normal_()
            optimizer.state[layer.B]["exp_avg"].fill_(1.0)
    before, ids = [layer.A.clone() for layer in found.values()], torch.arange(24)[None]
    logits = model(input_ids=ids).logits
    report = given["on_boundary"](method, base.Boundary(model, optimizer, 100, seed=3))
    assert (report.step, report.kind, report.num_layers) == (100, "merge", 14)
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-4)
    for layer, drawn in zip(found.values(), before, strict=True):
        assert not layer.B.any()
        assert not optimizer.state[layer.B]["exp_avg"].any()
        assert not torch.equal(layer.A, drawn)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"kind": "lora_fa", "rank": 4, "alpha": 8}, "lora_fa, 12 updates"),
        ({"kind": "lora_fa", "rnak": 4}, "unknown key method.rnak=4. Did you mean 'rank'?"),
        ({"kind": "lora_fa", "rank": 4000}, "method.rank=4000 is more than 32, the smaller side"),
        ({"kind": "lora_af"}, "method.kind='lora_af' is not a method. Use one of full, lora"),
    ],
)
def test_commands_know_it(
    method: dict[str, object], expected: str, installed: dict[str, str], data: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load(TINY) | {
        "method": method,
        "schedule": {"kind": "cosine"},
        "storage": str(tmp_path / "runs"),
    }
    config["data"]["path"] = str(data)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "relora_ray.launch", "--dry-run", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=installed, cwd=tmp_path, capture_output=True, text=True)
    assert expected in done.stdout + done.stderr
