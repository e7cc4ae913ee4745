"""What Ray Train alone takes to the first update of the quickstart's model: no checks, data, checkpoints or adapters.

python benchmarks/bare_ray_train.py

Two workers on CPUs, on the Ray of RAY_ADDRESS or one started for it. The opponent of benchmarks/start.py: what is left
of a start when everything of ours is taken away.
"""

from __future__ import annotations

import os
import tempfile

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

ROWS, SEQ_LEN, VOCABULARY = 8, 128, 2048
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
"""As in configs/quickstart.yaml, of each worker."""


def train() -> None:
    import torch
    from ray.train.torch import prepare_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = prepare_model(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SIZES)))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(VOCABULARY, (ROWS, SEQ_LEN))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    print("step 1/1", flush=True)


def main() -> None:
    ray.init(address=os.environ.get("RAY_ADDRESS"))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TorchTrainer(
            train, scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(storage_path=scratch)
        )
        trainer.fit()


if __name__ == "__main__":
    main()
