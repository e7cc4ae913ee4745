"""The list of checks, and running them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relora_ray.conformance import layer_checks, run_checks
from relora_ray.conformance.implementation import Implementation, NotOffered
from relora_ray.conformance.run_checks import Runs


@dataclass(frozen=True)
class Check:
    id: str
    what: str
    bound: str
    run: Callable[..., tuple[str, bool]]
    """Returns the value found and whether it is within the bound. Layer checks take the implementation, run checks
    a `Runs`."""
    needs_runs: bool = False


@dataclass(frozen=True)
class Result:
    check: Check
    value: str
    passed: bool | None
    """None: not offered."""
    seconds: float = field(compare=False)


def _run(id: str, what: str, bound: str, run: Callable[..., Any]) -> Check:
    return Check(id, what, bound, run, needs_runs=True)


CHECKS = (
    Check("wrap-exact", "wrapping changes the logits by (relative)", "1e-6", layer_checks.wrap_exact),
    Check("first-gradient", "layers whose adapter has a gradient at step 1", "all", layer_checks.first_gradient),
    Check("merge-function", "a merge at scale 2.5 changes the logits by", "1e-5", layer_checks.merge_function),
    Check("merge-bf16", "20 merges at rms 1e-3, 1e-4, 1e-5 in bf16 training: error of the sum", "1 %",
           layer_checks.merge_bf16),
    Check("reset-state", "entries of m, v and step that a reset leaves other than its kind says", "0",
           layer_checks.reset_state),
    Check("reset-large", "a magnitude reset above 2^24 elements keeps the largest", "1 - ratio",
           layer_checks.reset_large),
    Check("reset-jump", "largest move of A in 10 steps after a reset, in learning rates per step", "2",
           layer_checks.reset_jump),
    Check("draws-keyed", "layers whose A or mask follows the random state, or does not change by boundary", "0",
           layer_checks.draws_keyed),
    Check("dense", "wrong keys of the dense weights in mid-cycle; their logits' difference", "0; 1e-5",
           layer_checks.dense_function),
    Check("jagged-cosine", "learning rate against the published formula, 80 settings, all steps", "1e-12",
           layer_checks.jagged_cosine),
    _run("run-merges", "largest change of the logits at a boundary of a run", "1e-5", run_checks.run_merges),
    _run("step-alone", "learning rates, boundaries and rows that a NaN, a skip or a crash moves", "0",
         run_checks.step_alone),
    _run("resume-bitwise", "losses, final bits and starts that are wrong after a crash at any phase", "0",
         run_checks.resume_bitwise),
    _run("world-size", "rows that differ on 2 ranks, and from 2 ranks to 1; loss difference", "0; 1e-5",
         run_checks.world_size),
    _run("ranks-agree", "boundaries after which 2 ranks hold different bits", "0", run_checks.ranks_agree),
    _run("export", "missing and unexpected keys in plain transformers; logits' difference", "0; 1e-5",
         run_checks.export),
    _run("half-written", "checkpoints loaded though one of their files is cut off", "0", run_checks.half_written),
    _run("shipped-configs", "shipped configs that do not run two cycles at reduced size", "0",
         run_checks.shipped_configs),
    _run("token-budget", "tokens fed for a budget in tokens", "equal", run_checks.token_budget),
)  # fmt: skip


def run_suite(
    implementation: Implementation,
    data: str,
    folder: Path,
    *,
    only: Iterable[str] = (),
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run all checks, or those named; `data` as in Spec, `folder` is scratch. An error fails its check."""
    wanted = set(only)
    runs = Runs(implementation, data, folder)
    results = []
    for check in CHECKS:
        if wanted and check.id not in wanted:
            continue
        began = time.perf_counter()
        passed: bool | None
        try:
            value, passed = check.run(runs if check.needs_runs else implementation)
        except NotOffered:
            value, passed = "not offered", None
        except Exception as error:
            value, passed = f"{type(error).__name__}: {_short(error)}", False
        results.append(Result(check, value, passed, time.perf_counter() - began))
        if on_result is not None:
            on_result(results[-1])
    return results


def _short(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    return lines[-1 if lines[0].startswith("rank ") and len(lines) > 1 else 0][:160]


def markdown(results: Iterable[Result]) -> str:
    word = {True: "yes", False: "**no**", None: "-"}
    lines = ["| check | value | bound | pass |", "|---|---|---|---|"]
    lines += [f"| {r.check.what} | {r.value} | {r.check.bound} | {word[r.passed]} |" for r in results]
    return "\n".join(lines)
