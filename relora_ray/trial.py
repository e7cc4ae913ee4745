"""Trying a model out: what no reading of its config can tell.

`check_gradients` looks after the first backward pass of every structure that is trained, on every number of ranks.
`try_architecture` does the same beforehand with the real architecture at a tiny width, and compares the loss with the
architecture's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress

import torch
import transformers
from torch import nn

from relora_ray.architecture import Architecture, hf_config
from relora_ray.config import LoraConfig, RunConfig
from relora_ray.errors import ConfigError
from relora_ray.methods.lowrank import LowRank, redraw_all_, wrap_
from relora_ray.model import check_causal, freeze_, is_in
from relora_ray.small import VOCABULARY, small_config
from relora_ray.token_loss import TokenLoss

logger = logging.getLogger(__name__)

TOKENS = 32
LONG = 288
"""Tokens of a row in which every part of known architectures takes part: DeepSeek-V4 compresses 128 at a time, and
BigBird looks at all of a shorter row."""
SAME_LOSS = 1e-5
"""Two ways to compute one loss differ by less, relative to it."""
NOTHING = 1e-8
"""A gradient whose largest entry is no more, relative to the model's largest, is rounding. Those of known
architectures are above 1e-6."""


def check_gradients(model: nn.Module) -> None:
    """See that every tensor that is trained has a gradient after a backward pass. ConfigError."""
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    if not without:
        return
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LowRank)}
    dead = {path for path in layers if f"{path}.lora_B" in without}
    if dead:
        named = shortest_names(dead, layers.keys() - dead, at_end=True)
        raise ConfigError(
            f"{_some(dead)} of {type(model).__name__} would never be trained: the model reads the weight without "
            f"calling the layer, or never calls it. Set method.leave_out={_listed(named)}, and the weight is trained "
            f"in full; if the model never uses it, set model.frozen to the same."
        )
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    raise ConfigError(
        f"{_some(without)} of {type(model).__name__} would never be trained: no loss depends on it, as with parts for "
        f"images or for an encoder's output. Set model.frozen={_listed(shortest_names(without, trained))}."
    )


def shortest_names(names: Iterable[str], others: Iterable[str], *, at_end: bool = False) -> list[str]:
    """A few segments of dotted names, as `model.frozen` takes them, that are in each of `names` and in none of
    `others`. `at_end`: their last segments, as `method.leave_out` takes them."""
    left, others, found = set(names), set(others), []
    while left:
        candidates = sorted(_segments(min(left), at_end), key=lambda c: (c.count("."), len(c)))

        def has(name: str, candidate: str) -> bool:
            return f".{name}".endswith(f".{candidate}") if at_end else is_in(candidate, name)

        fitting = [c for c in candidates if not any(has(other, c) for other in others)] or [min(left)]
        best = max(fitting, key=lambda c: (sum(has(name, c) for name in left), -c.count("."), -len(c)))
        found.append(best)
        left = {name for name in left if not has(name, best)}
    return found


def _segments(name: str, at_end: bool) -> set[str]:
    parts = name.split(".")
    ends = [len(parts)] if at_end else range(1, len(parts) + 1)
    return {".".join(parts[begin:end]) for end in ends for begin in range(end) if not parts[begin].isdigit()}


def _some(names: set[str]) -> str:
    return f"{min(names)}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"


def _listed(names: list[str]) -> str:
    return f"[{','.join(sorted(names))}]"


def try_architecture(cfg: RunConfig, architecture: Architecture | None = None) -> None:
    """Find out with a tiny model of the same architecture whether it is causal, whether all of it is trained, with and
    without adapters, and whether its own loss is the one that is trained. ConfigError.

    An architecture that has no tiny form is not tried: what is wrong is found at the first update then."""
    config = hf_config(cfg.model, cfg.data.seq_len, architecture)
    _refuse_layers_left_out(config)
    tokens = min(LONG, cfg.data.seq_len)
    try:
        model = _small_model(small_config(config), tokens)
    except ConfigError:
        raise
    except Exception as error:  # the config is checked elsewhere; here it is the making small that failed
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.info("the architecture has no tiny form, so that it is not tried out before the start (%s)", text)
        return
    _say_what_is_dropped(config)
    deep: nn.Module | None = None
    try:
        _try(model, cfg, trial_ids())
    except ConfigError:
        # Only all of its blocks have the names that the settings may mean, and some parts see nothing in short rows.
        with suppress(Exception):  # it may have no tiny form of its depth
            deep = _small_model(small_config(config, most_layers=None), tokens)
        if deep is None:
            raise
        _try(deep, cfg, trial_ids(tokens))


def _small_model(config: transformers.PretrainedConfig, tokens: int) -> nn.Module:
    """That computes something. ConfigError if in rows of so many tokens one looks ahead."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # First of all: some turn to another attention for good after a short row.
        check_causal(model, trial_ids(tokens)[:1, :-1])
        model(input_ids=trial_ids()[:, :-1]).logits.float().logsumexp(-1).mean().backward()
        model.zero_grad()
    return model


def _try(model: nn.Module, cfg: RunConfig, ids: torch.Tensor) -> None:
    freeze_(model, cfg.model.frozen)
    model.train()
    check_loss(model, cfg, ids)
    check_gradients(model)
    _say_what_has_no_effect(model)
    if isinstance(cfg.method, LoraConfig):
        model.zero_grad()
        wrap_(model, cfg.method.model_copy(update={"lora_rank": 2}))
        redraw_all_(model, seed=0, boundary=0)
        mean_loss(model, cfg, ids).backward()
        check_gradients(model)


def trial_ids(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(0, VOCABULARY - 8, (2, tokens + 1), generator=torch.Generator().manual_seed(0))


def mean_loss(model: nn.Module, cfg: RunConfig, ids: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens, as the run computes it."""
    train = cfg.train.model_copy(update={"precision": "fp32", "loss_chunk_tokens": None})
    total: torch.Tensor = TokenLoss(model, train)(ids[:, :-1], ids[:, 1:], torch.ones(len(ids)))
    return total / ids[:, 1:].numel()


def check_loss(model: nn.Module, cfg: RunConfig, ids: torch.Tensor) -> None:
    """Leaves the gradients of the run's loss."""
    again, ours = mean_loss(model, cfg, ids), mean_loss(model, cfg, ids)
    ours.backward()
    if not torch.equal(again, ours):
        logger.warning("%s draws random numbers: its own loss is not compared with", type(model).__name__)
        return
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with torch.no_grad():
        try:
            shifted, plain = model(input_ids=ids, labels=ids), model(input_ids=inputs, labels=targets)
        except Exception as error:
            logger.warning("the architecture's own loss cannot be computed, to compare with: %s", error)
            return
    theirs = [output.loss.float() for output in (shifted, plain)]  # most shift the labels, some do not
    # And some read a row that is a token longer differently, as those that keep a share of its tokens.
    alone = nn.functional.cross_entropy(shifted.logits[:, :-1].float().flatten(0, 1), targets.flatten())
    if any(torch.allclose(own, ours, rtol=SAME_LOSS) for own in theirs) or torch.allclose(
        theirs[0], alone, rtol=SAME_LOSS
    ):
        return
    raise ConfigError(
        f"{type(model).__name__} computes a loss of {float(theirs[0]):.4f} where this one is {float(ours):.4f}: it "
        f"adds something to the cross-entropy of the next token that would be left out here. Switch it off in its "
        f"config.json, or take another architecture."
    )


def _refuse_layers_left_out(config: transformers.PretrainedConfig) -> None:
    """ConfigError if the architecture leaves out whole layers by chance, each rank others."""
    for name, rate in config.get_text_config().to_dict().items():
        if name.lower().replace("_", "").endswith("layerdrop") and isinstance(rate, float) and rate > 0:
            raise ConfigError(
                f"the architecture leaves out layers by chance ({name}={rate:g}), and a layer that was not called has "
                f"no gradient to sum over the ranks. Set {name} to 0 in its config.json."
            )


def _say_what_has_no_effect(model: nn.Module) -> None:
    """Warn of what has a gradient that is zero, as the router of experts of which each token goes to one, weighted by
    1; and of the bias that balances experts, which the published training moves and a gradient does not."""
    largest = {n: float(p.grad.abs().max()) for n, p in model.named_parameters() if p.grad is not None}
    zero = {name for name, size in largest.items() if size <= NOTHING * max(largest.values())}
    others = {n for n, p in model.named_parameters() if p.requires_grad} - zero
    if zero:
        logger.warning(
            "%s of %s has a gradient of zero and will hardly be trained: does its setting leave it nothing to choose, "
            "as with one expert for each token?",
            _listed(shortest_names(zero, others)),
            type(model).__name__,
        )
    if any(name.endswith("e_score_correction_bias") for name, _ in model.named_buffers()):
        logger.warning(
            "%s balances its experts by a bias (e_score_correction_bias) that the training it was published with "
            "moves, and this one does not: it stays as it is.",
            type(model).__name__,
        )


def _say_what_is_dropped(config: transformers.PretrainedConfig) -> None:
    text = config.get_text_config().to_dict()
    dropped = {n: v for n, v in text.items() if "drop" in n and isinstance(v, float) and v > 0}
    if dropped:
        logger.warning(
            "the architecture has dropout (%s), which pre-training on text that is read once seldom has: set it to 0 "
            "in its config.json if it is not wanted",
            ", ".join(f"{name} {value:g}" for name, value in sorted(dropped.items())),
        )
