"""OpenLLaMA-7B-v2 becomes a 1.3B student, 8 GPUs of 80 GB:   deepspeed recipes/llama_7b_to_1b.py

init cuts the student out of the teacher, recovery brings it back to language on 10 B tokens of plain text, distil is
DistiLLM on instructions. With 100 M: recovery.train.tokens=100e6 recovery.train.rows_per_step=64, 763 steps.

The teacher named here was never fine-tuned on instructions: it rarely ends an answer, and the student of distil would
learn that. So first make one that does, then name it for that stage (docs/initialisation.md):

    ./run.sh openllama2 teacher
    deepspeed recipes/llama_7b_to_1b.py distil.teacher.path=runs/openllama2-teacher/student

To try it anywhere at true width, without the hub, with the sentencepiece file of a LLaMA:

    ./run.sh llama_7b_to_1b teacher.tokenizer=FILE.model teacher.random_weights=true teacher.num_layers=2 \\
        init.layers=1 init.rows=2 data.source=python_docs recovery.data.streaming=false train.rows_per_step=2 \\
        data.max_length=128 distil.data.max_prompt_length=64 recovery.train.tokens=512 distil.train.steps=2 \\
        optimizer.warmup_steps=0 validation.rows=2 distil.validation.scored_rows=2 distil.validation.samples=1 \\
        teacher.ds_config=ds_configs/teacher_cpu.json student.ds_config=ds_configs/student_cpu.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.run.recipe import main
from toolkit.run.stages import Stages
from toolkit.settings import (
    DataConfig,
    InitConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

SHAPE_7B = dict(
    model_type="llama", vocab_size=32000, max_position_embeddings=2048, rms_norm_eps=1e-6, hidden_size=4096,
    num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008,
)  # fmt: skip
SHARED = dict(
    name="llama_7b_to_1b",
    # The shape is read only where random_weights=true.
    teacher=ModelConfig(
        path="openlm-research/open_llama_7b_v2", shape=SHAPE_7B, ds_config="ds_configs/teacher_zero3.json"
    ),
    student=ModelConfig(ds_config="ds_configs/student_zero3.json", gradient_checkpointing=True),
)
RECOVERY = RunConfig(
    **SHARED,
    data=DataConfig(
        kind="text", source="HuggingFaceFW/fineweb-edu", subset="sample-10BT", streaming=True, max_length=2048,
        validation_fraction=0.005,
    ),
    loss=LossConfig(divergence="fkl", cross_entropy_weight=1.0),
    train=TrainConfig(tokens=10e9, rows_per_step=512, rows_per_micro_batch=8),  # 9,537 steps of 1 M tokens
    optimizer=OptimizerConfig(lr=3e-4, min_lr=3e-5, warmup_steps=50, weight_decay=0.1, betas=(0.9, 0.95)),
    schedule=ScheduleConfig(policy="off"),
    validation=ValidationConfig(every_steps=250),
)  # fmt: skip
DISTIL = RunConfig(
    **SHARED,
    data=DataConfig(
        source="dolly", template="alpaca", max_length=512, max_prompt_length=256, validation_fraction=0.033,
        on_bad_row="skip",  # without the 500 prompts of the papers' test
    ),
    loss=LossConfig(divergence="srkl", alpha=0.1),
    train=TrainConfig(steps=2270, rows_per_step=64, rows_per_micro_batch=8),  # 10 epochs of about 14,500 rows
    optimizer=OptimizerConfig(lr=5e-5, warmup_steps=100, weight_decay=1e-2, max_grad_norm=1.0),
    schedule=ScheduleConfig(policy="adaptive", phi_initial=0.2, epsilon=0.2),
    validation=ValidationConfig(every_steps=227, rows=500, scored_rows=500, samples=3),
)  # fmt: skip
RECIPE = Stages(
    init=InitConfig(layers=24, hidden=2048, heads=16, kv_heads=16, mlp=5504),
    runs={"recovery": RECOVERY, "distil": DISTIL},
)

if __name__ == "__main__":
    main(RECIPE)
