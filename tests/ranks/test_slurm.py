"""Under a real SLURM: srun's tasks are ranks, and a job that is signalled requeues and ends as if nothing had happened.

Also `deepspeed --hostfile`, for machines without SLURM: two launchers stand for two machines.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm_cluster import SlurmCluster, free_ports, why_not
from tests.tiny import tiny_overrides
from toolkit.ranks import slurm
from toolkit.run.monitor import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SBATCH = ROOT / "recipes" / "slurm" / "distil.sbatch"
STEPS = 60
MEASURED = {"tokens_per_s", "seconds", "peak_rss_gib", "peak_device_gib"}  # what differs between any two runs
ON_LOOPBACK = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}

pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster():
    reason = why_not()
    if reason:
        pytest.skip(f"no SLURM here: {reason}")
    with SlurmCluster(nodes=2) as running:
        yield running


def settings(tiny, folder, name, steps=STEPS):
    """Rollouts, replay and Adam's state included: all that a resume has to bring back."""
    return tiny_overrides(
        tiny, name=name, output_dir=str(folder), student__drop_layers=[], train__steps=steps, optimizer__name="adamw",
        optimizer__lr=1e-3, optimizer__warmup_steps=1, optimizer__max_grad_norm=1, schedule__policy="adaptive",
        schedule__phi_initial=0.5, validation__every_steps=20, validation__scored_rows=2, validation__samples=1,
        resume="auto",
    )  # fmt: skip


def outcome(run_dir):
    """(all metrics that a run computes, the exported weights)"""
    records = [{k: v for k, v in record.items() if k not in MEASURED} for record in read_metrics(run_dir)]
    return records, (run_dir / "student" / "model.safetensors").read_bytes()


def test_a_signalled_job_requeues_and_ends_like_an_undisturbed_run(cluster, tiny, tmp_path):
    # Undisturbed, and as typed by hand: no sbatch, so that the toolkit finds ranks and address by itself.
    cluster.command(
        "srun", "--nodes=2", "--ntasks=2", f"--chdir={ROOT}", "python", "recipes/quickstart.py",
        *settings(tiny, tmp_path, "undisturbed"), timeout_s=400, **ON_LOOPBACK,
    )  # fmt: skip
    expected = outcome(tmp_path / "undisturbed")
    assert [record["step"] for record in expected[0]] == list(range(1, STEPS + 1))

    run_dir, log = tmp_path / "disturbed", tmp_path / "job.log"
    script = tmp_path / "edited.sbatch"
    script.write_text(edited(SBATCH.read_text(), settings(tiny, tmp_path, "disturbed")))
    submitted_s = time.monotonic()
    told = cluster.command("sbatch", f"--chdir={ROOT}", f"--output={log}", str(script), **ON_LOOPBACK)
    job = re.search(r"\d+", told)[0]

    def state_is(*states):
        record = cluster.job(job)
        assert record["JobState"] not in {"FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"}, f"{record}\n{log.read_text()}"
        return record if record["JobState"] in states else None

    def steps_done():
        state_is()
        return (run_dir / "metrics.jsonl").is_file() and len(read_metrics(run_dir)) >= 5

    def has_said(text):
        state_is()
        return text in log.read_text()

    cluster.wait_for(steps_done, "fifth step of the job", 400)
    print(f"sbatch to step 5: {time.monotonic() - submitted_s:.1f} s")
    signalled_s = time.monotonic()
    cluster.command("scancel", "--signal=USR1", job)
    for said, what in (
        ("exit code 75\n", "its exit with 75, checkpoint written"),
        (f"job {job}, start 2:", "its second start"),
        ("goes on from", "the checkpoint read"),
    ):
        cluster.wait_for(lambda said=said: has_said(said), what, 400)
        print(f"SIGUSR1 to {what}: {time.monotonic() - signalled_s:.1f} s")
    record = cluster.wait_for(lambda: state_is("COMPLETED"), "end of the job", 400)

    text = log.read_text()  # of both starts: it was appended to
    assert record["Restarts"] == "1", text
    assert f"job {job}, start 1: 2 ranks on node[1-2], rank 0 at 127.0.0.1:" in text
    assert f"job {job}, start 2: 2 ranks on node[1-2], rank 0 at 127.0.0.1:" in text
    assert re.findall(rf"job {job}, exit code (\d+)", text) == ["75", "0"]
    stopped = int(re.search(rf"stopped by a signal after step (\d+) of {STEPS}", text)[1])
    assert 5 <= stopped < STEPS
    assert f"goes on from {run_dir}/checkpoints/step-{stopped:08d}, written by 2 ranks" in text
    assert text.count(f"step 1/{STEPS} ") == 1, "the second start began anew"
    assert outcome(run_dir) == expected


def edited(text, arguments):
    """The sbatch file after what a user has to do: the four marked lines, and nothing else."""
    lines = text.splitlines()
    marked = {int(match[1]): i for i, line in enumerate(lines) if (match := re.search(r"# EDIT (\d)", line))}
    assert sorted(marked) == [1, 2, 3, 4]
    lines[marked[1]] = "#SBATCH --job-name=test --partition=all"
    lines[marked[2]] = "#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 --mem=0"
    lines[marked[3]] = "#SBATCH --time=01:00:00"
    lines[marked[4]] = f"RUN=(recipes/quickstart.py {shlex.join(arguments)})"
    return "\n".join(lines) + "\n"


NODE_LISTS = ["node1", "node[1-2]", "gpu[003-007,9],login1", "b2,a1", "rack[2-3]-gpu[08-11]", "n[7,9-12],x"]


@pytest.mark.parametrize("nodes", NODE_LISTS)
def test_the_first_node_is_the_one_that_scontrol_names(cluster, nodes):
    assert slurm.first_host(nodes) == cluster.command("scontrol", "show", "hostnames", nodes).split()[0]


def test_tasks_of_each_node_are_counted(cluster):
    script = 'echo "$SLURM_STEP_TASKS_PER_NODE" "$SLURM_NODEID"'
    told = [line.split() for line in cluster.command("srun", "-N2", "-n3", "bash", "-c", script).splitlines()]
    nodes = [int(node) for _, node in told]
    assert {node: slurm.tasks_of_node(counts, int(node)) for counts, node in told} == {"0": 2, "1": 1}, told
    assert sorted(nodes) == [0, 0, 1]
    assert [slurm.tasks_of_node("8(x3),4", node) for node in range(4)] == [8, 8, 8, 4]


def test_more_tasks_than_gpus_are_refused(cluster):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, and the cluster of the tests hides none")
    words = ["srun", "-N1", "-n2", f"--chdir={ROOT}", "python", "recipes/quickstart.py"]
    done = subprocess.run(words, env={**cluster.env, "DS_ACCELERATOR": "cuda"}, capture_output=True, text=True)
    told = r"SLURM started 2 tasks on node node[12], which sees 0 GPUs; ask for one task per GPU"
    assert re.search(told, done.stderr), done.stderr
    assert done.returncode == 2


def test_a_node_without_an_address_is_named(monkeypatch):
    for name, value in {
        "STEP_NUM_TASKS": 2, "JOB_ID": 7, "STEP_ID": 0, "PROCID": 0, "LOCALID": 0, "STEP_NODELIST": "gone[4-5].invalid",
        "NODEID": 0, "STEP_TASKS_PER_NODE": "1(x2)",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    for name in ("MASTER_ADDR", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(ValueError, match=r"gone4\.invalid, the first node of the job step, has no address"):
        slurm.launcher_variables()
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")  # as set by hand
    assert slurm.launcher_variables() == {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "15007",
    }  # fmt: skip
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun --pty bash, and python in it
    assert slurm.launcher_variables() == {}


def test_a_hostfile_of_two_machines(tiny, tmp_path):
    """One launcher on each machine of the hostfile, as docs/slurm.md has it for machines without ssh between them."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("machine-a slots=1\nmachine-b slots=1\n")
    (port,) = free_ports(1)
    env = {**os.environ, **ON_LOOPBACK}
    launchers, logs = [], [tmp_path / f"{number}.log" for number in range(2)]
    try:
        for number in range(2):
            command = [
                "deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number),
                "--master_addr", "127.0.0.1", "--master_port", str(port), "recipes/quickstart.py",
                *settings(tiny, tmp_path, "two_machines", steps=2),
            ]  # fmt: skip
            with logs[number].open("w") as log:
                launchers.append(
                    subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
                )
        codes = [launcher.wait(300) for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    assert "2 ranks" in logs[0].read_text() and "2 ranks" not in logs[1].read_text()
    assert len(read_metrics(tmp_path / "two_machines")) == 2


def test_the_sbatch_file_is_bash_and_says_what_is_wrong(tmp_path):
    text = SBATCH.read_text()
    assert subprocess.run(["bash", "-n", SBATCH]).returncode == 0
    script = tmp_path / "copy.sbatch"
    script.write_text(text)
    env = {**os.environ, "SLURM_SUBMIT_DIR": str(tmp_path)}
    done = subprocess.run(["bash", script], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"no recipe recipes/llama_7b_to_1b.py in {tmp_path}" in done.stderr
