"""Whole training steps at the shapes of recipes/llama_7b_to_1b.py with random weights on one GPU: tokens per second,
model FLOPs utilisation, peak memory, and a profile of where the time goes.

    python benchmarks/gpu_steps.py --layout resident|sharded [--device cpu] [--tiny] [--json FILE]

resident: both models are whole on the GPU, and nothing gathers or releases them.
sharded: both as the ZeRO-3 files say; one rank gathers from itself, and hooks, buckets and copies are those of many.

A step is `DistillationLoop.step` on the data's rows, half prompt and half response: skl, AdamW, no gradient
checkpointing, no generation. Two sizes: 4 rows of 512 tokens in one micro-batch, and 64 in 8. The first step of each
size is told apart from the later ones, of which the median counts: in it kernels are compiled and loaded, and memory is
taken. The very first one runs under the profiler, which adds to its time.

Model FLOPs utilisation is FLOPs / (seconds of a step x the card's peak by its data sheet). FLOPs are those of the
mathematics, nothing that is computed twice: with P the weights of a model's layers, L layers of hidden size H, T tokens
a row, N response tokens, V entries of the vocabulary, a forward pass over B tokens takes 2 P B + 2 L H T B (causal
attention) + 2 N V H (the head); the teacher makes one, the student's forward and backward count as three.

The profile is torch.profiler's, of the first step and of a later one of each size: see gpu_trace.py. Beside it every
thread's Python stack is sampled: what is not a call of CUDA or torch has a name there. The later step's trace is kept
beside the JSON file, for Perfetto.
"""

import argparse
import collections
import contextlib
import dataclasses
import gzip
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedTokenizerFast

from benchmarks import gpu_trace
from benchmarks.gpu_common import Record, parsed, parser_of, peak_tflops, shapes, synchronize
from toolkit.batch import Example
from toolkit.data import Data, PromptDataset
from toolkit.models import Vocabulary, choose_dtype, load
from toolkit.plan import DEVICES, Machine, plan_of
from toolkit.ranks import collectives
from toolkit.ranks.signals import StopSignals
from toolkit.ranks.watchdog import Watchdog
from toolkit.rollout.schedule import ScheduleState
from toolkit.run.build import build
from toolkit.run.checkpoint import Checkpoints, identity
from toolkit.run.distill import ready
from toolkit.run.inputs import RunInputs
from toolkit.run.loop import DistillationLoop
from toolkit.run.state import LoopState
from toolkit.run.timer import PhaseTimer
from toolkit.settings import LossConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig

PHASES = ("teacher", "student", "optimizer", "other")
SAMPLE_EVERY_S = 0.002
TOP = 12
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Size:
    """Rows of a step, tokens of a row, and how long its later steps may take in all."""

    rows: int
    rows_per_micro_batch: int
    row_tokens: int
    budget_s: float

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def targets(self) -> int:
        return self.rows * (self.row_tokens // 2)


SIZES = Size(4, 4, 512, 8.0), Size(64, 8, 512, 10.0)
TINY_SIZES = Size(2, 2, 16, 0.0), Size(4, 2, 16, 0.0)


# ------------------------------------------------------------------------------------------------- building


def make_config(layout: str, device: str, folder: Path, tiny: bool) -> RunConfig:
    """A run of the larger size whose models are laid out so."""
    largest = (TINY_SIZES if tiny else SIZES)[-1]
    where = "zero3" if device == "cuda" else "cpu"
    files = [f"ds_configs/teacher_{where}.json", f"ds_configs/student_{where}.json"]
    teacher, student = (
        ModelConfig(random_weights=True, shape=shape, ds_config=file, sharding=layout)
        for shape, file in zip(shapes(tiny), files, strict=True)
    )
    return RunConfig(
        name=layout, output_dir=str(folder), cache_dir=str(folder / "cache"), teacher=teacher, student=student,
        loss=LossConfig(divergence="skl"), optimizer=OptimizerConfig(lr=1e-5),
        train=TrainConfig(
            steps=1000, rows_per_step=largest.rows, rows_per_micro_batch=largest.rows_per_micro_batch
        ),
        schedule=ScheduleConfig(policy="off"), resume="never",
    ).with_overrides([
        "validation.scored_rows=0", "validation.samples=0", f"data.max_length={largest.row_tokens}",
        f"data.max_prompt_length={largest.row_tokens // 2}",
    ])  # fmt: skip


def make_inputs(config: RunConfig, folder: Path) -> RunInputs:
    """Rows of random ids, and a tokenizer of as many words as the models' vocabulary has entries."""
    size = config.student.shape["vocab_size"]
    inner = Tokenizer(models.WordLevel({f"w{id}": id for id in range(size)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w2", pad_token="w2")
    return RunInputs(
        cache_dir=folder, dtype=choose_dtype(config.precision, collectives.device()), teacher_path="", student_path="",
        tokenizer=tokenizer, vocabulary=Vocabulary(size, (2,), 2), text=None,
        data=Data(random_rows(2, 16, size), random_rows(2, 16, size), [], {}, ""),
        identity=identity("", "", torch.bfloat16, ""),
    )  # fmt: skip


def random_rows(count: int, tokens: int, vocabulary: int) -> list[Example]:
    draw = np.random.default_rng(0)
    return [Example(draw.integers(3, vocabulary, tokens).astype(np.int32), tokens // 2) for _ in range(count)]


@contextmanager
def weights_made_on(device: str, layout: str) -> Iterator[None]:
    """Inside, random weights are made on the device: on the host 7 billion of them take minutes. zero.Init, by which
    sharded models are made, does so by itself."""
    if layout == "sharded":
        yield
        return
    make = load.from_config

    def made(*arguments, **named):
        with torch.device(device):
            return make(*arguments, **named)

    with mock.patch.object(load, "from_config", made):
        yield


class MarkedTimer(PhaseTimer):
    """Each phase is marked in a profile, up to the end of the GPU's work of it."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(gpu_trace.PHASE + name), super().phase(name):
            yield


def make_loop(config: RunConfig, layout: str, device: str, folder: Path, watchdog: Watchdog) -> DistillationLoop:
    """A loop at its first step."""
    state = LoopState(ScheduleState(0.0))
    inputs = make_inputs(config, folder)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    with weights_made_on(device, layout):
        parts = build(config, inputs, None, state, watchdog)
    parts = dataclasses.replace(parts, timer=MarkedTimer(sync=lambda: synchronize(device)))
    return DistillationLoop(
        parts=parts, state=state, dataset=PromptDataset(inputs.data.train, 0), text=None,
        signals=StopSignals(config.faults.grace_s), checkpoints=Checkpoints(folder / "checkpoints", 1),
        identity=inputs.identity, started_s=time.monotonic(),
    )  # fmt: skip


def of_size(loop: DistillationLoop, size: Size) -> DistillationLoop:
    """The same models on steps of this size."""
    config = loop.parts.config
    train = dataclasses.replace(
        config.train, rows_per_step=size.rows, rows_per_micro_batch=size.rows_per_micro_batch
    )  # fmt: skip
    data = dataclasses.replace(config.data, max_length=size.row_tokens)
    parts = dataclasses.replace(loop.parts, config=dataclasses.replace(config, train=train, data=data))
    rows = random_rows(4 * size.rows, size.row_tokens, loop.parts.vocabulary.size)
    return dataclasses.replace(loop, parts=parts, dataset=PromptDataset(rows, 0))


# ------------------------------------------------------------------------------------------------- measuring


def step_flops(teacher: dict, student: dict, size: Size) -> float:
    """Of the mathematics of one step, see above."""
    return forward_flops(teacher, size) + 3 * forward_flops(student, size)


def forward_flops(shape: dict, size: Size) -> float:
    """Of one model's pass over all rows of a step, with its head at the response tokens."""
    hidden, layers, heads = shape["hidden_size"], shape["num_hidden_layers"], shape["num_attention_heads"]
    key_values = hidden * shape.get("num_key_value_heads", heads) // heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * key_values + 3 * hidden * shape["intermediate_size"])
    layers_flops = (2 * weights + 2 * layers * hidden * size.row_tokens) * size.tokens
    return layers_flops + 2 * size.targets * shape["vocab_size"] * hidden


ALLOCATOR = {
    "cudaMalloc": "num_device_alloc", "cudaFree": "num_device_free", "retries": "num_alloc_retries",
    "synchronised": "num_sync_all_streams",
}  # fmt: skip


def allocator_counts(device: str) -> dict[str, int]:
    """How often torch's allocator has asked CUDA for memory, given some back, emptied its cache to try again."""
    found = torch.cuda.memory_stats() if device == "cuda" else {}
    return {name: found.get(key, 0) for name, key in ALLOCATOR.items()}


def one_step(loop: DistillationLoop, step: int, device: str) -> dict:
    """Seconds by phase, and what the allocator did."""
    before, timer = allocator_counts(device), loop.parts.timer
    timer.take()
    loop.step(step)
    seconds = timer.take()
    after = allocator_counts(device)
    return {
        "step": step, "seconds": sum(seconds.values()), "phases": seconds,
        "allocator": {name: after[name] - before[name] for name in after},
    }  # fmt: skip


@contextmanager
def student_in_two(loop: DistillationLoop, device: str) -> Iterator[None]:
    """Inside, the student's phase is marked in two parts as well, with a synchronisation in between."""
    student, engine = loop.parts.student, loop.parts.student.engine

    def marked(name: str, call: Callable) -> Callable:
        def marking(*arguments, **named):
            with record_function(gpu_trace.PHASE + name):
                found = call(*arguments, **named)
                synchronize(device)
            return found

        return marking

    forward = mock.patch.object(student, "loss", marked("forward and loss", student.loss))
    with forward, mock.patch.object(engine, "backward", marked("backward", engine.backward)):
        yield


def profiled_step(
    record: Record, name: str, loop: DistillationLoop, step: int, device: str, keep: Path | None = None
) -> dict:
    """As `one_step`, under the profiler, whose tables are told. keep: where the trace is kept, compressed."""
    file = Path(loop.parts.config.output_dir) / "trace.json"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    sampler = StackSampler(loop.parts.timer)
    with student_in_two(loop, device), sampler.running(), profile(activities=activities) as profiler:
        found = one_step(loop, step, device)
    profiler.export_chrome_trace(str(file))
    trace = file.read_bytes()
    tell_profile(record, name, json.loads(trace)["traceEvents"], sampler.counts)
    if keep is not None:
        keep.write_bytes(gzip.compress(trace, compresslevel=3))
    return found


class StackSampler(threading.Thread):
    """Counts, by phase, in which function each other thread is: what Python does where the GPU waits for it."""

    def __init__(self, timer: PhaseTimer):
        super().__init__(daemon=True)
        self.timer, self.over = timer, threading.Event()
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()

    def run(self) -> None:
        own = threading.get_ident()
        while not self.over.wait(SAMPLE_EVERY_S):
            for thread, frame in sys._current_frames().items():
                code = frame.f_code
                if thread != own and not code.co_filename.endswith("threading.py"):
                    place = "/".join(Path(code.co_filename).parts[-2:])
                    self.counts[self.timer.current or "other", f"{place}: {code.co_qualname}"] += 1

    @contextmanager
    def running(self) -> Iterator["StackSampler"]:
        self.start()
        try:
            yield self
        finally:
            self.over.set()
            self.join()


def later_steps(loop: DistillationLoop, first: int, budget_s: float, device: str) -> list[dict]:
    """At least one step and at most 20, until so many seconds are over."""
    found, ends_s = [], time.monotonic() + budget_s
    while not found or (time.monotonic() < ends_s and len(found) < 20):
        found.append(one_step(loop, first + len(found), device))
    return found


# ------------------------------------------------------------------------------------------------- report


def planned_gib(config: RunConfig, card: str) -> float | None:
    """Peak memory by the memory plan; None where it does not know the card."""
    kind = next((device for name, device in DEVICES.items() if name in card.lower()), None)
    if kind is None:
        return None
    is_cpu = kind.name == "cpu"
    memory = psutil.virtual_memory().total if is_cpu else torch.cuda.get_device_properties(0).total_memory
    machine = Machine.of_gpus(1, 1, memory / GIB, psutil.virtual_memory().total / GIB, kind)
    return plan_of(config, machine).peak[1] / GIB


def size_row(size: Size, first: dict, later: list[dict], flops: float, card: str, peak_gib: float | None,
             planned: float | None) -> list:  # fmt: skip
    """A line of the table of sizes."""
    seconds = statistics.median(step["seconds"] for step in later)
    phases = [statistics.median(step["phases"].get(name, 0.0) for step in later) for name in PHASES]
    peak = peak_tflops(card)
    return [
        size.tokens, first["seconds"], seconds, *phases, size.tokens / seconds,
        None if peak is None else f"{100 * flops / (seconds * peak * 1e12):.1f} %",
        None if peak is None else flops / (peak * 1e12), peak_gib, planned,
    ]  # fmt: skip


SIZE_HEADERS = [
    "tokens a step", "first step s", "later steps s", *(f"{name} s" for name in PHASES), "tokens/s", "MFU",
    "arithmetic at the peak s", "peak GiB", "planned GiB",
]  # fmt: skip


def tell_profile(record: Record, name: str, events: list[dict], samples: collections.Counter[tuple[str, str]]) -> None:
    """The tables of one profiled step, and where its Python was."""
    found = gpu_trace.phases(events)
    functions = [[phase, place, count] for (phase, place), count in samples.most_common(TOP)]
    kernels, operations = gpu_trace.top_kernels(events, TOP), gpu_trace.top_operations(events, TOP)
    record.keep(**{
        f"profile of the {name}": {
            "phases": {phase: values._asdict() for phase, values in found.items()},
            "kernels": kernels, "operations": operations,
            "samples": functions,
        }
    })  # fmt: skip
    record.say(
        f"Profile of the {name}, milliseconds. Idle: the GPU has no work, and the host is in these calls meanwhile."
    )
    record.table(["", *found], profile_rows(list(found.values())))
    if kernels:
        record.table(["work of the GPU", "times", "ms"], [list(row) for row in kernels])
    record.table(["call of the host, without those inside", "times", "ms"], [list(row) for row in operations])
    record.say(f"Python's innermost functions meanwhile, in all threads, every {SAMPLE_EVERY_S * 1e3:g} ms:")
    record.table(["phase", "function", "samples"], functions)


def profile_rows(found: list[gpu_trace.Phase]) -> list[list]:
    """Lines of the table of phases, which are its columns. Without a GPU's work there is no idle time to tell of."""
    has_work = any(phase.busy_ms for phase in found)
    rows = [["wall", *(phase.wall_ms for phase in found)], ["GPU busy", *(phase.busy_ms for phase in found)]]
    rows += [[f"idle: {kind}", *(phase.idle_ms[kind] for phase in found)] for kind in gpu_trace.IDLE_KINDS]
    rows.append(["kernels, number", *(phase.kernels for phase in found)])
    rows += [[f"{kind}, calls", *(phase.calls[kind] for phase in found)] for kind in gpu_trace.KINDS]
    for direction in ("HtoD", "DtoH", "DtoD"):
        rows.append([f"copied {direction}, MiB", *(phase.copied_mib.get(direction, 0.0) for phase in found)])
    return rows if has_work else rows[:1]


def tell_steps(record: Record, steps: list[dict]) -> None:
    """What the allocator did in each step."""
    rows = [[s["step"], s["seconds"], *(s["allocator"][name] for name in ALLOCATOR)] for s in steps]
    record.say("The allocator, step by step:")
    record.table(["step", "s", *(f"{name}" for name in ALLOCATOR)], rows)


def measure_size(
    record: Record, loop: DistillationLoop, size: Size, first_step: int, options: argparse.Namespace, card: str
) -> list:
    """Times the steps of one size, and tells them. Returns the line of the table of sizes."""
    device = options.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if first_step == 0:
        first = profiled_step(record, f"first step of {size.tokens} tokens", loop, first_step, device)
    else:  # most of what a first step has to do was done for another size
        first = one_step(loop, first_step, device)
    later = later_steps(loop, first_step + 1, size.budget_s, device)
    peak_gib = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else None
    flops = step_flops(loop.parts.config.teacher.shape, loop.parts.config.student.shape, size)
    row = size_row(size, first, later, flops, card, peak_gib, planned_gib(loop.parts.config, card))
    record.keep(**{f"{size.tokens} tokens": {
        "first": first, "later": later, "flops": flops, "row": dict(zip(SIZE_HEADERS, row, strict=True))
    }})  # fmt: skip
    record.table(SIZE_HEADERS, [row])
    tell_steps(record, [first, *later[:3], later[-1]])
    keep = options.json and options.json.with_name(f"{options.json.stem}-{size.tokens}-tokens.trace.json.gz")
    profiled_step(record, f"later step of {size.tokens} tokens", loop, first_step + 1 + len(later), device, keep)
    return row


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--layout", choices=("resident", "sharded"), required=True)
    options = parsed(parser)
    record = Record(options.json)
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        watchdog = stack.enter_context(ready(lambda: 600.0))
        began_s = time.monotonic()
        config = make_config(options.layout, options.device, folder, options.tiny)
        loop = make_loop(config, options.layout, options.device, folder, watchdog)
        stack.enter_context(loop.parts.monitor)
        with profile():  # the profiler's own start is not the first step's
            pass
        record.keep(layout=options.layout, card=card, build_s=time.monotonic() - began_s)
        record.say(f"Built in {record.numbers['build_s']:.0f} s.")
        step, rows = 0, []
        for size in TINY_SIZES if options.tiny else SIZES:
            rows.append(measure_size(record, of_size(loop, size), size, step, options, card))
            step += 100
        record.say("All sizes:")
        record.table(SIZE_HEADERS, rows)


if __name__ == "__main__":
    main()
