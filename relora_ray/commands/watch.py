"""A run while it runs, or all runs in a folder, from storage alone.

relora-ray watch RUN|FOLDER [--every SECONDS] [--once] [--serve [PORT]]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from relora_ray import cli
from relora_ray.cli import command
from relora_ray.errors import ConfigError, ReloraError
from relora_ray.storage import Storage

if TYPE_CHECKING:
    from relora_ray.study.live import View
    from relora_ray.study.serve import Page

EVERY_S = 2.0
SHORTEST_S = 0.2
PORT = 8400
LOOK_FOR_RUNS_S = 30.0
"""Between two looks for new runs in a folder."""
REPORT, REPORT_S = "/report", 10.0
"""Its path on the server, and after how long it is made anew at the earliest."""
SEGMENTS = {True: 16, False: 1}
"""Objects of the log, of about 3,000 steps each, that are read at first: of one run that is watched, or of each of
several."""

Rows = Sequence[tuple[str, "View | str"]]


class Watch:
    """One run, or all in a folder: who looks at them, and what they saw last."""

    def __init__(self, storage: Storage, peak_flops: float | None = None) -> None:
        """ConfigError if there is no run."""
        from relora_ray.runs.setting import is_run
        from relora_ray.study.live import Live

        self.storage, self._is_run, self._new = storage, is_run, Live
        self.single, self._peak = is_run(storage), peak_flops
        self._lives: dict[str, Live] = {}
        self._seen: dict[str, View] = {}
        self._looked = 0.0
        if self.single:
            self._add("", storage)
        else:
            self._find()
            if not self._lives:
                raise ConfigError(
                    f"{storage.url} is no run, and there is none in it. Give a run's folder, or one with runs."
                )

    def look(self) -> Rows:
        """By name what each run does, or what is wrong with it. A single one that cannot be read now is shown as it was
        last, if it was ever seen: then the second row says what is wrong."""
        if not self.single and time.monotonic() - self._looked > LOOK_FOR_RUNS_S:
            self._find()
        rows: list[tuple[str, View | str]] = []
        for name, live in sorted(self._lives.items()):
            try:
                self._seen[name] = view = live.look()
                rows.append((name or view.name, view))
            except ReloraError as error:
                if self.single and name not in self._seen:
                    raise
                if self.single:
                    rows.append((self._seen[name].name, self._seen[name]))
                rows.append((name, f"not as it is now: {error}"))
        return rows

    def _find(self) -> None:
        self._looked = time.monotonic()
        for name in self.storage.folders(""):
            if name not in self._lives and self._is_run(child := self.storage.child(name)):
                self._add(name, child)

    def _add(self, name: str, storage: Storage) -> None:
        self._lives[name] = self._new(storage, num_segments=SEGMENTS[self.single], peak_flops=self._peak)


def show(watch: Watch, every_s: float, *, once: bool) -> None:
    """In a terminal until Ctrl-C; one frame if there is none."""
    from rich.console import Console
    from rich.live import Live as Screen

    console = Console(highlight=False)
    if once or not console.is_terminal:
        console.print(_drawn(watch, console.width, console.options.ascii_only))
        return
    try:
        if console.is_dumb_terminal:  # one frame below the other
            while True:
                console.print(_drawn(watch, console.width, console.options.ascii_only))
                console.print()
                time.sleep(every_s)
        with Screen(console=console, auto_refresh=False, vertical_overflow="crop") as screen:
            while True:
                screen.update(_drawn(watch, console.width, console.options.ascii_only), refresh=True)
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


def _drawn(watch: Watch, width: int, ascii_only: bool) -> Any:
    from relora_ray.study.screen import frame, table

    rows = watch.look()
    if not watch.single:
        return table(rows, width, ascii_only=ascii_only)
    problem = rows[-1][1] if isinstance(rows[-1][1], str) else ""
    return frame(cast("View", rows[0][1]), width, ascii_only=ascii_only, problem=str(problem))


def serve(watch: Watch, host: str, port: int, every_s: float) -> None:
    """What is seen now, and the report of all that was, as pages until Ctrl-C."""
    from relora_ray.study.serve import Server, is_loopback

    if not is_loopback(host):
        print(
            f"warning: --host {host} lets everybody who reaches this machine see names, places, settings, losses and "
            f"speed of what is watched, without a password and unencrypted. `ssh -L` shows it to you alone.",
            file=sys.stderr,
        )
    with (
        contextlib.suppress(KeyboardInterrupt),  # from before the line that names it
        Server(pages(watch, every_s), host=host, port=port) as server,
    ):
        print(f"watching at {server.url}, until Ctrl-C", flush=True)
        server.serve_forever()


def pages(watch: Watch, every_s: float) -> dict[str, Page]:
    """By path. The report is read whole, for whoever asks for it."""
    from relora_ray.commands.report import html_page
    from relora_ray.study.livepage import page
    from relora_ray.study.serve import Page

    def live() -> str:
        rows = watch.look()
        return page(rows, "a run" if watch.single else f"{len(rows)} runs", report=REPORT)

    return {
        "/": Page(live, every_s=every_s),
        REPORT: Page(lambda: html_page(watch.storage), every_s=REPORT_S, still=True, scripts=True),
    }


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.host is not None and args.serve is None:
        raise ConfigError(f"--host {args.host} has no effect without --serve, the page in a browser. Add it.")
    if args.once and args.serve is not None:
        raise ConfigError("--once and --serve exclude each other: a server stays. Give one of them.")
    watch = Watch(cli.run_of(args), None if args.peak_tflops is None else args.peak_tflops * 1e12)
    if args.serve is None:
        show(watch, args.every, once=args.once)
    else:
        serve(watch, args.host or "127.0.0.1", args.serve, args.every)


def _parser() -> argparse.ArgumentParser:
    parser = cli.run_parser(
        "watch",
        "A run while it runs, or all runs in a folder, from storage alone.",
        "runs/quickstart",
        "runs --every 10",
        "s3://bucket/runs/quickstart --serve",
    )
    parser.add_argument("--every", metavar="SECONDS", type=_interval, default=EVERY_S, help="between two looks; 2")
    parser.add_argument("--once", action="store_true", help="one frame, as where the output is no terminal")
    parser.add_argument(
        "--serve", metavar="PORT", nargs="?", const=PORT, type=_port, help=f"as a page in a browser, at port {PORT}"
    )
    parser.add_argument("--host", help="the address at which to serve it, for others to see; 127.0.0.1, for you alone")
    parser.add_argument(
        "--peak-tflops",
        metavar="N",
        type=cli.above_0,
        help="what a worker's device does at most, if its name does not say it: speed is shown as a share of that",
    )
    return parser


def _interval(text: str) -> float:
    if (value := cli.seconds(text)) < SHORTEST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is less than {SHORTEST_S} seconds")
    return value


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port, 0 to 65535. RUN goes in front of --serve")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
