"""A method whose model has no dense weights trains to its end, and what would need them is refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from relora_ray.commands.export import export
from relora_ray.commands.status import status
from relora_ray.config import RunConfig
from relora_ray.errors import ConfigError, NotMergeableError
from relora_ray.methods.base import Method, Update
from relora_ray.methods.full import Full
from relora_ray.methods.full_config import FullConfig
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import is_finished
from relora_ray.runtime.dry_run import dry_run
from relora_ray.runtime.preflight import preflight
from relora_ray.storage import Storage
from tests.tiny import run, tiny_config

PLAIN = {"kind": "cosine", "warmup_steps": 1}


class Gated(Full):
    def dense_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        raise NotMergeableError("a gate depends on the input: there is no such matrix")


class Forgetful(Method):
    def update(self, update: Update) -> None:
        update.backward()


@pytest.fixture
def cfg(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(FullConfig, "implementation", f"{__name__}:Gated")
    monkeypatch.setattr(FullConfig, "exports", False)
    return preflight(tiny_config(data, tmp_path, method={"kind": "full"}, schedule=PLAIN))


def test_run_ends_without_a_model_and_says_so(cfg: RunConfig) -> None:
    assert "no model at the end" in str(next(iter(dry_run(cfg))))
    state, _ = run(cfg)
    storage = run_storage(cfg)
    assert state.position.step == cfg.steps
    assert storage.list("model") == []
    assert is_finished(cfg, storage)
    assert not [line for line in status(storage, 0.0) if "export" in line]
    _, records = run(cfg)
    assert {r["kind"] for r in records} == {"attempt", "end"}


def test_what_needs_dense_weights_is_refused(cfg: RunConfig, data: Path, tmp_path: Path) -> None:
    run(cfg)
    with pytest.raises(NotMergeableError, match="a gate depends on the input"):
        export(run_storage(cfg), Storage(str(tmp_path / "out")))
    source = f"model.init_from={run_storage(cfg).url}"
    taking = tiny_config(data, tmp_path, "name=next", source, method={"kind": "full"}, schedule=PLAIN)
    with pytest.raises(ConfigError, match=r"is a run of method.kind=full, whose model has no dense weights"):
        preflight(taking)


def test_update_that_moves_nothing_is_an_error(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would count as one whose gradient was not finite."""
    monkeypatch.setattr(FullConfig, "implementation", f"{__name__}:Forgetful")
    with pytest.raises(RuntimeError, match=r"Forgetful.update returned without update.apply"):
        run(tiny_config(data, tmp_path, method={"kind": "full"}, schedule=PLAIN))
