"""A real, persistent, authenticated S3 server for tests: Ceph's RADOS Gateway, from the Debian packages.

One monitor, one OSD on a sparse file and one gateway, all plain children of this process on 127.0.0.1. There is no
manager daemon (nothing here needs it, and it is the slowest to start), so `ceph -s` and `ceph pg` do not answer.
"""

from __future__ import annotations

import atexit
import fcntl
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGES = ("radosgw", "ceph-mon", "ceph-osd", "ceph-common", "ceph-base")
BINARIES = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph")
# Made beforehand, as the gateway makes these only during the first requests, which then take seconds.
DATA_POOLS = ("default.rgw.buckets.index", "default.rgw.buckets.data", "default.rgw.buckets.non-ec")
# The test run's settings must not reach the daemons: PYTHONPATH breaks `ceph`, and CEPH_ARGS overrides our file.
ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"}

CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
keyring = {folder}/keyring
log file = {folder}/$name.log
crash dir = {folder}
run dir = {folder}
admin socket =
pid file =
# A daemon's default, impossible without cephx: the gateway would try for ever.
ms mon client mode = crc
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0

[mon]
mon data = {folder}/mon
mon cluster log file = {folder}/cluster.log
mon allow pool size one = true
mon warn on pool no redundancy = false
# By default the monitor stops when the file system is 95 % full, as a developer's disk may well be.
mon data avail crit = 0
mon data avail warn = 0
# By default each change of a map waits up to a second, and every pool needs several.
paxos propose interval = 0.05
paxos min wait = 0.01

[osd]
osd data = {folder}/osd
osd objectstore = bluestore
debug rocksdb = 1/5
# Without a socket `ceph tell` hangs. It is relative to the working folder, as a socket's path must be shorter than 108
# characters and pytest's folders can be longer.
admin socket = osd.asok
chdir =
bluestore block size = {size}
osd memory target = 939524096
bluestore cache autotune = false
bluestore cache size = 67108864
# How long a killed gateway counts as a listener, for whom the next one's first new bucket waits: by default 30 s.
osd client watch timeout = 3

[client.rgw]
rgw data = {folder}/rgw
# Without nodelay each small answer with a body takes 40 ms more.
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw enable apis = s3
rgw thread pool size = 32
# Listeners report at this interval, by default 5 s, which must be shorter than the OSD's timeout for them.
objecter tick interval = 1
rgw rados pool pg num min = 1
rgw run sync thread = false
rgw dynamic resharding = false
# Deleted data is kept for two hours by default, which would fill the small OSD.
rgw gc obj min wait = 60
rgw gc processor period = 60
"""


class CephError(RuntimeError):
    """The cluster did not come up; the message has the end of the log of what failed."""


class Ceph:
    """One cluster in one folder; the OSD needs O_DIRECT there, which tmpfs has since Linux 6.6."""

    key = "TESTCEPHACCESSKEY000"
    secret = "test/ceph+secret0000000000000000000000000"
    size = 4 << 30  # of the OSD's sparse file, in bytes

    def __init__(self, folder: Path) -> None:
        """Take the folder, empty or with the cluster of an earlier object; nothing is started or written yet."""
        self.folder = folder.resolve()
        self.conf = self.folder / "ceph.conf"
        self._made = self.folder / "made.json"  # written last, so a first start that failed is begun anew
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._deadline = 0.0  # of the start in progress
        self._ids = json.loads(self._made.read_text()) if self._made.exists() else {}
        if not self._ids:
            mon_port, port = _free_ports(2)
            self._ids = {"fsid": str(uuid.uuid4()), "osd": str(uuid.uuid4()), "mon_port": mon_port, "port": port}
        self.endpoint = f"http://127.0.0.1:{self._ids['port']}"

    def start(self, timeout: float = 120) -> None:
        """Make the cluster on the first call, later restart whatever does not run; return when the gateway answers."""
        atexit.unregister(self.kill)
        atexit.register(self.kill)  # a test run that ends badly must leave no daemons
        self._deadline = time.monotonic() + timeout
        new = not self._made.exists()
        try:
            if new:
                self._make()
            if not self._runs("mon"):
                self._spawn("mon", "ceph-mon", "-i", "a")
            if not self._runs("osd"):
                self._start_osd(new)
            if new:
                self._make_user()
                self._made.write_text(json.dumps(self._ids))
            if not self._runs("rgw"):
                self._spawn("rgw", "radosgw", "-n", "client.rgw")
                self._wait(self._answers)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL all at once, as a power cut would (less the loss of what the kernel holds)."""
        self._kill("rgw", "osd", "mon")

    def kill_gateway(self) -> None:
        """SIGKILL the gateway only."""
        self._kill("rgw")

    def stop(self) -> None:
        """End all. As nothing in the folder needs a clean end, this is `kill`."""
        self.kill()
        atexit.unregister(self.kill)

    def _make(self) -> None:
        for name in ("mon", "osd", "rgw"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        self.conf.write_text(CONF.format(folder=self.folder, size=self.size, **self._ids))
        self._run("ceph-mon", "--mkfs", "-i", "a", "--public-addr", f"v2:127.0.0.1:{self._ids['mon_port']}")

    def _start_osd(self, new: bool) -> None:
        if new:
            self._ceph(f"osd new {self._ids['osd']}")
            self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", self._ids["osd"])
        # The monitor calls a killed OSD "up" until the next one reports: only a later epoch says that this one is up.
        before = self._map()["osds"][0]["up_from"]
        self._spawn("osd", "ceph-osd", "-i", "0")
        self._wait(lambda: self._map()["osds"][0]["up_from"] > before)
        if new:
            for pool in DATA_POOLS:
                self._ceph(f"osd pool create {pool}")
        self._wait(self._pgs_clean)

    def _map(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._ceph("osd dump -f json"))
        return found

    def _pgs_clean(self) -> bool:
        """Whether all placement groups take writes, asked of the OSD itself, as `ceph pg` is the manager's."""
        pgs = json.loads(self._ceph("tell osd.0 dump_pgstate_history -f json"))["pgs"]
        clean: int = sum(pg["currently"].endswith("Active/Clean") for pg in pgs)
        return clean == len(pgs) == sum(int(pool["pg_num"]) for pool in self._map()["pools"])

    def _make_user(self) -> None:
        self._run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid", "test", "--display-name", "test",
                  "--access-key", self.key, "--secret-key", self.secret)  # fmt: skip

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._ids["port"], timeout=10)
        try:
            connection.request("GET", "/")
            response = connection.getresponse()
            response.read()
            return response.status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _ceph(self, command: str) -> str:
        """What `ceph` says to the command, which is tried again until it works: none does while a daemon starts."""
        said = ""

        def works() -> bool:
            nonlocal said
            try:
                said = self._run("ceph", "--connect-timeout", "5", *command.split(), timeout=15)
            except CephError as error:
                said = str(error)
                return False
            return True

        self._wait(works, lambda: said)
        return said

    def _run(self, program: str, *args: str, timeout: float = 60) -> str:
        command = [program, "-c", str(self.conf), *args]
        try:
            done = subprocess.run(command, env=ENV, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True,
                                  text=True, errors="replace", timeout=timeout)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CephError(f"{' '.join(command)}: not done after {timeout} s") from None
        if done.returncode:
            raise CephError(f"{' '.join(command)}: {done.returncode}: {done.stderr.strip()[-1000:]}")
        return done.stdout

    def _spawn(self, name: str, program: str, *args: str) -> None:
        with (self.folder / f"{name}.out").open("wb") as out:
            self._processes[name] = subprocess.Popen([program, "-c", str(self.conf), "-f", *args], env=ENV,
                cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out)  # fmt: skip

    def _runs(self, name: str) -> bool:
        return name in self._processes and self._processes[name].poll() is None

    def _kill(self, *names: str) -> None:
        processes = [self._processes.pop(name) for name in names if name in self._processes]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()

    def _wait(self, done: Callable[[], bool], why: Callable[[], str] = str) -> None:
        """Poll until done, but no longer than the daemons live and the time lasts; `why` tells what is not done."""
        while not done():
            ended = [name for name in self._processes if not self._runs(name)]
            if ended or time.monotonic() > self._deadline:
                outs = [f"{path.name}: {path.read_text(errors='replace')[-500:]}" for path in self.folder.glob("*.out")]
                what = f"{' and '.join(ended)} ended" if ended else "not ready in time"
                raise CephError("\n".join([f"{what}; the logs are in {self.folder}", why(), *outs]))
            time.sleep(0.2)  # most checks run `ceph`, 0.2 s of a core that the daemon could use


def installed() -> bool:
    """Whether the binaries are there."""
    return all(shutil.which(binary, path=ENV["PATH"]) for binary in BINARIES)


def install() -> str:
    """Install the packages with apt-get; return "" or why that was not possible. One process at a time does it."""
    with open(Path(tempfile.gettempdir(), "install-ceph.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return "" if installed() else _install()


def _install() -> str:
    """What takes long, the download, is a step of its own: there a time limit can kill apt-get without harm to dpkg."""
    if not shutil.which("apt-get", path=ENV["PATH"]):
        return "no apt-get"
    if os.geteuid() != 0:
        return "not root"
    # apt-get may need the proxy settings of the caller, so it gets the caller's whole environment.
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    get = ["apt-get", "-q", "-y", "-o", "DPkg::Lock::Timeout=60", "-o", "Acquire::http::Timeout=20"]
    add = [*get, "install", "--no-install-recommends"]
    for command in ([*get, "update"], [*add, "--download-only", *PACKAGES], [*add, "--no-download", *PACKAGES]):
        try:
            done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True, errors="replace", timeout=300)  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{' '.join(command)}: not done after 300 s"
        # `update` may fail for one source of many: what counts is whether the packages can be had.
        if done.returncode and "update" not in command:
            return f"{' '.join(command)}: {done.stdout.strip()[-500:]}"
    return "" if installed() else "installed, but the binaries are not there"


def _free_ports(count: int) -> list[int]:
    """Free ports below those that the kernel gives to outgoing connections.

    A port from bind(0) could be some connection's own port by the time the daemon is restarted, even that of a client
    that tries to reach the dead server: Linux lets it connect to itself.
    """
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found
