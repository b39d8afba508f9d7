"""Ranks that stay alive over many tests: deepspeed takes longer to import than a tiny run takes to train.

A pool is `world` processes in one gloo group. `pool.run(function, *args)` calls a module-level function on every rank
and returns all results in rank order. A rank that raises fails the test with its traceback; one that hangs ends it.
"""

import multiprocessing
import os
import socket
import time
import traceback


def _serve(pipe, rank, world, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    from toolkit.ranks import launch

    torch.set_num_threads(1)
    launch.start()
    while (task := pipe.recv()) is not None:
        function, args, kwargs = task
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class RankPool:
    def __init__(self, world):
        self.world, self.processes, self.pipes = world, [], []

    def _start(self):
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world, port), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(pipe)

    def run(self, function, *args, timeout_s=240, **kwargs):
        if not self.processes:
            self._start()
            timeout_s += 300  # the first call may build deepspeed's C++ operator
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        deadline, results = time.monotonic() + timeout_s, [None] * self.world
        waiting = set(range(self.world))
        while waiting:
            for rank in sorted(waiting):
                if self.pipes[rank].poll(0.02):
                    results[rank] = self.pipes[rank].recv()
                    waiting.discard(rank)
                elif not self.processes[rank].is_alive() or time.monotonic() > deadline:
                    state = "hangs" if self.processes[rank].is_alive() else "died"
                    told = [text for result in results if result and not result[0] for text in [result[1]]]
                    self.close()
                    raise AssertionError(f"rank {rank} of {self.world} {state} in {function.__name__}; others: {told}")
        failed = [f"rank {rank}:\n{result[1]}" for rank, result in enumerate(results) if not result[0]]
        if failed:
            self.close()  # collectives may be out of step now
            raise AssertionError("\n".join(failed))
        return [result[1] for result in results]

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                try:
                    pipe.send(None)
                    process.join(2)
                except OSError:
                    pass
                process.kill()
        self.processes, self.pipes = [], []
