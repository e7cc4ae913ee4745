"""The rows that a run trains on and is measured by."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from relora_ray.config import RunConfig
from relora_ray.data.loader import BatchSource
from relora_ray.data.tokens import DataIndex, Split, TokenRows
from relora_ray.modeling.parallel import World
from relora_ray.runs.places import data_storage, validation_storage
from relora_ray.runs.setting import open_data, open_validation
from relora_ray.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    train: BatchSource
    validation: BatchSource
    fingerprint: str
    named: Mapping[str, BatchSource]
    """The sets of `data.validation`."""


def open_batches(cfg: RunConfig, world: World) -> Data:
    storage, index = data_storage(cfg), open_data(cfg)
    by_device = cfg.train.micro_batch_rows_by_device.items()
    micro = next((rows for name, rows in by_device if name in world.device_name), cfg.train.micro_batch_rows)

    def source(storage: Storage, index: DataIndex, split: Split, micro_batch_rows: int, of: str = "") -> BatchSource:
        rows = TokenRows(storage, index, split, cfg.data.seq_len)
        if split == "validation" and rows.num_rows < cfg.train.eval_rows and world.is_first:
            logger.warning(
                "train.eval_rows=%d: there are only %d validation rows%s, all are used",
                cfg.train.eval_rows,
                rows.num_rows,
                of,
            )
        return BatchSource(
            rows,
            world,
            global_batch_rows=cfg.global_batch_rows,
            micro_batch_rows=micro_batch_rows,
            seed=cfg.seed,
        )

    held_out = cfg.train.eval_micro_batch_rows or micro
    return Data(
        source(storage, index, "train", micro),
        source(storage, index, "validation", held_out),
        index.fingerprint,
        {
            name: source(validation_storage(cfg, name), found, "validation", held_out, f" in {name}")
            for name, found in open_validation(cfg).items()
        },
    )
