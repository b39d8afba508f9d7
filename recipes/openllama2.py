"""The paper's OpenLLaMA2 table: 7B teaches 3B, both through LoRA, on Dolly.   ./run.sh openllama2 3b/distillm_srkl

First `teacher` (fine-tunes 7B; its merged export teaches), then `3b/init` (3 epochs), then `3b/METHOD`. The paper's own
row is distillm_srkl. A student goes on from the merged `init` with new adapters, the paper's with the same ones.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes._paper import HALF_CROSS_ENTROPY, Size, batch, rows, teacher
from toolkit.run.recipe import main

LORA = {
    "student.lora.rank": 16, "student.lora.alpha": 64, "student.lora.dropout": 0.1,
    "student.lora.target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
ADAPTIVE = {"schedule.phi_initial": 0.2, "schedule.epsilon": 0.2}
WITH_TEXT = ("imitkd", "gkd", "minillm", "distillm_skl", "distillm_srkl", "distillm2")
RECIPES = {
    "teacher": teacher("openllama2", Size("openlm-research/open_llama_7b_v2", 4, 5e-4, 20), LORA),
    **rows("openllama2", {
        "3b": Size("openlm-research/open_llama_3b_v2", 8, 5e-4, 10, {
            "sft": {"train.epochs": 20},
            "kd": {"optimizer.lr": 1e-5, **batch(4), **HALF_CROSS_ENTROPY},
            "seqkd": HALF_CROSS_ENTROPY,
        }),
    }, WITH_TEXT, LORA | ADAPTIVE),
}  # fmt: skip

if __name__ == "__main__":
    main(RECIPES)
