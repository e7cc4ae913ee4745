"""Trying a model out: what no reading of its config can tell.

`check_gradients` looks after the first backward pass of every structure that is trained, on every number of ranks.
`try_architecture` does the same beforehand with the real architecture at a tiny width, and compares the loss with the
architecture's own.
"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress

import torch
import transformers
from torch import nn

from relora_ray.config import RunConfig
from relora_ray.errors import ConfigError, ExportError, first_words
from relora_ray.methods.base import build_method, dense_copy
from relora_ray.methods.lowrank.layer import LowRank
from relora_ray.modeling.architecture import Architecture, hf_config, in_training, is_there, say_what_is_not_read
from relora_ray.modeling.hf_export import export_config, write_hf_folder
from relora_ray.modeling.model import check_causal, embedding_rows, freeze_, is_in
from relora_ray.modeling.small import VOCABULARY, is_dropout, small_config
from relora_ray.modeling.token_loss import TokenLoss

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
    published = hf_config(cfg.model, cfg.data.seq_len, architecture)
    config = in_training(copy.deepcopy(published))
    _refuse_layers_left_out(config)
    _say_what_is_dropped(config)
    if is_there(cfg.model.huggingface):
        say_what_is_not_read(cfg.model.huggingface)
    tokens = min(LONG, cfg.data.seq_len)
    try:
        model = _small_model(small_config(config), tokens)
    except ConfigError:
        raise
    except Exception as error:  # the config is checked elsewhere; here it is the making small that failed
        text = f"{type(error).__name__}: {first_words(error)}"
        logger.warning(
            "the architecture has no tiny form, so that it is not tried out before the start: whether it looks ahead, "
            "trains all its layers and can be exported shows in the run only (%s)",
            text,
        )
        return
    if later := _only_in_later_blocks(config, model):
        deep = _deep_model(config, tokens)
        if deep is None:
            logger.warning("later blocks are not tried out before the start, such as those that have %s", min(later))
        _try(deep or model, cfg, tokens if deep else TOKENS)
    else:
        try:
            _try(model, cfg, TOKENS)
        except ConfigError:
            # Only all of its blocks have the names that settings may mean, and some parts see nothing in short rows.
            if (deep := _deep_model(config, tokens)) is None:
                raise
            _try(deep, cfg, tokens)
    if cfg.model.huggingface and cfg.method.exports:
        _try_export(small_config(published))


def _deep_model(config: transformers.PretrainedConfig, tokens: int) -> nn.Module | None:
    """The tiny form with all blocks; None if there is none."""
    with suppress(Exception):
        return _small_model(small_config(config, most_layers=None), tokens)
    return None


def _try_export(config: transformers.PretrainedConfig) -> None:
    """See that what the run will export loads again: some architectures' text halves do not. ConfigError."""
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory(prefix="relora-ray-trial-") as folder:
        torch.manual_seed(0)
        trained = in_training(copy.deepcopy(config))
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(trained, dtype=torch.float32)
        dense = {name: dense_copy(tensor) for name, tensor in model.state_dict().items()}
        exported = export_config(config, None, end_token_id=0, own_ids=True)
        try:
            write_hf_folder(model, dense, exported, folder, dtype=torch.float32)
        except Exception as error:  # a class of transformers raises what it likes
            why = (error.__cause__ or error) if isinstance(error, ExportError) else error
            raise ConfigError(
                f"what is exported of {type(model).__name__} would not load as the model that was trained: {why} "
                f"Take another architecture; of one for images and text, that of its text alone."
            ) from error


def _only_in_later_blocks(config: transformers.PretrainedConfig, model: nn.Module) -> set[str]:
    """Names of parameters, without numbers of blocks, that the tiny `model` of a few blocks has not: of experts that
    begin behind its last block, say."""
    try:
        with torch.device("meta"):
            deep = transformers.AutoModelForCausalLM.from_config(small_config(config, most_layers=None))
    except Exception:  # there is no such form
        return set()

    def kinds(model: nn.Module) -> set[str]:
        return {re.sub(r"\.\d+\.", ".N.", name) for name, _ in model.named_parameters()}

    return kinds(deep) - kinds(model)


def _small_model(config: transformers.PretrainedConfig, tokens: int) -> nn.Module:
    """That computes something. ConfigError if in rows of so many tokens one looks ahead, or if it changes its own
    weights when it is run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        # First of all: some turn to another attention for good after a short row.
        long = trial_ids(model, tokens)[:1, :-1]
        model.eval()(input_ids=long)
        _check_unchanged(model, before, "evaluated")
        check_causal(model, long)
        model.train()
        out = model(input_ids=trial_ids(model)[:, :-1]).logits.float().logsumexp(-1).mean()
        if not out.isfinite():
            raise ConfigError(
                f"{type(model).__name__} computes {out.item()} from random weights. Look for a setting in its "
                f"config.json that divides by zero or overflows, such as rope_theta."
            )
        out.backward()
        _check_unchanged(model, before, "run in training")
        model.zero_grad()
    return model


def _check_unchanged(model: nn.Module, before: dict[str, torch.Tensor], when: str) -> None:
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    if changed:
        raise ConfigError(
            f"{type(model).__name__} changes {_some(set(changed))} by itself when it is {when}. What a checkpoint "
            f"holds would depend on when it was written, and ranks would come apart. If its config.json has a setting "
            f"that asks for this, switch it off; else take another architecture."
        )


def _try(model: nn.Module, cfg: RunConfig, tokens: int) -> None:
    ids = trial_ids(model, tokens)
    freeze_(model, cfg.model.frozen)
    model.train()
    check_loss(model, cfg, ids)
    check_gradients(model)
    _say_what_has_no_effect(model)
    if cfg.method.kind != "full":
        model.zero_grad()
        narrow = cfg.method.model_copy(update=dict(cfg.method.tiny))
        build_method(cfg.model_copy(update={"method": narrow})).adapt(model, cfg.steps)
        mean_loss(model, cfg, ids).backward()
        check_gradients(model)


def trial_ids(model: nn.Module, tokens: int = TOKENS) -> torch.Tensor:
    """Two rows of token ids of the tiny `model`, less a few of a large vocabulary: its last may be images."""
    most = min(VOCABULARY - 8, embedding_rows(model))
    return torch.randint(0, most, (2, tokens + 1), generator=torch.Generator().manual_seed(0))


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
    inputs, targets, exact = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None
    with torch.no_grad():
        try:
            shifted, plain = model(input_ids=ids, labels=ids), model(input_ids=inputs, labels=targets)
            with suppress(Exception):  # of these rows as they are: a loss of the router is of all that was read
                exact = model(input_ids=inputs, labels=targets, shift_labels=targets)
        except Exception as error:
            logger.warning("the architecture's own loss cannot be computed, to compare with: %s", error)
            return
    outputs = (shifted, plain) if exact is None else (shifted, plain, exact)
    theirs = [output.loss.float() for output in outputs]  # most shift the labels, some do not
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
            "%s of %s has a gradient of zero where it was tried out, and may hardly be trained. A router has if its "
            "setting leaves it nothing to choose, as with one expert for each token.",
            _listed(shortest_names(zero, others)),
            type(model).__name__,
        )
    untrained = [n for n, _ in model.named_buffers()] + [n for n, p in model.named_parameters() if not p.requires_grad]
    balancing = {m[0] for name in untrained if (m := re.search(r"\w*(expert|correct|balanc)\w*bias\w*$", name))}
    if balancing:
        logger.warning(
            "%s balances its experts by a bias (%s) that the training it was published with moves, and this one does "
            "not: it stays as it is.",
            type(model).__name__,
            min(balancing),
        )


def _say_what_is_dropped(config: transformers.PretrainedConfig) -> None:
    text = config.get_text_config().to_dict()
    dropped = {name: value for name, value in text.items() if is_dropout(name, value)}
    if dropped:
        logger.warning(
            "the architecture has dropout (%s), which pre-training on text that is read once seldom has: set it to 0 "
            "in its config.json if it is not wanted",
            ", ".join(f"{name} {value:g}" for name, value in sorted(dropped.items())),
        )
