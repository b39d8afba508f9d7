"""What a plan is made for: how many ranks with how much memory, and how fast they compute, read and send."""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolkit.settings.overrides import unknown

GIB = 2**30
#: of a GPU's memory, what the CUDA context, NCCL's buffers and the libraries' workspaces take before the first tensor
CONTEXT_BYTES = 2 * GIB
#: share of a rank's memory that a plan may fill: the caching allocator loses some to fragments
ROOM = 0.92


@dataclass(frozen=True)
class Device:
    """What one rank can do at most. flops: of dense bf16 products, a second. memory_rate, link_rate, network_rate:
    bytes a second from its own memory, from another rank of its node, and from other nodes, each in one direction;
    host_rate: from the node's memory.
    launch_s: time that one kernel of a short pass takes, whatever it computes."""

    name: str
    flops: float
    memory_rate: float
    link_rate: float
    network_rate: float
    host_rate: float
    memory_gib: float
    launch_s: float = 6e-6

    @property
    def is_cpu(self) -> bool:
        """Buffers take memory as they are filled, not as they are made; kernels and products are the CPU's."""
        return self.name == "cpu"


#: Data sheets: NVIDIA A100 80GB SXM (312 TFLOP/s dense bf16, 2,039 GB/s, NVLink 600 GB/s both ways, DGX A100 with eight
#: ports of 200 Gb/s), H100 SXM (989, 3.35 TB/s, 900 GB/s, DGX H100 with eight of 400 Gb/s), H200 SXM (989, 4.8 TB/s,
#: 900 GB/s), HGX B200 (2,250, 8 TB/s, 1.8 TB/s, 400 Gb/s a GPU). The last line is no data sheet: a core of a server.
DEVICES = {
    "a100": Device("a100", 312e12, 2.039e12, 300e9, 25e9, 32e9, 80),
    "h100": Device("h100", 989e12, 3.35e12, 450e9, 50e9, 64e9, 79.6),
    "h200": Device("h200", 989e12, 4.8e12, 450e9, 50e9, 64e9, 140.4),
    "b200": Device("b200", 2250e12, 8e12, 900e9, 50e9, 64e9, 179),
    "cpu": Device("cpu", 0.15e12, 12e9, 4e9, 1e9, 12e9, 16, launch_s=5e-6),
}


def device_named(name: str) -> Device:
    """One of DEVICES. Raises ValueError for another name."""
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    return DEVICES[name]


@dataclass(frozen=True)
class Machine:
    """nodes of ranks_per_node ranks. memory_bytes: what tensors of one rank may take where its models are, host_bytes:
    what it may take of the node's memory beside that."""

    nodes: int
    ranks_per_node: int
    memory_bytes: int
    host_bytes: int
    device: Device | str = "h100"

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node", "memory_bytes", "host_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"a machine with {name} = {value}; it has to be at least 1")
        if isinstance(self.device, str):
            object.__setattr__(self, "device", device_named(self.device))

    @classmethod
    def of_gpus(cls, nodes: int, gpus_per_node: int, memory_gib: float, host_gib: float, device: Device) -> Machine:
        """GPUs of so much memory each, of which the context takes some; nodes of so much memory."""
        usable = memory_gib * GIB - (0 if device.is_cpu else CONTEXT_BYTES)
        return cls(nodes, gpus_per_node, int(max(1, usable)), int(host_gib * GIB / gpus_per_node), device)

    @property
    def kind(self) -> Device:
        """The device of each rank."""
        assert isinstance(self.device, Device)
        return self.device

    @property
    def world(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def room(self) -> int:
        """Bytes of a rank that a plan may fill."""
        return int(self.memory_bytes * ROOM)

    def with_nodes(self, nodes: int) -> Machine:
        """The same with another number of nodes."""
        return replace(self, nodes=nodes)
