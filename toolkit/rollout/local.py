"""Generation by a ZeRO-3 sharded model: parameters are gathered once, hooks are off, and no rank waits for another.

Where the whole model does not fit on a rank, it generates sharded, all ranks in step.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from transformers import PreTrainedModel

from toolkit.batch import DecoderOnly, EncoderDecoder, Example, RowLayout
from toolkit.batch.token_batch import padded
from toolkit.models import zero
from toolkit.models.engines import evaluation_mode
from toolkit.models.head import stack_of
from toolkit.models.vocabulary import Vocabulary
from toolkit.ranks import collectives
from toolkit.ranks.memory import Halving, free_bytes
from toolkit.rollout.cache import cache_bytes_per_token, row_tokens
from toolkit.rollout.decode import DecodeStats, decode, idle_pass, is_supported, plain_decode
from toolkit.rollout.packed import packed_weights, packs
from toolkit.rollout.sampling import SeededSampling, sequence_seed
from toolkit.rollout.seq2seq import decode_seq2seq

__all__ = ["GatheredRollout", "Rollout", "RolloutStats", "SeededSampling", "sequence_seed", "whole_model"]

MIB = 2**20
ROOM = 0.8  # share of the free memory that the whole weights and the smallest cache may take
DecodeLoop = Callable[..., tuple[list[np.ndarray], DecodeStats]]
#: layout of rows -> the loop that makes text of a model of it
LOOPS: dict[type[RowLayout], Callable[[PreTrainedModel], DecodeLoop]] = {
    DecoderOnly: lambda model: decode if is_supported(model) else plain_decode,
    EncoderDecoder: lambda model: decode_seq2seq,
}


@dataclass
class RolloutStats:
    """The last call on this rank. mode: "gathered", "sharded" or "vllm". seconds: gathering included. passes: of the
    model over a batch, or requests to a server."""

    mode: str
    seconds: float
    texts: int
    tokens: int
    passes: int
    peak_rows: int
    cache_mib: float


class Rollout(RolloutEngine):
    """What a training loop asks of an engine that generates student text. last: what this rank did in the last call.
    weights_step: the optimizer step whose weights make the text."""

    vocabulary: Vocabulary
    last: RolloutStats | None = None
    weights_step: int = 0

    @abstractmethod
    def complete(self, prompts: Sequence[np.ndarray], sampling: SeededSampling) -> list[Example]:
        """Prompts (int [L] each) and what the model says after them, EOS included where it came, order kept. Every rank
        calls it, with any number of prompts, none included. What fails on one rank is raised on all. Raises ValueError
        unless there is one seed a prompt, and for a prompt without tokens or with unknown ones."""

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """DeepSpeed's interface: a left-padded batch, `n_samples_per_prompt` texts for each row, beside each other."""
        ids_BT = request.prompt_ids.repeat_interleave(sampling.n_samples_per_prompt, 0)
        mask_BT = request.prompt_attention_mask.repeat_interleave(sampling.n_samples_per_prompt, 0)
        rows, width = ids_BT.shape
        seeds = getattr(sampling, "seeds", None) or range(rows)
        if len(seeds) != rows:
            raise ValueError(f"{rows} texts asked for with {len(seeds)} seeds; give one seed for each text")
        prompts = [ids[mask.bool()].cpu().numpy() for ids, mask in zip(ids_BT, mask_BT, strict=True)]
        texts = [e.response for e in self.complete(prompts, SeededSampling(**{**vars(sampling), "seeds": seeds}))]
        new_ids, is_text = padded(texts, self.vocabulary.pad_id, multiple=1)
        return RolloutBatch(
            input_ids=torch.cat([ids_BT, new_ids.to(ids_BT)], 1),
            attention_mask=torch.cat([mask_BT, is_text.to(mask_BT)], 1),
            response_start_idx=ids_BT.new_full((rows,), width),
        )


class GatheredRollout(Rollout):
    """Generates on each rank for itself, from parameters gathered once a call; sharded where they would not fit.

    engine: a deepspeed engine whose module has the language model as `.model`. rows_at_once: rows decoded together, at
    most. cache_mib: bound on the key-value cache of a rank, at least one row though; None is half of the memory that is
    free when a call starts. gather: "always", "never" (sharded, ranks in step), or "auto": gathered where on every rank
    the model and its cache fit into four fifths of the free memory. On a CPU weights are packed where there is room for
    them twice (`packed_weights`).
    """

    name = "gathered"

    def __init__(self, engine: Any, vocabulary: Vocabulary, rows_at_once: int | None = None,
                 cache_mib: int | None = None, gather: str = "auto"):  # fmt: skip
        self.engine, self.vocabulary = engine, vocabulary
        self.rows = Halving("generation", "rows", rows_at_once)
        self.cache_mib, self.gather = cache_mib, gather

    def sync_weights(self, step: int) -> None:
        """The engine's own weights are used: nothing to push."""
        self.weights_step = step

    def complete(self, prompts: Sequence[np.ndarray], sampling: SeededSampling) -> list[Example]:
        """See `Rollout`. Give it all prompts that are wanted from these weights, those of several windows too: it
        gathers once."""
        collectives.together(lambda: check_prompts(prompts, sampling, self.vocabulary))
        started_s = time.perf_counter()
        # What a row of the cache takes decides how many run at once, and whether the whole model fits beside them.
        longest = max((len(prompt) for prompt in prompts), default=1) + sampling.max_new_tokens
        row_bytes = cache_bytes_per_token(self.engine.module.model) * row_tokens(longest)
        if self._gathers(row_bytes):
            # Between the gathering and its end nothing communicates, so a failure waits until the ranks meet again.
            mode, failure = "gathered", None
            packing = packed_weights if self._packs(row_bytes) else nullcontext
            with whole_model(self.engine) as model:
                try:
                    with packing(model):
                        texts, stats = self._decode_or_split(model, prompts, sampling, self._rows(row_bytes))
                except Exception as error:
                    failure = error
            _agree(False, failure)
        else:
            mode, model = "sharded", self.engine.module.model
            with evaluation_mode(self.engine), _InStep(model, self.vocabulary.layout) as ranks:
                texts, stats = self._loop(model)(
                    model, prompts, sampling, self.vocabulary, self._rows(row_bytes), ranks.anyone_going
                )
        self.last = RolloutStats(
            mode, time.perf_counter() - started_s, len(prompts), stats.tokens, stats.prefills + stats.steps,
            stats.peak_rows, stats.cache_bytes / MIB,
        )  # fmt: skip
        return joined(prompts, texts)

    def _decode_or_split(
        self, model: PreTrainedModel, prompts: Sequence[np.ndarray], sampling: SeededSampling, rows: int
    ) -> tuple[list[np.ndarray], DecodeStats]:
        def work(size: float | None) -> tuple[list[np.ndarray], DecodeStats]:
            # A text is a function of its seed: what is tried again says the same.
            return self._loop(model)(model, prompts, sampling, self.vocabulary, int(min(rows, size or rows)))

        return self.rows.run(work, whole=min(rows, len(prompts)))

    def _loop(self, model: PreTrainedModel) -> DecodeLoop:
        return LOOPS[type(self.vocabulary.layout)](model)

    def _rows(self, row_bytes: int) -> int:
        budget = self.cache_mib * MIB if self.cache_mib else free_bytes() // 2
        return int(min(self.rows.size or 10**9, max(1, budget // max(1, row_bytes))))

    def _gathers(self, row_bytes: int) -> bool:
        if self.engine.zero_optimization_stage() < 3 or self.gather == "always":
            return True
        return self.gather == "auto" and self._fits(self._bytes_to_gather(), row_bytes)

    def _packs(self, row_bytes: int) -> bool:
        """Whether weights are packed, on all ranks or on none: its products round otherwise."""
        model = self.engine.module.model
        whole = sum(zero.whole_numel(p) * p.element_size() for p in model.parameters())
        return packs(model) and self._fits(self._bytes_to_gather() + whole, row_bytes)

    def _bytes_to_gather(self) -> int:
        parameters = self.engine.module.model.parameters()
        return sum(zero.whole_numel(p) * p.element_size() for p in parameters if not zero.is_whole(p))

    def _fits(self, weight_bytes: int, row_bytes: int) -> bool:
        """Whether every rank has room for these weights and what the cache takes at least."""
        cache_bytes = self.cache_mib * MIB if self.cache_mib else row_bytes
        return collectives.everywhere(weight_bytes + cache_bytes <= ROOM * free_bytes())


def check_prompts(prompts: Sequence[np.ndarray], sampling: SeededSampling, vocabulary: Vocabulary) -> None:
    """Raises ValueError unless there is a seed a prompt, and for prompts without tokens or with unknown ones."""
    if len(sampling.seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts with {len(sampling.seeds)} seeds; give one seed for each prompt")
    if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"prompt {empty[0]} of {len(prompts)} has no tokens; a text needs one to start from")
    for index, prompt in enumerate(prompts):
        if not 0 <= np.min(prompt) <= np.max(prompt) < vocabulary.size:
            raise ValueError(
                f"prompt {index} of {len(prompts)} holds the ids {np.min(prompt)} to {np.max(prompt)}, the vocabulary "
                f"ends at {vocabulary.size - 1}; take prompts of the student's tokenizer"
            )


def joined(prompts: Sequence[np.ndarray], texts: Sequence[np.ndarray]) -> list[Example]:
    """Each prompt with its text as the response."""
    return [Example(np.concatenate(pair), len(pair[0])) for pair in zip(prompts, texts, strict=True)]


class _InStep:
    """Ranks whose every pass of the model is a collective: they go on together, and fail together.

    A rank that fails between two passes makes the pass that it still owes, and tells the others where they ask whether
    to go on. Inside a pass it cannot: the others wait in gathers of layers that it has not reached. Its error is then
    raised on this rank alone, and ends the job as an error in a training step does.
    """

    def __init__(self, model: PreTrainedModel, layout: RowLayout):
        self.model, self.owes_pass, self.is_inside = model, False, False
        # Where there are two kinds of passes, it is not known here which one is owed.
        self.tells = not layout.steps_differ

    def anyone_going(self, going: bool) -> bool:
        """Whether any rank goes on; raises RuntimeError where one has failed. Collective."""
        self.owes_pass = _agree(going, None)
        return self.owes_pass

    def __enter__(self) -> Self:
        def enter(*_: Any) -> None:
            self.is_inside = True

        def leave(*_: Any) -> None:
            self.owes_pass = self.is_inside = False

        stack, head = stack_of(self.model), self.model.get_output_embeddings()
        self.hooks = [stack.register_forward_pre_hook(enter), head.register_forward_hook(leave)] if self.tells else []
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            is_told = isinstance(error, _GenerationFailed)
            if isinstance(error, Exception) and self.tells and not self.is_inside and not is_told:
                if self.owes_pass:
                    idle_pass(self.model)
                _agree(False, error)
        finally:
            for hook in self.hooks:
                hook.remove()


def _agree(going: bool, error: Exception | None) -> bool:
    """Whether any rank goes on; raises RuntimeError on all of them where one has an error. Collective."""
    any_going, any_failed = collectives.sum_over_ranks([going, error is not None])
    if any_failed:
        told = collectives.gather_objects(None if error is None else f"{type(error).__name__}: {error}")
        rank, text = next((rank, text) for rank, text in enumerate(told) if text is not None)
        raise _GenerationFailed(f"generation failed on rank {rank}: {text}") from error
    return any_going > 0


class _GenerationFailed(RuntimeError):
    """Raised on all ranks alike: nobody has to be told again."""


@contextmanager
def whole_model(engine: Any) -> Iterator[PreTrainedModel]:
    """The engine's model with all parameters on this rank and without ZeRO hooks, in eval mode. Collective to enter and
    to leave; between the two the ranks are free. Hooks and mode come back even when generation fails."""
    with evaluation_mode(engine), zero.gathered_without_hooks(engine):
        yield engine.module.model
