"""All-gathers on gloo as broadcasts: DeepSpeed gathers weights in every step, and gloo's own way takes three times as
long.

Beside `toolkit/models/zero.py` and `toolkit/ranks/builds.py` this is the only file that relies on DeepSpeed's insides.
"""

from typing import Any

import deepspeed.comm
import torch
from torch import Tensor

#: smaller shares are gathered by gloo's own all-gather, in one message
LEAST_BYTES = 2**18


def gather_by_broadcasts() -> None:
    """From now on DeepSpeed gathers weights so. To be called after it has joined a gloo group."""
    # DeepSpeed 0.19.8 keeps torch's function in its backend, and calls it for each gather of weights.
    deepspeed.comm.comm.cdb.all_gather_function = all_gather_by_broadcasts


def all_gather_by_broadcasts(
    output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """torch.distributed.all_gather_into_tensor on gloo, as one broadcast by each rank: that takes a third of the time
    (`findings/gloo_all_gather.sh`). Collective; with async_op it returns what has `wait`, else it has waited."""
    size = torch.distributed.get_world_size(group)
    if input_tensor.numel() * input_tensor.element_size() < LEAST_BYTES or size == 1:
        return torch.distributed.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=async_op)
    shares = output_tensor.view(-1).chunk(size)
    own = shares[torch.distributed.get_rank(group)]
    if own.data_ptr() != input_tensor.data_ptr():
        own.copy_(input_tensor.view(-1))
    sent = [
        torch.distributed.broadcast(share, group_src=source, group=group, async_op=True)
        for source, share in enumerate(shares)
    ]
    gathering = Gathering(sent, input_tensor)
    return gathering if async_op else gathering.wait()


class Gathering:
    """Broadcasts that are on their way, and what they send."""

    def __init__(self, sent: list[Any], input_tensor: Tensor):
        self.sent, self.input_tensor = sent, input_tensor

    def wait(self) -> None:
        """Until all have come."""
        for work in self.sent:
            work.wait()

    def is_completed(self) -> bool:
        """Whether all have come."""
        return all(work.is_completed() for work in self.sent)
