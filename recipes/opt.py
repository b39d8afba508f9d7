"""The paper's OPT table: 2.7B teaches 0.1B, 0.3B and 1.3B on Dolly.   ./run.sh opt 0.1b/distillm_srkl

First `teacher` (fine-tunes OPT-2.7B), then `SIZE/init` (3 epochs; where a student starts that learns from its own
text), then `SIZE/METHOD`. The paper's own row is distillm_srkl.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes._paper import Size, batch, rows, teacher
from toolkit.run.recipe import main
from toolkit.settings.methods import METHODS

RECIPES = {
    "teacher": teacher("opt", Size("facebook/opt-2.7b", 4, 5e-5, 10)),
    **rows("opt", {
        "0.1b": Size("facebook/opt-125m", 8, 5e-5, 20, {"sft": {"optimizer.lr": 5e-4, **batch(8, 4)}}),
        "0.3b": Size("facebook/opt-350m", 8, 5e-5, 20, {"sft": batch(8, 4)}),
        "1.3b": Size("facebook/opt-1.3b", 8, 5e-5, 10, {"sft": batch(8, 4), "init": batch(2)}),
    }, tuple(name for name in METHODS if name != "sft")),
}  # fmt: skip

if __name__ == "__main__":
    main(RECIPES)
