"""What a sweep's driver knows of the runs under way, and says when it is stopped. One that is really stopped:
test_sweep.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from relora_ray.runs.places import run_storage
from relora_ray.runtime import under_way
from relora_ray.runtime.under_way import KIND, UnderWay, telling
from tests.tiny import run, tiny_config


def begun(coordinator: str = "coordinator") -> dict[str, Any]:
    return {"kind": KIND, "coordinator": coordinator, "trial": f"trial of {coordinator}"}


def test_each_run_is_said_with_its_newest_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has stored its state, one that had just ended, one that was starting, one that is over."""
    for name in ("a", "b"):
        run(tiny_config(data, tmp_path, f"name={name}", "train.stop_after_steps=5"))
    seen = UnderWay(run_storage(tiny_config(data, tmp_path, "name=a")).parent())
    assert seen.what_is_there(True) == "no run was under way"
    for name in ("a", "b", "c", "d"):
        assert seen.hear(name, begun(name))
    assert seen.hear("d", {"kind": KIND, "coordinator": None})
    assert not seen.hear("a", {"kind": "train", "step": 3})
    ended = []

    def store(coordinator: str) -> bool:
        if coordinator == "b":
            raise ray.exceptions.RayActorError
        return coordinator == "a"

    monkeypatch.setattr(under_way, "store", store)
    monkeypatch.setattr(ray, "kill", ended.append)
    assert not seen.store()
    assert sorted(ended) == ["trial of a", "trial of b", "trial of c"]
    assert seen.what_is_there(False) == (
        "a is stored after step 5, b is stored after step 5; what it has trained since is not, "
        "c is stored nowhere: it was starting"
    )


def test_trial_that_waits_for_anothers_warm_start_does_not_speak_for_it() -> None:
    said: list[Any] = []

    class Queue:
        def put(self, message: Any) -> None:
            said.append(message)

    with pytest.raises(ValueError, match="busy"), telling(Queue(), "warm"):
        raise ValueError("busy")
    assert said == []
