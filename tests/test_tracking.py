"""What TensorBoard, W&B and MLflow hold of a run that is stopped and goes on, read back by their own readers. Real runs
in this process; nothing is sent anywhere. W&B has no reader for its offline files: their frames are LevelDB's log, and
what is in them is read by W&B's own messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relora_ray.config import RunConfig
from relora_ray.config.tracking import MlflowConfig
from relora_ray.runs import trackers
from relora_ray.runs.metrics import Record
from relora_ray.runs.sinks import about, listening
from tests.tiny import Crash, crash_at, run, stored_losses, tiny_config

FIRST_DONE = 7
"""The first life ends at the record of this update; its last checkpoint is that of step 6."""


def tracked(data: Path, folder: Path) -> RunConfig:
    tracking = {
        "tensorboard": {"folder": str(folder / "boards")},
        "wandb": {"folder": str(folder), "offline": True},
        "mlflow": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    return tiny_config(data, folder, tracking=tracking)


def life(cfg: RunConfig, end: int | None = None) -> list[str]:
    """One life of the run, told to all trackers; what they say."""
    said: list[str] = []
    crash = crash_at(end, "train") if end is not None else lambda record: None
    with listening(cfg, lambda record: None, say=said.append) as tell:

        def on_record(record: Record) -> None:
            tell(record)
            crash(record)

        if end is None:
            run(cfg, on_record)
        else:
            with pytest.raises(Crash):
                run(cfg, on_record)
    return said


@pytest.fixture(scope="module")
def twice(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that was ended in the middle of a cycle, went back to its last checkpoint, and came to its end."""
    for package in ("tensorboard", "wandb", "mlflow"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("tracked")
    cfg = tracked(data, folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_ENABLE_TELEMETRY", "false")
    patch.setenv("AWS_SECRET_ACCESS_KEY", folder.parent.name)  # the run's storage has it in its path
    assert life(cfg, FIRST_DONE) == []
    assert life(cfg) == []
    patch.undo()
    return cfg


def test_tensorboard_has_each_step_once(twice: RunConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert twice.tracking.tensorboard is not None
    board = EventAccumulator(f"{twice.tracking.tensorboard.folder}/tiny").Reload()
    stored = stored_losses(twice)
    curve = {event.step: event.value for event in board.Scalars("train/loss")}
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 13))
    assert curve == pytest.approx(stored)
    evals = [event.step for event in board.Scalars("eval/loss")]
    assert evals == sorted(stored_losses(twice, "eval"))
    assert {event.step for event in board.Scalars("boundary/boundary_s")} == {3, 6, 9, 12}


def test_wandb_goes_on_under_one_id_and_later_rows_count(twice: RunConfig) -> None:
    assert twice.tracking.wandb is not None
    folders = sorted(Path(twice.tracking.wandb.folder, "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert {folder.name.rpartition("-")[2] for folder in folders} == {about(twice).id}
    rows = [row for folder in folders for row in history(next(folder.glob("*.wandb")))]
    trained = [row for row in rows if "train/loss" in row]
    again = [row["attempt"] for row in trained if row["step"] == FIRST_DONE]
    assert len(again) == 2
    assert again == sorted(again)
    assert {row["step"]: row["train/loss"] for row in trained} == pytest.approx(stored_losses(twice))


def test_mlflow_goes_on_in_one_run_and_later_entries_count(twice: RunConfig) -> None:
    from mlflow import MlflowClient

    assert twice.tracking.mlflow is not None
    client = MlflowClient(tracking_uri=twice.tracking.mlflow.uri)
    experiment = client.get_experiment_by_name("relora_ray")
    runs = client.search_runs([experiment.experiment_id])
    assert [found.info.run_name for found in runs] == ["tiny"]
    assert runs[0].info.status == "FINISHED"
    assert runs[0].data.params["method.lora_rank"] == "4"
    entries = client.get_metric_history(runs[0].info.run_id, "train/loss")
    assert [entry.step for entry in entries].count(FIRST_DONE) == 2
    entries.sort(key=lambda entry: (entry.step, entry.timestamp))
    assert {entry.step: entry.value for entry in entries} == pytest.approx(stored_losses(twice))


def test_batch_of_which_a_part_failed_is_not_doubled(
    twice: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "MLFLOW_AT_ONCE", 10)
    monkeypatch.setenv("MLFLOW_ENABLE_TELEMETRY", "false")
    records = [{"kind": "train", "step": step, "loss": 1.0 / step, "lr": 0.1} for step in range(1, 13)]
    mlflow = trackers.Mlflow(MlflowConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"), about(twice))
    send, calls = mlflow._client.log_batch, []

    def log_batch(*args: Any, **more: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError("the server restarts")
        send(*args, **more)

    monkeypatch.setattr(mlflow._client, "log_batch", log_batch)
    with pytest.raises(ConnectionError):
        mlflow.add(records)
    mlflow.add(records)
    mlflow.add([{"kind": "train", "step": 13, "loss": 0.0, "lr": 0.1}])
    entries = mlflow._client.get_metric_history(mlflow._id, "train/loss")
    assert sorted(entry.step for entry in entries) == list(range(1, 14))


def test_no_secret_is_written(twice: RunConfig) -> None:
    folder = Path(twice.storage)
    files = [path for path in folder.rglob("*") if path.is_file() and folder / "tiny" not in path.parents]
    assert len(files) > 5
    where = [path for path in files if folder.parent.name.encode() in path.read_bytes()]
    assert [path for path in where if path.suffix != ".log"] == []  # W&B's own diary names its folders


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a .wandb file: a header of 7 bytes, and records in blocks of 32 KiB."""
    import json

    from wandb.proto.wandb_internal_pb2 import Record as Message

    data, rows, at, whole = path.read_bytes(), [], 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a full record, or the last part of one
            message, whole = Message.FromString(whole), b""
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows
