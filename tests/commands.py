"""Commands as a user types them, without the seconds in which each imports torch and transformers: forked from a server
that has. What a process of its own matters for (signals, a Ray, what is imported) is started as one elsewhere."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from relora_ray.conformance.processes import _context as forkserver

ROOT = Path(__file__).parent.parent


def command(module: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m module args`, in the repository's root."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        texts = [str(arg) for arg in args]
        process = forkserver.Process(target=_main, args=(module, texts, str(out), str(err), dict(os.environ)))
        process.start()
        process.join()
        code = process.exitcode
        assert code is not None
        return subprocess.CompletedProcess([module, *texts], code, out.read_text(), err.read_text())


def _main(module: str, args: list[str], out: str, err: str, environment: dict[str, str]) -> None:
    os.environ.clear()  # the server's may be of earlier
    os.environ.update(environment)
    os.chdir(ROOT)
    for number, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [module, *args]
    sys.path[0:0] = [str(ROOT)]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
