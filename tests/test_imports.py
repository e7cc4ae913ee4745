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
    "errors": 0, "verdict": 1, "hub": 0, "clock": 0, "masking": 0, "location": 0, "keyed": 0, "sizes": 0, "plan": 0,
    "replicas": 0, "config": 1, "storage": 1, "places": 2, "cli": 2, "data.order": 1,
    "schedule": 2, "config_file": 2, "plots": 2, "architecture": 2.1, "optim": 2, "reference": 2, "parallel": 2,
    "token_loss": 2, "small": 2,
    "model": 2.3, "weights": 2.3, "hf_export": 2.6,
    "methods": 3, "data.tokens": 3, "data.loader": 3, "checkpoint": 3,
    "runs": 4, "divergence": 4, "rollback": 4, "metrics": 4, "trial": 4, "tally": 5, "loop": 5, "fork": 6, "sweep": 5,
    "runtime": 7,
    "ablations": 8, "spectrum": 8, "conformance": 8,
    "progress": 8, "launch": 8, "report": 8, "status": 8, "export": 8, "checkpoints": 8,
    "data.kinds": 3, "data.formats": 4, "data.sources": 4, "data.documents": 6, "data.encode": 4, "data.pack": 5,
    "data.prepare": 8, "data.claim": 8, "data.notes": 8, "data.tokenizer": 8,
}  # fmt: skip

LIBRARIES = {
    "torch": 2, "transformers": 2, "safetensors": 2, "datasets": 3, "pyarrow": 3, "ray": 7, "pydantic": 1, "yaml": 1,
    "matplotlib": 2, "numpy": 1, "fsspec": 1,
}  # fmt: skip


def room(module: str) -> str:
    """`relora_ray.methods.lora` -> `methods`; modules of data/ have rooms of their own."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "data" and len(parts) > 1 else parts[0]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n if n.count(".") == 1 and n.startswith("relora_ray.") else str(node.module) for n in names]
    return found


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("relora_ray", "relora_ray.data"):
            found.append((name, path))
    return found


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_module_imports_lower_ranks_only(name: str, path: Path) -> None:
    mine = room(name)
    for imported in imports(path):
        top = imported.split(".")[0]
        if top == "relora_ray" and imported not in ("relora_ray", "relora_ray.__version__"):
            other = room(imported)
            package = mine.split(".")[0]
            fine = RANKS[other] < RANKS[mine] or (package == other.split(".")[0] and RANKS[other] == RANKS[mine])
            # Entry points may use each other's functions: launch prints report's summary.
            assert fine or RANKS[mine] == RANKS[other] == 8, f"{name} (rank {RANKS[mine]}) imports {imported}"
        elif top in LIBRARIES:
            assert LIBRARIES[top] <= RANKS[mine], f"{name} (rank {RANKS[mine]}) imports {top}"
        if top == "ray":
            assert mine == "runtime"
        if top == "matplotlib":
            assert mine == "plots"
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


def test_coordinator_and_what_only_commits_start_without_torch() -> None:
    """It would take seven seconds of a processor and 300 MB more, at every start and restart."""
    code = (
        "import sys, relora_ray.runtime.coordinator; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
