"""A real Ray: what a run's driver exports at its machine's metrics port, as Prometheus would scrape it. And that the
dashboard and the alerts ask for nothing else."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from relora_ray.runs import sinks
from relora_ray.runs.metrics import read
from relora_ray.runs.places import run_storage
from relora_ray.runtime import driver, gauges
from relora_ray.runtime.gauges import COUNTERS, GAUGES, TAGS
from relora_ray.runtime.preflight import preflight
from tests.conftest import ROOT
from tests.tiny import tiny_config

MONITORING = ROOT / "cluster/monitoring"
EXPORTED = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS}


@pytest.fixture
def metrics_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("r", numbered=True)
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500}, _temp_dir=f"/tmp/{folder.name}-{port}",
    )  # fmt: skip
    yield port
    ray.shutdown()


def scrape(port: int) -> dict[str, dict[str, float]]:
    """Values by name, and by what labels there are besides Ray's own."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[str, float]] = {}
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        for family in text_string_to_metric_families(page.read().decode()):
            for sample in family.samples:
                if "relora" in sample.name:
                    key = "".join(sample.labels.get(name, "") for name in ("reason", "role", "change"))
                    assert sample.labels["run"] == "tiny"
                    found.setdefault(sample.name, {})[key] = sample.value
    return found


def test_gauges_have_the_values_of_the_run(
    metrics_port: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay as long as the run does, also if nothing is new."""
    monkeypatch.setattr(gauges, "BEAT_S", 0.2)
    cfg = preflight(tiny_config(data, tmp_path))
    seen: list[str] = []
    found: dict[str, dict[str, float]] = {}
    closing = gauges._Gauges.close

    def close(self: Any) -> None:
        until = time.monotonic() + 60
        while found.get("ray_relora_step") != {"": 12.0}:  # it was told of the run's end
            assert time.monotonic() < until, found
            time.sleep(0.5)
            found.update(scrape(metrics_port))
        time.sleep(3.0)  # several reports
        found.clear()
        found.update(scrape(metrics_port))
        closing(self)

    monkeypatch.setattr(gauges._Gauges, "close", close)
    monkeypatch.setattr(sinks, "CLOSE_S", 90.0)
    driver.run(cfg, on_event=lambda event: seen.append(event["kind"]))
    last = read(run_storage(cfg), "train")[-1]
    assert found["ray_relora_step"] == {"": 12.0}
    assert found["ray_relora_steps"] == {"": 12.0}
    assert found["ray_relora_loss"][""] == pytest.approx(last["loss"])
    assert found["ray_relora_boundary"] == {"": 4.0}
    assert found["ray_relora_unsaved_steps"] == {"": 0.0}
    assert found["ray_relora_waiting"] == {"machines": 0.0, "first step": 0.0}
    assert found["ray_relora_running"] == {"": 1.0}
    assert set(found["ray_relora_state_bytes"]) == {"weights", "derived", "gradients", "optimizer"}
    assert time.time() - 120 < found["ray_relora_commit_timestamp_seconds"][""] <= time.time()
    assert found.keys() <= EXPORTED
    assert [kind for kind in seen if kind != "waiting"][:2] == ["term", "begin"]


def expressions(tree: Any) -> Iterator[str]:
    """All PromQL in a dashboard or a file of rules."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("expr", "definition", "query") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from expressions(value)


@pytest.mark.parametrize("name", ["grafana.json", "alerts.yaml"])
def test_only_what_is_exported_is_asked_for(name: str) -> None:
    asked = " ".join(expressions(yaml.safe_load((MONITORING / name).read_text())))
    names = set(re.findall(r"\bray_\w+", asked))
    assert len(names) >= 8
    assert names <= EXPORTED
    labels = set(re.findall(r"(\w+)=~?\"", asked))
    assert labels <= {"run"}.union(*TAGS.values())


def test_dashboard_has_what_grafana_asks_for() -> None:
    """Grafana publishes no schema for this version's JSON: what its import and its panels need."""
    board = json.loads((MONITORING / "grafana.json").read_text())
    assert board["schemaVersion"] >= 36
    assert board["uid"]
    assert board["title"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["datasource"] == {"type": "prometheus", "uid": "$datasource"}
        assert panel["targets"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        assert all("$run" in target["expr"] for target in panel["targets"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert variables["run"]["query"]["query"] == variables["run"]["definition"]


def test_every_alert_says_which_run() -> None:
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"])
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
