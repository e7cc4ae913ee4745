"""Keys as they are listed, in a terminal, on the page and for editors: all from the sections' docstrings."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from relora_ray import launch
from relora_ray.commands import shipped
from relora_ray.commands.reference import lines, page, schema
from relora_ray.config.file import load_config, parse_config, parse_mapping
from relora_ray.config.keys import all_keys, sweep_keys
from relora_ray.errors import ConfigError
from relora_ray.sweep.space import SweepConfig
from tests.conftest import ROOT
from tests.tiny import TINY


def test_page_is_up_to_date() -> None:
    """`python -m relora_ray.commands.reference docs/config.md` writes it."""
    assert (ROOT / "docs/config.md").read_text() == page()


def test_every_key_says_what_it_is() -> None:
    keys = [*all_keys(), *sweep_keys(SweepConfig)]
    assert [key.dotted for key in keys if not key.doc] == []
    by_name = {(key.dotted, key.kind): key for key in keys}
    rate = by_name["optimizer.learning_rate", ""]
    assert (rate.type, rate.default) == ("number above 0", "required")
    rank = by_name["method.lora_rank", "relora"]
    assert (rank.type, rank.default) == ("whole number above 0 or plan by step", "128")
    assert by_name["method.reset.ratio", "relora"].type == "number above 0, below 1"
    assert by_name["train.compile", ""].default == "none"
    assert by_name["schedule.warmup", ""].type == "share, such as 25%"
    assert ("method.cycles", "relora") in by_name
    assert ("method.cycles", "lora") not in by_name


def test_lines_of_a_section_and_of_a_key() -> None:
    text = "\n".join(lines("method.reset"))
    assert text.startswith("method.reset.kind: one of zero, magnitude, random, none, default zero (relora)")
    assert next(lines("seed")) == "seed: whole number at least 0, default 0"
    assert any(line.startswith("sweep.halving.factor") for line in lines(None))
    with pytest.raises(ConfigError, match=r"'optmizer' is neither a section nor a key\. Did you mean 'optimizer'\?"):
        list(lines("optmizer"))


def problems(raw: object) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(schema()).iter_errors(raw)]


@pytest.mark.parametrize("name", [name for name in shipped.names() if not name.startswith("ablations/")])
def test_schema_takes_what_is_shipped(name: str) -> None:
    raw = parse_mapping((shipped.folder() / f"{name}.yaml").read_text())
    assert problems(raw) == []


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"learning_rte": 1}},
        {"method": {"kind": "relora", "merge_every_steps": 3, "lora_rnk": 2}},
        {"method": {"kind": "galore", "lora_rank": 2}},
        {"schedule": {"kind": "cosin"}},
        {"schedule": {"warmup": "many"}},
        {"steps": "many"},
        {"sweep": {"spaces": {}}},
    ],
    ids=str,
)
def test_schema_refuses_what_is_wrong(change: dict[str, object]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert problems(yaml.safe_load(TINY)) == []
    assert problems(yaml.safe_load(TINY) | change) != []


def test_commands_print_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert shipped.main(["--schema"]) == 0
    assert "merge_every_steps" in json.dumps(json.loads(capsys.readouterr().out))
    assert launch.main(["--keys", "optimizer"]) == 0
    assert "optimizer.grad_clip: number at least 0, default 1\n" in capsys.readouterr().out
    assert launch.main(["quickstart", "--keys"]) == 2
    assert "leave 'quickstart' out" in capsys.readouterr().err
    assert launch.main([]) == 2
    assert "no config is given" in capsys.readouterr().err


def test_printed_config_is_the_whole_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["laptop/relora", "steps=200", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert parse_config(printed) == load_config(shipped.find("laptop/relora"), ["steps=200"])
    assert "merge_every_steps: 50\n" in printed
    assert launch.main(["sweeps/methods", "--print-config"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    kinds = [document["method"]["kind"] for document in documents]
    assert list(dict.fromkeys(kinds)) == ["full", "lora", "relora", "galore", "sltrain"]


def test_secrets_are_not_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    given = ["quickstart", "storage_options={secret: $AWS_SECRET_ACCESS_KEY}", "name=hunter2", "--print-config"]
    assert launch.main(given) == 0
    printed = capsys.readouterr().out
    assert "secret: $AWS_SECRET_ACCESS_KEY" in printed
    assert "hunter2" not in printed
