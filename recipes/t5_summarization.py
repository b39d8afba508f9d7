"""T5-XL teaches T5-Base to summarise dialogues, 8 GPUs of 80 GB:   deepspeed recipes/t5_summarization.py

The paper's pair on SAMSum. Both models are to be fine-tuned on it first: loss.divergence=none
loss.cross_entropy_weight=1 trains the student section's model; then teacher.path=FOLDER student.path=FOLDER.
Small: student.path=google/t5-v1_1-small. DialogSum: data.source=knkarthick/dialogsum.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit.run.recipe import main
from toolkit.settings import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

RECIPE = RunConfig(
    name="t5_summarization",
    teacher=ModelConfig(path="google/t5-v1_1-xl", ds_config="ds_configs/teacher_zero3.json"),
    student=ModelConfig(path="google/t5-v1_1-base", ds_config="ds_configs/student_zero3.json"),
    data=DataConfig(
        source="knkarthick/samsum", validation_source="knkarthick/samsum", prompt_field="dialogue",
        response_field="summary", template="plain", prefix="summarize: ", max_length=640, max_prompt_length=512,
        on_bad_row="skip",
    ),
    loss=LossConfig(divergence="skl", alpha=0.1),
    train=TrainConfig(steps=2300, rows_per_step=64, rows_per_micro_batch=8),  # 10 epochs of 14,700 rows
    optimizer=OptimizerConfig(lr=3e-4, warmup_steps=100, weight_decay=1e-2, max_grad_norm=1.0),
    schedule=ScheduleConfig(policy="adaptive"),
    validation=ValidationConfig(every_steps=230, scored_rows=500, samples=3),
)  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
