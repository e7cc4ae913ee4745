"""The rank of what runs have learned: singular values of W_t - W_0 for every linear layer of the blocks.

python -m relora_ray.spectrum RUN ... --out FOLDER [--from STEP] [--step STEP]

ReLoRA's claim (Lialin et al. 2023, section 4) is that several low-rank updates add up to one of high rank. FOLDER gets
README.md (a table), spectrum.png (the paper's plot) and spectrum.json (every singular value).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from relora_ray import cli
from relora_ray.cli import at_least_0, command, place
from relora_ray.errors import ConfigError
from relora_ray.storage import Storage, add_options_argument, parse_options
from relora_ray.study.plots import pyplot

if TYPE_CHECKING:  # --help must not wait for it
    import torch


@dataclass(frozen=True)
class Spectrum:
    """Of one layer's update."""

    path: str
    singular_values: list[float]
    """Largest first."""
    noise: float
    """Singular values up to here may be the rounding of the weights to fp32."""

    @property
    def rank(self) -> int:
        """Singular values above the noise."""
        return sum(s > self.noise for s in self.singular_values)

    @property
    def effective_rank(self) -> float:
        """See `relora_ray.methods.updates`."""
        import torch

        from relora_ray.methods.updates import effective_rank

        return effective_rank(torch.tensor(self.singular_values, dtype=torch.float64))

    @property
    def rank_90(self) -> int:
        """Fewest singular values whose squares hold 90 % of the sum of squares."""
        import torch

        energy = torch.tensor(self.singular_values, dtype=torch.float64).square().cumsum(0)
        return int((energy < 0.9 * energy[-1]).sum()) + 1 if energy[-1] > 0 else 0


@dataclass(frozen=True)
class RunSpectrum:
    name: str
    kind: str
    from_step: int
    step: int
    layers: list[Spectrum]


def run_spectrum(run: Storage, *, from_step: int | None = None, step: int | None = None) -> RunSpectrum:
    """Spectra of a run's update between two of its checkpoints.

    Default: from the end of the warm start, or the run's start if there is none, to the newest. CheckpointError
    if a checkpoint is not there (`checkpoint.keep_every_steps` keeps them).
    """
    from relora_ray.methods.targets import block_linears
    from relora_ray.modeling.model import build_model
    from relora_ray.runs.run import load_trained

    after = load_trained(run, step)
    begin = after.cfg.warm_start_steps if from_step is None else from_step
    before = load_trained(run, begin)
    if begin >= after.manifest.step:
        raise ConfigError(f"{run.url}: there is no update between step {begin} and step {after.manifest.step}.")
    plain = build_model(
        after.cfg.model, seq_len=after.cfg.data.seq_len, seed=0, device="meta", architecture=after.architecture
    )
    old, new = (t.method.dense_state_dict(t.model) for t in (before, after))
    noise = _EPS[getattr(after.cfg.method, "frozen_weights", "fp32")]
    noise *= math.sqrt(after.manifest.counters.merges - before.manifest.counters.merges + 1)
    layers = [
        spectrum(path, old[f"{path}.weight"], new[f"{path}.weight"], relative_noise=noise)
        for path, _ in block_linears(plain)
    ]
    return RunSpectrum(after.cfg.name, after.cfg.method.kind, begin, after.manifest.step, layers)


# Spacing of the numbers that weights are rounded to when they are stored, relative to the weight.
_EPS = {"fp32": 2.0**-23, "bf16_int8": 2.0**-15, "bf16": 2.0**-7}


def spectrum(path: str, before: torch.Tensor, after: torch.Tensor, *, relative_noise: float = _EPS["fp32"]) -> Spectrum:
    """Of `after - before`, two matrices of one shape.

    Rounding adds a matrix of independent entries of `relative_noise` times the weights' size (at most: uniform within
    a spacing has 0.29 of it as standard deviation), whose largest singular value is about its entry's size times
    sqrt(rows) + sqrt(columns).
    """
    import torch

    values = torch.linalg.svdvals(after.double() - before.double())
    size = max(before.double().square().mean(), after.double().square().mean()).sqrt()
    noise = relative_noise * float(size) * (math.sqrt(after.shape[0]) + math.sqrt(after.shape[1]))
    return Spectrum(path, values.tolist(), noise)


def write(runs: list[RunSpectrum], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "run": r.name,
            "method": r.kind,
            "from_step": r.from_step,
            "step": r.step,
            "layers": list(map(_record, r.layers)),
        }
        for r in runs
    ]
    (out / "spectrum.json").write_text(json.dumps(records) + "\n")
    (out / "README.md").write_text("\n".join([*table(runs), "", "![singular values](spectrum.png)"]) + "\n")
    _plot(runs, out / "spectrum.png")


def _record(layer: Spectrum) -> dict[str, Any]:
    return {
        "path": layer.path,
        "rank": layer.rank,
        "effective_rank": layer.effective_rank,
        "rank_90": layer.rank_90,
        "singular_values": [float(f"{s:.5g}") for s in layer.singular_values],
    }


def table(runs: list[RunSpectrum]) -> Iterator[str]:
    """Markdown: means over the blocks, by kind of layer."""
    yield "Rank of W_t - W_0, mean over blocks: singular values above rounding / effective rank / 90 % rank.\n"
    kinds = list(_by_kind(runs[0]))
    yield "| run | method | steps | " + " | ".join(kinds) + " |"
    yield "|---" * (3 + len(kinds)) + "|"
    for run in runs:
        cells = [
            f"{fmean(s.rank for s in layers):.0f} / {fmean(s.effective_rank for s in layers):.1f} / "
            f"{fmean(s.rank_90 for s in layers):.1f}"
            for layers in _by_kind(run).values()
        ]
        yield f"| {run.name} | {run.kind} | {run.from_step:,} to {run.step:,} | " + " | ".join(cells) + " |"


def _by_kind(run: RunSpectrum) -> dict[str, list[Spectrum]]:
    def kind(layer: Spectrum) -> str:
        return layer.path.rpartition(".")[2]

    return {k: list(layers) for k, layers in groupby(sorted(run.layers, key=kind), kind)}


def _plot(runs: list[RunSpectrum], path: Path) -> None:
    """Singular values above rounding by index, mean over the blocks, one panel per kind of layer."""
    import torch

    plt = pyplot()
    kinds = list(dict.fromkeys(kind for run in runs for kind in _by_kind(run)))  # architectures may differ
    rows = -(-len(kinds) // 4)
    figure, panels = plt.subplots(rows, min(4, len(kinds)), figsize=(14, 3.2 * rows + 0.6), squeeze=False)
    for panel, kind in zip(panels.flat, kinds, strict=False):
        for run in runs:
            if not (layers := _by_kind(run).get(kind)):
                continue
            rank = max(1, *(layer.rank for layer in layers))  # beyond it there is rounding only
            means = torch.tensor([layer.singular_values[:rank] for layer in layers]).mean(0)
            panel.loglog(range(1, rank + 1), means, marker="." if rank < 20 else "", label=run.name)
        panel.set_title(kind)
        panel.set_xlabel("index")
        panel.grid(alpha=0.3)
    for panel in list(panels.flat)[len(kinds) :]:
        panel.axis("off")
    panels[0][0].set_ylabel("singular value of W_t - W_0")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(runs), fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.parser("spectrum", (__doc__ or "").splitlines()[0], "runs/relora runs/lora --out spectrum")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder or URL")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--from", dest="from_step", type=at_least_0, help="checkpoint to start from, of all runs")
    parser.add_argument("--labels", nargs="+", help="what to call the runs; default: their names")
    parser.add_argument("--step", type=at_least_0, help="checkpoint to end at; default: each run's newest")
    add_options_argument(parser)
    args = parser.parse_args(argv)
    pyplot()
    if args.labels and len(args.labels) != len(args.runs):
        raise ConfigError(f"--labels has {len(args.labels)} names for {len(args.runs)} runs. Give one for each.")
    options = parse_options(args.storage_option)
    places = [place("RUN", url, options) for url in args.runs]
    runs = [run_spectrum(run, from_step=args.from_step, step=args.step) for run in places]
    runs = [replace(run, name=label) for run, label in zip(runs, args.labels or [r.name for r in runs], strict=True)]
    write(runs, args.out)
    print("\n".join(table(runs)))


if __name__ == "__main__":
    sys.exit(main())
