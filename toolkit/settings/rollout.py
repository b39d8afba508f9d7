"""The `rollout` section: text that the student generates, and the replay buffer that keeps it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.settings.section import Section
from toolkit.settings.setting import setting

if TYPE_CHECKING:
    from toolkit.settings.run import RunConfig

GATHER_MODES = ("auto", "always", "never")
ROLLOUT_ENGINES = ("local", "vllm")


@dataclass(frozen=True)
class SamplingSettings(Section):
    """How the next token of a generated text is chosen."""

    # fmt: off
    temperature: float = setting(1.0,
        "Logits are divided by it.", least=0, means={0: "greedy, the most probable token"})
    top_p: float = setting(1.0,
        "Only the most probable tokens that hold this much probability.", above=0, most=1, means={1: "all tokens"})
    top_k: int = setting(0,
        "Only so many of the most probable tokens.", unit="tokens", least=0, means={0: "all tokens"})
    min_p: float = setting(0.0,
        "Only tokens with at least this share of the largest probability.", least=0, below=1, means={0: "all tokens"})
    repetition_penalty: float = setting(1.0,
        "Makes tokens that are there already less probable.", above=0, means={1: "no penalty"})
    no_repeat_ngram_size: int = setting(0,
        "No n-gram of so many tokens comes a second time in prompt and text together.", unit="tokens", least=0,
        means={0: "off"})
    # fmt: on


@dataclass(frozen=True)
class RolloutConfig(SamplingSettings):
    """How the student generates text to train on, and how long a replay buffer keeps it."""

    # fmt: off
    engine: str = setting("local",
        "local: the student generates itself. vllm: a vLLM server does (docs/rollout.md).", choices=ROLLOUT_ENGINES)
    server: str = setting("", "Address of the vLLM server, as in http://localhost:8000.", may_change=True)
    sync_every_steps: int = setting(1,
        "A server's text is by weights that are fewer steps old than this.", unit="steps", least=1)
    server_timeout_s: float = setting(600.0,
        "Longest wait for a server to come up, and for each call.", unit="s", above=0, may_change=True)
    weights_dir: str = setting("",
        "Folder for the weights that a server reads, in reach of both.", means={"": "vllm/ in the run folder"},
        may_change=True)
    windows: int = setting(1,
        "A step that generates makes the text of so many steps at once, of its own prompts and of those that come "
        "next. The next such steps, one less than that, take text from the buffer instead of generating.", unit="steps",
        least=1)
    capacity: int = setting(1000, "Texts that the replay buffer holds, over all ranks.", unit="texts", least=1)
    max_age_steps: int | None = setting(None,
        "Text that is older is not used.", unit="steps", least=1, means={None: "no limit"})
    train_on_fresh: bool = setting(False,
        "A step that generates trains on that text (DistiLLM's released code). Else it trains on a draw from the "
        "replay buffer, which holds that text too (Algorithm 1 of arXiv 2402.03898).")
    max_new_tokens: int | None = setting(None,
        "Longest generated text.", unit="tokens", least=1, means={None: "data.max_length - data.max_prompt_length"})
    rows_at_once: int | None = setting(None,
        "Texts that are generated at the same time.", unit="rows of one rank", least=1,
        means={None: "as many as the key-value cache holds, or 64 requests to a server"}, may_change=True,
        formerly="batch_rows")
    cache_mib: int | None = setting(None,
        "Bound on the memory of the key-value cache of a rank; one row is always computed.", unit="MiB", least=1,
        means={None: "half of the free memory"}, may_change=True)
    gather: str = setting("auto",
        "always holds the whole student on every rank while it generates. never generates from shards, all ranks token "
        "by token together. auto chooses by free memory.", choices=GATHER_MODES, may_change=True)
    # fmt: on

    def validate(self, section: str = "rollout") -> None:
        """Raises ValueError for the first setting that cannot work."""
        super().validate(section)
        if self.engine == "vllm" and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", self.server):
            raise ValueError(
                f"{section}.server = {self.server!r} with {section}.engine = vllm; give the server's address, as in "
                "http://localhost:8000"
            )
        if self.engine == "vllm" and self.no_repeat_ngram_size:
            size = f"{section}.no_repeat_ngram_size = {self.no_repeat_ngram_size}"
            raise ValueError(f'{size}, which a vLLM server does not know; set it to 0, or {section}.engine to "local"')

    def check_with(self, run: RunConfig) -> None:
        """Text has to fit into the buffer, and a server has to be asked, in time, for text that is young enough.
        Raises ValueError."""
        # The texts of one step have to fit into the buffer.
        made = self.windows * run.train.rows_per_step
        if run.schedule.policy != "off" and made > self.capacity:
            raise ValueError(
                f"rollout.windows = {self.windows} of train.rows_per_step = {run.train.rows_per_step} sequences do not "
                f"fit into rollout.capacity = {self.capacity}; raise the capacity to {made} or more"
            )

        # A server is waited for only where it is needed, and not longer than a rank may seem to hang.
        if self.engine != "vllm":
            return
        if run.schedule.policy == "off":
            raise ValueError(
                'rollout.engine = "vllm" with schedule.policy = "off", so that no text would be asked of the server; '
                'set rollout.engine = "local"'
            )
        if self.server_timeout_s >= run.faults.hang_s:
            raise ValueError(
                f"rollout.server_timeout_s = {self.server_timeout_s:g} is not below faults.hang_s = "
                f"{run.faults.hang_s:g}: waiting for the server would be taken for a rank that hangs"
            )

        # Its text is young enough for the buffer when it is drawn.
        oldest, sync = self.max_age_steps, self.sync_every_steps
        draws = not self.train_on_fresh or self.windows > 1 or run.schedule.policy == "adaptive"
        if draws and oldest is not None and oldest < sync - 1:
            raise ValueError(
                f"rollout.max_age_steps = {oldest} with rollout.sync_every_steps = {sync}: a server's text may be "
                f"{sync - 1} steps old when it is made; raise the first or lower the second"
            )
