"""mT5-XL teaches mT5-Base to translate English to German, 8 GPUs of 80 GB:   deepspeed recipes/t5_translation.py

Multi30K, which is on the hub with a field for each language. IWSLT'17, the paper's, has both in one field:
data.source=IWSLT/iwslt2017 data.validation_source=IWSLT/iwslt2017 data.subset=iwslt2017-en-de
data.prompt_field=translation.en data.response_field=translation.de (or a file of such lines). Both models are to be
fine-tuned first, see t5_summarization. Small: student.path=google/mt5-small.
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
    name="t5_translation",
    teacher=ModelConfig(path="google/mt5-xl", ds_config="ds_configs/teacher_zero3.json"),
    student=ModelConfig(path="google/mt5-base", ds_config="ds_configs/student_zero3.json"),
    data=DataConfig(
        source="bentrevett/multi30k", validation_source="bentrevett/multi30k", prompt_field="en", response_field="de",
        template="plain", prefix="translate English to German: ", max_length=256, max_prompt_length=128,
        on_bad_row="skip",
    ),
    loss=LossConfig(divergence="skl", alpha=0.1),
    train=TrainConfig(steps=4530, rows_per_step=64, rows_per_micro_batch=8),  # 10 epochs of 29,000 rows
    optimizer=OptimizerConfig(lr=3e-4, warmup_steps=100, weight_decay=1e-2, max_grad_norm=1.0),
    schedule=ScheduleConfig(policy="adaptive"),
    validation=ValidationConfig(every_steps=453, rows=1000, scored_rows=500, samples=3),
)  # fmt: skip

if __name__ == "__main__":
    main(RECIPE)
