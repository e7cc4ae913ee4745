"""Where a run and its data lie, by its config."""

from __future__ import annotations

from relora_ray.config import RunConfig
from relora_ray.storage import Options, Storage


def run_storage(cfg: RunConfig) -> Storage:
    return Storage(cfg.storage, cfg.storage_options, retry_s=cfg.storage_retry_s).child(cfg.name)


def data_storage(cfg: RunConfig) -> Storage:
    return Storage(
        cfg.data.path, options_for(cfg.data.path, cfg, cfg.data.storage_options), retry_s=cfg.storage_retry_s
    )


def validation_storage(cfg: RunConfig, name: str) -> Storage:
    """Of a set of `data.validation`; with the options of `data.path` if it is of the same kind."""
    url, data = cfg.data.validation[name], cfg.data
    like_path = url.partition("://")[0] == data.path.partition("://")[0]
    options = options_for(url, cfg, data.storage_options if like_path else None)
    return Storage(url, options, retry_s=cfg.storage_retry_s)


def options_for(url: str, cfg: RunConfig, own: Options | None = None) -> Options:
    """`own` options, or else the run's if the URL is of the same kind as its storage."""
    if own is not None:
        return own
    return cfg.storage_options if url.partition("://")[0] == cfg.storage.partition("://")[0] else {}
