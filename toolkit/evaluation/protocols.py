"""How answers are asked for: prompts, sampling, seeds. The paper's way and the plain one, by name."""

from toolkit.data.minillm import LAYOUT
from toolkit.settings import DataConfig, EvaluationConfig, SamplingSettings
from toolkit.settings.page import help_page

#: "paper": the final evaluation of DistiLLM (arXiv 2402.03898) and MiniLLM, whose generation has a fixed room of 256
#: new tokens after prompts of at most 256. The released scripts leave no_repeat_ngram_size at its default, 6.
PROTOCOLS = {
    "paper": EvaluationConfig(
        data=DataConfig(template="alpaca", max_length=512, max_prompt_length=256, **LAYOUT),
        sampling=SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, no_repeat_ngram_size=6),
    ),
    "plain": EvaluationConfig(),
}


def settings_table() -> str:
    """Every setting of `evaluate` with its meaning and its value under each protocol."""
    beside = {f"--protocol {name}": config for name, config in PROTOCOLS.items() if name != "paper"}
    return help_page(PROTOCOLS["paper"], beside)
