"""Checks of whole runs: crashes, NaNs, ranks, checkpoints. Runs that several checks look at are made once."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
import transformers

from relora_ray.conformance.implementation import (
    Implementation,
    NotOffered,
    Phase,
    Spec,
    Trace,
    eval_logits,
    relative_change,
)
from relora_ray.conformance.processes import run_ranks

Outcome = tuple[str, bool]


class Runs:
    """One implementation's runs under a scratch folder."""

    def __init__(self, implementation: Implementation, data: str, folder: Path) -> None:
        self.implementation, self._data, self._folder = implementation, data, folder

    def spec(self, name: str, **changes: object) -> Spec:
        return dataclasses.replace(Spec(str(self._folder / name), self._data), **changes)  # type: ignore[arg-type]

    def train(self, spec: Spec) -> Trace:
        self.implementation.prepare(spec)
        return self.implementation.train(spec)

    def train_on_two(self, spec: Spec) -> list[Trace]:
        self.implementation.prepare(spec)
        try:
            traces: list[Trace] = run_ranks(2, self.implementation.train, spec)
        except AssertionError as error:
            if "NotOffered" in str(error):
                raise NotOffered from error
            raise
        return traces

    @cached_property
    def whole(self) -> Trace:
        """The undisturbed run that others are held against; an error if its trace has gaps."""
        spec = self.spec("whole")
        trace, updates = self.train(spec), set(range(spec.steps))
        for what in ("learning_rates", "losses", "rows"):
            known: dict[int, object] = getattr(trace, what)
            assert set(known) == updates, (
                f"an undisturbed run's {what} are known for {len(known)} of {spec.steps} updates"
            )
        assert all(math.isfinite(loss) for loss in trace.losses.values())
        assert all(len(rows) == spec.global_batch_rows for rows in trace.rows.values())
        assert {6, 9} <= set(trace.boundaries) <= {3, 6, 9, 12}, f"boundaries after {sorted(trace.boundaries)}"
        assert trace.final
        assert not trace.crashed
        return trace

    @cached_property
    def crashed(self) -> dict[str, tuple[Trace, Trace]]:
        """By crash: what was done before it, and after the restart."""
        boundaries = sorted(self.whole.boundaries)
        crashes: list[tuple[Phase, int]] = [
            ("update", 1),
            ("update", 5),
            ("checkpoint", 6),
            ("checkpoint", 8),
            *(("boundary", step) for step in (boundaries[0], 6, boundaries[-1])),
        ]
        pairs = {}
        for phase, step in dict.fromkeys(crashes):
            spec = self.spec(f"crash-{phase}-{step}", crash=(phase, step))
            before = self.train(spec)
            assert before.crashed, f"no crash took place at {phase} {step}"
            pairs[f"{phase} {step}"] = before, self.train(dataclasses.replace(spec, crash=None))
        return pairs

    @cached_property
    def whole_on_two(self) -> list[Trace]:
        assert self.whole.began_at == 0  # one process first: its errors are easier to read
        return self.train_on_two(self.spec("whole-2"))


def _rows(traces: list[Trace]) -> dict[int, list[str]]:
    """By update: the rows that all ranks fed, in no order."""
    return {step: sorted(row for t in traces for row in t.rows.get(step, [])) for step in traces[0].rows}


def _differing(found: Mapping[int, object], expected: Mapping[int, object]) -> list[int]:
    return sorted(step for step in found.keys() | expected.keys() if found.get(step) != expected.get(step))


def run_merges(runs: Runs) -> Outcome:
    changes = runs.whole.function_change
    assert set(changes) == set(runs.whole.boundaries)
    worst = max(changes.values())
    return f"{worst:.1e}", worst <= 1e-5


def step_alone(runs: Runs) -> Outcome:
    """An update that is not made, and a process that dies, move nothing that a step decides; the rate falls where the
    adapters are merged."""
    whole = runs.whole
    variants = {
        "nan": [runs.train(runs.spec("nan", nonfinite=frozenset({4, 7})))],
        "skip": [runs.train(runs.spec("skip", skipped=frozenset({5})))],
        **{name: [before, after] for name, (before, after) in runs.crashed.items()},
    }
    climbing = [b for b in (6, 9) if whole.learning_rates[b] >= whole.learning_rates[b - 1]]
    wrong = [f"no restart after {climbing}"] if climbing else []
    for name, traces in variants.items():
        moved = 0
        for trace in traces:
            made = set(trace.learning_rates)
            fed = made - ({5} if name == "skip" else set())
            moved += len(_differing(trace.learning_rates, {s: whole.learning_rates.get(s) for s in made}))
            moved += len(_differing(_only(_rows([trace]), made), _only(_rows([whole]), fed)))
        trained = set().union(*(t.losses for t in traces))
        moved += len(trained ^ (set(whole.losses) - {"nan": {4, 7}, "skip": {5}}.get(name, set())))
        crossed = set().union(*(t.boundaries for t in traces))
        moved += len(crossed ^ set(whole.boundaries))
        moved += len(set().union(*(t.learning_rates for t in traces)) ^ set(whole.learning_rates))
        wrong += [f"{name}: {moved}"] if moved else []
    return "; ".join(wrong) or f"0 in {len(variants)} runs", not wrong


def _only(rows: dict[int, list[str]], steps: set[int]) -> dict[int, list[str]]:
    return {step: found for step, found in rows.items() if step in steps}


def resume_bitwise(runs: Runs) -> Outcome:
    whole, wrong = runs.whole, []
    for name, (_, after) in runs.crashed.items():
        phase, _, step = name.partition(" ")
        saved = int(step) if phase == "checkpoint" else (int(step) - 1) // 2 * 2  # at the latest
        expected = {s: v for s, v in whole.losses.items() if s >= after.began_at}
        if not saved <= after.began_at <= int(step):
            wrong.append(f"{name}: began again at {after.began_at}")
        elif differing := _differing(after.losses, expected):
            wrong.append(f"{name}: losses from update {differing[0]}")
        elif after.final != whole.final:
            wrong.append(f"{name}: final bits")
    return "; ".join(wrong) or f"0 in {len(runs.crashed)} runs", not wrong


def world_size(runs: Runs) -> Outcome:
    """The same run on one and on two processes, and one that starts on two and goes on on one."""
    whole, two = runs.whole, runs.whole_on_two
    expected = _rows([whole])
    count = len(_differing(_rows(two), expected))
    difference = _largest_difference(two[0], whole)
    spec = runs.spec("from-2-to-1", crash=("update", 8))
    before = runs.train_on_two(spec)
    after = runs.train(dataclasses.replace(spec, crash=None))
    assert before[0].crashed
    assert 0 < after.began_at <= 8
    count += len(_differing(_rows([after]), {s: v for s, v in expected.items() if s >= after.began_at}))
    difference = max(difference, _largest_difference(after, whole))
    return f"{count}; {difference:.1e}", count == 0 and difference <= 1e-5


def _largest_difference(trace: Trace, whole: Trace) -> float:
    return max(abs(trace.losses[s] - whole.losses[s]) / whole.losses[s] for s in trace.losses)


def ranks_agree(runs: Runs) -> Outcome:
    one, two = runs.whole_on_two
    differing = [step for step, digest in one.boundaries.items() if two.boundaries.get(step) != digest]
    final = "" if one.final == two.final else ", and the end"
    return f"{len(differing)} of {len(one.boundaries)}{final}", not differing and not final and len(one.boundaries) > 2


def export(runs: Runs) -> Outcome:
    whole = runs.whole
    folder = runs.implementation.export(runs.spec("whole"))
    plain, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert whole.probe is not None
    logits = eval_logits(plain, torch.arange(8)[None])[0]
    keys = len(info["missing_keys"]) + len(info["unexpected_keys"])
    difference = relative_change(logits, whole.probe)
    return f"{keys}; {difference:.1e}", keys == 0 and difference <= 1e-5


def half_written(runs: Runs) -> Outcome:
    """Every file of the newest checkpoint in turn is cut to half; the run must go on from one before, to the same
    end."""
    whole = runs.whole
    source = runs.spec("half", crash=("update", 11))
    assert runs.train(source).crashed
    files = runs.implementation.checkpoint_files(source)
    wrong = []
    for number, path in enumerate(files):
        spec = runs.spec(f"half-{number}")
        shutil.copytree(source.folder, spec.folder)
        victim = Path(spec.folder) / path.relative_to(source.folder)
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
        after = runs.train(spec)
        if after.began_at >= 10:
            wrong.append(f"{path.name} was not missed")
        elif after.final != whole.final:
            wrong.append(f"{path.name}: other bits in the end")
    return "; ".join(wrong) or f"0 of {len(files)} files", not wrong and len(files) > 0


def shipped_configs(runs: Runs) -> Outcome:
    names = runs.implementation.shipped()
    failed = []
    for number, name in enumerate(names):
        spec = runs.spec(f"shipped-{number}")
        try:
            num_updates = runs.implementation.run_reduced(name, spec)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if num_updates < 2:
            failed.append(f"{name}: {num_updates} updates")
    return "; ".join(failed[:3]) or f"0 of {len(names)}", not failed and len(names) > 0


def token_budget(runs: Runs) -> Outcome:
    spec = runs.spec("tokens")
    budget = spec.steps * spec.global_batch_rows * spec.seq_len
    trace = runs.train(dataclasses.replace(spec, tokens=budget, steps=0))
    fed = sum(map(len, trace.rows.values())) * spec.seq_len
    return f"{fed:,} of {budget:,}", fed == budget and all(math.isfinite(v) for v in trace.losses.values())
