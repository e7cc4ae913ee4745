"""Look at a run's checkpoints, check every byte of them, remove old ones, copy them elsewhere.

    python -m relora_ray.checkpoints list RUN
    python -m relora_ray.checkpoints show RUN [--step STEP]
    python -m relora_ray.checkpoints verify RUN [--step STEP]
    python -m relora_ray.checkpoints prune RUN --keep-last N [--keep-every-steps M] [--yes]
    python -m relora_ray.checkpoints copy RUN OUT [--step STEP]

RUN is a run's folder or URL. Exit codes: 0 done, 1 a checkpoint is damaged, 2 refused.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial

from relora_ray.checkpoint import Manifest, existing_step, list_manifests, plan_prune, read_manifest
from relora_ray.checkpoint.manifest import Part, StoredObject, part_folders, pinned_steps
from relora_ray.checkpoint.parts import in_flight, read_checked, read_index
from relora_ray.config import RunConfig
from relora_ray.config_file import parse_config, to_yaml
from relora_ray.errors import ConfigError, DamagedError, ReloraError
from relora_ray.metrics import size_text
from relora_ray.rollback import FOLDER as ROLLBACKS
from relora_ray.runs import CONFIG, DATA, read_config
from relora_ray.storage import Storage, add_options_argument, parse_options


def list_lines(run: Storage) -> Iterator[str]:
    """One line per checkpoint, oldest first; a base is counted where it was written."""
    yield "      step        tokens  boundary  world        base       delta  attempt        written (UTC)"
    seen: set[str] = set()
    for step in _steps(run):
        try:
            manifest = read_manifest(run, step)
        except DamagedError as error:
            yield f"{step:>10,}  {error}"
            continue
        base = manifest.base
        new = base is not None and base.folder not in seen
        seen |= {base.folder} if base else set()
        base_text = _base_text(base, new)
        yield (
            f"{step:>10,}{manifest.tokens:>14,}{manifest.boundary:>10,}{manifest.world_size:>7}{base_text:>12}"
            f"{size_text(manifest.delta.size_bytes):>12}  {manifest.attempt}  {_time(manifest)}"
        )


def _base_text(base: Part | None, new: bool) -> str:
    if base is None:
        return "none"
    return "elsewhere" if base.run else size_text(base.size_bytes) if new else "the same"


def show_lines(run: Storage, step: int | None) -> Iterator[str]:
    """What a checkpoint holds, by role."""
    manifest = read_manifest(run, _existing(run, step))
    yield f"{run.url}/{manifest.path}"
    yield f"  after {manifest.step:,} updates, {manifest.tokens:,} tokens; last boundary after {manifest.boundary:,}"
    yield f"  attempt {manifest.attempt}, world size {manifest.world_size}, {_time(manifest)} UTC"
    yield "  written by " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    counters = manifest.counters
    yield f"  merges {counters.merges}, skipped steps {counters.skipped_steps}; data {manifest.data_fingerprint}"
    for kind, part in (("base", manifest.base), ("delta", manifest.delta)):
        if part is None:
            yield f"  {kind:<6} none: no weight is frozen"
            continue
        yield f"  {kind:<6} {size_text(part.size_bytes):>9}  {len(part.objects)} objects in {part.folder}{_whose(part)}"
        roles: dict[str, list[int]] = defaultdict(list)
        for name, entry in read_index(run, part).items():
            roles[_role(name)].append(_tensor_bytes(entry))
        for role, sizes in sorted(roles.items(), key=lambda item: -sum(item[1])):
            yield f"         {size_text(sum(sizes)):>9}  {role} ({len(sizes)} tensors)"


def _whose(part: Part) -> str:
    return f" of run {part.run}" if part.run else ""


def verify(run: Storage, step: int | None) -> Iterator[tuple[int, str]]:
    """Read every byte of the checkpoints (all, or one); for each its step and what is wrong with it, or ""."""
    problems: dict[str, str] = {}
    for number in [_existing(run, step)] if step is not None else _steps(run):
        try:
            parts = read_manifest(run, number).parts
        except DamagedError as error:
            yield number, str(error)
            continue
        for part in parts:
            if part.folder not in problems:
                problems[part.folder] = _problem(run, part)
        yield number, " ".join(problem for part in parts if (problem := problems[part.folder]))


def _problem(run: Storage, part: Part) -> str:
    try:
        in_flight(lambda stored: len(read_checked(run, part, stored)), part.objects)
    except DamagedError as error:
        return str(error)
    return ""


def prune(run: Storage, *, keep_last: int, keep_every_steps: int, dry_run: bool) -> Iterator[str]:
    """Remove checkpoints beyond the newest `keep_last` and the multiples of `keep_every_steps`.

    Left-overs of crashed attempts stay: a running one may be writing them. It removes them itself.
    """
    manifests = []
    for step in _steps(run):
        try:
            manifests.append(read_manifest(run, step))
        except DamagedError as error:
            yield f"stays: {error}"
    dropped, unneeded = plan_prune(
        manifests,
        part_folders(run),
        keep_last=keep_last,
        keep_every_steps=keep_every_steps,
        attempt="0000-none",
        pinned=pinned_steps(run),
    )
    sizes = {part.folder: part.size_bytes for manifest in manifests for part in manifest.parts if not part.run}
    for path in [m.path for m in dropped] + unneeded:  # manifests first: none ever names what is gone
        yield f"{'would remove' if dry_run else 'removes'} {path}" + (
            f" ({size_text(sizes[path])})" if path in sizes else ""
        )
        if not dry_run:
            run.delete(path)
    freed = sum(sizes.get(path, 0) for path in unneeded)
    yield f"{len(dropped)} of {len(manifests)} checkpoints, {size_text(freed)}" + (
        "; nothing was changed: give --yes to remove them" if dry_run and dropped else ""
    )


def copy(run: Storage, out: Storage, step: int | None) -> Manifest:
    """Copy one checkpoint, verified on the way, with all that makes OUT a run that can be resumed and exported."""
    cfg = _at(out, read_config(run))
    if out.list():
        raise ConfigError(f"{out.url} is not empty. Give a new folder, or delete it first.")
    manifest = read_manifest(run, _existing(run, step))
    for path in [DATA, *run.list("tokenizer"), *run.list(ROLLBACKS)]:
        out.put(path, run.get(path))
    for part in manifest.parts:
        in_flight(partial(_copy_object, run, out, part), part.objects)
    own = {kind: part.model_copy(update={"run": ""}) for kind in ("base", "delta") if (part := getattr(manifest, kind))}
    manifest = manifest.model_copy(update=own)
    out.put(CONFIG, to_yaml(cfg).encode())
    out.put(manifest.path, manifest.model_dump_json(indent=1).encode())  # last: it says that all is there
    return manifest


def _copy_object(run: Storage, out: Storage, part: Part, stored: StoredObject) -> None:
    out.put(f"{part.folder}/{stored.path}", read_checked(run, part, stored))


def _at(out: Storage, cfg: RunConfig) -> RunConfig:
    """The config of the run at its new place. ConfigError if that cannot be one."""
    storage, _, name = out.url.rpartition("/")
    overrides = [f"storage={storage}", f"name={name}"]
    if storage.partition("://")[0] != cfg.storage.partition("://")[0]:
        overrides.append("storage_options={}")  # of another kind of file system
    return parse_config(to_yaml(cfg), overrides, source=out.url)


def _steps(run: Storage) -> list[int]:
    read_config(run)  # ConfigError if it is not a run
    return list_manifests(run)


def _existing(run: Storage, step: int | None) -> int:
    read_config(run)
    return existing_step(run, step)


def _role(name: str) -> str:
    """`optimizer.model.layers.0.mlp.up_proj.lora_A.exp_avg` -> `first moments of adapters`."""
    owner = "adapters" if ".lora_" in name else "embeddings and head" if _is_embedding(name) else "other weights"
    if not name.startswith("optimizer."):
        return owner
    kinds = {"exp_avg": "first moments", "exp_avg_sq": "second moments", "step": "step counts"}
    return f"{kinds[name.rpartition('.')[2]]} of {owner}"


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


_DTYPE_BYTES = {"int8": 1, "uint8": 1, "bool": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int64": 8}


def _tensor_bytes(entry: dict[str, object]) -> int:
    size = _DTYPE_BYTES[str(entry["dtype"])]
    for length in entry["shape"]:  # type: ignore[attr-defined]
        size *= length
    return size


def _time(manifest: Manifest) -> str:
    return datetime.fromtimestamp(manifest.unix_time, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m relora_ray.checkpoints", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "list": "one line per checkpoint",
        "show": "what a checkpoint holds, by role and bytes",
        "verify": "read every byte and compare it with what the manifest recorded",
        "prune": "remove old checkpoints; without --yes only say which",
        "copy": "copy one checkpoint to another prefix, as a run of its own",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("run", metavar="RUN", help="a run's folder or URL")
        if name == "copy":
            command.add_argument("out", metavar="OUT", help="folder or URL of the new run; its last part is its name")
        if name in ("show", "verify", "copy"):
            default = "all" if name == "verify" else "the newest"
            command.add_argument("--step", type=int, default=None, help=f"a checkpoint's step; default: {default}")
        if name == "prune":
            command.add_argument("--keep-last", type=_positive, required=True, help="how many of the newest to keep")
            command.add_argument("--keep-every-steps", type=int, default=0, help="also keep multiples of this")
            command.add_argument("--yes", action="store_true", help="remove them")
        add_options_argument(command)
    args = parser.parse_args()
    try:
        options = parse_options(args.storage_option)
        return _run(args, Storage(args.run, options), options)
    except ReloraError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, DamagedError) else 2


def _run(args: argparse.Namespace, run: Storage, options: dict[str, object]) -> int:
    if args.command == "verify":
        damaged = 0
        for step, problem in verify(run, args.step):
            print(f"step {step:>10,}  {problem or 'every byte is as recorded'}")
            damaged += bool(problem)
        return 1 if damaged else 0
    if args.command == "copy":
        manifest = copy(run, Storage(args.out, options), args.step)
        print(f"wrote {args.out}: the checkpoint after step {manifest.step:,}")
        return 0
    lines = {
        "list": lambda: list_lines(run),
        "show": lambda: show_lines(run, args.step),
        "prune": lambda: prune(
            run, keep_last=args.keep_last, keep_every_steps=args.keep_every_steps, dry_run=not args.yes
        ),
    }[args.command]
    for line in lines():
        print(line)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
