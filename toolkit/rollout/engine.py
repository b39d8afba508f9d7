"""Generation by a ZeRO-3 sharded model: parameters are gathered once, hooks are off, and no rank waits for another.

Where the whole model does not fit on a rank, it generates sharded, all ranks in step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import numpy as np
import psutil
import torch
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from transformers import PreTrainedModel

from toolkit import distributed
from toolkit.batch import Example
from toolkit.faults import Halving
from toolkit.models.vocabulary import Vocabulary
from toolkit.rollout.decode import DecodeStats, cache_bytes_per_token, decode, is_supported, plain_decode, row_tokens
from toolkit.rollout.sampling import SeededSampling, choose_tokens, sequence_seed
from toolkit.rollout.seq2seq import decode_seq2seq

__all__ = ["GatheredRollout", "RolloutStats", "SeededSampling", "choose_tokens", "sequence_seed", "whole_model"]

MIB = 2**20


@dataclass
class RolloutStats:
    """The last call on this rank. mode: "gathered" or "sharded". seconds: gathering included."""

    mode: str
    seconds: float
    texts: int
    tokens: int
    passes: int
    peak_rows: int
    cache_mib: float


class GatheredRollout(RolloutEngine):
    """Generates on each rank for itself, from parameters gathered once a call; sharded where they would not fit.

    engine: a deepspeed engine whose module has the language model as `.model`. batch_rows: rows decoded together, at
    most. cache_mib: bound on the key-value cache of a rank, at least one row though; None is half of the memory that is
    free when a call starts. gather: "always", "never" (sharded, ranks in step), or "auto": gathered where on every rank
    the model and its cache fit into four fifths of the free memory.
    """

    name = "gathered"

    def __init__(self, engine: Any, vocabulary: Vocabulary, batch_rows: int | None = None,
                 cache_mib: int | None = None, gather: str = "auto"):  # fmt: skip
        self.engine, self.vocabulary = engine, vocabulary
        self.rows = Halving("generation", "rows", batch_rows)
        self.cache_mib, self.gather = cache_mib, gather
        self.last: RolloutStats | None = None

    def sync_weights(self, step: int) -> None:
        """The engine's own weights are used: nothing to push."""

    def complete(self, prompts: Sequence[np.ndarray], sampling: SeededSampling) -> list[Example]:
        """Prompts (int [L] each) and what the model says after them, order kept.

        Every rank calls it, with any number of prompts, none included. Give it all prompts that are wanted from these
        weights, those of several windows too: it gathers once.
        Raises ValueError unless there is one seed a prompt, and for a prompt without tokens.
        """
        if len(sampling.seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts with {len(sampling.seeds)} seeds; give one seed for each prompt")
        if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
            raise ValueError(f"prompt {empty[0]} of {len(prompts)} has no tokens; a text needs one to start from")
        started_s = time.perf_counter()
        longest = max((len(prompt) for prompt in prompts), default=1) + sampling.max_new_tokens
        row_bytes = cache_bytes_per_token(self.engine.module.model) * row_tokens(longest)
        if self._gathers(row_bytes):
            mode = "gathered"
            with whole_model(self.engine) as model:
                texts, stats = self._decode_or_split(model, prompts, sampling, self._rows(row_bytes))
        else:
            mode = "sharded"
            with _evaluation_mode(self.engine):
                texts, stats = _decoder(self.engine.module.model)(
                    self.engine.module.model,
                    prompts,
                    sampling,
                    self.vocabulary,
                    self._rows(row_bytes),
                    distributed.anywhere,
                )
        self.last = RolloutStats(
            mode, time.perf_counter() - started_s, len(prompts), stats.tokens, stats.prefills + stats.steps,
            stats.peak_rows, stats.cache_bytes / MIB,
        )  # fmt: skip
        return [
            Example(np.concatenate([prompt, text]).astype(np.int32), len(prompt))
            for prompt, text in zip(prompts, texts, strict=True)
        ]

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
        longest = max(len(text) for text in texts)
        padded = [[*text.tolist(), *[self.vocabulary.pad_id] * (longest - len(text))] for text in texts]
        is_text = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        return RolloutBatch(
            input_ids=torch.cat([ids_BT, ids_BT.new_tensor(padded)], 1),
            attention_mask=torch.cat([mask_BT, mask_BT.new_tensor(is_text)], 1),
            response_start_idx=ids_BT.new_full((rows,), width),
        )

    def _decode_or_split(
        self, model: PreTrainedModel, prompts: Sequence[np.ndarray], sampling: SeededSampling, rows: int
    ) -> tuple[list[np.ndarray], DecodeStats]:
        def work(size: float | None) -> tuple[list[np.ndarray], DecodeStats]:
            # A text is a function of its seed: what is tried again says the same.
            return _decoder(model)(model, prompts, sampling, self.vocabulary, int(min(rows, size or rows)))

        return self.rows.run(work, whole=min(rows, len(prompts)))

    def _rows(self, row_bytes: int) -> int:
        budget = self.cache_mib * MIB if self.cache_mib else _free_bytes() // 2
        return int(min(self.rows.size or 10**9, max(1, budget // row_bytes)))

    def _gathers(self, row_bytes: int) -> bool:
        if self.engine.zero_optimization_stage() < 3 or self.gather == "always":
            return True
        if self.gather == "never":
            return False
        parameters = self.engine.module.model.parameters()
        model_bytes = sum(p.ds_numel * p.element_size() for p in parameters if p.ds_numel != p.numel())
        cache_bytes = self.cache_mib * MIB if self.cache_mib else row_bytes
        return distributed.everywhere(model_bytes + cache_bytes <= 0.8 * _free_bytes())


def _decoder(model: PreTrainedModel) -> Any:
    if model.config.is_encoder_decoder:
        return decode_seq2seq
    return decode if is_supported(model) else plain_decode


def _free_bytes() -> int:
    """Free memory where this rank's parameters are; on a CPU, its share of what the node has."""
    if torch.cuda.is_available() and distributed.device().type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world()))


@contextmanager
def _evaluation_mode(engine: Any) -> Iterator[None]:
    was_training = engine.module.training
    engine.module.eval()
    try:
        yield
    finally:
        engine.module.train(was_training)


@contextmanager
def whole_model(engine: Any) -> Iterator[PreTrainedModel]:
    """The engine's model with all parameters on this rank and without ZeRO hooks, in eval mode. Collective to enter and
    to leave; between the two the ranks are free. Hooks and mode come back even when generation fails."""
    model = engine.module.model
    with _evaluation_mode(engine):
        if engine.zero_optimization_stage() < 3:
            yield model
            return
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
            # With the hooks on, every layer is gathered and released for every token, gathered before or not.
            offload._remove_module_hooks()
            offload.forward_hooks.clear()  # deepspeed keeps the dead handles, and pushes the module once per set-up
            offload.backward_hooks.clear()
            FWD_MODULE_STACK.pop()
            try:
                yield model
            finally:
                offload.setup_zero_stage3_hooks()
