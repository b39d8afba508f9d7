"""Watching what torch allocates."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """`numel`: elements of the largest tensor that any operation returned inside the `with` block."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


class MemoryLimit(TorchDispatchMode):
    """An operation whose result is larger than `limit_bytes` meets the allocator's own refusal. It depends on what was
    asked for, not on what the allocator holds, so it happens alike each time. `most_bytes`: the largest result so far.
    """

    def __init__(self, limit_bytes=float("inf")):
        super().__init__()
        self.limit_bytes, self.most_bytes = limit_bytes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and not func.is_view:
                self.most_bytes = max(self.most_bytes, x.nbytes)
                if x.nbytes > self.limit_bytes:
                    torch.empty(2**46)  # half of the address space: more than any machine has
        return out


class BehindLeftOperands(TorchDispatchMode):
    """What lies behind each row of a product's left operand where that is a view of wider rows, up to the end of a
    block of 32 columns. `views`: how many such operands there were; `not_finite`: how many had a NaN or an infinity."""

    views, not_finite = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            left = args[-2]
            rows, columns = left.shape
            stride, step = left.stride()
            end = min(stride, -(-columns // 32) * 32)
            if step == 1 and end > columns:
                self.views += 1
                self.not_finite += not left.as_strided((rows, end), (stride, 1)).isfinite().all()
        return func(*args, **(kwargs or {}))
