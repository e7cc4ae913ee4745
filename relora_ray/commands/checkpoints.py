"""Look at a run's checkpoints, check every byte of them, remove old ones, copy them elsewhere.

    python -m relora_ray.checkpoints list RUN
    python -m relora_ray.checkpoints show RUN [--step STEP]
    python -m relora_ray.checkpoints verify RUN [--step STEP]
    python -m relora_ray.checkpoints prune RUN --keep-last N [--keep-every-steps M] [--keep-best] [--yes]
    python -m relora_ray.checkpoints copy RUN OUT [--step STEP]
    python -m relora_ray.checkpoints own RUN
    python -m relora_ray.checkpoints delete RUN [--yes]

RUN is a run's folder or URL. Exit codes: 0 done, 1 a checkpoint is damaged, 2 refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial

from relora_ray import cli
from relora_ray.checkpoint import (
    Commits,
    Manifest,
    Rollback,
    Setup,
    list_manifests,
    read_history,
    read_manifest,
)
from relora_ray.checkpoint.history import (
    Removal,
    old_pins,
    part_folders,
    read_origin,
    read_pins,
    release,
    removal_path,
    removals_text,
)
from relora_ray.checkpoint.manifest import FORMAT, Part, StoredObject, best_of, key_of, read_record
from relora_ray.checkpoint.owner import owning
from relora_ray.checkpoint.ownership import DRIVERS, TERMS, Term
from relora_ray.cli import at_least_0, at_least_1, command, place
from relora_ray.config import CheckpointConfig, RunConfig
from relora_ray.config.file import check
from relora_ray.errors import CheckpointError, ConfigError, DamagedError, StorageError
from relora_ray.runs.metrics import size_text
from relora_ray.runs.rollback import checkpoint_step, where_to_go_on
from relora_ray.runs.setting import (
    CONFIG,
    COPYING,
    DATA,
    SETUP,
    Setting,
    find_setting,
    read_config,
    refuse_inside_run,
    write_setting,
)
from relora_ray.storage import Storage, add_options_argument, parse_options

logger = logging.getLogger(__name__)


def list_lines(run: Storage) -> Iterator[str]:
    """One line per checkpoint, oldest first; a base is counted where it was written, and the best is marked."""
    found = [_read_at(run, step) for step in _steps(run)]  # if it can be read, there is something to head
    heading = "      step        tokens  boundary  world        base       delta  attempt        written (UTC)"
    yield f"{heading:<110}  held-out"
    seen: set[str] = set()
    best = best_of([manifest for _, manifest in found if isinstance(manifest, Manifest)])
    for step, manifest in found:
        if isinstance(manifest, DamagedError):
            yield f"{step:>10,}  {manifest}"
            continue
        base = manifest.base
        new = base is not None and base.folder not in seen
        seen |= {base.folder} if base else set()
        base_text = _base_text(base, new)
        yield (
            f"{step:>10,}{manifest.tokens:>14,}{manifest.boundary:>10,}{manifest.world_size:>7}{base_text:>12}"
            f"{size_text(manifest.delta.size_bytes):>12}  {manifest.attempt}  {_time(manifest)}"
            f"{_held_out(manifest, manifest is best)}"
        )


def _read_at(run: Storage, step: int) -> tuple[int, Manifest | DamagedError]:
    try:
        return step, read_manifest(run, step)
    except DamagedError as error:
        return step, error


def _held_out(manifest: Manifest, is_best: bool) -> str:
    """Its held-out loss, if it was evaluated."""
    if manifest.held_out is None:
        return ""
    return f"{manifest.held_out.loss:>10.4f}{'  best' if is_best else ''}"


def _base_text(base: Part | None, new: bool) -> str:
    if base is None:
        return "none"
    return "elsewhere" if base.run else size_text(base.size_bytes) if new else "the same"


def show_lines(run: Storage, step: int | None) -> Iterator[str]:
    """What a checkpoint holds, by role."""
    from relora_ray.checkpoint.parts import read_index  # with torch, for which --help must not wait

    manifest = read_manifest(run, _existing(run, step))
    yield f"{run.url}/{manifest.path}"
    yield f"  after {manifest.step:,} updates, {manifest.tokens:,} tokens; last boundary after {manifest.boundary:,}"
    yield f"  attempt {manifest.attempt}, world size {manifest.world_size}, {_time(manifest)} UTC"
    yield "  written by " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    counters = manifest.counters
    yield f"  merges {counters.merges}, skipped steps {counters.skipped_steps}; data {manifest.data_fingerprint}"
    if (held_out := manifest.held_out) is not None:
        yield f"  held-out loss {held_out.loss:.4f}, over {held_out.tokens:,} tokens"
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
    """Read every byte of the checkpoints (all, or one); for each its step and what is wrong with it, or "". One that
    the run's own retention removes meanwhile is left out."""
    problems: dict[str, str] = {}
    history = read_history(run)
    paths = [read_manifest(run, _existing(run, step)).path] if step is not None else list(history.line)
    for path, error in history.unreadable:
        yield _step(path), str(error)
    for path in paths:
        try:
            parts = history.read(path).parts
            for part in parts:
                if part.folder not in problems:
                    problems[part.folder] = _problem(run, part)
            problem = " ".join(problem for part in parts if (problem := problems[part.folder]))
            if (setup := history.read(path).setup) is not None:
                if setup.folder not in problems:
                    problems[setup.folder] = _setup_problem(run, setup)
                problem = f"{problem} {problems[setup.folder]}".strip()
        except DamagedError as error:
            problem = str(error)
        if not problem or path in read_history(run).standing:
            yield _step(path), problem


def _problem(run: Storage, part: Part) -> str:
    from relora_ray.checkpoint.parts import in_flight, read_checked  # with torch, for which --help must not wait

    try:
        in_flight(lambda stored: len(read_checked(run, part, stored)), part.objects)
    except DamagedError as error:
        return str(error)
    return ""


def _problem_of_all(run: Storage, manifest: Manifest) -> str:
    return " ".join(problem for part in manifest.parts if (problem := _problem(run, part)))


def _setup_problem(run: Storage, setup: Setup) -> str:
    setting = Setting(run, setup.folder, setup)
    for name in setting.names():
        try:
            setting.get(name)
        except CheckpointError as error:
            return str(error)
        except StorageError as error:
            if not error.missing:
                raise
            return f"{setup.folder}/{name} is gone."
    return ""


def prune(
    run: Storage, *, keep_last: int, keep_every_steps: int, keep_best: bool = False, dry_run: bool
) -> Iterator[str]:
    """Remove checkpoints beyond the newest `keep_last`, the multiples of `keep_every_steps` and, with `keep_best`, the
    one with the lowest held-out loss, and what crashed attempts left behind. RunBusyError if the run is being trained,
    DamagedError if the newest is not whole: the run would go on from one that is to go."""
    read_config(run)  # ConfigError if it is not a run
    # The claim first: it may wait for another driver's end, and what that one commits until then is no leftover.
    with contextlib.ExitStack() as stack:
        term = Term(10**9 - 1, "0") if dry_run else stack.enter_context(owning(run)).term
        cfg = CheckpointConfig(
            save_every_steps=1, keep_last=keep_last, keep_every_steps=keep_every_steps, keep_best=keep_best
        )
        yield from _pruned(run, term.attempt(1), cfg, dry_run)


def _pruned(run: Storage, attempt: str, cfg: CheckpointConfig, dry_run: bool) -> Iterator[str]:
    history = read_history(run)
    line, _ = history.read_line()
    for path in sorted({*history.line, *(path for path, _ in history.unreadable)} - {m.path for m in line}):
        yield f"stays: {path} cannot be read"
    if line and (problem := _problem_of_all(run, line[-1])):
        raise DamagedError(
            f"{problem} Nothing was removed: the newest checkpoint, of step {line[-1].step:,}, is not whole, and the "
            f"run would go on from one before it. Start the run, which passes over it, and prune after its next save."
        )
    sizes = {part.folder: part.size_bytes for manifest in line for part in manifest.parts if not part.run}
    commits, freed = Commits(run, cfg), 0
    removal = commits.plan(history, attempt)
    for path in (*removal.manifests, *removal.folders):
        size = sizes.get(path, 0)
        freed += size
        yield f"{'would remove' if dry_run else 'removes'} {path}" + (f" ({size_text(size)})" if size else "")
    if not dry_run:
        commits.remove_now(removal, attempt)
    yield f"{len(removal.manifests)} of {len(line)} checkpoints, {size_text(freed)}" + (
        "; nothing was changed: give --yes to remove them" if dry_run and removal else ""
    )


def delete(run: Storage, *, dry_run: bool = False) -> None:
    """Remove a run's folder. ConfigError if it is none or if others need what is in it, RunBusyError if it is being
    trained."""
    if run.is_local and os.path.islink(run.url):
        raise ConfigError(f"{run.url} is a link. Give the run's own folder, {os.path.realpath(run.url)}.")
    if not run.exists(COPYING):
        read_config(run)
    _refuse_if_needed(run)
    if dry_run:
        return
    with owning(run) as hold:
        _delete(run, hold.term.attempt(1))
    run.delete_below(DRIVERS)


def _delete(run: Storage, attempt: str) -> None:
    # Written down before pins are looked at again: a fork pins first, and then looks at what is written down.
    commits = Commits(run, CheckpointConfig(save_every_steps=1))
    owners = _owners_of_pins(run)  # as long as its manifests count
    going = Removal(manifests=tuple(read_history(run).paths), folders=tuple(sorted(part_folders(run))))
    commits.decide(attempt, record := removal_path(attempt, 1), removals_text(going).encode())
    try:
        _refuse_if_needed(run)
        _release(run, owners)
    except BaseException:
        run.delete(record)
        raise
    # What makes it a run goes last, so that one that is cut off can be begun again.
    last, listed = [SETUP, CONFIG, TERMS], _all_but_drivers(run)
    for _ in range(3):  # a listing may be old
        first = {path.partition("/")[0] for path in listed} | set(run.folders("")) - {DRIVERS}
        for name in [*sorted(first - set(last)), *last]:
            if name == last[0]:
                commits.fence(attempt)  # whoever owns it by now needs the rest
            if name in listed:
                run.delete(name)
            run.delete_below(name)
        if not (listed := _all_but_drivers(run)):
            return
    raise StorageError(f"{run.url}/{listed[0]} and {len(listed) - 1} more are still there. Delete it again.")


def _all_but_drivers(run: Storage) -> list[str]:
    """A sign of life comes and goes while its driver is at work."""
    return [path for path in run.list_surely("") if not path.startswith(f"{DRIVERS}/")]


def _refuse_if_needed(run: Storage) -> None:
    names = {pin.run for pin in read_pins(run).values()} | set(old_pins(run))
    needing = sorted(name for name in names if _needs(run, name))
    if needing:
        raise ConfigError(
            f"{run.url} is needed by {', '.join(needing)}: forked from it, they go on from a base that lies here. "
            f"Delete them first, or give each its own copy: python -m relora_ray.checkpoints own RUN."
        )


def _needs(run: Storage, name: str) -> bool:
    """Whether the run `name`, which has a pin here, goes on from something here, or is yet to. Its pin may be left over
    from a process that ended before it could let go."""
    fork = run.sibling(name)
    history = read_history(fork)
    if not history.paths:
        return bool(fork.folders(""))
    try:
        manifests = [history.read(path) for path in history.paths]
    except DamagedError:
        return True
    return run.url.rpartition("/")[2] in _owners(manifests)


def _owners(manifests: Iterable[Manifest]) -> set[str]:
    """Other runs that have what these name."""
    return {part.run for m in manifests for part in m.parts if part.run}


def _owners_of_pins(run: Storage) -> set[str]:
    """Runs in which this one may have pins."""
    owners = _owners(read_history(run).read_line()[0])
    if (origin := read_origin(run)) is not None:
        owners |= {origin.parent} | _owners(read_history(run.sibling(origin.parent)).read_line()[0])
    return owners


def _release(run: Storage, owners: Iterable[str]) -> None:
    for owner in owners:
        release(run.sibling(owner), run.url.rpartition("/")[2])


def own(run: Storage) -> str:
    """Give a fork a copy of the base that it shares with the run it was forked from, and let go of that. Returns what
    was done. RunBusyError if it is being trained."""
    read_config(run)
    history = read_history(run)
    line, whole = history.read_line()
    if not _owners(line):
        if line and whole and not history.unreadable:  # a process may have ended before it let go
            _release(run, _owners_of_pins(run))
        return f"{run.url} needs nothing of other runs."
    with owning(run) as hold:
        return _own(run, hold.term.attempt(1))


def _own(run: Storage, attempt: str) -> str:
    from relora_ray.checkpoint.parts import in_flight  # with torch, for which --help must not wait

    paths, rollbacks, _ = where_to_go_on(run)
    head = read_record(run, paths[-1])
    if head.base is None or not head.base.run:
        return f"{run.url} goes on with a base of its own; older checkpoints need others until they are removed."
    if problem := _problem_of_all(run, head):
        raise DamagedError(f"{problem} Nothing was changed: the run may go on from an older checkpoint.")
    base, other = head.base, run.sibling(head.base.run)
    folder = f"base/step-{head.step:08d}-{attempt}"
    in_flight(lambda o: other.copy(f"{base.folder}/{o.path}", run, f"{folder}/{o.path}"), base.objects)
    ours = base.model_copy(update={"folder": folder, "run": ""})
    if problem := _problem(run, ours):
        raise DamagedError(problem)
    update = {"format": FORMAT, "base": ours, "attempt": attempt, "line": (), "rollbacks": rollbacks}
    update["unix_time"] = time.time()
    manifest = head.model_copy(update=update)
    Commits(run, CheckpointConfig(save_every_steps=1)).decide(
        attempt, manifest.path, manifest.model_dump_json(indent=1).encode()
    )
    release(other, run.url.rpartition("/")[2])
    return (
        f"{run.url} has a base of its own after step {head.step:,}, and needs {other.url} no longer. Its older "
        f"checkpoints are removed when it goes on."
    )


def copy(run: Storage, out: Storage, step: int | None) -> Manifest:
    """Copy one checkpoint, verified on the way, with all that makes OUT a run that can be resumed and exported. If the
    run is being trained and removes it meanwhile, the next newest is copied. One that was cut off can be called again;
    until it is done, OUT is no run. RunBusyError if another copies to OUT."""
    if out.list() and (not out.exists(COPYING) or read_history(out).paths):
        raise ConfigError(f"{out.url} is not empty. Give a new folder, or delete it first.")
    _at(out, read_config(run))  # before anything is written
    refuse_inside_run(out)
    with owning(out) as hold:
        out.put(COPYING, json.dumps({"from": run.url}).encode())
        manifest = _copy_newest(run, out, step, hold.term)
        out.delete(COPYING)
    return manifest


def _copy_newest(run: Storage, out: Storage, step: int | None, term: Term) -> Manifest:
    while True:
        paths, rollbacks, _ = where_to_go_on(run)
        existing = read_manifest(run, _existing(run, step))
        manifest = existing if step is not None or not paths else read_record(run, paths[-1])
        if manifest.path not in paths:  # the run has gone back from it
            rollbacks = tuple(r for r in rollbacks if r.number <= manifest.counters.rollbacks)
        try:
            return _copy(run, out, manifest, rollbacks, term)
        except DamagedError:
            if manifest.path in read_history(run).standing:
                raise
            logger.warning("%s was removed by the run's own retention while it was copied", manifest.path)


def _copy(run: Storage, out: Storage, manifest: Manifest, rollbacks: tuple[Rollback, ...], term: Term) -> Manifest:
    from relora_ray.checkpoint.parts import in_flight  # with torch, for which --help must not wait

    for part in manifest.parts:
        in_flight(partial(_copy_object, run, out, part), part.objects)
    rollbacks = tuple(r for r in rollbacks if r.to_step <= manifest.step)
    setting = find_setting(run)
    tokenizer = {name: setting.get(name) for name in setting.names() if name.startswith("tokenizer/")}
    cfg = _at(out, setting.config())
    write_setting(out, term, cfg, setting.get(DATA), tokenizer, setting.architecture())
    parts = {
        kind: part.model_copy(update={"run": ""}) for kind in ("base", "delta") if (part := getattr(manifest, kind))
    }
    setup = find_setting(out).record()
    update = parts | {"format": FORMAT, "line": (), "rollbacks": rollbacks, "attempt": term.attempt(1), "setup": setup}
    manifest = manifest.model_copy(update=update)
    out.put_new(manifest.path, manifest.model_dump_json(indent=1).encode())  # last: it says that all is there
    return manifest


def _copy_object(run: Storage, out: Storage, part: Part, stored: StoredObject) -> None:
    from relora_ray.checkpoint.parts import read_checked  # with torch, for which --help must not wait

    out.put(f"{part.folder}/{stored.path}", read_checked(run, part, stored))


def _at(out: Storage, cfg: RunConfig) -> RunConfig:
    """The config of the run at its new place. ConfigError if that cannot be one."""
    storage, _, name = out.url.rpartition("/")
    moved = cfg.model_dump(mode="json") | {"storage": storage, "name": name}
    if storage.partition("://")[0] != cfg.storage.partition("://")[0]:
        moved["storage_options"] = {}  # of another kind of file system
    return check(moved)


def _steps(run: Storage) -> list[int]:
    read_config(run)  # ConfigError if it is not a run
    return list_manifests(run)


def _step(path: str) -> int:
    key = key_of(path)
    assert key is not None
    return key[1]


def _existing(run: Storage, step: int | None) -> int:
    read_config(run)
    return checkpoint_step(run, step)


def _role(name: str) -> str:
    """`optimizer.model.layers.0.mlp.up_proj.lora_A.exp_avg` -> `first moments of adapters`."""
    owner = "adapters" if ".lora_" in name else "embeddings and head" if _is_embedding(name) else "other weights"
    if not name.startswith("optimizer."):
        return owner
    key = name.rpartition(".")[2]
    kinds = {"exp_avg": "first moments", "exp_avg_sq": "second moments", "step": "step counts"}
    return f"{kinds.get(key, key)} of {owner}"


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


_DTYPE_BYTES = {"int8": 1, "uint8": 1, "bool": 1, "bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int64": 8}


def _tensor_bytes(entry: dict[str, object]) -> int:
    size = _DTYPE_BYTES[str(entry["dtype"])]
    for length in entry["shape"]:  # type: ignore[attr-defined]
        size *= length
    return size


def _time(manifest: Manifest) -> str:
    return datetime.fromtimestamp(manifest.unix_time, UTC).strftime("%Y-%m-%d %H:%M:%S")


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(
        "checkpoints",
        (__doc__ or "").splitlines()[0],
        "list runs/quickstart",
        "verify s3://bucket/runs/quickstart",
        "copy runs/quickstart s3://bucket/runs/quickstart",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "list": "one line per checkpoint",
        "show": "what a checkpoint holds, by role and bytes",
        "verify": "read every byte and compare it with what the manifest recorded",
        "prune": "remove old checkpoints; without --yes only say which",
        "copy": "copy one checkpoint to another prefix, as a run of its own",
        "own": "give a fork a copy of the base that it shares with the run it was forked from",
        "delete": "remove a run, unless runs that were forked from it need it; without --yes only say whether",
    }
    for name, text in helps.items():
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("run", metavar="RUN", help="a run's folder or URL")
        if name == "copy":
            sub.add_argument("out", metavar="OUT", help="folder or URL of the new run; its last part is its name")
        if name in ("show", "verify", "copy"):
            default = "all" if name == "verify" else "the newest"
            sub.add_argument("--step", type=at_least_0, default=None, help=f"a checkpoint's step; default: {default}")
        if name == "prune":
            sub.add_argument("--keep-last", type=at_least_1, required=True, help="how many of the newest to keep")
            sub.add_argument("--keep-every-steps", type=at_least_0, default=0, help="also keep multiples of this")
            sub.add_argument("--keep-best", action="store_true", help="also keep the one with the lowest held-out loss")
            sub.add_argument("--yes", action="store_true", help="remove them")
        if name == "delete":
            sub.add_argument("--yes", action="store_true", help="remove it")
        add_options_argument(sub)
    args = parser.parse_args(argv)
    options = parse_options(args.storage_option)
    return _run(args, place("RUN", args.run, options), options)


def _run(args: argparse.Namespace, run: Storage, options: dict[str, object]) -> int:
    if args.command == "verify":
        damaged = 0
        read_config(run)  # ConfigError if it is not a run
        for step, problem in verify(run, args.step):
            print(f"step {step:>10,}  {problem or 'every byte is as recorded'}")
            damaged += bool(problem)
        return 1 if damaged else 0
    if args.command == "copy":
        manifest = copy(run, place("OUT", args.out, options), args.step)
        print(f"wrote {args.out}: the checkpoint after step {manifest.step:,}")
        return 0
    if args.command == "own":
        print(own(run))
        return 0
    if args.command == "delete":
        delete(run, dry_run=not args.yes)
        print(f"removed {run.url}" if args.yes else f"{run.url} is needed by no other run: give --yes to remove it")
        return 0
    lines = {
        "list": lambda: list_lines(run),
        "show": lambda: show_lines(run, args.step),
        "prune": lambda: prune(
            run,
            keep_last=args.keep_last,
            keep_every_steps=args.keep_every_steps,
            keep_best=args.keep_best,
            dry_run=not args.yes,
        ),
    }[args.command]
    for line in lines():
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
