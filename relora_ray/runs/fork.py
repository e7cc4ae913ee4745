"""Begin a run with what another has learned: from a checkpoint of it at a boundary, by reference.

Right after a boundary adapters are drawn anew and B is zero: the function lies in the frozen weights, the embeddings,
norms and head. A fork takes these over, with the moments that they have, and draws adapters as its own config says: of
another rank, for another cycle, under another learning rate. Its first checkpoint names the parent's base instead of
copying it, and a pin has the parent keep that base for as long as a checkpoint of the fork needs it.

forkable.py says what may differ between the two.
"""

from __future__ import annotations

import json
from dataclasses import replace

from relora_ray.checkpoint import Checkpointer, Rollback, list_manifests
from relora_ray.checkpoint.history import FORK, pin, pin_base_only
from relora_ray.checkpoint.ownership import claim
from relora_ray.config import RunConfig
from relora_ray.config.file import parse_config, to_yaml
from relora_ray.errors import ConfigError
from relora_ray.methods.base import build_method
from relora_ray.modeling.parallel import World
from relora_ray.runs.forkable import may_differ
from relora_ray.runs.places import run_storage
from relora_ray.runs.setting import begin, check_run, find_setting
from relora_ray.runs.state import build_state, identity_digest


def fork_yaml(config: str, parent: str, step: int) -> str:
    """`fork`, from a config's YAML to a config's."""
    return to_yaml(fork(parse_config(config), parent, step))


def fork(cfg: RunConfig, parent: str, step: int) -> RunConfig:
    """Make the first checkpoint of the run `cfg`, after `step` updates, from that of the run `parent` beside it.

    Returns the config as it will run. Does nothing if the run has a checkpoint. ConfigError if the two do not fit,
    CheckpointError or DamagedError if the parent's checkpoint is not there or not whole. One process, on the CPU.
    """
    storage = run_storage(cfg)
    if list_manifests(storage):
        return check_run(cfg)
    term = claim(storage)
    if list_manifests(storage):  # of another that was quicker
        return check_run(cfg)
    source, method = storage.sibling(parent), build_method(cfg)
    setting = find_setting(source)
    # The parent's architecture is taken as it has stored it, if it has.
    cfg = begin(cfg, term, parent=setting if setting.architecture() is not None else None)
    _refuse_if_unfit(cfg, setting.config(), parent, step)
    storage.put(FORK, json.dumps({"parent": parent, "step": step}).encode())  # says where there may be pins
    manifest = pin(source, cfg.name, step, term.number)  # before it is read: the parent may be training
    checkpointer = Checkpointer(
        storage,
        cfg.checkpoint,
        World(),
        attempt=term.attempt(1),
        identity=identity_digest(cfg, cfg.data.fingerprint),
        data_fingerprint=cfg.data.fingerprint,
        tokens_per_step=cfg.tokens_per_step,
        setup=find_setting(storage).record(),
    )
    try:
        state = build_state(cfg, method, World(), step)
        frozen, fresh = method.frozen_names(state.model), method.fresh_names(state.model)
        position = checkpointer.take_over(manifest, parent, state.model, state.optimizer, frozen, fresh)
        # What was best is a checkpoint of the parent's, and none here.
        counters = position.counters.model_copy(update={"held_out": None, "best": None})
        position = replace(position, rollbacks=_within(position.rollbacks, cfg.steps), counters=counters)
        checkpointer.save(position, state.model, state.optimizer, frozen, needed=True)
        checkpointer.close()
    except BaseException:
        checkpointer.close(failed=True)
        raise
    pin_base_only(source, cfg.name, manifest, term.number)
    return cfg


def _within(rollbacks: tuple[Rollback, ...], steps: int) -> tuple[Rollback, ...]:
    """What a run of so many steps passes over, of what its parent did."""
    kept = [r for r in rollbacks if r.skip_from < steps]
    return tuple(r.model_copy(update={"skip_until": min(r.skip_until, steps)}) for r in kept)


def _refuse_if_unfit(cfg: RunConfig, parent: RunConfig, name: str, step: int) -> None:
    compared = cfg
    if parent.model.huggingface and not parent.model.fingerprint:  # of a version that went by the place
        compared = cfg.model_copy(update={"model": cfg.model.model_copy(update={"fingerprint": ""})})
    ours, theirs = (c.identity() | {"model.init_from": c.model.init_from} for c in (compared, parent))
    differing = [
        key
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not key.startswith(may_differ(cfg))
    ]
    if differing:
        lines = "\n".join(f"  {key}: {theirs.get(key)!r} in {name}, {ours.get(key)!r} here" for key in differing)
        raise ConfigError(f"{cfg.name} cannot be forked from {name}, because these keys differ:\n{lines}")
    for who, its in ((cfg.name, cfg), (name, parent)):
        if not build_method(its).is_boundary(step):
            raise ConfigError(
                f"{cfg.name} cannot be forked from {name} at step {step}: {who} has no boundary there. Its boundaries "
                f"are after {_boundaries(its)}."
            )


def _boundaries(cfg: RunConfig) -> str:
    steps = cfg.method.boundaries(cfg.steps)
    return ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "") or "no step: its method has none"
