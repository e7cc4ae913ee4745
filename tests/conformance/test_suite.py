"""The suite on ours, and on copies of ours with one published defect each. Nothing is faked: real runs, real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from relora_ray.conformance import CHECKS, Implementation, run_suite
from relora_ray.conformance.ours import Ours
from relora_ray.conformance.suite import markdown
from tests.commands import command
from tests.conformance import mutants
from tests.conftest import ROOT

LAYER_CHECKS = [c.id for c in CHECKS if not c.needs_runs]

# Defects in DESIGN order, the checks that must fail, and for runs those that must pass beside them.
LAYER_MUTANTS = {
    mutants.ZeroesAAtWrap: {"first-gradient"},
    mutants.MasksApart: {"reset-state", "reset-jump"},
    mutants.KeepsAdamsStep: {"reset-state", "reset-jump"},
    mutants.ZeroIsRandom: {"reset-state"},
    mutants.MergesInBf16: {"merge-bf16"},
    mutants.DrawsFromGlobalState: {"draws-keyed"},
    mutants.UsesQuantile: {"reset-large"},
    mutants.MergesWithoutScale: {"merge-function", "merge-bf16"},
    mutants.StartsWithB: {"wrap-exact", "merge-bf16"},
    mutants.NeverRedrawsA: {"draws-keyed"},
    mutants.DrawsTheSameAEveryTime: {"draws-keyed"},
    mutants.MasksFromGlobalState: {"draws-keyed"},
    mutants.DropsAdapters: {"dense"},
    mutants.RestartsAtFullRate: {"jagged-cosine"},
}
RUN_MUTANTS = {
    mutants.CountsInTheProcess: ({"step-alone", "resume-bitwise"}, {"export"}),
    mutants.UpdatesWithNan: ({"step-alone"}, {"resume-bitwise"}),
    mutants.NeverResumes: ({"resume-bitwise"}, {"step-alone"}),
    mutants.ForgetsToMerge: ({"run-merges"}, {"step-alone"}),
    mutants.SaysNothing: ({"run-merges", "step-alone", "resume-bitwise", "export", "half-written"}, set()),
    mutants.SkippedStepShiftsTheSchedule: ({"step-alone"}, {"resume-bitwise", "export"}),
    mutants.SavesBeforeTheMerge: ({"resume-bitwise"}, {"step-alone"}),
    mutants.DrawsFromGlobalState: ({"ranks-agree"}, {"export"}),
    mutants.ShardsTheDataByRank: ({"world-size"}, {"export"}),
    mutants.ExportsAdapters: ({"export", "token-budget"}, set()),  # no run of it comes to its end
    mutants.TrustsAnyFile: ({"half-written"}, {"export"}),
    mutants.CountsRowsAsTokens: ({"token-budget"}, {"export"}),
    mutants.ShipsABrokenConfig: ({"shipped-configs"}, set()),
}
REASONS = {
    "first-gradient": "0 of 14",
    "reset-large": "quantile() input tensor is too large",
    "ranks-agree": "3 of 4, and the end",
    "shipped-configs": "nowhere.yaml",
}


def outcome(implementation: Implementation, data: Path, folder: Path, only: list[str]) -> dict[str, str]:
    """What failed, with the value found."""
    results = run_suite(implementation, str(data), folder, only=only)
    assert len(results) == len(only)
    return {r.check.id: r.value for r in results if not r.passed}


def test_ours_passes_every_check(data: Path, tmp_path: Path) -> None:
    results = run_suite(Ours(ROOT / "configs"), str(data), tmp_path)
    assert {r.check.id: r.value for r in results if not r.passed} == {}
    assert len(results) == len(CHECKS) == 19


def test_page_shows_every_check() -> None:
    page = (ROOT / "docs/evidence.md").read_text()
    for check in CHECKS:
        assert f"| {check.what} | " in page
        assert f" | {check.bound} | yes |" in page


@pytest.mark.parametrize("mutant", LAYER_MUTANTS, ids=lambda m: m.__name__)
def test_defect_in_a_layer_fails_its_check_and_no_other(mutant: type[Ours], data: Path, tmp_path: Path) -> None:
    failed = outcome(mutant(ROOT / "configs"), data, tmp_path, LAYER_CHECKS)
    assert failed.keys() == LAYER_MUTANTS[mutant], failed
    for check, value in failed.items():
        assert REASONS.get(check, "") in value


@pytest.mark.parametrize("mutant", RUN_MUTANTS, ids=lambda m: m.__name__)
def test_defect_in_a_run_fails_its_check_and_no_other(mutant: type[Ours], data: Path, tmp_path: Path) -> None:
    expected, passing = RUN_MUTANTS[mutant]
    failed = outcome(mutant(ROOT / "configs"), data, tmp_path, sorted(expected | passing))
    assert failed.keys() == expected, failed
    for check, value in failed.items():
        assert REASONS.get(check, "") in value


def test_every_check_has_a_mutant_that_fails_it() -> None:
    caught = set().union(*LAYER_MUTANTS.values(), *(expected for expected, _ in RUN_MUTANTS.values()))
    assert caught == {check.id for check in CHECKS}


def test_what_is_left_out_is_reported_as_not_offered(data: Path, tmp_path: Path) -> None:
    class Nothing(Implementation):
        name = "nothing"

    results = run_suite(Nothing(), str(data), tmp_path)
    assert {r.passed for r in results} == {None}
    assert markdown(results).count("| not offered |") == len(CHECKS)


def test_command_prints_the_table_and_fails_with_the_suite() -> None:
    only = ("relora_ray.conformance", "--only", "merge-function", "first-gradient")
    good = command(*only)
    assert good.returncode == 0, good.stderr[-2000:]
    assert "| a merge at scale 2.5 changes the logits by | 0.0e+00 | 1e-5 | yes |" in good.stdout
    bad = command(*only, "--implementation", "tests.conformance.mutants:MergesWithoutScale")
    assert bad.returncode == 1
    assert "FAIL  merge-function" in bad.stdout
    assert "pass  first-gradient" in bad.stdout
