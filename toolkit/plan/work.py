"""What a rank has to do in a step at most, in rows and tokens, as far as settings say it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from toolkit.settings import RunConfig
from toolkit.settings.schedule import POLICIES

ROW_TOKENS = 16  # rows of a key-value cache are multiples of so many tokens
SAMPLES = 100  # places in a run at which a schedule's share of generation is read


@dataclass(frozen=True)
class Work:
    """Of one rank and one optimizer step. Every row is as long as it may be, data.max_length; a response has what the
    longest prompt leaves of it, or all in plain text.

    micro_tokens, micro_responses: of the largest micro-batch. step_tokens, step_responses: of all of them.
    teacher_tokens: of the teacher's step, pass_tokens: of one of its passes. window: responses whose teacher's hidden
    states are kept. text_tokens of prompt and answer of a generated text, prompt and answer apart; generated_rows: of
    one call. generating: share of the steps that generate, phi taken as it is at the start.
    """

    rows: int
    micro_batches: int
    length: int
    micro_rows: int
    micro_tokens: int
    micro_responses: int
    step_tokens: int
    step_responses: int
    teacher_tokens: int
    pass_tokens: int
    passes: int
    window: int
    generated_rows: int
    prompt_tokens: int
    new_tokens: int
    generating: float

    @property
    def row_tokens(self) -> int:
        """Places of a row in a key-value cache."""
        return -(-(self.prompt_tokens + self.new_tokens) // ROW_TOKENS) * ROW_TOKENS

    @classmethod
    def of(cls, config: RunConfig, world: int) -> Work:
        """Raises ValueError where a step's rows do not divide among the ranks."""
        data, train = config.data, config.train
        rows, micro_rows = train.rows_per_step // world, config.rows_per_micro_batch(world)
        is_text = data.kind == "text"
        response = data.max_length if is_text else data.max_length - data.max_prompt_length
        text_rows = config.text_rows // world
        count = config.accumulation(world)
        micro_tokens = micro_rows * max(data.max_length, config.text.max_length if text_rows else 0)
        micro_responses = micro_rows * max(response, config.text.max_length if text_rows else 0)
        if (bound := train.tokens_per_micro_batch) is not None:
            micro_tokens = min(bound, rows * data.max_length)
            count = math.ceil(rows * data.max_length / micro_tokens) + math.ceil(
                text_rows * config.text.max_length / micro_tokens
            )
            micro_responses = math.ceil(micro_tokens * response / data.max_length)
            micro_rows = max(1, micro_tokens // data.max_length)
        step_tokens = rows * data.max_length
        per_pass = config.teacher.rows_per_pass or rows
        passes = math.ceil(rows / max(1, per_pass // micro_rows * micro_rows or micro_rows))
        return cls(
            rows=rows, micro_batches=count, length=data.max_length, micro_rows=micro_rows, micro_tokens=micro_tokens,
            micro_responses=micro_responses, step_tokens=step_tokens + text_rows * config.text.max_length,
            step_responses=rows * response + text_rows * config.text.max_length, teacher_tokens=step_tokens,
            pass_tokens=math.ceil(step_tokens / passes), passes=passes, window=rows * response,
            generated_rows=rows * config.rollout.windows, prompt_tokens=data.max_prompt_length,
            new_tokens=config.max_new_tokens, generating=_share(config) / config.rollout.windows,
        )  # fmt: skip


def _share(config: RunConfig) -> float:
    """Of the steps, those whose text is generated."""
    policy, schedule = POLICIES[config.schedule.policy], config.schedule
    places = [(at + 0.5) / SAMPLES for at in range(SAMPLES)]
    return sum(policy(schedule, schedule.phi_initial, at)[0] for at in places) / SAMPLES
