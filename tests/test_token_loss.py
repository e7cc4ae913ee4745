"""The loss in chunks: the same numbers and gradients as from all logits at once, without them ever existing."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from relora_ray.config import TrainConfig
from relora_ray.modeling.token_loss import WHOLE_BYTES, TokenLoss, softmax_loss_
from tests.tiny import losses, run, tiny_config

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA = (transformers.LlamaConfig, {**SMALL, "intermediate_size": 48})
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": LLAMA,
    "llama-tied": (LLAMA[0], {**LLAMA[1], "tie_word_embeddings": True}),
    "pythia": (transformers.GPTNeoXConfig, {**SMALL, "intermediate_size": 48}),
    "phi": (transformers.PhiConfig, {**SMALL, "intermediate_size": 48}),  # its head has a bias
}


def build(config_class: Any, settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three rows of seven tokens, of which the last row does not count."""
    ids = torch.randint(0, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:], torch.tensor([1.0, 1.0, 0.0])


def token_loss(model: nn.Module, chunk: int | None, precision: str = "fp32") -> TokenLoss:
    return TokenLoss(model, TrainConfig.model_validate(
        {"micro_batch_rows": 3, "loss_chunk_tokens": chunk, "precision": precision}
    ))  # fmt: skip


def loss_and_gradients(model: nn.Module, chunk: int, precision: str) -> tuple[float, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model)
    total = token_loss(model, chunk, precision)(*batch())
    (total * 0.125).backward()
    return float(total.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
@pytest.mark.parametrize("chunk", [1, 5, 7, 64])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-6), ("bf16", 2e-2)])
def test_chunks_give_the_loss_and_the_gradients_of_the_whole(
    name: str, chunk: int, precision: str, bound: float
) -> None:
    model = build(*ARCHITECTURES[name])
    whole, expected = loss_and_gradients(model, 0, precision)
    total, gradients = loss_and_gradients(model, chunk, precision)
    assert total == pytest.approx(whole, rel=bound / 10)
    assert gradients.keys() == expected.keys()
    for path, gradient in expected.items():
        assert (gradients[path] - gradient).norm() <= bound * gradient.norm() + 1e-9, path
        assert gradient.norm() > 0 or "bias" in path, path


def test_evaluation_makes_no_gradients_and_has_the_same_loss() -> None:
    model = build(*LLAMA)
    trained = token_loss(model, 5)(*batch())
    with torch.no_grad():
        evaluated = token_loss(model, 5)(*batch())
    assert trained.requires_grad
    assert not evaluated.requires_grad
    assert float(evaluated) == float(trained.detach())


class Largest(TorchDispatchMode):
    """Rows of the largest tensor that had a column for every class."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize(("chunk", "rows"), [(0, 21), (5, 5)])
def test_no_more_logits_than_a_chunk_exist(chunk: int, rows: int) -> None:
    loss = token_loss(build(LLAMA[0], {**LLAMA[1], "hidden_size": 4, "intermediate_size": 4}), chunk)
    loss._head_is_plain = True  # finding that out has eight tokens' logits
    with Largest() as largest:
        loss(*batch()).backward()
    # A weight has a row for every class, and its transpose a column: hidden_size rows of them.
    assert largest.rows == max(rows, 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_softmax_is_exact_where_logits_are_far_apart(precision: str) -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0], [0.0, 0.0, 0.0]]).to(
        getattr(torch, {"fp32": "float32"}.get(precision, "bfloat16"))
    )
    total = softmax_loss_(logits, torch.tensor([1, 2]), torch.ones(2))
    assert float(total) == pytest.approx(1000.0 + 1.0986123, rel=1e-6)
    expected = [[1.0, -1.0, 0.0], [1 / 3, 1 / 3, -2 / 3]]
    assert torch.allclose(logits.float(), torch.tensor(expected), rtol=4e-3)


def test_head_that_is_more_than_a_product_is_not_chunked(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.Gemma2Config(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with caplog.at_level(logging.WARNING):
        total = token_loss(model, 5)(*batch())
        token_loss(model, 5)(*batch())
    assert "Gemma2ForCausalLM does more to its logits than a linear head" in caplog.text
    assert torch.equal(total, token_loss(model, 0)(*batch()))


def test_only_large_logits_are_chunked_by_default() -> None:
    loss = token_loss(build(*LLAMA), None)
    enough = WHOLE_BYTES // (4 * VOCABULARY)
    assert loss._chunk(torch.zeros(1, enough, dtype=torch.long, device="cpu")) == 0
    assert loss._chunk(torch.zeros(1, enough + 1, dtype=torch.long)) > enough


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 3e-3)])
def test_run_in_chunks_is_the_run(data: Path, tmp_path: Path, precision: str, bound: float) -> None:
    """Over a warm start and three cycles."""
    _, whole = run(tiny_config(data, tmp_path, "name=whole", f"train.precision={precision}"))
    _, chunks = run(tiny_config(
        data, tmp_path, "name=chunks", f"train.precision={precision}", "train.loss_chunk_tokens=40"
    ))  # fmt: skip
    assert losses(chunks).keys() == losses(whole).keys()
    for step, loss in losses(whole).items():
        assert losses(chunks)[step] == pytest.approx(loss, rel=bound), step
