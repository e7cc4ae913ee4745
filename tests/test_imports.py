"""Who may import whom: DESIGN's ranks, and the core without Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "relora_ray"

RANKS = {
    "errors": 0, "verdict": 1, "hub": 0, "clock": 0, "masking": 0, "location": 0, "keyed": 0, "replicas": 0,
    "config": 1, "storage": 1, "cli": 2,
    "modeling": 2, "methods": 3, "checkpoint": 3, "runs": 4, "loop": 5, "sweep": 6, "study": 6, "conformance": 6,
    "evaluation": 6, "planning": 6, "runtime": 7, "commands": 8, "launch": 9, "__main__": 9,
    # One room, of which other rooms use a part.
    "data.order": 1, "data.tokens": 3, "data.loader": 3, "data.kinds": 3, "data.formats": 4, "data.sources": 4,
    "data.encode": 4, "data.pack": 5, "data.documents": 5.2, "data.prepare": 5.5, "data.claim": 5.5, "data.notes": 5.5,
    "data.tokenizer": 5.5, "study.page": 6.5, "runs.places": 2, "study.plots": 2, "study.paired": 2,
    "commands.shipped": 3,
    # Commands as they were called first.
    "status": 9, "report": 9, "export": 9, "checkpoints": 9, "spectrum": 9, "ablations": 9,
}  # fmt: skip

LIBRARIES = {
    "torch": 2, "transformers": 2, "safetensors": 2, "datasets": 3, "pyarrow": 3, "ray": 7, "pydantic": 1, "yaml": 1,
    "matplotlib": 2, "numpy": 1, "fsspec": 1, "plotly": 6.5, "rich": 6,
}  # fmt: skip


def room(module: str) -> str:
    """`relora_ray.methods.full` -> `methods`; some modules have a rank of their own."""
    parts = module.split(".")[1:]
    alone = ".".join(parts[:2])
    return alone if alone in RANKS else parts[0]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                path = ROOT / name.replace(".", "/")
                found.append(name if path.is_dir() or path.with_suffix(".py").is_file() else str(node.module))
    return found


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__init__.py" or name in ("relora_ray.config", "relora_ray.checkpoint"):  # others are empty
            found.append((name, path))
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_module_imports_lower_ranks_only(name: str, path: Path) -> None:
    mine = room(name)
    for imported in imports(path):
        top = imported.split(".")[0]
        if top == "relora_ray" and imported not in ("relora_ray", "relora_ray.__version__"):
            other = room(imported)
            same_room = mine.split(".")[0] == other.split(".")[0]
            assert RANKS[other] < RANKS[mine] or (same_room and RANKS[other] == RANKS[mine]), (
                f"{name} (rank {RANKS[mine]}) imports {imported}"
            )
        elif top in LIBRARIES:
            assert LIBRARIES[top] <= RANKS[mine], f"{name} (rank {RANKS[mine]}) imports {top}"
        if top == "ray":
            assert mine == "runtime"
        if top in ("mlflow", "tensorboard", "wandb"):
            assert name == "relora_ray.runs.trackers"
        if top == "matplotlib":
            assert mine == "study.plots"
        if top == "plotly":
            assert name == "relora_ray.study.page.html"
        if top in ("fsspec", "s3fs"):
            assert mine == "storage"


UNPICKLING = {
    "all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list", "scatter_object_list",
    "send_object_list",
}  # fmt: skip


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_nothing_is_unpickled_from_the_network(name: str, path: Path) -> None:
    """What other ranks say travels as JSON and as tensors: whoever can connect must not run code here."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    named = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    named |= {node.id for node in nodes if isinstance(node, ast.Name)}
    named |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not named & UNPICKLING
    loads = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func).endswith("dcp.load")]
    for call in loads:
        alone = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get("no_dist")
        assert alone == "True", "torch has ranks exchange pickled plans"


def test_core_trains_with_ray_not_installed(data: Path, tmp_path: Path) -> None:
    script = f"""
import sys
sys.modules["ray"] = None  # every import of it fails
from pathlib import Path
from tests.tiny import run, tiny_config
state, records = run(tiny_config(Path({str(data)!r}), Path({str(tmp_path)!r})))
assert state.position.step == 12
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert tiny_config(data, tmp_path).name == "tiny"


@pytest.mark.parametrize("module", ["coordinator", "driver", "agent", "sweep"])
def test_what_does_not_train_starts_without_torch(module: str) -> None:
    """It would take seconds of a processor and 300 MB more, at every start and restart, and for each trial."""
    code = f"import sys, relora_ray.runtime.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
