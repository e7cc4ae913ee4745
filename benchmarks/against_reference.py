"""`compat: reference` against the published code itself, update by update.

git clone https://github.com/Guitaricet/relora && git -C relora checkout 176f376
python benchmarks/against_reference.py relora > benchmarks/results/against-reference.md

The published layer, merge, optimizer reset and scheduler are imported from the clone and driven in the published
order (optimizer, scheduler, then merge and reset one update after each cycle); its training script itself wants CUDA
and wandb. Rows, initial weights and random draws (A at a merge, pruning masks) are handed over from our run, so any
difference is arithmetic. It is rounding, magnified where the published masks leave an entry m with v near 0: such an
entry moves by m / sqrt(v), for which no learning rate is small. Libraries that the published files import and do not
need here are stubbed.
"""

from __future__ import annotations

import argparse
import bz2
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.nn.functional as F
import yaml

from relora_ray import loop
from relora_ray.config import RunConfig
from relora_ray.config.file import parse_config
from relora_ray.data.prepare import Request, prepare
from relora_ray.keyed import key
from relora_ray.methods.lowrank.layer import folded_state_dict, low_rank_layers
from relora_ray.modeling.parallel import World
from relora_ray.modeling.reference import read_reference
from relora_ray.runs.run import new_model
from relora_ray.runs.setting import check_run
from relora_ray.study.ablations import machine

STUBS = ("bitsandbytes", "bitsandbytes.functional", "wandb", "loguru", "peft_pretraining.modeling_llama")
RESETS = (
    ("zero (published: random 0.999)", 5e-3, {"kind": "zero", "adam_step": "keep"}),
    ("magnitude 0.9", 5e-4, {"kind": "magnitude", "ratio": 0.9, "adam_step": "keep"}),
    ("random 0.8", 5e-4, {"kind": "random", "ratio": 0.8, "adam_step": "keep"}),
)
BASE = {
    "name": "run", "seed": 3, "steps": 40, "global_batch_rows": 6,
    "model": {"hidden_size": 48, "intermediate_size": 80, "num_layers": 2, "num_heads": 4, "vocab_size": 2048},
    "data": {"seq_len": 32},
    "schedule": {"kind": "jagged_cosine", "warmup_steps": 3, "restart_warmup_steps": 2},
    "train": {"micro_batch_rows": 6, "eval_rows": 6},
    "checkpoint": {"save_every_steps": 40},
}  # fmt: skip


def import_published(clone: Path) -> tuple[ModuleType, ModuleType]:
    for name in STUBS:
        sys.modules[name] = MagicMock(name=name)
    sys.path.insert(0, str(clone))
    from peft_pretraining import relora, training_utils  # type: ignore[import-not-found]

    return relora, training_utils


def published_run(published: tuple[ModuleType, ModuleType], cfg: RunConfig, folder: Path) -> tuple[list[float], dict]:
    """Losses by update and final dense weights of the published code's pieces in the published order."""
    relora, training_utils = published
    method: Any = cfg.method
    reset = method.reset
    wrapped = relora.ReLoRaModel(
        new_model(cfg), target_modules=["attn", "attention", "mlp"], r=method.lora_rank, lora_alpha=method.alpha,
        lora_dropout=0.0, keep_original_weights=True,
    )  # fmt: skip
    model = wrapped.wrapped_model.train()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, relora.ReLoRaLinear)}
    names = {id(getattr(m, k).weight): f"{path}.{k}" for path, m in layers.items() for k in ("lora_A", "lora_B")}
    lora_params = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=cfg.optimizer.learning_rate, weight_decay=0.0,
        betas=(cfg.optimizer.beta1, cfg.optimizer.beta2),
    )  # fmt: skip
    scheduler = training_utils.get_scheculer(
        optimizer, scheduler_type="cosine_restarts", num_training_steps=cfg.steps,
        warmup_steps=cfg.schedule.warmup_steps, min_lr_ratio=cfg.schedule.min_lr_ratio,
        cycle_length=method.merge_every_steps, restart_warmup_steps=cfg.schedule.restart_warmup_steps,
    )  # fmt: skip
    batches = loop.open_batches(cfg, World()).train
    losses = []
    for update_step in range(1, cfg.steps + 1):
        (batch,) = batches.step(update_step - 1)
        loss = F.cross_entropy(model(input_ids=batch.inputs).logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], cfg.optimizer.grad_clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        cycle = method.merge_every_steps
        if update_step >= cycle and update_step % cycle == 1:  # torchrun_main.py:874-900
            redrawn = _redraws(names, cfg.seed, update_step)
            with patch.object(relora.nn.init, "kaiming_uniform_", redrawn):
                wrapped.merge_and_reinit()
            with _handed_masks(training_utils, optimizer, names, lora_params, cfg.seed, update_step):
                training_utils.optimizer_reset(
                    optimizer, reset_params=lora_params, optimizer_state_keys=["exp_avg", "exp_avg_sq"],
                    reset_optimizer_on_relora=reset.kind == "zero",
                    optimizer_random_pruning=reset.ratio if reset.kind == "random" else 0.0,
                    optimizer_magnitude_pruning=reset.ratio if reset.kind == "magnitude" else 0.0,
                )  # fmt: skip
    wrapped.save_pretrained(str(folder))
    return losses, read_reference(str(folder))


def _redraws(names: dict[int, str], seed: int, boundary: int):
    def draw(tensor: torch.Tensor, a: float) -> None:
        path = names[id(tensor)].removesuffix(".lora_A")
        bound = 1 / tensor.shape[1] ** 0.5
        generator = torch.Generator().manual_seed(key(seed, "lora_A", boundary, path))
        tensor.data.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))

    return draw


def _handed_masks(training_utils, optimizer, names, lora_params, seed, boundary):
    """The published code draws a mask per moment, parameter by parameter, from the global random state."""
    keys = iter([
        key(seed, "prune", boundary, names[id(p)], moment)
        for p in lora_params for moment in ("exp_avg", "exp_avg_sq")
    ])  # fmt: skip

    def rand_like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(next(keys)))

    return patch.object(training_utils.torch, "rand_like", rand_like)


def our_run(cfg: RunConfig) -> tuple[list[float], dict[str, torch.Tensor], float]:
    losses: list[float] = []
    state = loop.run_attempt(
        check_run(cfg), World(), on_record=lambda r: losses.append(r["loss"]) if r["kind"] == "train" else None
    )
    largest = max(float(layer.lora_A.detach().abs().max()) for layer in low_rank_layers(state.model).values())
    return losses, folded_state_dict(state.model), largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clone", type=Path, help="a clone of Guitaricet/relora")
    clone = parser.parse_args().clone
    torch.set_num_threads(1)
    published = import_published(clone.resolve())
    quickstart = Path(__file__).parent.parent / "configs/quickstart"
    print("# `compat: reference` against the published code\n")
    print(" ".join(__doc__.split("\n\n")[2].split()))
    print(f"\n40 updates in 4 cycles, a LLaMA of width 48, fp32. Machine: {machine()}.\n")
    print("| reset | learning rate | largest difference in loss | weights apart | loss at the end | max abs A |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text.txt")
        text.write_text(bz2.decompress((quickstart / "austen.txt.bz2").read_bytes()).decode()[:300_000])
        prepare(
            Request(sources=(str(text),), out=f"{scratch}/data", tokenizer=str(quickstart / "tokenizer"),
                    document_separator="(?i:chapter [ivxlc0-9]+)", validation_fraction=0.2, num_workers=1),
            quiet=True,
        )  # fmt: skip
        for number, (label, learning_rate, reset) in enumerate(RESETS):
            method = {
                "kind": "relora", "lora_rank": 8, "alpha": 20, "merge_every_steps": 10, "compat": "reference",
                "reset": reset,
            }  # fmt: skip
            raw = BASE | {
                "method": method,
                "optimizer": {"learning_rate": learning_rate},
                "storage": f"{scratch}/{number}",
            }
            cfg = parse_config(yaml.safe_dump(raw), [f"data.path={scratch}/data"])
            ours, our_weights, largest = our_run(cfg)
            theirs, their_weights = published_run(published, cfg, Path(scratch, f"published-{number}"))
            difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            apart = max(float((our_weights[n] - t).norm() / t.norm()) for n, t in their_weights.items() if t.ndim == 2)
            assert our_weights.keys() == their_weights.keys()
            print(
                f"| {label} | {learning_rate:g} | {difference:.1e} | {apart:.1e} | {theirs[-1]:.4f} | {largest:.2f} |"
            )


if __name__ == "__main__":
    main()
