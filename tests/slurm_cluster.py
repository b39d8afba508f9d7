"""A real SLURM on one machine: munge, a controller and nodes node1, node2, ... with ports and folders of their own.

It runs beside a SLURM that the machine may have: commands reach it through SLURM_CONF alone.
"""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
SEARCH_PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])


def why_not() -> str:
    """Why no cluster can be started here, or ""; installs Debian's packages where root has apt-get."""
    if not missing():
        return ""
    if os.geteuid() or not shutil.which("apt-get"):
        return f"{', '.join(missing())} not found; install slurm-wlm and munge (done here only for root with apt-get)"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]):
        try:
            done = subprocess.run(["apt-get", "-q", *command], env=env, capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return f"apt-get {command[0]} was not done after 300 s"
        if done.returncode:
            return f"apt-get {' '.join(command)} failed: {done.stderr[-500:]}"
    return f"{', '.join(missing())} not found in slurm-wlm and munge" if missing() else ""


def missing() -> list[str]:
    return [name for name in PROGRAMS if not shutil.which(name, path=SEARCH_PATH)]


class SlurmCluster:
    """`with SlurmCluster() as cluster:`; `cluster.env` is what its commands, sbatch and srun need."""

    def __init__(self, nodes: int = 2):
        self.nodes = nodes
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets: their paths have to be short
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SEARCH_PATH}
        for name in [name for name in self.env if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.env[name]  # of a job that runs the tests
        self.daemons: list[subprocess.Popen] = []

    def __enter__(self):
        try:
            self._configure()
            munge = self.folder / "munge"
            self._start(
                "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
                f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
            )  # fmt: skip
            self.wait_for(lambda: (munge / "socket").exists(), "munged's socket", 120)
            self._start("slurmctld", "-D")
            for number in range(1, self.nodes + 1):
                self._start("slurmd", "-D", "-N", f"node{number}")
            self.wait_for(lambda: self.command("sinfo", "-hNo", "%T", check=False).split() == ["idle"] * self.nodes,
                          "idle nodes", 120)  # fmt: skip
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_):
        self.close()

    def command(self, *words: str, check: bool = True, timeout_s: float = 60, **changes) -> str:
        """What `words` print to stdout; AssertionError if they fail."""
        done = subprocess.run(
            words, env={**self.env, **changes}, capture_output=True, text=True, timeout=timeout_s, errors="replace"
        )
        assert not check or done.returncode == 0, (
            f"{words[:3]}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """SLURM's record of a job: JobState, Restarts, ExitCode, ..."""
        words = self.command("scontrol", "show", "job", "-o", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, reached, what: str, timeout_s: float):
        """The first true value of `reached()`."""
        deadline = time.monotonic() + timeout_s
        while not (value := reached()):
            for daemon in self.daemons:
                assert daemon.poll() is None, f"{daemon.args} ended with {daemon.returncode}\n{self._logs()}"
            assert time.monotonic() < deadline, f"no {what} after {timeout_s} s\n{self._logs()}"
            time.sleep(0.1)
        return value

    def close(self):
        """Ends jobs, daemons and whatever a job left behind; removes the folder. Nothing else is touched."""
        if len(self.daemons) > 1:
            with contextlib.suppress(AssertionError, OSError, subprocess.TimeoutExpired):
                jobs = self.command("squeue", "-ho", "%i").split()
                if jobs:
                    self.command("scancel", "--signal=KILL", "--full", *jobs, check=False)
                    self.command("scancel", *jobs)
                    self.wait_for(lambda: not self.command("squeue", "-ho", "%i").split(), "end of jobs", 30)
        for daemon in reversed(self.daemons):  # munged last: the others need it to the end
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, program: str, *arguments: str):
        log = (self.folder / f"{program}{arguments[-1] if program == 'slurmd' else ''}.out").open("ab")
        with log:
            words = [shutil.which(program, path=SEARCH_PATH), *arguments]
            self.daemons.append(subprocess.Popen(words, env=self.env, stdout=log, stderr=log, start_new_session=True))

    def _logs(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in
                         sorted(self.folder.glob("*.out")))  # fmt: skip

    def _configure(self):
        folder, host, user = self.folder, socket.gethostname(), pwd.getpwuid(os.geteuid()).pw_name
        ports = free_ports(1 + self.nodes)
        names = [f"node{number}" for number in range(1, self.nodes + 1)]
        for name in ("munge", "state", *names):
            (folder / name).mkdir(mode=0o700)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        lines = [
            "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={ports[0]}",
            f"SlurmUser={user}", f"SlurmdUser={user}",
            # A requeued job waits for cred_expire (5 s is the least, 120 s the default).
            f"AuthType=auth/munge\nCredType=cred/munge\nAuthInfo=socket={folder}/munge/socket,cred_expire=5",
            f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/%n.pid",
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none",
            "SelectType=select/cons_tres\nSelectTypeParameters=CR_Core\nGresTypes=gpu\nMpiDefault=none",
            "SchedulerParameters=sched_interval=1,sched_min_interval=0\nSlurmdParameters=config_overrides",
            "ReturnToService=2\nKillWait=10\nMailProg=/bin/true",
            # The test's sbatch files take their port from the job's number.
            f"FirstJobId={free_ports(1, below=29900)[0] - 15000}",
            *(f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000 Gres=gpu:1"
              for name, port in zip(names, ports[1:], strict=True)),
            f"PartitionName=all Nodes={','.join(names)} Default=YES State=UP",
        ]  # fmt: skip
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")  # a GPU that SLURM can give to a job
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")


def free_ports(count: int, below: int = 0) -> list[int]:
    """Ports that nothing listens on; `below`: the highest ones under it instead of the kernel's choice."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        candidates = iter(range(below - 1, 15000, -1)) if below else iter(lambda: 0, 1)
        while len(found) < count:
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", next(candidates)))
                found.append(probe.getsockname()[1])
    return found
