"""A SLURM cluster of four nodes on this machine: Debian's slurmctld, slurmd and munge, and a namespace for each node.

A node has its own network, host name, process numbers, /dev/shm and /tmp/ray, so that jobs find each other by name as
on a real cluster, and so that a node can crash: one SIGKILL takes all that runs on it. Starting takes two seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "munged", "ip", "nsenter", "unshare", "setpriv")
NODES = ("node1", "node2", "node3", "node4")
CPUS = 4

GRACE_S = 40
"""Seconds between a preemption's signal and the end of the job; long enough for ranks that are slow on purpose."""


def unavailable() -> str | None:
    """Why there can be no cluster on this machine; ``None`` where there can."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]:
        return f"SLURM is not installed (no {', '.join(missing)}): apt-get install slurmctld slurmd munge iproute2"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    if os.getuid() != 0 or tried.returncode != 0:
        return "the SLURM cluster of the tests needs root, and leave to make namespaces"
    return None


def until(condition: Callable[[], object], *, seconds: float, what: str) -> None:
    """Wait for ``condition``; ``AssertionError`` with ``what`` after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


@final
class Cluster:
    """Started by ``with``; what it started is ended by process number when the block ends.

    Nodes 1 and 2 are the partition ``debug``, where nothing but jobs happens. Nodes 3 and 4 are ``high`` and ``low``,
    of which the first preempts the second with a grace time; they are those that crash. No accounting.
    """

    def __init__(self) -> None:
        # Sockets lie in it, whose paths may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="qslurm", dir="/tmp"))
        self._conf = self.folder / "slurm.conf"
        self._number = 0
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in list(self._nodes):
            self.crash(node)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if self._number:
            for i, _ in enumerate(NODES, start=1):
                # A namespace goes some time after its last process, and its end of the cable with it.
                subprocess.run(["ip", "link", "del", self._cable(i)], capture_output=True)
                subprocess.run(["ip", "netns", "del", self._netns(i)], capture_output=True)
            subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what a test does with it

    def run(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Output of a command that sees this cluster and no other; ``AssertionError`` if it fails."""
        done = subprocess.run(
            command, cwd=cwd, env={**self.environment(), **(env or {})}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def environment(self) -> dict[str, str]:
        """The environment of whoever submits here."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return {**inherited, "PATH": _path(), "SLURM_CONF": str(self._conf)}

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """``sbatch arguments``; the job's number."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env)

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says, by its keys."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.job(job)["JobState"]

    def restarts(self, job: str) -> int:
        """How often SLURM has started the job anew."""
        return int(self.job(job)["Restarts"])

    def wait(self, job: str, *states: str, seconds: float = 150) -> None:
        """Until the job is in one of ``states`` (COMPLETED)."""
        wanted = states or ("COMPLETED",)
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def there() -> bool:
            state = self.state(job)
            assert state in wanted or state not in ended, f"job {job} is {state}, not {' or '.join(wanted)}"
            return state in wanted

        until(there, seconds=seconds, what=f"job {job} to be {' or '.join(wanted)}")

    def crash(self, node: str) -> None:
        """Kill all that runs on ``node`` at once; nothing on it can say goodbye."""
        inside = self._nodes.pop(node)
        inside.kill()
        inside.wait()

    def up(self, node: str) -> None:
        """Start ``node``, or start it again after a crash."""
        i = NODES.index(node) + 1
        log = self.folder / f"log/{node}.start"
        inside = f"""
            hostname {node}
            mount --bind {self.folder}/hosts /etc/hosts
            mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf
            mount -t tmpfs shm /dev/shm
            mkdir -p /tmp/ray
            mount -t tmpfs ray /tmp/ray
            exec slurmd -D -N {node} -f {self._conf}
        """
        # The first process of the new PID namespace is unshare's child; with unshare goes the whole namespace.
        enter = ["nsenter", f"--net=/run/netns/{self._netns(i)}"]
        isolate = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._nodes[node] = self._daemon(*enter, *isolate, "bash", "-ec", inside, log=log)

    def ranks(self, job: str, node: str) -> list[int]:
        """Numbers, as this machine counts, of the job's trainings on ``node``; not of their loader workers."""
        parents = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                environ = (folder / "environ").read_bytes().split(b"\0")
                wanted = {f"SLURM_JOB_ID={job}", f"SLURMD_NODENAME={node}", f"SLURM_CONF={self._conf}"}
                is_training = b"-m\0qtrain\0" in (folder / "cmdline").read_bytes()
                if is_training and {text.encode() for text in wanted} <= set(environ):
                    parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        return [pid for pid, parent in parents.items() if parent not in parents]

    # ---- how it comes up

    @property
    def _bridge(self) -> str:
        return f"qs{self._number}br"

    def _netns(self, node: int) -> str:
        return f"qs{self._number}n{node}"

    def _cable(self, node: int) -> str:
        return f"qs{self._number}v{node}"

    def _daemon(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        # It ends with this process, should that be killed.
        command = ("setpriv", "--pdeathsig=KILL", *command)
        with log.open("ab") as file:
            return subprocess.Popen(
                command, env=self.environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip

    def _start(self) -> None:
        for name in ("state", "spool", "run", "log"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        self._network()
        self._configure()
        self._munge()
        log = (self.folder / "log/slurmctld.start").open("ab")
        with log:
            self._daemons.append(
                subprocess.Popen(
                    ["slurmctld", "-D", "-f", str(self._conf)],
                    env=self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip
        for node in NODES:
            self.up(node)
        try:
            until(self._idle, seconds=60, what="the nodes to be idle")
        except AssertionError as error:
            logs = [path.read_text(errors="replace")[-2000:] for path in sorted((self.folder / "log").iterdir())]
            raise AssertionError("\n".join([str(error), *logs])) from error

    def _idle(self) -> bool:
        command = ["sinfo", "--noheader", "--Node", "--partition=debug,high", "--states=idle", "--format=%N"]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True)
        return sorted(done.stdout.split()) == sorted(NODES)

    def _network(self) -> None:
        # The first number that no other cluster of tests on this machine has.
        for number in range(1, 200):
            made = subprocess.run(["ip", "link", "add", f"qs{number}br", "type", "bridge"], capture_output=True)
            if made.returncode == 0:
                self._number = number
                break
        assert self._number, made.stderr.decode()
        self.run("ip", "address", "add", f"{self._address(254)}/24", "dev", self._bridge)
        self.run("ip", "link", "set", self._bridge, "up")
        for i, _ in enumerate(NODES, start=1):
            space, outside = self._netns(i), self._cable(i)
            self.run("ip", "netns", "add", space)
            self.run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            self.run("ip", "link", "set", outside, "master", self._bridge, "up")
            self.run("ip", "-n", space, "address", "add", f"{self._address(i)}/24", "dev", "eth0")
            self.run("ip", "-n", space, "link", "set", "lo", "up")
            self.run("ip", "-n", space, "link", "set", "eth0", "up")

    def _address(self, last: int) -> str:
        return f"10.89.{self._number}.{last}"

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        run, log = self.folder / "run", self.folder / "log/munged.log"
        files = [f"--key-file={key}", f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"]
        options = [*files, f"--log-file={log}", f"--seed-file={run}/munge.seed"]
        self._daemons.append(self._daemon("munged", "--foreground", *options, log=self.folder / "log/munged.start"))
        until((run / "munge.sock").exists, seconds=20, what="munge")

    def _configure(self) -> None:
        me = socket.gethostname().split(".")[0]
        folder, control = self.folder, self._address(254)
        names = [(control, me), *((self._address(i), node) for i, node in enumerate(NODES, start=1))]
        hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in names)]
        (folder / "hosts").write_text("\n".join(hosts) + "\n")
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        nodes = [
            f"NodeName={node} NodeAddr={self._address(i)} Port=26818 CPUs={CPUS} Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=8000"
            for i, node in enumerate(NODES, start=1)
        ]
        partitions = [
            "PartitionName=debug Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PreemptMode=OFF",
            "PartitionName=high Nodes=node[3-4] MaxTime=INFINITE State=UP PriorityTier=10",
            f"PartitionName=low Nodes=node[3-4] MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={GRACE_S}",
        ]
        # cred_expire also says how long a requeued job has to wait: 120 s if nothing is said, and 5 s is the least.
        options = f"""
            ClusterName=qtrain
            SlurmctldHost={me}({control})
            SlurmctldPort={26800 + self._number}
            SlurmUser=root
            SlurmdUser=root
            AuthType=auth/munge
            CredType=cred/munge
            AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool/%n
            SlurmctldPidFile={folder}/run/slurmctld.pid
            SlurmdPidFile={folder}/run/slurmd.%n.pid
            SlurmctldLogFile={folder}/log/slurmctld.log
            SlurmdLogFile={folder}/log/slurmd.%n.log
            MailProg=/bin/true
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            MpiDefault=none
            JobAcctGatherType=jobacct_gather/none
            AccountingStorageType=accounting_storage/none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_Core
            SchedulerType=sched/backfill
            SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
            PreemptType=preempt/partition_prio
            PreemptMode=REQUEUE
            ReturnToService=2
            SlurmctldTimeout=30
            SlurmdTimeout=15
            InactiveLimit=0
            KillWait=10
            MinJobAge=3600
            JobRequeue=1
            PropagateResourceLimits=NONE
            SlurmdParameters=config_overrides
        """
        lines = [line.strip() for line in options.strip().splitlines()]
        self._conf.write_text("\n".join([*lines, *nodes, *partitions]) + "\n")
