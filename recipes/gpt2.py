"""The paper's GPT-2 table: XL (1.5B) teaches 0.1B, 0.3B and 0.7B on Dolly.   ./run.sh gpt2 0.1b/distillm_skl

First `teacher` (fine-tunes GPT-2 XL), then `SIZE/init` (3 epochs; where a student starts that learns from its own
text), then `SIZE/METHOD`. The paper's own row: distillm_skl at 0.1b, distillm_srkl at 0.3b and 0.7b.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes._paper import TEXT, Size, batch, rows, teacher
from toolkit.run.recipe import main

WITH_TEXT = ("imitkd", "minillm", "distillm_skl", "distillm_srkl", "distillm2")
LARGE = {"optimizer.lr": 5e-4, **batch(8)}
RECIPES = {
    "teacher": teacher("gpt2", Size("openai-community/gpt2-xl", 2, 5e-5, 10)),
    **rows("gpt2", {
        "0.1b": Size("openai-community/gpt2", 8, 5e-4, 20, {"kd": batch(2), "seqkd": batch(2) | TEXT, "gkd": batch(2)}),
        "0.3b": Size("openai-community/gpt2-medium", 8, 5e-4, 20, {"sft": {"optimizer.lr": 1e-4}, "minillm": batch(4)}),
        "0.7b": Size("openai-community/gpt2-large", 4, 1e-4, 10, {
            "init": LARGE, "kd": LARGE, "seqkd": LARGE, "gkd": LARGE, "sft": batch(8), "imitkd": {"optimizer.lr": 5e-4},
        }),
    }, WITH_TEXT),
}  # fmt: skip

if __name__ == "__main__":
    main(RECIPES)
