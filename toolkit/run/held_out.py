"""The validation prompts that models answer before and after training."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from toolkit.data import Data, references
from toolkit.evaluation import answer, row_seeds, score
from toolkit.rollout.local import GatheredRollout
from toolkit.settings import RunConfig, SamplingSettings


class Answers(NamedTuple):
    """What one model said to the first validation prompts."""

    sampled: list[str]  # to the first validation.scored_rows of them; these are scored
    greedy: list[str]  # to the first validation.samples of them; the report shows these


class HeldOutPrompts:
    """Asks models the first validation prompts, and scores what they say. Every method is collective."""

    def __init__(self, config: RunConfig, data: Data, tokenizer: PreTrainedTokenizerBase):
        self.config, self.data, self.tokenizer = config, data, tokenizer

    def ask(self, rollout: GatheredRollout) -> Answers:
        """What the model of `rollout` says, sampled and greedily."""
        greedy = self._answers(rollout, self.config.validation.samples, temperature=0.0)
        return Answers(self.sample(rollout), greedy)

    def sample(self, rollout: GatheredRollout) -> list[str]:
        """The sampled answers alone."""
        settings = self.config.validation
        return self._answers(rollout, settings.scored_rows, settings.sampling_temperature)

    def score(self, metric: str, texts: list[str]) -> float:
        """Sampled answers against the data's own, by `metric`, x 100."""
        return score(metric, texts, [references(row) for row in self.data.validation_rows[: len(texts)]])

    def _answers(self, rollout: GatheredRollout, count: int, temperature: float) -> list[str]:
        prompts = [example.prompt for example in self.data.validation[:count]]
        if not prompts:
            return []
        sampling, seeds = SamplingSettings(temperature=temperature), row_seeds(self.config.seed, range(len(prompts)))
        found = answer(rollout, self.tokenizer, prompts, sampling, self.config.max_new_tokens, seeds)
        return [one.text for one in found]
