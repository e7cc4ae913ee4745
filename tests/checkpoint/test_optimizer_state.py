"""All that an optimizer keeps is stored, spread over the ranks, and brought back; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from relora_ray.checkpoint import read_manifest
from relora_ray.checkpoint.parts import read_whole_index
from relora_ray.commands.checkpoints import show_lines, verify
from relora_ray.config import RunConfig
from relora_ray.conformance.processes import run_ranks
from relora_ray.loop import run_attempt
from relora_ray.methods.full import Full
from relora_ray.methods.full_config import FullConfig
from relora_ray.modeling.optim import trainable
from relora_ray.modeling.parallel import World
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import check_run
from tests.tiny import Crash, crash_at, losses, run, state_digest, tiny_config

PLAIN = {"kind": "cosine", "warmup_steps": 1}


class Projecting(torch.optim.Optimizer):
    """Steps along a basis that it turns as it goes, half as far for vectors: nothing of it can be derived again."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
        super().__init__([{"params": matrices}, {"params": vectors, "lr_ratio": 0.5}], {"lr": 1.0})
        for p in parameters:
            basis = torch.randn(p.shape[-1], generator=torch.Generator().manual_seed(p.numel()))
            self.state[p] = {
                "basis": basis, "count": torch.zeros((), dtype=torch.int64), "seen": torch.zeros(3, dtype=torch.bool),
                "half": torch.zeros(5, dtype=torch.bfloat16), "never": torch.zeros(4),
            }  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["basis"].add_(p.grad.reshape(-1, p.shape[-1]).sum(0)).div_(state["basis"].norm() + 1)
                state["count"] += 1
                state["seen"][int(state["count"]) % 3] = True
                state["half"].add_(float(p.grad.abs().mean()))
                p.add_(torch.sign(p.grad) * state["basis"].abs(), alpha=-0.1 * group["lr"])


class WithProjection(Full):
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = Projecting

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return type(self).make(trainable(model))


WITH_PROJECTION = f"{__name__}:WithProjection"


@pytest.fixture
def cfg(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setattr(FullConfig, "implementation", WITH_PROJECTION)
    return tiny_config(data, tmp_path, method={"kind": "full"}, schedule=PLAIN)


def test_it_is_stored_and_brought_back_bit_by_bit(cfg: RunConfig) -> None:
    whole, records = run(cfg.model_copy(update={"name": "whole"}))
    with pytest.raises(Crash):
        run(cfg, crash_at(7, "train"))
    state, after = run(cfg)
    assert losses(after) == {step: loss for step, loss in losses(records).items() if step > 6}
    assert state_digest(state) == state_digest(whole)
    storage = run_storage(cfg)
    assert [wrong for _, wrong in verify(storage, None) if wrong] == []
    assert "basis of other weights" in "\n".join(show_lines(storage, None))


def test_what_holds_zeros_only_is_named_and_is_zeros_again(cfg: RunConfig) -> None:
    """The basis is drawn when the optimizer is made: one that was all zeros must not come back as it was drawn."""
    state, _ = run(cfg.model_copy(update={"train": cfg.train.model_copy(update={"stop_after_steps": 6})}))
    index = read_whole_index(run_storage(cfg), read_manifest(run_storage(cfg), 6).delta)
    assert {name.rpartition(".")[2] for name in index["zeros"]} == {"never"}
    assert not {name for name in index["tensors"] if name.endswith(".never")}

    class Drawn(Projecting):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters)
            for state in self.state.values():
                state["never"].fill_(7.0)

    with patch.object(WithProjection, "make", Drawn):
        state, _ = run(cfg)
    assert not any(bool(kept["never"].any()) for kept in state.optimizer.state.values())


def stop_and_go_on(cfg: RunConfig) -> tuple[int, dict[int, float]]:
    """On one of several ranks: the digest of its last state, and losses after step 6."""
    records: list[Any] = []
    with patch.object(FullConfig, "implementation", WITH_PROJECTION):
        stopped = cfg.model_copy(update={"train": cfg.train.model_copy(update={"stop_after_steps": 6})})
        run_attempt(check_run(stopped), World.current())
        state = run_attempt(check_run(cfg), World.current(), on_record=records.append)
    return state_digest(state), losses(records)


def test_ranks_store_it_once_and_agree(cfg: RunConfig) -> None:
    told = run_ranks(2, stop_and_go_on, cfg)
    assert told[0] == told[1]
    storage = run_storage(cfg)
    part = read_manifest(storage, 12).delta
    files = {
        chunk["file"][:6] for entry in read_whole_index(storage, part)["tensors"].values() for chunk in entry["chunks"]
    }
    assert files == {"r00000", "r00001"}
    (left, right) = (told[0][1], losses(run(cfg.model_copy(update={"name": "alone"}))[1]))
    assert left == pytest.approx({step: right[step] for step in left}, rel=1e-5)


def kept(**state: Any) -> type[Projecting]:
    class Keeping(Projecting):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            super().__init__(parameters)
            self.state[parameters[0]].update(state)

    return Keeping


class OfTheWhole(Projecting):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        self.state["all"]["rate"] = torch.ones(())


class InTheGroup(Projecting):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.param_groups[0]["d"] = self.param_groups[0].get("d", 1.0) * 2


class Misspelt(Projecting):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters)
        self.param_groups[1]["lr_rato"] = self.param_groups[1].pop("lr_ratio")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (kept(gap=200), r"keeps gap=200 of model\.embed_tokens\.weight\. A checkpoint holds tensors"),
        (kept(queue=[0.5]), r"keeps queue=\[0\.5\] of"),
        (kept(**{"a.b": torch.ones(1)}), r"under keys without a dot"),
        (OfTheWhole, r"keeps \['rate'\] of what is no parameter"),
        (InTheGroup, r"group has d=4\.0, and had None.*Keep there what changes"),
        (Misspelt, r"has lr_rato=0\.5, which no one reads\. Did you mean 'lr_ratio'\?"),
    ],
    ids=["number", "list", "dot", "global", "group", "misspelt"],
)
def test_what_a_checkpoint_would_lose_is_refused(cfg: RunConfig, make: type[Projecting], message: str) -> None:
    with patch.object(WithProjection, "make", make), pytest.raises(TypeError, match=message):
        run(cfg)


def test_a_group_may_have_a_rate_of_its_own(cfg: RunConfig) -> None:
    state, _ = run(cfg)
    matrices, vectors = state.optimizer.param_groups
    assert vectors["lr"] == 0.5 * matrices["lr"] != 0
