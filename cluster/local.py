"""A cluster to play with on one machine: a head with its dashboard, machines of one CPU each, an S3 server.

    python -m cluster.local           a prompt: run, add, drain and kill machines while a run goes on; `help` lists all
    python -m cluster.local --tour    all of it by itself, and the same run undisturbed to compare with

Machines are Ray daemons of their own, runs are real jobs, and everything is gone when the prompt ends. Dashboard and S3
server are on loopback. Ray's daemons listen on all of this machine's addresses, which Ray does not let one change, and
refuse whoever does not have the token, which is made for the occasion.
"""

from __future__ import annotations

import argparse
import cmd
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cluster.daemons import Head, RayNode, S3Folder, StartError, free_port, ray_command
from relora_ray.cli import at_least_0, command
from relora_ray.commands.status import status
from relora_ray.errors import ReloraError, RunFailedError
from relora_ray.runs.metrics import latest, read_kinds
from relora_ray.storage import Storage

ROOT = Path(__file__).parent.parent
BUCKET = "runs"
DASHBOARD_PORT = 8265
NOTICE_S = 60.0
RAY_SAYS = re.compile(r"(\x1b\[\w+)?\d{4}-\d\d-\d\d [\d:,]+\s+(INFO|SUCC|ERR)|Running entrypoint|\s*$")

LENGTH = (
    "steps=240 method.warm_start_steps=60 method.merge_every_steps=60 train.eval_every_steps=60 "
    "checkpoint.save_every_steps=30"
)
TOUR = (
    "add m1",
    f"run calm {LENGTH} cluster.workers=1",
    "wait calm end",
    f"run stormy {LENGTH} cluster.workers=3 cluster.min_workers=1",
    "wait stormy 20",
    "add m2",
    "wait stormy workers 2",
    "wait stormy 100",
    "drain m1",
    "wait stormy workers 1",
    "add m3",
    "wait stormy workers 2",
    "wait stormy 180",
    "kill m2",
    "wait stormy end",
    "status stormy",
    "compare calm stormy",
)


class Refused(Exception):
    """A command that cannot be; the text says why."""


class Run:
    """A job, followed by a thread that prints what it says."""

    def __init__(self, name: str, job: str, submit: list[str], env: dict[str, str]) -> None:
        self.name, self.job = name, job
        self.step, self.workers = 0, 0
        """The last step that it printed, and the workers of its last attempt."""
        self._submit = subprocess.Popen(
            submit,
            env=env,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    @property
    def goes_on(self) -> bool:
        return self._thread.is_alive()

    def wait(self, reached: Callable[[], bool] = lambda: False) -> None:
        """Until then, or until it ends."""
        while self.goes_on and not reached():
            time.sleep(0.2)

    def _follow(self) -> None:
        assert self._submit.stdout is not None
        for line in self._submit.stdout:
            if RAY_SAYS.match(line):
                continue
            print(f"  {self.name} | {line}", end="", flush=True)
            if found := re.match(r"step +(\d+)/", line):
                self.step = int(found[1])
            elif found := re.match(r"attempt .*, (\d+) worker", line):
                self.workers = int(found[1])
        print(f"  {self.name} | its job ended, exit code {self._submit.wait()}", flush=True)


class Playground(cmd.Cmd):
    """Commands over a cluster: each `do_` is one, and its docstring is its help."""

    intro = "Commands: add drain kill machines, run stop wait status compare, quit. `help COMMAND` says more."
    prompt = "> "

    def __init__(self, head: Head, storage_options: dict[str, str], data: Path) -> None:
        """`storage_options`: of the bucket's server; the head's environment has the variables that they name."""
        super().__init__()
        self._head, self._storage_options, self._data = head, storage_options, data
        self._machines: dict[str, RayNode] = {}
        self._runs: dict[str, Run] = {}

    def onecmd(self, line: str) -> bool:
        try:
            return bool(super().onecmd(line))
        except (Refused, ReloraError, StartError) as error:
            print(error)
        except KeyboardInterrupt:
            print("interrupted; `quit` ends everything")
        return False

    def emptyline(self) -> bool:
        return False

    def default(self, line: str) -> bool | None:  # type: ignore[override]
        if line == "EOF":
            return True
        raise Refused(f"there is no command {line.split()[0]!r}. {self.intro}")

    def do_quit(self, _: str) -> bool:
        """quit: kill everything; what runs have stored goes too."""
        return True

    def do_add(self, name: str) -> None:
        """add [NAME]: a machine of one CPU joins."""
        name = name or next(f"m{n}" for n in range(1, 1000) if f"m{n}" not in self._machines)
        if not re.fullmatch(r"\w+", name) or name in self._machines:
            raise Refused(f"{name!r} is in use, was in use, or is not a word: take another name")
        self._machines[name] = self._head.add(name)
        print(f"{name} has joined")

    def do_drain(self, arguments: str) -> None:
        """drain NAME [SECONDS]: give notice, as a cloud does, that it will be taken away in so many seconds (60)."""
        from relora_ray.runtime.notice import drain, nodes_of

        name, _, seconds = arguments.partition(" ")
        machine = self._machine(name)
        try:
            notice_s = float(seconds or NOTICE_S)
        except ValueError:
            raise Refused(f"{seconds!r} is no number of seconds") from None
        for node_id in nodes_of(self._head.address, name=name):
            drain(self._head.address, node_id, time.time() + notice_s, "a notice of the playground's")
        taken_away = threading.Timer(notice_s, machine.kill)
        taken_away.daemon = True
        taken_away.start()
        print(f"{name} will be taken away in {notice_s:.0f} s, and has been told")

    def do_kill(self, name: str) -> None:
        """kill NAME: SIGKILL everything on that machine, without a word before."""
        self._machine(name).kill()
        print(f"{name} is gone")

    def do_machines(self, _: str) -> None:
        """machines: those that are there."""
        print(" ".join(name for name, machine in self._machines.items() if machine.is_alive) or "none: `add` one")

    def do_run(self, arguments: str) -> None:
        """run NAME [key=value ...]: submit the quickstart under this name; again, and it goes on where it was."""
        name, *overrides = arguments.split() or [""]
        if not re.fullmatch(r"[\w-]+", name):
            raise Refused(f"{name!r} is no name for a run: letters, digits, - and _")
        if name in self._runs and self._runs[name].goes_on:
            raise Refused(f"run {name} goes on already: stop it, or take another name")
        job = f"{name}-{time.time_ns()}"
        submit = [
            *ray_command("job", "submit"), "--address", self._head.dashboard, "--submission-id", job,
            "--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}', "--",
            "python", "-m", "relora_ray.launch", str(ROOT / "configs" / "quickstart.yaml"), f"name={name}",
            f"storage=s3://{BUCKET}", f"storage_options={json.dumps(self._storage_options)}", f"data.path={self._data}",
            "cluster.workers=4", "cluster.min_workers=1", *overrides,
        ]  # fmt: skip
        self._runs[name] = Run(name, job, submit, self._head.env)

    def do_stop(self, name: str) -> None:
        """stop NAME: `ray job stop`; the run stores its state first."""
        run = self._run(name)
        command = [*ray_command("job", "stop"), "--address", self._head.dashboard, run.job]
        done = subprocess.run(command, env=self._head.env, capture_output=True, text=True)
        if done.returncode:
            raise Refused(done.stderr.strip())
        run.wait()

    def do_wait(self, arguments: str) -> None:
        """wait NAME STEP | wait NAME workers N | wait NAME end: until the run is so far (Ctrl-C: no longer)."""
        name, *until = arguments.split() or [""]
        run = self._run(name)
        match until:
            case ["end"]:
                run.wait()
                return
            case ["workers", count] if count.isdigit():
                reached = lambda: run.workers == int(count)  # noqa: E731
            case [step] if step.isdigit():
                reached = lambda: run.step >= int(step)  # noqa: E731
            case _:
                raise Refused(self.do_wait.__doc__)
        run.wait(reached)
        if not reached():
            raise Refused(f"run {name} ended before")

    def do_status(self, name: str) -> None:
        """status NAME: what `python -m relora_ray.status` says of it."""
        self._run(name)
        print("\n".join(status(self._stored(name), time.time())))

    def do_compare(self, arguments: str) -> None:
        """compare NAME NAME: the losses of two runs, step by step."""
        names = arguments.split()
        if len(names) != 2:
            raise Refused(self.do_compare.__doc__ or "")
        print("\n".join(compare([(name, self._stored(self._run(name).name)) for name in names])))

    def _machine(self, name: str) -> RayNode:
        if name not in self._machines or not self._machines[name].is_alive:
            raise Refused(f"there is no machine {name!r}: `machines` lists them")
        return self._machines[name]

    def _run(self, name: str) -> Run:
        if name not in self._runs:
            raise Refused(f"there is no run {name!r}; there is: {' '.join(self._runs) or 'none'}")
        return self._runs[name]

    def _stored(self, name: str) -> Storage:
        return Storage(f"s3://{BUCKET}/{name}", self._storage_options)

    def close(self) -> None:
        for machine in self._machines.values():
            machine.kill()


def compare(runs: list[tuple[str, Storage]], every: int = 20) -> Iterator[str]:
    """A table of two runs' training losses and workers at every 20th step, and the largest difference of all steps."""
    losses, workers = [], []
    for _, run in runs:
        records = read_kinds(run)
        losses.append({r["step"]: r["loss"] for r in latest(records["train"])})
        workers.append([(a["step"], a["world_size"]) for a in records["attempt"]])
    both = sorted(losses[0].keys() & losses[1].keys())
    if not both:
        raise Refused("there is no step that both have done")
    yield f"{'step':>6}" + "".join(f"{name + ' (workers)':>24}" for name, _ in runs)
    for step in both:
        if step % every == 0:
            counts = [[size for begin, size in attempts if begin < step][-1] for attempts in workers]
            yield f"{step:>6}" + "".join(f"{x[step]:>20.6f} ({n})" for x, n in zip(losses, counts, strict=True))
    largest = max(abs(losses[0][s] - losses[1][s]) / losses[0][s] for s in both)
    yield f"{len(both)} steps; largest relative difference of two losses: {largest:.1e}"


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tour", action="store_true", help="five minutes of commands by itself, and then no prompt")
    parser.add_argument("--machines", type=at_least_0, default=2, help="of one CPU, to begin with (with --tour: none)")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "quickstart", help="prepared text, for all runs")
    args = parser.parse_args(argv)
    if not (args.data / "index.json").exists():
        print(f"there is no data in {args.data}: `make data/quickstart/index.json` prepares it", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        play(args)
    except StartError as error:
        raise RunFailedError(str(error)) from error
    return 0


def play(args: argparse.Namespace) -> None:
    """Start everything, carry out commands, and end everything. StartError if something does not come up."""
    # In this process too: it reads what runs store, and gives notices to Ray, which looks for its token when imported.
    os.environ |= {"PLAYGROUND_KEY": secrets.token_hex(8), "PLAYGROUND_SECRET": secrets.token_hex(16)}
    head = Head(0, env={"RAY_AUTH_MODE": "token"}, dashboard_port=_port())
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(head.stop)
        token = head.folder / "auth_token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        head.env |= {"RAY_AUTH_TOKEN_PATH": str(token)}
        store = S3Folder(head.folder / "s3", os.environ["PLAYGROUND_KEY"], os.environ["PLAYGROUND_SECRET"])
        (head.folder / "s3" / BUCKET).mkdir(parents=True)
        store.start()
        at_the_end.callback(store.kill)
        head.start()
        options = {"endpoint_url": store.endpoint, "key": "$PLAYGROUND_KEY", "secret": "$PLAYGROUND_SECRET"}
        playground = Playground(head, options, args.data.resolve())
        at_the_end.callback(playground.close)
        print(f"dashboard {head.dashboard}, which asks for the token in {token}; for `ray` in another shell:")
        print(f"export RAY_ADDRESS={head.dashboard} RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token}")
        if args.tour:
            for command in TOUR:
                print(f"{playground.prompt}{command}", flush=True)
                playground.onecmd(command)
        else:
            for _ in range(args.machines):
                playground.do_add("")
            playground.cmdloop()


def _port() -> int:
    """The dashboard's usual one, if nobody has it."""
    with socket.socket() as wanted:
        wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            wanted.bind(("127.0.0.1", DASHBOARD_PORT))
        except OSError:
            return free_port()
    return DASHBOARD_PORT


if __name__ == "__main__":
    sys.exit(main())
