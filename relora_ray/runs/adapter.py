"""A run's model as a base and an adapter on it, for peft.

The base is all of the model but the update since the last merge: W of the layers that have adapters, as it was frozen
there, and embeddings, norms, biases and head as they are now, though they are trained too. So the adapter is a plain
LoRA without `modules_to_save`, which fits tied embeddings and is what servers take, and base and adapter are the run's
function of this very step. The base of another step is another one.
"""

from __future__ import annotations

import os
import tempfile

import torch
import transformers

from relora_ray.modeling.hf_export import sample_logits
from relora_ray.modeling.peft_export import check_adapter, require_peft, write_adapter
from relora_ray.runs.card import model_card
from relora_ray.runs.run import CARD, Trained, store_folder, write_model
from relora_ray.runs.setting import ADAPTER, BASE, find_setting
from relora_ray.storage import Storage

_LAST = (f"{BASE}/config.json", f"{ADAPTER}/adapter_config.json")


def export_adapter(
    trained: Trained, out: Storage, *, dtype: torch.dtype, max_shard_size: str | None, base_name: str
) -> None:
    """Write OUT/base, a plain Hugging Face folder in `dtype`, and OUT/adapter, in fp32, which calls the base
    `base_name`. Takes the adapters out of `trained.model`. ConfigError without peft, ExportError if the two do not load
    as the model that was trained; then nothing is written."""
    require_peft()
    setting, cfg = find_setting(trained.storage), trained.cfg
    logits, index = sample_logits(trained.model), setting.data_index()
    update = trained.method.take_adapter_(trained.model)
    dense = trained.method.dense_state_dict(trained.model)  # of the base alone, now
    with tempfile.TemporaryDirectory(prefix="relora-ray-export-") as folder:
        base, adapter = os.path.join(folder, BASE), os.path.join(folder, ADAPTER)
        card = model_card(cfg, trained.manifest, index, dtype=str(dtype).removeprefix("torch."), is_base=True)
        write_model(setting, cfg, trained.model, dense, base, dtype=dtype, max_shard_size=max_shard_size, card=card)
        write_adapter(update, transformers.AutoConfig.from_pretrained(base), adapter, base_name=base_name)
        card = model_card(cfg, trained.manifest, index, adapter_of=base_name, dtype="float32")
        Storage(adapter).put(CARD, card.encode())
        device = next(trained.model.parameters()).device.type
        check_adapter(update, dense, logits, base, adapter, device=device)
        store_folder(folder, out, last=_LAST)
