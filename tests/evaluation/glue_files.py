"""Small files in the layout of GLUE, with what makes the real ones hard to read."""

from __future__ import annotations

from pathlib import Path

WORDS = ("old", "red", "tall", "kind", "deep", "cold", "loud", "slow")


def write_glue(folder: Path, num_rows: int = 48) -> str:
    """CoLA, RTE, STS-B and MRPC: a sentence is acceptable, follows, or is like another, if it says so."""
    pairs = [(f'The "{WORDS[n % 8]} man said', f"It's {WORDS[(n + n % 3) % 8]} no. {n}") for n in range(num_rows)]
    cola = [
        f"gj04\t{n % 2}\t{'' if n % 2 else '*'}\t{a}{' good' if n % 2 else ' bad'}" for n, (a, _) in enumerate(pairs)
    ]
    rte = [f"{n}\t{a}\t{b}\t{'entailment' if n % 2 else 'not_entailment'}" for n, (a, b) in enumerate(pairs)]
    stsb = [f"{n}\tg\tf\t2012\t{n}\tx\ty\t{a}\t{b}\t{n % 6:.3f}" for n, (a, b) in enumerate(pairs)]
    mrpc = [f"{n % 2}\t{n}\t{n}\t{a}\t{b}" for n, (a, b) in enumerate(pairs)]
    tables = {
        "CoLA": cola,
        "RTE": ["index\tsentence1\tsentence2\tlabel", *rte],
        "STS-B": ["index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore", *stsb],
        "MRPC": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", *mrpc],
    }
    for name, lines in tables.items():
        for split in ("train", "dev"):
            path = folder / name / f"{split}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(("\r\n" if name == "MRPC" else "\n").join([*lines, ""]).encode())
    return str(folder)
