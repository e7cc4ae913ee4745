"""Real processes with gloo: `run_ranks(2, function, *args)` returns what `function` returned on every rank.

They are forked from a server that has imported torch and transformers, which takes each of them some seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "transformers.models.llama.modeling_llama", "relora_ray.loop"])


def _main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    results: Any,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    import datetime

    os.environ.clear()  # the server's may be of earlier
    os.environ.update(environment)

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=120),
        )
        # As bytes: the queue itself would share a tensor's memory, which this process may have left before it is read.
        results.put((rank, pickle.dumps(function(*args)), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    results = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_main, args=(function, rank, world_size, folder, results, args, dict(os.environ)))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            gathered = {}
            for _ in processes:
                rank, value, error = results.get(timeout=300)
                assert error is None, f"rank {rank}:\n{error}"
                gathered[rank] = pickle.loads(value)
        finally:
            for process in processes:
                process.join(30)
                process.kill()
    return [gathered[rank] for rank in range(world_size)]
