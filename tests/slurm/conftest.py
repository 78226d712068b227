"""A real Slurm on this machine: one controller and four virtual nodes, without cgroups, as Debian packages it.

Four nodes of one core each, whatever the machine has: what is tested is what Slurm does with jobs,
not how fast they are. Timeouts are short, so that a dead node is noticed in seconds. Jobs of the
partition "urgent" preempt those of "main"; "apart" has one node only.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "srun")
NODES = ("n1", "n2", "n3", "n4")
CONFIG = """
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_min_interval=200000,batch_sched_delay=1,bf_interval=2
MaxArraySize={max_array}
MaxJobCount=20000
ReturnToService=2
SlurmdTimeout=8
InactiveLimit=0
KillWait=4
MinJobAge=60
OverTimeLimit=0
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 RealMemory=4000
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=n[1-4] MaxTime=30 PriorityTier=2 State=UP
PartitionName=apart Nodes=n4 MaxTime=INFINITE PriorityTier=1 State=UP
"""


class Cluster:
    """The daemons, and commands that speak with them."""

    def __init__(self, folder: Path, max_array: int = 1001) -> None:
        self.folder = folder
        self.processes = {}
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname()
        text = CONFIG.format(
            folder=folder, host=host, port=ports[0], first=ports[1], last=ports[-1], max_array=max_array
        )
        (folder / "state").mkdir(parents=True)
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        os.chmod(self.folder / "munge.key", 0o400)
        os.chmod(self.folder, 0o755)
        places = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{key}={self.folder}/munge.{name}" for key, name in places.items()]
        self._launch("munged", ["munged", "--foreground", "--force", *files])
        _until(lambda: (self.folder / "munge.socket").exists(), 60, "munged")
        self._launch("slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self.start_node(node)
        _until(lambda: self.run("sinfo", "-h", "-o", "%t").split() == ["idle"], 180, "the nodes")

    def start_node(self, node: str, *, without: Path | None = None) -> None:
        """Start a node's daemon; ``without`` is a folder in whose place this node sees an empty one."""
        command = ["slurmd", "-D", "-N", node]
        if without is not None:
            hide = f"mount -t tmpfs -o size=1m,mode=755 tmpfs {without} && exec {' '.join(command)}"
            command = ["unshare", "--mount", "bash", "-c", hide]
        self._launch(node, command)

    def kill_node(self, node: str) -> None:
        """As a crash would: the daemon and every job on the node, with nothing said to the controller."""
        self.kill_daemon(node)
        for pid in _jobs_on(self.folder, node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_daemon(self, node: str) -> None:
        """The node is gone for the controller, but its jobs live on."""
        slurmd = self.processes.pop(node)
        os.killpg(slurmd.pid, signal.SIGKILL)
        slurmd.wait()

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        environment = {**os.environ, **self.environment}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def queue(self) -> dict[str, str]:
        """State of every array element in the queue, by 'job_index'."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def clear(self) -> None:
        """Cancel everything and bring every node back."""
        jobs = sorted({i.partition("_")[0] for i in self.queue()})
        if jobs:
            self.run("scancel", *jobs, check=False)
        for node in NODES:
            if node not in self.processes:
                self.start_node(node)
        self.run("scontrol", "update", "nodename=n[1-4]", "state=resume", check=False)
        _until(lambda: not self.queue(), 180, "cancelled jobs to end")
        _until(lambda: set(self.run("sinfo", "-h", "-o", "%t").split()) == {"idle"}, 180, "the nodes")

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)

    def _launch(self, name: str, command: list[str]) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **self.environment}, start_new_session=True
        )


def _until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.2)


def _free_ports(n: int) -> list[int]:
    """Ports that follow each other, as slurm.conf writes them, below those that systems hand out by themselves."""
    for first in range(26901 + os.getpid() % 500 * 10, 32768 - n, 10):
        sockets = []
        try:
            for port in range(first, first + n):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return list(range(first, first + n))
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise AssertionError("no free ports")


def _jobs_on(folder: Path, node: str) -> list[int]:
    """The processes of the jobs on one node, the daemons that watch over them first."""
    import psutil

    jobs, watchers = [], []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            ours = environment.get("SLURM_CONF") == str(folder / "slurm.conf")
            if ours and environment.get("SLURMD_NODENAME") == node:
                jobs.append(process.pid)
                parent = process.parent()
                if parent is not None and parent.name().startswith("slurmstepd"):
                    watchers.append(parent.pid)
    return [*watchers, *jobs]


def missing() -> str | None:
    """Why there can be no Slurm here; None when there can."""
    lost = [program for program in PROGRAMS if shutil.which(program) is None]
    if lost:
        return f"Slurm is not installed ({', '.join(lost)} not found); as root on Debian: scripts/setup_slurm.sh"
    if os.geteuid() != 0:
        return "the virtual Slurm needs root, since its daemons start jobs as their users"
    return None


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Slurm with four virtual nodes, for the whole session."""
    if reason := missing():
        pytest.skip(reason)
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture
def slurm(cluster, monkeypatch):
    """The cluster, empty, with the commands of this test speaking to it."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    for name in [n for n in os.environ if n.startswith("SLURM_") and n != "SLURM_CONF"]:
        monkeypatch.delenv(name)  # of a job these tests themselves may run in
    cluster.clear()
    yield cluster
    cluster.clear()


@pytest.fixture(scope="session")
def python() -> str:
    return sys.executable
