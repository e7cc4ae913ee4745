"""The one command: its names, its help, and the configs that come with the package."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from relora_ray import __version__
from relora_ray.__main__ import COMMANDS, main
from relora_ray.commands.shipped import find, folder, names
from relora_ray.config.file import load_config
from relora_ray.errors import ConfigError
from tests.commands import command
from tests.conftest import ROOT


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_its_own_parser_takes(name: str) -> None:
    done = command("relora_ray", name, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: relora-ray {name}")
    assert "exit codes: 0 done" in done.stdout
    examples = re.findall(rf"^  relora-ray {name}(.*)$", done.stdout, re.MULTILINE)
    assert examples
    known = set(re.findall(r"--[a-z-]+", done.stdout.partition("examples:")[0]))
    for example in examples:
        for word in shlex.split(example):
            assert not word.startswith("--") or word in known


def test_version_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"relora-ray {__version__}\n"
    assert main([]) == main(["--help"]) == 0
    told = capsys.readouterr().out
    assert [name for name in COMMANDS if told.count(f"\n  {name} ") != 2] == []
    assert main(["reprot"]) == 2
    assert "'reprot' is no command. Did you mean 'report'?" in capsys.readouterr().err


def test_nothing_heavy_is_imported_for_help() -> None:
    code = "import sys; from relora_ray.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_configs_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names()[0] == "quickstart"
    assert {"relora/60m", "galore/1b", "sweeps/books"} <= set(names())
    sizes = [name for name in names() if name.startswith("relora/")]
    assert sizes == [f"relora/{size}" for size in ["9m", "20m", "35m", "60m", "130m", "250m", "350m", "1b", "3b", "7b"]]
    assert load_config(find("relora/60m")).name == "relora-60m"
    (tmp_path / "mine").write_text("name: x")
    assert find("mine") == "mine", "a file of one's own is itself"
    assert find("no/such.yaml") == "no/such.yaml", "which is said where files are read"
    with pytest.raises(ConfigError, match=r"neither a file nor a config that comes.* Did you mean 'relora/60m'"):
        find("relora/60")


def test_config_is_listed_shown_and_copied(tmp_path: Path) -> None:
    listed = command("relora_ray", "configs").stdout
    assert re.search(r"^galore/60m +LLaMA 60m, GaLore\.$", listed, re.MULTILINE)
    text = (ROOT / "configs/lora/9m.yaml").read_text()
    assert command("relora_ray", "configs", "lora/9m").stdout == text
    out = tmp_path / "mine.yaml"
    assert command("relora_ray", "configs", "lora/9m", out).returncode == 0
    assert out.read_text() == text
    again = command("relora_ray", "configs", "lora/9m", out)
    assert (again.returncode, again.stdout) == (2, "")
    assert "is there. Give another name" in again.stderr
    assert command("relora_ray", "configs", "--path").stdout.strip() == str(folder())
