"""Texts that a model writes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from relora_ray.errors import ConfigError
from relora_ray.evaluation.subject import Subject, Tokens, load_causal
from relora_ray.keyed import key
from relora_ray.runs.evaluations import Evaluation, find_evaluation, new_record, path_of, put_evaluation
from relora_ray.storage import Storage


def generate(
    subject: Subject,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
    out: Storage | None,
) -> tuple[Evaluation, str]:
    """A continuation of each prompt; temperature 0 takes the likeliest token each time. The record, and why it could
    not be stored. A text depends on its prompt, the seed and its place among the prompts, and not on the other
    prompts."""
    tokens = subject.need_tokens("a sample")
    encoded = [[*tokens.begin_ids, *tokens.tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise ConfigError(
                f"--generate {prompt!r} is no token for {subject.name}, and nothing begins a text. Give text."
            )
        if subject.positions is not None and len(ids) + max_new_tokens > subject.positions:
            raise ConfigError(
                f"--generate {prompt[:40]!r} is {len(ids)} tokens, and with --max-new-tokens={max_new_tokens} more "
                f"than the {subject.positions} positions of {subject.name}. Give less of either."
            )
    settings = {
        **subject.identity,
        "prompts": list(prompts),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "device": device.type,
    }
    path, began = path_of("samples", f"{len(prompts)}_prompts", subject.step, settings), time.time()
    if (known := find_evaluation(out, path)) is not None:
        return known, ""
    model = load_causal(subject.folder).to(device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    samples = []
    devices = [device] if device.type == "cuda" else []
    for number, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        given = torch.tensor([ids], device=device)
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(key(seed, "sample", number))
            made = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=max_new_tokens,
                use_cache=True,
                eos_token_id=tokens.end_id,
                pad_token_id=tokens.end_id if tokens.end_id is not None else 0,
                **(sampling or {"do_sample": False}),
            )[0, len(ids) :].tolist()
        ended = bool(made) and made[-1] == tokens.end_id
        text = _behind(tokens, ids[len(tokens.begin_ids) :], made)
        samples.append({"prompt": prompt, "text": text, "num_tokens": len(made), "ended": ended})
    record = new_record(
        "samples", f"{len(prompts)} prompts", subject.name, subject.step, settings, {"samples": samples}, began
    )
    return record, put_evaluation(out, path, record) if out is not None else ""


def _behind(tokens: Tokens, ids: list[int], made: list[int]) -> str:
    """The text of `made`, with the space that some tokenizers leave out at the beginning of a text."""

    def text(ids: list[int]) -> str:
        return str(tokens.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    prompt, whole = text(ids), text([*ids, *made])
    return whole.removeprefix(prompt) if whole.startswith(prompt) else text(made)
