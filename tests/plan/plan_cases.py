"""A run of tiny LLaMAs whose bytes can be counted by hand."""

import json

from toolkit.plan import Machine, ModelShape
from toolkit.settings import DataConfig, ModelConfig, RunConfig, ScheduleConfig, TrainConfig

#: 512 in the embedding, 2 x (4 x 64 + 3 x 128 + 16) = 1,312 in layers, 8 in the last norm, 512 in the head: 2,344
STUDENT = dict(
    model_type="llama", vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
)  # fmt: skip
#: 1,024 + 3 x (4 x 256 + 3 x 512 + 32) + 16 + 1,024: 9,840
TEACHER = STUDENT | dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3)
STUDENT_NUMEL, TEACHER_NUMEL = 2344, 9840


EVERY_WEIGHT = {"stage3_param_persistence_threshold": 0}  # is sharded, however small


def ds_file(folder, **zero):
    """A DeepSpeed file of ZeRO-3, small buckets and `zero`."""
    file = folder / f"ds-{len(list(folder.iterdir()))}.json"
    small = {"stage": 3, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 1000}
    file.write_text(json.dumps({"zero_optimization": small | zero}))
    return str(file)


def run_config(folder, *overrides, **zero):
    """16 rows of 32 tokens a step, in micro-batches of 2, a quarter of each row the prompt's; bf16."""
    file = ds_file(folder, **zero)
    return RunConfig(
        precision="bf16", teacher=ModelConfig(random_weights=True, shape=TEACHER, ds_config=file),
        student=ModelConfig(random_weights=True, shape=STUDENT, ds_config=file),
        data=DataConfig(max_length=32, max_prompt_length=8), schedule=ScheduleConfig(policy="off"),
        train=TrainConfig(steps=100, rows_per_step=16, rows_per_micro_batch=2),
    ).with_overrides(list(overrides))  # fmt: skip


def machine(ranks=2, memory_bytes=2**40, nodes=1, device="h100"):
    return Machine(nodes, ranks, memory_bytes, 2**40, device)


def shapes():
    return ModelShape.of(TEACHER), ModelShape.of(STUDENT)
