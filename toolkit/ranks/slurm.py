"""What SLURM tells a process that srun started, in the variables that torch and deepspeed read."""

import contextlib
import os
import re
import socket
import subprocess


def launcher_variables() -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of this task; empty where srun did not start several.

    The step's variables count, not the job's: a batch script or a shell in an allocation is one process without srun,
    however many tasks the job asked for. Raises ValueError where tasks outnumber GPUs or rank 0's node has no address.
    """
    # A step of one task is a process of its own. Else every task gets a rank and the address of rank 0's node.
    env = os.environ
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return {}
    port = 15000 + (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 15000  # below the ports kernels hand out
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": str(_local_rank()),
        "LOCAL_WORLD_SIZE": str(_tasks_here()),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _address(first_host(env["SLURM_STEP_NODELIST"])),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
    }


def first_host(node_list: str) -> str:
    """`gpu[003-007,9],login1` -> `gpu003`, as `scontrol show hostnames` has it; containers often lack scontrol."""
    first = re.match(r"(?:\[[^]]*\]|[^,[])+", node_list)
    if not first:
        raise ValueError(f"SLURM_STEP_NODELIST = {node_list!r} names no node; set MASTER_ADDR to rank 0's node")
    return re.sub(r"\[(\d+)[^]]*\]", r"\1", first[0])


def tasks_of_node(tasks_per_node: str, node: int) -> int:
    """Entry `node` of `8(x3),4`, which stands for 8, 8, 8, 4."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(count)] * int(times or 1)
    return counts[node]


def _tasks_here() -> int:
    return tasks_of_node(os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ["SLURM_NODEID"]))


def _local_rank() -> int:
    """The index of this task's GPU among those that it sees."""
    from deepspeed.accelerator import get_accelerator

    local_id, env = int(os.environ["SLURM_LOCALID"]), os.environ
    if get_accelerator().device_name() == "cpu":
        return local_id
    gpus = get_accelerator().device_count()
    if gpus == 1:  # --gpus-per-task and --gpu-bind=single show each task its own GPU alone, as number 0
        return 0
    tasks = _tasks_here()
    if tasks > gpus:  # found by all tasks of the node alike, so that none waits for one that stopped
        raise ValueError(
            f"SLURM started {tasks} tasks on node {env.get('SLURMD_NODENAME')}, which sees {gpus} GPUs; ask for one "
            "task per GPU, with equal --ntasks-per-node and --gpus-per-node"
        )
    return local_id


def _address(node: str) -> str:
    """What other nodes reach this one by. Raises ValueError where nothing is known."""
    with contextlib.suppress(OSError):  # a name that only SLURM knows
        socket.getaddrinfo(node, None)
        return node
    try:
        shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        shown = ""
    address = re.search(r"NodeAddr=(\S+)", shown)
    if not address:
        raise ValueError(
            f"{node}, the first node of the job step, has no address: neither the resolver nor `scontrol show node "
            f"{node}` gives one; set MASTER_ADDR to an address of it that all nodes reach"
        )
    return address[1]
